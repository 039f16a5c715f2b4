//! Migrations simulated round by round, and a table of them as the regression test of the goal-driven budget: beside the
//! best constant limit, half of the bandwidth, and a downtime that grows.
//!
//! `UPDATE_SNAPSHOT=1 cargo test -p dirtylimit-core --test migrate` rewrites the table.
//!
//! *Lost* is guest time: total × (1 − work kept), the downtime included. The *best* constant limit is the one, in force
//! from the first round to the last and switched from as soon as the downtime covers what is left, that loses the least
//! guest time; of those within 1 % of that, the fastest. It is found by trying all of them, knowing the guest's future.
//! The goal's total and lost time are both compared with that one run.
//!
//! A budget is *unstable* that falls by more than a quarter after it rose by as much: no row may have one.

#![expect(clippy::cast_possible_truncation, reason = "small numbers")]

mod guest;
mod run;
mod table;

use dirtylimit_core::migrate::{Goal, Migration, Reason, Verdict};
use guest::{Guest, MIB, Region, Synthetic, Traced};
use run::{Link, Outcome, Rule, SWITCH, goal, migrate, nanos};
use table::{DOWNTIME, Row, Table, check_snapshot};

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

/// A row of a guest of [`shape`].
fn row(name: &'static str, set: f64, bandwidth: f64) -> Row {
    let guest = move || -> Box<dyn Guest> { Box::new(shape(name, set, MEMORY)) };
    Row::new(format!("{name} {set}"), guest, bandwidth)
}

fn traced(trace: &'static [u8], name: &str) -> Vec<Row> {
    // A window of 250,000 instructions is 10 ms of guest time; nine tenths of the memory is idle.
    let guest = Traced::new(trace, 9.0, 0.010);
    let set = guest.written() / MIB;
    // How long the wire takes for all that is ever written, in seconds.
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
            shapes.extend([50.0, 200.0, 800.0].map(|bandwidth| row(name, set, bandwidth)));
        }
    }
    let mut traces = traced(include_bytes!("sqlite.trace"), "sqlite");
    traces.extend(traced(include_bytes!("gcc.trace"), "gcc"));
    let changing = SHAPES.into_iter().flat_map(|name| {
        [0.5, 2.0].map(|factor| {
            let steady = row(name, 224.0, 200.0);
            // In the middle of the second round, where there is one.
            let link = Link::changing(move |now| if now < 21.0 { 200.0 } else { 200.0 * factor });
            Row { name: format!("{name} × {factor}"), link, ..steady }
        })
    });
    let patient =
        [("compile", 224.0, 50.0), ("compile", 512.0, 200.0), ("decay", 224.0, 200.0), ("burst", 224.0, 50.0)];
    let patient = patient.map(|(name, set, bandwidth)| {
        let goal = Goal { patience: 150, ..goal(DOWNTIME) };
        Row { goal, ..row(name, set, bandwidth) }
    });
    let small = |name: &'static str, what: &str| {
        let guest = move || -> Box<dyn Guest> { Box::new(shape(name, 224.0, 256.0 * MIB)) };
        Row::new(format!("{name}{what}"), guest, 200.0)
    };
    let hot = SHAPES.map(|name| small(name, " of 256"));
    let told_less =
        SHAPES.map(|name| Row { name: format!("{name}, rounds"), rounds_alone: true, ..row(name, 224.0, 200.0) });
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
        let mut row = row(name, 224.0, 200.0);
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
