//! Ending a slice by a signal, where the ring cannot: right after it was emptied, or where it is larger than what the
//! guest writes to (each page is logged once per reset, so such a ring never fills). When to do so is the core's
//! ([`dirtylimit_core::Run`]).

use std::io;

use dirtylimit_core::{Nanos, TIMERS};

use crate::Error;
use crate::error::{kick_is_taken, system};
use crate::shared::SharedVcpu;
use crate::sys::{Interrupts, Timer};

/// Who ends a slice that the ring does not.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub enum Kick {
    /// The ring alone, without a signal; and where the CPU was seen to hand pages over in lumps (Intel's PML), timers make it
    /// do so when the slice should be used up. Each such vCPU has four (`timerfd_create`), armed before KVM_RUN
    /// (`timerfd_settime`), whose interrupts nobody sees but KVM. A lump that passes all the same, because the thread was
    /// moved to another CPU, is paid for in pauses of at most `max_pause`, but at once where the next would be more than a
    /// second of debt: [`dirtylimit_core::Unenforced::Lumps`]. Where there are no timers: as [`Kick::Off`].
    #[default]
    Auto,
    /// Nobody: the vCPU runs until its ring is full, and pays for that. Where pages come in lumps it pauses for as long as a
    /// lump costs, up to a second and whatever `max_pause` is, which [`dirtylimit_core::Unenforced::Lumps`] tells.
    Off,
    /// The library, by this real-time signal that nobody else uses (say `SIGRTMIN() + 7`), from a timer of each vCPU's
    /// thread, and from the tick where a limit is news. Each thread that calls [`crate::Vcpu::before_run`] gets the signal
    /// blocked, and the vCPU's KVM_RUN the signal mask that the thread had before, with the signal open; the first KVM_RUN
    /// after that may be kicked at once. The signal gets a handler, which does no more than to block it again where the VMM
    /// has opened it. Not for VMMs that use `KVM_SET_SIGNAL_MASK` themselves.
    Signal(i32),
    /// The VMM, by its own means: when a limit was set, and when [`crate::Decision::Enter`]'s `kick_after` has passed since
    /// [`crate::Vcpu::before_run`] returned.
    Vmm,
}

impl Kick {
    /// Whether runs are ended from outside, wherever the ring is.
    pub(crate) fn ends_runs(self) -> bool {
        matches!(self, Self::Signal(_) | Self::Vmm)
    }
}

/// What ends one vCPU's runs.
#[derive(Debug)]
pub(crate) struct Kicker {
    kick: Kick,
    timer: Option<Timer>,
    /// With [`Kick::Auto`], from the first lump on; an error where they are not to be had.
    interrupts: Option<io::Result<Interrupts>>,
    /// Kicks by others that were taken note of.
    kicks: u32,
}

impl Kicker {
    pub(crate) const fn new(kick: Kick) -> Self {
        Self { kick, timer: None, interrupts: None, kicks: 0 }
    }

    #[cfg(test)]
    pub(crate) fn has_made_timers(&self) -> bool {
        matches!(self.interrupts, Some(Ok(_)))
    }

    /// Whether there are timers to make the CPU hand its pages over; makes them.
    pub(crate) fn has_timers(&mut self) -> bool {
        let interrupts = (self.kick == Kick::Auto).then(|| self.interrupts.get_or_insert_with(Interrupts::new));
        interrupts.is_some_and(|interrupts| interrupts.is_ok())
    }

    /// Whether somebody else has kicked the vCPU, or the thread is not the one that kicks go to. No load without a kick
    /// signal, and then two.
    #[inline]
    pub(crate) fn is_due(&self, shared: &SharedVcpu) -> bool {
        let bound = || self.timer.as_ref().is_some_and(Timer::is_here);
        shared.kick.is_some() && (self.kicks != shared.kicks() || !bound())
    }

    /// The run is over, and `timed` if its end was armed; before the first on a thread, binds it.
    pub(crate) fn disarm(&mut self, shared: &SharedVcpu, timed: bool) -> Result<(), Error> {
        let Some(signal) = &shared.kick else { return Ok(()) };
        // Before what is pending is taken back: a kick that comes between the two is then seen again.
        let kicks = shared.kicks();
        match &mut self.timer {
            Some(timer) if timer.is_here() => {
                if timed || self.kicks != kicks {
                    timer.disarm(signal);
                }
            }
            _ => {
                if !signal.is_ours() {
                    return Err(kick_is_taken(signal.signal()));
                }
                self.timer = None; // the other thread's
                let bound = signal.bind().map_err(system("KVM_SET_SIGNAL_MASK and timer_create, for kicks"))?;
                shared.bind(bound.thread);
                self.timer = Some(bound.timer);
                if bound.is_to_be_tried {
                    shared.kick();
                }
            }
        }
        self.kicks = kicks;
        Ok(())
    }

    /// Nobody is kicked any more, nor is there anything left of a kick where this is the thread that it went to.
    pub(crate) fn release(&mut self, shared: &SharedVcpu) {
        // Once the thread has ended its number may be another thread's.
        shared.bind(0);
        if let (Some(signal), Some(mut timer)) = (&shared.kick, self.timer.take().filter(Timer::is_here)) {
            timer.disarm(signal);
        }
    }

    /// Arms the timers for the run to come.
    pub(crate) fn arm_timers(&mut self, times: [Nanos; TIMERS]) {
        let Some(Ok(interrupts)) = &self.interrupts else { return };
        if let Err(error) = interrupts.arm(times) {
            self.interrupts = Some(Err(error));
        }
    }

    /// Arms a kick for the run to come.
    pub(crate) fn arm(&mut self, time: Nanos) {
        if let Some(timer) = &mut self.timer {
            timer.arm(time);
        }
    }
}
