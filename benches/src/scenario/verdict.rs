//! What came of a scenario, for people and for scripts.

use std::fmt;
use std::iter;

use serde::Serialize;

use super::{Bound, Case, LATE_MS, Must, Scenario, Try};
use crate::record::Host;
use crate::units::significant;

/// The document for scripts.
#[derive(Clone, Debug, Serialize)]
pub struct Results<'a> {
    /// The machine.
    pub host: &'a Host,
    /// In the order in which they ran.
    pub scenarios: Vec<&'a Verdict>,
    /// The user ended it early.
    pub interrupted: bool,
}

/// A scenario, judged.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Its name.
    pub scenario: &'static str,
    /// What it shows.
    pub what: &'static str,
    /// Pages that copies made from the dirty log alone had wrong, in all cases.
    pub lost_pages: u64,
    /// Every measure of every case that was tried.
    pub figures: Vec<Figure>,
    /// How many cases were not, because the user ended it early.
    pub untried: usize,
}

/// One measure of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// The case.
    pub case: String,
    /// The measure.
    pub measure: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// The figure; null where there was none, such as a rate that never settled.
    pub measured: Option<f64>,
    /// What it may be at most; null where the bound is a lower one.
    pub at_most: Option<f64>,
    /// What it must be at least; null where the bound is an upper one.
    pub at_least: Option<f64>,
    /// How late the host ended all but a thousandth of the sleeps of a thread that only sleeps, beside the case; null where
    /// nobody looked.
    pub late_p999_ms: Option<f64>,
    /// What came of it.
    pub judged: Judged,
}

/// What came of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Judged {
    /// It keeps to its bound.
    Met,
    /// It does not.
    Missed,
    /// The host was too late to show it.
    Invalid,
}

impl Verdict {
    /// Judges what was tried of each case.
    pub fn of(scenario: &Scenario, tries: &[Try]) -> Self {
        let figures = iter::zip(&scenario.cases, tries)
            .flat_map(|(case, tried)| case.bounds.iter().map(|bound| Figure::of(case, *bound, tried)));
        Self {
            scenario: scenario.name,
            what: scenario.what,
            lost_pages: tries.iter().filter_map(|tried| tried.evidence.lost_pages()).sum(),
            figures: figures.collect(),
            untried: scenario.cases.len() - tries.len(),
        }
    }

    /// How many figures that came of.
    pub fn count(&self, judged: Judged) -> usize {
        self.figures.iter().filter(|figure| figure.judged == judged).count()
    }
}

impl Figure {
    fn of(case: &Case, bound: Bound, tried: &Try) -> Self {
        let Bound { measure, must } = bound;
        let measured = measure.of(&tried.evidence);
        let (measure, unit) = measure.name();
        let (at_most, at_least) = match must {
            Must::AtMost(most) => (Some(most), None),
            Must::AtLeast(least) => (None, Some(least)),
        };
        let judged = match measured.is_some_and(|value| must.met(value)) {
            _ if tried.is_invalid() => Judged::Invalid,
            true => Judged::Met,
            false => Judged::Missed,
        };
        let late_p999_ms = tried.late_p999_ms;
        Self { case: case.name.clone(), measure, unit, measured, at_most, at_least, late_p999_ms, judged }
    }

    /// The bound, as it is allowed.
    fn must(&self) -> Must {
        match (self.at_most, self.at_least) {
            (Some(most), _) => Must::AtMost(most),
            (None, least) => Must::AtLeast(least.unwrap_or_default()),
        }
    }
}

impl fmt::Display for Verdict {
    /// A table of at most 80 columns.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.scenario, self.what)?;
        writeln!(f)?;
        writeln!(f, "{:<26} {:<13} {:>12}  {:<17}", "case", "measure", "measured", "must be")?;
        let mut last = "";
        for figure in &self.figures {
            // A case of several measures is named once.
            let case = if figure.case == last { "" } else { &figure.case };
            last = &figure.case;
            let with_unit = |value| format!("{} {}", number(value), figure.unit);
            let measured = figure.measured.map_or("none".into(), with_unit);
            let must = match figure.must() {
                Must::AtMost(most) => format!("at most {}", with_unit(most)),
                Must::AtLeast(least) => format!("at least {}", with_unit(least)),
            };
            let judged = match figure.judged {
                Judged::Met => "ok",
                Judged::Missed => "MISSED",
                Judged::Invalid => "invalid",
            };
            writeln!(f, "{case:<26} {:<13} {:>12}  {must:<17} {judged}", figure.measure, measured.trim_end())?;
        }
        writeln!(f)?;
        match (self.count(Judged::Missed), self.count(Judged::Invalid)) {
            (0, 0) => write!(f, "all {} figures met, ", self.figures.len())?,
            (missed, 0) => write!(f, "{missed} of {} figures MISSED, ", self.figures.len())?,
            (0, invalid) => write!(f, "{invalid} of {} figures invalid, ", self.figures.len())?,
            (missed, invalid) => write!(f, "{missed} of {} figures MISSED, {invalid} invalid, ", self.figures.len())?,
        }
        match self.lost_pages {
            0 => write!(f, "lost pages: 0")?,
            lost => write!(f, "LOST PAGES: {lost}")?,
        }
        if self.untried > 0 {
            write!(f, ", {} of its cases not tried", self.untried)?;
        }
        if let Some(late) = self.figures.iter().filter_map(|figure| figure.late_p999_ms).reduce(f64::max) {
            let late = number(late);
            write!(f, "\na thread that only sleeps was {late} ms late, p99.9; {LATE_MS} ms and below is judged")?;
        }
        Ok(())
    }
}

/// Enough digits to tell it from its bound, in at most nine characters.
pub(crate) fn number(value: f64) -> String {
    if value.abs() < 1e6 { significant(value, 4) } else { format!("{value:.1e}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::{Evidence, Measure, Trial, catalogue};

    fn judged(must: Must, ratio: f64, late_p999_ms: Option<f64>) -> Verdict {
        let bounds = vec![Bound { measure: Measure::Speed, must }];
        let case = Case { name: "a guest".into(), trial: Trial::Interrupt(1), bounds };
        let scenario = Scenario { name: "speed", what: "who is faster", cases: vec![case] };
        let evidence = if ratio == 0.0 { Evidence::Interrupted(Vec::new()) } else { Evidence::Speed(ratio, 3) };
        Verdict::of(&scenario, &[Try { evidence, late_p999_ms }])
    }

    #[test]
    fn a_bound_is_allowed_and_a_value_that_is_missing_is_missed() {
        for (must, ratio, met) in [
            (Must::AtLeast(1.3), 1.3, Judged::Met),
            (Must::AtLeast(1.3), 1.29, Judged::Missed),
            (Must::AtMost(1.3), 1.3, Judged::Met),
            (Must::AtMost(1.3), 1.31, Judged::Missed),
            (Must::AtMost(1.3), 0.0, Judged::Missed),
            (Must::AtLeast(1.3), 0.0, Judged::Missed),
        ] {
            assert_eq!(judged(must, ratio, None).figures[0].judged, met, "{must:?} {ratio}");
        }
    }

    #[test]
    fn on_a_late_host_nothing_is_judged_and_else_all_is() {
        for (late, ratio, expected) in [
            (0.5, 2.0, Judged::Met),
            (0.5, 1.0, Judged::Missed),
            (0.51, 2.0, Judged::Invalid),
            (0.51, 1.0, Judged::Invalid),
        ] {
            let verdict = judged(Must::AtLeast(1.3), ratio, Some(late));
            assert_eq!(verdict.figures[0].judged, expected, "{late} {ratio}");
            assert_eq!(verdict.count(expected), 1);
            let told = format!("\na thread that only sleeps was {late} ms late, p99.9; 0.5 ms and below is judged");
            assert!(verdict.to_string().ends_with(&told), "{verdict}");
        }
    }

    #[test]
    fn lost_pages_are_told() {
        let verdict = judged(Must::AtLeast(1.0), 2.0, None);
        assert_eq!(verdict.lost_pages, 3);
        assert!(verdict.to_string().ends_with("all 1 figures met, LOST PAGES: 3"), "{verdict}");
    }

    #[test]
    fn the_table_fits_eighty_columns() {
        for scenario in catalogue::all() {
            let tried = Try { evidence: Evidence::Interrupted(Vec::new()), late_p999_ms: Some(12_345.678) };
            let mut verdict = Verdict::of(&scenario, &vec![tried; scenario.cases.len()]);
            for (figure, value) in
                verdict.figures.iter_mut().zip([0.000_123_456, -12.345_67, 123_456.7, 1e300].repeat(20))
            {
                figure.measured = Some(value);
            }
            let text = verdict.to_string();
            let widest = text.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(80), "{widest:?} columns:\n{text}");
        }
        let text = judged(Must::AtLeast(1.3), 1.0, None).to_string();
        let row: Vec<_> = text.lines().nth(3).unwrap().split_whitespace().collect();
        assert_eq!(row, ["a", "guest", "speed", "1", "x", "at", "least", "1.3", "x", "MISSED"]);
    }
}
