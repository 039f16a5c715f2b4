//! Any goal, any rounds: nothing overflows, and what follows makes sense.

use crate::migrate::*;
use proptest::prelude::*;

fn any_number() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0..64u32).prop_map(|(number, shift)| number >> shift)
}

prop_compose! {
    fn any_round()(
        n in prop::array::uniform8(any_number()),
        throttle in prop::option::of(any_number().prop_map(PageRate::from_raw)),
    ) -> Round {
        let [sent, sending, length, left, redirtied, held_back, device_bytes, device_rate] = n;
        Round { sent, sending, length, left, redirtied, held_back, device_bytes, device_rate, throttle }
    }
}

prop_compose! {
    fn any_goal()(
        downtime in any_number(), deadline in prop::option::of(any_number()),
        bandwidth in prop::option::of(any_number()), share: u8, switch_cost in any_number(), page_size: u32,
        patience: u8, observe: bool,
    ) -> Goal {
        Goal { downtime, deadline, bandwidth, share, switch_cost, page_size, patience, observe }
    }
}

proptest! {
    #[test]
    fn whatever_comes_a_plan_follows_that_makes_sense(
        goal in any_goal(), rounds in prop::collection::vec((any_round(), any_number(), any_number()), 1..12),
    ) {
        let mut migration = Migration::new(goal);
        for (round, time, pages) in rounds {
            migration.sample(time, pages);
            let plan = migration.finish_round(&round);
            let throttle = match plan.verdict {
                Verdict::Throttle { budget, .. } if !goal.observe => Some(budget),
                _ => None,
            };
            prop_assert_eq!(plan.budget, throttle);
            prop_assert!(plan.verdict != Verdict::SwitchNow || migration.pause(&round, round.left) <= goal.downtime);
            if let (Verdict::Converging { end } | Verdict::Throttle { end, .. }, Some(deadline)) = (plan.verdict, goal.deadline) {
                prop_assert!(end <= deadline);
            }
            let (least, most) = migration.curve.bounds(time);
            prop_assert!(least <= most);
        }
    }

    #[test]
    fn the_curve_goes_through_the_newest_point_and_rises(
        points in prop::collection::vec((1..1u64 << 40, 0..1u64 << 32), 1..20), time in 1..1u64 << 40,
    ) {
        let mut curve = Curve::new();
        for &(time, pages) in &points {
            curve.note(time, pages);
            prop_assert_eq!(curve.bounds(time), (pages, pages));
        }
        let (sooner, later) = (curve.bounds(time), curve.bounds(time + time / 2));
        prop_assert!(sooner.0 <= later.0 && sooner.1 <= later.1, "{:?} {:?}", sooner, later);
    }
}
