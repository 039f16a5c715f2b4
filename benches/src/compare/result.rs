//! What came of a comparison: plain values, for tables, pictures and scripts.

use serde::Serialize;

use super::cases::{self, Case};
use super::trial::Trial;
use crate::measure::Measures;
use crate::record::{Host, Recording, Stalls, VcpuRecording};
use crate::report::charts::{net_rate, survival};
use crate::report::json::round;
use crate::scenario::measure::median;
use crate::units::PAGE_SIZE;
use crate::workload::Workload;

/// The whole comparison; names and meanings are fixed, what is new comes after what was there.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Whom ours is compared with: a QEMU and its version, or another policy.
    pub peer: String,
    /// The machine.
    pub host: Host,
    /// How often each case was to be tried.
    pub rounds: u8,
    /// How long each guest ran free.
    pub free_seconds: f64,
    /// How long it was limited.
    pub seconds: f64,
    /// The longest single pause asked of ours.
    pub max_pause_ms: f64,
    /// The user ended it early: cases may have fewer rounds, or be missing.
    pub interrupted: bool,
    /// Pages that a copy made from our dirty log alone had wrong, in all tries; QEMU's is not checked.
    pub lost_pages: u64,
    /// In the order in which they were tried.
    pub cases: Vec<Compared>,
}

/// One case under both.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// Limit of each vCPU that writes.
    pub limit_mib_s: u32,
    /// Entries of each vCPU's ring.
    pub ring: u32,
    /// Under the peer.
    pub peer: Side,
    /// Under ours.
    pub ours: Side,
    /// How the peer is started, where it is a program; the ROM is what `--write-rom` writes.
    pub peer_command: Option<String>,
}

/// One case under one of them.
#[derive(Clone, Debug, Serialize)]
pub struct Side {
    /// CPU time of the hypervisor while it limited, guest included, in percent of one CPU: the median of the rounds.
    pub cpu_pct: Option<f64>,
    /// By index.
    pub vcpus: Vec<Vcpu>,
}

/// One vCPU of one side.
#[derive(Clone, Debug, Serialize)]
pub struct Vcpu {
    /// The vCPU's id.
    pub index: usize,
    /// What it ran.
    pub workload: Workload,
    /// Null where it does not write.
    pub limit_mib_s: Option<u32>,
    /// Of each measure the median of the rounds; null where half of them or more have none.
    #[serde(flatten)]
    pub median: Measured,
    /// By round.
    pub rounds: Vec<Measured>,
    /// Of the first round: `[t_ms, mib_s]`, t from the limit being set, means over the 100 ms before.
    pub samples: Vec<(f64, f64)>,
    /// Of all rounds: `[ms, per_s]`, so many stalls a second were at least so long.
    pub stalls: Vec<(f64, f64)>,
}

/// The measures of one vCPU in one round. One that does not exist (no limit, never settled) is null.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// Pages dirtied over the second half, by the guest's own count, but at most its memory once a second: a page that is
    /// dirty already cannot be dirtied until it is collected.
    pub settled_mib_s: Option<f64>,
    /// (settled − limit) ÷ limit.
    pub error_pct: Option<f64>,
    /// From the limit being set until every 100 ms window stays within ±10 %.
    pub settle_ms: Option<f64>,
    /// 99 % of the guest's stalls were no longer.
    pub stall_p99_ms: Option<f64>,
    /// The guest's longest stall.
    pub stall_max_ms: Option<f64>,
    /// The guest's own accesses per second, limited over free.
    pub work_kept_pct: Option<f64>,
    /// Pages touched over the second half, whether dirty already or not.
    pub touched_mib_s: Option<f64>,
    /// The rate by the limiter's own count.
    pub own_mib_s: Option<f64>,
    /// Pages touched while free, with dirty pages logged.
    pub free_mib_s: Option<f64>,
}

impl Measured {
    fn of(recording: &Recording, vcpu: &VcpuRecording, limit: Option<u32>, own_mib_s: Option<f64>) -> Self {
        let measures = Measures::of(recording, vcpu);
        let last = measures.last();
        let touched = last.settled_mib_s;
        let most = vcpu.workload.bytes() as f64 / f64::from(1 << 20);
        let settled = touched.filter(|_| vcpu.workload.writes()).map(|touched| touched.min(most));
        let error = |settled: f64, limit: u32| 100.0 * (settled / f64::from(limit) - 1.0);
        let free = vcpu.free_accesses as f64 / vcpu.free_time.as_secs_f64() * f64::from(PAGE_SIZE) / f64::from(1 << 20);
        Self {
            settled_mib_s: settled,
            error_pct: settled.zip(limit).map(|(settled, limit)| error(settled, limit)),
            settle_ms: last.settle_ms,
            stall_p99_ms: measures.stall_p99_ms,
            stall_max_ms: measures.stall_max_ms,
            work_kept_pct: measures.work_kept_pct,
            touched_mib_s: touched,
            own_mib_s,
            free_mib_s: Some(free).filter(|free| free.is_finite()),
        }
        .map(round)
    }

    fn map(self, of: impl Fn(f64) -> f64) -> Self {
        Self::combined(&[self], |values| values[0].map(&of))
    }

    /// Field by field, the median of several.
    fn median(rounds: &[Self]) -> Self {
        // A value that is missing is worse than any.
        Self::combined(rounds, |values| median(values.iter().map(|value| value.unwrap_or(f64::INFINITY)).collect()))
    }

    fn combined(rounds: &[Self], of: impl Fn(&[Option<f64>]) -> Option<f64>) -> Self {
        let field = |field: fn(&Self) -> Option<f64>| of(&rounds.iter().map(field).collect::<Vec<_>>());
        Self {
            settled_mib_s: field(|of| of.settled_mib_s),
            error_pct: field(|of| of.error_pct),
            settle_ms: field(|of| of.settle_ms),
            stall_p99_ms: field(|of| of.stall_p99_ms),
            stall_max_ms: field(|of| of.stall_max_ms),
            work_kept_pct: field(|of| of.work_kept_pct),
            touched_mib_s: field(|of| of.touched_mib_s),
            own_mib_s: field(|of| of.own_mib_s),
            free_mib_s: field(|of| of.free_mib_s),
        }
    }
}

impl Compared {
    /// A case from its tries, as many of the peer as of ours, at least one.
    pub(super) fn of(case: &Case, peer_command: Option<String>, peer: &[Trial], ours: &[Trial]) -> Self {
        Self {
            limit_mib_s: case.limit_mib_s,
            ring: case.ring,
            peer: Side::of(case, peer),
            ours: Side::of(case, ours),
            peer_command,
        }
    }

    /// What it is called.
    pub fn name(&self) -> String {
        cases::name(self.limit_mib_s, self.ring)
    }
}

impl Side {
    fn of(case: &Case, tries: &[Trial]) -> Self {
        let cpu = tries.iter().map(|trial| 100.0 * trial.cpu_share).collect();
        let vcpus = case.workloads.iter().enumerate().map(|(index, workload)| {
            let limit = workload.writes().then_some(case.limit_mib_s);
            Vcpu::of(index, *workload, limit, tries)
        });
        Self { cpu_pct: median(cpu).map(round), vcpus: vcpus.collect() }
    }
}

impl Vcpu {
    fn of(index: usize, workload: Workload, limit_mib_s: Option<u32>, tries: &[Trial]) -> Self {
        let measured = |trial: &Trial| {
            let own = trial.own_mib_s.get(index).copied().flatten();
            Measured::of(&trial.recording, &trial.recording.vcpus[index], limit_mib_s, own)
        };
        let rounds: Vec<_> = tries.iter().map(measured).collect();
        let seconds = tries.iter().map(|trial| trial.recording.vcpus[index].limited_time.as_secs_f64()).sum();
        let stalls = tries.iter().map(|trial| trial.recording.vcpus[index].stalls.clone());
        let stalls = stalls.reduce(|mut sum: Stalls, stalls| {
            sum.add(&stalls);
            sum
        });
        let rounded = |points: Vec<(f64, f64)>, x: f64| points.iter().map(|p| (round(x * p.0), round(p.1))).collect();
        Self {
            index,
            workload,
            limit_mib_s,
            median: Measured::median(&rounds),
            rounds,
            samples: tries
                .first()
                .map_or(Vec::new(), |trial| rounded(net_rate(&trial.recording, &trial.recording.vcpus[index]), 1e3)),
            stalls: stalls.map_or(Vec::new(), |stalls| rounded(survival(&stalls, seconds), 1.0)),
        }
    }
}
