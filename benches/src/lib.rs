//! The harness of dirtylimit: guests that write memory, and the measures of what a limit did to them.

pub mod plan;
pub mod record;
pub mod units;
pub mod workload;
