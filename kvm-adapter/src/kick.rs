//! Ending a slice by a signal, where the ring cannot: right after it was emptied, or where it is larger than what the
//! guest writes to (each page is logged once per reset, so such a ring never fills).

use std::time::Duration;

use dirtylimit_core::Nanos;

use crate::Error;
use crate::error::system;
use crate::seat::Seat;
use crate::sys::{Timer, handle};

/// Who ends a slice that the ring does not.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Kick {
    /// Nobody: the vCPU runs until its ring is full, and pays for that.
    #[default]
    Off,
    /// The library: a timer, and the tick where a limit is news, by this signal (a real-time signal that nobody else uses, say `SIGRTMIN() + 7`). Its
    /// handler, which does nothing, is installed for the whole process when the first vCPU is added. Each vCPU's thread
    /// must have it unblocked in KVM_RUN; a kick that comes just before KVM_RUN is repeated after a millisecond.
    Signal(i32),
    /// The VMM, by its own means: when a limit was set, and when [`crate::Paid::kick_after`] has passed since
    /// [`crate::Vcpu::before_run`] returned.
    Vmm,
}

impl Kick {
    pub(crate) fn prepare(self) -> Result<(), Error> {
        match self {
            Self::Signal(signal) => handle(signal).map_err(system("installing the kick signal's handler")),
            Self::Off | Self::Vmm => Ok(()),
        }
    }
}

/// The shortest run before a kick, about what an exit costs; and the longest.
const SHORTEST: Nanos = 20_000;
const LONGEST: Nanos = 10_000_000;

/// One vCPU's kicks. How long it takes to write a slice is learned from the runs before.
#[derive(Debug)]
pub(crate) struct Kicker {
    kick: Kick,
    timer: Option<Timer>,
    run_time: Nanos,
    /// Ring entries counted when the vCPU last ran under a kick.
    gross: Option<u32>,
    /// Whether its thread can be reached.
    introduced: bool,
}

impl Kicker {
    pub(crate) fn new(kick: Kick) -> Self {
        Self { kick, timer: None, run_time: SHORTEST, gross: None, introduced: kick == Kick::Off }
    }

    /// Whether there is somebody to end a slice.
    pub(crate) fn is_on(&self) -> bool {
        self.kick != Kick::Off
    }

    /// Whether the run that is over was to be ended by a kick, so that its pages are in the ring and nobody metered them;
    /// or the first is to come.
    pub(crate) fn is_due(&self) -> bool {
        self.gross.is_some() || !self.introduced
    }

    /// The run is over.
    pub(crate) fn disarm(&mut self, seat: &Seat) {
        if !self.introduced {
            seat.introduce();
            self.introduced = true;
        }
        if let Some(timer) = self.timer.as_mut().filter(|_| self.gross.is_some()) {
            timer.disarm();
        }
    }

    /// Learns from the run that is over, which was given `slice`, once its pages are metered.
    pub(crate) fn learn(&mut self, slice: u32, gross: u32) {
        let Some(before) = self.gross.take() else { return };
        let pages = gross.wrapping_sub(before).max(1);
        let fitting = self.run_time.saturating_mul(slice.into()) / Nanos::from(pages);
        self.run_time = fitting.clamp(self.run_time / 8, self.run_time * 2).clamp(SHORTEST, LONGEST);
    }

    /// Arms a kick for the run to come.
    pub(crate) fn arm(&mut self, gross: u32) -> Result<Duration, Error> {
        self.gross = Some(gross);
        if let Kick::Signal(signal) = self.kick {
            let timer = Timer::for_this_thread(self.timer.take(), signal).map_err(system("creating the kick timer"))?;
            self.timer.insert(timer).arm(self.run_time);
        }
        Ok(Duration::from_nanos(self.run_time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_time_follows_the_writer() {
        let mut kicker = Kicker::new(Kick::Vmm);
        let mut gross = u32::MAX - 1000;
        for page_time in [2_600, 30_000, 600] {
            for _ in 0..40 {
                let time = u64::try_from(kicker.arm(gross).unwrap().as_nanos()).unwrap();
                gross = gross.wrapping_add(u32::try_from(time / page_time).unwrap());
                kicker.learn(100, gross);
            }
            let fitting = (100 * page_time).clamp(SHORTEST, LONGEST);
            assert!(kicker.run_time.abs_diff(fitting) <= fitting / 20, "{page_time}: {}", kicker.run_time);
        }
    }

    #[test]
    fn an_idle_vcpu_is_kicked_seldom_and_a_burst_reins_it_in() {
        let mut kicker = Kicker::new(Kick::Vmm);
        for _ in 0..40 {
            kicker.arm(7).unwrap();
            kicker.learn(100, 7);
        }
        assert_eq!(kicker.run_time, LONGEST);
        for _ in 0..4 {
            kicker.arm(7).unwrap();
            kicker.learn(1, 1_000_007);
        }
        assert_eq!(kicker.run_time, SHORTEST);
    }
}
