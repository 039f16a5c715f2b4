//! How one try of a case is run.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::by_hand::{self, HandServed};
use super::interrupt::Paused;
use super::measure::Evidence;
use crate::guest::kvm::{self, Script};
use crate::guest::{Phase, Progress, VcpuNow};
use crate::plan::Plan;
use crate::report::progress::Interrupt;

/// What a case runs.
#[derive(Clone, Debug)]
pub enum Trial {
    /// A run of the guest, and what happens beside it.
    Run(Plan, Script),
    /// The limiter's guest and one whose ring is served by hand, by turns.
    Versus(Versus),
    /// A paused vCPU, interrupted so often.
    Interrupt(u32),
}

/// Two guests with the same work.
#[derive(Clone, Debug)]
pub struct Versus {
    /// The limiter's.
    pub plan: Plan,
    /// The other.
    pub by_hand: HandServed,
}

impl Trial {
    /// A run with nothing beside it.
    pub fn run_of(plan: Plan) -> Self {
        Self::Run(plan, Script::default())
    }

    /// What the limiter's guest runs; `None` where there is no guest.
    pub const fn plan(&self) -> Option<&Plan> {
        match self {
            Self::Run(plan, _) | Self::Versus(Versus { plan, .. }) => Some(plan),
            Self::Interrupt(_) => None,
        }
    }

    /// About how long it takes.
    pub fn time(&self) -> Duration {
        match self {
            Self::Run(plan, _) => plan.time(),
            // Each of the two runs twice.
            Self::Versus(versus) => 4 * versus.plan.time(),
            Self::Interrupt(times) => *times * Duration::from_millis(5),
        }
    }

    /// Tries it once.
    ///
    /// # Errors
    /// What the guest says.
    pub fn run(&self, interrupt: &Interrupt) -> Result<Evidence> {
        match self {
            Self::Run(plan, script) => {
                let done = kvm::run_scripted(plan, script, &mut Watched(interrupt))?;
                Ok(Evidence::Run(Box::new(done)))
            }
            Self::Versus(versus) => versus.run(interrupt),
            Self::Interrupt(times) => {
                let mut paused = Paused::new()?;
                let times = (0..*times).map(|_| paused.interrupt()).collect::<Result<_>>()?;
                paused.stop()?;
                Ok(Evidence::Interrupted(times))
            }
        }
    }
}

impl Versus {
    /// The limiter's guest first and last, and the other one twice between: a host that becomes slower or faster does not count.
    fn run(&self, interrupt: &Interrupt) -> Result<Evidence> {
        let limiter = || -> Result<(f64, u64)> {
            let done = kvm::run_scripted(&self.plan, &Script::default(), &mut Watched(interrupt))?;
            let vcpu = done.recording.vcpus.first().context("a run of no vCPU")?;
            let speed = vcpu.limited_accesses as f64 / vcpu.limited_time.as_secs_f64();
            Ok((speed, done.recording.lost_pages.unwrap_or(0)))
        };
        let by_hand = || by_hand::accesses_per_s(&self.plan, self.by_hand);
        let ((first, lost), one, other, (last, lost_last)) = (limiter()?, by_hand()?, by_hand()?, limiter()?);
        let ratio = (first + last) / (one + other);
        ensure!(ratio.is_finite(), "the guest whose ring is served by hand did nothing");
        Ok(Evidence::Speed(ratio, lost + lost_last))
    }
}

/// Shows nothing: runs are short, and what is measured is shown at the end.
struct Watched<'a>(&'a Interrupt);

impl Progress for Watched<'_> {
    fn sample(&mut self, _: Duration, _: Phase, _: &[VcpuNow]) {}

    fn interrupted(&self) -> bool {
        self.0.requested()
    }
}
