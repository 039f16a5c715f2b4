//! Timers of which the interrupt is all that is wanted.
//!
//! A timer is started on the CPU that arms it (`hrtimer_start`), and its interrupt takes a vCPU there out of the guest for a
//! moment: nobody is signalled and nobody wakes, but the CPU hands over the pages that it has logged, and KVM looks at its
//! ring before it enters again. On a CPU that is kept free of timers (`nohz_full`), or after the thread was moved to another,
//! it comes for nothing.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use dirtylimit_core::{Nanos, SECOND, TIMERS};

/// The timers of one vCPU.
#[derive(Debug)]
pub(crate) struct Interrupts([OwnedFd; TIMERS]);

impl Interrupts {
    /// Fails where a filter forbids it, and where there are no descriptors left.
    pub(crate) fn new() -> io::Result<Self> {
        let create = || {
            // SAFETY: takes numbers; a descriptor that it returns is ours.
            unsafe {
                match libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) {
                    fd if fd < 0 => Err(io::Error::last_os_error()),
                    fd => Ok(OwnedFd::from_raw_fd(fd)),
                }
            }
        };
        Ok(Self([create()?, create()?, create()?, create()?]))
    }

    /// Interrupts the CPU of this thread once at each of these times from now.
    pub(crate) fn arm(&self, times: [Nanos; TIMERS]) -> io::Result<()> {
        // The earliest last: its time is the shortest, and counts from its own call on.
        self.0.iter().zip(times).rev().try_for_each(|(timer, time)| {
            let once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            let value = libc::timespec {
                tv_sec: libc::time_t::try_from(time / SECOND).unwrap_or(libc::time_t::MAX),
                tv_nsec: (time % SECOND).try_into().unwrap_or(0),
            };
            let spec = libc::itimerspec { it_interval: once, it_value: value };
            // SAFETY: reads `spec`; the descriptor is ours.
            match unsafe { libc::timerfd_settime(timer.as_raw_fd(), 0, &raw const spec, null_mut()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fires_at_its_time_and_those_of_later_are_armed_for_it() {
        let interrupts = Interrupts::new().unwrap();
        interrupts.arm([1, 1_000, 2_000_000, 30_000_000]).unwrap();
        for timer in &interrupts.0 {
            let mut poll = libc::pollfd { fd: timer.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one structure, which is read and written.
            assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 20_000) }, 1, "it never fires");
        }
        let hours = [1, 2, 3, 4].map(|hours| hours * 3600 * SECOND + SECOND / 2);
        interrupts.arm(hours).unwrap();
        for (timer, time) in interrupts.0.iter().zip(hours) {
            let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            let mut spec = libc::itimerspec { it_interval: zero, it_value: zero };
            // SAFETY: writes `spec`; the descriptor is the timer's.
            assert_eq!(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &raw mut spec) }, 0);
            let left = spec.it_value.tv_sec.unsigned_abs() * SECOND + spec.it_value.tv_nsec.unsigned_abs();
            assert!(left <= time && left > time - 60 * SECOND, "{left} of {time}");
            assert_eq!((spec.it_interval.tv_sec, spec.it_interval.tv_nsec), (0, 0), "once");
        }
    }
}
