use super::*;
use std::collections::BTreeSet;
use std::string::{String, ToString};
use std::vec::Vec;

mod any;

const MIB: u64 = 1 << 20;
/// Pages in a MiB.
const PAGES: u64 = 256;
const MS: Nanos = 1_000_000;
/// The wire of most tests, in MiB per second; with `GOAL`, 60 MiB are covered.
const WIRE: u64 = 200;
const GOAL: Goal = Goal { switch_cost: 20 * MS, patience: 0, ..Goal::new(320 * MS) };

/// A free round that sent `sent` MiB over a wire of `wire` MiB/s, and left `left` MiB, all of them dirtied in it.
fn over(wire: u64, sent: u64, left: u64) -> Round {
    let sending = sent * SECOND / wire;
    Round {
        sent: sent * MIB,
        sending,
        length: sending,
        left: left * PAGES,
        redirtied: left * PAGES,
        ..Round::default()
    }
}

fn round(sent: u64, left: u64) -> Round {
    over(WIRE, sent, left)
}

/// A migration of a guest of 4 GiB with a saturated working set, and the plan after its first round.
fn saturated(goal: Goal, set: u64) -> (Migration, Plan) {
    let mut migration = Migration::new(goal);
    migration.sample(20 * MS, set * PAGES);
    let plan = migration.finish_round(&round(4096, set));
    (migration, plan)
}

fn budget_of(plan: &Plan) -> u64 {
    match plan.verdict {
        Verdict::Throttle { budget, .. } => budget.bytes_per_sec(4096),
        _ => panic!("no throttle: {plan:?}"),
    }
}

/// The round after `plan`, in which the guest dirtied what it may; the rest of what is left was not sent.
fn held(plan: &Plan, round: Round) -> Round {
    let redirtied = mul_div(budget_of(plan), round.length, SECOND) / 4096;
    Round { throttle: plan.budget, redirtied, ..round }
}

fn needed(plan: &Plan, reason: Reason) -> Nanos {
    match plan.verdict {
        Verdict::Unreachable { needs } if plan.reason == reason => needs,
        _ => panic!("not {reason:?}: {plan:?}"),
    }
}

#[test]
fn a_vm_that_converges_unaided_gets_no_throttle_and_ends_when_foretold() {
    // A quarter of the wire: each round leaves a quarter.
    let mut migration = Migration::new(GOAL);
    let (mut sent, mut ends) = (4096, Vec::new());
    loop {
        let plan = migration.finish_round(&round(sent, sent / 4));
        assert_eq!(plan.budget, None);
        sent /= 4;
        match plan.verdict {
            Verdict::Converging { end } => ends.push(end),
            verdict => break assert_eq!(verdict, Verdict::SwitchNow),
        }
    }
    let total = (4096 + 1024 + 256 + 64) * SECOND / WIRE + 20 * MS + 16 * SECOND / WIRE;
    assert_eq!((sent, ends.len()), (16, 3));
    assert!(ends.iter().all(|end| end.abs_diff(total) < total / 5000), "{ends:?}, not {total}");
}

#[test]
fn working_sets_saturate() {
    // It rewrites 100 MiB at five times the wire's speed, but never more: that is less than what is sent, until 100 MiB.
    let mut migration = Migration::new(Goal { downtime: 600 * MS, ..GOAL });
    migration.sample(100 * MS, 100 * PAGES);
    let plan = migration.finish_round(&round(4096, 100));
    assert_eq!((plan.verdict, plan.reason), (Verdict::SwitchNow, Reason::NextCostsMore), "116 MiB are covered");
    // The other way about: 41 MiB/s in the first round, but within the first 20 ms of it.
    let (_, plan) = saturated(GOAL, 800);
    assert_eq!(plan.reason, Reason::DirtiesTooMuch);
    // Without samples, the first round says no more than that it may converge; the second shows that it does not.
    let mut migration = Migration::new(GOAL);
    assert_eq!(migration.finish_round(&round(4096, 800)).reason, Reason::Shrinking);
    assert_eq!(migration.finish_round(&round(800, 800)).reason, Reason::DirtiesTooMuch);
}

#[test]
fn a_first_look_may_take_longer_than_patience_lasts_and_no_second() {
    let (mut migration, plan) = saturated(Goal { patience: 1, ..GOAL }, 224);
    assert_eq!((plan.reason, plan.budget), (Reason::Looking, None), "1.1 s of 20");
    assert_eq!(migration.finish_round(&round(224, 224)).reason, Reason::DirtiesTooMuch);
}

#[test]
fn no_more_throttle_than_the_goal_needs() {
    for (set, margin) in [(70, 15), (100, 15), (224, 15), (900, 15)] {
        let (mut migration, plan) = saturated(GOAL, set);
        let allowed = budget_of(&plan) * set / WIRE / MIB;
        assert!((60 * margin / 16 - 1..60).contains(&allowed), "{allowed} of 60 MiB");
        // The budget is held: that was enough.
        let throttled = Round { throttle: plan.budget, ..round(set, allowed) };
        assert_eq!(migration.finish_round(&throttled).verdict, Verdict::SwitchNow);
    }
    // Beyond 16 times as much, the guest keeps a 16th of the wire, for one more round.
    let (_, plan) = saturated(GOAL, 2048);
    assert_eq!(budget_of(&plan), WIRE * MIB / 16);
}

#[test]
fn what_is_sent_again_anyway_is_not_throttled() {
    // It comes down from 800 MiB to 400, and stays there: a budget before that would only have saved what is sent again.
    let mut migration = Migration::new(GOAL);
    for (time, dirty) in [(200, 100), (1000, 350), (2000, 400), (4000, 420)] {
        migration.sample(time * MS, dirty * PAGES);
    }
    let plan = migration.finish_round(&round(4096, 800));
    assert_eq!((plan.budget, plan.reason), (None, Reason::Shrinking));
    migration.sample(2000 * MS, 400 * PAGES);
    let plan = migration.finish_round(&round(800, 420));
    assert!(plan.budget.is_some(), "420 would leave 400");
}

#[test]
fn the_least_throttle_comes_first() {
    // A look, if it costs little; then the budget; then a higher one, as less is left.
    let (mut migration, plan) = saturated(Goal { patience: 6, ..GOAL }, 800);
    assert_eq!((plan.budget, plan.reason), (None, Reason::Looking));
    let mut budgets = Vec::new();
    let mut plan = migration.finish_round(&round(800, 800));
    for (sent, left) in [(800, 400), (400, 150), (150, 61)] {
        budgets.push(budget_of(&plan));
        plan = migration.finish_round(&held(&plan, round(sent, left)));
    }
    assert!(budgets.is_sorted(), "{budgets:?}");
    // Looks end: at a 50th of the time so far, the first is followed by two.
    let (mut migration, mut plan) = saturated(Goal { patience: 6, ..GOAL }, 80);
    let mut looks = 0;
    while plan.reason == Reason::Looking {
        looks += 1;
        plan = migration.finish_round(&round(80, 80));
    }
    assert_eq!((looks, plan.reason), (3, Reason::DirtiesTooMuch));
    // A first look that takes half as long as all before is too dear.
    let mut migration = Migration::new(Goal { patience: 6, ..GOAL });
    migration.sample(20 * MS, 224 * PAGES);
    assert_eq!(migration.finish_round(&round(448, 224)).reason, Reason::DirtiesTooMuch);
}

#[test]
fn who_dirties_steadily_is_not_looked_at_again() {
    let plan = |rates: &[u64]| {
        let mut migration = Migration::new(Goal { patience: 6, ..GOAL });
        rates.iter().for_each(|mib| migration.watch(SECOND / 4, mib * PAGES));
        migration.sample(20 * MS, 224 * PAGES);
        migration.finish_round(&round(4096, 224)).reason
    };
    assert_eq!(plan(&[300, 280, 320, 290]), Reason::DirtiesTooMuch);
    assert_eq!(plan(&[300, 10, 320, 290]), Reason::Looking, "it rests at times");
}

#[test]
fn what_is_told_under_a_budget_says_nothing_of_the_free_guest() {
    let (mut migration, plan) = saturated(GOAL, 224);
    migration.sample(20 * MS, 0);
    migration.watch(SECOND / 4, 0);
    assert_eq!(migration.activity, None);
    let plan = migration.finish_round(&held(&plan, round(224, 200)));
    assert_eq!(plan.reason, Reason::DirtiesTooMuch);
}

#[test]
fn one_minimum_is_waited_for_and_not_longer_than_its_period() {
    // It leaves 400 and 100 MiB in turn, and goes on so, or stays up: observed, so that nothing is throttled meanwhile.
    for then in [[100, 400, 100, 400], [400; 4]] {
        let mut migration = Migration::new(Goal { observe: true, ..GOAL });
        let (mut sent, mut reasons) = (4096, Vec::new());
        for left in [400, 100, 400, 100, 400].into_iter().chain(then) {
            migration.sample(20 * MS, left * PAGES);
            let plan = migration.finish_round(&round(sent, left));
            reasons.push(plan.reason);
            if plan.reason == Reason::MinimumDue {
                let Verdict::Converging { end } = plan.verdict else { panic!("{plan:?}") };
                // The last was 0.5 s ago, the one before 2.5 s earlier; 100 MiB and the downtime are to come.
                assert_eq!(end - migration.elapsed, 2000 * MS + 500 * MS + 320 * MS);
            }
            sent = left;
        }
        assert_eq!(reasons[4], Reason::MinimumDue, "{reasons:?}");
        // At the minimum, and where none came, and ever after, the throttle.
        assert!(reasons[5..].iter().all(|reason| *reason == Reason::DirtiesTooMuch), "{then:?}: {reasons:?}");
    }
    // Where the minimum would save less than a quarter, the throttle.
    let mut migration = Migration::new(GOAL);
    let lefts = [4096, 400, 100, 400, 100, 130];
    let reasons = lefts.windows(2).map(|pair| {
        migration.sample(20 * MS, pair[1] * PAGES);
        migration.finish_round(&round(pair[0], pair[1])).reason
    });
    assert_eq!(reasons.last(), Some(Reason::DirtiesTooMuch));

    let mut migration = Migration::new(GOAL);
    for (sent, left) in [(4096, 400), (400, 100), (100, 400), (400, 100), (100, 400)] {
        migration.sample(20 * MS, left * PAGES);
        migration.finish_round(&round(sent, left));
    }
    assert_eq!(migration.finish_round(&round(400, 50)).reason, Reason::AtMinimum);
}

#[test]
fn another_round_must_save_more_than_it_costs() {
    // A guest that never was above the goal: on while rounds halve what is left, until the rest hardly matters.
    let mut migration = Migration::new(GOAL);
    migration.sample(320 * MS, 20 * PAGES);
    let plan = migration.finish_round(&round(4096, 50));
    assert_eq!((plan.reason, plan.drain), (Reason::StillHalving, true));
    migration.sample(110 * MS, 3 * PAGES);
    assert_eq!(migration.finish_round(&round(50, 20)).reason, Reason::StillHalving);
    let plan = migration.finish_round(&round(20, 3));
    assert_eq!(
        (plan.verdict, plan.reason),
        (Verdict::SwitchNow, Reason::Fits),
        "3 MiB are less than the switch itself"
    );
    // One that would leave more than half: at once.
    let mut migration = Migration::new(GOAL);
    migration.sample(200 * MS, 40 * PAGES);
    assert_eq!(migration.finish_round(&round(4096, 50)).reason, Reason::NextCostsMore);
    // One that was above: at once, it may be so again.
    let mut migration = Migration::new(GOAL);
    migration.finish_round(&round(4096, 100));
    assert_eq!(migration.finish_round(&round(100, 50)).verdict, Verdict::SwitchNow);
    // One that pays for the round by a throttle: at once.
    let (mut migration, plan) = saturated(GOAL, 100);
    let plan = migration.finish_round(&Round { throttle: plan.budget, ..round(100, 55) });
    assert_eq!((plan.verdict, plan.budget), (Verdict::SwitchNow, None));
    // Or by a limit that was in force before.
    let mut migration = Migration::new(GOAL);
    migration.sample(320 * MS, 20 * PAGES);
    let limited = Round { throttle: Some(PageRate::from_pages_per_sec(1000)), ..round(4096, 50) };
    assert_eq!(migration.finish_round(&limited).verdict, Verdict::SwitchNow);
}

#[test]
fn the_budget_falls_with_the_distance_to_the_setpoint() {
    // Bandwidth × 15/16 of what is covered ÷ what is left.
    for set in [64, 128, 256, 512] {
        let (_, plan) = saturated(GOAL, set);
        let expected = WIRE * MIB * 60 * 15 / 16 / set;
        assert!(budget_of(&plan).abs_diff(expected) < expected / 500, "{} of {expected}", budget_of(&plan));
    }
}

#[test]
fn an_excess_counts_in_full_and_is_forgotten_by_a_quarter() {
    let (mut migration, plan) = saturated(GOAL, 224);
    let first = budget_of(&plan);
    // Half as much again went through: the same distance gets two thirds of the budget.
    let leaky = Round { throttle: plan.budget, ..round(224, 224) };
    let allowed = 224 * first / WIRE / MIB;
    let plan = migration.finish_round(&Round { redirtied: allowed * PAGES * 3 / 2, ..leaky });
    let second = budget_of(&plan);
    assert!((second * 3).abs_diff(first * 2) < first / 20, "{first}, {second}");
    // Then it is held.
    let allowed = 224 * second / WIRE / MIB;
    let plan = migration.finish_round(&Round { throttle: plan.budget, redirtied: allowed * PAGES, ..leaky });
    let third = budget_of(&plan);
    assert!(second < third && third < second + (first - second) / 3, "{first}, {second}, {third}");
}

#[test]
fn a_guest_that_calms_down_is_let_go() {
    let (mut migration, plan) = saturated(GOAL, 224);
    // Far less than it may: it dirties that when free. But what was held back by something else is left over.
    let calm = Round { throttle: plan.budget, redirtied: 2 * PAGES, ..round(224, 100) };
    let plan = migration.finish_round(&calm);
    assert_eq!((plan.budget, plan.reason), (None, Reason::Shrinking));
    // A throttle that a faster wire makes needless is lifted only where the free guest would halve what is left.
    for (wire, lifted) in [(260, false), (400, true)] {
        let mut migration = Migration::new(GOAL);
        [1, 2, 4].iter().for_each(|seconds| migration.sample(seconds * SECOND, 190 * seconds * PAGES));
        let plan = migration.finish_round(&round(4096, 800));
        let plan = migration.finish_round(&held(&plan, over(wire, 800, 300)));
        assert_eq!(plan.budget.is_none(), lifted, "{wire}: {plan:?}");
    }
}

#[test]
fn a_bandwidth_that_halves_or_doubles_counts_in_the_next_budget() {
    for wire in [WIRE / 2, WIRE * 2] {
        let (mut migration, plan) = saturated(GOAL, 400);
        let before = budget_of(&plan);
        let plan = migration.finish_round(&held(&plan, over(wire, 400, 130)));
        // Covered is so much less or more, and sent so much slower or faster.
        let covered = 300 * wire / 1000;
        let expected = wire * MIB * covered * 15 / 16 / 130;
        assert!(
            budget_of(&plan).abs_diff(expected) < expected / 20,
            "{before}, then {}, not {expected}",
            budget_of(&plan)
        );
    }
    // What 2 ms say is not believed as much.
    let (mut migration, _) = saturated(GOAL, 400);
    migration.finish_round(&Round { sending: 2 * MS, ..round(4, 400) });
    assert!(migration.bandwidth <= 500 * MIB, "{}", migration.bandwidth);
}

#[test]
fn time_spent_on_other_things_than_sending_is_no_bandwidth() {
    let (mut migration, _) = saturated(GOAL, 400);
    let slow_sync = Round { length: 2 * SECOND + SECOND / 2, ..round(400, 400) };
    let plan = migration.finish_round(&slow_sync);
    assert_eq!(migration.bandwidth / MIB, WIRE);
    // But the guest dirties meanwhile: 60 MiB × 15/16 in 2.5 s.
    assert_eq!(budget_of(&plan) / MIB, 22);
}

#[test]
fn a_known_bandwidth_and_a_share_are_for_the_switch() {
    let plan = |bandwidth, share| budget_of(&saturated(Goal { bandwidth, share, ..GOAL }, 400).1);
    let all = plan(None, 100);
    assert!(plan(None, 50).abs_diff(all / 2) < all / 100);
    assert!(plan(Some(2 * WIRE * MIB), 100).abs_diff(2 * all) < all / 100);
    assert_eq!((plan(None, 0), plan(None, 255)), (plan(None, 1), all));
}

#[test]
fn the_last_rounds_drain_the_rings() {
    // The next may be the last.
    assert!(saturated(GOAL, 224).1.drain);
    // It is not: 16 times as much is left as is covered.
    let (mut migration, plan) = saturated(GOAL, 2048);
    assert!(!plan.drain);
    // But a floor of a third of what is covered must go.
    let held = Round { throttle: plan.budget, held_back: 20 * PAGES, ..round(2048, 1100) };
    assert!(migration.finish_round(&held).drain);
    // It did not, and is more than what is covered.
    let plan = migration.finish_round(&Round { held_back: 70 * PAGES, throttle: plan.budget, ..round(1000, 200) });
    let needs = needed(&plan, Reason::HeldBack);
    assert!((70 * SECOND / WIRE..90 * SECOND / WIRE + 20 * MS).contains(&needs), "{needs}");
}

#[test]
fn who_only_observes_is_told_the_same() {
    for set in [50, 224, 800] {
        let (mut one, expected) = saturated(GOAL, set);
        let (mut other, plan) = saturated(Goal { observe: true, ..GOAL }, set);
        assert_eq!(plan, Plan { budget: None, ..expected });
        let next = round(set, set);
        assert_eq!(other.finish_round(&next), Plan { budget: None, ..one.finish_round(&next) });
    }
}

#[test]
fn a_deadline_is_met_by_a_throttle_or_said_to_be_too_soon() {
    // 7/8 of what is sent: unaided it takes 25 more rounds.
    let slow = |deadline| {
        let mut migration = Migration::new(Goal { deadline: Some(deadline), ..GOAL });
        migration.finish_round(&round(1024, 896))
    };
    let (first, left) = (1024 * SECOND / WIRE, 896 * SECOND / WIRE);
    assert_eq!(slow(600 * SECOND).reason, Reason::Shrinking);
    let plan = slow(first + left + SECOND);
    assert_eq!(plan.reason, Reason::TooSlow);
    assert!(matches!(plan.verdict, Verdict::Throttle { end, .. } if end <= first + left + SECOND));
    assert_eq!(needed(&slow(first + left), Reason::DeadlineTooSoon), (left + 20 * MS) * 17 / 16);
    // Nor is it hoped for where, if it fails, the throttle comes too late: unsampled, 224 MiB may be a guest's at rest.
    let hope = |deadline| {
        let mut migration = Migration::new(Goal { deadline: Some(4096 * SECOND / WIRE + deadline * SECOND), ..GOAL });
        migration.finish_round(&round(4096, 224)).reason
    };
    assert_eq!((hope(3), hope(2)), (Reason::Shrinking, Reason::TooSlow));
    // No look either, where it would be too late for the throttle after it.
    let deadline = Some(4096 * SECOND / WIRE + 6 * SECOND);
    let (_, plan) = saturated(Goal { deadline, patience: 100, ..GOAL }, 800);
    assert_eq!(plan.reason, Reason::DirtiesTooMuch);
}

#[test]
fn where_no_throttle_helps_it_is_stalled() {
    let stalled = |migration: &mut Migration, round: &Round| {
        let plan = migration.finish_round(round);
        assert_eq!((plan.verdict, plan.budget), (Verdict::Stalled, None));
        plan.reason
    };
    let (mut migration, _) = saturated(GOAL, 224);
    let nothing = Round { sent: 0, ..round(224, 224) };
    assert_eq!(stalled(&mut migration, &nothing), Reason::NothingSent);
    assert_eq!(migration.finish_round(&round(224, 224)).reason, Reason::DirtiesTooMuch, "the wire is back");
    let devices = Round { device_rate: 190 * MIB, ..round(224, 224) };
    assert_eq!(stalled(&mut migration, &devices), Reason::DevicesTooFast);
    // Twice what is allowed, twice.
    let (mut migration, plan) = saturated(GOAL, 224);
    let loose = Round { throttle: plan.budget, ..round(224, 224) };
    assert!(matches!(migration.finish_round(&loose).verdict, Verdict::Throttle { .. }));
    assert_eq!(stalled(&mut migration, &loose), Reason::ThrottleNotHeld);
    // But not while it helps all the same.
    let (mut migration, plan) = saturated(GOAL, 800);
    for (sent, left) in [(800, 600), (600, 450), (450, 300)] {
        let loose = Round { throttle: plan.budget, ..round(sent, left) };
        assert_ne!(migration.finish_round(&loose).verdict, Verdict::Stalled);
    }
}

#[test]
fn devices_have_their_part_of_what_is_covered() {
    let (mut migration, plan) = saturated(GOAL, 224);
    let without = budget_of(&plan);
    let plan = migration.finish_round(&Round { device_rate: 20 * MIB, ..round(224, 224) });
    assert!(budget_of(&plan).abs_diff(without - 20 * MIB) < MIB, "{without}, then {}", budget_of(&plan));
    // What they dirtied is no excess of the guest's.
    let both = held(&plan, Round { device_rate: 20 * MIB, ..round(224, 224) });
    let before = budget_of(&plan);
    let by_devices = 224 * 20 * PAGES / WIRE;
    let plan = migration.finish_round(&Round { redirtied: both.redirtied + by_devices, ..both });
    assert!(budget_of(&plan).abs_diff(before) < MIB, "{before}, then {}", budget_of(&plan));
    // 10 MiB of state to send at the switch, at the cost of as many of pages.
    let plan = migration.finish_round(&Round { device_bytes: 10 * MIB, ..round(224, 224) });
    assert!(budget_of(&plan).abs_diff(without * 5 / 6) < MIB, "{without}, then {}", budget_of(&plan));
}

#[test]
fn a_downtime_that_is_out_of_reach_is_answered_with_one_that_is_not() {
    let state = 100 * MIB;
    let large_state = Round { device_bytes: state, ..round(4096, 224) };
    let long_rounds = Round { length: 4096 * SECOND / WIRE + 5 * SECOND, ..round(4096, 224) };
    for (goal, round, reason) in [
        (GOAL, large_state, Reason::SwitchTooDear),
        (Goal { switch_cost: 400 * MS, ..GOAL }, round(4096, 224), Reason::SwitchTooDear),
        (Goal { downtime: 60 * MS, ..GOAL }, long_rounds, Reason::RoundsTooLong),
    ] {
        let mut migration = Migration::new(goal);
        migration.sample(20 * MS, 224 * PAGES);
        let needs = needed(&migration.finish_round(&round), reason);
        assert!(goal.downtime < needs && needs < 3 * SECOND, "{needs}");
        migration.set_goal(Goal { downtime: needs, ..goal });
        migration.sample(20 * MS, 224 * PAGES);
        let again = Round { sent: 224 * MIB, sending: 224 * SECOND / WIRE, ..round };
        let length = again.sending + round.length - round.sending;
        let plan = migration.finish_round(&Round { length, ..again });
        assert!(matches!(plan.verdict, Verdict::Throttle { .. }), "with {needs}: {plan:?}");
    }
}

#[test]
fn every_reason_says_something_else() {
    use Reason::*;
    let all = [
        Shrinking,
        StillHalving,
        Looking,
        MinimumDue,
        DirtiesTooMuch,
        TooSlow,
        Fits,
        AtMinimum,
        NextCostsMore,
        NothingSent,
        DevicesTooFast,
        ThrottleNotHeld,
        SwitchTooDear,
        HeldBack,
        RoundsTooLong,
        DeadlineTooSoon,
    ];
    let texts: BTreeSet<String> = all.iter().map(Reason::to_string).collect();
    assert_eq!(texts.len(), all.len());
    let (end, budget) = (0, PageRate::ZERO);
    let verdicts = [
        Verdict::Converging { end },
        Verdict::Throttle { budget, end },
        Verdict::SwitchNow,
        Verdict::Stalled,
        Verdict::Unreachable { needs: 0 },
    ];
    let names: BTreeSet<_> = verdicts.iter().map(|verdict| verdict.name()).collect();
    assert_eq!(names.len(), verdicts.len());
}
