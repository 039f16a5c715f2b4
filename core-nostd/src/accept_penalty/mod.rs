//! ACCEPT PENALTY: one vCPU from an exit to its next entry.
//!
//! The vCPU's thread owns a [`Machine`], which decides; the holder of the VM's lock the [`VcpuRing`], the ring and what was
//! decided about it; the words between them are the `VcpuCell`. Of the machine's parts, the [`Pacer`] says how long to pause
//! and how many pages may be dirtied next, and `run_time` how long a run may take where the ring does not end it.

mod machine;
mod pacer;
mod run_time;
mod vcpu_ring;

use crate::rate::Nanos;
pub use machine::{BATCH, Ended, Machine, Run, Step};
pub use pacer::{Charge, MAX_DEBT, Pacer, SLICE};
pub use run_time::{TIMERS, ends_slices};
pub use vcpu_ring::{Metered, VcpuRing};

/// Resets are at least this far apart (at most 476 a second), or nine tenths of a shorter `max_pause`, unless a vCPU waits
/// for one that has no limit, or dirties the same pages again, or whose slice is half its ring or more, or that has paused
/// for as long as it may, or had no page since its last pause.
pub const RESET_GAP: Nanos = 2_100_000;
