//! The words between threads about one vCPU: its penalty, what its ring told, and whether it waits for room in that.

use crate::prepare::Counters;
use crate::set_penalty::PenaltyCell;
use crate::sync::{Ordering, Word, const_fn};

/// The words between the controller and one vCPU: two cache lines, each written from one side.
#[derive(Debug, Default)]
pub struct VcpuCell {
    /// Written by the controller, read by the vCPU's thread.
    pub penalty: PenaltyCell,
    /// Written by the ring's owner and the vCPU's thread, read by the controller.
    pub counters: Counters,
    /// Written by the vCPU's thread and the ring's owner.
    pub request: Request,
}

impl VcpuCell {
    const_fn! {
        /// No penalty, nothing reported, nothing asked for.
        pub fn new() -> Self {
            Self { penalty: PenaltyCell::new(), counters: Counters::new(), request: Request::new() }
        }
    }
}

/// A request of a vCPU's for a slice, which stands until a reset has freed that. How many pages is with the ring, under the
/// lock; this word is for the vCPU's thread, which looks without it.
#[derive(Debug)]
pub struct Request(Word);

impl Request {
    const_fn! {
        /// None stands.
        pub fn new() -> Self {
            Self(Word::new(0))
        }
    }

    /// Makes it, or takes it back. For the vCPU's thread, under the VM's lock.
    ///
    /// Wait-free: at most 3 instructions.
    pub fn make(&self, stands: bool) {
        // Relaxed: the lock orders it before the reset that frees the slice.
        self.0.store(stands.into(), Ordering::Relaxed);
    }

    /// Whether it stands. From any thread.
    ///
    /// Wait-free: at most 6 instructions.
    #[inline]
    pub fn stands(&self) -> bool {
        // Acquire: pairs with the release in `grant`: a vCPU that sees its slice free comes after the reset.
        self.0.load(Ordering::Acquire) != 0
    }

    /// A reset has freed the slice. Under the VM's lock.
    ///
    /// Wait-free: at most 4 instructions.
    pub fn grant(&self) {
        // Release: pairs with the acquire in `stands`.
        self.0.store(0, Ordering::Release);
    }
}

impl Default for Request {
    fn default() -> Self {
        Self::new()
    }
}
