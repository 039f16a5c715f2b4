//! What is concurrent outside the VM's lock is made of these: `dirtylimit-loom` compiles the modules that name them
//! against its own, made of loom's types.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
pub(crate) use std::thread;

/// As many vCPUs as KVM's x86 allows in most builds; fewer in the models.
pub(crate) const VCPUS: usize = 1024;
