//! The page of scenarios.

use std::collections::BTreeMap;

use anyhow::Result;

use super::charts::{rate_chart, stall_chart, survival};
use super::page::{Cell, Page, Table, Tone};
use super::plot::{Axis, Chart, Look, Series};
use super::run;
use crate::record::{Host, Recording, Stalls};
use crate::scenario::measure::Evidence;
use crate::scenario::verdict::{Figure, Judged, Verdict, number};
use crate::scenario::{Case, Scenario, Tried, Try};
use crate::units::{mib_per_sec, significant};

/// The page of what was tried on `host`.
///
/// # Errors
/// What the drawing library reports is passed on.
pub fn page(all: &[Tried], host: &Host) -> Result<Page> {
    let count = |judged| all.iter().map(|tried| tried.verdict.count(judged)).sum::<usize>();
    let [met, missed, invalid] = [Judged::Met, Judged::Missed, Judged::Invalid].map(count);
    let lost: u64 = all.iter().map(|tried| tried.verdict.lost_pages).sum();
    let mut lede = format!("{met} figures met on this host, {missed} missed, {invalid} invalid, {lost} pages lost.");
    if all.iter().any(|tried| tried.verdict.untried > 0) {
        lede += " It was interrupted.";
    }
    let mut page = Page::new("What the limiter must reach", lede);
    for Tried { scenario, tries, verdict } in all {
        let section = page.section(format!("{}: {}", scenario.name, scenario.what));
        section.table(&figure_table(verdict));
        let over_limit = over_limit(scenario, verdict);
        if !over_limit.is_empty() {
            section.picture("Each figure over limit and ring.", &over_limit)?;
        }
        let rates: Vec<_> = scenario.cases.iter().zip(tries).flat_map(rates).collect();
        if !rates.is_empty() {
            section.picture("Pages newly dirtied, as means over 100 ms.", &rates)?;
        }
        let stalls = stalls(scenario, tries);
        if !stalls.is_empty() {
            section.picture("How often the guest stood still for at least this time.", &stalls)?;
        }
    }
    page.section("How it was made").command().host(host);
    Ok(page)
}

/// A row for each case, a column for each measure and bound; the nearer to its bound, the deeper a figure is coloured.
fn figure_table(verdict: &Verdict) -> Table {
    let column = |figure: &Figure| {
        let unit = if figure.unit.is_empty() { String::new() } else { format!(" ({})", figure.unit) };
        let bound = match (figure.at_most, figure.at_least) {
            (Some(most), _) => format!("at most {}", number(most)),
            (None, least) => format!("at least {}", number(least.unwrap_or_default())),
        };
        format!("{}{unit}, {bound}", figure.measure)
    };
    let names = distinct(verdict.figures.iter().map(column));
    let row = |case: &str| {
        let figures = || verdict.figures.iter().filter(|figure| figure.case == case);
        let cell =
            |name: &String| figures().find(|figure| column(figure) == *name).map(figure_cell).unwrap_or_default();
        std::iter::once(Cell::from(case)).chain(names.iter().map(cell)).collect()
    };
    Table {
        caption: "What is missed has a cross; where the host was too late to show it, it is invalid.".to_owned(),
        rows: distinct(verdict.figures.iter().map(|figure| figure.case.as_str())).into_iter().map(row).collect(),
        columns: std::iter::once("case".to_owned()).chain(names.iter().cloned()).collect(),
    }
}

fn figure_cell(figure: &Figure) -> Cell {
    let text = figure.measured.map_or("none".to_owned(), number);
    let share = match (figure.measured, figure.at_most, figure.at_least) {
        (Some(value), Some(most), _) => value / most,
        (Some(value), _, Some(least)) => least / value,
        _ => 1.0,
    };
    match figure.judged {
        Judged::Met => Cell::from(text).toned(Tone::Heat(share)),
        Judged::Missed => Cell::from(text + " ✗").toned(Tone::Bad),
        Judged::Invalid => Cell::from(text + " (invalid)"),
    }
}

fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    all.fold(Vec::new(), |mut seen, one| {
        if !seen.contains(&one) {
            seen.push(one);
        }
        seen
    })
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
    let of_measure = |measure: &'static str| verdict.figures.iter().filter(move |figure| figure.measure == measure);
    let chart = |measure| {
        let first = of_measure(measure).next()?;
        let mut rings: BTreeMap<u32, Vec<(f64, f64)>> = BTreeMap::new();
        let mut bounds = Vec::new();
        for figure in of_measure(measure) {
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
            title: capitalised(measure),
            x: Axis::log("limit (MiB/s)"),
            y: Axis::linear(format!("{measure} ({})", first.unit)),
            right: None,
            series,
        })
    };
    distinct(verdict.figures.iter().map(|figure| figure.measure)).into_iter().filter_map(chart).collect()
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().into_iter().flat_map(char::to_uppercase).chain(letters).collect()
}

/// The recording of a case; `None` where it has none of its own.
fn recording(tried: &Try) -> Option<&Recording> {
    match &tried.evidence {
        Evidence::Run(done) => Some(&done.recording),
        Evidence::Speed(..) | Evidence::Interrupted(_) => None,
    }
}

/// The rates over time of a case.
fn rates((case, tried): (&Case, &Try)) -> Vec<Chart> {
    let charts = |recording| match run::of_vm(recording) {
        Some(series) => vec![rate_chart(&case.name, series)],
        None => run::of_vcpus(recording, &case.name),
    };
    recording(tried).map_or_else(Vec::new, charts)
}

/// A chart for each ring, where the cases differ in their limits: a line for each limit.
fn stalls(scenario: &Scenario, tries: &[Try]) -> Vec<Chart> {
    let mut charts: BTreeMap<u32, (Vec<Series>, std::time::Duration)> = BTreeMap::new();
    for (case, tried) in scenario.cases.iter().zip(tries) {
        let (Some((limit, ring)), Some(plan)) = (place(case), case.trial.plan()) else { continue };
        let vcpus = || recording(tried).into_iter().flat_map(|recording| &recording.vcpus);
        let seconds = vcpus().map(|vcpu| vcpu.limited_time.as_secs_f64()).sum();
        let Some(all) = Stalls::sum(vcpus().map(|vcpu| &vcpu.stalls)) else { continue };
        let (lines, _) = charts.entry(ring).or_insert((Vec::new(), plan.max_pause));
        let name = format!("at {} MiB/s", significant(limit, 4));
        lines.push(Series::new(name, Look::Line(lines.len()), survival(&all, seconds)));
    }
    let charts = charts.into_iter().filter(|(_, (lines, _))| lines.len() > 1);
    charts.map(|(ring, (lines, pause))| stall_chart(format!("Ring {ring}"), lines, pause)).collect()
}
