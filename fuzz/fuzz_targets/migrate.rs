//! The goal-driven budget under any goal, rounds and samples: nothing panics, and each plan follows from its verdict.
#![no_main]

use dirtylimit_core::PageRate;
use dirtylimit_core::migrate::{Goal, Migration, Round, Verdict};
use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};

#[derive(Arbitrary, Debug)]
struct AnyGoal {
    downtime: u64,
    deadline: Option<u64>,
    bandwidth: Option<u64>,
    share: u8,
    switch_cost: u64,
    page_size: u32,
    patience: u8,
    observe: bool,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Goal(AnyGoal),
    Sample(u64, u64),
    Watch(u64, u64),
    /// In the order of the fields; and the throttle that was in force, where it is not the plan's.
    Round([u32; 5], u64, [u64; 2], Option<u64>),
}

impl From<AnyGoal> for Goal {
    fn from(goal: AnyGoal) -> Self {
        let AnyGoal { downtime, deadline, bandwidth, share, switch_cost, page_size, patience, observe } = goal;
        Self { downtime, deadline, bandwidth, share, switch_cost, page_size, patience, observe }
    }
}

fuzz_target!(|input: (AnyGoal, Vec<Step>)| {
    let mut goal = Goal::from(input.0);
    let mut migration = Migration::new(goal);
    let mut budget = None;
    for step in input.1 {
        match step {
            Step::Goal(other) => {
                goal = other.into();
                migration.set_goal(goal);
            }
            Step::Sample(time, pages) => migration.sample(time, pages),
            Step::Watch(time, pages) => migration.watch(time, pages),
            Step::Round([sent, sending, length, left, redirtied], held_back, [device_bytes, device_rate], throttle) => {
                // Times in us, so that most rounds are of a likely length.
                let [sending, length] = [sending, length].map(|micros| u64::from(micros) * 1000);
                let (sent, left, redirtied) = (u64::from(sent) << 12, left.into(), redirtied.into());
                let throttle = throttle.map(|bytes| PageRate::from_bytes_per_sec(bytes, 4096)).or(budget);
                let round =
                    Round { sent, sending, length, left, redirtied, held_back, device_bytes, device_rate, throttle };
                let plan = migration.finish_round(&round);
                match plan.verdict {
                    Verdict::Throttle { budget, end } => {
                        assert_eq!(plan.budget, (!goal.observe).then_some(budget));
                        assert!(goal.deadline.is_none_or(|deadline| end <= deadline));
                    }
                    Verdict::Converging { end } => {
                        assert!(plan.budget.is_none() && goal.deadline.is_none_or(|deadline| end <= deadline));
                    }
                    Verdict::SwitchNow => assert!(plan.budget.is_none() && goal.switch_cost <= goal.downtime),
                    _ => assert_eq!(plan.budget, None),
                }
                budget = plan.budget;
            }
        }
    }
});
