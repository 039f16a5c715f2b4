//! What is compared: limit × ring × workload.

use std::time::Duration;

use dirtylimit_core::PageRate;

use crate::plan::{KickKind, Plan, PolicyKind, VcpuPlan};
use crate::units::{PAGE_SIZE, mib_per_sec, significant};
use crate::workload::Workload;

const MIB: u64 = 1 << 20;
/// The working set of a writer that is alone.
pub(super) const SET: Workload = Workload::Write(224 * MIB);

/// One case: the same guest, limit and ring for both.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Limit of each vCPU that writes, in whole MiB/s, as QEMU counts them.
    pub limit_mib_s: u32,
    /// Entries of each vCPU's ring.
    pub ring: u32,
    /// One per vCPU.
    pub workloads: Vec<Workload>,
}

impl Case {
    /// What it is called: limit and ring.
    pub fn name(&self) -> String {
        name(self.limit_mib_s, self.ring)
    }

    /// As ours runs it.
    pub(super) fn plan(&self, policy: PolicyKind, max_pause: Duration, free: Duration, limited: Duration) -> Plan {
        let limit = PageRate::from_bytes_per_sec(u64::from(self.limit_mib_s) * MIB, PAGE_SIZE);
        let vcpu = |&workload: &Workload| VcpuPlan { workload, limit: workload.writes().then_some(limit) };
        Plan {
            vcpus: self.workloads.iter().map(vcpu).collect(),
            vm_limit: None,
            policy,
            ring: self.ring,
            max_pause,
            // QEMU collects once a second, too.
            pass: Duration::from_secs(1),
            free,
            limited,
            steps: Vec::new(),
            payload: None,
            qmp: None,
            metrics: None,
            steal_time: false,
            kick: KickKind::Signal,
        }
    }
}

pub(super) fn name(limit_mib_s: u32, ring: u32) -> String {
    format!("{limit_mib_s} MiB/s, ring {ring}")
}

/// The cases that are compared when none is asked for.
pub(crate) fn usual() -> Vec<Case> {
    let case = |limit_mib_s, ring, workloads: &[Workload]| Case { limit_mib_s, ring, workloads: workloads.to_vec() };
    vec![
        case(100, 4096, &[SET]),
        case(20, 4096, &[SET]),
        case(5, 4096, &[SET]),
        case(20, 65_536, &[SET]),
        case(100, 65_536, &[SET]),
        case(100, 4096, &[SET, Workload::Slow(224 * MIB)]),
        case(50, 4096, &[SET, Workload::Read(32 * MIB)]),
    ]
}

/// Every limit by every ring, for one guest; what is left out is as usual.
///
/// # Errors
/// A limit that QEMU cannot be given, or a workload whose accesses do not tell what it dirtied.
pub(crate) fn asked(limits: &[PageRate], rings: &[u32], workloads: &[Workload]) -> Result<Vec<Case>, String> {
    let limits = limits.iter().map(|&limit| whole(limit)).collect::<Result<Vec<_>, _>>()?;
    if let Some(random) = workloads.iter().find(|workload| matches!(workload, Workload::Random(_))) {
        return Err(format!(
            "--workload {random}: what is compared is the guest's own count of accesses, and here some would go to pages \
             that are dirty already; write, slow, burst, read and idle are possible"
        ));
    }
    let (limits, rings) = (or(limits, 100), or(rings.to_vec(), 4096));
    let workloads = or(workloads.to_vec(), SET);
    let case = |limit_mib_s, ring| Case { limit_mib_s, ring, workloads: workloads.clone() };
    Ok(limits.iter().flat_map(|&limit| rings.iter().map(move |&ring| case(limit, ring))).collect())
}

fn or<T>(values: Vec<T>, usual: T) -> Vec<T> {
    if values.is_empty() { vec![usual] } else { values }
}

pub(super) fn whole(limit: PageRate) -> Result<u32, String> {
    let mib_s = mib_per_sec(limit, PAGE_SIZE);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole and in range, checked first")]
    match mib_s {
        1.0..=1e6 if mib_s.fract() == 0.0 => Ok(mib_s as u32),
        _ => Err(format!(
            "--limit {} MiB/s: QEMU takes whole MiB/s, from 1 on; pages per second are multiples of 256 then",
            significant(mib_s, 6)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_multiplied_out_and_the_rest_is_as_usual() {
        let rate = PageRate::from_pages_per_sec;
        let cases = asked(&[rate(256), rate(512)], &[1024, 4096], &[]).unwrap();
        let seen: Vec<_> = cases.iter().map(|case| (case.limit_mib_s, case.ring)).collect();
        assert_eq!(seen, [(1, 1024), (1, 4096), (2, 1024), (2, 4096)]);
        assert!(cases.iter().all(|case| case.workloads == [SET]));
        assert_eq!(asked(&[], &[], &[]).unwrap(), usual()[..1]);
    }

    #[test]
    fn what_qemu_cannot_be_given_is_refused() {
        let refused = |pages| asked(&[PageRate::from_pages_per_sec(pages)], &[], &[]).unwrap_err();
        assert!(refused(100).contains("whole MiB/s") && refused(257).contains("1.00391 MiB/s"), "{}", refused(257));
        assert!(asked(&[], &[], &[Workload::Random(4096)]).unwrap_err().contains("--workload random:4KiB"));
    }

    #[test]
    fn who_does_not_write_is_not_limited() {
        let second = Duration::from_secs(1);
        let plan = usual()[6].plan(PolicyKind::Paced, second, second, second);
        assert!(plan.vcpus[0].limit.is_some() && plan.vcpus[1].limit.is_none());
    }
}
