//! Guests: what runs a [`Plan`](crate::plan::Plan) and records it.

pub mod kvm;
pub mod sim;

use std::time::Duration;

use dirtylimit_core::PageRate;

/// Where a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before the limit is set.
    Free,
    /// From the limit on.
    Limited,
    /// The vCPUs are stopped; what is left is to compare the copy with the guest.
    Checking,
}

/// How one vCPU does right now.
#[derive(Clone, Copy, Debug)]
pub struct VcpuNow {
    /// Pages newly dirtied per second, over the last 250 ms or so.
    pub rate: PageRate,
    /// Its limit, if any.
    pub limit: Option<PageRate>,
    /// Share of that time that it was paused, 0 to 1.
    pub paused_share: f64,
}

/// Follows a run while it goes on. A guest calls it from the thread that was told to run.
pub trait Progress {
    /// How the vCPUs do, by index, `at` after the recording's start; often, but at no fixed interval.
    fn sample(&mut self, at: Duration, phase: Phase, vcpus: &[VcpuNow]);

    /// Whether the user wants the run to end now; asked at least every 100 ms.
    fn interrupted(&self) -> bool;
}
