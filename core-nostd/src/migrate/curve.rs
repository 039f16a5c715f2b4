//! What the free guest dirties: distinct pages by the length of a round, as far as rounds and samples have shown it.

use super::mul_div;
use crate::rate::Nanos;

/// A point for each octave of time, from a millisecond to half an hour.
const OCTAVES: usize = 22;

#[derive(Clone, Copy, Debug)]
struct Point {
    /// Since the log was last cleared; 0: never seen.
    time: Nanos,
    pages: u64,
}

/// Distinct pages dirtied after a clear of the log: rising and concave, for a page counts once, and those that are
/// written most are written first (Denning's working set). So two points bound what lies between them and beyond them.
#[derive(Clone, Debug)]
pub(super) struct Curve([Point; OCTAVES]);

impl Curve {
    pub(super) const fn new() -> Self {
        Self([Point { time: 0, pages: 0 }; OCTAVES])
    }

    /// The guest dirtied `pages` in `time`. The newest observation is right: the older ones are moved as little as makes
    /// the curve rising and concave through it, for guests change.
    pub(super) fn note(&mut self, time: Nanos, pages: u64) {
        for point in self.0.iter_mut().filter(|point| point.time > 0) {
            let in_proportion = mul_div(pages, point.time, time);
            point.pages = point.pages.max(pages.min(in_proportion)).min(pages.max(in_proportion));
        }
        let octave = u64::BITS - (time >> 20).leading_zeros();
        let last = OCTAVES - 1;
        if let Some(point) = self.0.get_mut(usize::try_from(octave).unwrap_or(last).min(last)) {
            *point = Point { time, pages };
        }
    }

    /// At least and at most how many it dirties in `time`. All that is unknown is from 0 to [`u64::MAX`].
    pub(super) fn bounds(&self, time: Nanos) -> (u64, u64) {
        let seen = || self.0.iter().filter(|point| point.time > 0);
        let before = seen().rfind(|point| point.time <= time);
        let after = seen().find(|point| point.time >= time);
        let Point { time: start, pages: low } = before.copied().unwrap_or(Point { time: 0, pages: 0 });
        let least = after.map_or(low, |after| {
            let rise = after.pages.saturating_sub(low);
            low.saturating_add(mul_div(rise, time.saturating_sub(start), after.time.saturating_sub(start)).min(rise))
        });
        let most = before.map_or(u64::MAX, |before| mul_div(before.pages, time, before.time));
        (least, most.min(after.map_or(u64::MAX, |after| after.pages)).max(least))
    }
}
