//! What decides, after each round, how the migration goes on.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use dirtylimit_core::PageRate;
use dirtylimit_core::migrate::{Goal, Migration, Round, Verdict};
use serde::{Serialize, Serializer};

use super::link::End;
use crate::units::{PAGE_SIZE, Rate, mib_per_sec, parse_rate, significant};

/// What a switch costs besides sending: stopping the vCPUs, their state, starting them on the other side.
pub(super) const SWITCH_COST: Duration = Duration::from_millis(15);
/// Modes that know no goal give up after this, unless a deadline is given.
const PATIENCE: Duration = Duration::from_secs(60);

/// The rule that steers a migration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// No throttle.
    None,
    /// All vCPUs are kept out of the guest for a share of the time, 20 % at first and 10 more as long as the guest dirties
    /// half of what is sent, as QEMU's auto-converge does.
    Uniform,
    /// One budget of the VM from the beginning.
    Fixed(PageRate),
    /// No throttle; the downtime allowed grows from 150 ms to 1,050 ms: from the third round on by 150 ms every 5 s.
    Ramp,
    /// Half of the bandwidth as the budget of the VM.
    Half,
    /// The library's own: as much throttle as the goal needs.
    Goal,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Uniform => f.write_str("uniform"),
            Self::Fixed(rate) => write!(f, "fixed={}", Rate(*rate).to_string().replace(' ', "")),
            Self::Ramp => f.write_str("ramp"),
            Self::Half => f.write_str("half"),
            Self::Goal => f.write_str("goal"),
        }
    }
}

impl Serialize for Mode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const ALLOWED: &str = "a mode is none, uniform, fixed=RATE (fixed=50MiB/s), ramp, half or goal";
        match text.split_once('=') {
            Some(("fixed", rate)) => parse_rate(rate).map(Self::Fixed),
            _ => match text {
                "none" => Ok(Self::None),
                "uniform" => Ok(Self::Uniform),
                "ramp" => Ok(Self::Ramp),
                "half" => Ok(Self::Half),
                "goal" => Ok(Self::Goal),
                "fixed" => Err(format!("`fixed` lacks its rate: {ALLOWED}")),
                _ => Err(format!("unknown mode `{text}`: {ALLOWED}")),
            },
        }
    }
}

/// What is in force until the next round ends.
#[derive(Debug, Default)]
pub(super) struct Next {
    /// In a word, or a few.
    pub(super) verdict: String,
    /// Why.
    pub(super) reason: String,
    /// The budget of the VM.
    pub(super) budget: Option<PageRate>,
    /// Percent of the time that all vCPUs are kept out of the guest.
    pub(super) held_percent: u32,
    /// Stop the guest and send the rest.
    pub(super) switch: bool,
    /// The next round is to drain the rings.
    pub(super) drain: bool,
    /// When it should be over, since it began.
    pub(super) end: Option<Duration>,
    /// End it: the goal cannot be met.
    pub(super) give_up: Option<End>,
}

/// A mode at work.
#[derive(Debug)]
pub(super) struct Steering {
    mode: Mode,
    downtime: Duration,
    deadline: Option<Duration>,
    /// Go on after [`Verdict::Unreachable`] and [`Verdict::Stalled`].
    carry_on: bool,
    /// The mode `goal`'s; it observes the others.
    migration: Migration,
    rounds: u32,
    elapsed: Duration,
    third: Duration,
    /// What was sent and dirtied, in bytes, since the mode `uniform` last judged, and for how long.
    period: (u64, u64, Duration),
    dirtied_much: u32,
    held_percent: u32,
}

impl Steering {
    pub(super) fn new(mode: Mode, downtime: Duration, deadline: Option<Duration>, carry_on: bool) -> Self {
        let goal = Goal {
            deadline: deadline.map(nanos),
            switch_cost: nanos(SWITCH_COST),
            page_size: PAGE_SIZE,
            observe: mode != Mode::Goal,
            ..Goal::new(nanos(downtime))
        };
        Self {
            mode,
            downtime,
            deadline,
            carry_on,
            migration: Migration::new(goal),
            rounds: 0,
            elapsed: Duration::ZERO,
            third: Duration::ZERO,
            period: (0, 0, Duration::ZERO),
            dirtied_much: 0,
            held_percent: 0,
        }
    }

    /// What is in force in the first round, over a wire of `bandwidth`.
    pub(super) fn first(&self, bandwidth: Option<PageRate>) -> Next {
        let budget = match self.mode {
            Mode::Fixed(rate) => Some(rate),
            Mode::Half => bandwidth.map(half),
            _ => None,
        };
        Next { budget, ..Next::default() }
    }

    /// Distinct pages that were dirtied since the round began, `into_round` ago.
    pub(super) fn sample(&mut self, into_round: Duration, redirtied: u64) {
        self.migration.sample(nanos(into_round), redirtied);
    }

    /// Whether it matters that a guest rests.
    pub(super) fn wants_rests(&self) -> bool {
        self.mode == Mode::Goal
    }

    /// Ring entries of the last `time`.
    pub(super) fn watch(&mut self, time: Duration, entries: u64) {
        self.migration.watch(nanos(time), entries);
    }

    /// A round has ended.
    pub(super) fn finish_round(&mut self, round: &Round) -> Next {
        self.rounds += 1;
        self.elapsed += Duration::from_nanos(round.length);
        if self.rounds == 3 {
            self.third = self.elapsed;
        }
        if self.mode == Mode::Goal { self.goal(round) } else { self.by_rule(round) }
    }

    fn goal(&mut self, round: &Round) -> Next {
        let plan = self.migration.finish_round(round);
        let mut next = Next {
            verdict: plan.verdict.name().to_owned(),
            reason: plan.reason.to_string(),
            budget: plan.budget,
            drain: plan.drain,
            switch: plan.verdict == Verdict::SwitchNow,
            ..Next::default()
        };
        match plan.verdict {
            Verdict::Converging { end } | Verdict::Throttle { end, .. } => next.end = Some(Duration::from_nanos(end)),
            Verdict::Stalled => {
                let why = format!("it is stalled: {}; postcopy would help", plan.reason);
                next.give_up = (!self.carry_on).then_some(End::Stalled(why));
            }
            Verdict::Unreachable { needs } => {
                let needs = Duration::from_nanos(needs).as_millis();
                let why = format!("the goal is out of reach: {}; a downtime of {needs} ms would do", plan.reason);
                next.give_up = (!self.carry_on).then_some(End::Unreachable(why));
            }
            _ => {}
        }
        next
    }

    fn by_rule(&mut self, round: &Round) -> Next {
        let measured = u128::from(round.sent) * 1_000_000_000 / u128::from(round.sending.max(1));
        let bandwidth = u64::try_from(measured).unwrap_or(u64::MAX).max(1);
        let left = round.left as f64 * f64::from(PAGE_SIZE);
        let pause = SWITCH_COST.as_secs_f64() + left / bandwidth as f64;
        let allowed = self.allowed();
        if self.mode == Mode::Uniform {
            self.slow_down(round);
        }
        let budget = match self.mode {
            Mode::Fixed(rate) => Some(rate),
            Mode::Half => Some(half(PageRate::from_bytes_per_sec(bandwidth, PAGE_SIZE))),
            _ => None,
        };
        let switch = pause <= allowed.as_secs_f64();
        let compared = if switch { "at most" } else { "more than" };
        let deadline = self.deadline.unwrap_or(PATIENCE);
        let give_up = (!switch && self.elapsed >= deadline).then(|| {
            let left = significant(left / f64::from(1 << 20), 3);
            End::Unreachable(format!("{left} MiB are left after {deadline:?}, and the mode `{}` gives up", self.mode))
        });
        Next {
            verdict: if switch { "switch-now" } else { "another-round" }.to_owned(),
            reason: format!("{:.0} ms for what is left, {compared} {} ms", 1e3 * pause, allowed.as_millis()),
            budget,
            held_percent: self.held_percent,
            switch,
            drain: false,
            end: None,
            give_up,
        }
    }

    /// The downtime that is allowed now.
    fn allowed(&self) -> Duration {
        if self.mode != Mode::Ramp {
            return self.downtime;
        }
        let steps = if self.rounds < 3 { 0 } else { (self.elapsed - self.third).as_secs() / 5 };
        Duration::from_millis((150 + 150 * steps).min(1_050))
    }

    /// As QEMU's `migration_trigger_throttle` by its defaults: at least every second, more than half of what was sent was
    /// dirtied, twice.
    fn slow_down(&mut self, round: &Round) {
        let (sent, dirtied, time) = &mut self.period;
        *sent += round.sent;
        *dirtied += round.redirtied.saturating_mul(PAGE_SIZE.into());
        *time += Duration::from_nanos(round.length);
        if *time < Duration::from_secs(1) {
            return;
        }
        let much = *dirtied > *sent / 2;
        self.period = (0, 0, Duration::ZERO);
        self.dirtied_much += u32::from(much);
        if self.dirtied_much >= 2 {
            self.dirtied_much = 0;
            self.held_percent = if self.held_percent == 0 { 20 } else { (self.held_percent + 10).min(99) };
        }
    }
}

fn half(rate: PageRate) -> PageRate {
    PageRate::from_bytes_per_sec((rate.bytes_per_sec(PAGE_SIZE) / 2).max(1), PAGE_SIZE)
}

/// A budget in MiB/s.
pub(super) fn mib_s(budget: Option<PageRate>) -> Option<f64> {
    budget.map(|rate| mib_per_sec(rate, PAGE_SIZE))
}

/// Time as the library counts it.
pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn mib_s(mib: u64) -> PageRate {
        PageRate::from_bytes_per_sec(mib * MIB, PAGE_SIZE)
    }

    fn round(sent: u64, left: u64) -> Round {
        let pages = left * MIB / u64::from(PAGE_SIZE);
        let length = 1_000_000_000 * sent / 200;
        Round { sent: sent * MIB, sending: length, length, left: pages, redirtied: pages, ..Round::default() }
    }

    fn steering(mode: Mode) -> Steering {
        Steering::new(mode, Duration::from_millis(300), None, false)
    }

    #[test]
    fn a_mode_reads_back() {
        for text in ["none", "uniform", "fixed=50MiB/s", "ramp", "half", "goal"] {
            assert_eq!(text.parse::<Mode>().unwrap().to_string(), text);
        }
        for text in ["", "fixed", "fixed=", "fixed=none", "auto", "half=2"] {
            assert!(text.parse::<Mode>().is_err(), "{text}");
        }
    }

    #[test]
    fn none_switches_when_the_rest_fits_and_gives_up_after_a_minute() {
        let mut none = steering(Mode::None);
        let next = none.finish_round(&round(200, 100));
        assert!(!next.switch && next.budget.is_none() && next.give_up.is_none());
        assert!(none.finish_round(&round(200, 56)).switch, "280 ms and the switch");
        assert!(!none.finish_round(&round(200, 58)).switch, "290 ms and the switch");
        for _ in 4..60 {
            assert!(none.finish_round(&round(200, 100)).give_up.is_none());
        }
        assert!(matches!(none.finish_round(&round(200, 100)).give_up, Some(End::Unreachable(_))));
    }

    #[test]
    fn half_is_half_of_what_was_measured() {
        let mut half = steering(Mode::Half);
        assert_eq!(half.first(Some(mib_s(300))).budget, Some(mib_s(150)));
        assert_eq!(half.finish_round(&round(100, 224)).budget, Some(mib_s(100)));
    }

    #[test]
    fn the_ramp_begins_at_the_third_round() {
        let mut ramp = steering(Mode::Ramp);
        // 120 MiB take 615 ms with the switch: from the fourth step on.
        let switched = (1..).find(|_| ramp.finish_round(&round(200, 120)).switch);
        assert_eq!(switched, Some(3 + 20), "3 s, and four steps of 5 s");
    }

    #[test]
    fn uniform_slows_down_at_every_second_round_that_dirties_much() {
        let mut uniform = steering(Mode::Uniform);
        let held: Vec<_> = (0..6).map(|_| uniform.finish_round(&round(200, 150)).held_percent).collect();
        assert_eq!(held, [0, 20, 20, 30, 30, 40]);
        assert_eq!(uniform.finish_round(&round(200, 99)).held_percent, 40);
        assert!((0..40).map(|_| uniform.finish_round(&round(200, 150)).held_percent).all(|held| held <= 99));
    }

    #[test]
    fn the_goal_is_told_as_the_library_says_it() {
        let mut goal = steering(Mode::Goal);
        goal.sample(Duration::from_millis(100), 57_344);
        let next = goal.finish_round(&round(200, 224));
        assert_eq!(next.verdict, "throttle");
        assert!(next.drain, "a ring that holds nothing back yet will, and then the goal would be out of reach");
        assert!(next.budget.is_some_and(|budget| budget < mib_s(60)) && next.end.is_some() && next.give_up.is_none());
        let mut tight = Steering::new(Mode::Goal, Duration::from_millis(10), None, false);
        let given_up = tight.finish_round(&round(200, 224)).give_up;
        assert!(matches!(given_up, Some(End::Unreachable(why)) if why.contains("would do")));
        let mut going_on = Steering::new(Mode::Goal, Duration::from_millis(10), None, true);
        assert!(going_on.finish_round(&round(200, 224)).give_up.is_none());
    }
}
