//! What the `sync` of the core and that of the adapter offer, made of loom's types.

use std::panic::Location;

use loom::sync::atomic;

pub(crate) use loom::sync::MutexGuard;
pub(crate) use loom::thread;
pub(crate) use std::sync::atomic::Ordering;

use crate::weaken;

/// The adapter's atomics, as the standard library's.
macro_rules! atomics {
    ($($name:ident: $value:ty;)*) => {$(
        #[derive(Debug)]
        pub(crate) struct $name(atomic::$name);

        impl $name {
            pub(crate) fn new(value: $value) -> Self {
                Self(atomic::$name::new(value))
            }

            #[track_caller]
            pub(crate) fn store(&self, value: $value, order: Ordering) {
                self.0.store(value, weaken::order(order, Location::caller()));
            }
        }
    )*};
}
atomics! {
    AtomicBool: bool;
    AtomicI32: i32;
}

/// A word of the core.
#[derive(Debug)]
pub(crate) struct Word(atomic::AtomicU32);

impl Word {
    pub(crate) fn new(value: u32) -> Self {
        Self(atomic::AtomicU32::new(value))
    }

    #[track_caller]
    pub(crate) fn load(&self, order: Ordering) -> u32 {
        self.0.load(weaken::order(order, Location::caller()))
    }

    #[track_caller]
    pub(crate) fn store(&self, value: u32, order: Ordering) {
        self.0.store(value, weaken::order(order, Location::caller()));
    }
}

impl AtomicBool {
    #[track_caller]
    pub(crate) fn compare_exchange(
        &self,
        current: bool,
        new: bool,
        success: Ordering,
        failure: Ordering,
    ) -> Result<bool, bool> {
        self.0.compare_exchange(current, new, weaken::order(success, Location::caller()), failure)
    }
}

impl AtomicI32 {
    #[track_caller]
    pub(crate) fn load(&self, order: Ordering) -> i32 {
        self.0.load(weaken::order(order, Location::caller()))
    }
}

/// A word that threads may wait for, as a futex.
#[derive(Debug)]
pub(crate) struct AtomicU32 {
    pub(crate) word: atomic::AtomicU32,
    /// The kernel's queue for the word, under its lock.
    pub(crate) queue: loom::sync::Mutex<()>,
    pub(crate) woken: loom::sync::Condvar,
}

impl AtomicU32 {
    pub(crate) fn new(value: u32) -> Self {
        let (queue, woken) = (loom::sync::Mutex::new(()), loom::sync::Condvar::new());
        Self { word: atomic::AtomicU32::new(value), queue, woken }
    }

    #[track_caller]
    pub(crate) fn load(&self, order: Ordering) -> u32 {
        self.word.load(weaken::order(order, Location::caller()))
    }

    #[track_caller]
    pub(crate) fn store(&self, value: u32, order: Ordering) {
        self.word.store(value, weaken::order(order, Location::caller()));
    }

    #[track_caller]
    pub(crate) fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
        self.word.fetch_add(value, weaken::order(order, Location::caller()))
    }
}

/// A lock that is never poisoned, as the core's.
#[derive(Debug)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().expect("a thread of the model panicked under the lock")
    }
}

/// Plain functions: loom's constructors are not `const`.
macro_rules! const_fn {
    ($(#[$attribute:meta])* $visibility:vis fn $($rest:tt)*) => {
        $(#[$attribute])* $visibility fn $($rest)*
    };
}
pub(crate) use const_fn;

/// As the core's, evaluated for each element.
macro_rules! array_of {
    ($element:expr; $length:expr) => {
        core::array::from_fn(|_| $element)
    };
}
pub(crate) use array_of;

/// Small, so that the models' rings are.
pub const RESERVED: u32 = 1;
/// As many vCPUs as a model needs.
pub(crate) type Cells = crate::Inline<1>;
