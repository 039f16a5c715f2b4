//! What the core's `sync` offers, made of loom's types.

use std::marker::PhantomData;
use std::panic::Location;

use bytemuck::Pod;
use loom::sync::atomic::AtomicU32;

pub(crate) use loom::sync::MutexGuard;
pub(crate) use std::sync::atomic::Ordering;

use crate::weaken;

/// A typed atomic of 32 bits.
#[derive(Debug)]
pub(crate) struct Atomic<T> {
    word: AtomicU32,
    value: PhantomData<T>,
}

impl<T: Pod> Atomic<T> {
    pub(crate) fn new(value: T) -> Self {
        const { assert!(size_of::<T>() == 4, "every atomic of the core has 32 bits") };
        Self { word: AtomicU32::new(bytemuck::cast(value)), value: PhantomData }
    }

    #[track_caller]
    pub(crate) fn load(&self, order: Ordering) -> T {
        bytemuck::cast(self.word.load(weaken::order(order, Location::caller())))
    }

    #[track_caller]
    pub(crate) fn store(&self, value: T, order: Ordering) {
        self.word.store(bytemuck::cast(value), weaken::order(order, Location::caller()));
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
