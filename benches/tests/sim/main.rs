//! The simulated guest as the regression test of control quality: a table of results, and bounds on it.
//!
//! `UPDATE_SNAPSHOT=1 cargo test -p dirtylimit-bench --test sim` rewrites the table.

mod case;
mod published;

use std::fmt::Write as _;
use std::time::Duration;

use case::{Bounds, Case, Job, Silent, plan};
use dirtylimit_bench::guest::sim::{Fault, Machine};
use dirtylimit_bench::plan::KickKind::{self, Auto, Off, Signal};
use dirtylimit_bench::plan::PolicyKind::{self, Paced, Stepped};
use dirtylimit_bench::plan::{Plan, Step};
use dirtylimit_bench::units::parse_rate;

const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sim.txt");

/// Runs that belong together.
struct Section {
    title: &'static str,
    bounds: Bounds,
    jobs: Vec<Job>,
}

fn job(vcpus: &str, ring: u32, policy: PolicyKind) -> Job {
    Job::new(Machine::default(), plan(vcpus, ring, policy))
}

fn both(job: impl Fn(PolicyKind) -> Job) -> Vec<Job> {
    vec![job(Paced), job(Stepped)]
}

/// One limited vCPU: every limit, ring, workload and policy. Memory enough that no pass sees a page twice.
fn grid() -> Vec<Job> {
    let mut jobs = Vec::new();
    for policy in [Paced, Stepped] {
        for workload in ["write:1GiB", "random:1GiB", "slow:1GiB", "burst:1GiB"] {
            for ring in [256, 1024, 4096] {
                for limit in [2, 5, 20, 100, 400] {
                    jobs.push(job(&format!("{workload}@{limit}"), ring, policy));
                }
            }
        }
    }
    jobs
}

/// What the grid does not have: several vCPUs, changes, budgets, rewritten memory, and slices that a ring cannot end.
fn sections() -> Vec<Section> {
    let section = |title, jobs| Section { title, bounds: Bounds::Each, jobs };
    let second = Duration::from_secs(1);
    let steps = |policy| {
        let step = |after, limit| Step { after: after * second, limit: Some(parse_rate(limit).unwrap()) };
        let steps = vec![step(2, "30MiB/s"), step(4, "300MiB/s")];
        Job::new(Machine::default(), Plan { steps, ..plan("write:1GiB@100", 4096, policy) })
    };
    let rewritten = |vcpu: &str, ring, policy| Plan { pass: second, ..plan(vcpu, ring, policy) };
    let budget = |policy| {
        let vm_limit = Some(parse_rate("120MiB/s").unwrap());
        let plan = plan("write:512MiB write:512MiB slow:256MiB@10 read:32MiB", 4096, policy);
        Job::new(Machine::default(), Plan { vm_limit, ..plan })
    };
    let lumps = |(limit, ring, kick): (u32, u32, KickKind)| {
        let plan = plan(&format!("write:224MiB@{limit}"), ring, Paced);
        Job::new(Machine { pml: true, kick, ..Machine::default() }, plan)
    };
    let stolen = Machine { steal_time: true, ..Machine::default() };
    let never_full = |(vcpu, ring, kick): (&str, u32, KickKind)| {
        Job::new(Machine { kick, ..Machine::default() }, rewritten(vcpu, ring, Paced))
    };
    let beside_qemu = |vcpus: &str, ring| {
        let plan = rewritten(vcpus, ring, Paced);
        let plan = Plan { limited: 10 * second, ..plan };
        [Job::published(plan.clone()), Job::new(Machine::default(), plan)]
    };
    vec![
        section("a fast and a slow writer", both(|policy| job("write:1GiB@100 slow:1GiB@100", 4096, policy))),
        section("a writer and a reader", both(|policy| job("write:1GiB@50 read:32MiB@50", 4096, policy))),
        section("limited beside unlimited", both(|policy| job("write:512MiB@20 write:512MiB", 4096, policy))),
        section("one limit after the other", both(steps)),
        section("a budget of 120 MiB/s", both(budget)),
        Section {
            title: "memory that is written over and over between two passes",
            bounds: Bounds::None,
            jobs: ["write:224MiB@2", "write:224MiB@100", "random:64MiB@2", "random:64MiB@20"]
                .map(|vcpu| both(|policy| Job::new(Machine::default(), rewritten(vcpu, 4096, policy))))
                .concat(),
        },
        section(
            "less memory than entries: the ring never fills, a kick ends the slices",
            [("write:224MiB@20", 65_536, Signal), ("write:224MiB@100", 65_536, Signal)].map(never_full).to_vec(),
        ),
        section(
            "steal time: the kernel logs a page of its own at each entry and exit",
            ["write:1GiB@2", "write:1GiB@20", "write:1GiB@100", "random:1GiB@5", "slow:1GiB@20", "burst:1GiB@20"]
                .map(|vcpus| both(|policy| Job::new(stolen, plan(vcpus, 4096, policy))))
                .concat(),
        ),
        section(
            "pages in lumps of up to 512, and a kick",
            [(100, 1024, Signal), (100, 4096, Signal)].map(lumps).to_vec(),
        ),
        section(
            "the same, and the default: timers",
            [5, 20, 100]
                .into_iter()
                .flat_map(|limit| [(limit, 1024), (limit, 4096)])
                .flat_map(|(limit, ring)| ["write", "steady", "slow"].map(|workload| (workload, limit, ring)))
                .map(|(workload, limit, ring)| {
                    let plan = plan(&format!("{workload}:224MiB@{limit}"), ring, Paced);
                    Job::new(Machine { pml: true, kick: Auto, ..Machine::default() }, plan)
                })
                .collect(),
        ),
        Section {
            title: "the same without a kick, or with one that comes too seldom: a pass leaves a ring alone that is to fill",
            bounds: Bounds::None,
            jobs: [("write:224MiB@20", 65_536, Off), ("write:8MiB@2", 4096, Signal)]
                .map(never_full)
                .into_iter()
                .chain([(100, 4096, Off), (20, 4096, Signal)].map(lumps))
                .collect(),
        },
        Section {
            title: "QEMU's rule and its pauses for whole rings, and ours",
            bounds: Bounds::None,
            jobs: ["write:2GiB@100", "write:2GiB@20", "write:2GiB@5", "write:2GiB@100 slow:1GiB@100"]
                .map(|vcpus| beside_qemu(vcpus, 4096))
                .into_iter()
                .chain([beside_qemu("write:224MiB@20", 65_536)])
                .flatten()
                .collect(),
        },
    ]
}

/// VMs of 1 to 1,024 vCPUs: each limited to 2 MiB/s, or all by a budget of as much. Nobody writes a page twice before the
/// first pass.
fn machines() -> Vec<Job> {
    let mut jobs = Vec::new();
    for (count, seconds) in [(1, 6), (2, 6), (8, 6), (64, 3), (1024, 2)] {
        for (own, policy) in [("@2", Paced), ("", Paced), ("@2", Stepped)] {
            // Stepped takes longer to settle than so many vCPUs can be simulated.
            if policy == Stepped && count > 64 {
                continue;
            }
            let vcpus = (0..count).map(|vcpu| format!("{}:16MiB{own}", ["write", "random", "slow"][vcpu % 3]));
            let plan = plan(&vcpus.collect::<Vec<_>>().join(" "), 1024, policy);
            let vm_limit = own.is_empty().then(|| parse_rate(&format!("{}MiB/s", 2 * count)).unwrap());
            let (free, limited) = (Duration::from_millis(5), Duration::from_secs(seconds));
            jobs.push(Job::new(Machine::default(), Plan { vm_limit, free, limited, ..plan }));
        }
    }
    jobs
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
    let mut text = format!("{}\n", Case::heading());
    let mut complaints = String::new();
    for case in case::run(&grid()) {
        text += &case.lines();
        complaints += &case.explained(Bounds::Each);
    }
    for Section { title, bounds, jobs } in sections() {
        write!(text, "\n{title}\n").unwrap();
        for case in case::run(&jobs) {
            text += &case.lines();
            complaints += &case.explained(bounds);
        }
    }
    text += "\n1 to 1,024 vCPUs: each limited to 2 MiB/s, or all by a budget of as much\n";
    for case in case::run(&machines()) {
        text += &if case.vcpus.len() == 1 { case.lines() } else { case.line_of_all() };
        complaints += &case.explained(Bounds::Together);
    }
    check_snapshot(&text);
    assert!(complaints.is_empty(), "out of bounds:\n{}\n{complaints}", Case::heading());
}

#[test]
fn qemus_faults_show() {
    let second = Duration::from_secs(1);
    let run = |vcpu, ring| {
        let plan = Plan { pass: second, limited: 10 * second, ..plan(vcpu, ring, Paced) };
        let case = Job::published(plan).run();
        (case.vcpus[0].last().error_pct.unwrap(), case.vcpus[0].stall_max_ms.unwrap())
    };
    // A dead band, and a pause for each whole ring: 16 MiB are 0.8 s at 20 MiB/s.
    let (error, stall) = run("write:2GiB@20", 4096);
    assert!(error > 20.0 && stall > 300.0, "{error:+.1} %, {stall:.0} ms");
    // A ring that never fills.
    let (error, _) = run("write:224MiB@20", 65_536);
    assert!(error > 900.0, "{error:+.1} %");
}

#[test]
fn a_seed_is_one_run_and_another_seed_is_another() {
    let plan = plan("random:64MiB@20 burst:64MiB@50", 1024, Paced);
    let run = |seed| Job::new(Machine { seed, ..Machine::default() }, plan.clone()).run();
    let [first, again, other] = [1, 1, 2].map(|seed| format!("{:?}", run(seed).recording));
    assert_eq!(first, again);
    assert_ne!(first.replace("seed 1", "seed 2"), other);
}

#[test]
fn the_bounds_see_a_planted_bug() {
    let complaints = |machine, plan: &Plan| Job::new(machine, plan.clone()).run().complaints(Bounds::Each);
    let machine = Machine::default();
    // Passes often copy pages of a vCPU that is in the guest; few of those are written again, which would heal them.
    let pass = Duration::from_millis(20);
    let many_passes = Plan { pass, ..plan("random:512MiB random:512MiB@100", 4096, Paced) };
    assert_eq!(complaints(machine, &many_passes), [""; 0]);
    let lost = complaints(Machine { fault: Some(Fault::PublishBeforeReset), ..machine }, &many_passes);
    assert!(lost.iter().any(|what| what.contains("lost")), "{lost:?}");
    let slow = plan("write:1GiB@5", 4096, Paced);
    assert_eq!(complaints(machine, &slow), [""; 0]);
    let off = complaints(Machine { fault: Some(Fault::NothingHeldBack), kick: Off, ..machine }, &slow);
    assert!(off.iter().any(|what| what.contains("of the limit")), "{off:?}");
}

#[test]
fn a_run_ends_when_the_user_has_enough() {
    let plan = plan("write:64MiB@20", 1024, Paced);
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
    let plan = |vcpus, ring| plan(vcpus, ring, Paced);
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
