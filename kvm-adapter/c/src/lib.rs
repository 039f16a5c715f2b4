//! The C interface of [`dirtylimit_kvm`]: `libdirtylimit.a`, `libdirtylimit.so` and `dirtylimit.h`.
//!
//! The header is made of these sources by cbindgen, and a test compares the two, so the documentation of each item is C's.
//! `README.md` says how to build, install and use it; `examples/vmm.c` is a whole VMM with it.
#![allow(
    clippy::missing_safety_doc,
    reason = "the docs are the header's; what every call must keep to is said at its top"
)]
#![allow(non_camel_case_types, reason = "names of the header")]

mod answer;
mod round;
mod sized;
mod status;
mod vcpu;
mod vm;

pub use answer::*;
pub use round::*;
pub use status::*;
pub use vcpu::*;
pub use vm::*;
