//! Bugs that the sanitizers must find before `ci/sanitizers.sh` believes that there are none: a program that makes the one
//! it is told, `race` or `freed`. It proves nothing by itself, so `cargo test` runs it only by name.

use std::cell::UnsafeCell;
use std::sync::Barrier;
use std::{env, process, thread};

struct Unlocked(UnsafeCell<u64>);

// SAFETY: none, which is the bug.
unsafe impl Sync for Unlocked {}

/// For ThreadSanitizer.
fn two_threads_write_without_a_lock() {
    let (shared, begin) = (&Unlocked(UnsafeCell::new(0)), &Barrier::new(2));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                // At once: of a thread that has ended before the other begins, no trace may be left.
                begin.wait();
                // Volatile, or the compiler may see that nobody reads it.
                // SAFETY: none, which is the bug.
                (0..1000).for_each(|_| unsafe { { shared }.0.get().write_volatile(1) });
            });
        }
    });
}

/// For AddressSanitizer.
fn a_word_is_read_after_it_was_freed() {
    let word = Box::into_raw(Box::new(1u64));
    // SAFETY: the word comes from a box; it is read after its end, which is the bug.
    unsafe {
        drop(Box::from_raw(word));
        println!("{}", word.read_volatile());
    }
}

fn main() {
    match env::args().nth(1).as_deref() {
        Some("race") => two_threads_write_without_a_lock(),
        Some("freed") => a_word_is_read_after_it_was_freed(),
        _ => {
            eprintln!("sanitized: race and freed are what there is");
            process::exit(2);
        }
    }
}
