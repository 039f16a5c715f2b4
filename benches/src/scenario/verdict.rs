//! What came of a scenario, for people and for scripts.

use std::fmt;
use std::iter;
use std::time::Duration;

use serde::Serialize;

use super::measure::{Evidence, median};
use super::yardstick::{HostLate, HostSlow};
use super::{Bound, Case, Must, Scenario};
use crate::record::{Host, Recording};
use crate::units::significant;

/// The document for scripts.
#[derive(Clone, Debug, Serialize)]
pub struct Results<'a> {
    /// The machine.
    pub host: &'a Host,
    /// In the order in which they ran.
    pub scenarios: Vec<&'a Verdict>,
}

/// A scenario, judged.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Its name.
    pub scenario: &'static str,
    /// What it shows.
    pub what: &'static str,
    /// How often each case ran.
    pub runs: u8,
    /// Pages that copies made from the dirty log alone had wrong, in all runs.
    pub lost_pages: u64,
    /// What the host did to a thread that only sleeps, beside the runs; null where there were none.
    pub host_late: Option<HostLate>,
    /// What of them the host's clock had fallen for; null where it never had.
    pub host_slow: Option<HostSlow>,
    /// Every measure of every case.
    pub figures: Vec<Figure>,
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
    /// The figure: the median of `values`, or for a percentile that of all runs together. Null where most runs had none.
    pub measured: Option<f64>,
    /// The same with the time in which the host's clock had fallen.
    pub with_slow: Option<f64>,
    /// One for each run; null where it had none, such as a rate that never settled.
    pub values: Vec<Option<f64>>,
    /// What it may be at most; null where the bound is a lower one.
    pub at_most: Option<f64>,
    /// What it must be at least; null where the bound is an upper one.
    pub at_least: Option<f64>,
    /// Whether it is.
    pub met: bool,
}

impl Verdict {
    /// Judges what was tried: for each case, one piece of evidence a run.
    pub fn of(scenario: &Scenario, runs: u8, tried: &[Vec<Evidence>]) -> Self {
        let figures: Vec<_> = iter::zip(&scenario.cases, tried)
            .flat_map(|(case, tried)| {
                let whole: Vec<_> = tried.iter().map(Evidence::whole).collect();
                case.bounds.iter().map(move |bound| Figure::of(case, *bound, tried, &whole))
            })
            .collect();
        Self {
            scenario: scenario.name,
            what: scenario.what,
            runs,
            lost_pages: tried.iter().flatten().filter_map(Evidence::lost_pages).sum(),
            host_late: None,
            host_slow: HostSlow::of(tried.iter().flatten().filter_map(Evidence::recording), &figures),
            figures,
        }
    }

    /// Whether every figure was met and no page lost.
    pub fn met(&self) -> bool {
        self.lost_pages == 0 && self.figures.iter().all(|figure| figure.met)
    }
}

impl Figure {
    fn of(case: &Case, bound: Bound, tried: &[Evidence], whole: &[Evidence]) -> Self {
        let Bound { measure, must } = bound;
        let (measured, with_slow) = (bound.judged(tried), bound.judged(whole));
        let values = tried.iter().map(|evidence| measure.of(evidence)).collect();
        let (measure, unit) = measure.name();
        let (at_most, at_least) = match must {
            Must::AtMost(most) => (Some(most), None),
            Must::AtLeast(least) => (None, Some(least)),
        };
        let met = measured.is_some_and(|value| must.met(value));
        Self { case: case.name.clone(), measure, unit, measured, with_slow, values, at_most, at_least, met }
    }

    /// The bound, as it is allowed.
    fn must(&self) -> Must {
        match (self.at_most, self.at_least) {
            (Some(most), _) => Must::AtMost(most),
            (None, least) => Must::AtLeast(least.unwrap_or_default()),
        }
    }
}

impl Bound {
    /// The figure to judge by it: of all trials, or the median of each one's.
    fn judged(self, tried: &[Evidence]) -> Option<f64> {
        // A value that is missing is worse than any.
        let missing = if matches!(self.must, Must::AtMost(_)) { f64::INFINITY } else { f64::NEG_INFINITY };
        let of_each = || median(tried.iter().map(|evidence| self.measure.of(evidence).unwrap_or(missing)).collect());
        self.measure.of_all(tried).or_else(of_each)
    }
}

impl HostSlow {
    /// How much of these runs was slow; `None` for nothing.
    fn of<'a>(runs: impl Iterator<Item = &'a Recording>, figures: &[Figure]) -> Option<Self> {
        let (mut slow, mut limited) = (Duration::ZERO, Duration::ZERO);
        for Recording { slow: spans, limited_at, end, .. } in runs {
            limited += end.saturating_sub(*limited_at);
            slow += spans.iter().map(|span| span.end.min(*end).saturating_sub(span.start.max(*limited_at))).sum();
        }
        let missed = |figure: &&Figure| !figure.with_slow.is_some_and(|value| figure.must().met(value));
        (!slow.is_zero()).then(|| Self {
            share_pct: 100.0 * slow.as_secs_f64() / limited.as_secs_f64(),
            missed_with_it: figures.iter().filter(missed).count(),
        })
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
            let met = if figure.met { "ok" } else { "MISSED" };
            writeln!(f, "{case:<26} {:<13} {:>12}  {must:<17} {met}", figure.measure, measured.trim_end())?;
        }
        writeln!(f)?;
        let missed = self.figures.iter().filter(|figure| !figure.met).count();
        match missed {
            0 => write!(f, "all {} figures met, ", self.figures.len())?,
            _ => write!(f, "{missed} of {} figures MISSED, ", self.figures.len())?,
        }
        match self.runs {
            1 => write!(f, "one run each, ")?,
            runs => write!(f, "medians of {runs} runs, ")?,
        }
        match self.lost_pages {
            0 => write!(f, "lost pages: 0")?,
            lost => write!(f, "LOST PAGES: {lost}")?,
        }
        if let Some(HostLate { p999_ms, longest_ms }) = &self.host_late {
            let [p999, longest] = [p999_ms, longest_ms].map(|ms| number(*ms));
            write!(f, "\nbeside them a thread that only sleeps: p99.9 {p999} ms late, longest {longest} ms")?;
        }
        if let Some(HostSlow { share_pct, missed_with_it }) = &self.host_slow {
            let share = number(*share_pct);
            write!(
                f,
                "\nthe host's clock had fallen for {share} % of the time; with that {missed_with_it} were MISSED"
            )?;
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
    use std::ops::Range;

    use super::*;
    use crate::guest::kvm::Scripted;
    use crate::report::example;
    use crate::scenario::{Measure, Trial, catalogue};

    fn scenario(must: Must) -> Scenario {
        let bounds = vec![Bound { measure: Measure::Speed, must }];
        let case = Case { name: "a guest".into(), trial: Trial::Interrupt { times: 1 }, bounds };
        Scenario { name: "speed", what: "who is faster", cases: vec![case] }
    }

    fn judged(must: Must, ratios: &[f64], lost: u64) -> Verdict {
        let tried = ratios.iter().map(|&ratio| match ratio {
            0.0 => Evidence::Interrupted(Vec::new()),
            _ => Evidence::Speed(ratio, lost),
        });
        Verdict::of(&scenario(must), 5, &[tried.collect()])
    }

    #[test]
    fn the_median_is_judged_and_its_bound_is_allowed() {
        assert!(judged(Must::AtLeast(1.3), &[1.0, 1.3, 9.0], 0).met());
        assert!(!judged(Must::AtLeast(1.3), &[1.0, 1.29, 9.0], 0).met());
        assert!(judged(Must::AtMost(1.3), &[1.0, 1.3, 9.0], 0).met());
        assert!(!judged(Must::AtMost(1.3), &[1.0, 1.31, 9.0], 0).met());
    }

    #[test]
    fn a_value_that_is_missing_is_worse_than_any() {
        for must in [Must::AtMost(5.0), Must::AtLeast(0.5)] {
            assert!(judged(must, &[1.0, 0.0, 1.0], 0).met(), "{must:?}");
            let verdict = judged(must, &[1.0, 0.0, 0.0], 0);
            assert!(!verdict.met() && verdict.figures[0].measured.is_none(), "{must:?}");
            assert!(!judged(must, &[], 0).met(), "{must:?}");
        }
    }

    #[test]
    fn what_a_slow_host_spoiled_is_left_out_and_told() {
        let mut recording = example::recording();
        // 8 s limited, of which the last one was at half the rate.
        for sample in recording.vcpus[0].samples.iter_mut().filter(|sample| sample.at.as_secs() >= 8) {
            sample.net -= u64::try_from((sample.at - Duration::from_secs(8)).as_millis()).unwrap() * 256 * 50 / 1000;
        }
        let judged = |slow: &[Range<Duration>]| {
            let recording = Recording { slow: slow.to_vec(), ..recording.clone() };
            let run = Evidence::Run(Box::new(Scripted { recording, marks: Vec::new(), ticks: Vec::new() }));
            let mut scenario = scenario(Must::AtMost(1.0));
            scenario.cases[0].bounds[0].measure = Measure::Error;
            Verdict::of(&scenario, 1, &[vec![run]])
        };
        let strict = judged(&[]);
        assert!(!strict.met() && strict.host_slow.is_none());
        assert!(strict.figures[0].measured > Some(12.0), "{strict:?}");
        let left_out =
            judged(&[Duration::ZERO..Duration::from_secs(2), Duration::from_secs(8)..Duration::from_secs(10)]);
        assert!(left_out.met(), "{left_out:?}");
        assert_eq!(left_out.figures[0].with_slow, strict.figures[0].measured);
        assert_eq!(left_out.host_slow, Some(HostSlow { share_pct: 25.0, missed_with_it: 1 }));
        assert!(left_out.to_string().ends_with("for 25 % of the time; with that 1 were MISSED"), "{left_out}");
    }

    #[test]
    fn lost_pages_are_summed_and_never_met() {
        let verdict = judged(Must::AtLeast(1.0), &[2.0, 2.0], 3);
        assert_eq!(verdict.lost_pages, 6);
        assert!(!verdict.met() && verdict.to_string().contains("LOST PAGES: 6"), "{verdict}");
    }

    #[test]
    fn the_table_fits_eighty_columns() {
        for scenario in catalogue::all() {
            let tried = vec![vec![Evidence::Interrupted(Vec::new())]; scenario.cases.len()];
            let mut verdict = Verdict::of(&scenario, 99, &tried);
            for (figure, value) in
                verdict.figures.iter_mut().zip([0.000_123_456, -12.345_67, 123_456.7, 1e300].repeat(20))
            {
                figure.measured = Some(value);
            }
            verdict.host_late = Some(HostLate { p999_ms: 123.456, longest_ms: 12_345.6 });
            verdict.host_slow = Some(HostSlow { share_pct: 12.345_678, missed_with_it: 1234 });
            let text = verdict.to_string();
            let widest = text.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(80), "{widest:?} columns:\n{text}");
        }
        let text = judged(Must::AtLeast(1.3), &[1.0], 0).to_string();
        let row: Vec<_> = text.lines().nth(3).unwrap().split_whitespace().collect();
        assert_eq!(row, ["a", "guest", "speed", "1", "x", "at", "least", "1.3", "x", "MISSED"]);
    }
}
