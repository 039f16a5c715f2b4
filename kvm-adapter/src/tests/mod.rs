//! The whole path without KVM, on [`crate::fake`].

mod enabling;
#[cfg(feature = "log")]
mod events;
mod exits;
mod handlers;
mod memory;
#[cfg(feature = "metrics")]
mod metrics;
mod order;
mod resets;
mod signals;
mod turns;
mod vcpus;
