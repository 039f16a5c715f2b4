//! Ending a slice by a signal or by timers, as `dirtylimit-kvm`'s `kick.rs` does; both are times.

use dirtylimit_core::Nanos;
use dirtylimit_core::kicked::{RunTime, TIMERS};

use super::costs::Dice;

/// One vCPU's kicks.
#[derive(Debug)]
pub(super) struct Kicker {
    pub(super) run_time: RunTime,
    /// Ring entries counted when the vCPU last ran under a kick or timers.
    gross: Option<u32>,
    /// When it was given timers, and when they fire, where the run is one with timers.
    armed: Option<(Nanos, [Nanos; TIMERS])>,
    /// When the signal arrives; one that comes outside the guest ends the next run at once.
    pub(super) at: Nanos,
}

impl Kicker {
    pub(super) fn new(with_timers: bool) -> Self {
        let run_time = if with_timers { RunTime::with_timers() } else { RunTime::new() };
        Self { run_time, gross: None, armed: None, at: Nanos::MAX }
    }

    /// Somebody else sends the signal.
    pub(super) fn kick(&mut self, now: Nanos, dice: &mut Dice) {
        self.at = self.at.min(now + dice.signal());
    }

    /// The run is over: what was armed or sent is taken back.
    pub(super) fn disarm(&mut self) {
        self.at = Nanos::MAX;
    }

    /// Learns from the run that is over at `now`, which was given `slice`; whether it was one that a kick or timers were to
    /// end.
    pub(super) fn learn(&mut self, now: Nanos, slice: u32, gross: u32) -> bool {
        let Some(before) = self.gross.take() else {
            self.run_time.begin();
            return false;
        };
        let pages = gross.wrapping_sub(before);
        match self.armed.take() {
            Some((armed, _)) => self.run_time.learn_timed(now - armed, slice, pages),
            None => self.run_time.learn(slice, pages),
        }
        true
    }

    /// Arms timers for the run to come.
    pub(super) fn arm_timers(&mut self, now: Nanos, gross: u32) {
        self.gross = Some(gross);
        self.armed = Some((now, self.run_time.timers().map(|time| now + time)));
    }

    /// When the next timer fires. One that comes outside the guest is of no use.
    pub(super) fn timer(&self, now: Nanos) -> Nanos {
        let fires = self.armed.iter().flat_map(|(_, fires)| fires);
        fires.copied().find(|at| *at > now).unwrap_or(Nanos::MAX)
    }

    /// Arms a kick for the run to come.
    pub(super) fn arm(&mut self, now: Nanos, gross: u32, dice: &mut Dice) {
        self.gross = Some(gross);
        self.at = self.at.min(now + self.run_time.get() + dice.signal());
    }
}
