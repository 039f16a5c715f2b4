//! What a migration is to reach, what its rounds tell, and what follows from it.

use core::fmt;

use crate::rate::{Nanos, PageRate};

/// What a migration is to reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Goal {
    /// How long the guest may stand still at the switch, in ns, all costs included.
    pub downtime: Nanos,
    /// When the migration has to be over, in ns since it began; `None`: no matter when.
    pub deadline: Option<Nanos>,
    /// Bytes per second that the switch will have, where that is known (QEMU's `avail-switchover-bandwidth`); `None`: as
    /// much as the rounds have. Rounds are always planned with what they measured.
    pub bandwidth: Option<u64>,
    /// Percent of that bandwidth to count on at the switch, 1 to 100 (others are brought into the range).
    pub share: u8,
    /// What a switch costs besides sending, in ns: pausing the vCPUs, their state, resuming on the other side.
    pub switch_cost: Nanos,
    /// Bytes in a page, as the dirty log counts pages (0 counts as 1).
    pub page_size: u32,
    /// Free rounds in the hope that a guest calms down which does not converge as it is: percent of the migration's time
    /// so far that they may take, besides a first look. 0: throttle at once; 100: a migration takes up to twice as long.
    pub patience: u8,
    /// Only observe: the verdicts are the same, but no plan has a budget.
    pub observe: bool,
}

impl Goal {
    /// A downtime of `downtime` ns without a deadline, with all of the measured bandwidth and a switch for nothing, in
    /// pages of 4 KiB, with a patience of 6 %.
    pub const fn new(downtime: Nanos) -> Self {
        Self {
            downtime,
            deadline: None,
            bandwidth: None,
            share: 100,
            switch_cost: 0,
            page_size: 4096,
            patience: 6,
            observe: false,
        }
    }
}

/// What one finished round tells. Pages are distinct ones: a page that was written twice is one.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Round {
    /// Bytes sent in it, headers and zero pages included.
    pub sent: u64,
    /// How long was spent sending, in ns, and with nothing else: with the sync in it, the bandwidth looks so low that
    /// migrations do not converge (QEMU's commit e8a6d158db takes it out).
    pub sending: Nanos,
    /// How long all of it took, from clearing the log to clearing it again, in ns.
    pub length: Nanos,
    /// Pages that are still to be sent: what is dirty now, the held-back ones included.
    pub left: u64,
    /// Pages that vCPUs and devices dirtied in it.
    pub redirtied: u64,
    /// How many of those left are held back in the rings ([`crate::Ring::held_back`], all vCPUs): no round but one that
    /// drains the rings sends them.
    pub held_back: u64,
    /// Bytes of device state that the switch has to send.
    pub device_bytes: u64,
    /// Bytes of memory per second that devices dirty: no throttle holds them.
    pub device_rate: u64,
    /// The budget that was in force.
    pub throttle: Option<PageRate>,
}

/// Where a migration is heading. Times are in ns since it began; ends include the downtime.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Verdict {
    /// The goal is in reach without a throttle: another round.
    Converging {
        /// When it should be over.
        end: Nanos,
    },
    /// The goal needs a throttle: another round under it.
    Throttle {
        /// What the whole VM may dirty ([`crate::Limiter::set_vm_limit`]).
        budget: PageRate,
        /// When it should be over.
        end: Nanos,
    },
    /// Pause the guest and send the rest.
    SwitchNow,
    /// No throttle and no downtime helps: postcopy, or cancel.
    Stalled,
    /// The goal is out of reach.
    Unreachable {
        /// The downtime that would do, in ns.
        needs: Nanos,
    },
}

impl Verdict {
    /// A name for machines: lower case, words joined by `-`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Converging { .. } => "converging",
            Self::Throttle { .. } => "throttle",
            Self::SwitchNow => "switch-now",
            Self::Stalled => "stalled",
            Self::Unreachable { .. } => "unreachable",
        }
    }
}

/// Why a verdict is what it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Reason {
    /// Converging: each round leaves less than the one before.
    Shrinking,
    /// Converging: what is left fits in the downtime, and the next round halves it.
    StillHalving,
    /// Converging: a look at how the guest goes on costs little beside the migration so far.
    Looking,
    /// Converging: what is left goes up and down, and is about to come down.
    MinimumDue,
    /// Throttle: the free guest leaves as much as it was sent.
    DirtiesTooMuch,
    /// Throttle: the free guest would converge, but too late.
    TooSlow,
    /// Switch now: what is left fits in the downtime.
    Fits,
    /// Switch now: what is left fits in the downtime, at the minimum that was waited for.
    AtMinimum,
    /// Switch now: the next round would take longer than it saves.
    NextCostsMore,
    /// Stalled: a round sent nothing.
    NothingSent,
    /// Stalled: devices dirty memory as fast as it is sent.
    DevicesTooFast,
    /// Stalled: two rounds under a throttle dirtied twice what it allows.
    ThrottleNotHeld,
    /// Unreachable: pausing, device state and resuming take longer than the downtime.
    SwitchTooDear,
    /// Unreachable: the rings hold back more than the downtime covers, although they were to be drained.
    HeldBack,
    /// Unreachable: in the time that rounds take besides sending too much is dirtied.
    RoundsTooLong,
    /// Unreachable: the deadline comes before the downtime can be kept.
    DeadlineTooSoon,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shrinking => "each round leaves less than the one before",
            Self::StillHalving => "what is left fits in the downtime, and the next round halves it",
            Self::Looking => "a free round costs little beside the migration so far",
            Self::MinimumDue => "what is left goes up and down, and is about to come down",
            Self::DirtiesTooMuch => "the free guest leaves as much as it was sent",
            Self::TooSlow => "the free guest converges after the deadline",
            Self::Fits => "what is left fits in the downtime",
            Self::AtMinimum => "what is left fits in the downtime, at the minimum that was waited for",
            Self::NextCostsMore => "the next round takes longer than it saves",
            Self::NothingSent => "a round sent nothing",
            Self::DevicesTooFast => "devices dirty memory as fast as it is sent",
            Self::ThrottleNotHeld => "the guest dirties twice what the throttle allows",
            Self::SwitchTooDear => "pausing, device state and resuming take longer than the downtime",
            Self::HeldBack => "the rings hold back more than the downtime covers",
            Self::RoundsTooLong => "too much is dirtied while a round does other things than send",
            Self::DeadlineTooSoon => "the deadline comes before the downtime can be kept",
        })
    }
}

/// What to do until the next round ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Where the migration is heading.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The budget to put in force now, `None`: lift it. Always `None` where the goal is only to observe.
    pub budget: Option<PageRate>,
    /// The next round is to drain the rings: it may be the last, or they hold back a good part of what the downtime covers.
    pub drain: bool,
}
