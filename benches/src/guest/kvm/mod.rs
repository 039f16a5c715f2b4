//! The real guest: a [`Machine`] of the test VM's, limited by dirtylimit and measured.

pub mod affinity;
mod control;
mod metrics;
mod run;
mod script;
mod threads;

pub use dirtylimit_test_vm::{
    Exit, GuestCpu, GuestMemory, Kicker, Load, MAX_VCPUS, Machine, SLOT, kvm_or_skip, layout, open, raw_ring,
};
pub(crate) use run::check_memory;
pub use run::{run, run_scripted};
pub use script::{Hold, Mark, Script, Scripted};
pub(crate) use threads::{Limited, Vcpus};

use crate::workload::Workload;
use dirtylimit_test_vm::payload::Mode;

/// Empty loop turns between the writes of [`Workload::Slow`]: about 10 µs.
const SLOW_DELAY: u64 = 20_000;
/// The same of [`Workload::Steady`]: with them an access is some 530 instructions, so a CPU of 500 million instructions a
/// second dirties 0.9 million pages in it.
const STEADY_DELAY: u64 = 250;

impl From<Workload> for Load {
    fn from(workload: Workload) -> Self {
        let mode = match workload {
            Workload::Write(_) | Workload::Slow(_) | Workload::Steady(_) => Mode::Write,
            Workload::Random(_) => Mode::Random,
            Workload::Read(_) => Mode::Read,
            Workload::Burst(_) => Mode::Burst,
            Workload::Idle => Mode::Idle,
        };
        let delay = match workload {
            Workload::Slow(_) => SLOW_DELAY,
            Workload::Steady(_) => STEADY_DELAY,
            _ => 0,
        };
        Self { delay, ..Self::new(mode, workload.bytes()) }
    }
}

#[cfg(test)]
mod run_tests;
