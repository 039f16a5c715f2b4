//! The simulated guest as the regression test of control quality: a table of results, and bounds on it.
//!
//! `UPDATE_SNAPSHOT=1 cargo test -p dirtylimit-bench --test sim` rewrites the table.

use std::fmt::Write as _;
use std::time::Duration;

use dirtylimit_bench::guest::sim::{Fault, Machine};
use dirtylimit_bench::guest::{Phase, Progress, VcpuNow};
use dirtylimit_bench::measure::{Measures, StepMeasures, VmMeasures};
use dirtylimit_bench::plan::{Plan, Step, VcpuPlan};
use dirtylimit_bench::record::{PolicyKind, Recording};
use dirtylimit_bench::units::parse_rate;
use dirtylimit_bench::workload::Workload;

const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sim.txt");
const PAUSE: Duration = Duration::from_millis(10);
const POLICIES: [PolicyKind; 2] = [PolicyKind::Paced, PolicyKind::Stepped];

/// Says nothing, and wants the run to end after so many samples.
struct Silent(usize);

impl Progress for Silent {
    fn sample(&mut self, _: Duration, _: Phase, _: &[VcpuNow]) {
        self.0 = self.0.saturating_sub(1);
    }

    fn interrupted(&self) -> bool {
        self.0 == 0
    }
}

fn run(machine: Machine, plan: &Plan) -> Recording {
    machine.run(plan, &mut Silent(usize::MAX)).unwrap()
}

/// `vcpus`: each `workload`, or `workload@limit` in MiB/s.
fn plan(vcpus: &str, ring: u32, policy: PolicyKind) -> Plan {
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
    }
}

/// One run, and its lines in the table.
struct Case {
    recording: Recording,
    vcpus: Vec<Measures>,
}

impl Case {
    fn of(machine: Machine, plan: &Plan) -> Self {
        let recording = run(machine, plan);
        let vcpus = recording.vcpus.iter().map(|vcpu| Measures::of(&recording, vcpu)).collect();
        Self { recording, vcpus }
    }

    fn heading() -> String {
        format!(
            "{:<14}{:<9}{:>5}{:>7}{:>9}{:>10}{:>9}{:>8}{:>8}{:>8}{:>7}{:>10}{:>6}",
            "workload",
            "policy",
            "ring",
            "limit",
            "settled",
            "error %",
            "settle",
            "worst %",
            "stall",
            "p99",
            "work %",
            "resets/s",
            "lost"
        )
    }

    fn lines(&self) -> String {
        let mut text = String::new();
        let Recording { ring, limited_at, end, reset_calls, .. } = self.recording;
        let resets = reset_calls as f64 / (end - limited_at).as_secs_f64();
        let policy = format!("{:?}", self.recording.policy).to_lowercase();
        let lost = self.recording.lost_pages.unwrap();
        let show = |value: Option<f64>, digits| value.map_or("-".into(), |value| format!("{value:.digits$}"));
        for (measures, vcpu) in self.vcpus.iter().zip(&self.recording.vcpus) {
            for step in &measures.steps {
                let StepMeasures { limit_mib_s, settled_mib_s, error_pct, settle_ms, worst_window_error_pct, .. } =
                    *step;
                writeln!(
                    text,
                    "{:<14}{policy:<9}{ring:>5}{:>7}{:>9}{:>10}{:>9}{:>8}{:>8}{:>8}{:>7}{resets:>10.0}{lost:>6}",
                    vcpu.workload.to_string(),
                    show(limit_mib_s, 0),
                    show(settled_mib_s, 2),
                    show(error_pct, 2),
                    show(settle_ms, 0),
                    show(worst_window_error_pct, 1),
                    show(measures.stall_max_ms, 2),
                    show(measures.stall_p99_ms, 2),
                    show(measures.work_kept_pct, 1),
                )
                .unwrap();
            }
        }
        if let Some(vm) = VmMeasures::of(&self.recording) {
            writeln!(
                text,
                "all of them{:>24.0}{:>9}{:>10}",
                vm.limit_mib_s,
                show(vm.settled_mib_s, 2),
                show(vm.error_pct, 2)
            )
            .unwrap();
        }
        text
    }

    /// What is wrong with a machine without lumps, whose vCPUs are all limited; empty if nothing is.
    fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        if self.recording.lost_pages != Some(0) {
            complaints.push(format!("{:?} pages lost", self.recording.lost_pages));
        }
        let (bound, longest) =
            (Machine::longest_gap(PAUSE).as_secs_f64() * 1e3, |measures: &Measures| measures.stall_max_ms);
        for (vcpu, measures) in self.recording.vcpus.iter().zip(&self.vcpus) {
            let mut complain =
                |what: String| complaints.push(format!("vCPU {} ({}): {what}", vcpu.index, vcpu.workload));
            if let Some(stall) = longest(measures).filter(|stall| *stall > bound) {
                complain(format!("a gap of {stall:.2} ms, more than {bound:.2}"));
            }
            let Some(error) = measures.last().error_pct else { continue };
            let (above, below) = match self.recording.policy {
                PolicyKind::Paced => (1.0, 1.0),
                // Known, and in the table: while it sees few pages, in a rest, it gives up its sleep.
                PolicyKind::Stepped if matches!(vcpu.workload, Workload::Burst(_)) => continue,
                PolicyKind::Stepped => (5.0, 5.0),
            };
            // Nobody can be held up to a limit that it does not reach by itself: `burst` by its rests, `slow` by its work.
            let (free, limit) = (measures.free_mib_s.unwrap(), measures.last().limit_mib_s.unwrap());
            let reaches = free > limit && !matches!(vcpu.workload, Workload::Burst(_));
            if error > above || reaches && error < -below {
                complain(format!("{error:+.2} % of the limit"));
            }
        }
        complaints
    }
}

/// Runs all of them, on two threads.
fn cases(plans: &[(Machine, Plan)]) -> Vec<Case> {
    let run =
        |plans: &[(Machine, Plan)]| plans.iter().map(|(machine, plan)| Case::of(*machine, plan)).collect::<Vec<_>>();
    let (first, second) = plans.split_at(plans.len() / 2);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| run(second));
        let mut cases = run(first);
        cases.extend(second.join().unwrap());
        cases
    })
}

/// One limited vCPU: every limit, ring, workload and policy. Memory enough that no pass sees a page twice.
fn grid() -> Vec<(Machine, Plan)> {
    let mut plans = Vec::new();
    for policy in POLICIES {
        for workload in ["write:1GiB", "random:1GiB", "slow:1GiB", "burst:1GiB"] {
            for ring in [256, 1024, 4096] {
                for limit in [2, 5, 20, 100, 400] {
                    plans.push((Machine::default(), plan(&format!("{workload}@{limit}"), ring, policy)));
                }
            }
        }
    }
    plans
}

/// What the grid does not have: several vCPUs, changes, budgets, rewritten memory, and CPUs that hand pages over in lumps.
fn others() -> Vec<(&'static str, Vec<(Machine, Plan)>)> {
    let lumps = Machine { pml: true, ..Machine::default() };
    let both = |vcpus, ring| POLICIES.map(|policy| (Machine::default(), plan(vcpus, ring, policy))).to_vec();
    let steps = |policy| {
        let step = |after, limit| Step { after: Duration::from_secs(after), limit: Some(parse_rate(limit).unwrap()) };
        Plan {
            steps: vec![step(2, "30MiB/s"), step(4, "300MiB/s")],
            limited: Duration::from_secs(6),
            ..plan("write:1GiB@100", 4096, policy)
        }
    };
    let rewritten = |vcpu, policy| Plan {
        pass: Duration::from_secs(1),
        limited: Duration::from_secs(6),
        ..plan(vcpu, 4096, policy)
    };
    let budget = |policy| Plan {
        vm_limit: Some(parse_rate("120MiB/s").unwrap()),
        ..plan("write:512MiB write:512MiB slow:256MiB@10 read:32MiB", 4096, policy)
    };
    vec![
        ("a fast and a slow writer", both("write:1GiB@100 slow:1GiB@100", 4096)),
        ("a writer and a reader", both("write:1GiB@50 read:32MiB@50", 4096)),
        ("limited beside unlimited", both("write:512MiB@20 write:512MiB", 4096)),
        ("one limit after the other", POLICIES.map(|policy| (Machine::default(), steps(policy))).to_vec()),
        ("a budget of 120 MiB/s", POLICIES.map(|policy| (Machine::default(), budget(policy))).to_vec()),
        (
            "memory that is written over and over between two passes",
            ["write:224MiB@2", "write:224MiB@100", "random:64MiB@2", "random:64MiB@20"]
                .map(|vcpu| POLICIES.map(|policy| (Machine::default(), rewritten(vcpu, policy))))
                .concat(),
        ),
        ("less memory than entries: the ring never fills", both("write:8MiB@2", 4096)),
        (
            "pages in lumps of up to 512",
            [(20, 1024), (20, 4096), (100, 1024), (100, 4096)]
                .map(|(limit, ring)| (lumps, plan(&format!("write:224MiB@{limit}"), ring, PolicyKind::Paced)))
                .to_vec(),
        ),
    ]
}

/// Compares the text with the snapshot, line by line.
fn check_snapshot(text: &str) {
    if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
        return std::fs::write(SNAPSHOT, text).unwrap();
    }
    let old = std::fs::read_to_string(SNAPSHOT).unwrap_or_default();
    if old == text {
        return;
    }
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), text.lines().collect());
    let mut difference = String::new();
    for line in 0..old.len().max(new.len()) {
        let (old, new) = (old.get(line).copied(), new.get(line).copied());
        if old != new {
            old.iter().for_each(|old| writeln!(difference, "- {old}").unwrap());
            new.iter().for_each(|new| writeln!(difference, "+ {new}").unwrap());
        }
    }
    panic!("benches/tests/sim.txt has changed; UPDATE_SNAPSHOT=1 accepts it:\n  {}\n{difference}", Case::heading());
}

#[test]
fn the_table_is_as_it_was_and_within_bounds() {
    let grid = cases(&grid());
    let mut text = format!("{}\n", Case::heading());
    grid.iter().for_each(|case| text += &case.lines());
    for (title, plans) in others() {
        write!(text, "\n{title}\n").unwrap();
        cases(&plans).iter().for_each(|case| text += &case.lines());
    }
    let complaints: Vec<_> =
        grid.iter().flat_map(|case| case.complaints().into_iter().map(|what| case.lines() + &what)).collect();
    check_snapshot(&text);
    assert!(complaints.is_empty(), "out of bounds:\n{}\n{}", Case::heading(), complaints.join("\n"));
    assert!(
        text.lines().filter(|line| line.contains("paced") || line.contains("stepped")).all(|line| line.ends_with(" 0"))
    );
}

#[test]
fn a_seed_is_one_run_and_another_seed_is_another() {
    let plan = plan("random:64MiB@20 burst:64MiB@50", 1024, PolicyKind::Paced);
    let [first, again, other] =
        [1, 1, 2].map(|seed| format!("{:?}", run(Machine { seed, ..Machine::default() }, &plan)));
    assert_eq!(first, again);
    assert_ne!(first.replace("seed 1", "seed 2"), other);
}

#[test]
fn the_bounds_see_a_planted_bug() {
    let complaints = |fault, plan: &Plan| Case::of(Machine { fault, ..Machine::default() }, plan).complaints();
    // Passes often copy pages of a vCPU that is in the guest; few of those are written again, which would heal them.
    let pass = Duration::from_millis(20);
    let many_passes = Plan { pass, ..plan("random:512MiB random:512MiB@100", 4096, PolicyKind::Paced) };
    assert_eq!(complaints(None, &many_passes), [""; 0]);
    let lost = complaints(Some(Fault::PublishBeforeReset), &many_passes);
    assert!(lost.iter().any(|what| what.contains("lost")), "{lost:?}");
    let slow = plan("write:1GiB@5", 4096, PolicyKind::Paced);
    assert_eq!(complaints(None, &slow), [""; 0]);
    let off = complaints(Some(Fault::NothingHeldBack), &slow);
    assert!(off.iter().any(|what| what.contains("of the limit")), "{off:?}");
}

#[test]
fn a_run_ends_when_the_user_has_enough() {
    let plan = plan("write:64MiB@20", 1024, PolicyKind::Paced);
    for samples in [1, 50] {
        let recording = Machine::default().run(&plan, &mut Silent(samples)).unwrap();
        assert!(recording.interrupted);
        assert!(recording.end < Duration::from_millis(600), "{:?}", recording.end);
        assert_eq!(recording.lost_pages, Some(0));
        assert!(recording.limited_at <= recording.end);
    }
}

#[test]
fn what_cannot_be_simulated_is_refused() {
    let plan = |vcpus, ring| plan(vcpus, ring, PolicyKind::Paced);
    let lumps = Machine { pml: true, ..Machine::default() };
    for (machine, plan, told) in [
        (Machine::default(), plan("idle", 1000), "a power of two above 64"),
        (Machine::default(), plan("idle", 64), "a power of two above 64"),
        (Machine::default(), plan("idle", 131_072), "at most 65536"),
        (lumps, plan("idle", 512), "a power of two above 576"),
        (Machine::default(), plan("write:16384GiB", 4096), "at most 65536 MiB"),
        (Machine::default(), plan(["idle"; 1025].join(" ").as_str(), 4096), "at most 1024"),
    ] {
        let error = machine.run(&plan, &mut Silent(usize::MAX)).unwrap_err();
        assert!(format!("{error:#}").contains(told), "{error:#}");
    }
}
