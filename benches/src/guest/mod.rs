//! Guests: what runs a [`Plan`](crate::plan::Plan) and records it.

pub mod kvm;
pub mod sim;

use std::time::Duration;

use dirtylimit_core::PageRate;

use crate::record::VcpuRecording;

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

impl VcpuNow {
    /// How a vCPU did over its last samples, which are 10 ms apart.
    pub(crate) fn of(vcpu: &VcpuRecording) -> Self {
        let limit = vcpu.limits.last().and_then(|&(_, limit)| limit);
        let recent = &vcpu.samples[vcpu.samples.len().saturating_sub(SHOWN + 1)..];
        let (Some(first), Some(last)) = (recent.first(), recent.last()) else {
            return Self { rate: PageRate::ZERO, limit, paused_share: 0.0 };
        };
        let time = last.at - first.at;
        let rate = PageRate::measured(
            u32::try_from(last.net - first.net).unwrap_or(u32::MAX),
            u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
        );
        let paused = last.paused.saturating_sub(first.paused);
        let paused_share = if time.is_zero() { 0.0 } else { (paused.as_secs_f64() / time.as_secs_f64()).min(1.0) };
        Self { rate, limit, paused_share }
    }
}

/// Samples over which the rate shown to the user is taken: 250 ms.
const SHOWN: usize = 25;

/// Follows a run while it goes on. A guest calls it from the thread that was told to run.
pub trait Progress {
    /// How the vCPUs do, by index, `at` after the recording's start; often, but at no fixed interval.
    fn sample(&mut self, at: Duration, phase: Phase, vcpus: &[VcpuNow]);

    /// Whether the user wants the run to end now; asked at least every 100 ms.
    fn interrupted(&self) -> bool;
}
