//! CALCULATE: from what a vCPU did and may do to what it pays.

mod paced;
mod share;
mod stepped;

pub use paced::Paced;
pub use share::{Claim, level, share};
pub use stepped::{Stepped, SteppedState};

use crate::prepare::Sample;
use crate::rate::PageRate;
use crate::set_penalty::Penalty;

/// Turns a vCPU's sample and limit into its penalty. Write your own, or take [`Paced`] or [`Stepped`].
///
/// Called by the controller under its lock: once a tick for each limited vCPU, and with an empty sample when the limit
/// changes, so that a policy which needs no measurement applies at once. It must not block.
pub trait Policy {
    /// What the policy remembers of one vCPU; its default is a vCPU just limited.
    type State: Default + core::fmt::Debug;

    /// The penalty from now on, given the one in force.
    fn penalty(&self, state: &mut Self::State, sample: &Sample, limit: PageRate, current: Penalty) -> Penalty;
}

/// One of the policies that ship, chosen while running.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Shipped {
    /// [`Paced`].
    Paced(Paced),
    /// [`Stepped`].
    Stepped(Stepped),
}

impl Shipped {
    /// The one of that name, as it is by default: `paced`, `stepped`.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "paced" => Some(Self::Paced(Paced)),
            "stepped" => Some(Self::Stepped(Stepped::default())),
            _ => None,
        }
    }
}

impl Default for Shipped {
    fn default() -> Self {
        Self::Paced(Paced)
    }
}

impl Policy for Shipped {
    type State = SteppedState;

    fn penalty(&self, state: &mut SteppedState, sample: &Sample, limit: PageRate, current: Penalty) -> Penalty {
        match self {
            Self::Paced(paced) => paced.penalty(&mut (), sample, limit, current),
            Self::Stepped(stepped) => stepped.penalty(state, sample, limit, current),
        }
    }
}
