//! A vCPU's shared state with the limiter around it, for the models of the adapter: its files show themselves to this crate alone.

use std::sync::Arc;
use std::time::Duration;

use crate::accept_penalty::Ended;
use crate::calculate::Shipped;
use crate::kick::{Kick, Kicker};
use crate::rate::{Nanos, PageRate};
use crate::set_penalty::Penalty;
use crate::shared::{Interrupter, SharedVcpu, VmLimiter};
use crate::sys::{self, KickSignal};
use crate::throttle::ThrottleThread;

/// One vCPU, limited.
#[derive(Clone, Debug)]
pub struct Vcpu {
    limiter: Arc<VmLimiter>,
    shared: Arc<SharedVcpu>,
}

impl Vcpu {
    /// A vCPU whose limit kicks can hold. A twin's kicks count before their signal is sent, with [`Vcpu::raise`].
    ///
    /// # Panics
    /// Never.
    pub fn new(twin: bool) -> Self {
        let limiter = VmLimiter::new(Shipped::default());
        let index = limiter.register().expect("room for one");
        limiter.set_limit(index, Some(PageRate::from_pages_per_sec(10_000)));
        let shared = SharedVcpu::new(0, index, sys::RunPage, Some(KickSignal::new(twin)));
        Self { limiter: Arc::new(limiter), shared: Arc::new(shared) }
    }

    /// `DirtyLimit::set_limit`'s first half.
    pub fn set_limit(&self, pages: u32) {
        self.limiter.set_limit(self.shared.index, Some(PageRate::from_pages_per_sec(pages)));
    }

    /// `DirtyLimit::set_limit`'s second half.
    pub fn tell(&self) {
        self.shared.notify(&self.limiter);
    }

    /// The penalty in force.
    pub fn penalty(&self) -> Penalty {
        self.shared.cell(&self.limiter).penalty.accept()
    }

    /// `Interrupter::interrupt`.
    pub fn interrupt(&self) {
        Interrupter(self.shared.clone()).interrupt();
    }

    /// Interrupts so far.
    pub fn interrupts(&self) -> u32 {
        self.shared.interrupts()
    }

    /// Pauses for ever, unless the penalty is another or interrupts are not `known`; whether that is why it ended. With a
    /// `blind` futex, a twin.
    pub fn pause(&self, penalty: Penalty, known: u32, blind: bool) -> bool {
        let pause = || self.shared.pause(Nanos::MAX, self.shared.cell(&self.limiter), penalty, known, &mut || false);
        let ended = if blind { sys::blind(pause) } else { pause() };
        ended == Ended::Wanted
    }

    /// `SharedVcpu::take`.
    pub fn take(&self) -> bool {
        self.shared.take()
    }

    /// `SharedVcpu::leave`.
    pub fn leave(&self) {
        self.shared.leave();
    }

    fn signal(&self) -> &KickSignal {
        self.shared.kick.as_ref().expect("with a kick signal")
    }

    /// Sends the kick signal and nothing else.
    pub fn raise(&self) {
        self.signal().raise();
    }

    /// Whether KVM_RUN would return at once.
    pub fn is_kicked(&self) -> bool {
        self.signal().is_pending()
    }

    /// The thread's side of its kicks.
    ///
    /// # Panics
    /// Never.
    pub fn kicks(&self) -> Kicks {
        let mut kicker = Kicker::new(Kick::Signal(0));
        kicker.disarm(&self.shared, false).expect("the model binds");
        Kicks(kicker)
    }
}

/// What `before_run` does about kicks.
#[derive(Debug)]
pub struct Kicks(Kicker);

impl Kicks {
    /// Before a run: takes back what was sent; whether there was anything to look at.
    ///
    /// # Panics
    /// Never.
    pub fn look(&mut self, vcpu: &Vcpu) -> bool {
        let due = self.0.is_due(&vcpu.shared);
        if due {
            self.0.disarm(&vcpu.shared, false).expect("the model disarms");
        }
        due
    }
}

/// Starts the throttle thread and drops it. With a `blind` futex, a twin.
///
/// # Panics
/// Never.
pub fn throttle(blind: bool) {
    let run = || drop(ThrottleThread::spawn(|| true, Duration::from_millis(50)).expect("the model has threads"));
    if blind { sys::blind(run) } else { run() }
}
