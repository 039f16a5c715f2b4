//! One vCPU's dirty ring, from the consumer's side.

mod consumer;
mod own;
mod soft_limit;

pub use consumer::{BadRingSize, Entry, PML, Page, RESERVED, Ring};
pub(crate) use own::OwnPages;
