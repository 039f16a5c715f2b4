//! The harness of dirtylimit: guests that write memory, and the measures of what a limit did to them.

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod cli;
pub mod compare;
pub mod guest;
pub mod lab;
pub mod late;
pub mod measure;
pub mod migrate;
pub mod output;
pub mod plan;
pub mod probe;
pub mod record;
pub mod report;
pub mod scenario;
pub mod units;
pub mod workload;
