//! The harness of dirtylimit: guests that write memory, and the measures of what a limit did to them.

pub mod guest;
pub mod payload;
pub mod plan;
pub mod probe;
pub mod record;
pub mod shadow;
pub mod units;
pub mod workload;
