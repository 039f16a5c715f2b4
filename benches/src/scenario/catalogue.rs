//! The scenarios, as data.

use std::time::Duration;

use dirtylimit_core::PageRate;

use super::Measure::{
    Error, Interrupted, InterruptedP99, Jain, OneSecond, Overshoot, Paused, ReaderKept, ResetCalls, Settle, Share,
    Speed, StallMax, StallP999, Tick, VmError, WorstWindow,
};
use super::Must::{AtLeast, AtMost};
use super::by_hand::HandServed;
use super::trial::Versus;
use super::{Bound, Case, Measure, Must, Scenario, Trial};
use crate::guest::kvm::{Hold, Script};
use crate::plan::{KickKind, Plan, PolicyKind, Step, VcpuPlan};
use crate::units::PAGE_SIZE;
use crate::workload::Workload;

const MIB: u64 = 1 << 20;
/// The working set of a writer that is alone.
const SET: u64 = 224 * MIB;
/// That of one with work between its writes; at more than 64 MiB/s it takes passes of less than a second.
const STEADY: Workload = Workload::Steady(64 * MIB);

/// All of them, in the order in which they run.
pub fn all() -> Vec<Scenario> {
    let scenario = |name, what, cases| Scenario { name, what, cases };
    vec![
        scenario("exact", "limits of 2 to 100 MiB/s by three rings, pauses up to 10 ms", exact(10)),
        scenario("exact-5ms", "the same with pauses up to 5 ms", exact(5)),
        scenario("exact-2ms", "the same with pauses up to 2 ms", exact(2)),
        scenario("fast", "a limit of 400 MiB/s by three rings, for hosts of that speed", fast()),
        scenario("big-ring", "a ring that no working set fills, collected once a second", big_ring()),
        scenario("beside", "two limited writers and a reader, for two CPUs", beside()),
        scenario("defaults", "the README's embedding, with what it leaves as it is", defaults()),
        scenario("steps", "the limit changes while the guest writes", steps()),
        scenario("bursty", "uneven writers: never above the limit, not paused below it", bursty()),
        scenario("budget", "one budget for four vCPUs", budget()),
        scenario("reader", "a reader beside limited writers, against writers held by hand", reader()),
        scenario("many", "64 limited vCPUs: what resets and ticks cost", many()),
        scenario("free-cost", "what it costs while nothing is limited", free_cost()),
        scenario("interrupt", "a paused vCPU is back in the VMM at once", interrupt()),
    ]
}

fn exact(pause: u32) -> Vec<Case> {
    let cases = [2, 5, 20, 100].into_iter().flat_map(|limit| [256, 1024, 4096].map(|ring| (limit, ring)));
    cases.map(|(limit, ring)| held(limit, ring, pause)).collect()
}

/// One realistic writer, held to its limit.
fn held(limit: u64, ring: u32, pause: u32) -> Case {
    Case {
        name: format!("{limit} MiB/s, ring {ring}"),
        trial: Trial::run_of(Plan { ring, max_pause: ms(pause.into()), ..steady(limit) }),
        bounds: exactly(pause),
    }
}

/// What must come out where a limit is to be held with pauses of up to that many ms. At 2 MiB/s and more, ±2 pages are less than
/// 5 % of a window.
fn exactly(pause: u32) -> Vec<Bound> {
    let pause = f64::from(pause);
    bounds([
        (Error, AtMost(0.3)),
        (WorstWindow, AtMost(5.0)),
        (Settle, AtMost(100.0)),
        (StallP999, AtMost(pause + 0.5)),
        (StallMax, AtMost(pause + 3.0)),
    ])
}

fn steady(limit: u64) -> Plan {
    let pass = if limit > 50 { ms(250) } else { ms(1000) };
    Plan { pass, ..writers(vec![limited(STEADY, limit)]) }
}

fn fast() -> Vec<Case> {
    let case = |ring| Case {
        name: format!("400 MiB/s, ring {ring}"),
        // Collected once a second, 224 MiB cannot be dirtied at more than 224 MiB/s net.
        trial: Trial::run_of(Plan { ring, pass: ms(250), ..writers(vec![limited(Workload::Write(SET), 400)]) }),
        bounds: exactly(10),
    };
    [256, 1024, 4096].map(case).into()
}

fn big_ring() -> Vec<Case> {
    [2, 5, 20, 100].map(|limit| held(limit, 65_536, 10)).into()
}

fn beside() -> Vec<Case> {
    let vcpus = || vec![reading(), limited(STEADY, 20), limited(STEADY, 20)];
    let (holds, long) = by_turns(2);
    vec![
        Case { name: "20 MiB/s each".into(), trial: Trial::run_of(writers(vcpus())), bounds: exactly(10) },
        Case {
            name: "writers held by turns".into(),
            trial: Trial::Run(Plan { limited: long, ..writers(vcpus()) }, Script { holds, ..Script::default() }),
            bounds: bounds([(ReaderKept, AtLeast(99.0))]),
        },
    ]
}

/// What a CPU that logs pages in lumps (Intel's PML) allows.
fn defaults() -> Vec<Case> {
    let cases = [5, 20, 100].into_iter().flat_map(|limit| [1024, 4096].map(|ring| (limit, ring)));
    let case = |(limit, ring)| Case {
        name: format!("{limit} MiB/s, ring {ring}"),
        trial: Trial::Run(Plan { ring, ..steady(limit) }, Script { as_embedded: true, ..Script::default() }),
        bounds: bounds([(Error, AtMost(1.0)), (WorstWindow, AtMost(10.0)), (StallMax, AtMost(13.0))]),
    };
    cases.map(case).collect()
}

fn steps() -> Vec<Case> {
    let plan = Plan {
        pass: ms(250),
        limited: ms(4000),
        steps: vec![Step { after: ms(2000), limit: Some(rate(300)) }],
        ..writers(vec![limited(Workload::Write(SET), 30)])
    };
    vec![Case {
        name: "none, 30, then 300 MiB/s".into(),
        trial: Trial::run_of(plan),
        bounds: bounds([(Settle, AtMost(150.0)), (Overshoot, AtMost(20.0))]),
    }]
}

/// Below its limit a writer may not be paused for more than a thousandth of the time: 2 ms in 2 s. A burst is below a
/// limit only if it is so while it lasts, hence the high ones.
fn bursty() -> Vec<Case> {
    let kinds = [
        ("burst", Workload::Burst(SET), 4096),
        ("random", Workload::Random(256 * MIB), 4096),
        ("slow", Workload::Slow(SET), 1024),
    ];
    let case = |name: String, workload, limit, seconds, bound| Case {
        name,
        trial: Trial::run_of(Plan { limited: ms(seconds), ..writers(vec![limited(workload, limit)]) }),
        bounds: bounds([bound]),
    };
    kinds
        .into_iter()
        .flat_map(|(kind, workload, far)| {
            [
                case(format!("{kind} at 50 MiB/s"), workload, 50, 4000, (OneSecond, AtMost(2.0))),
                case(format!("{kind} below {far} MiB/s"), workload, far, 2000, (Paused, AtMost(0.1))),
            ]
        })
        .collect()
}

fn budget() -> Vec<Case> {
    let four = |workloads: [Workload; 4]| Plan {
        vm_limit: Some(rate(100)),
        limited: ms(4000),
        ..writers(workloads.into_iter().map(|workload| VcpuPlan { workload, limit: None }).collect())
    };
    let idle = Workload::Idle;
    let hot = Workload::Write(128 * MIB);
    // From 100 ms to 100 ms another one runs, and the other three are held by hand.
    let moving = (0..40u32)
        .map(|turn| Hold { after: ms(100) * turn, held: (0..4).filter(|&vcpu| vcpu != turn as usize % 4).collect() });
    vec![
        Case {
            name: "one hot vCPU of four".into(),
            trial: Trial::run_of(four([Workload::Write(SET), idle, idle, idle])),
            bounds: bounds([(Share, AtLeast(95.0)), (VmError, AtMost(5.0))]),
        },
        Case {
            name: "four hot vCPUs".into(),
            trial: Trial::run_of(four([hot; 4])),
            bounds: bounds([(Jain, AtLeast(0.99)), (VmError, AtMost(5.0))]),
        },
        Case {
            name: "hot vCPU moves each 100 ms".into(),
            trial: Trial::Run(four([hot; 4]), Script { holds: moving.collect(), ..Script::default() }),
            bounds: bounds([(VmError, AtMost(5.0))]),
        },
    ]
}

/// The writers' memory is much more than they may dirty between two passes: a page that is dirty already can be written at full
/// speed.
fn reader() -> Vec<Case> {
    let case = |name: &str, writer_bytes, limit, count: usize| {
        let mut vcpus = vec![reading()];
        vcpus.extend(vec![limited(Workload::Write(writer_bytes), limit); count]);
        let (holds, long) = by_turns(count);
        Case {
            name: name.into(),
            trial: Trial::Run(Plan { limited: long, ..writers(vcpus) }, Script { holds, ..Script::default() }),
            bounds: bounds([(ReaderKept, AtLeast(99.0))]),
        }
    };
    vec![case("a writer at 50 MiB/s", SET, 50, 1), case("8 writers at 5 MiB/s each", 64 * MIB, 5, 8)]
}

/// Spans of 200 ms that follow each other, in which the vCPUs from 1 on are by turns held by hand and limited, and how long they
/// take.
fn by_turns(count: usize) -> (Vec<Hold>, Duration) {
    let held = |span: u32| if span % 2 == 0 { (1..=count).collect() } else { Vec::new() };
    ((0..50).map(|span| Hold { after: ms(200) * span, held: held(span) }).collect(), ms(10_000))
}

fn reading() -> VcpuPlan {
    VcpuPlan { workload: Workload::Read(32 * MIB), limit: None }
}

fn many() -> Vec<Case> {
    // Twice what a ring holds, so that rings do fill.
    let plan = Plan { ring: 1024, limited: ms(4000), ..writers(vec![limited(Workload::Write(8 * MIB), 1); 64]) };
    vec![Case {
        name: "64 vCPUs at 1 MiB/s each".into(),
        trial: Trial::Run(plan, Script { time_ticks: true, ..Script::default() }),
        bounds: bounds([(ResetCalls, AtMost(500.0)), (Tick, AtMost(100.0))]),
    }]
}

/// Two seconds are two passes of a second, wherever they begin. Whose full rings are reset by hand copies nothing, so the
/// limiter's guest makes no pass there either, and its full rings are reset as they come.
fn free_cost() -> Vec<Case> {
    let case = |name: &str, ring, every, pass, ratio| Case {
        name: name.into(),
        trial: Trial::Versus(Versus {
            plan: Plan {
                ring,
                pass,
                limited: ms(2000),
                ..writers(vec![VcpuPlan { workload: Workload::Write(SET), limit: None }])
            },
            by_hand: HandServed { ring, every },
        }),
        bounds: bounds([(Speed, AtLeast(ratio))]),
    };
    vec![
        case("65536, to resets each 10ms", 65_536, Some(ms(10)), ms(1000), 1.3),
        case("4096, to resets when full", 4096, None, ms(60_000), 1.0),
    ]
}

fn interrupt() -> Vec<Case> {
    vec![Case {
        name: "out of a long pause".into(),
        trial: Trial::Interrupt(200),
        bounds: bounds([(Interrupted, AtMost(1.0)), (InterruptedP99, AtMost(2.0))]),
    }]
}

/// What the cases have in common: 3 s limited, from 30 ms after a pass on. Before it all memory is dirty already, and a
/// page that is dirty cannot be dirtied: nothing would be there to limit until the next pass.
fn writers(vcpus: Vec<VcpuPlan>) -> Plan {
    Plan {
        vcpus,
        vm_limit: None,
        policy: PolicyKind::Paced,
        ring: 4096,
        max_pause: ms(10),
        pass: ms(1000),
        free: ms(1030),
        limited: ms(3000),
        steps: Vec::new(),
        payload: None,
        qmp: None,
        metrics: None,
        // As every Linux guest asks for it.
        steal_time: cfg!(target_arch = "x86_64"),
        kick: KickKind::Signal,
    }
}

fn limited(workload: Workload, mib_s: u64) -> VcpuPlan {
    VcpuPlan { workload, limit: Some(rate(mib_s)) }
}

fn rate(mib_s: u64) -> PageRate {
    PageRate::from_bytes_per_sec(mib_s * MIB, PAGE_SIZE)
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn bounds<const N: usize>(bounds: [(Measure, Must); N]) -> Vec<Bound> {
    bounds.map(|(measure, must)| Bound { measure, must }).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_words_and_cases_fit_the_table() {
        let all = all();
        let mut names: Vec<_> = all.iter().map(|scenario| scenario.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len());
        for scenario in &all {
            assert!(scenario.name.len() <= 12 && scenario.what.len() <= 66, "{}", scenario.name);
            for case in &scenario.cases {
                assert!(case.name.chars().count() <= 26, "{}", case.name);
                assert!(!case.bounds.is_empty(), "{} shows nothing", case.name);
            }
        }
        assert_eq!(all[0].cases.len(), 12);
    }

    #[test]
    fn the_hot_vcpu_is_never_held_and_the_others_always() {
        let Trial::Run(plan, script) = &budget()[2].trial else { panic!("a run") };
        for (turn, hold) in script.holds.iter().enumerate() {
            assert_eq!(hold.held.len(), 3);
            assert!(!hold.held.contains(&(turn % 4)));
            assert!(hold.after < plan.limited);
        }
    }
}
