//! Whole runs on real KVM: that they end, in an error or a recording that adds up. How well a limit is held is no test
//! but a measurement.

use std::time::Duration;

use dirtylimit_core::PageRate;

use super::{Hold, Load, MAX_VCPUS, Machine, Script, kvm_or_skip, run, run_scripted};
use crate::guest::{Phase, Progress, VcpuNow};
use crate::plan::{KickKind, Plan, PolicyKind, Step, VcpuPlan};
use crate::record::Recording;
use crate::workload::Workload;
use dirtylimit_test_vm::payload::{self, Mode};

const MIB: u64 = 1 << 20;

/// Counts what it is shown, and wants to end the run after so many samples of a phase.
struct Watcher {
    seen: Vec<Phase>,
    enough: Option<(Phase, usize)>,
}

impl Progress for Watcher {
    fn sample(&mut self, _: Duration, phase: Phase, _: &[VcpuNow]) {
        self.seen.push(phase);
    }

    fn interrupted(&self) -> bool {
        self.enough.is_some_and(|(phase, count)| self.seen.iter().filter(|&&seen| seen == phase).count() >= count)
    }
}

fn plan(workloads: &[Workload]) -> Plan {
    let limit = Some(rate(50));
    Plan {
        vcpus: workloads.iter().map(|&workload| VcpuPlan { workload, limit }).collect(),
        vm_limit: None,
        policy: PolicyKind::Paced,
        ring: 1024,
        max_pause: Duration::from_millis(10),
        pass: Duration::from_millis(100),
        free: Duration::from_millis(300),
        limited: Duration::from_millis(700),
        steps: Vec::new(),
        payload: None,
        qmp: None,
        metrics: None,
        steal_time: false,
        kick: KickKind::Signal,
    }
}

fn rate(mib: u64) -> PageRate {
    PageRate::from_bytes_per_sec(mib * MIB, 4096)
}

fn watched(plan: &Plan, enough: Option<(Phase, usize)>) -> (anyhow::Result<Recording>, Vec<Phase>) {
    let mut watcher = Watcher { seen: Vec::new(), enough };
    let recording = run(plan, &mut watcher);
    (recording, watcher.seen)
}

fn failure(plan: &Plan) -> String {
    format!("{:#}", watched(plan, None).0.expect_err("the run must fail"))
}

#[test]
fn every_workload_is_recorded_and_no_page_is_lost() {
    if !kvm_or_skip() {
        return;
    }
    let workloads = [
        Workload::Write(16 * MIB),
        Workload::Random(8 * MIB),
        Workload::Read(8 * MIB),
        Workload::Slow(8 * MIB),
        Workload::Burst(8 * MIB),
        Workload::Idle,
    ];
    for policy in [PolicyKind::Paced, PolicyKind::Stepped] {
        let (recording, seen) = watched(&Plan { policy, ..plan(&workloads) }, None);
        let recording = recording.unwrap();
        assert_eq!(recording.lost_pages, Some(0));
        assert!(recording.limited_at < recording.end && !recording.interrupted);
        // It is learned where a ring was full, while limited or before; which on a busy host none may have been.
        let was_full = recording.vcpus.iter().any(|vcpu| vcpu.full_exits > 0);
        let soft = recording.host.soft_limit;
        assert!(soft.map_or(!was_full, |soft| soft < 1024), "{soft:?}, {was_full}");
        assert_eq!(seen.last(), Some(&Phase::Checking));
        for vcpu in &recording.vcpus {
            assert!(vcpu.samples.windows(2).all(|pair| {
                pair[0].at <= pair[1].at && pair[0].net <= pair[1].net && pair[0].gross <= pair[1].gross
            }));
            assert_eq!(vcpu.limits, [(recording.limited_at, Some(rate(50)))]);
            assert!(vcpu.net_pages <= vcpu.gross_pages);
            let touches = vcpu.workload != Workload::Idle;
            assert_eq!(vcpu.free_accesses + vcpu.limited_accesses > 0, touches, "{:?}", vcpu.workload);
        }
    }
}

#[test]
fn kvm_logs_the_steal_time_page_and_its_copy_is_right() {
    if !kvm_or_skip() {
        return;
    }
    // A vCPU that touches no memory but its own stats page: what is dirty beside that is KVM's.
    let pages = |steal_time| {
        let plan =
            Plan { steal_time, pass: Duration::from_millis(10), ..plan(&[Workload::Idle, Workload::Steady(8 * MIB)]) };
        let recording = watched(&plan, None).0.unwrap();
        assert_eq!((recording.lost_pages, recording.steal_time), (Some(0), steal_time));
        recording.vcpus[0].net_pages
    };
    // An idle vCPU logs none. With it KVM logs the page whenever the vCPU is scheduled, which on a busy host is seldom.
    assert_eq!(pages(false), 0, "without steal time");
    assert!((0..10).any(|_| pages(true) > 0), "with steal time");
}

#[test]
fn a_place_for_the_stolen_time_must_be_in_memory() {
    if !kvm_or_skip() {
        return;
    }
    let machine = Machine::new(&[Load::new(Mode::Write, MIB)], payload::image()).unwrap();
    machine.plug_memory(true).unwrap();
    let cpu = machine.vcpu(0).unwrap();
    cpu.enable_steal_time(machine.steal_time(0)).unwrap();
    for wrong in [machine.steal_time(0) + 8, machine.memory().bytes() as u64] {
        assert!(cpu.enable_steal_time(wrong).unwrap_err().to_string().contains("no place for the stolen time"));
    }
}

#[test]
fn steps_change_every_limit_and_are_recorded() {
    if !kvm_or_skip() {
        return;
    }
    let step = |after, limit| Step { after: Duration::from_millis(after), limit };
    let workloads = [Workload::Write(8 * MIB), Workload::Write(8 * MIB)];
    let plan = Plan {
        steps: vec![step(200, Some(rate(200))), step(400, None)],
        vm_limit: Some(rate(300)),
        ..plan(&workloads)
    };
    let recording = watched(&plan, None).0.unwrap();
    assert_eq!(recording.lost_pages, Some(0));
    for vcpu in &recording.vcpus {
        let limits: Vec<_> = vcpu.limits.iter().map(|&(_, limit)| limit).collect();
        assert_eq!(limits, [Some(rate(50)), Some(rate(200)), None]);
        assert!(vcpu.limits[2].0 >= recording.limited_at + Duration::from_millis(400));
    }
}

#[test]
fn a_held_vcpu_does_nothing_and_then_goes_on() {
    if !kvm_or_skip() {
        return;
    }
    let plan = plan(&[Workload::Write(8 * MIB), Workload::Read(8 * MIB)]);
    let hold = |after, held| Hold { after: Duration::from_millis(after), held };
    // Held for longer than it takes a busy host to get a vCPU out of the guest; who is held at the end must stop too.
    let script = Script {
        holds: vec![hold(0, vec![0, 1]), hold(300, vec![1]), hold(600, vec![0, 1])],
        time_ticks: true,
        ..Script::default()
    };
    let mut watcher = Watcher { seen: Vec::new(), enough: None };
    let done = run_scripted(&plan, &script, &mut watcher).unwrap();
    assert_eq!((done.recording.lost_pages, done.marks.len()), (Some(0), 4));
    let samples = &done.recording.vcpus[0].samples;
    let net = |at| samples.iter().rfind(|sample| sample.at <= at).map(|sample| sample.net);
    let marks = &done.marks;
    assert_eq!(net((marks[0].at + marks[1].at) / 2), net(marks[1].at), "vCPU 0 is held");
    // A busy host may do late what the script says, and then one thing right after the other.
    let had_time = marks[2].at - marks[1].at > Duration::from_millis(200);
    assert!(marks[2].accesses[0] > marks[1].accesses[0] || !had_time, "vCPU 0 goes on: {marks:?}");
    assert_eq!(marks[2].accesses[1], marks[1].accesses[1], "vCPU 1 is still held: {marks:?}");
    assert!(!done.ticks.is_empty());
}

#[test]
fn a_run_that_is_interrupted_still_checks_its_copy() {
    if !kvm_or_skip() {
        return;
    }
    for phase in [Phase::Free, Phase::Limited] {
        let long = Plan { limited: Duration::from_secs(600), ..plan(&[Workload::Write(8 * MIB)]) };
        let (recording, seen) = watched(&long, Some((phase, 5)));
        let recording = recording.unwrap();
        assert!(recording.interrupted && recording.lost_pages == Some(0), "{phase:?}");
        assert_eq!(recording.vcpus[0].limits.is_empty(), phase == Phase::Free);
        assert_eq!(seen.last(), Some(&Phase::Checking));
    }
}

#[test]
fn a_payload_file_stands_in_for_the_built_in_one() {
    if !kvm_or_skip() {
        return;
    }
    let path = std::env::temp_dir().join(format!("dirtylimit-payload-{}", std::process::id()));
    let with = |image: &[u8]| {
        std::fs::write(&path, image).unwrap();
        Plan { payload: Some(path.clone()), ..plan(&[Workload::Write(8 * MIB)]) }
    };
    let same = watched(&with(payload::image()), None).0;
    let faulty = failure(&with(dirtylimit_test_vm::images::FAULTY[0].1));
    let silent = watched(&with(dirtylimit_test_vm::images::SPIN), None).0;
    let empty = failure(&with(&[]));
    std::fs::remove_file(&path).unwrap();
    let same = same.unwrap();
    assert!(same.vcpus[0].limited_accesses > 0 && same.lost_pages == Some(0));
    assert!(faulty.contains("vCPU 0") && faulty.contains(dirtylimit_test_vm::FAULT), "{faulty}");
    let silent = silent.unwrap();
    assert!(silent.vcpus[0].limited_accesses == 0 && silent.lost_pages == Some(0), "a loop that touches nothing runs");
    assert!(empty.contains("empty") && empty.contains("dirtylimit-payload"), "{empty}");
    assert!(failure(&with_missing()).contains("/nowhere/payload"));
}

fn with_missing() -> Plan {
    Plan { payload: Some("/nowhere/payload".into()), ..plan(&[Workload::Write(8 * MIB)]) }
}

#[test]
fn a_plan_that_this_host_cannot_run_is_refused_before_it_starts() {
    if !kvm_or_skip() {
        return;
    }
    let write = Workload::Write(MIB);
    assert!(failure(&plan(&[write; MAX_VCPUS + 1])).contains("65 vCPUs"));
    assert!(failure(&plan(&[])).contains("0 vCPUs"));
    let ring = failure(&Plan { ring: 1000, ..plan(&[write]) });
    assert!(ring.contains("1000") && ring.contains("power of two"), "{ring}");
    let huge = failure(&plan(&[Workload::Write(63 << 30)]));
    assert!(huge.contains("available") && huge.contains("MiB"), "{huge}");
}
