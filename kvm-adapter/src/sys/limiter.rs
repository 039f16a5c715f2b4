//! The limiter's half a megabyte, which is not to pass through the caller's stack: a VMM's threads may have a small one.

use dirtylimit_core::{Paced, Shipped};

use crate::shared::VmLimiter;

/// A new limiter, on the heap.
pub(crate) fn new_limiter(policy: Shipped) -> Box<VmLimiter> {
    static NEW: VmLimiter = VmLimiter::new(Shipped::Paced(Paced));
    let mut limiter = Box::<VmLimiter>::new_uninit();
    // SAFETY: the copy is a whole limiter, and the only one in use: nobody else reaches `NEW`, so that it is as it was made,
    // unlocked; and a limiter owns nothing outside itself.
    let limiter = unsafe {
        limiter.as_mut_ptr().copy_from_nonoverlapping(&raw const NEW, 1);
        limiter.assume_init()
    };
    limiter.set_policy(policy);
    limiter
}
