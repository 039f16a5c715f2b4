//! Ending a slice by a signal, as `dirtylimit-kvm`'s `kick.rs` does; the signal itself is a time.

use dirtylimit_core::Nanos;
use dirtylimit_core::kicked::RunTime;

use super::costs::Dice;

/// One vCPU's kicks.
#[derive(Debug)]
pub(super) struct Kicker {
    pub(super) run_time: RunTime,
    /// Ring entries counted when the vCPU last ran under a kick.
    gross: Option<u32>,
    /// When the signal arrives; one that comes outside the guest ends the next run at once.
    pub(super) at: Nanos,
}

impl Kicker {
    pub(super) fn new() -> Self {
        Self { run_time: RunTime::new(), gross: None, at: Nanos::MAX }
    }

    /// Somebody else sends the signal.
    pub(super) fn kick(&mut self, now: Nanos, dice: &mut Dice) {
        self.at = self.at.min(now + dice.signal());
    }

    /// The run is over: what was armed or sent is taken back.
    pub(super) fn disarm(&mut self) {
        self.at = Nanos::MAX;
    }

    /// Learns from the run that is over, which was given `slice`; whether it was one that a kick was to end.
    pub(super) fn learn(&mut self, slice: u32, gross: u32) -> bool {
        let before = self.gross.take();
        match before {
            Some(before) => self.run_time.learn(slice, gross.wrapping_sub(before)),
            None => self.run_time.begin(),
        }
        before.is_some()
    }

    /// Arms a kick for the run to come.
    pub(super) fn arm(&mut self, now: Nanos, gross: u32, dice: &mut Dice) {
        self.gross = Some(gross);
        self.at = self.at.min(now + self.run_time.get() + dice.signal());
    }
}
