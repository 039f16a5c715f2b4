//! A scope in which this thread takes no signal.

use std::marker::PhantomData;

/// The kernel's set: a bit a signal, of which it has 64. The C library's own functions leave out the signals that it keeps
/// for itself (32 and 33 in glibc, by which `setresuid` and `pthread_cancel` reach every thread), so none is used here.
type Set = u64;

/// While it lives, this thread takes no signal (KVM.md, rule 3: a signal in the middle of a reset loses pages; and a
/// handler must not find our locks taken by the thread it interrupted). All 64 are blocked, those of the C library
/// included, but for SIGKILL and SIGSTOP, which nobody can block. What is no signal and interrupts a system call all the
/// same gets through: being stopped, traced or frozen, and the completions of an `io_uring` that this thread owns.
#[derive(Debug)]
pub(crate) struct SignalsBlocked {
    before: Set,
    /// The mask is the thread's: the guard must not leave it.
    _not_send: PhantomData<*const ()>,
}

impl SignalsBlocked {
    /// Blocks all of them: for short and bounded work, because `setresuid` in another thread waits for this one.
    pub(crate) fn new() -> Self {
        Self::block(Set::MAX)
    }

    /// Blocks what a new thread shall never take, for it to inherit. The C library's own stay open: a thread that never
    /// took them would make each `setresuid` of the process wait for ever.
    pub(crate) fn for_a_new_thread() -> Self {
        // 32 to SIGRTMIN - 1 are the C library's.
        let reserved = (32..libc::SIGRTMIN()).map(|signal| 1 << (signal - 1)).fold(0, |set, bit: Set| set | bit);
        Self::block(!reserved)
    }

    fn block(set: Set) -> Self {
        Self { before: set_mask(set), _not_send: PhantomData }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        set_mask(self.before);
    }
}

/// Sets this thread's mask, and returns the one before.
pub(super) fn set_mask(set: Set) -> Set {
    let mut before: Set = 0;
    // SAFETY: the call reads `set` and writes `before`, both of the size that is its last argument. It fails only for bad
    // pointers, another size or another first argument.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const set, &raw mut before, size_of::<Set>());
    }
    before
}

/// The signals that this thread blocks: the kernel's set.
#[cfg(any(test, dirtylimit_planted))]
pub(crate) fn blocked_signals() -> u64 {
    let mut now: Set = 0;
    // SAFETY: as in `set_mask`; without a set the first argument counts for nothing.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, 0, std::ptr::null::<Set>(), &raw mut now, size_of::<Set>());
    }
    now
}
