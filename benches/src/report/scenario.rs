//! The page of scenarios.

use std::collections::BTreeMap;

use anyhow::Result;

use super::charts::{rate_chart, stall_chart, survival};
use super::page::{Cell, Page, Table, Tone};
use super::plot::{Axis, Chart, Look, Series};
use super::run;
use crate::record::{Host, Recording, Stalls};
use crate::scenario::measure::Evidence;
use crate::scenario::verdict::{Figure, Verdict, number};
use crate::scenario::{Case, Scenario, Tried};
use crate::units::{mib_per_sec, significant};

/// The page of what was tried on `host`.
///
/// # Errors
/// What the drawing library reports is passed on.
pub fn page(all: &[Tried], host: &Host) -> Result<Page> {
    let figures = all.iter().flat_map(|tried| &tried.verdict.figures);
    let (met, count) = figures.fold((0, 0), |(met, count), figure| (met + usize::from(figure.met), count + 1));
    let lost: u64 = all.iter().map(|tried| tried.verdict.lost_pages).sum();
    let lede = format!("{met} of {count} figures met on this host, {lost} pages lost.");
    let mut page = Page::new("What the limiter must reach", lede);
    for Tried { scenario, evidence, verdict } in all {
        let section = page.section(format!("{}: {}", scenario.name, scenario.what));
        section.table(&figure_table(verdict));
        let over_limit = over_limit(scenario, verdict);
        if !over_limit.is_empty() {
            section.picture("Each figure over limit and ring.", &over_limit)?;
        }
        let rates: Vec<_> = scenario.cases.iter().zip(evidence).filter_map(rates).collect();
        if !rates.is_empty() {
            section.picture("Pages newly dirtied, as means over 100 ms: the first run of each case.", &rates)?;
        }
        let stalls = stalls(scenario, evidence);
        if !stalls.is_empty() {
            section.picture("How often the guest stood still for at least so long, all runs together.", &stalls)?;
        }
    }
    page.section("How it was made").command().host(host);
    Ok(page)
}

fn figure_table(verdict: &Verdict) -> Table {
    let with_unit = |value: f64, unit: &str| format!("{} {unit}", number(value)).trim_end().to_owned();
    let row = |figure: &Figure| {
        let tone = if figure.met { Tone::Good } else { Tone::Bad };
        let values = || figure.values.iter().flatten().copied();
        let (least, most) = (values().reduce(f64::min), values().reduce(f64::max));
        let range = least.zip(most).map(|(least, most)| format!("{} to {}", number(least), number(most)));
        let must = match (figure.at_most, figure.at_least) {
            (Some(most), _) => format!("at most {}", with_unit(most, figure.unit)),
            (None, least) => format!("at least {}", with_unit(least.unwrap_or_default(), figure.unit)),
        };
        vec![
            figure.case.as_str().into(),
            figure.measure.into(),
            figure.measured.map_or("none".to_owned(), |value| with_unit(value, figure.unit)).into(),
            range.unwrap_or_default().into(),
            must.into(),
            Cell::from(if figure.met { "ok" } else { "MISSED" }).toned(tone),
        ]
    };
    Table {
        caption: format!("Medians of {} runs, and from the least to the most of them.", verdict.runs),
        columns: ["case", "measure", "measured", "runs", "must be", ""].map(str::to_owned).into(),
        rows: verdict.figures.iter().map(row).collect(),
    }
}

/// The limit (MiB/s) and the ring of a case that is about one limited vCPU.
fn place(case: &Case) -> Option<(f64, u32)> {
    let plan = case.trial.plan()?;
    let [vcpu] = &plan.vcpus[..] else { return None };
    Some((mib_per_sec(vcpu.limit?, crate::units::PAGE_SIZE), plan.ring))
}

/// A chart for each measure, where the cases differ in their limits: a line for each ring, and the bound.
fn over_limit(scenario: &Scenario, verdict: &Verdict) -> Vec<Chart> {
    let places: BTreeMap<_, _> = scenario.cases.iter().filter_map(|case| Some((&case.name, place(case)?))).collect();
    let of_measure = |measure| verdict.figures.iter().filter(move |figure| figure.measure == measure);
    let chart = |first: &Figure| {
        let mut rings: BTreeMap<u32, Vec<(f64, f64)>> = BTreeMap::new();
        let mut bounds = Vec::new();
        for figure in of_measure(first.measure) {
            let &(limit, ring) = places.get(&figure.case)?;
            bounds.push((limit, figure.at_most.or(figure.at_least).unwrap_or(f64::NAN)));
            rings.entry(ring).or_default().push((limit, figure.measured.unwrap_or(f64::NAN)));
        }
        bounds.iter().find(|(limit, _)| *limit != bounds[0].0)?;
        let mut series = vec![Series::new("bound", Look::Allowed, bounds)];
        series.extend(
            rings
                .into_iter()
                .enumerate()
                .map(|(hue, (ring, points))| Series::new(format!("ring {ring}"), Look::Marked(hue), points)),
        );
        Some(Chart {
            title: capitalised(first.measure),
            x: Axis::log("limit (MiB/s)"),
            y: Axis::linear(format!("{} ({})", first.measure, first.unit)),
            right: None,
            series,
        })
    };
    let firsts =
        verdict.figures.iter().enumerate().filter(|(number, figure)| {
            verdict.figures[..*number].iter().all(|earlier| earlier.measure != figure.measure)
        });
    firsts.filter_map(|(_, figure)| chart(figure)).collect()
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().into_iter().flat_map(char::to_uppercase).chain(letters).collect()
}

/// The recordings among what was tried of a case.
fn recordings(tried: &[Evidence]) -> impl Iterator<Item = &Recording> {
    tried.iter().filter_map(|evidence| match evidence {
        Evidence::Run(done) => Some(&done.recording),
        _ => None,
    })
}

/// The rate over time in the first run of a case.
fn rates((case, tried): (&Case, &Vec<Evidence>)) -> Option<Chart> {
    let recording = recordings(tried).next()?;
    let series = run::of_vm(recording).unwrap_or_else(|| run::of_vcpus(recording));
    Some(rate_chart(&case.name, series))
}

/// A chart for each ring, where the cases differ in their limits: a line for each limit.
fn stalls(scenario: &Scenario, evidence: &[Vec<Evidence>]) -> Vec<Chart> {
    let mut charts: BTreeMap<u32, (Vec<Series>, std::time::Duration)> = BTreeMap::new();
    for (case, tried) in scenario.cases.iter().zip(evidence) {
        let (Some((limit, ring)), Some(plan)) = (place(case), case.trial.plan()) else { continue };
        let vcpus = || recordings(tried).flat_map(|recording| &recording.vcpus);
        let seconds = vcpus().map(|vcpu| vcpu.limited_time.as_secs_f64()).sum();
        let Some(all) = Stalls::sum(vcpus().map(|vcpu| &vcpu.stalls)) else { continue };
        let (lines, _) = charts.entry(ring).or_insert((Vec::new(), plan.max_pause));
        let name = format!("at {} MiB/s", significant(limit, 4));
        lines.push(Series::new(name, Look::Line(lines.len()), survival(&all, seconds)));
    }
    let charts = charts.into_iter().filter(|(_, (lines, _))| lines.len() > 1);
    charts.map(|(ring, (lines, pause))| stall_chart(format!("Ring {ring}"), lines, pause)).collect()
}
