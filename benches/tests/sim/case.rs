//! One simulated run: its lines in the table, and what is wrong with it.

use std::time::Duration;

use dirtylimit_bench::guest::sim::Machine;
use dirtylimit_bench::guest::{Phase, Progress, VcpuNow};
use dirtylimit_bench::measure::{Measures, StepMeasures, VmMeasures};
use dirtylimit_bench::plan::{KickKind, Plan, PolicyKind, VcpuPlan};
use dirtylimit_bench::record::Recording;
use dirtylimit_bench::units::parse_rate;
use dirtylimit_bench::workload::Workload;

use crate::published::{self, Published};

pub(crate) const PAUSE: Duration = Duration::from_millis(10);

/// Says nothing, and wants the run to end after so many samples.
pub(crate) struct Silent(pub(crate) usize);

impl Progress for Silent {
    fn sample(&mut self, _: Duration, _: Phase, _: &[VcpuNow]) {
        self.0 = self.0.saturating_sub(1);
    }

    fn interrupted(&self) -> bool {
        self.0 == 0
    }
}

/// `vcpus`: each `workload`, or `workload@limit` in MiB/s.
pub(crate) fn plan(vcpus: &str, ring: u32, policy: PolicyKind) -> Plan {
    let vcpu = |text: &str| {
        let (workload, limit) = text.split_once('@').unwrap_or((text, ""));
        let limit = (!limit.is_empty()).then(|| parse_rate(&format!("{limit}MiB/s")).unwrap());
        VcpuPlan { workload: workload.parse().unwrap(), limit }
    };
    Plan {
        vcpus: vcpus.split(' ').map(vcpu).collect(),
        vm_limit: None,
        policy,
        ring,
        max_pause: PAUSE,
        pass: Duration::from_millis(500),
        free: Duration::from_millis(200),
        // Stepped may take 3 s to settle, and is judged by the second half.
        limited: Duration::from_secs(6),
        steps: Vec::new(),
        payload: None,
        qmp: None,
        metrics: None,
        steal_time: false,
        kick: KickKind::Signal,
    }
}

/// What is to be run.
#[derive(Clone)]
pub(crate) struct Job {
    machine: Machine,
    plan: Plan,
    published: bool,
}

impl Job {
    pub(crate) fn new(machine: Machine, plan: Plan) -> Self {
        Self { machine, plan, published: false }
    }

    /// Under QEMU's rule, on a machine of its kind.
    pub(crate) fn published(plan: Plan) -> Self {
        let plan = Plan { max_pause: Duration::from_secs(1), ..plan };
        Self { machine: published::MACHINE, plan, published: true }
    }

    pub(crate) fn run(&self) -> Case {
        let Self { machine, plan, published } = self;
        let recording = match published {
            true => machine.run_under(Published::new(plan.ring), plan, &mut Silent(usize::MAX)),
            false => machine.run(plan, &mut Silent(usize::MAX)),
        };
        let recording = recording.unwrap();
        let vcpus = recording.vcpus.iter().map(|vcpu| Measures::of(&recording, vcpu)).collect();
        let policy = if *published { "qemu".into() } else { format!("{:?}", plan.policy).to_lowercase() };
        Case { policy, recording, vcpus }
    }
}

/// Runs all of them, on two threads.
pub(crate) fn run(jobs: &[Job]) -> Vec<Case> {
    let (first, second) = jobs.split_at(jobs.len() / 2);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| second.iter().map(Job::run).collect::<Vec<_>>());
        let mut cases: Vec<_> = first.iter().map(Job::run).collect();
        cases.extend(second.join().unwrap());
        cases
    })
}

/// One run.
pub(crate) struct Case {
    policy: String,
    pub(crate) recording: Recording,
    pub(crate) vcpus: Vec<Measures>,
}

/// What a run is held to.
#[derive(Clone, Copy)]
pub(crate) enum Bounds {
    /// Its limits cannot be held.
    None,
    /// Each vCPU's limit, and its longest gap.
    Each,
    /// All of the vCPUs, on the whole.
    Together,
}

/// All of a VM's vCPUs together.
pub(crate) struct Together {
    limit: f64,
    settled: f64,
    pub(crate) error_pct: f64,
    /// Jain's index, 1 is fair: of settled ÷ limit, or of the rates that share a budget.
    pub(crate) fairness: f64,
    pub(crate) stall_ms: f64,
}

fn show(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |value| format!("{value:.digits$}"))
}

impl Case {
    pub(crate) fn heading() -> String {
        let [workload, policy, ring, limit, settled] = ["workload", "policy", "ring", "limit", "settled"];
        let [error, settle, worst, stall, p99] = ["error %", "settle", "worst %", "stall", "p99"];
        let [work, resets, fair, lost] = ["work %", "resets/s", "fair", "lost"];
        format!(
            "{workload:<14}{policy:<9}{ring:>5}{limit:>7}{settled:>9}{error:>10}{settle:>9}{worst:>8}{stall:>8}{p99:>8}\
             {work:>7}{resets:>10}{fair:>7}{lost:>6}"
        )
    }

    /// A line for each vCPU and limit, and one for all if there are several vCPUs.
    pub(crate) fn lines(&self) -> String {
        let mut text = String::new();
        for (measures, vcpu) in self.vcpus.iter().zip(&self.recording.vcpus) {
            for step in &measures.steps {
                let StepMeasures { limit_mib_s, settled_mib_s, error_pct, settle_ms, worst_window_error_pct, .. } =
                    *step;
                let numbers = [
                    show(limit_mib_s, 0),
                    show(settled_mib_s, 2),
                    show(error_pct, 2),
                    show(settle_ms, 0),
                    show(worst_window_error_pct, 1),
                    show(measures.stall_max_ms, 2),
                    show(measures.stall_p99_ms, 2),
                    show(measures.work_kept_pct, 1),
                    "-".into(),
                ];
                text += &self.line(&vcpu.workload.to_string(), &numbers);
            }
        }
        text + &self.line_of_all()
    }

    /// The line for all of several vCPUs.
    pub(crate) fn line_of_all(&self) -> String {
        let Some(all) = self.together() else { return String::new() };
        let last = |measure: fn(&StepMeasures) -> Option<f64>| {
            let limited = self.vcpus.iter().map(Measures::last).filter(|step| step.error_pct.is_some());
            limited.map(measure).reduce(|a, b| a.zip(b).map(|(a, b)| a.max(b))).flatten()
        };
        let numbers = [
            show(Some(all.limit), 0),
            show(Some(all.settled), 2),
            show(Some(all.error_pct), 2),
            show(last(|step| step.settle_ms), 0),
            show(last(|step| step.worst_window_error_pct), 1),
            show(Some(all.stall_ms), 2),
            "-".into(),
            "-".into(),
            show(Some(all.fairness), 4),
        ];
        self.line(&format!("{} together", self.vcpus.len()), &numbers)
    }

    fn line(&self, name: &str, numbers: &[String; 9]) -> String {
        let Self { policy, recording: Recording { ring, limited_at, end, reset_calls, lost_pages, .. }, .. } = self;
        let resets = *reset_calls as f64 / (*end - *limited_at).as_secs_f64();
        let [limit, settled, error, settle, worst, stall, p99, work, fair] = numbers;
        let lost = lost_pages.unwrap();
        format!(
            "{name:<14}{policy:<9}{ring:>5}{limit:>7}{settled:>9}{error:>10}{settle:>9}{worst:>8}{stall:>8}{p99:>8}\
             {work:>7}{resets:>10.0}{fair:>7}{lost:>6}\n"
        )
    }

    /// `None` where there is but one vCPU, or none is limited.
    pub(crate) fn together(&self) -> Option<Together> {
        let vcpus = || self.vcpus.iter().zip(&self.recording.vcpus).filter(|(_, vcpu)| vcpu.workload.writes());
        let own = || vcpus().filter_map(|(measures, _)| measures.last().settled_mib_s.zip(measures.last().limit_mib_s));
        let (limit, settled, shares): (f64, f64, Vec<f64>) = match VmMeasures::of(&self.recording) {
            _ if self.vcpus.len() < 2 => return None,
            Some(vm) => {
                let free = vcpus().filter(|(measures, _)| measures.last().limit_mib_s.is_none());
                (vm.limit_mib_s, vm.settled_mib_s?, free.filter_map(|(vcpu, _)| vcpu.last().settled_mib_s).collect())
            }
            None => {
                (own().map(|vcpu| vcpu.1).sum(), own().map(|vcpu| vcpu.0).sum(), own().map(|(a, b)| a / b).collect())
            }
        };
        let squares: f64 = shares.iter().map(|share| share * share).sum();
        Some(Together {
            limit,
            settled,
            error_pct: 100.0 * (settled - limit) / limit,
            fairness: shares.iter().sum::<f64>().powi(2) / (shares.len() as f64 * squares),
            stall_ms: self.vcpus.iter().filter_map(|vcpu| vcpu.stall_max_ms).fold(0.0, f64::max),
        })
    }

    /// What is wrong with the run; empty if nothing is. No page may be lost, whatever the bounds.
    pub(crate) fn complaints(&self, bounds: Bounds) -> Vec<String> {
        let mut complaints = Vec::new();
        if self.recording.lost_pages != Some(0) {
            complaints.push(format!("{:?} pages lost", self.recording.lost_pages));
        }
        match bounds {
            Bounds::None => {}
            Bounds::Each => self.complain_of_each(&mut complaints),
            Bounds::Together => self.complain_of_all(&mut complaints),
        }
        complaints
    }

    fn complain_of_each(&self, complaints: &mut Vec<String>) {
        let longest = Machine::longest_gap(PAUSE).as_secs_f64() * 1e3;
        for (vcpu, measures) in self.recording.vcpus.iter().zip(&self.vcpus) {
            let mut complain =
                |what: String| complaints.push(format!("vCPU {} ({}): {what}", vcpu.index, vcpu.workload));
            if let Some(stall) = measures.stall_max_ms.filter(|stall| *stall > longest) {
                complain(format!("a gap of {stall:.2} ms, more than {longest:.2}"));
            }
            let bursts = matches!(vcpu.workload, Workload::Burst(_));
            for step in &measures.steps {
                let (Some(error), Some(limit)) = (step.error_pct, step.limit_mib_s) else { continue };
                let bound = match self.recording.policy {
                    // Known, and in the table: while it sees few pages, in a rest, it gives up its sleep.
                    PolicyKind::Stepped if bursts => continue,
                    PolicyKind::Paced => 1.0,
                    _ => 5.0,
                };
                // Nobody can be held up to a limit that it does not reach by itself: `burst` by its rests, `slow` by its
                // work.
                let reaches = !bursts && measures.free_mib_s.is_none_or(|free| free > limit);
                if error > bound || reaches && error < -bound {
                    complain(format!("{error:+.2} % of the limit of {limit}"));
                }
            }
        }
    }

    fn complain_of_all(&self, complaints: &mut Vec<String>) {
        let Some(Together { error_pct, fairness, stall_ms, .. }) = self.together() else {
            return self.complain_of_each(complaints);
        };
        // The full rings of all are freed a batch of 4096 entries at a time, each 2.1 ms after the other.
        let batches = self.vcpus.len() as f64 * f64::from(self.recording.ring) / 4096.0;
        let longest = Machine::longest_gap(PAUSE).as_secs_f64() * 1e3 + 2.1 * batches;
        if stall_ms > longest {
            complaints.push(format!("a gap of {stall_ms:.2} ms, more than {longest:.2}"));
        }
        let above = if self.recording.policy == PolicyKind::Paced { 1.0 } else { 5.0 };
        if !(-10.0..=above).contains(&error_pct) || fairness < 0.98 {
            complaints.push(format!("together {error_pct:+.2} % of the limit, fairness {fairness:.4}"));
        }
    }

    /// As [`Case::complaints`], the first of them, with the run's lines.
    pub(crate) fn explained(&self, bounds: Bounds) -> String {
        let complaints = self.complaints(bounds);
        match complaints.len() {
            0 => String::new(),
            count => {
                let lines = if self.vcpus.len() > 4 { self.line_of_all() } else { self.lines() };
                format!("{lines}{count} complaints:\n{}\n", complaints[..count.min(8)].join("\n"))
            }
        }
    }
}
