//! Ending a slice by a signal, where the ring cannot: right after it was emptied, or where it is larger than what the
//! guest writes to (each page is logged once per reset, so such a ring never fills).

use std::time::Duration;

use dirtylimit_core::{Nanos, Penalty, Terms};

use crate::Error;
use crate::error::system;
use crate::harvest::BATCH;
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

/// Whether kicks end slices of this penalty well: not below 16 pages in 4 ms, which are written while a signal travels.
/// Where such a slice has a ring that fills by itself, it is better left to fill.
pub(crate) fn ends_slices(penalty: Penalty) -> bool {
    match penalty.terms() {
        Some(Terms::Pace(price) | Terms::Sleep(price)) => price.of(16) <= 4_000_000,
        None => false,
    }
}

/// Whether a ring with so much room is so left to fill: it is a batch at most, and the kicked run that is over had so many
/// pages that a thousand such, some 20 ms, fill it.
pub(crate) fn is_too_coarse(penalty: Penalty, pages: u32, room: u32) -> bool {
    !ends_slices(penalty) && room <= pages.saturating_mul(1024).min(BATCH)
}

/// The shortest run before a kick, less than it takes to enter the guest on some hosts; and the longest.
const SHORTEST: Nanos = 5_000;
const LONGEST: Nanos = 10_000_000;

/// One vCPU's kicks. How long it takes to write a slice is learned from the runs before.
#[derive(Debug)]
pub(crate) struct Kicker {
    kick: Kick,
    timer: Option<Timer>,
    run_time: Nanos,
    /// Ring entries counted when the vCPU last ran under a kick.
    gross: Option<u32>,
    /// Kicks by others that were taken note of.
    kicks: u32,
}

impl Kicker {
    pub(crate) fn new(kick: Kick) -> Self {
        Self { kick, timer: None, run_time: SHORTEST, gross: None, kicks: 0 }
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

    /// Learns from the run that is over, which was given `slice`, once its pages are metered; returns how many they are,
    /// if it was one that a kick was to end.
    pub(crate) fn learn(&mut self, slice: u32, gross: u32) -> Option<u32> {
        let pages = gross.wrapping_sub(self.gross.take()?);
        let fitting = match pages {
            0 => self.run_time * 2,
            pages => self.run_time.saturating_mul(slice.into()) / Nanos::from(pages),
        };
        self.run_time = fitting.clamp(self.run_time / 8, self.run_time * 2).clamp(SHORTEST, LONGEST);
        Some(pages)
    }

    /// Arms a kick for the run to come.
    pub(crate) fn arm(&mut self, gross: u32) -> Duration {
        self.gross = Some(gross);
        if let Some(timer) = &mut self.timer {
            timer.arm(self.run_time);
        }
        Duration::from_nanos(self.run_time)
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
                let time = u64::try_from(kicker.arm(gross).as_nanos()).unwrap();
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
            kicker.arm(7);
            kicker.learn(100, 7);
        }
        assert_eq!(kicker.run_time, LONGEST);
        for _ in 0..4 {
            kicker.arm(7);
            kicker.learn(1, 1_000_007);
        }
        assert_eq!(kicker.run_time, SHORTEST);
    }
}
