//! Keeps each vCPU's dirty page rate under a limit, by KVM's dirty ring.
pub use dirtylimit_core as core;
mod caps;
mod error;
mod harvest;
mod limit;
mod seat;
mod slots;
mod sys;
mod throttle;
mod vcpu;
mod vm;

pub use caps::{Caps, Config};
pub use dirtylimit_core::{PageRate, Shipped, Status, Stepped};
pub use error::Error;
pub use harvest::Stats;
pub use limit::{DirtyLimit, Pass};
pub use seat::Interrupter;
pub use throttle::ThrottleThread;
pub use vcpu::{Paid, Vcpu};

/// The exit reason of a full dirty ring (`KVM_EXIT_DIRTY_RING_FULL`); kvm-ioctls hands it over as
/// `VcpuExit::Unsupported(31)`.
pub const EXIT_DIRTY_RING_FULL: u32 = 31;
