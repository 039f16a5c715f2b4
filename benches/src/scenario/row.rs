//! A case as a row of the lab's table.

use std::fmt::Write as _;

use super::verdict::number;
use super::{Case, Evidence, Measure, Must, Scenario};

/// The measures that have a column each, where the case has a bound on it or its guest a value whatever the bounds; with the digits
/// behind the point.
const COLUMNS: [(Measure, usize); 6] = [
    (Measure::Error, 2),
    (Measure::WorstWindow, 1),
    (Measure::Settle, 0),
    (Measure::StallP999, 2),
    (Measure::StallMax, 2),
    (Measure::ResetCalls, 0),
];

/// The row: scenario, case, the columns, lost pages, then other measures that the case is about, and by how much a bound is missed.
pub fn row(scenario: &Scenario, case: &Case, evidence: &Evidence) -> String {
    let mut row = format!("{:<12} {:<26}", scenario.name, case.name);
    let is_bound = |measure| case.bounds.iter().any(|bound| bound.measure == measure);
    for (measure, digits) in COLUMNS {
        // How far a rate is from its limit says nothing where the guest may be below it.
        let shown = is_bound(measure) || !matches!(measure, Measure::Error | Measure::WorstWindow | Measure::Settle);
        let text = match measure.of(evidence) {
            Some(value) if shown => format!("{value:.digits$}"),
            None if is_bound(measure) => "none".to_owned(),
            _ => "-".to_owned(),
        };
        let _ = write!(row, " {text:>8}");
    }
    let lost = evidence.lost_pages().map_or("-".to_owned(), |lost| lost.to_string());
    let _ = write!(row, " {lost:>5}");
    let mut notes = Vec::new();
    for bound in &case.bounds {
        let ((name, unit), value) = (bound.measure.name(), bound.measure.of(evidence));
        let with_unit = |value: f64| format!("{} {unit}", number(value)).trim_end().to_owned();
        if let Some(value) = value.filter(|_| COLUMNS.iter().all(|&(column, _)| column != bound.measure)) {
            notes.push(format!("{name} {}", with_unit(value)));
        }
        notes.extend(match (value, bound.must) {
            (Some(value), must) if must.met(value) => None,
            (Some(value), Must::AtMost(most)) => Some(format!("BEYOND: {name} by {}", with_unit(value - most))),
            (Some(value), Must::AtLeast(least)) => Some(format!("BEYOND: {name} by {}", with_unit(least - value))),
            (None, _) => Some(format!("BEYOND: {name}, none")),
        });
    }
    notes.extend(evidence.lost_pages().filter(|&lost| lost > 0).map(|lost| format!("BEYOND: {lost} pages lost")));
    let _ = write!(row, "  {}", notes.join("; "));
    row.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::kvm::Scripted;
    use crate::report::example;
    use crate::scenario::{Bound, Trial};

    #[test]
    fn a_row_has_what_was_measured_and_by_how_much_it_is_beyond() {
        let done = Scripted { recording: example::recording(), marks: Vec::new(), ticks: Vec::new() };
        let mut evidence = Evidence::Run(Box::new(done));
        let row_of = |bounds: &[(Measure, Must)], evidence: &Evidence| {
            let bounds = bounds.iter().map(|&(measure, must)| Bound { measure, must }).collect();
            let case = Case { name: "20 MiB/s".into(), trial: Trial::Interrupt(1), bounds };
            row(&Scenario { name: "exact", what: "", cases: Vec::new() }, &case, evidence)
        };
        let error = (Measure::Error, Must::AtMost(0.3));
        let held = row_of(&[error], &evidence);
        let words: Vec<_> = held.split_whitespace().collect();
        assert_eq!(words[..6], ["exact", "20", "MiB/s", "0.00", "-", "-"]);
        assert!(!held.contains("BEYOND") && held.ends_with('0'), "{held}");
        let beyond =
            row_of(&[error, (Measure::Paused, Must::AtMost(0.1)), (Measure::Tick, Must::AtMost(1.0))], &evidence);
        assert!(beyond.contains("; BEYOND: paused by ") && beyond.ends_with("; BEYOND: tick, none"), "{beyond}");
        let Evidence::Run(done) = &mut evidence else { panic!("a run") };
        done.recording.lost_pages = Some(7);
        done.recording.vcpus[0].limits[0].1 = Some(dirtylimit_core::PageRate::from_pages_per_sec(256));
        let lost = row_of(&[error, (Measure::Settle, Must::AtMost(100.0))], &evidence);
        assert!(lost.contains("     none") && lost.contains("BEYOND: error by 9900 %"), "{lost}");
        assert!(lost.ends_with("BEYOND: settled in, none; BEYOND: 7 pages lost"), "{lost}");
    }
}
