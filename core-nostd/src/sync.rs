//! The only place that names an atomic or a lock.
//!
//! `dirtylimit-loom` compiles the modules beside this one against its own `sync`, made of loom's types; so they take
//! everything concurrent from here, and build their `const` constructors with [`const_fn`] and [`array_of`], which loom's
//! cannot be.

/// An atomic word of 32 bits, which any machine that runs a hypervisor has.
pub(crate) use core::sync::atomic::{AtomicU32 as Word, Ordering};
pub(crate) use spin::Mutex;

/// A `const fn` here, a plain `fn` in the models.
macro_rules! const_fn {
    ($(#[$attribute:meta])* $visibility:vis fn $($rest:tt)*) => {
        $(#[$attribute])* $visibility const fn $($rest)*
    };
}
pub(crate) use const_fn;

/// An array of the given length, each element from the same constant expression; the models evaluate it each time.
macro_rules! array_of {
    ($element:expr; $length:expr) => {
        [const { $element }; $length]
    };
}
pub(crate) use array_of;

/// Entries that the kernel keeps free above the soft limit (`KVM_DIRTY_RING_RSVD_ENTRIES`). Less in the models, so that a
/// ring has few entries.
pub const RESERVED: u32 = 64;
