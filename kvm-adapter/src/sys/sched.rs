//! How soon the scheduler lets a thread run that a pause has ended for.

use std::io;
use std::mem::zeroed;

use libc::sched_attr;

/// Shorter than the system's own (0.7 ms on one CPU, 2.8 ms on eight and more), and as long as a reset and the run after it mostly
/// take. The shortest that Linux grants, 0.1 ms, is not: docs/LAB.md, at `beside`, has what was measured.
const SLICE: u64 = 500_000;

/// Whether the scheduler is to run the calling thread soon after it wakes, before others' slices are used up; its share of
/// the CPU stays as it is. Takes no privilege. Real-time threads are left alone, and so is everybody before Linux 6.12.
pub(crate) fn wake_promptly(promptly: bool) -> io::Result<()> {
    let mut attr = get()?;
    if ![libc::SCHED_OTHER as u32, libc::SCHED_BATCH as u32].contains(&attr.sched_policy) {
        return Ok(());
    }
    attr.sched_runtime = if promptly { SLICE } else { 0 }; // of an ordinary thread: its slice, or the system's own
    // SAFETY: reads `attr`, of which its own field says how much there is; 0 is the calling thread.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn get() -> io::Result<sched_attr> {
    // SAFETY: a struct of numbers. The kernel writes at most as much of it as it is told there is; 0 is this thread.
    unsafe {
        let mut attr: sched_attr = zeroed();
        match libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size_of::<sched_attr>(), 0) {
            0 => Ok(attr),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Policy, nice value, priority, slice.
    fn kept() -> (u32, i32, u32, u64) {
        let attr = get().unwrap();
        (attr.sched_policy, attr.sched_nice, attr.sched_priority, attr.sched_runtime)
    }

    #[test]
    fn the_slice_is_short_and_all_else_as_before() {
        std::thread::spawn(|| {
            let before = kept();
            wake_promptly(true).unwrap();
            // Before Linux 6.12 there is no slice to tell.
            assert_eq!(kept(), (before.0, before.1, before.2, if before.3 == 0 { 0 } else { SLICE }));
            wake_promptly(false).unwrap();
            assert_eq!(kept(), before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_real_time_thread_keeps_its_own() {
        std::thread::spawn(|| {
            let real_time = libc::sched_param { sched_priority: 1 };
            // SAFETY: reads the parameter; 0 is the calling thread.
            if unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const real_time) } != 0 {
                let _ = writeln!(io::stderr(), "SKIPPED: this user may have no real-time thread");
                return;
            }
            let before = kept();
            wake_promptly(true).unwrap();
            assert_eq!(kept(), before);
        })
        .join()
        .unwrap();
    }
}
