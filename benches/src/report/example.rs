//! Recordings that no guest made, for the tests of the reports.

use std::time::Duration;

use dirtylimit_core::PageRate;

use crate::plan::PolicyKind;
use crate::record::{GuestKind, Host, Recording, Sample, Stalls, VcpuRecording};
use crate::workload::Workload;

fn rate(mib: u32) -> PageRate {
    PageRate::from_pages_per_sec(256 * mib)
}

fn vcpu(index: usize, workload: Workload, limits: &[(u64, u32)], mib_s: impl Fn(u64) -> u64) -> VcpuRecording {
    let mut sample = Sample::default();
    let mut samples = vec![sample];
    for ms in (10..=9000).step_by(10) {
        let pages = mib_s(ms - 10) * 256 / 100;
        sample.at = Duration::from_millis(ms);
        sample.net += pages;
        sample.gross += pages;
        if ms > 1000 && workload.writes() {
            sample.paused += Duration::from_micros(9_375);
        }
        samples.push(sample);
    }
    let mut stalls = Stalls { tsc_hz: 2_000_000_000, threshold_ticks: 200_000, ..Stalls::default() };
    (stalls.longest_ticks, stalls.histogram[24]) = (22_000_000, 800);
    VcpuRecording {
        index,
        workload,
        limits: limits.iter().map(|&(ms, mib)| (Duration::from_millis(ms), (mib > 0).then(|| rate(mib)))).collect(),
        free_accesses: 384_000,
        free_time: Duration::from_secs(1),
        limited_accesses: if workload.writes() { 204_800 } else { 3_072_000 },
        limited_time: Duration::from_secs(8),
        stalls,
        full_exits: 800,
        paused: sample.paused,
        net_pages: 204_800,
        gross_pages: 240_000,
        held_back_pages: 3_900,
        samples,
    }
}

/// A writer held to 100 MiB/s after 1 s of freedom, and a reader beside it.
pub(crate) fn recording() -> Recording {
    let writer = vcpu(0, Workload::Write(224 << 20), &[(1000, 100)], |ms| match ms {
        0..1000 => 1500,
        1000..1050 => 400,
        _ => 100,
    });
    let reader = vcpu(1, Workload::Read(32 << 20), &[(1000, 100)], |_| 0);
    Recording {
        guest: GuestKind::Kvm,
        policy: PolicyKind::Paced,
        ring: 4096,
        max_pause: Duration::from_millis(10),
        pass: Duration::from_millis(100),
        page_size: 4096,
        host: Host {
            kernel: "6.18.0".into(),
            cpu: "Example CPU".into(),
            cpus: 2,
            capabilities: [("KVM_CAP_DIRTY_LOG_RING_ACQ_REL".to_owned(), 1 << 20)].into(),
            soft_limit: Some(4032),
            sleep_late_p999_ms: Some(0.25),
        },
        vm_limit: None,
        limited_at: Duration::from_secs(1),
        end: Duration::from_secs(9),
        interrupted: false,
        lost_pages: Some(0),
        suspect_pages: 64,
        suspect_resets: 3,
        steal_time: true,
        reset_pages: 204_800,
        reset_calls: 812,
        vcpus: vec![writer, reader],
    }
}

/// A writer whose limit is raised from 100 to 300 MiB/s after 4 s, which takes it a while to use.
pub(crate) fn stepped() -> Recording {
    let writer = vcpu(0, Workload::Write(224 << 20), &[(1000, 100), (5000, 300)], |ms| match ms {
        0..1000 => 1500,
        1000..5000 => 98 + ms / 10 % 5,
        5000..6000 => 100 + (ms - 5000) / 5,
        _ => 300 + ms / 10 % 7 - 3,
    });
    Recording { vcpus: vec![writer], ..recording() }
}
