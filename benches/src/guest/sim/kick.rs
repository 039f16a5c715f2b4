//! Ending a slice by a signal, where the ring cannot. As in `dirtylimit-kvm`'s `kick.rs`; the signal itself is a time.

use dirtylimit_core::{Nanos, Penalty, Terms};

use super::adapter::BATCH;
use super::costs::Dice;

/// The adapter's: whether kicks end slices of this penalty well.
pub(super) fn ends_slices(penalty: Penalty) -> bool {
    match penalty.terms() {
        Some(Terms::Pace(price) | Terms::Sleep(price)) => price.of(16) <= 4_000_000,
        None => false,
    }
}

/// The adapter's: whether a ring with so much room is better left to fill, after a kicked run of so many pages.
pub(super) fn is_too_coarse(penalty: Penalty, pages: u32, room: u32) -> bool {
    !ends_slices(penalty) && room <= pages.saturating_mul(1024).min(BATCH)
}

/// The adapter's: the shortest run before a kick, and the longest.
const SHORTEST: Nanos = 5_000;
const LONGEST: Nanos = 10_000_000;

/// One vCPU's kicks.
#[derive(Debug)]
pub(super) struct Kicker {
    run_time: Nanos,
    /// Ring entries counted when the vCPU last ran under a kick.
    gross: Option<u32>,
    /// When the signal arrives; one that comes outside the guest ends the next run at once.
    pub(super) at: Nanos,
}

impl Kicker {
    pub(super) fn new() -> Self {
        Self { run_time: SHORTEST, gross: None, at: Nanos::MAX }
    }

    /// Somebody else sends the signal.
    pub(super) fn kick(&mut self, now: Nanos, dice: &mut Dice) {
        self.at = self.at.min(now + dice.signal());
    }

    /// The run is over: what was armed or sent is taken back.
    pub(super) fn disarm(&mut self) {
        self.at = Nanos::MAX;
    }

    /// Learns from the run that is over, which was given `slice`; returns how many pages it dirtied, if a kick was to end it.
    pub(super) fn learn(&mut self, slice: u32, gross: u32) -> Option<u32> {
        let pages = gross.wrapping_sub(self.gross.take()?);
        let fitting = match pages {
            0 => self.run_time * 2,
            pages => self.run_time.saturating_mul(slice.into()) / Nanos::from(pages),
        };
        self.run_time = fitting.clamp(self.run_time / 8, self.run_time * 2).clamp(SHORTEST, LONGEST);
        Some(pages)
    }

    /// Arms a kick for the run to come.
    pub(super) fn arm(&mut self, now: Nanos, gross: u32, dice: &mut Dice) {
        self.gross = Some(gross);
        self.at = self.at.min(now + self.run_time + dice.signal());
    }
}
