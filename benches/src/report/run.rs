//! The page of a run.

use std::time::Duration;

use anyhow::Result;

use super::charts::{self, net_rate, rate_chart, stall_chart, survival};
use super::page::{Cell, Page, Table, Tone};
use super::plot::{Chart, Look, Series};
use super::table::{self, guest, number, policy, signed, verdict, whole};
use crate::measure::{Held, Measures, StepMeasures, VmMeasures};
use crate::record::{Recording, Stalls, VcpuRecording};
use crate::units::{Limit, mib_per_sec, significant};

/// More lines than these cannot be told apart, and more charts not be looked at.
const MAX_LINES: usize = 5;
const MAX_CHARTS: usize = 16;

/// The page of a recording.
///
/// # Errors
/// What the drawing library reports is passed on.
pub fn page(recording: &Recording) -> Result<Page> {
    let measures: Vec<_> = recording.vcpus.iter().map(|vcpu| Measures::of(recording, vcpu)).collect();
    let (kind, vcpus) = (guest(recording.guest), recording.vcpus.len());
    let plural = if vcpus == 1 { "" } else { "s" };
    let lede = format!("A {kind} of {vcpus} vCPU{plural}: {}.", verdict(recording, &measures));
    // A number and its unit stay together.
    let mut page = Page::new("Dirty page rate under a limit", lede.replace(" %", "\u{a0}%"));
    page.section("").tiles(tiles(recording, &measures));

    let rates = page.section("Rate against limit");
    rates.picture(
        "Pages newly dirtied, which a migration would have to send again, as means over 100 ms. Before 0 s the guest runs \
         free: it soon has dirtied all its memory, and none anew until the next pass. What is off the scale is drawn along \
         the upper edge.",
        &of_vcpus(recording, "Dirty page rate of each vCPU"),
    )?;
    if let Some(series) = of_vm(recording) {
        rates.picture("All vCPUs together.", &[rate_chart("Dirty page rate of the VM", series)])?;
    }
    rates.table(&rate_table(recording, &measures));
    if measures.iter().any(|measures| measures.steps.len() > 1) {
        rates.table(&step_table(recording, &measures));
    }

    if let Some(chart) = stalls(recording) {
        let stalls = page.section("Stalls");
        stalls.picture(
            "How long the guest stood still, as it saw by itself: gaps between two readings of its own clock. A point says \
             how many gaps in a second were at least that long.",
            &[chart],
        )?;
        stalls.table(&stall_table(recording, &measures));
    }

    let made = page.section("How it was made");
    made.command().facts(facts(recording)).host(&recording.host);
    Ok(page)
}

fn tiles(recording: &Recording, measures: &[Measures]) -> Vec<(&'static str, Cell, &'static str)> {
    let worst = |of: fn(&Measures) -> Option<f64>| {
        measures
            .iter()
            .filter(|vcpu| vcpu.last().error_pct.is_some())
            .filter_map(of)
            .reduce(|one, other| if other.abs() > one.abs() { other } else { one })
    };
    let unsettled = tone(measures.iter().any(|vcpu| vcpu.last().held == Some(Held::Unsettled)));
    let mut tiles = match VmMeasures::of(recording) {
        Some(vm) => vec![
            ("VM's settled rate", number(vm.settled_mib_s).into(), "MiB/s"),
            ("VM's budget", significant(vm.limit_mib_s, 4).into(), "MiB/s"),
            ("Error", signed(vm.error_pct).into(), "%"),
        ],
        None => vec![
            (
                "Error of the settled rate",
                Cell::from(signed(worst(|vcpu| vcpu.last().judged_pct()))).toned(unsettled),
                "%",
            ),
            ("Settled in", whole(worst(|vcpu| vcpu.last().settled_ms())).into(), "ms"),
        ],
    };
    tiles.push(("Longest stall", number(worst(|vcpu| vcpu.stall_max_ms)).into(), "ms"));
    let lost = Cell::from(recording.lost_pages.map_or("-".to_owned(), |lost| lost.to_string()));
    tiles.push(("Lost pages", lost.toned(tone(recording.lost_pages > Some(0))), ""));
    tiles
}

fn since(recording: &Recording, at: Duration) -> f64 {
    at.as_secs_f64() - recording.limited_at.as_secs_f64()
}

/// The rate of the whole VM over its budget, if it has one.
pub(super) fn of_vm(recording: &Recording) -> Option<Vec<Series>> {
    let end = since(recording, recording.end);
    let budget = mib_per_sec(recording.vm_limit?, recording.page_size);
    let vcpus: Vec<_> = recording.vcpus.iter().collect();
    Some(vec![
        Series::new("budget", Look::Allowed, vec![(0.0, budget), (end, budget)]),
        Series::new("whole VM", Look::Line(0), each_instant(recording, &vcpus, |rates| rates.iter().sum())),
    ])
}

/// A chart for each limit, of the vCPUs that have it.
pub(super) fn of_vcpus(recording: &Recording, title: &str) -> Vec<Chart> {
    let mut groups: Vec<Vec<&VcpuRecording>> = Vec::new();
    for vcpu in &recording.vcpus {
        match groups.iter_mut().find(|group| group[0].limits == vcpu.limits) {
            Some(group) => group.push(vcpu),
            None => groups.push(vec![vcpu]),
        }
    }
    if groups.len() > MAX_CHARTS {
        groups = vec![recording.vcpus.iter().collect()];
    }
    let chart = |group: &Vec<&VcpuRecording>| {
        let limits: Vec<_> = group[0].limits.iter().map(|&(_, limit)| Limit(limit).to_string()).collect();
        let title = match limits.join(", ") {
            _ if groups.len() == 1 => title.to_owned(),
            none if none == "none" => format!("{title}, no limit"),
            limits => format!("{title}, limit {limits}"),
        };
        rate_chart(title, series(recording, group))
    };
    groups.iter().map(chart).collect()
}

/// The rates of some vCPUs over their limits; where they are many, those of the fastest, the median and the slowest.
fn series(recording: &Recording, vcpus: &[&VcpuRecording]) -> Vec<Series> {
    let mut limits: Vec<_> = vcpus.iter().map(|vcpu| &vcpu.limits).collect();
    limits.dedup();
    let of_limits = |limits: &Vec<_>| Series::new("limit", Look::Allowed, charts::limits(recording, limits));
    let mut series: Vec<_> = limits.into_iter().map(of_limits).collect();
    if vcpus.len() <= MAX_LINES {
        series.extend(vcpus.iter().map(|vcpu| {
            let name = format!("vCPU {}, {}", vcpu.index, vcpu.workload);
            Series::new(name, Look::Line(vcpu.index), net_rate(recording, vcpu))
        }));
        return series;
    }
    let ranked = |rank: fn(usize) -> usize| {
        each_instant(recording, vcpus, move |rates| {
            rates.sort_unstable_by(f64::total_cmp);
            rates.get(rank(rates.len())).copied().unwrap_or(f64::NAN)
        })
    };
    let count = vcpus.len();
    series.push(Series::new(format!("fastest of {count} vCPUs"), Look::Thin(1), ranked(|count| count - 1)));
    series.push(Series::new("slowest", Look::Thin(2), ranked(|_| 0)));
    series.push(Series::new("median", Look::Line(0), ranked(|count| count / 2)));
    series
}

/// One number for the rates of some vCPUs at each instant.
fn each_instant(recording: &Recording, vcpus: &[&VcpuRecording], of: impl Fn(&mut [f64]) -> f64) -> Vec<(f64, f64)> {
    let rates: Vec<_> = vcpus.iter().map(|vcpu| net_rate(recording, vcpu)).collect();
    let Some(first) = rates.first() else { return Vec::new() };
    let at = |number: usize| rates.iter().filter_map(|rates| Some(rates.get(number)?.1)).collect::<Vec<_>>();
    first.iter().enumerate().map(|(number, &(instant, _))| (instant, of(&mut at(number)))).collect()
}

/// The stalls of the limited writers; where they are many, of all together.
fn stalls(recording: &Recording) -> Option<Chart> {
    let limited = |vcpu: &&VcpuRecording| vcpu.stalls.longest_ticks > 0;
    let vcpus: Vec<_> = recording.vcpus.iter().filter(limited).collect();
    let seconds = |vcpu: &VcpuRecording| vcpu.limited_time.as_secs_f64();
    let title = "Stalls while limited";
    let series = if vcpus.len() <= MAX_LINES {
        let line = |vcpu: &VcpuRecording| {
            let name = format!("vCPU {}, {}", vcpu.index, vcpu.workload);
            Series::new(name, Look::Line(vcpu.index), survival(&vcpu.stalls, seconds(vcpu)))
        };
        vcpus.into_iter().map(line).collect()
    } else {
        let name = format!("a vCPU, mean of {}", vcpus.len());
        let time = vcpus.iter().map(|vcpu| seconds(vcpu)).sum();
        let all = Stalls::sum(vcpus.into_iter().map(|vcpu| &vcpu.stalls))?;
        vec![Series::new(name, Look::Line(0), survival(&all, time))]
    };
    (!series.is_empty()).then(|| stall_chart(title, series, recording.max_pause))
}

fn limit(limit: Option<f64>) -> Cell {
    limit.map_or("none".into(), |limit| significant(limit, 4).into())
}

/// Whether the limit was not held.
fn is_missed(step: &StepMeasures) -> bool {
    matches!(step.held, Some(Held::Unsettled | Held::TooLow(_)))
}

fn tone(bad: bool) -> Tone {
    if bad { Tone::Bad } else { Tone::Plain }
}

fn error(step: &StepMeasures) -> Cell {
    Cell::from(table::error(step)).toned(tone(is_missed(step)))
}

fn rate_table(recording: &Recording, measures: &[Measures]) -> Table {
    let columns = [
        "vCPU",
        "workload",
        "limit (MiB/s)",
        "free (MiB/s)",
        "settled (MiB/s)",
        "error (%)",
        "settled in (ms)",
        "worst window (%)",
    ];
    let row = |vcpu: &VcpuRecording, measures: &Measures| {
        let last = measures.last();
        vec![
            vcpu.index.to_string().into(),
            vcpu.workload.to_string().into(),
            limit(last.limit_mib_s),
            number(measures.free_mib_s).into(),
            number(last.settled_mib_s).into(),
            error(last),
            whole(last.settled_ms()).into(),
            number(last.worst_window_error_pct.filter(|_| last.settled_ms().is_some())).into(),
        ]
    };
    table("Settled is the second half of the limited time; windows are of 100 ms.", &columns, recording, measures, row)
}

fn stall_table(recording: &Recording, measures: &[Measures]) -> Table {
    let columns = ["vCPU", "workload", "p99 (ms)", "p99.9 (ms)", "longest (ms)", "time paused (%)", "work kept (%)"];
    let row = |vcpu: &VcpuRecording, measures: &Measures| {
        vec![
            vcpu.index.to_string().into(),
            vcpu.workload.to_string().into(),
            number(measures.stall_p99_ms).into(),
            number(measures.stall_p999_ms).into(),
            number(measures.stall_max_ms).into(),
            number(measures.paused_pct).into(),
            number(measures.work_kept_pct).into(),
        ]
    };
    table("Work is the guest's own count, limited against free.", &columns, recording, measures, row)
}

/// A table with a row for each vCPU.
fn table(
    caption: &str,
    columns: &[&str],
    recording: &Recording,
    measures: &[Measures],
    row: impl Fn(&VcpuRecording, &Measures) -> Vec<Cell>,
) -> Table {
    Table {
        caption: caption.into(),
        columns: columns.iter().map(|&name| name.to_owned()).collect(),
        rows: recording.vcpus.iter().zip(measures).map(|(vcpu, measures)| row(vcpu, measures)).collect(),
    }
}

fn step_table(recording: &Recording, measures: &[Measures]) -> Table {
    let steps = recording.vcpus.iter().zip(measures).flat_map(|(vcpu, measures)| {
        measures.steps.iter().map(move |step| {
            vec![
                vcpu.index.to_string().into(),
                format!("{:.1}", since(recording, step.from)).into(),
                limit(step.limit_mib_s),
                number(step.settled_mib_s).into(),
                error(step),
                whole(step.settled_ms()).into(),
                number(step.overshoot_pct).into(),
            ]
        })
    });
    let columns =
        ["vCPU", "from (s)", "limit (MiB/s)", "settled (MiB/s)", "error (%)", "settled in (ms)", "overshoot (%)"];
    Table {
        caption: "Each change of a limit.".into(),
        columns: columns.map(str::to_owned).into(),
        rows: steps.collect(),
    }
}

fn facts(recording: &Recording) -> Vec<(&'static str, String)> {
    let limited = recording.end.saturating_sub(recording.limited_at).as_secs_f64();
    let interrupted = if recording.interrupted { ", then interrupted" } else { "" };
    let lost = match recording.lost_pages {
        Some(lost) => format!("{lost}, by comparing a copy made from the dirty log alone with the guest's memory"),
        None => "not checked".to_owned(),
    };
    vec![
        ("Guest", guest(recording.guest).to_owned()),
        ("Policy", policy(recording.policy)),
        ("Ring", format!("{} entries for each vCPU", recording.ring)),
        ("Longest pause", format!("{:?} asked for", recording.max_pause)),
        ("Limited for", format!("{limited:.1} s{interrupted}")),
        ("Resets", format!("{} calls, {} pages given back", recording.reset_calls, recording.reset_pages)),
        ("Lost pages", lost),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    #[test]
    fn a_page_shows_rates_and_stalls_and_needs_nothing_else() {
        let html = page(&example::recording()).unwrap().html();
        assert_eq!(html.matches("<svg").count(), 4, "two pictures, each for wide and narrow screens");
        for shown in [
            "vCPU 1, read:32MiB",
            "longest pause asked for",
            "held to +0.0\u{a0}% of the limit",
            "6.18.0",
            ">1048576 bytes<",
        ] {
            assert!(html.contains(shown), "{shown}");
        }
        let own = html.replace("http://www.w3.org/2000/svg", "");
        for foreign in ["http:", "https:", "//", "<script", "src=", "url(", "@import"] {
            assert!(!own.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn many_vcpus_are_three_lines() {
        let stepped = example::stepped();
        let many = Recording { vcpus: vec![stepped.vcpus[0].clone(); 64], ..stepped };
        let html = page(&many).unwrap().html();
        assert!(html.contains("fastest of 64 vCPUs") && html.contains("a vCPU, mean of 64"), "{html}");
        assert_eq!(of_vcpus(&many, "").iter().map(|chart| chart.series.len()).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn each_limit_has_its_picture() {
        let mut recording = example::recording();
        recording.vcpus[1].limits[0].1 = None;
        let titles: Vec<_> = of_vcpus(&recording, "Rate").into_iter().map(|chart| chart.title).collect();
        assert_eq!(titles, ["Rate, limit 100 MiB/s", "Rate, no limit"]);
        recording.vcpus = (0..1024).map(|index| VcpuRecording { index, ..recording.vcpus[0].clone() }).collect();
        for (at, vcpu) in (0..).zip(&mut recording.vcpus) {
            vcpu.limits[0].0 = Duration::from_millis(at);
        }
        assert_eq!(of_vcpus(&recording, "Rate").len(), 1, "no more charts than can be looked at");
    }

    #[test]
    fn what_failed_has_a_colour_of_its_own() {
        let bad = |recording: &Recording| page(recording).unwrap().html().matches("var(--bad) ").count();
        let mut recording = example::recording();
        assert_eq!(bad(&recording), 0);
        recording.lost_pages = Some(7);
        assert_eq!(bad(&recording), 1);
        recording.vcpus[0].limits[0].1 = Some(dirtylimit_core::PageRate::from_pages_per_sec(25));
        assert_eq!(bad(&recording), 2, "in its row too");
    }

    #[test]
    fn a_budget_has_its_picture() {
        let budget = Some(dirtylimit_core::PageRate::from_pages_per_sec(12_800));
        let recording = Recording { vm_limit: budget, ..example::recording() };
        let vm = of_vm(&recording).unwrap();
        assert!(vm[0].points.iter().all(|&(_, limit)| limit == 50.0));
        assert!(vm[1].points.last().is_some_and(|&(at, rate)| at == 8.0 && (rate - 100.0).abs() < 1e-6));
        assert!(page(&recording).unwrap().html().contains("Dirty page rate of the VM"));
    }

    #[test]
    fn a_run_that_was_ended_at_once_has_a_page() {
        let mut recording = example::recording();
        (recording.limited_at, recording.end) = (Duration::ZERO, Duration::ZERO);
        recording.vcpus.iter_mut().for_each(|vcpu| vcpu.samples.clear());
        page(&recording).unwrap();
        recording.vcpus.clear();
        page(&recording).unwrap();
    }
}
