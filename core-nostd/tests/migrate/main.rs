//! Migrations simulated round by round, and a table of them as the regression test of the goal-driven budget: beside the
//! best constant limit, half of the bandwidth, and a downtime that grows.
//!
//! `UPDATE_SNAPSHOT=1 cargo test -p dirtylimit-core --test migrate` rewrites the table.
//!
//! *Lost* is guest time: total × (1 − work kept), the downtime included. The *best* constant limit is the one, in force
//! from the first round to the last and switched from as soon as the downtime covers what is left, that loses the least
//! guest time; of those within 1 % of that, the fastest. It is found by trying all of them, knowing the guest's future.
//! The goal's total and lost time are both compared with that one run.

#![expect(clippy::cast_possible_truncation, reason = "small numbers")]

mod guest;
mod run;

use std::fmt::Write as _;

use dirtylimit_core::migrate::{Goal, Migration, Reason, Verdict};
use guest::{Guest, MIB, Region, Synthetic, Traced};
use run::{Link, Outcome, Rule, SWITCH, goal, migrate, nanos};

/// Allowed in every row, in seconds.
const DOWNTIME: f64 = 0.3;
const MEMORY: f64 = 4096.0 * MIB;

const SHAPES: [&str; 7] = ["plateau", "phases", "decay", "compile", "zipf", "hot", "burst"];

fn triangle(now: f64, period: f64) -> f64 {
    let phase = (now / period).fract();
    2.0 * phase.min(1.0 - phase)
}

/// A guest of the shape that writes to `set` MiB at most, of `memory` pages.
fn shape(name: &str, set: f64, memory: f64) -> Synthetic {
    let pages = set * MIB;
    let constant = move |_| pages;
    let rate = |mib: f64| move |_| mib * MIB;
    let regions = match name {
        // A loop over its memory, faster than any wire.
        "plateau" => vec![Region::new(constant, rate(1500.0)).in_order()],
        // A database: flushes for 1.5 s, then for 1 s little but its log.
        "phases" => {
            let flush = move |now: f64| if now % 2.5 < 1.5 { 1000.0 * MIB } else { 0.0 };
            vec![Region::new(constant, flush), Region::new(|_| 4.0 * MIB, rate(20.0))]
        }
        // A store that fills up and settles: half as much every 15 s.
        "decay" => vec![Region::new(constant, |now: f64| 800.0 * MIB * (-now / 15.0).exp2())],
        // A build: what it works on grows and falls, over a minute.
        "compile" => vec![Region::new(move |now| pages * triangle(now, 60.0).max(0.02), rate(400.0))],
        // 200,000 writes a second by Zipf's law with an exponent of 0.99: an octave of ranks is a region.
        "zipf" => {
            let octaves: Vec<_> = (0..(pages.log2() as u32)).map(|octave| f64::from(octave).exp2()).collect();
            let weight = |first: f64| first.powf(1.0 - 0.99);
            let sum: f64 = octaves.iter().map(|&first| weight(first)).sum();
            octaves.iter().map(|&first| Region::new(move |_| first, move |_| 2e5 * weight(first) / sum)).collect()
        }
        "hot" => {
            let calm = || vec![Region::new(|_| 16.0 * MIB, rate(4.0))];
            let hot = vec![Region::new(constant, rate(1500.0)).in_order()];
            return Synthetic::new(memory, vec![hot, calm(), calm(), calm()]);
        }
        "burst" => vec![Region::new(constant, |now| if now % 8.0 < 6.0 { 2.0 * MIB } else { 1500.0 * MIB }).in_order()],
        _ => unreachable!("{name}"),
    };
    Synthetic::new(memory, vec![regions])
}

/// A row of the table.
struct Row {
    name: String,
    guest: Box<dyn Fn() -> Box<dyn Guest>>,
    /// In MiB/s, at the beginning.
    bandwidth: f64,
    link: Link,
    goal: Goal,
    /// The migration is told of rounds alone: neither samples nor what is watched.
    rounds_alone: bool,
    /// What the ratios of total and of lost time to the best constant limit's may be at most, and why they are above 1.1.
    bounds: (f64, f64),
    why: &'static str,
}

/// The constant limits that are tried, in pages per second: none, and twice the bandwidth down to a 64th.
fn limits(bandwidth: f64) -> Vec<Option<f64>> {
    let steps = (0..=28).map(|step| Some(bandwidth * MIB * 2.0 * (-f64::from(step) / 4.0).exp2()));
    [None].into_iter().chain(steps).collect()
}

impl Row {
    fn new(name: String, guest: impl Fn() -> Box<dyn Guest> + 'static, bandwidth: f64) -> Self {
        let link = Link::steady(bandwidth);
        let (guest, goal, bounds) = (Box::new(guest), goal(DOWNTIME), (1.1, 1.1));
        Self { name, guest, bandwidth, link, goal, rounds_alone: false, bounds, why: "" }
    }

    fn shape(name: &'static str, set: f64, bandwidth: f64) -> Self {
        let guest = move || -> Box<dyn Guest> { Box::new(shape(name, set, MEMORY)) };
        Self::new(format!("{name} {set}"), guest, bandwidth)
    }

    /// The rows beyond 1.1. In most the best limit is none, and the guest comes to rest after a while: that is known to who
    /// has tried it. How much time is given to such hopes is the goal's patience.
    fn with_bounds(self) -> Self {
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
struct Table {
    text: String,
    complaints: String,
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
    fn heading(&mut self, title: &str) {
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

    fn row(&mut self, row: &Row) {
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

    fn summary(&mut self) {
        let [total, lost, half_total, half_lost] = self.sums;
        writeln!(self.text, "total ÷ best constant's: {}", median_and_worst(&self.totals)).unwrap();
        writeln!(self.text, "lost ÷ best constant's: {}", median_and_worst(&self.losts)).unwrap();
        writeln!(self.text, "all together: total {:.2}, lost {:.2} of half's\n", total / half_total, lost / half_lost)
            .unwrap();
    }
}

fn traced(trace: &'static [u8], name: &str) -> Vec<Row> {
    // A window of 250,000 instructions is 10 ms of guest time; nine tenths of the memory is idle.
    let guest = Traced::new(trace, 9.0, 0.010);
    let set = guest.written() / MIB;
    // The wire carries what is written at all in so many seconds.
    let rows = [0.5, 2.0, 8.0].map(|seconds| {
        let guest = guest.clone();
        let bandwidth = (set / seconds * 100.0).round() / 100.0;
        Row::new(name.into(), move || Box::new(guest.clone()), bandwidth)
    });
    rows.into()
}

fn sections() -> Vec<(&'static str, Vec<Row>)> {
    let mut shapes = Vec::new();
    for name in SHAPES {
        for set in [64.0, 224.0, 512.0] {
            shapes.extend([50.0, 200.0, 800.0].map(|bandwidth| Row::shape(name, set, bandwidth)));
        }
    }
    let mut traces = traced(include_bytes!("sqlite.trace"), "sqlite");
    traces.extend(traced(include_bytes!("gcc.trace"), "gcc"));
    let changing = SHAPES.into_iter().flat_map(|name| {
        [0.5, 2.0].map(|factor| {
            let row = Row::shape(name, 224.0, 200.0);
            // In the middle of the second round, where there is one.
            let link = Link::changing(move |now| if now < 21.0 { 200.0 } else { 200.0 * factor });
            Row { name: format!("{name} × {factor}"), link, ..row }
        })
    });
    let patient =
        [("compile", 224.0, 50.0), ("compile", 512.0, 200.0), ("decay", 224.0, 200.0), ("burst", 224.0, 50.0)];
    let patient = patient.map(|(name, set, bandwidth)| {
        let goal = Goal { patience: 150, ..goal(DOWNTIME) };
        Row { goal, ..Row::shape(name, set, bandwidth) }
    });
    let small = |name: &'static str, what: &str| {
        let guest = move || -> Box<dyn Guest> { Box::new(shape(name, 224.0, 256.0 * MIB)) };
        Row::new(format!("{name}{what}"), guest, 200.0)
    };
    let hot = SHAPES.map(|name| small(name, " of 256"));
    let told_less = SHAPES.map(|name| Row {
        name: format!("{name}, rounds"),
        rounds_alone: true,
        ..Row::shape(name, 224.0, 200.0)
    });
    let skipping =
        SHAPES.map(|name| Row { link: Link { skips: true, ..Link::steady(200.0) }, ..small(name, ", skip") });
    let bounded = |rows: Vec<Row>| rows.into_iter().map(Row::with_bounds).collect();
    vec![
        ("4 GiB, working sets of 64 to 512 MiB, a downtime of 300 ms", bounded(shapes)),
        ("Recorded programs, nine tenths of the memory idle", bounded(traces)),
        ("4 GiB, 224 MiB; the bandwidth halves or doubles after 21 s", bounded(changing.collect())),
        ("Told of rounds alone", bounded(told_less.into())),
        ("With a patience of 150 %", patient.into()),
        ("256 MiB, of which 224 are written", bounded(hot.into())),
        ("The same, and the sender leaves out what is dirty again", bounded(skipping.into())),
    ]
}

/// Compares the text with the snapshot, line by line.
fn check_snapshot(text: &str) {
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

#[test]
fn the_table_is_as_it_was_and_within_bounds() {
    let (mut text, mut complaints) = (String::new(), String::new());
    for (title, rows) in sections() {
        let mut table = Table::default();
        table.heading(title);
        rows.iter().for_each(|row| table.row(row));
        table.summary();
        text += &table.text;
        complaints += &table.complaints;
    }
    check_snapshot(&text);
    assert!(complaints.is_empty(), "{complaints}");
}

#[test]
fn the_bounds_see_bad_rules() {
    let complaints = |name, change: fn(&mut Goal)| {
        let mut row = Row::shape(name, 224.0, 200.0);
        change(&mut row.goal);
        let mut table = Table::default();
        table.row(&row);
        table.complaints
    };
    assert_eq!(complaints("phases", |_| {}), "");
    assert!(complaints("phases", |goal| goal.patience = 50).contains("out of bounds"), "waits too long");
    assert!(complaints("plateau", |goal| goal.observe = true).contains("not finished"), "never throttles");
    assert!(
        complaints("plateau", |goal| goal.bandwidth = Some(300 << 20)).contains("downtime is missed"),
        "hopes for more"
    );
}

/// A migration of a loop over 224 MiB, or of any other guest.
fn migrate_over(link: &Link, goal: Goal, guest: &mut dyn Guest) -> Outcome {
    migrate(guest, link, goal.downtime as f64 / 1e9, &mut Rule::Goal(Box::new(Migration::new(goal)), false))
}

fn looping() -> Synthetic {
    shape("plateau", 224.0, MEMORY)
}

#[test]
fn short_downtimes_are_met_or_said_to_be_out_of_reach_within_two_rounds() {
    for bandwidth in [50.0, 200.0, 800.0] {
        for downtime in [0.015, 0.025, 0.05, 0.15] {
            let outcome = migrate_over(&Link::steady(bandwidth), goal(downtime), &mut looping());
            if downtime < SWITCH {
                let verdict = outcome.log.last().unwrap().2;
                assert!(matches!(verdict, Verdict::Unreachable { needs } if needs < nanos(0.1)), "{verdict:?}");
                assert!(outcome.rounds <= 2, "{} rounds", outcome.rounds);
            } else {
                assert!(outcome.finished && outcome.downtime <= downtime * 1.01, "{bandwidth}: {outcome:?}");
            }
        }
    }
}

#[test]
fn rings_are_drained_leaks_made_up_for_and_devices_allowed_for() {
    let plain = migrate_over(&Link::steady(200.0), goal(DOWNTIME), &mut looping());
    // Four rings of 1,024 hold back 15 MiB, and 6.5 are covered.
    let rings = Link { held_back: 3840.0, ..Link::steady(50.0) };
    let outcome = migrate_over(&rings, goal(0.15), &mut looping());
    assert!(outcome.finished && outcome.downtime <= 0.15, "{outcome:?}");
    let leak = Link { leak: 1.3, ..Link::steady(200.0) };
    let outcome = migrate_over(&leak, goal(DOWNTIME), &mut looping());
    assert!(outcome.finished && outcome.rounds == plain.rounds + 1 && outcome.downtime <= DOWNTIME, "{outcome:?}");
    let devices = |mib| Link { devices: mib * 1048576.0, ..Link::steady(200.0) };
    let outcome = migrate_over(&devices(20.0), goal(DOWNTIME), &mut looping());
    assert!(outcome.finished && outcome.downtime <= DOWNTIME, "{outcome:?}");
    let outcome = migrate_over(&devices(195.0), goal(DOWNTIME), &mut looping());
    assert_eq!(outcome.log.last().map(|last| (last.2, last.3)), Some((Verdict::Stalled, Reason::DevicesTooFast)));
}

#[test]
fn who_only_observes_throttles_nothing() {
    let observed = Goal { observe: true, ..goal(DOWNTIME) };
    let outcome = migrate_over(&Link::steady(200.0), observed, &mut looping());
    assert!(!outcome.finished && outcome.lost < 1e-6, "{outcome:?}");
    assert!(outcome.log.iter().all(|round| matches!(round.2, Verdict::Throttle { .. })), "{:?}", outcome.log);
}
