//! The whole path without KVM, on [`crate::fake`].

mod enabling;
#[cfg(feature = "log")]
mod events;
mod handlers;
mod memory;
#[cfg(feature = "metrics")]
mod metrics;
mod resets;
mod turns;
