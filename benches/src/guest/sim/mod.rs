//! The simulated guest: for machines without KVM, and the regression test of control quality.
//!
//! A deterministic discrete-event simulation in virtual time. It drives the *core* itself, with every decision that it
//! makes; what is modelled is the machine around it:
//!
//! | module | models |
//! |---|---|
//! | `kernel` | pages with their protection and version, rings with their soft limit, reset, Intel's PML |
//! | `cpu` | the workloads, the host's scheduler, and the gaps that the guest sees |
//! | `vcpu`, `adapter` | what `dirtylimit-kvm` does on the vCPU's thread, and under its lock: the core's decisions carried out |
//! | `run` | throttle ticks, samples, a migration's passes, changes of the limit |
//! | `costs` | what each of them takes |
//!
//! Every vCPU has a CPU of its own. Clocks of vCPUs that run side by side are up to 10 µs apart when they interact.
//!
//! Lost pages are checked as in a real run: whoever migrates copies a page's version when it is published; after the
//! last sync every copy must be up to date.

mod adapter;
mod costs;
mod cpu;
mod kernel;
mod run;
mod vcpu;

use std::time::Duration;

use anyhow::Result;
use dirtylimit_core::{BATCH, Policy, RESET_GAP, Shipped};

use super::Progress;
use crate::plan::{KickKind, Plan};
use crate::record::Recording;

/// The machine that is simulated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Machine {
    /// Of its dice: scheduling, faults, oversleeping, and `random`'s choices.
    pub seed: u64,
    /// Whether its CPUs hand pages over in lumps of up to 512, as Intel's do.
    pub pml: bool,
    /// Who ends the slices that a ring cannot.
    pub kick: KickKind,
    /// Each vCPU has a steal-time page, as under every Linux guest: KVM logs it at each entry and exit.
    pub steal_time: bool,
    /// What is broken in it.
    pub fault: Option<Fault>,
}

impl Default for Machine {
    /// Seed 1, no lumps, kicks by a signal, no steal time, nothing broken.
    fn default() -> Self {
        Self { seed: 1, pml: false, kick: KickKind::Signal, steal_time: false, fault: None }
    }
}

/// A bug to plant, so that a check can be seen to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Pages are published, and so copied, before the reset that protects them has returned.
    PublishBeforeReset,
    /// Every entry is collected at once, so that each slice is a whole ring.
    NothingHeldBack,
}

impl Machine {
    /// Runs `plan` and records it, in virtual time.
    ///
    /// # Errors
    /// A ring that no kernel takes; more memory or vCPUs than are simulated.
    pub fn run(&self, plan: &Plan, progress: &mut dyn Progress) -> Result<Recording> {
        self.run_under(Shipped::from(plan.policy), plan, progress)
    }

    /// As [`Machine::run`], under any policy instead of the plan's.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn run_under(&self, policy: impl Policy, plan: &Plan, progress: &mut dyn Progress) -> Result<Recording> {
        run::Run::new(*self, policy, plan, progress)?.all()
    }

    /// The longest gap that a guest may see while it is limited: a pause of `max_pause`, the wait for the next reset, and
    /// what the machine itself adds to both.
    pub fn longest_gap(max_pause: Duration) -> Duration {
        let machine = 2 * costs::MAX_OVERSLEEP + costs::MAX_PREEMPTED + costs::reset(2 * BATCH, true);
        max_pause + Duration::from_nanos(RESET_GAP + machine)
    }
}

/// Runs `plan` on the default [`Machine`].
///
/// # Errors
/// As [`Machine::run`].
pub fn run(plan: &Plan, progress: &mut dyn Progress) -> Result<Recording> {
    Machine::default().run(plan, progress)
}
