//! The VM-wide budget, split by weighted max-min fairness on demand: who needs less keeps it, the rest is shared.

use crate::rate::PageRate;

/// One vCPU's claim on the budget.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Claim {
    /// What it would dirty for each unit of its weight, in [`PageRate`]'s unit.
    ask: u64,
    weight: u32,
}

impl Claim {
    /// A vCPU that would dirty `demand` and counts `weight` times (0 counts as 1).
    pub fn new(demand: PageRate, weight: u32) -> Self {
        let weight = weight.max(1);
        // Weights are nearly always 1, and a 64-bit division is a good part of a tick.
        let ask = if weight == 1 { demand.raw() } else { demand.raw().div_ceil(u64::from(weight)) };
        Self { ask, weight }
    }

    fn demand(&self) -> u128 {
        u128::from(self.ask) * u128::from(self.weight)
    }
}

/// The level: what a vCPU of weight 1 may dirty so that all together, each taking the lesser of its demand and
/// weight × level, use up the budget. `None` where the budget covers every demand.
///
/// Newton's method from below: what is used up is concave in the level, so that what the satisfied leave over, shared by
/// the others, never is too much. Each pass halves what is left over times the weight of who wants more, at least: a few
/// passes, and never more than 90.
pub fn level(claims: impl Iterator<Item = Claim> + Clone, budget: PageRate) -> Option<PageRate> {
    let mut level = 0;
    loop {
        // At this level. The satisfied fit in: never below 0.
        let (mut left, mut open_weight) = (u128::from(budget.raw()), 0u128);
        for claim in claims.clone() {
            if u128::from(claim.ask) <= level {
                left -= claim.demand();
            } else {
                open_weight += u128::from(claim.weight);
            }
        }
        let higher = left.checked_div(open_weight)?;
        if higher <= level {
            return Some(PageRate::from_raw(u64::try_from(level).unwrap_or(u64::MAX)));
        }
        level = higher;
    }
}

/// What `level` allows a vCPU of `weight`.
pub fn share(level: PageRate, weight: u32) -> PageRate {
    PageRate::from_raw(level.raw().saturating_mul(u64::from(weight.max(1))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// The definition itself: raise the level by what is left over until nobody can take more.
    fn oracle(claims: &[Claim], budget: u64) -> Option<u64> {
        let used = |level: u128| -> u128 { claims.iter().map(|c| c.demand().min(u128::from(c.weight) * level)).sum() };
        if used(u128::MAX >> 40) <= u128::from(budget) {
            return None;
        }
        let (mut low, mut high) = (0u128, 1 << 44);
        while high - low > 1 {
            let middle = (low + high) / 2;
            if used(middle) <= u128::from(budget) { low = middle } else { high = middle }
        }
        u64::try_from(low).ok()
    }

    fn rate(pages: u32) -> PageRate {
        PageRate::from_pages_per_sec(pages)
    }

    #[test]
    fn by_hand() {
        let split = |demands: &[(u32, u32)], budget| {
            let claims: Vec<_> = demands.iter().map(|&(pages, weight)| Claim::new(rate(pages), weight)).collect();
            level(claims.iter().copied(), rate(budget)).map(PageRate::pages_per_sec)
        };
        assert_eq!(split(&[], 100), None);
        assert_eq!(split(&[(50, 1), (50, 1)], 100), None);
        assert_eq!(split(&[(1000, 1), (0, 1), (0, 1), (0, 1)], 100), Some(100));
        assert_eq!(split(&[(1000, 1); 4], 100), Some(25));
        assert_eq!(split(&[(1000, 1), (10, 1), (1000, 1)], 100), Some(45));
        assert_eq!(split(&[(1000, 3), (1000, 1)], 100), Some(25));
        assert_eq!(split(&[(1000, 0), (1000, 1)], 100), Some(50));
        assert_eq!(split(&[(1000, 1)], 0), Some(0));
    }

    proptest! {
        #[test]
        fn the_level_is_the_oracles(
            demands in prop::collection::vec((0u64..1 << 42, 1u32..10), 1..40),
            budget in 0u64..1 << 43,
        ) {
            let claims: Vec<_> =
                demands.iter().map(|&(raw, weight)| Claim::new(PageRate::from_raw(raw), weight)).collect();
            let expected = oracle(&claims, budget.min(PageRate::MAX.raw()));
            prop_assert_eq!(level(claims.iter().copied(), PageRate::from_raw(budget)).map(PageRate::raw), expected);
        }
    }
}
