//! Waiting on a word. Raw calls: the standard library's sleeps hide a VMM's kick signal, and `nanosleep` is not in every
//! VMM's seccomp filter, while these two operations are.

use dirtylimit_core::{Nanos, SECOND};

use crate::sync::AtomicU32;

/// Why a wait ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wait {
    /// The word was woken, or no longer had the value.
    Woken,
    /// The time came.
    TimedOut,
    /// A signal was delivered to this thread.
    Signal,
}

/// Waits while `word` is `value`, until `deadline` on [`super::now`]'s clock.
pub(crate) fn wait(word: &AtomicU32, value: u32, deadline: Nanos) -> Wait {
    let deadline = libc::timespec {
        tv_sec: libc::time_t::try_from(deadline / SECOND).unwrap_or(libc::time_t::MAX),
        tv_nsec: (deadline % SECOND).try_into().unwrap_or(0),
    };
    // SAFETY: FUTEX_WAIT_BITSET reads the word, which outlives the call, and the deadline, which is absolute and by
    // CLOCK_MONOTONIC (no FUTEX_CLOCK_REALTIME); the fifth argument is unused.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG,
            value,
            &raw const deadline,
            std::ptr::null::<u32>(),
            libc::FUTEX_BITSET_MATCH_ANY,
        )
    };
    if result == 0 {
        return Wait::Woken;
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::ETIMEDOUT) => Wait::TimedOut,
        Some(libc::EINTR) => Wait::Signal,
        _ => Wait::Woken, // EAGAIN: the word has changed
    }
}

/// Wakes all who wait on `word`. Async-signal-safe but for `errno`.
pub(crate) fn wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE only uses the word's address.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX);
    }
}
