//! What differs from one architecture to another, a file for each behind one interface: a vCPU's start state, the page
//! tables, the counter that the guest reads, stolen time, and what a fault looks like.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

/// What a vCPU is started with: guest-physical addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    /// Its stats page.
    pub(crate) stats: u64,
    /// Its parameter block.
    pub(crate) parameters: u64,
    /// The top of its stack.
    pub(crate) stack: u64,
}
