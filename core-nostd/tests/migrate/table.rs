//! The table: rows, what they are compared with, and what they are held to.

use std::fmt::Write as _;

use dirtylimit_core::migrate::{Goal, Migration};

use crate::guest::{Guest, MIB};
use crate::run::{Link, Outcome, Rule, goal, migrate};

/// Allowed in every row, in seconds.
pub(crate) const DOWNTIME: f64 = 0.3;

/// A row of the table.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) guest: Box<dyn Fn() -> Box<dyn Guest>>,
    /// In MiB/s, at the beginning.
    pub(crate) bandwidth: f64,
    pub(crate) link: Link,
    pub(crate) goal: Goal,
    /// The migration is told of rounds alone: neither samples nor what is watched.
    pub(crate) rounds_alone: bool,
    /// What the ratios of total and of lost time to the best constant limit's may be at most, and why they are above 1.1.
    pub(crate) bounds: (f64, f64),
    pub(crate) why: &'static str,
}

/// The constant limits that are tried, in pages per second: none, and twice the bandwidth down to a 64th.
fn limits(bandwidth: f64) -> Vec<Option<f64>> {
    let steps = (0..=28).map(|step| Some(bandwidth * MIB * 2.0 * (-f64::from(step) / 4.0).exp2()));
    [None].into_iter().chain(steps).collect()
}

impl Row {
    pub(crate) fn new(name: String, guest: impl Fn() -> Box<dyn Guest> + 'static, bandwidth: f64) -> Self {
        let link = Link::steady(bandwidth);
        let (guest, goal, bounds) = (Box::new(guest), goal(DOWNTIME), (1.1, 1.1));
        Self { name, guest, bandwidth, link, goal, rounds_alone: false, bounds, why: "" }
    }

    /// The rows beyond 1.1. In most of them the best limit is none, for the guest comes to rest after a while, which nothing
    /// tells beforehand. How much time such hopes are given is the goal's patience.
    pub(crate) fn with_bounds(self) -> Self {
        const REST: &str = "the best waits for a rest";
        const BUILD: &str = "the best waits for the end of the build";
        const DECAY: &str = "the best waits for the decay";
        const FIRST: &str = "the best throttles from the first page on";
        let (total, lost, why) = match (self.name.as_str(), self.bandwidth as u32) {
            ("phases 512", 800) => (1.0, 3.3, "0.2 s: the best happens to end in a rest"),
            ("decay 64", 200) => (1.0, 1.2, "0.04 s: a margin below what is allowed"),
            ("decay 224", 200) => (0.9, 2.4, DECAY),
            ("compile 64", 50) => (0.8, 5.0, BUILD),
            ("compile 224", 50) => (0.85, 17.0, BUILD),
            ("compile 512", 50) => (0.95, 42.0, BUILD),
            ("compile 224" | "compile 512", 200) => (0.5, 6.0, BUILD),
            ("burst 224", 50) => (0.9, 8.3, REST),
            ("sqlite", 4) => (1.0, 5.2, REST),
            ("phases × 2", _) => (1.0, 24.0, REST),
            ("decay × 0.5", _) => (0.6, 9.2, DECAY),
            ("compile × 0.5", _) => (0.5, 6.6, BUILD),
            ("compile, rounds", _) => (0.5, 2.8, BUILD),
            ("hot, rounds", _) => (1.12, 1.1, "two free rounds more than with samples"),
            ("plateau of 256" | "plateau, skip", _) => (2.1, 1.1, FIRST),
            ("hot of 256" | "hot, skip", _) => (2.1, 1.35, FIRST),
            ("phases of 256" | "phases, skip", _) => (0.8, 4.5, REST),
            ("decay of 256" | "decay, skip", _) => (0.15, 4.8, DECAY),
            _ => return self,
        };
        Self { bounds: (total, lost), why, ..self }
    }

    fn run(&self, rule: &mut Rule) -> Outcome {
        migrate(&mut *(self.guest)(), &self.link, self.goal.downtime as f64 / 1e9, rule)
    }

    fn run_goal(&self) -> Outcome {
        self.run(&mut Rule::Goal(Box::new(Migration::new(self.goal)), self.rounds_alone))
    }

    /// The best constant limit, in MiB/s.
    fn best(&self) -> (Option<f64>, Outcome) {
        let tried = limits(self.bandwidth).into_iter().map(|limit| (limit, self.run(&mut Rule::Constant(limit))));
        let done: Vec<_> = tried.filter(|(_, outcome)| outcome.finished).collect();
        let least = done.iter().map(|(_, outcome)| outcome.lost).fold(f64::INFINITY, f64::min);
        let good = done.into_iter().filter(|(_, outcome)| outcome.lost <= 1.01 * least);
        let (limit, outcome) = good.min_by(|a, b| a.1.total.total_cmp(&b.1.total)).expect("the lowest limit will do");
        (limit.map(|limit| limit / MIB), outcome)
    }
}

/// The rows of one section, run, and what is wrong with them.
#[derive(Default)]
pub(crate) struct Table {
    pub(crate) text: String,
    pub(crate) complaints: String,
    totals: Vec<f64>,
    losts: Vec<f64>,
    /// Total and lost time of the goal and of half of the bandwidth, where both finish.
    sums: [f64; 4],
}

fn median_and_worst(ratios: &[f64]) -> String {
    let mut sorted = ratios.to_vec();
    sorted.sort_by(f64::total_cmp);
    format!("median {:.2}, worst {:.2}", sorted[sorted.len() / 2], sorted[sorted.len() - 1])
}

impl Table {
    pub(crate) fn heading(&mut self, title: &str) {
        writeln!(self.text, "{title}").unwrap();
        let (best, goal) = ("best constant: limit, s, lost", "goal: s, lost, down, rounds");
        let (half, ramp) = ("half: s, lost", "ramp: s, lost, down");
        writeln!(
            self.text,
            "{:<15}{:>6}  {best:>30}  {goal:>31}  total ÷  lost ÷  {half:>14}  {ramp:>20}",
            "guest", "MiB/s"
        )
        .unwrap();
    }

    pub(crate) fn row(&mut self, row: &Row) {
        let ((limit, best), goal, half) = (row.best(), row.run_goal(), row.run(&mut Rule::Half));
        let ramp = row.run(&mut Rule::Ramp);
        let ratios = (goal.total / best.total, goal.lost / best.lost);
        let limit = limit.map_or("none".into(), |limit| format!("{limit:.2}"));
        let or_never = |outcome: &Outcome, down| match outcome {
            Outcome { finished: false, .. } => "never".into(),
            Outcome { total, lost, downtime, .. } if down => format!("{total:7.2}{lost:7.2}{downtime:6.2}"),
            Outcome { total, lost, .. } => format!("{total:7.2}{lost:7.2}"),
        };
        let ours = format!("{:8.2}{:7.2}{:8.3}{:8}", goal.total, goal.lost, goal.downtime, goal.rounds);
        let line = format!(
            "{:<15}{:>6}  {limit:>14}{:8.2}{:8.2}  {ours}  {:7.2} {:7.2}  {:>14}  {:>20}  {}",
            row.name,
            row.bandwidth,
            best.total,
            best.lost,
            ratios.0,
            ratios.1,
            or_never(&half, false),
            or_never(&ramp, true),
            row.why
        );
        let line = line.trim_end();
        writeln!(self.text, "{line}").unwrap();
        let mut complain = |what: &str| writeln!(self.complaints, "{line}\n  {what}").unwrap();
        if !goal.finished {
            complain("it has not finished");
        }
        if goal.downtime * 1e9 > row.goal.downtime as f64 * 1.01 {
            complain("the downtime is missed");
        }
        if goal.swings > 0 {
            complain("the budget swings");
        }
        if ratios.0 > row.bounds.0 || ratios.1 > row.bounds.1 {
            complain("out of bounds");
        }
        self.totals.push(ratios.0);
        self.losts.push(ratios.1);
        if half.finished {
            for (sum, value) in self.sums.iter_mut().zip([goal.total, goal.lost, half.total, half.lost]) {
                *sum += value;
            }
            if goal.lost > 1.01 * half.lost {
                complain("half loses less");
            }
        }
        if ramp.finished && ramp.downtime <= goal.downtime * 0.99 && ramp.total < 0.99 * goal.total {
            complain("the ramp is better");
        }
    }

    pub(crate) fn summary(&mut self) {
        let [total, lost, half_total, half_lost] = self.sums;
        writeln!(self.text, "total ÷ best constant's: {}", median_and_worst(&self.totals)).unwrap();
        writeln!(self.text, "lost ÷ best constant's: {}", median_and_worst(&self.losts)).unwrap();
        writeln!(self.text, "all together: total {:.2}, lost {:.2} of half's\n", total / half_total, lost / half_lost)
            .unwrap();
    }
}

/// Compares the text with the snapshot, line by line.
pub(crate) fn check_snapshot(text: &str) {
    const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/migrate/table.txt");
    if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
        return std::fs::write(SNAPSHOT, text).unwrap();
    }
    let old = std::fs::read_to_string(SNAPSHOT).unwrap_or_default();
    let mut difference = String::new();
    let (mut before, mut now) = (old.lines(), text.lines());
    loop {
        let lines = (before.next(), now.next());
        if lines.0 != lines.1 {
            write!(difference, "- {}\n+ {}\n", lines.0.unwrap_or_default(), lines.1.unwrap_or_default()).unwrap();
        }
        if lines == (None, None) {
            break;
        }
    }
    assert!(difference.is_empty(), "{SNAPSHOT} has changed; UPDATE_SNAPSHOT=1 accepts it:\n{difference}");
}
