//! The core's own source files, compiled against loom's atomics and lock, and what the models in `tests/` share.
//!
//! README.md has the table *operation → model → what it proves*. Plain `cargo test` explores each model up to two
//! preemptions; `ci/loom.sh` explores more.

#[path = "../../core-nostd/src/controller.rs"]
pub mod controller;
#[path = "../../core-nostd/src/meter.rs"]
pub mod meter;
#[path = "../../core-nostd/src/pacer.rs"]
pub mod pacer;
#[path = "../../core-nostd/src/penalty.rs"]
pub mod penalty;
#[path = "../../core-nostd/src/policy/mod.rs"]
pub mod policy;
#[path = "../../core-nostd/src/rate.rs"]
pub mod rate;
#[path = "../../core-nostd/src/ring.rs"]
pub mod ring;
#[path = "../../core-nostd/src/share.rs"]
pub mod share;

pub mod explore;
mod sync;
pub mod weaken;

/// The lease's renewal by itself, which only the core's `Limiter::tick` may call: for twins that call it too late.
pub fn renew(vm: &penalty::VmCell, now: rate::Nanos) {
    vm.renew(now);
}
