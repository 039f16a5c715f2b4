//! What came of a scenario, for people and for scripts.

use std::fmt;
use std::iter;

use serde::Serialize;

use super::measure::{Evidence, median};
use super::reach::Reach;
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
    /// Whether each vCPU had a steal-time page.
    pub steal_time: bool,
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
    /// How much the host was too slow for its guest's limits; null where nothing was limited.
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
    /// The figure: the median of `values`, or what all runs have together where one has too little to tell. Null where most
    /// runs had none.
    pub measured: Option<f64>,
    /// The same with nothing spared because the host was too slow.
    pub strict: Option<f64>,
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
            .flat_map(|(case, tried)| case.bounds.iter().map(|bound| Figure::of(case, *bound, tried)))
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
    fn of(case: &Case, bound: Bound, tried: &[Evidence]) -> Self {
        let Bound { measure, must } = bound;
        let (measured, strict) = (bound.judged(tried, false), bound.judged(tried, true));
        let values = tried.iter().map(|evidence| measure.of(evidence, false)).collect();
        let (measure, unit) = measure.name();
        let (at_most, at_least) = match must {
            Must::AtMost(most) => (Some(most), None),
            Must::AtLeast(least) => (None, Some(least)),
        };
        let met = measured.is_some_and(|value| must.met(value));
        Self { case: case.name.clone(), measure, unit, measured, strict, values, at_most, at_least, met }
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
    fn judged(self, tried: &[Evidence], strict: bool) -> Option<f64> {
        // A value that is missing is worse than any.
        let missing = if matches!(self.must, Must::AtMost(_)) { f64::INFINITY } else { f64::NEG_INFINITY };
        let value = |evidence| self.measure.of(evidence, strict).unwrap_or(missing);
        self.measure.of_all(tried, strict).or_else(|| median(tried.iter().map(value).collect()))
    }
}

impl HostSlow {
    /// Of these runs; `None` where nobody that writes was limited.
    fn of<'a>(runs: impl Iterator<Item = &'a Recording>, figures: &[Figure]) -> Option<Self> {
        let vcpus = runs.flat_map(|run| run.vcpus.iter().map(move |vcpu| (run, vcpu)));
        let pages = vcpus
            .filter(|(_, vcpu)| vcpu.workload.writes())
            .map(|(run, vcpu)| Reach::of(run, vcpu, false).pages())
            .reduce(|(allowed, missing), (more, missed)| (allowed + more, missing + missed));
        let missed = |figure: &&Figure| !figure.strict.is_some_and(|value| figure.must().met(value));
        pages.filter(|&(allowed, _)| allowed > 0.0).map(|(allowed, missing)| Self {
            out_of_reach_pct: 100.0 * missing / allowed,
            strictly_missed: figures.iter().filter(missed).count(),
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
        if let Some(HostSlow { out_of_reach_pct, strictly_missed }) = &self.host_slow {
            let share = number(*out_of_reach_pct);
            write!(
                f,
                "\n{share} % of what was allowed was out of the guest's reach; strictly {strictly_missed} MISSED"
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
    use super::*;
    use crate::guest::kvm::Scripted;
    use crate::report::example;
    use crate::scenario::{Measure, Trial, catalogue};

    fn scenario(must: Must) -> Scenario {
        let bounds = vec![Bound { measure: Measure::Speed, must }];
        let case = Case { name: "a guest".into(), trial: Trial::Interrupt { times: 1, steal_time: false }, bounds };
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
    fn what_the_host_kept_from_the_guest_is_spared_and_told() {
        let mut recording = example::recording();
        // Of 8 s limited to 100 MiB/s, the last one at 50 and without a pause.
        let before = recording.vcpus[0].samples[800];
        for (number, sample) in (1..).zip(&mut recording.vcpus[0].samples[801..]) {
            (sample.net, sample.paused) = (before.net + number * 128, before.paused);
        }
        let run = Scripted { recording, marks: Vec::new(), ticks: Vec::new(), slow: Vec::new() };
        let mut scenario = scenario(Must::AtMost(1.0));
        scenario.cases[0].bounds[0].measure = Measure::Error;
        let verdict = Verdict::of(&scenario, 1, &[vec![Evidence::Run(Box::new(run))]]);
        assert!(verdict.met(), "{verdict:?}");
        assert_eq!((verdict.figures[0].measured, verdict.figures[0].strict), (Some(0.0), Some(12.5)));
        assert_eq!(verdict.host_slow, Some(HostSlow { out_of_reach_pct: 6.25, strictly_missed: 1 }));
        let last = "\n6.25 % of what was allowed was out of the guest's reach; strictly 1 MISSED";
        assert!(verdict.to_string().ends_with(last), "{verdict}");
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
            verdict.host_slow = Some(HostSlow { out_of_reach_pct: 12.345_678, strictly_missed: 1234 });
            let text = verdict.to_string();
            let widest = text.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(80), "{widest:?} columns:\n{text}");
        }
        let text = judged(Must::AtLeast(1.3), &[1.0], 0).to_string();
        let row: Vec<_> = text.lines().nth(3).unwrap().split_whitespace().collect();
        assert_eq!(row, ["a", "guest", "speed", "1", "x", "at", "least", "1.3", "x", "MISSED"]);
    }
}
