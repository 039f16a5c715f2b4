//! ACCEPT PENALTY: one vCPU from an exit to its next entry.
//!
//! The vCPU's thread owns a [`Machine`], which decides; the holder of the VM's lock the [`VcpuRing`], the ring and what was
//! decided about it; the words between them are the `VcpuCell`. Of the machine's parts, the [`Pacer`] says how long to pause
//! and how many pages may be dirtied next, and `run_time` how long a run may take where the ring does not end it.

mod machine;
mod pacer;
mod run_time;
mod vcpu_ring;

pub use machine::{BATCH, Ended, Machine, RESET_GAP, Run, Step};
pub use pacer::{Charge, MAX_DEBT, Pacer, SLICE};
pub use run_time::{TIMERS, ends_slices};
pub use vcpu_ring::{Metered, VcpuRing};
