//! The core's own source files, and those of the adapter that are concurrent outside its lock, compiled against loom's
//! atomics and lock; and what the models in `tests/` share.
//!
//! README.md has the table *operation → model → what it proves*. Plain `cargo test` explores each model up to two
//! preemptions; `ci/loom.sh` explores more.

// The models are in tests/: under cfg(test) the core's modules would bring their own unit tests along.
#![cfg(not(test))]

// rustfmt would look for their tests here; their own package formats them.
#[rustfmt::skip]
#[path = "../../core-nostd/src/controller.rs"]
pub mod controller;
#[rustfmt::skip]
#[path = "../../core-nostd/src/enforce.rs"]
pub mod enforce;
#[rustfmt::skip]
#[path = "../../core-nostd/src/run_time.rs"]
pub mod run_time;
#[rustfmt::skip]
#[path = "../../core-nostd/src/machine.rs"]
pub mod machine;
#[rustfmt::skip]
#[path = "../../core-nostd/src/meter.rs"]
pub mod meter;
#[rustfmt::skip]
#[path = "../../core-nostd/src/own.rs"]
pub mod own;
#[rustfmt::skip]
#[path = "../../core-nostd/src/pacer.rs"]
pub mod pacer;
#[rustfmt::skip]
#[path = "../../core-nostd/src/penalty.rs"]
pub mod penalty;
#[rustfmt::skip]
#[path = "../../core-nostd/src/policy/mod.rs"]
pub mod policy;
#[rustfmt::skip]
#[path = "../../core-nostd/src/rate.rs"]
pub mod rate;
#[rustfmt::skip]
#[path = "../../core-nostd/src/request.rs"]
pub mod request;
#[rustfmt::skip]
#[path = "../../core-nostd/src/ring.rs"]
pub mod ring;
#[rustfmt::skip]
#[path = "../../core-nostd/src/share.rs"]
pub mod share;
#[rustfmt::skip]
#[path = "../../core-nostd/src/soft_limit.rs"]
mod soft_limit;
#[rustfmt::skip]
#[path = "../../core-nostd/src/vcpu_ring.rs"]
pub mod vcpu_ring;

#[rustfmt::skip]
#[expect(dead_code, unreachable_pub, reason = "public in the adapter, and only in part used here")]
#[path = "../../kvm-adapter/src/kick.rs"]
mod kick;
#[rustfmt::skip]
#[expect(dead_code, unreachable_pub, reason = "as above")]
#[path = "../../kvm-adapter/src/seat.rs"]
mod seat;
#[rustfmt::skip]
#[expect(unreachable_pub, reason = "as above")]
#[path = "../../kvm-adapter/src/throttle.rs"]
mod throttle;

pub mod adapter;
mod error;
pub mod explore;
pub mod kernel;
mod sync;
mod sys;
pub mod weaken;

// The adapter's files take the core's parts from its crate.
extern crate self as dirtylimit_core;
use controller::{Limiter, VcpuCell, VcpuIndex};
use error::Error;
use machine::Ended;
use penalty::Penalty;
use policy::Shipped;
use rate::Nanos;
use run_time::{TIMERS, ends_slices};

/// The lease's renewal by itself, which only the core's `Limiter::tick` may call: for twins that call it too late.
pub fn renew(vm: &penalty::VmCell, now: rate::Nanos) {
    vm.renew(now);
}
