//! What a vCPU waits for: its thread says so under the VM's lock, and whoever resets answers.

use crate::sync::{Atomic, Ordering, const_fn};

/// The slice that a vCPU has asked for and that no reset has freed yet.
#[derive(Debug)]
pub struct Request(Atomic<u32>);

impl Request {
    const_fn! {
        /// None.
        pub fn new() -> Self {
            Self(Atomic::new(0))
        }
    }

    /// Asks for a slice of that many pages; 0 takes a request back. For the vCPU's thread, under the VM's lock.
    ///
    /// Wait-free: at most 2 instructions.
    pub fn ask(&self, slice: u32) {
        // Relaxed: the lock orders it before the reset that frees the slice.
        self.0.store(slice, Ordering::Relaxed);
    }

    /// The slice in pages; 0: nothing is waited for. From any thread.
    ///
    /// Wait-free: at most 2 instructions.
    #[inline]
    pub fn pages(&self) -> u32 {
        // Acquire: pairs with the release in `grant`: who reads 0 comes after the reset.
        self.0.load(Ordering::Acquire)
    }

    /// A reset has freed the slice. Under the VM's lock.
    ///
    /// Wait-free: at most 2 instructions.
    pub fn grant(&self) {
        // Release: pairs with the acquire in `pages`.
        self.0.store(0, Ordering::Release);
    }
}

impl Default for Request {
    fn default() -> Self {
        Self::new()
    }
}
