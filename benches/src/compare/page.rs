//! The page of a comparison.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Result;

use super::result::{Compared, Comparison, Measured, Side, Vcpu};
use crate::report::charts::{rate_chart, stall_chart};
use crate::report::page::{Cell, Page, Table, Tone};
use crate::report::plot::{Axis, Chart, Look, Series};
use crate::report::table::{number, signed, whole};

/// The hues of both sides, in all charts.
const OURS: usize = 0;
const PEER: usize = 1;

/// The page of a comparison.
///
/// # Errors
/// What the drawing library reports is passed on.
pub fn page(comparison: &Comparison) -> Result<Page> {
    let lede = format!(
        "The same guest under {} and under dirtylimit, by turns on one machine. What is shown is what the guest itself \
         counted: its page writes, and the gaps in its own clock.",
        comparison.peer
    );
    let mut page = Page::new(format!("dirtylimit beside {}", comparison.peer), lede);
    page.section("").tiles(tiles(comparison));

    let pairs = || comparison.cases.iter().flat_map(|case| pairs(case).map(move |pair| (case, pair)));
    let limited = || pairs().filter(|(_, (_, ours))| ours.limit_mib_s.is_some());
    let rates: Vec<_> = limited().map(|(case, (theirs, ours))| rates(comparison, case, theirs, ours)).collect();
    page.section("Rate against limit").picture(
        "Pages written, as means over 100 ms, in the first round. Before 0 s the guest runs free, of which ours \
         knows the mean alone; what is off the scale is drawn along the upper edge.",
        &rates,
    )?;
    let stalls: Vec<_> = pairs().map(|(case, (theirs, ours))| stalls(comparison, case, theirs, ours)).collect();
    page.section("Stalls")
        .picture("How often the guest stood still for at least this time, all rounds together.", &stalls)?;
    let over_limit = over_limit(comparison);
    if !over_limit.is_empty() {
        page.section("Over limit and ring").picture("Cases of one vCPU; medians of the rounds.", &over_limit)?;
    }
    page.section("All measures").table(&table(comparison));

    let made = page.section("How it was made");
    made.command().host(&comparison.host);
    let commands: BTreeSet<_> = comparison.cases.iter().filter_map(|case| case.peer_command.clone()).collect();
    if !commands.is_empty() {
        made.text(
            "What ran beside it, driven by QMP; --write-rom writes the ROM of the first case. Dirty pages were logged from \
             calc-dirty-rate on, and each vCPU that writes was limited by set-vcpu-dirty-limit.",
        );
        made.commands(commands);
    }
    Ok(page)
}

/// The vCPUs of a case, under the peer and under ours.
fn pairs(case: &Compared) -> impl Iterator<Item = (&Vcpu, &Vcpu)> {
    case.peer.vcpus.iter().zip(&case.ours.vcpus)
}

/// What a chart about one vCPU is called.
fn title(case: &Compared, vcpu: &Vcpu) -> String {
    let alone =
        if case.ours.vcpus.len() == 1 { String::new() } else { format!(", vCPU {}, {}", vcpu.index, vcpu.workload) };
    format!("{}{alone}", case.name())
}

fn tiles(comparison: &Comparison) -> Vec<(String, String, &'static str)> {
    let limited = |vcpus: &[Vcpu]| -> Vec<_> {
        vcpus.iter().filter(|vcpu| vcpu.limit_mib_s.is_some()).map(|vcpu| vcpu.median).collect()
    };
    let peer: Vec<Measured> = comparison.cases.iter().flat_map(|case| limited(&case.peer.vcpus)).collect();
    let ours: Vec<Measured> = comparison.cases.iter().flat_map(|case| limited(&case.ours.vcpus)).collect();
    let worst = |side: &[Measured], of: fn(&Measured) -> Option<f64>| {
        side.iter().filter_map(of).reduce(|one, other| if other.abs() > one.abs() { other } else { one })
    };
    vec![
        ("Worst error, dirtylimit".to_owned(), signed(worst(&ours, |of| of.error_pct)), "%"),
        (format!("Worst error, {}", comparison.peer), signed(worst(&peer, |of| of.error_pct)), "%"),
        ("Longest stall, dirtylimit".to_owned(), number(worst(&ours, |of| of.stall_max_ms)), "ms"),
        (format!("Longest stall, {}", comparison.peer), number(worst(&peer, |of| of.stall_max_ms)), "ms"),
    ]
}

fn rates(comparison: &Comparison, case: &Compared, theirs: &Vcpu, ours: &Vcpu) -> Chart {
    let seconds = |vcpu: &Vcpu| vcpu.samples.iter().map(|&(ms, rate)| (ms / 1e3, rate)).collect();
    let limit = f64::from(case.limit_mib_s);
    let series = vec![
        Series::new("limit", Look::Allowed, vec![(0.0, limit), (comparison.seconds, limit)]),
        Series::new(&comparison.peer, Look::Line(PEER), seconds(theirs)),
        Series::new("dirtylimit", Look::Line(OURS), seconds(ours)),
    ];
    rate_chart(title(case, ours), series)
}

fn stalls(comparison: &Comparison, case: &Compared, theirs: &Vcpu, ours: &Vcpu) -> Chart {
    let series = vec![
        Series::new(&comparison.peer, Look::Line(PEER), theirs.stalls.clone()),
        Series::new("dirtylimit", Look::Line(OURS), ours.stalls.clone()),
    ];
    stall_chart(title(case, ours), series, Duration::from_secs_f64(comparison.max_pause_ms / 1e3))
}

/// A chart for each of some measures, where the cases of one vCPU differ in their limits: a line for each ring and side.
fn over_limit(comparison: &Comparison) -> Vec<Chart> {
    let alone: Vec<_> = comparison.cases.iter().filter(|case| case.ours.vcpus.len() == 1).collect();
    if alone.iter().all(|case| case.limit_mib_s == alone[0].limit_mib_s) {
        return Vec::new();
    }
    let chart = |name: &str, unit: &str, of: fn(&Measured) -> Option<f64>| {
        let mut lines: BTreeMap<(u32, usize), Vec<(f64, f64)>> = BTreeMap::new();
        for case in &alone {
            for (hue, side) in [(OURS, &case.ours), (PEER, &case.peer)] {
                let value = of(&side.vcpus[0].median).unwrap_or(f64::NAN);
                lines.entry((case.ring, hue)).or_default().push((f64::from(case.limit_mib_s), value));
            }
        }
        let smallest = alone.iter().map(|case| case.ring).min();
        let series = lines.into_iter().map(|((ring, hue), mut points)| {
            points.sort_by(|one, other| one.0.total_cmp(&other.0));
            let who = if hue == OURS { "dirtylimit" } else { &comparison.peer };
            // One hue for each side: the larger rings are those without a line.
            let look = if Some(ring) == smallest { Look::Marked(hue) } else { Look::Dots(hue) };
            Series::new(format!("{who}, ring {ring}"), look, points)
        });
        Chart {
            title: name.to_owned(),
            x: Axis::log("limit (MiB/s)"),
            y: Axis::linear(format!("{} ({unit})", name.to_lowercase())),
            right: None,
            series: series.collect(),
        }
    };
    vec![
        chart("Error of the settled rate", "%", |of| of.error_pct),
        chart("Longest stall", "ms", |of| of.stall_max_ms),
        chart("Stall p99", "ms", |of| of.stall_p99_ms),
    ]
}

fn table(comparison: &Comparison) -> Table {
    let columns = [
        "case",
        "vCPU",
        "under",
        "settled (MiB/s)",
        "error (%)",
        "settle time (ms)",
        "stall p99 (ms)",
        "longest stall (ms)",
        "work kept (%)",
        "CPU time (%)",
    ];
    let row = |case: &Compared, who: &str, side: &Side, vcpu: &Vcpu| -> Vec<Cell> {
        let of = &vcpu.median;
        let tone = match of.error_pct {
            Some(error) if error.abs() > 10.0 => Tone::Bad,
            _ => Tone::Plain,
        };
        vec![
            case.name().into(),
            format!("{}, {}", vcpu.index, vcpu.workload).into(),
            who.into(),
            number(of.settled_mib_s).into(),
            Cell::from(signed(of.error_pct)).toned(tone),
            whole(of.settle_ms).into(),
            number(of.stall_p99_ms).into(),
            number(of.stall_max_ms).into(),
            number(of.work_kept_pct).into(),
            number(side.cpu_pct).into(),
        ]
    };
    let rows = comparison.cases.iter().flat_map(|case| {
        pairs(case).flat_map(move |(theirs, ours)| {
            [row(case, &comparison.peer, &case.peer, theirs), row(case, "dirtylimit", &case.ours, ours)]
        })
    });
    Table {
        caption: "Medians of all rounds. CPU time is the whole hypervisor's, of one CPU.".into(),
        columns: columns.map(str::to_owned).into(),
        rows: rows.collect(),
    }
}
