//! The goal-driven budget: after each round of a live migration, whether the guest has to be throttled, and how much.
//!
//! Sans I/O: the embedder runs the rounds and reads the clock; a [`Migration`] is told of each finished round and answers
//! with a [`Plan`]. It is plain state of one thread, the one that migrates: no atomics, no locks; every call takes a
//! bounded time, allocates nothing, and takes any numbers (arithmetic saturates).
//!
//! ```
//! use dirtylimit_core::SECOND;
//! use dirtylimit_core::migrate::{Goal, Migration, Reason, Round, Verdict};
//!
//! let mut migration = Migration::new(Goal::new(300_000_000));
//! // 512 MiB in 2.56 s, of which the guest rewrote 224 MiB, all of them within the first second.
//! migration.sample(SECOND, 57_344);
//! let length = 2_560_000_000;
//! let round = Round { sent: 512 << 20, sending: length, length, left: 57_344, redirtied: 57_344, ..Round::default() };
//! let plan = migration.finish_round(&round);
//! assert_eq!(plan.reason, Reason::DirtiesTooMuch);
//! let Verdict::Throttle { budget, end } = plan.verdict else { panic!("{plan:?}") };
//! // Sending 224 MiB takes 1.12 s; as much may be dirtied meanwhile as the switch sends in 300 ms, less a margin.
//! assert_eq!((budget.bytes_per_sec(4096) >> 20, end / 1_000_000), (50, 3961));
//! assert!(plan.budget == Some(budget) && plan.drain);
//! ```
//!
//! # The rule
//! Sending L pages takes L ÷ B at a bandwidth B. Meanwhile the guest dirties u(L ÷ B) *distinct* pages: u rises and flattens,
//! for working sets saturate, so no rate stands for it (KubeVirt's VEP 248 rejects "rate > bandwidth" for that). A guest
//! whose u(L ÷ B) stays below L, down to the S pages that the downtime covers, converges unaided. Any other loses least if
//! it runs free as long as that lowers L, and is then held to S in the one round that sends L: that costs L ÷ B less the
//! time in which it dirties S by itself, and each gentler round before costs more, or it would have converged.
//!
//! So the budget is S ÷ (L ÷ B) = B × S ÷ L. That is a position term, with its setpoint a little below the limit, as in
//! Linux's `balance_dirty_pages` (mm/page-writeback.c, `wb_position_ratio`), and so is the asymmetry: what was dirtied
//! beyond a budget lowers the next one in full, and is forgotten by a quarter a round; a throttle is put on as soon as it is
//! needed, and lifted only where the free guest would halve what is left. QEMU's auto-converge raises its throttle step by
//! step instead, and its dirty limit is a number of the user's. No rate from before the migration is asked for: untracked,
//! and without clears, a guest dirties at another one.
//!
//! How it does beside the best constant limit, half of the bandwidth and a downtime that grows is in
//! `tests/migrate/table.txt`.

mod curve;
mod minima;
mod verdict;

use crate::rate::{Nanos, PageRate, SECOND};
use curve::Curve;
use minima::Minima;
pub use verdict::{Goal, Plan, Reason, Round, Verdict};

/// A measured bandwidth counts as long as this: a round of 10 ms moves the estimate half way, one of 100 ms nearly all.
const BANDWIDTH_MEMORY: Nanos = 10_000_000;
/// A gain of 1.
const UNIT: u64 = 1024;
/// The least part of the bandwidth that a throttle leaves to vCPUs, so that no guest stands still: an L beyond 16 S takes
/// two rounds, and 1/16 more time.
const LEAST: u64 = 16;
/// Setpoint: this part of what the downtime covers is kept back for what rounds and limiters miss.
const MARGIN: u64 = 16;
/// The first look may take this part of the time so far: what the long first round told is old when it ends.
const FIRST_LOOK: u64 = 4;
/// A free round that lowers what is left by this part is worth its time, although more of them would not reach the goal.
const WORTH: u64 = 16;
/// A forecast looks at most this many rounds ahead: contracting by 15/16 each, a VM of 16 TiB comes down to one of 4 GiB.
const HORIZON: usize = 128;

/// `a × b ÷ c`, rounded down, saturating; [`u64::MAX`] where `c` is 0.
fn mul_div(a: u64, b: u64, c: u64) -> u64 {
    (u128::from(a) * u128::from(b)).checked_div(c.into()).map_or(u64::MAX, |x| u64::try_from(x).unwrap_or(u64::MAX))
}

/// One live migration towards its [`Goal`].
#[derive(Clone, Debug)]
pub struct Migration {
    goal: Goal,
    /// Since it began, as of the last finished round, in ns.
    elapsed: Nanos,
    /// Bytes per second; 0: nothing sent yet.
    bandwidth: u64,
    /// What the last round did besides sending, in ns.
    overhead: Nanos,
    curve: Curve,
    minima: Minima,
    /// Budgets are multiplied by this ÷ [`UNIT`], at most 1: the limiter lets more through than it is asked to.
    gain: u64,
    /// Rounds in a row in which the throttle was not held.
    not_held: u32,
    /// What was left after the last round.
    left: u64,
    /// Once more was left than the downtime covers.
    was_above: bool,
    /// The lowest and the highest rate that it was watched at, in pages per second.
    activity: Option<(u64, u64)>,
    /// Time spent in free rounds without hope, in ns.
    looked: Nanos,
    /// The last plan asked for a drain.
    asked_to_drain: bool,
    /// The last plan had a budget.
    is_limited: bool,
}

/// A verdict, why, and what the next round should leave.
type Judged = (Verdict, Reason, u64);

/// How a forecast ends.
struct Forecast {
    end: Nanos,
    /// Left after the next round.
    next: u64,
    /// Left at the switch, or where it does not get below.
    last: u64,
    arrives: bool,
}

impl Migration {
    /// A migration that begins now.
    pub const fn new(goal: Goal) -> Self {
        Self {
            goal,
            elapsed: 0,
            bandwidth: 0,
            overhead: 0,
            curve: Curve::new(),
            minima: Minima::new(),
            gain: UNIT,
            not_held: 0,
            left: 0,
            was_above: false,
            activity: None,
            looked: 0,
            asked_to_drain: false,
            is_limited: false,
        }
    }

    /// Changes the goal; the next plan is for this one.
    pub fn set_goal(&mut self, goal: Goal) {
        self.goal = goal;
    }

    /// Tells, within a round, that `redirtied` distinct pages were dirtied in the `into_round` ns since it began. Optional, in
    /// any number, best at doubling times: it shows whether the working set is saturated, which otherwise takes a free round
    /// of its own. Does nothing under a budget, which says nothing of the free guest.
    pub fn sample(&mut self, into_round: Nanos, redirtied: u64) {
        if !self.is_limited {
            self.curve.note(into_round.max(1), redirtied);
        }
    }

    /// Tells that `pages` were dirtied in the last `time` ns, each counted at least once whether or not it was dirty before:
    /// what the rings got ([`crate::Counts::gross`]). Optional, at any time, best every quarter of a second or so: a guest
    /// that dirties steadily is throttled as soon as it has to be, for no rest is worth waiting for. Does nothing under a
    /// budget.
    pub fn watch(&mut self, time: Nanos, pages: u64) {
        if !self.is_limited {
            let rate = mul_div(pages, SECOND, time.max(1));
            let (lowest, highest) = self.activity.unwrap_or((rate, rate));
            self.activity = Some((lowest.min(rate), highest.max(rate)));
        }
    }

    /// Tells of a finished round, and asks what follows.
    ///
    /// The plan holds until the next round ends: the budget is to be put in force (or lifted) at once. After
    /// [`Verdict::Stalled`] and [`Verdict::Unreachable`] the migration may go on all the same; the next rounds are judged
    /// anew, so that a goal set meanwhile, or a bandwidth that came back, counts.
    pub fn finish_round(&mut self, round: &Round) -> Plan {
        self.learn(round);
        let target = self.covered(round);
        let (verdict, reason, next) = self.judge(round, target);
        self.was_above |= round.left > target;
        self.left = round.left;
        let budget = match verdict {
            Verdict::Throttle { budget, .. } if !self.goal.observe => Some(budget),
            _ => None,
        };
        self.is_limited = budget.is_some();
        self.asked_to_drain = next <= target || round.held_back > target / 4;
        Plan { verdict, reason, budget, drain: self.asked_to_drain }
    }

    fn learn(&mut self, round: &Round) {
        self.elapsed = self.elapsed.saturating_add(round.length);
        self.overhead = round.length.saturating_sub(round.sending);
        if round.sending > 0 {
            // Weighted by time: what little a short round says of the bandwidth does not count more than what it says.
            let memory = if self.bandwidth > 0 { BANDWIDTH_MEMORY } else { 0 };
            let remembered = mul_div(self.bandwidth, memory, SECOND);
            let time = round.sending.saturating_add(memory);
            self.bandwidth = mul_div(round.sent.saturating_add(remembered), SECOND, time);
        }
        self.minima.note(self.elapsed, round.left);
        let Some(budget) = round.throttle else {
            self.not_held = 0;
            return self.curve.note(round.length.max(1), round.redirtied);
        };
        let by_devices = self.pages(mul_div(round.device_rate, round.length, SECOND));
        let by_guest = round.redirtied.saturating_sub(by_devices);
        let allowed = mul_div(budget.raw(), round.length, SECOND << 10);
        if by_guest < allowed / 2 {
            // It was hardly held: so much it dirties when free.
            self.curve.note(round.length.max(1), round.redirtied);
        }
        let held = by_guest <= allowed.saturating_mul(2) || round.left < self.left - self.left / 8;
        self.not_held = if held { 0 } else { self.not_held.saturating_add(1) };
        self.gain = if by_guest > allowed.saturating_add(allowed / MARGIN) {
            mul_div(UNIT, allowed, by_guest).max(1)
        } else {
            self.gain + (UNIT - self.gain).div_ceil(4)
        };
    }

    /// In whole pages.
    fn pages(&self, bytes: u64) -> u64 {
        bytes / u64::from(self.goal.page_size.max(1))
    }

    fn bytes(&self, pages: u64) -> u64 {
        pages.saturating_mul(self.goal.page_size.max(1).into())
    }

    /// How long a round takes that sends `pages`.
    fn round_time(&self, pages: u64) -> Nanos {
        mul_div(self.bytes(pages), SECOND, self.bandwidth).saturating_add(self.overhead)
    }

    /// Bytes per second that the switch can count on.
    fn switch_bandwidth(&self) -> u64 {
        mul_div(self.goal.bandwidth.unwrap_or(self.bandwidth), self.goal.share.clamp(1, 100).into(), 100)
    }

    /// How long the guest stands still in a switch that sends `pages`.
    fn pause(&self, round: &Round, pages: u64) -> Nanos {
        let bytes = self.bytes(pages).saturating_add(round.device_bytes);
        let sending = if bytes > 0 { mul_div(bytes, SECOND, self.switch_bandwidth()) } else { 0 };
        self.goal.switch_cost.saturating_add(sending)
    }

    /// How many pages the downtime covers.
    fn covered(&self, round: &Round) -> u64 {
        let sending = self.goal.downtime.saturating_sub(self.goal.switch_cost);
        let bytes = mul_div(self.switch_bandwidth(), sending, SECOND);
        self.pages(bytes.saturating_sub(round.device_bytes))
    }

    fn in_time(&self, end: Nanos) -> bool {
        self.goal.deadline.is_none_or(|deadline| end <= deadline)
    }

    fn judge(&mut self, round: &Round, target: u64) -> Judged {
        let left = round.left;
        if self.pause(round, left) <= self.goal.downtime {
            return self.switch(round);
        }
        if let Some(reason) = self.stall(round) {
            return (Verdict::Stalled, reason, left);
        }
        let throttled = self
            .forecast(round, target, |plan, time| plan.dirtied_under(plan.budget(round, target, time), round, time));
        if let Some((pages, reason)) = self.out_of_reach(round, target, &throttled) {
            // A little more than what is just enough.
            let enough = self.pause(round, pages);
            return (Verdict::Unreachable { needs: enough.saturating_add(enough / MARGIN) }, reason, left);
        }
        let free = self.forecast(round, target, |plan, time| plan.curve.bounds(time).0);
        let is_calm = round.throttle.is_none() || free.next <= left / 2;
        // Hopes must leave time for the throttle if they are not met.
        let in_time = self.in_time(free.end) && self.in_time(throttled.end.saturating_add(self.round_time(left)));
        if free.arrives && is_calm && in_time {
            return (Verdict::Converging { end: free.end }, Reason::Shrinking, free.next);
        }
        if round.throttle.is_none() && in_time {
            if free.next <= left - left / WORTH {
                let end = throttled.end.saturating_add(self.round_time(free.next));
                return (Verdict::Converging { end }, Reason::Shrinking, free.next);
            }
            if let Some(waiting) = self.wait(round, &throttled) {
                return waiting;
            }
        }
        let budget = self.budget(round, target, self.round_time(left));
        let reason = if free.arrives && is_calm { Reason::TooSlow } else { Reason::DirtiesTooMuch };
        (Verdict::Throttle { budget, end: throttled.end }, reason, throttled.next)
    }

    /// Why neither a throttle nor a downtime helps.
    fn stall(&self, round: &Round) -> Option<Reason> {
        if round.sent == 0 || self.bandwidth == 0 {
            Some(Reason::NothingSent)
        } else if round.device_rate >= self.bandwidth - self.bandwidth / 16 {
            Some(Reason::DevicesTooFast)
        } else {
            (self.not_held >= 2).then_some(Reason::ThrottleNotHeld)
        }
    }

    /// How many pages the downtime would have to cover, and why, where no throttle brings them down to `target`.
    fn out_of_reach(&self, round: &Round, target: u64, throttled: &Forecast) -> Option<(u64, Reason)> {
        if self.pause(round, 0) >= self.goal.downtime {
            Some((throttled.last, Reason::SwitchTooDear))
        } else if self.asked_to_drain && round.held_back > target {
            Some((round.held_back, Reason::HeldBack))
        } else if !throttled.arrives {
            Some((throttled.last, Reason::RoundsTooLong))
        } else {
            (!self.in_time(throttled.end)).then_some((round.left, Reason::DeadlineTooSoon))
        }
    }

    /// What is left fits in the downtime.
    fn switch(&self, round: &Round) -> Judged {
        let (left, reason) = (round.left, if self.minima.has_waited() { Reason::AtMinimum } else { Reason::Fits });
        // A guest that was above may be so again, and one under a throttle pays for another round.
        if self.was_above || round.throttle.is_some() {
            return (Verdict::SwitchNow, reason, left);
        }
        let matters = self.pause(round, left).saturating_sub(self.goal.switch_cost);
        if matters <= self.goal.switch_cost.max(self.goal.downtime / 16) {
            return (Verdict::SwitchNow, reason, left);
        }
        // Another round costs its time and saves the difference, of the guest's time and of the migration's.
        let time = self.round_time(left);
        let next = self.curve.bounds(time).1;
        let end = self.elapsed.saturating_add(time).saturating_add(self.pause(round, next));
        if next > left / 2 || !self.in_time(end) {
            (Verdict::SwitchNow, Reason::NextCostsMore, left)
        } else {
            (Verdict::Converging { end }, Reason::StillHalving, next)
        }
    }

    /// A free round in the hope that the guest calms down: for a minimum that is due, or a short look.
    fn wait(&mut self, round: &Round, throttled: &Forecast) -> Option<Judged> {
        let now = self.elapsed;
        if let Some((due, lowest)) = self.minima.wait(now, round.left) {
            let end = due.saturating_add(self.round_time(lowest)).saturating_add(self.goal.downtime);
            if self.in_time(end) {
                return Some((Verdict::Converging { end }, Reason::MinimumDue, lowest));
            }
        }
        if self.activity.is_some_and(|(lowest, highest)| lowest > highest / 2) {
            return None;
        }
        let time = self.round_time(round.left);
        let looked = self.looked.saturating_add(time);
        let patience = mul_div(now, self.goal.patience.into(), 100);
        let first = self.looked == 0 && patience > 0 && time <= now / FIRST_LOOK;
        let end = throttled.end.saturating_add(time);
        (first || looked <= patience).then(|| {
            self.looked = looked;
            (Verdict::Converging { end }, Reason::Looking, round.left)
        })
    }

    /// The budget under which a round of `time` leaves what the downtime covers, less the margin.
    fn budget(&self, round: &Round, target: u64, time: Nanos) -> PageRate {
        let aim = target.saturating_sub(target / MARGIN);
        let by_devices = self.pages(mul_div(round.device_rate, time, SECOND));
        let pages = mul_div(aim.saturating_sub(by_devices), self.gain, UNIT);
        let least = self.bandwidth.saturating_sub(round.device_rate) / LEAST;
        PageRate::from_raw(mul_div(pages, SECOND << 10, time))
            .max(PageRate::from_bytes_per_sec(least, self.goal.page_size))
    }

    /// What a round of `time` leaves under a budget that is held.
    fn dirtied_under(&self, budget: PageRate, round: &Round, time: Nanos) -> u64 {
        let by_guest = mul_div(budget.raw(), time, SECOND << 10);
        by_guest.saturating_add(self.pages(mul_div(round.device_rate, time, SECOND)))
    }

    /// Follows rounds in which `dirtied` pages are dirtied, from what is left now until the downtime covers it.
    fn forecast(&self, round: &Round, target: u64, dirtied: impl Fn(&Self, Nanos) -> u64) -> Forecast {
        let (mut end, mut left, mut next) = (self.elapsed, round.left, None);
        for _ in 0..HORIZON {
            if left <= target {
                break;
            }
            let time = self.round_time(left);
            let after = dirtied(self, time);
            end = end.saturating_add(time);
            next = next.or(Some(after));
            if after > left - left / 16 {
                return Forecast { end, next: next.unwrap_or(left), last: after.max(target), arrives: false };
            }
            left = after;
        }
        let end = end.saturating_add(self.pause(round, left));
        Forecast { end, next: next.unwrap_or(left), last: left, arrives: left <= target }
    }
}

#[cfg(test)]
mod tests;
