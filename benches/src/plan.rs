//! What one run shall do: the command line, checked, in the units that a guest works with.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use dirtylimit_core::{Paced, PageRate, Shipped, Stepped};
use serde::Serialize;

use crate::workload::Workload;

/// The policy that turns a rate and a limit into a penalty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyKind {
    /// An interval per page.
    Paced,
    /// The published two-strategy algorithm: a sleep that grows and shrinks.
    Stepped,
}

impl From<PolicyKind> for Shipped {
    fn from(kind: PolicyKind) -> Self {
        match kind {
            PolicyKind::Paced => Self::Paced(Paced),
            PolicyKind::Stepped => Self::Stepped(Stepped::default()),
        }
    }
}

/// Who ends the slices that the ring does not, as the library's `Kick` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KickKind {
    /// The library's default: timers, where pages come in lumps.
    Auto,
    /// Nobody.
    Off,
    /// A signal of the library's.
    Signal,
}

/// One run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// One entry per vCPU, by index; never empty.
    pub vcpus: Vec<VcpuPlan>,
    /// Budget of the whole VM.
    pub vm_limit: Option<PageRate>,
    /// The policy that limits.
    pub policy: PolicyKind,
    /// Entries of each vCPU's dirty ring.
    pub ring: u32,
    /// The longest single pause.
    pub max_pause: Duration,
    /// Interval between two collections of the dirty log, as a migration's passes would.
    pub pass: Duration,
    /// How long the guest runs free first.
    pub free: Duration,
    /// How long it runs limited.
    pub limited: Duration,
    /// Changes of every vCPU's limit, in order of time.
    pub steps: Vec<Step>,
    /// A guest image in place of the built-in one.
    pub payload: Option<PathBuf>,
    /// A control socket to serve; a limit that it sets stays, whatever the plan says.
    pub qmp: Option<PathBuf>,
    /// Where the counters go, for Prometheus.
    pub metrics: Option<MetricsTo>,
    /// Who ends the slices that the ring does not.
    pub kick: KickKind,
    /// Whether each vCPU has a steal-time page, which KVM writes and logs at nearly every entry.
    pub steal_time: bool,
}

impl Plan {
    /// How long it runs.
    pub fn time(&self) -> Duration {
        self.free + self.limited
    }
}

/// Where counters go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsTo {
    /// Served over HTTP.
    Address(SocketAddr),
    /// Written once a second.
    File(PathBuf),
}

/// What one vCPU runs, and its limit.
#[derive(Clone, Debug)]
pub struct VcpuPlan {
    /// What it runs; a random writer's size is a power of two.
    pub workload: Workload,
    /// Its limit from the start of the limited phase; `None` is no limit.
    pub limit: Option<PageRate>,
}

/// One change of the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// When, counted from the start of the limited phase.
    pub after: Duration,
    /// The new limit of every vCPU; `None` lifts it.
    pub limit: Option<PageRate>,
}
