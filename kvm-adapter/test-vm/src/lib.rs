//! A small virtual machine whose vCPUs run the [payload], with nothing of dirtylimit's in it: the machine that the adapter's
//! tests and the harness limit.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod arch;
mod cpu;
pub mod layout;
mod machine;
mod memory;
pub mod payload;
pub mod raw_ring;
mod shadow;

use std::io::Write;
use std::panic::Location;

pub use arch::{FAULT, LEVEL, host_tsc_hz, images};
pub use cpu::{Exit, GuestCpu, Kicker, open};
pub use layout::{Load, MAX_VCPUS};
pub use machine::{Machine, SLOT, StatsPage};
pub use memory::GuestMemory;
pub use shadow::Shadow;

/// The size of the guest's pages, in bytes.
pub const PAGE_SIZE: u32 = 4096;

/// For tests: whether `/dev/kvm` opens. Where it does not, the test must return, and this says so on stderr.
///
/// Where it does, the test's name is added to the file that the environment variable `DIRTYLIMIT_KVM_TESTS_RAN` names,
/// so that a script can tell a test that passed from one that was skipped.
///
/// # Panics
/// If that file cannot be written.
#[track_caller]
pub fn kvm_or_skip() -> bool {
    let thread = std::thread::current();
    let at = Location::caller();
    let name = format!("{} ({}:{})", thread.name().unwrap_or("unnamed"), at.file(), at.line());
    if let Err(error) = open() {
        // The raw descriptor: the test runner does not capture it, so the skip shows without --nocapture.
        let _ = writeln!(std::io::stderr(), "SKIPPED: /dev/kvm cannot be used by {name}: {error:#}");
        return false;
    }
    if let Some(path) = std::env::var_os("DIRTYLIMIT_KVM_TESTS_RAN") {
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            // One write, so that the lines of tests that run at once do not mix.
            .and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()))
            .unwrap_or_else(|error| panic!("DIRTYLIMIT_KVM_TESTS_RAN={}: {error}", path.to_string_lossy()));
    }
    true
}

#[cfg(test)]
mod tests;
