//! Per-vCPU dirty page rate limiting: the core.
#![no_std]
#![forbid(unsafe_code)]

mod rate;

pub use rate::{Nanos, PageRate, Price, SECOND};
