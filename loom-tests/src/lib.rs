//! The core's own source files, and those of the adapter that are concurrent outside its lock, compiled against loom's
//! atomics and lock; and what the models in `tests/` share.
//!
//! README.md has the table *operation → model → what it proves*. Plain `cargo test` explores each model up to two
//! preemptions; `ci/loom.sh` explores more.

// The models are in tests/: under cfg(test) the core's modules would bring their own unit tests along.
#![cfg(not(test))]

// rustfmt would look for their tests here; their own package formats them.
#[rustfmt::skip]
#[path = "../../core-nostd/src/accept_penalty/mod.rs"]
pub mod accept_penalty;
#[rustfmt::skip]
#[path = "../../core-nostd/src/calculate/mod.rs"]
pub mod calculate;
#[rustfmt::skip]
#[path = "../../core-nostd/src/controller/mod.rs"]
pub mod controller;
#[rustfmt::skip]
#[path = "../../core-nostd/src/prepare.rs"]
pub mod prepare;
#[rustfmt::skip]
#[path = "../../core-nostd/src/rate.rs"]
pub mod rate;
#[rustfmt::skip]
#[path = "../../core-nostd/src/ring/mod.rs"]
pub mod ring;
#[rustfmt::skip]
#[path = "../../core-nostd/src/set_penalty.rs"]
pub mod set_penalty;
#[rustfmt::skip]
#[path = "../../core-nostd/src/vcpu_cell.rs"]
pub mod vcpu_cell;

#[rustfmt::skip]
#[expect(dead_code, unreachable_pub, reason = "public in the adapter, and only in part used here")]
#[path = "../../kvm-adapter/src/kick.rs"]
mod kick;
#[rustfmt::skip]
#[expect(dead_code, unreachable_pub, reason = "as above")]
#[path = "../../kvm-adapter/src/shared.rs"]
mod shared;
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
use accept_penalty::{Ended, TIMERS, ends_slices};
use calculate::Shipped;
use controller::{Inline, Limiter, VcpuIndex};
use error::Error;
use rate::Nanos;
use set_penalty::Penalty;
use vcpu_cell::VcpuCell;

/// The lease's renewal by itself, which only the core's `Limiter::tick` may call: for twins that call it too late.
pub fn renew(vm: &set_penalty::VmCell, now: rate::Nanos) {
    vm.renew(now);
}
