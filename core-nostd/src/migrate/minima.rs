//! The rhythm of what rounds leave: guests that flush, collect garbage or compile dirty in phases.

use crate::rate::Nanos;

/// Finds the local minima of what is left, and how far apart the last two were.
#[derive(Clone, Debug)]
pub(super) struct Minima {
    previous: (Nanos, u64),
    falling: bool,
    /// When it was, and what was left then.
    last: Option<(Nanos, u64)>,
    period: Option<Nanos>,
    /// When the one minimum that is waited for is over.
    until: Option<Nanos>,
}

impl Minima {
    pub(super) const fn new() -> Self {
        Self { previous: (0, 0), falling: false, last: None, period: None, until: None }
    }

    /// A round ended at `now` and left `left` pages. A rise of less than an eighth is noise.
    pub(super) fn note(&mut self, now: Nanos, left: u64) {
        let (at, before) = self.previous;
        if left < before {
            self.falling = true;
        } else if self.falling && left > before.saturating_add(before / 8) {
            self.falling = false;
            self.period = self.last.map(|(earlier, _)| at.saturating_sub(earlier));
            self.last = Some((at, before));
        }
        self.previous = (now, left);
    }

    /// When the next minimum is due and what it should leave, if it is worth waiting for at `now` with `left` pages: a
    /// quarter less, at least. Only one minimum is ever waited for, so at most for one period.
    pub(super) fn wait(&mut self, now: Nanos, left: u64) -> Option<(Nanos, u64)> {
        let (at, lowest) = self.last?;
        let due = at.saturating_add(self.period?);
        let until = self.until.unwrap_or(due);
        let worth = now < until && lowest < left.saturating_sub(left / 4);
        self.until = self.until.or(worth.then_some(due));
        worth.then_some((until, lowest))
    }

    /// Whether a minimum was waited for.
    pub(super) fn has_waited(&self) -> bool {
        self.until.is_some()
    }
}
