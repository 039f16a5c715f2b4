//! Bugs that the sanitizers must find before `ci/sanitizers.sh` believes that there are none. Nobody else runs them.

use std::cell::UnsafeCell;
use std::thread;

struct Unlocked(UnsafeCell<u64>);

// SAFETY: none, which is the bug.
unsafe impl Sync for Unlocked {}

#[test]
#[ignore = "a bug for ThreadSanitizer to find"]
fn two_threads_write_without_a_lock() {
    let shared = &Unlocked(UnsafeCell::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            // SAFETY: none, which is the bug.
            scope.spawn(|| (0..1000).for_each(|_| unsafe { *{ shared }.0.get() += 1 }));
        }
    });
}

#[test]
#[ignore = "a bug for AddressSanitizer to find"]
fn a_word_is_read_after_it_was_freed() {
    let word = Box::into_raw(Box::new(1u64));
    // SAFETY: the word comes from a box; it is read after its end, which is the bug.
    unsafe {
        drop(Box::from_raw(word));
        assert!(word.read_volatile() < u64::MAX);
    }
}
