//! What the adapter's `sys` offers, as far as its concurrent parts need it: a futex, a signal that ends KVM_RUN, and a time
//! that stands still, so that no timeout makes good for a wake-up that was lost: that is a deadlock, which loom reports.

use std::cell::Cell;
use std::io;

use loom::sync::Mutex;
use loom::sync::atomic::Ordering;

use crate::accept_penalty::TIMERS;
use crate::rate::Nanos;
use crate::sync::AtomicU32;

thread_local! {
    /// A twin's kernel: its futex does not compare.
    static BLIND: Cell<bool> = const { Cell::new(false) };
}

/// Has the futex sleep whatever the word's value is, as if nobody had looked at it before, while `run` runs.
pub(crate) fn blind<R>(run: impl FnOnce() -> R) -> R {
    BLIND.set(true);
    let result = run();
    BLIND.set(false);
    result
}

pub(crate) fn now() -> Nanos {
    0
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wait {
    Woken,
    /// By the kernel alone: no model has it.
    Signal,
}

/// Waits while `word` is `value`. The kernel compares under the lock of the word's queue.
pub(crate) fn wait(word: &AtomicU32, value: u32, _: Nanos) -> Wait {
    let queue = word.queue.lock().expect("not poisoned");
    // Relaxed: whoever has changed the word and then woken its queue was there before us.
    if BLIND.get() || word.word.load(Ordering::Relaxed) == value {
        drop(word.woken.wait(queue).expect("not poisoned"));
    }
    Wait::Woken
}

pub(crate) fn wake(word: &AtomicU32) {
    let _queue = word.queue.lock().expect("not poisoned");
    word.woken.notify_all();
}

/// The vCPU's page, with nothing in it.
#[derive(Debug)]
pub(crate) struct RunPage;

impl RunPage {
    pub(crate) fn immediate_exit(&self) -> bool {
        false
    }

    pub(crate) fn is_same(&self, _: &Self) -> bool {
        true
    }

    pub(crate) fn is_full(&self) -> bool {
        false
    }

    pub(crate) fn take_full(&self) -> bool {
        false
    }
}

/// A signal that stays pending, and ends each KVM_RUN, until it is taken back.
#[derive(Debug)]
pub(crate) struct KickSignal {
    pending: Mutex<bool>,
    /// A twin's: sent by hand.
    by_hand: bool,
}

impl KickSignal {
    pub(crate) fn new(by_hand: bool) -> Self {
        Self { pending: Mutex::new(false), by_hand }
    }

    pub(crate) fn signal(&self) -> i32 {
        0
    }

    pub(crate) fn is_ours(&self) -> bool {
        true
    }

    pub(crate) fn bind(&self) -> io::Result<Bound> {
        self.drain();
        Ok(Bound { timer: Timer, thread: 1, is_to_be_tried: false })
    }

    pub(crate) fn send(&self, _: i32) {
        if !self.by_hand {
            self.raise();
        }
    }

    pub(crate) fn raise(&self) {
        *self.pending.lock().expect("not poisoned") = true;
    }

    pub(crate) fn is_pending(&self) -> bool {
        *self.pending.lock().expect("not poisoned")
    }

    fn drain(&self) {
        *self.pending.lock().expect("not poisoned") = false;
    }
}

#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) timer: Timer,
    pub(crate) thread: i32,
    pub(crate) is_to_be_tried: bool,
}

/// A timer that never comes.
#[derive(Debug)]
pub(crate) struct Timer;

impl Timer {
    pub(crate) fn is_here(&self) -> bool {
        true
    }

    pub(crate) fn arm(&mut self, _: Nanos) {}

    pub(crate) fn disarm(&mut self, signal: &KickSignal) {
        signal.drain();
    }
}

/// Timers that never come.
#[derive(Debug)]
pub(crate) struct Interrupts;

impl Interrupts {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self)
    }

    pub(crate) fn arm(&self, _: [Nanos; TIMERS]) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) struct SignalsBlocked;

impl SignalsBlocked {
    pub(crate) fn for_a_new_thread() -> Self {
        Self
    }
}
