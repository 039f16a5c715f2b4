//! What is concurrent outside the VM's lock is made of these: `dirtylimit-loom` compiles the modules that name them
//! against its own, made of loom's types.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
pub(crate) use std::thread;

/// Where the limiter keeps its vCPUs.
pub(crate) use crate::vcpu_cells::Growing as Cells;
