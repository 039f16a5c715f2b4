//! How soon the scheduler lets a thread run that a pause has ended for.

use std::io;
use std::mem::zeroed;

use libc::sched_attr;

/// The shortest that Linux grants.
const SLICE: u64 = 100_000;

/// Has the scheduler run the calling thread soon after it wakes: to be called once by each vCPU's thread, before it runs
/// the guest.
///
/// It asks for the shortest time slice, 0.1 ms. A thread that a pause has ended for then takes the CPU from one with an
/// ordinary slice, instead of waiting until that is used up (3 to 4 ms, at 250 ticks a second); its share of the CPU stays
/// what it was. Takes no privilege. Real-time threads are left alone, and so is everybody before Linux 6.12.
///
/// # Errors
/// What `sched_getattr` and `sched_setattr` answer, a seccomp filter say: the thread runs on as it did.
pub fn wake_promptly() -> io::Result<()> {
    let mut attr = get()?;
    if !matches!(attr.sched_policy.cast_signed(), libc::SCHED_OTHER | libc::SCHED_BATCH) {
        return Ok(());
    }
    attr.sched_runtime = SLICE; // of an ordinary thread: its slice
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
            wake_promptly().unwrap();
            // Before Linux 6.12 there is no slice to tell.
            assert_eq!(kept(), (before.0, before.1, before.2, if before.3 == 0 { 0 } else { SLICE }));
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
                eprintln!("SKIPPED: this user may have no real-time thread");
                return;
            }
            let before = kept();
            wake_promptly().unwrap();
            assert_eq!(kept(), before);
        })
        .join()
        .unwrap();
    }
}
