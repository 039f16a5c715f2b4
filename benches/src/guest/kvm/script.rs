//! What a run can do beside its plan, for measures that need more than a limit.

use std::time::Duration;

use dirtylimit_core::PageRate;

use crate::plan::Plan;
use crate::record::Recording;

/// What to do beside the plan.
#[derive(Clone, Debug, Default)]
pub struct Script {
    /// Changes of who is held, in order of time.
    pub holds: Vec<Hold>,
    /// Tick once a sample, in the limited phase, and note how long that took.
    pub time_ticks: bool,
    /// Enable the limiter as the README does, in all that it leaves as it is.
    pub as_embedded: bool,
}

/// From then on these vCPUs are kept out of the guest by hand, and all others run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// When, counted from the start of the limited phase.
    pub after: Duration,
    /// Indices of vCPUs.
    pub held: Vec<usize>,
}

/// A run, and what its script brought up.
#[derive(Clone, Debug)]
pub struct Scripted {
    /// The run.
    pub recording: Recording,
    /// The guest's own counts at every hold, and at the end of the limited phase.
    pub marks: Vec<Mark>,
    /// How long each tick took.
    pub ticks: Vec<Duration>,
}

/// What the guest had counted at an instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Since the start of the recording.
    pub at: Duration,
    /// Accesses by vCPU, since the guest started.
    pub accesses: Vec<u64>,
}

/// What happens at an instant of the limited phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event<'a> {
    Limit(Option<PageRate>),
    Hold(&'a [usize]),
}

impl Script {
    /// The steps of the plan and the holds, in order of time.
    pub(super) fn events<'a>(&'a self, plan: &Plan) -> Vec<(Duration, Event<'a>)> {
        let steps = plan.steps.iter().map(|step| (step.after, Event::Limit(step.limit)));
        let mut events: Vec<_> =
            steps.chain(self.holds.iter().map(|hold| (hold.after, Event::Hold(&hold.held)))).collect();
        events.sort_by_key(|&(after, _)| after);
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{KickKind, PolicyKind, Step, VcpuPlan};
    use crate::workload::Workload;

    #[test]
    fn steps_and_holds_come_in_order_of_time() {
        let ms = Duration::from_millis;
        let plan = Plan {
            vcpus: vec![VcpuPlan { workload: Workload::Idle, limit: None }],
            vm_limit: None,
            policy: PolicyKind::Paced,
            ring: 1024,
            max_pause: ms(10),
            pass: ms(100),
            free: ms(100),
            limited: ms(500),
            steps: vec![Step { after: ms(200), limit: None }],
            payload: None,
            qmp: None,
            metrics: None,
            steal_time: false,
            kick: KickKind::Signal,
        };
        let holds = vec![Hold { after: ms(100), held: vec![0] }, Hold { after: ms(300), held: vec![] }];
        let script = Script { holds, ..Script::default() };
        assert_eq!(
            script.events(&plan),
            [(ms(100), Event::Hold(&[0])), (ms(200), Event::Limit(None)), (ms(300), Event::Hold(&[]))]
        );
    }
}
