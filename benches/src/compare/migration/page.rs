//! The page of migrations.

use std::collections::BTreeSet;

use anyhow::Result;

use super::result::{Migrations, Tried, number};
use crate::migrate::result::Verdict;
use crate::report::page::{Cell, Page, Table, Tone};
use crate::report::plot::{Axis, Chart, Look, Series};

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
        "Each round that came about is a dot; further left is sooner over, further down a shorter downtime.",
        &[chart(migrations)],
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

fn chart(migrations: &Migrations) -> Chart {
    let mut series: Vec<_> = migrations
        .sides
        .iter()
        .enumerate()
        .map(|(hue, side)| {
            let points = side.rounds.iter().map(|round| round.measured);
            let points = points.filter_map(|of| Some((of.total_s?, of.downtime_ms?)));
            Series::new(&side.who, Look::Dots(hue), points.collect())
        })
        .filter(|series: &Series| !series.points.is_empty())
        .collect();
    let (least, most) = series
        .iter()
        .flat_map(|series| &series.points)
        .fold((f64::INFINITY, 0.0), |(least, most): (f64, f64), &(total, _)| (least.min(total), most.max(total)));
    let allowed = migrations.downtime_allowed_ms;
    series.insert(0, Series::new("downtime allowed", Look::Allowed, vec![(least, allowed), (most, allowed)]));
    Chart {
        title: "Downtime over total time".into(),
        x: Axis::log("total time (s)"),
        y: Axis::linear("downtime (ms)"),
        right: None,
        series,
    }
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
