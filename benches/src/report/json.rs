//! The report for scripts. Names and meanings are fixed; what is new comes after what was there.
//!
//! Times in `samples` and `steps` count from the start of the recording, whose free phase comes first.

use std::time::Duration;

use serde::Serialize;

use crate::measure::{Measures, Series, StepMeasures, VmMeasures};
use crate::plan::PolicyKind;
use crate::record::{GuestKind, Host, Recording, VcpuRecording};
use crate::workload::Workload;

/// The document.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where the workload ran.
    pub guest: GuestKind,
    /// The policy that limited it.
    pub policy: PolicyKind,
    /// Entries of each vCPU's dirty ring.
    pub ring: u32,
    /// The longest single pause asked for.
    pub max_pause_ms: f64,
    /// The machine.
    pub host: Host,
    /// Pages that a copy made from the dirty log alone had wrong; null where that was not checked.
    pub lost_pages: Option<u64>,
    /// Calls of the reset ioctl in the limited phase.
    pub resets: u64,
    /// The same per second.
    pub reset_calls_per_s: Option<f64>,
    /// By index.
    pub vcpus: Vec<Vcpu>,
    /// Pages that those resets gave back.
    pub reset_pages: u64,
    /// The user ended the run early.
    pub interrupted: bool,
    /// Bytes of a page.
    pub page_size: u32,
    /// When the limit was set.
    pub limited_at_ms: f64,
    /// When the limited phase ended.
    pub end_ms: f64,
    /// The VM's own budget, where it had one.
    pub vm: Option<Vm>,
    /// Whether each vCPU had a steal-time page.
    pub steal_time: bool,
    /// Pages that disturbed resets may have left writable, and that every take of the log still has, at the end.
    pub suspect_pages: u64,
    /// Resets that were disturbed, in the whole run.
    pub suspect_resets: u64,
}

/// One vCPU. A measure that does not exist (no limit, never settled, a reader) is null.
#[derive(Clone, Debug, Serialize)]
pub struct Vcpu {
    /// The vCPU's id.
    pub index: usize,
    /// What it ran.
    pub workload: Workload,
    /// Its limit; with steps the last one.
    pub limit_mib_s: Option<f64>,
    /// Net dirty rate of the free phase.
    pub free_mib_s: Option<f64>,
    /// Mean net dirty rate over the second half of the limited phase; with steps, of the last one.
    pub settled_mib_s: Option<f64>,
    /// (settled − limit) ÷ limit.
    pub error_pct: Option<f64>,
    /// From the limit being set until every 100 ms window stays within ±10 %.
    pub settle_ms: Option<f64>,
    /// How far the worst of those windows is off, without its sign.
    pub worst_window_error_pct: Option<f64>,
    /// 99 % of the guest's stalls were no longer; interpolated.
    pub stall_p99_ms: Option<f64>,
    /// The guest's longest stall, exact.
    pub stall_max_ms: Option<f64>,
    /// The guest's own accesses per second, limited over free.
    pub work_kept_pct: Option<f64>,
    /// Pages newly dirtied in the limited phase.
    pub net_pages: u64,
    /// Ring entries of the limited phase.
    pub gross_pages: u64,
    /// Ring-full exits of the limited phase.
    pub full_exits: u64,
    /// Time in penalty pauses in the limited phase.
    pub paused_ms: f64,
    /// `[t_ms, net_mib_s]` for each interval of about 10 ms that ends at t.
    pub samples: Vec<(f64, f64)>,
    /// 99.9 % of the guest's stalls were no longer; interpolated.
    pub stall_p999_ms: Option<f64>,
    /// Share of the limited phase spent in penalty pauses.
    pub paused_pct: Option<f64>,
    /// The guest's own accesses per second in the free phase.
    pub free_accesses_per_s: Option<f64>,
    /// The same in the limited phase.
    pub limited_accesses_per_s: Option<f64>,
    /// Ring entries of the free phase, as a rate: a page counts again whenever a reset armed it anew.
    pub free_gross_mib_s: Option<f64>,
    /// Pages that were dirty and in no log yet when the limited phase ended, because their entries were held back in the ring.
    pub held_back_pages: u32,
    /// Each limit in turn, where it changed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
}

/// One limit of several, measured like the whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// When it was set.
    pub from_ms: f64,
    /// When it ended.
    pub to_ms: f64,
    /// The limit; null is none.
    pub limit_mib_s: Option<f64>,
    /// Over its second half.
    pub settled_mib_s: Option<f64>,
    /// (settled − limit) ÷ limit.
    pub error_pct: Option<f64>,
    /// From its start.
    pub settle_ms: Option<f64>,
    /// Of the windows after settling.
    pub worst_window_error_pct: Option<f64>,
}

/// The VM against its own budget.
#[derive(Clone, Debug, Serialize)]
pub struct Vm {
    /// The budget.
    pub limit_mib_s: f64,
    /// All vCPUs together over the second half of the limited phase.
    pub settled_mib_s: Option<f64>,
    /// (settled − limit) ÷ limit.
    pub error_pct: Option<f64>,
}

impl Report {
    /// The report of a recording.
    pub fn of(recording: &Recording) -> Self {
        let limited = recording.end.saturating_sub(recording.limited_at);
        Self {
            guest: recording.guest,
            policy: recording.policy,
            ring: recording.ring,
            max_pause_ms: ms(recording.max_pause),
            host: Host { sleep_late_p999_ms: recording.host.sleep_late_p999_ms.map(round), ..recording.host.clone() },
            lost_pages: recording.lost_pages,
            resets: recording.reset_calls,
            reset_calls_per_s: per_second(recording.reset_calls, limited),
            vcpus: recording.vcpus.iter().map(|vcpu| Vcpu::of(recording, vcpu)).collect(),
            reset_pages: recording.reset_pages,
            interrupted: recording.interrupted,
            page_size: recording.page_size,
            limited_at_ms: ms(recording.limited_at),
            end_ms: ms(recording.end),
            vm: VmMeasures::of(recording).map(|vm| Vm {
                limit_mib_s: round(vm.limit_mib_s),
                settled_mib_s: vm.settled_mib_s.map(round),
                error_pct: vm.error_pct.map(round),
            }),
            steal_time: recording.steal_time,
            suspect_pages: recording.suspect_pages,
            suspect_resets: recording.suspect_resets,
        }
    }
}

impl Vcpu {
    fn of(recording: &Recording, vcpu: &VcpuRecording) -> Self {
        let measures = Measures::of(recording, vcpu);
        let last = measures.last();
        let series = Series::of(recording, vcpu);
        let samples = vcpu
            .samples
            .windows(2)
            .filter_map(|pair| series.mean_mib_s(pair[0].at, pair[1].at).map(|rate| (ms(pair[1].at), round(rate))));
        Self {
            index: vcpu.index,
            workload: vcpu.workload,
            limit_mib_s: last.limit_mib_s.map(round),
            free_mib_s: measures.free_mib_s.map(round),
            settled_mib_s: last.settled_mib_s.map(round),
            error_pct: last.error_pct.map(round),
            settle_ms: last.settle_ms.map(round),
            worst_window_error_pct: last.worst_window_error_pct.map(round),
            stall_p99_ms: measures.stall_p99_ms.map(round),
            stall_max_ms: measures.stall_max_ms.map(round),
            work_kept_pct: measures.work_kept_pct.map(round),
            net_pages: vcpu.net_pages,
            gross_pages: vcpu.gross_pages,
            full_exits: vcpu.full_exits,
            paused_ms: ms(vcpu.paused),
            samples: samples.collect(),
            stall_p999_ms: measures.stall_p999_ms.map(round),
            paused_pct: measures.paused_pct.map(round),
            free_accesses_per_s: per_second(vcpu.free_accesses, vcpu.free_time),
            limited_accesses_per_s: per_second(vcpu.limited_accesses, vcpu.limited_time),
            free_gross_mib_s: measures.free_gross_mib_s.map(round),
            held_back_pages: vcpu.held_back_pages,
            steps: if measures.steps.len() > 1 { measures.steps.iter().map(Step::of).collect() } else { Vec::new() },
        }
    }
}

impl Step {
    fn of(step: &StepMeasures) -> Self {
        Self {
            from_ms: ms(step.from),
            to_ms: ms(step.to),
            limit_mib_s: step.limit_mib_s.map(round),
            settled_mib_s: step.settled_mib_s.map(round),
            error_pct: step.error_pct.map(round),
            settle_ms: step.settle_ms.map(round),
            worst_window_error_pct: step.worst_window_error_pct.map(round),
        }
    }
}

/// To a thousandth: more digits would be noise, and a long document.
pub(crate) fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

pub(crate) fn ms(time: Duration) -> f64 {
    round(time.as_secs_f64() * 1e3)
}

fn per_second(count: u64, time: Duration) -> Option<f64> {
    (!time.is_zero()).then(|| round(count as f64 / time.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;
    use serde_json::{Value, json};

    /// The manual's document: every name in it, at its place.
    const TOP: [&str; 9] =
        ["guest", "policy", "ring", "max_pause_ms", "host", "lost_pages", "resets", "reset_calls_per_s", "vcpus"];
    const VCPU: [&str; 16] = [
        "index",
        "workload",
        "limit_mib_s",
        "free_mib_s",
        "settled_mib_s",
        "error_pct",
        "settle_ms",
        "worst_window_error_pct",
        "stall_p99_ms",
        "stall_max_ms",
        "work_kept_pct",
        "net_pages",
        "gross_pages",
        "full_exits",
        "paused_ms",
        "samples",
    ];

    #[test]
    fn every_name_of_the_manual_is_there_in_its_order() {
        let text = serde_json::to_string(&Report::of(&example::recording())).unwrap();
        let in_order = |text: &str, names: &[&str]| {
            let mut rest = text;
            for name in names {
                let at = rest.find(&format!("\"{name}\":"));
                rest = &rest[at.unwrap_or_else(|| panic!("{name} is missing or out of order"))..];
            }
        };
        in_order(&text, &TOP);
        in_order(&text, &["vm", "steal_time", "suspect_pages", "suspect_resets"]);
        in_order(&text[text.find("\"vcpus\"").unwrap()..], &VCPU);
    }

    #[test]
    fn the_values_are_the_measures() {
        let value: Value = serde_json::to_value(Report::of(&example::recording())).unwrap();
        assert_eq!(value["guest"], "kvm");
        assert_eq!(value["policy"], "paced");
        assert_eq!(value["max_pause_ms"], 10.0);
        assert_eq!(value["lost_pages"], 0);
        assert_eq!(value["resets"], 812);
        assert_eq!(value["reset_calls_per_s"], 101.5);
        assert_eq!(value["limited_at_ms"], 1000.0);
        assert_eq!(value["steal_time"], true);
        assert_eq!((&value["suspect_pages"], &value["suspect_resets"]), (&json!(64), &json!(3)));
        assert_eq!(value["host"]["sleep_late_p999_ms"], 0.25);
        let vcpu = &value["vcpus"][0];
        assert_eq!(vcpu["held_back_pages"], 3900);
        assert_eq!(vcpu["free_gross_mib_s"], 1500.0);
        assert_eq!(vcpu["workload"], "write:224MiB");
        assert_eq!(vcpu["limit_mib_s"], 100.0);
        assert_eq!(vcpu["free_mib_s"], 1500.0);
        assert_eq!(vcpu["error_pct"], 0.0);
        assert_eq!(vcpu["paused_ms"], 7500.0);
        assert_eq!(vcpu["samples"][0], json!([10.0, 1500.0]));
        assert_eq!(vcpu["samples"].as_array().unwrap().len(), 900);
        assert_eq!(vcpu.get("steps"), None);
        let reader = &value["vcpus"][1];
        assert_eq!(reader["error_pct"], Value::Null);
        assert_eq!(reader["settle_ms"], Value::Null);
    }

    #[test]
    fn an_unchecked_run_does_not_claim_that_no_page_was_lost() {
        let mut recording = example::recording();
        recording.lost_pages = None;
        assert_eq!(serde_json::to_value(Report::of(&recording)).unwrap()["lost_pages"], Value::Null);
    }

    #[test]
    fn steps_are_listed_and_the_last_one_is_the_limit() {
        let value = serde_json::to_value(Report::of(&example::stepped())).unwrap();
        let vcpu = &value["vcpus"][0];
        assert_eq!(vcpu["steps"].as_array().unwrap().len(), 2);
        assert_eq!(vcpu["steps"][0]["limit_mib_s"], 100.0);
        assert_eq!(vcpu["steps"][1]["from_ms"], 5000.0);
        assert_eq!(vcpu["limit_mib_s"], 300.0);
    }
}
