//! The whole path without KVM, on [`crate::fake`].

mod enabling;
#[cfg(feature = "log")]
mod events;
#[cfg(feature = "metrics")]
mod metrics;
mod memory;
mod resets;
mod turns;
