//! What all handles on one VM share.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use crate::caps::{Caps, Config};
use crate::harvest::Harvest;
use crate::kick::Kick;
use crate::seat::VmLimiter;
use crate::sys::{Kernel, SignalsBlocked};

#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) kernel: Box<dyn Kernel>,
    pub(crate) caps: Caps,
    pub(crate) ring_entries: u32,
    pub(crate) kick: Kick,
    pub(crate) prompt: bool,
    /// Hundreds of kilobytes, which are not to be moved about on the stack.
    pub(crate) limiter: Box<VmLimiter>,
    harvest: Mutex<Harvest>,
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
        let limiter = Box::new(VmLimiter::new(config.policy));
        limiter.vm().set_max_pause(config.max_pause);
        let Config { ring_entries, kick, prompt, .. } = *config;
        Self { kernel, caps, ring_entries, kick, prompt, limiter, harvest: Mutex::new(Harvest::new()) }
    }

    /// Waits for the lock: for the control plane and a migration's thread.
    pub(crate) fn lock(&self) -> Locked<'_> {
        let _signals = SignalsBlocked::new();
        // A panic under the lock cannot leave more than entries collected, which the next reset takes.
        let guard = self.harvest.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { guard, _signals }
    }

    /// Tries the lock: for vCPU threads, and for whoever can do without.
    pub(crate) fn try_lock(&self) -> Option<Locked<'_>> {
        let _signals = SignalsBlocked::new();
        match self.harvest.try_lock() {
            Ok(guard) => Some(Locked { guard, _signals }),
            Err(TryLockError::Poisoned(poisoned)) => Some(Locked { guard: poisoned.into_inner(), _signals }),
            Err(TryLockError::WouldBlock) => None,
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
