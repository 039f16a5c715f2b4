//! Migrations simulated round by round: the goal-driven budget beside every constant limit, half of the bandwidth and a
//! growing downtime. The table is a snapshot; `UPDATE_SNAPSHOT=1 cargo test -p dirtylimit-core --test migrate` rewrites it.

mod guest;
mod run;

use std::fmt::Write as _;

use dirtylimit_core::migrate::Migration;
use guest::{Guest, MIB, Region, Synthetic, Traced};
use run::{Link, Outcome, Rule, goal, migrate};

/// Allowed in every row, in seconds.
const DOWNTIME: f64 = 0.3;
const MEMORY: f64 = 4096.0 * MIB;

const SHAPES: [&str; 7] = ["plateau", "phases", "decay", "compile", "zipf", "hot", "burst"];

fn triangle(now: f64, period: f64) -> f64 {
    let phase = (now / period).fract();
    2.0 * phase.min(1.0 - phase)
}

/// A guest of the shape that writes to `set` MiB at most.
fn shape(name: &str, set: f64) -> Synthetic {
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
            return Synthetic::new(MEMORY, vec![hot, calm(), calm(), calm()]);
        }
        "burst" => vec![Region::new(constant, |now| if now % 8.0 < 6.0 { 2.0 * MIB } else { 1500.0 * MIB }).in_order()],
        _ => unreachable!("{name}"),
    };
    Synthetic::new(MEMORY, vec![regions])
}

/// A row of the table.
struct Row {
    name: String,
    guest: Box<dyn Fn() -> Box<dyn Guest>>,
    /// MiB/s.
    bandwidth: f64,
}

/// The constant limits that are tried, in pages per second: none, and twice the bandwidth down to a 64th.
fn limits(bandwidth: f64) -> Vec<Option<f64>> {
    let steps = (0..=42).map(|step| Some(bandwidth * MIB * 2.0 * (-f64::from(step) / 6.0).exp2()));
    [None].into_iter().chain(steps).collect()
}

impl Row {
    fn run(&self, rule: &mut Rule) -> Outcome {
        migrate(&mut *(self.guest)(), &Link::steady(self.bandwidth), DOWNTIME, rule)
    }

    /// The limit, in MiB/s, under which the guest loses the least time; the fastest of those within 1 % of that.
    fn best(&self) -> (Option<f64>, Outcome) {
        let tried = limits(self.bandwidth).into_iter().map(|limit| (limit, self.run(&mut Rule::Constant(limit))));
        let done: Vec<_> = tried.filter(|(_, outcome)| outcome.finished).collect();
        let least = done.iter().map(|(_, outcome)| outcome.lost).fold(f64::INFINITY, f64::min);
        let good = done.into_iter().filter(|(_, outcome)| outcome.lost <= 1.01 * least);
        let (limit, outcome) = good.min_by(|a, b| a.1.total.total_cmp(&b.1.total)).expect("the lowest limit will do");
        (limit.map(|limit| limit / MIB), outcome)
    }
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for name in SHAPES {
        for set in [64.0, 224.0, 512.0] {
            for bandwidth in [50.0, 200.0, 800.0] {
                let guest = move || -> Box<dyn Guest> { Box::new(shape(name, set)) };
                rows.push(Row { name: format!("{name} {set}"), guest: Box::new(guest), bandwidth });
            }
        }
    }
    rows
}

#[test]
fn table() {
    let mut text = String::new();
    for row in rows() {
        let (limit, best) = row.best();
        let goal = row.run(&mut Rule::Goal(Box::new(Migration::new(goal(DOWNTIME)))));
        let half = row.run(&mut Rule::Half);
        let ramp = row.run(&mut Rule::Ramp);
        writeln!(
            text,
            "{:<12}{:>5} | {:>6} {:6.2} {:6.2} | {:6.2} {:6.2} {:5.3} {} {} | {:5.3} {:5.3} | {:6.2} {:6.2} | {:6.2} {:6.2} {:6.2} {}",
            row.name,
            row.bandwidth,
            limit.map_or("none".into(), |limit| format!("{limit:.1}")),
            best.total,
            best.lost,
            goal.total,
            goal.lost,
            goal.downtime,
            goal.rounds,
            goal.swings,
            goal.total / best.total,
            goal.lost / best.lost,
            half.total, half.lost, ramp.total, ramp.lost, ramp.downtime, if goal.finished {""} else {"!!"}
        )
        .unwrap();
    }
    println!("{text}");
}
