//! The ready-made throttle thread, for VMMs without an event loop.

use std::sync::Arc;
use std::time::Duration;

use dirtylimit_core::Nanos;

use crate::Error;
use crate::error::system;
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{AtomicU32, Ordering};
use crate::sys::{self, SignalsBlocked};

/// Ticks until it is dropped, or until nobody else holds the VM. All signals are blocked in it, but for those that the C
/// library needs for itself (`setresuid` reaches every thread by one).
#[derive(Debug)]
pub struct ThrottleThread {
    stop: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl ThrottleThread {
    /// Calls `tick` every `period`, until it returns false.
    pub(crate) fn spawn(tick: impl FnMut() -> bool + Send + 'static, period: Duration) -> Result<Self, Error> {
        let period = nanos(period);
        let stop = Arc::new(AtomicU32::new(0));
        let word = stop.clone();
        // The thread inherits the mask, so that it has no moment with signals open.
        let _blocked = SignalsBlocked::for_a_new_thread();
        let thread = thread::Builder::new()
            .name("dirtylimit".into())
            .spawn(move || run(tick, &word, period))
            .map_err(system("starting the throttle thread"))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

/// Penalties lapse when ticks are further apart than the lease.
pub(crate) fn nanos(period: Duration) -> Nanos {
    let period = period.clamp(Duration::from_millis(1), Duration::from_secs(1));
    Nanos::try_from(period.as_nanos()).unwrap_or(Nanos::MAX)
}

/// Calls `tick` every `period`, until it returns false or `stop` is not 0.
pub(crate) fn run(mut tick: impl FnMut() -> bool, stop: &AtomicU32, period: Nanos) {
    let mut next = sys::now();
    // Relaxed: a flag by itself; the futex sees it at the latest.
    while stop.load(Ordering::Relaxed) == 0 {
        let now = sys::now();
        if now < next {
            sys::wait(stop, 0, next);
            continue;
        }
        if !tick() {
            return;
        }
        next = next.max(now - period.min(now)) + period; // no burst of ticks after a suspend
    }
}

impl Drop for ThrottleThread {
    fn drop(&mut self) {
        // Relaxed: as in `run`.
        self.stop.store(1, Ordering::Relaxed);
        sys::wake(&self.stop);
        if let Some(thread) = self.thread.take() {
            // The thread may be the one that drops the VM's last handle; it has nothing to say in any case.
            let _ = thread.join();
        }
    }
}
