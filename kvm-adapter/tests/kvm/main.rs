//! The adapter on real KVM. Where there is none, each test says so and passes.

#[cfg(not(dirtylimit_planted))]
compile_error!(
    "these tests need --cfg dirtylimit_planted: .cargo/config.toml has it, and RUSTFLAGS overrides that file"
);

mod changes;
mod cloud;
mod common;
mod disturbed;
mod drained;
mod held;
mod kicks;
mod machines;
mod manual;
#[cfg(target_arch = "aarch64")] // where KVM writes memory for an interrupt controller
mod outside;
mod overrun;
mod rig;
mod rounds;
mod sandboxed;
mod shapes;
mod soak;
mod steal;
mod stopped;
mod storms;
mod uring;
