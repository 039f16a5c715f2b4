//! What a vCPU's thread shares with the VM, without a lock: what outlives that thread, and what others use to reach it.

use std::sync::Arc;

use dirtylimit_core::{Ended, Limiter, Nanos, Penalty, Shipped, VcpuCell, VcpuIndex, ends_slices};

use crate::sync::{AtomicBool, AtomicI32, AtomicU32, Cells, Ordering};
use crate::sys::{self, KickSignal, RunPage, Wait};

pub(crate) type VmLimiter = Limiter<Shipped, Cells>;

/// The longest single wait: flags that no futex wakes (`immediate_exit`, a `stop` closure) are looked at so often.
const LOOK: Nanos = 10_000_000;

/// What a vCPU's thread shares with everybody else, without a lock.
#[derive(Debug)]
pub(crate) struct SharedVcpu {
    pub(crate) id: u32,
    pub(crate) index: VcpuIndex,
    run: RunPage,
    /// Whether a [`crate::Vcpu`] exists.
    taken: AtomicBool,
    /// Futex: changes whenever the vCPU's thread shall look up from a pause.
    wake: AtomicU32,
    /// Calls of [`Interrupter::interrupt`].
    interrupts: AtomicU32,
    /// With [`crate::Kick::Signal`].
    pub(crate) kick: Option<KickSignal>,
    /// The vCPU's thread, for kicks; 0 while unknown.
    thread: AtomicI32,
    kicks: AtomicU32,
}

impl SharedVcpu {
    pub(crate) fn new(id: u32, index: VcpuIndex, run: RunPage, kick: Option<KickSignal>) -> Self {
        Self {
            id,
            index,
            run,
            taken: AtomicBool::new(true),
            wake: AtomicU32::new(0),
            interrupts: AtomicU32::new(0),
            kick,
            thread: AtomicI32::new(0),
            kicks: AtomicU32::new(0),
        }
    }

    /// The vCPU's words in the limiter. Its index came from there.
    pub(crate) fn cell<'a>(&self, limiter: &'a VmLimiter) -> &'a VcpuCell {
        limiter.cell(self.index).expect("its index is one of its limiter's")
    }

    /// Whether the page is of the same vCPU.
    pub(crate) fn is_of(&self, run: &RunPage) -> bool {
        self.run.is_same(run)
    }

    /// Takes the shared state; whether it was free.
    pub(crate) fn take(&self) -> bool {
        // Acquire: pairs with the release in `leave`, so that the next owner comes after the last.
        self.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Frees the shared state for the next owner.
    pub(crate) fn leave(&self) {
        // Release: pairs with the acquire in `take`.
        self.taken.store(false, Ordering::Release);
    }

    /// Makes a pausing thread look again.
    pub(crate) fn wake(&self) {
        // Release: pairs with the acquire in `pause`, so that what was changed before is seen after.
        self.wake.fetch_add(1, Ordering::Release);
        sys::wake(&self.wake);
    }

    /// Calls of [`SharedVcpu::wake`].
    #[cfg(test)]
    pub(crate) fn wakes(&self) -> u32 {
        // Relaxed: one thread's look at its own work.
        self.wake.load(Ordering::Relaxed)
    }

    /// Interrupts so far.
    pub(crate) fn interrupts(&self) -> u32 {
        // Acquire: pairs with the release in `interrupt`.
        self.interrupts.load(Ordering::Acquire)
    }

    /// `thread` is the vCPU's, for kicks.
    pub(crate) fn bind(&self, thread: i32) {
        // Relaxed: a number by itself.
        self.thread.store(thread, Ordering::Relaxed);
    }

    /// Its penalty may be another: ends a pause, and a run where that is of use.
    pub(crate) fn notify(&self, limiter: &VmLimiter) {
        self.wake();
        if ends_slices(self.cell(limiter).penalty.accept()) {
            self.kick();
        }
    }

    /// Makes the vCPU's KVM_RUN return, or the next one, where kicks are the library's and the thread is known.
    pub(crate) fn kick(&self) {
        // Relaxed: as above.
        if let (Some(signal), thread @ 1..) = (&self.kick, self.thread.load(Ordering::Relaxed)) {
            signal.send(thread);
            // After the signal: who reads the count and takes back what is pending takes this one too. Relaxed: a count
            // by itself; the kernel orders the signal.
            self.kicks.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Kicks by others so far. A signal of theirs stays pending, and ends each KVM_RUN, until it is taken back.
    pub(crate) fn kicks(&self) -> u32 {
        // Relaxed: as above.
        self.kicks.load(Ordering::Relaxed)
    }

    /// Whether the last KVM_RUN returned with a full ring, which was not noted yet. For the vCPU's thread, which
    /// alone can rely on it; others may look.
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.run.is_full()
    }

    /// Notes that it did: once for each such exit.
    pub(crate) fn take_full(&self) -> bool {
        self.run.take_full()
    }

    /// Whether the VMM wants the thread to enter and leave KVM_RUN at once.
    pub(crate) fn immediate_exit(&self) -> bool {
        self.run.immediate_exit()
    }

    /// Pauses until `until` while `penalty` is in force, and `interrupts()` is `known`.
    pub(crate) fn pause(
        &self,
        until: Nanos,
        cell: &VcpuCell,
        penalty: Penalty,
        known: u32,
        stop: &mut dyn FnMut() -> bool,
    ) -> Ended {
        loop {
            // Acquire: pairs with the release in `wake`. Read before the conditions: a wake-up after one was looked at
            // changes the word, and the futex does not sleep.
            let word = self.wake.load(Ordering::Acquire);
            let now = sys::now();
            if self.interrupts() != known || stop() {
                return Ended::Wanted;
            }
            if self.immediate_exit() {
                return Ended::Hurry;
            }
            if now >= until {
                return Ended::Due;
            }
            if cell.penalty.accept() != penalty {
                return Ended::Changed;
            }
            if sys::wait(&self.wake, word, until.min(now + LOOK)) == Wait::Signal {
                return Ended::Wanted;
            }
        }
    }
}

/// Ends the current or else the next pause of a vCPU: from any thread, or from a signal handler.
#[derive(Clone, Debug)]
pub struct Interrupter(pub(crate) Arc<SharedVcpu>);

impl Interrupter {
    /// Makes [`crate::Vcpu::before_run`] return at once; what is owed stays owed. Async-signal-safe: two atomic
    /// additions and a futex wake (which may change `errno`, as any system call in a handler).
    pub fn interrupt(&self) {
        // Release: pairs with the acquire in `SharedVcpu::interrupts`.
        self.0.interrupts.fetch_add(1, Ordering::Release);
        self.0.wake();
    }
}
