//! One simulated migration under a rule.

use dirtylimit_core::PageRate;
use dirtylimit_core::migrate::{Goal, Migration, Reason, Round, Verdict};

use crate::guest::{Guest, MIB};

/// Pages are of 4 KiB.
const PAGE: f64 = 4096.0;
/// What a round does besides sending, in seconds: getting and clearing the log of 4 GiB.
const SYNC: f64 = 0.005;
/// Pausing, device state and resuming, in seconds.
pub(crate) const SWITCH: f64 = 0.020;
/// What takes longer has not finished, in seconds.
const TOO_LONG: f64 = 150.0;
/// A guest is watched every so often, and over as long, in seconds.
const WATCH: f64 = 0.25;

/// What carries the pages, and what else there is.
pub(crate) struct Link {
    /// Pages per second, by the time since the migration began.
    pub(crate) bandwidth: Box<dyn Fn(f64) -> f64>,
    /// Pages that the rings hold back while there is a budget, unless they are drained.
    pub(crate) held_back: f64,
    /// The limiter lets this many times the budget through.
    pub(crate) leak: f64,
    /// The sender leaves out pages that are dirty again when it comes to them, as Xen's does.
    pub(crate) skips: bool,
    /// Bytes of memory per second that devices dirty, in pages of their own.
    pub(crate) devices: f64,
}

impl Link {
    /// `mib` MiB per second, and nothing else.
    pub(crate) fn steady(mib: f64) -> Self {
        Self::changing(move |_| mib)
    }

    pub(crate) fn changing(mib: impl Fn(f64) -> f64 + 'static) -> Self {
        Self { bandwidth: Box::new(move |now| mib(now) * MIB), held_back: 0.0, leak: 1.0, skips: false, devices: 0.0 }
    }
}

/// How the migration is steered.
pub(crate) enum Rule {
    /// One limit from the beginning to the end, in pages per second; `None`: no throttle.
    Constant(Option<f64>),
    /// Half of the bandwidth that was measured last, from the first round on, which has all of it.
    Half,
    /// No throttle; the downtime allowed grows from 150 ms to 1,050, as in KubeVirt's VEP 291: from the third round on,
    /// by 150 ms every 5 s (its cooldown is a setting).
    Ramp,
    /// What is tested; told of rounds alone, or of samples as well.
    Goal(Box<Migration>, bool),
}

/// What came of it. Times in seconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) finished: bool,
    pub(crate) total: f64,
    /// Guest time lost, the downtime included.
    pub(crate) lost: f64,
    pub(crate) downtime: f64,
    pub(crate) rounds: usize,
    /// How often the budget fell by more than a quarter after it had risen by as much.
    pub(crate) swings: usize,
    /// What was left after each round, in pages, the budget put in force then, and why; the goal's alone.
    pub(crate) log: Vec<(f64, Option<PageRate>, Verdict, Reason)>,
}

struct Run<'a> {
    guest: &'a mut dyn Guest,
    link: &'a Link,
    now: f64,
    lost: f64,
    budget: Option<f64>,
}

impl Run<'_> {
    /// Lets the guest run while `send` pages are sent, and the sync after it. Returns how many were, and how long it took.
    fn round(&mut self, send: f64, mut sample: impl FnMut(f64, &dyn Guest)) -> (f64, f64) {
        self.guest.clear();
        let (mut sent, mut rest, mut sending, mut next_sample) = (0.0, send, 0.0_f64, 0.02);
        while rest > 0.0 {
            let bandwidth = (self.link.bandwidth)(self.now);
            // Short while much is clean, and short against what changes in time.
            let step = (sending / 16.0).clamp(0.001, 0.05).min(rest / bandwidth);
            let dirty = self.guest.dirty();
            sending += step;
            sent += bandwidth * step;
            self.step(step);
            // Of what is dirtied, so much was still to be sent.
            let again = if self.link.skips { (self.guest.dirty() - dirty) * rest / send } else { 0.0 };
            rest -= bandwidth * step + again;
            if rest < 1e-6 {
                rest = 0.0;
            }
            if sending >= next_sample {
                sample(sending, self.guest);
                next_sample += next_sample.min(WATCH);
            }
        }
        self.step(SYNC);
        (sent, sending)
    }

    fn step(&mut self, time: f64) {
        self.now += time;
        self.lost += time - self.guest.run(time, self.budget.map(|budget| budget * self.link.leak));
    }
}

pub(crate) fn nanos(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}

fn rate(pages: f64) -> PageRate {
    PageRate::from_bytes_per_sec((pages * PAGE) as u64, PAGE as u32)
}

/// The goal of the simulation: `downtime` in seconds, the switch at what it costs.
pub(crate) fn goal(downtime: f64) -> Goal {
    Goal { switch_cost: nanos(SWITCH), ..Goal::new(nanos(downtime)) }
}

/// Migrates the guest, with `downtime` seconds allowed.
pub(crate) fn migrate(guest: &mut dyn Guest, link: &Link, downtime: f64, rule: &mut Rule) -> Outcome {
    let mut outcome = Outcome::default();
    let budget = match rule {
        Rule::Constant(limit) => *limit,
        Rule::Half => Some((link.bandwidth)(0.0) / 2.0),
        Rule::Ramp | Rule::Goal(..) => None,
    };
    let mut left = guest.memory();
    let (mut run, mut held, mut rose) = (Run { guest, link, now: 0.0, lost: 0.0, budget }, 0.0, false);
    let mut third = None;
    while run.now < TOO_LONG && outcome.rounds < 2000 {
        let (began, send) = (run.now, left - held);
        let (sent, sending) = run.round(send, |time, guest| {
            if let Rule::Goal(migration, false) = &mut *rule {
                migration.sample(nanos(time), guest.dirty() as u64);
                migration.watch(nanos(WATCH), guest.activity(WATCH) as u64);
            }
        });
        outcome.rounds += 1;
        let length = run.now - began;
        let by_devices = link.devices / PAGE * length;
        let redirtied = run.guest.dirty() + by_devices;
        left = redirtied.max(held);
        let bandwidth = sent / sending;
        let fits = |downtime: f64| left / bandwidth + SWITCH <= downtime;
        let before = run.budget;
        let switch = match rule {
            Rule::Constant(_) => fits(downtime),
            Rule::Half => {
                run.budget = Some(bandwidth / 2.0);
                fits(downtime)
            }
            Rule::Ramp => {
                third = third.or((outcome.rounds == 3).then_some(run.now));
                let steps = third.map_or(0.0, |third: f64| ((run.now - third) / 5.0).floor());
                fits((0.15 + 0.15 * steps).min(1.05))
            }
            Rule::Goal(migration, _) => {
                let plan = migration.finish_round(&Round {
                    sent: (sent * PAGE) as u64,
                    sending: nanos(sending),
                    length: nanos(length),
                    left: left as u64,
                    redirtied: redirtied as u64,
                    held_back: held as u64,
                    device_rate: link.devices as u64,
                    throttle: run.budget.map(rate),
                    ..Round::default()
                });
                outcome.log.push((left, plan.budget, plan.verdict, plan.reason));
                run.budget = plan.budget.map(|budget| budget.bytes_per_sec(PAGE as u32) as f64 / PAGE);
                held = if run.budget.is_some() && !plan.drain { link.held_back.min(left) } else { 0.0 };
                match plan.verdict {
                    Verdict::SwitchNow => true,
                    Verdict::Stalled | Verdict::Unreachable { .. } => break,
                    _ => false,
                }
            }
        };
        let (old, new) = (before.unwrap_or(f64::INFINITY), run.budget.unwrap_or(f64::INFINITY));
        if new < old * 0.75 {
            outcome.swings += usize::from(rose);
            rose = false;
        } else if new > old * 1.25 {
            rose = true;
        }
        if switch {
            outcome.finished = true;
            outcome.downtime = left / (link.bandwidth)(run.now) + SWITCH;
            break;
        }
    }
    outcome.total = run.now + outcome.downtime;
    outcome.lost = run.lost + outcome.downtime;
    outcome
}
