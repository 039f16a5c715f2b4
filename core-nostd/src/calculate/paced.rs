//! An interval per page: the limit itself, with nothing to converge.

use super::Policy;
use crate::prepare::Sample;
use crate::rate::PageRate;
use crate::set_penalty::{Penalty, Terms};

/// Each page costs 1 s ÷ limit, run or paused; the vCPU's pacer does the rest, from its first slice on.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Paced;

impl Policy for Paced {
    type State = ();

    fn penalty(&self, (): &mut (), _: &Sample, limit: PageRate, _: Penalty) -> Penalty {
        Penalty::new(Terms::Pace(limit.interval()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_price_is_the_limits_and_falls_as_it_rises() {
        let interval =
            |limit| Paced.penalty(&mut (), &Sample::default(), PageRate::from_pages_per_sec(limit), Penalty::NONE);
        assert_eq!(interval(1000).terms(), Some(Terms::Pace(PageRate::from_pages_per_sec(1000).interval())));
        for terms in [0, 1, 256, 25_600, u32::MAX].map(|limit| interval(limit).terms()) {
            assert!(matches!(terms, Some(Terms::Pace(_))), "a limit is never free: {terms:?}");
        }
    }
}
