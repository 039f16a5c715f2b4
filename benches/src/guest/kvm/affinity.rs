//! Which CPU a thread runs on.

use std::io;
use std::mem;

use crate::plan::Plan;

/// The CPUs that this process may use, in order; at least one.
///
/// # Errors
/// What `sched_getaffinity` says.
pub fn allowed_cpus() -> io::Result<Vec<usize>> {
    // SAFETY: a CPU set is plain bits, all of which may be 0.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the kernel fills at most the size given, which is the set's.
    if unsafe { libc::sched_getaffinity(0, mem::size_of_val(&set), &raw mut set) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: every index is below the set's size.
    Ok((0..libc::CPU_SETSIZE.unsigned_abs() as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect())
}

/// Keeps the calling thread, and threads that it starts later, on these CPUs.
///
/// # Errors
/// What `sched_setaffinity` says; no CPU at all is an invalid argument.
pub fn pin(cpus: &[usize]) -> io::Result<()> {
    pin_thread(0, cpus)
}

/// Keeps a thread, of whatever process, on these CPUs; 0 is the calling one.
pub(crate) fn pin_thread(thread: libc::pid_t, cpus: &[usize]) -> io::Result<()> {
    // SAFETY: as above.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    for &cpu in cpus {
        if cpu >= libc::CPU_SETSIZE.unsigned_abs() as usize {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the index is below the set's size.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the kernel reads the set and keeps nothing of it.
    if unsafe { libc::sched_setaffinity(thread, mem::size_of_val(&set), &raw const set) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Who runs where. Only where there are as many vCPUs as CPUs is the scheduler helped: each vCPU gets a CPU of its own,
/// and sampling and copying share those of limited writers, so that they do not slow down the vCPUs that nothing limits.
#[derive(Debug)]
pub(super) struct Placement {
    /// By index.
    pub(super) vcpus: Option<Vec<usize>>,
    before: Option<Vec<usize>>,
}

impl Placement {
    /// Keeps the calling thread, and threads started from now on, off the CPUs of unlimited vCPUs.
    pub(super) fn new(plan: &Plan) -> Self {
        let cpus = allowed_cpus().unwrap_or_default();
        if cpus.len() != plan.vcpus.len() {
            return Self { vcpus: None, before: None };
        }
        let writers: Vec<usize> = std::iter::zip(&plan.vcpus, &cpus)
            .filter(|(vcpu, _)| vcpu.workload.writes() && (vcpu.limit.is_some() || plan.vm_limit.is_some()))
            .map(|(_, &cpu)| cpu)
            .collect();
        let before = (!writers.is_empty() && pin(&writers).is_ok()).then(|| cpus.clone());
        Self { vcpus: Some(cpus), before }
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        if let Some(cpus) = &self.before {
            // It has just been allowed, and nothing but speed hangs on it.
            let _ = pin(cpus);
        }
    }
}
