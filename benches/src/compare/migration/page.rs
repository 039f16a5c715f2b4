//! The page of migrations.

use std::collections::BTreeSet;

use anyhow::Result;

use super::result::{Migrations, Tried, number};
use crate::migrate::result::Verdict;
use crate::report::page::{Cell, Page, Table, Tone};
use crate::report::plot::{Axis, Chart, Look, Series};

/// The hues of both.
const OURS: usize = 0;
const PEER: usize = 1;

/// The page of migrations.
///
/// # Errors
/// What the drawing library reports is passed on.
pub fn page(migrations: &Migrations) -> Result<Page> {
    let lede = format!(
        "A guest with {} MiB that runs {}, migrated over a connection of {} MiB/s, with a downtime of {} ms allowed: by turns \
         on one machine, {} times each. Work and stalls are what the guest itself counted.",
        migrations.memory_mib,
        migrations.guest(),
        migrations.bandwidth_mib_s,
        migrations.downtime_allowed_ms,
        migrations.rounds
    );
    let mut page = Page::new("Migrations beside one another", lede);
    page.section("Time and downtime").picture(
        "Each migration that came about is a dot: further left is sooner over, further down a shorter downtime.",
        &charts(migrations),
    )?;
    page.section("All measures").table(&table(migrations));
    let made = page.section("How it was made");
    made.command().host(&migrations.host);
    let commands: BTreeSet<_> = migrations.sides.iter().filter_map(|side| side.command.clone()).collect();
    if !commands.is_empty() {
        made.text(
            "Two of these made a migration, the second with -incoming, driven by QMP; what they were not told is as they have it \
             by default. The memory at the destination is compared with the source's for the modes of dirtylimit alone.",
        );
        made.commands(commands);
    }
    Ok(page)
}

/// A chart for each side, all to one scale.
fn charts(migrations: &Migrations) -> Vec<Chart> {
    let points = |side: &Tried| -> Vec<(f64, f64)> {
        let rounds = side.rounds.iter().map(|round| round.measured);
        rounds.filter_map(|of| Some((of.total_s?, of.downtime_ms?))).collect()
    };
    let all: Vec<_> = migrations.sides.iter().flat_map(points).collect();
    let most = |of: fn(&(f64, f64)) -> f64, least: f64| all.iter().map(of).fold(least, f64::max);
    let (latest, allowed) = (1.1 * most(|point| point.0, 1.0), migrations.downtime_allowed_ms);
    let longest = 1.1 * most(|point| point.1, allowed);
    let chart = |side: &Tried| {
        let hue = if side.command.is_some() { PEER } else { OURS };
        let dots = Series::new("a migration", Look::Dots(hue), points(side));
        let allowed = Series::new("downtime allowed", Look::Allowed, vec![(0.0, allowed), (latest, allowed)]);
        Chart {
            title: format!("{}: {} of {} done", side.who, side.done, side.rounds.len()),
            x: Axis::linear("total time (s)").over(0.0..latest),
            y: Axis::linear("downtime (ms)").over(0.0..longest),
            right: None,
            series: vec![allowed, dots],
        }
    };
    migrations.sides.iter().map(chart).collect()
}

fn table(migrations: &Migrations) -> Table {
    let columns = [
        "under",
        "done",
        "total (s)",
        "downtime (ms)",
        "sent (MiB)",
        "lost guest time (s)",
        "longest stall (ms)",
        "least work kept (%)",
        "why not",
    ];
    let row = |side: &Tried| -> Vec<Cell> {
        let of = &side.median;
        let beyond = of.downtime_ms.is_none_or(|downtime| downtime > migrations.downtime_allowed_ms);
        let tone = if beyond { Tone::Bad } else { Tone::Plain };
        let undone = side.rounds.iter().find(|round| round.verdict != Verdict::Done);
        vec![
            side.who.as_str().into(),
            format!("{} of {}", side.done, side.rounds.len()).into(),
            number(of.total_s).into(),
            Cell::from(number(of.downtime_ms)).toned(tone),
            number(of.sent_mib).into(),
            number(of.lost_guest_s).into(),
            number(of.longest_stall_ms).into(),
            number(of.least_work_kept_pct).into(),
            undone.map_or("-", |round| &round.reason).into(),
        ]
    };
    Table {
        caption: "Medians of all rounds; stalls are those but for the switch.".into(),
        columns: columns.map(str::to_owned).into(),
        rows: migrations.sides.iter().map(row).collect(),
    }
}
