//! How one try of a case is run.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::by_hand;
use super::interrupt::Paused;
use super::measure::Evidence;
use super::yardstick::Clock;
use crate::guest::kvm::{self, Script, Scripted};
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
    Interrupt {
        /// How often.
        times: u32,
        /// Whether the guest has a steal-time page.
        steal_time: bool,
    },
}

/// Two guests with the same work.
#[derive(Clone, Debug)]
pub struct Versus {
    /// The limiter's.
    pub plan: Plan,
    /// The other.
    pub by_hand: HandServed,
}

/// A guest whose ring is collected and reset by hand: when it is full, and at an interval too where there is one.
#[derive(Clone, Copy, Debug)]
pub struct HandServed {
    /// Entries of the ring.
    pub ring: u32,
    /// The interval.
    pub every: Option<Duration>,
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
            Self::Interrupt { .. } => None,
        }
    }

    /// Whether its guests have steal-time pages; both of two that are compared.
    pub const fn steal_time(&mut self) -> &mut bool {
        match self {
            Self::Run(plan, _) | Self::Versus(Versus { plan, .. }) => &mut plan.steal_time,
            Self::Interrupt { steal_time, .. } => steal_time,
        }
    }

    /// Tries it once; `round` decides who of two goes first. The clock is looked at meanwhile.
    ///
    /// # Errors
    /// What the guest says.
    pub fn run(&self, round: usize, interrupt: &Interrupt, clock: &mut Clock) -> Result<Evidence> {
        match self {
            Self::Run(plan, script) => {
                let mut done = kvm::run_scripted(plan, script, &mut Watched { interrupt, clock })?;
                done.slow = clock.over();
                Ok(Evidence::Run(Box::new(done)))
            }
            Self::Versus(versus) => versus.run(round, interrupt),
            Self::Interrupt { times, steal_time } => {
                let mut paused = Paused::new(*steal_time)?;
                let times = (0..*times).map(|_| paused.interrupt()).collect::<Result<_>>()?;
                paused.stop()?;
                Ok(Evidence::Interrupted(times))
            }
        }
    }
}

impl Versus {
    fn run(&self, round: usize, interrupt: &Interrupt) -> Result<Evidence> {
        let limiter = || kvm::run_scripted(&self.plan, &Script::default(), &mut Quiet(interrupt));
        let by_hand = || by_hand::accesses_per_s(&self.plan, self.by_hand);
        let (limiter, by_hand) = if round % 2 == 0 {
            let limiter = limiter()?;
            (limiter, by_hand()?)
        } else {
            let by_hand = by_hand()?;
            (limiter()?, by_hand)
        };
        let Scripted { recording, .. } = limiter;
        let vcpu = recording.vcpus.first().context("a run of no vCPU")?;
        let ratio = vcpu.limited_accesses as f64 / vcpu.limited_time.as_secs_f64() / by_hand;
        ensure!(ratio.is_finite(), "the guest whose ring is served by hand did nothing");
        Ok(Evidence::Speed(ratio, recording.lost_pages.unwrap_or(0)))
    }
}

/// Shows nothing: runs are short, and what is measured is shown at the end.
struct Watched<'a> {
    interrupt: &'a Interrupt,
    clock: &'a mut Clock,
}

impl Progress for Watched<'_> {
    fn sample(&mut self, at: Duration, _: Phase, _: &[VcpuNow]) {
        self.clock.look(at);
    }

    fn interrupted(&self) -> bool {
        self.interrupt.requested()
    }

    fn is_slow(&self) -> bool {
        self.clock.is_slow()
    }
}

/// As [`Watched`], of two that are compared: the clock falls for both.
struct Quiet<'a>(&'a Interrupt);

impl Progress for Quiet<'_> {
    fn sample(&mut self, _: Duration, _: Phase, _: &[VcpuNow]) {}

    fn interrupted(&self) -> bool {
        self.0.requested()
    }
}
