//! The whole path without KVM, on [`crate::fake`].

mod enabling;
#[cfg(feature = "log")]
mod events;
mod exits;
mod handlers;
#[cfg(target_arch = "x86_64")]
mod kicker;
mod kicks;
mod looks;
mod lumps;
mod memory;
mod order;
mod passes;
mod resets;
mod signals;
mod snapshot;
mod timers;
mod turns;
mod vcpus;
#[cfg(feature = "vm-memory")]
mod vm_memory;

use std::fs::File;

use crate::fake::Fake;
use crate::{DirtyLimit, Vcpu};

/// A VM with one vCPU.
fn vm() -> (Fake, DirtyLimit, File, Vcpu) {
    let fake = Fake::new();
    let limit = fake.small();
    let file = fake.vcpu(1024);
    let vcpu = limit.add_vcpu(0, &file).unwrap();
    (fake, limit, file, vcpu)
}
