//! A scope in which this thread takes no signal.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// While it lives, every signal that can be blocked is, for this thread (KVM.md, rule 3: a signal in the middle of a
/// reset loses pages; and a handler must not find our locks taken by the thread it interrupted).
#[derive(Debug)]
pub(crate) struct SignalsBlocked {
    before: libc::sigset_t,
    /// The mask is the thread's: the guard must not leave it.
    _not_send: PhantomData<*const ()>,
}

impl SignalsBlocked {
    pub(crate) fn new() -> Self {
        let mut all = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        // SAFETY: sigfillset initialises `all`, pthread_sigmask reads it and initialises `before`; neither can fail for
        // valid pointers and SIG_SETMASK.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            Self { before: before.assume_init(), _not_send: PhantomData }
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: `before` is the mask that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}
