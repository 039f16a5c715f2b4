//! What one run recorded. A guest writes it; the measures and reports are derived from it alone.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::ValueEnum;
use dirtylimit_core::PageRate;
use serde::Serialize;

use crate::plan::{Plan, PolicyKind};
use crate::units::PAGE_SIZE;
use crate::workload::Workload;

/// Where the workload runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestKind {
    /// A real guest under KVM.
    Kvm,
    /// The simulated guest, in virtual time.
    Sim,
}

/// The machine that a run was made on.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Host {
    /// Release of the running kernel.
    pub kernel: String,
    /// CPU model, as the kernel names it.
    pub cpu: String,
    /// Logical CPUs that this process may use.
    pub cpus: usize,
    /// KVM capabilities that matter here, with what `KVM_CHECK_EXTENSION` answered; empty for the simulated guest.
    pub capabilities: BTreeMap<String, i64>,
    /// Entries at which the kernel reports a full ring, once a full exit has shown it.
    pub soft_limit: Option<u32>,
    /// All but a thousandth of the sleeps of 1 ms of a thread that did nothing else ended at most so late, in ms; `None` where
    /// nobody looked, as in virtual time.
    pub sleep_late_p999_ms: Option<f64>,
}

/// One run: a free phase from 0 to [`limited_at`](Self::limited_at), then a limited one until [`end`](Self::end).
///
/// All times count from the start of the recording. A run interrupted before it was limited has both at its end.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Where the workload ran.
    pub guest: GuestKind,
    /// The policy that limited it.
    pub policy: PolicyKind,
    /// Entries of each vCPU's dirty ring.
    pub ring: u32,
    /// The longest single pause asked for.
    pub max_pause: Duration,
    /// From one pass over the dirty log to the next.
    pub pass: Duration,
    /// Bytes of a page, as the ring counts them.
    pub page_size: u32,
    /// The machine.
    pub host: Host,
    /// Budget of the whole VM, beside the vCPUs' own limits.
    pub vm_limit: Option<PageRate>,
    /// When the limit was set.
    pub limited_at: Duration,
    /// When the limited phase ended.
    pub end: Duration,
    /// The user ended it early.
    pub interrupted: bool,
    /// Pages that a copy made from the dirty log alone would have wrong; `None` where that was not checked.
    pub lost_pages: Option<u64>,
    /// Pages that disturbed resets may have left writable, and that every take of the log still has, at the end.
    pub suspect_pages: u64,
    /// Resets that were disturbed, in the whole run.
    pub suspect_resets: u64,
    /// Whether each vCPU had a steal-time page.
    pub steal_time: bool,
    /// Pages that resets gave back, in the limited phase.
    pub reset_pages: u64,
    /// Calls of the reset ioctl, in the limited phase.
    pub reset_calls: u64,
    /// One entry per vCPU, by index.
    pub vcpus: Vec<VcpuRecording>,
}

impl Recording {
    /// A recording that begins: nothing has happened yet.
    pub(crate) fn begun(guest: GuestKind, plan: &Plan, host: Host, vcpus: Vec<VcpuRecording>) -> Self {
        Self {
            guest,
            policy: plan.policy,
            ring: plan.ring,
            max_pause: plan.max_pause,
            pass: plan.pass,
            page_size: PAGE_SIZE,
            host,
            vm_limit: plan.vm_limit,
            limited_at: Duration::ZERO,
            end: Duration::ZERO,
            interrupted: false,
            lost_pages: None,
            suspect_pages: 0,
            suspect_resets: 0,
            steal_time: plan.steal_time,
            reset_pages: 0,
            reset_calls: 0,
            vcpus,
        }
    }
}

/// What one vCPU did in a run.
#[derive(Clone, Debug)]
pub struct VcpuRecording {
    /// The vCPU's id.
    pub index: usize,
    /// What it ran.
    pub workload: Workload,
    /// Its limits and since when; the first one starts at [`Recording::limited_at`], `None` is no limit.
    pub limits: Vec<(Duration, Option<PageRate>)>,
    /// Every 10 ms of the whole recording, in order.
    pub samples: Vec<Sample>,
    /// Accesses that the guest itself counted in the free phase.
    pub free_accesses: u64,
    /// How long it counted those.
    pub free_time: Duration,
    /// Accesses that the guest itself counted in the limited phase.
    pub limited_accesses: u64,
    /// How long it counted those.
    pub limited_time: Duration,
    /// Gaps that the guest saw in the limited phase.
    pub stalls: Stalls,
    /// Ring-full exits, in the limited phase.
    pub full_exits: u64,
    /// Time in penalty pauses, in the limited phase.
    pub paused: Duration,
    /// Pages newly dirtied since each page's last publish, in the limited phase.
    pub net_pages: u64,
    /// Ring entries, in the limited phase.
    pub gross_pages: u64,
    /// Entries that were metered and held back in its ring when the limited phase ended: pages that are dirty, and in no
    /// log yet.
    pub held_back_pages: u32,
}

/// One reading of a vCPU's counters; each counts from the start of the recording.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// When the counters were read.
    pub at: Duration,
    /// Pages newly dirtied since each page's last publish.
    pub net: u64,
    /// Ring entries.
    pub gross: u64,
    /// Time in penalty pauses.
    pub paused: Duration,
}

/// Gaps between two TSC reads in the guest's loop, from its stats page.
#[derive(Clone, Debug)]
pub struct Stalls {
    /// TSC ticks in a second.
    pub tsc_hz: u64,
    /// Gaps below this many ticks are not in the histogram.
    pub threshold_ticks: u64,
    /// The longest gap, exact, in ticks.
    pub longest_ticks: u64,
    /// `histogram[b]` counts the gaps whose highest set bit is `b`.
    pub histogram: [u64; 64],
    /// The same gaps in steps of `fine_ticks`, the last one for all beyond; empty or all 0 where the guest keeps none.
    pub fine: Vec<u64>,
    /// Ticks of a step of `fine`.
    pub fine_ticks: u64,
}

impl Default for Stalls {
    /// No gap seen, in ticks of a nanosecond.
    fn default() -> Self {
        Self {
            tsc_hz: 1_000_000_000,
            threshold_ticks: 0,
            longest_ticks: 0,
            histogram: [0; 64],
            fine: Vec::new(),
            fine_ticks: 1,
        }
    }
}
