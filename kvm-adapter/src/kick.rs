//! Ending a slice by a signal, where the ring cannot: right after it was emptied, or where it is larger than what the
//! guest writes to (each page is logged once per reset, so such a ring never fills). When to do so is the core's
//! ([`dirtylimit_core::kicked`]).

use std::time::Duration;

use dirtylimit_core::kicked::RunTime;

use crate::Error;
use crate::error::system;
use crate::seat::Seat;
use crate::sys::Timer;

/// Who ends a slice that the ring does not.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Kick {
    /// Nobody: the vCPU runs until its ring is full, and pays for that.
    #[default]
    Off,
    /// The library, by this real-time signal that nobody else uses (say `SIGRTMIN() + 7`), from a timer of each vCPU's
    /// thread, and from the tick where a limit is news. No handler is installed: the thread that first calls
    /// [`crate::Vcpu::before_run`] gets the signal blocked, and its KVM_RUN the signal mask that the thread has then, with
    /// the signal open. Not for VMMs that use `KVM_SET_SIGNAL_MASK` themselves.
    Signal(i32),
    /// The VMM, by its own means: when a limit was set, and when [`crate::Paid::kick_after`] has passed since
    /// [`crate::Vcpu::before_run`] returned.
    Vmm,
}

/// One vCPU's kicks.
#[derive(Debug)]
pub(crate) struct Kicker {
    kick: Kick,
    timer: Option<Timer>,
    pub(crate) run_time: RunTime,
    /// Ring entries counted when the vCPU last ran under a kick.
    gross: Option<u32>,
    /// Kicks by others that were taken note of.
    kicks: u32,
}

impl Kicker {
    pub(crate) fn new(kick: Kick) -> Self {
        Self { kick, timer: None, run_time: RunTime::new(), gross: None, kicks: 0 }
    }

    /// Whether there is somebody to end a slice.
    pub(crate) fn is_on(&self) -> bool {
        self.kick != Kick::Off
    }

    /// Whether the run that is over was to be ended by a kick, so that its pages are in the ring and nobody metered them;
    /// or the first is to come, and the thread is not bound. No load without a kick signal, and then one.
    pub(crate) fn is_due(&self, seat: &Seat) -> bool {
        self.gross.is_some() || seat.kick.is_some() && (self.timer.is_none() || self.kicks != seat.kicks())
    }

    /// The run is over; before the first, binds the thread.
    pub(crate) fn disarm(&mut self, seat: &Seat) -> Result<(), Error> {
        let Some(signal) = &seat.kick else { return Ok(()) };
        let Some(timer) = &mut self.timer else {
            seat.bind(signal.bind().map_err(system("KVM_SET_SIGNAL_MASK, for kicks"))?);
            self.timer = Some(Timer::new(signal).map_err(system("timer_create, for kicks"))?);
            return Ok(());
        };
        if self.gross.is_some() || self.kicks != seat.kicks() {
            self.kicks = seat.kicks();
            timer.disarm(signal);
        }
        Ok(())
    }

    /// Learns from the run that is over, which was given `slice`, once its pages are metered; whether it was one that a
    /// kick was to end.
    pub(crate) fn learn(&mut self, slice: u32, gross: u32) -> bool {
        let before = self.gross.take();
        match before {
            Some(before) => self.run_time.learn(slice, gross.wrapping_sub(before)),
            None => self.run_time.begin(),
        }
        before.is_some()
    }

    /// Arms a kick for the run to come.
    pub(crate) fn arm(&mut self, gross: u32) -> Duration {
        self.gross = Some(gross);
        if let Some(timer) = &mut self.timer {
            timer.arm(self.run_time.get());
        }
        Duration::from_nanos(self.run_time.get())
    }
}
