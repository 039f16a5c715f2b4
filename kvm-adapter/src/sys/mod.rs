//! Everything that talks to the kernel: ioctls, mappings, futexes, clocks. The rest of the crate is safe code.

mod futex;
mod guarded;
mod interrupts;
mod kick;
mod kvm;
mod mapping;
#[cfg(dirtylimit_planted)]
mod planted;
mod sched;
mod signals;

pub(crate) use futex::{Wait, wait, wake};
pub(crate) use interrupts::Interrupts;
pub(crate) use kick::{KickSignal, Timer, claim};
pub(crate) use kvm::{Kernel, Reset, VmFd};
pub(crate) use mapping::{RingPages, RunPage};
#[cfg(dirtylimit_planted)]
pub(crate) use planted::Planted;
#[cfg(dirtylimit_planted)]
pub use planted::PlantedBug;
pub(crate) use sched::wake_promptly;
pub(crate) use signals::SignalsBlocked;
#[cfg(dirtylimit_planted)]
pub(crate) use signals::blocked_signals;

use dirtylimit_core::Nanos;

/// `CLOCK_MONOTONIC`: the limiter's clock. It stands still while the host is suspended, as the guest does.
pub(crate) fn now() -> Nanos {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    // The clock counts from boot: neither part is negative.
    time.tv_sec.unsigned_abs() * dirtylimit_core::SECOND + time.tv_nsec.unsigned_abs()
}

/// The host's page size in bytes: what a ring's entry stands for.
pub(crate) fn page_size() -> u32 {
    // SAFETY: sysconf reads no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u32::try_from(size).unwrap_or(4096)
}
