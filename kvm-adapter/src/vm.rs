//! What all handles on one VM share.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use dirtylimit_core::{Nanos, SECOND};

use crate::caps::{Caps, Config};
use crate::harvest::Harvest;
use crate::kick::Kick;
use crate::shared::VmLimiter;
use crate::sync::{AtomicU32, Ordering};
use crate::sys::{self, Kernel, SignalsBlocked};
use crate::vcpu_cells::VcpuCells;

/// How long a thread that waits for the lock lets a vCPU's thread go first, which tries again within a quarter of it.
/// (For tests of the order longer than any thread waits for a CPU.)
const COURTESY: Nanos = if cfg!(test) { 2 * SECOND } else { 200_000 };

pub(crate) struct Vm {
    pub(crate) kernel: Box<dyn Kernel>,
    pub(crate) caps: Caps,
    pub(crate) ring_entries: u32,
    pub(crate) kick: Kick,
    pub(crate) prompt: bool,
    pub(crate) limiter: VmLimiter,
    harvest: Mutex<Harvest>,
    /// Futex: 1 since somebody tried the lock in vain, until somebody tries with success.
    hurry: AtomicU32,
}

/// Without what the lock guards, which is as large as the guest's memory is, and the limiter's table.
impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { caps, ring_entries, kick, hurry, .. } = self;
        let mut vm = f.debug_struct("Vm");
        vm.field("caps", caps).field("ring_entries", ring_entries).field("kick", kick).field("hurry", hurry);
        vm.finish_non_exhaustive()
    }
}

/// The harvest's lock, held with every signal blocked: a handler of this thread that pauses its vCPU (kvmtool's does) must
/// not find it taken by the code that it interrupted.
pub(crate) struct Locked<'a> {
    guard: MutexGuard<'a, Harvest>,
    /// After the guard: fields are dropped in order.
    _signals: SignalsBlocked,
}

impl Vm {
    pub(crate) fn new(kernel: Box<dyn Kernel>, caps: Caps, config: &Config) -> Self {
        let limiter = VmLimiter::with_cells(config.policy, VcpuCells::new());
        limiter.vm().set_max_pause(config.max_pause);
        let Config { ring_entries, kick, prompt, .. } = *config;
        Self {
            kernel,
            caps,
            ring_entries,
            kick,
            prompt,
            limiter,
            harvest: Mutex::new(Harvest::new()),
            hurry: AtomicU32::new(0),
        }
    }

    /// Waits for the lock: for the control plane and a migration's thread. Held for bounded work: what is longer is done in
    /// pieces, each under a lock of its own, and a vCPU's thread that wants it gets it between two.
    pub(crate) fn lock(&self) -> Locked<'_> {
        self.let_pass();
        let _signals = SignalsBlocked::new();
        // A panic under the lock cannot leave more than entries collected, which the next reset takes.
        let guard = self.harvest.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { guard, _signals }
    }

    /// Tries the lock: for vCPU threads, and for callers that can do without.
    pub(crate) fn try_lock(&self) -> Option<Locked<'_>> {
        let _signals = SignalsBlocked::new();
        let guard = match self.harvest.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                // Relaxed: a request and no more; nothing is read for it.
                self.hurry.store(1, Ordering::Relaxed);
                return None;
            }
        };
        // Relaxed: as above.
        if self.hurry.load(Ordering::Relaxed) != 0 {
            self.hurry.store(0, Ordering::Relaxed);
            sys::wake(&self.hurry);
        }
        Some(Locked { guard, _signals })
    }

    /// Lets a thread that tried the lock in vain try again first. A mutex alone would not: the next to wait for it, or to take
    /// it again and again, has it long before.
    fn let_pass(&self) {
        // Relaxed: as in `try_lock`; the futex sees the word at the latest.
        if self.hurry.load(Ordering::Relaxed) == 0 {
            return;
        }
        let until = sys::now().saturating_add(COURTESY);
        while self.hurry.load(Ordering::Relaxed) != 0 {
            if sys::now() >= until {
                // It has given up, or was served by another.
                self.hurry.store(0, Ordering::Relaxed);
                return;
            }
            sys::wait(&self.hurry, 1, until);
        }
    }
}

impl std::ops::Deref for Locked<'_> {
    type Target = Harvest;
    fn deref(&self) -> &Harvest {
        &self.guard
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Harvest {
        &mut self.guard
    }
}
