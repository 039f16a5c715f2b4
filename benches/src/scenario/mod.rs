//! Named scenarios: each figure that the limiter must reach, measured again by whoever wants to know, on this host.
//!
//! A scenario is data: cases, what each of them runs ([`Trial`]), and the bounds on what is measured
//! ([`catalogue`]). Every case is tried several times, in rounds, so that a spell of noise on the host does not fall on
//! all tries of one case; of each measure the median is judged. No bound depends on how busy the host is; but what no
//! limiter could have reached on it is spared ([`reach`], [`yardstick`]), and what that changed is said.

pub mod by_hand;
pub mod catalogue;
pub mod interrupt;
pub mod measure;
pub mod reach;
pub mod trial;
pub mod verdict;
pub mod yardstick;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::output::tell;
use crate::report::progress::Interrupt;
pub use measure::{Evidence, Measure};
pub use trial::Trial;
pub use verdict::Verdict;
use yardstick::{Clock, HostLate};

/// Sleeps beside the runs are as long as the limiter's slices.
const SLEEP: Duration = Duration::from_millis(3);
/// The name that stands for all scenarios.
const ALL: &str = "all";

/// The options of `scenario`.
#[derive(Clone, Debug, Args)]
pub struct Scenarios {
    /// Which ones; `all` for all of them
    #[arg(required_unless_present = "list", value_name = "NAME", value_parser = names())]
    pub names: Vec<String>,

    /// How often each case runs, 1 to 99
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=99))]
    pub runs: u8,

    /// Have KVM tell each vCPU the time that was stolen from it, as every Linux guest asks for: it writes a page of the
    /// guest at nearly every entry, and logs it
    #[arg(long)]
    pub steal_time: bool,

    /// Write the result as JSON; `-` is standard output, and nothing else goes there then
    #[arg(long, value_name = "FILE|-")]
    pub json: Option<PathBuf>,

    /// Write a page with pictures, DIR/index.html; it needs no network
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,

    /// Say which scenarios there are
    #[arg(long)]
    pub list: bool,
}

fn names() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(catalogue::all().into_iter().map(|scenario| scenario.name).chain([ALL]))
}

/// Some cases that belong together.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What it shows, in a line.
    pub what: &'static str,
    /// Its cases.
    pub cases: Vec<Case>,
}

/// One thing that is tried several times.
#[derive(Clone, Debug)]
pub struct Case {
    /// At most 26 characters.
    pub name: String,
    /// What runs.
    pub trial: Trial,
    /// What must come out.
    pub bounds: Vec<Bound>,
}

/// What a measure must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// The measure.
    pub measure: Measure,
    /// Its bound.
    pub must: Must,
}

/// A bound, which is itself allowed, in the measure's unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Must {
    /// An upper one.
    AtMost(f64),
    /// A lower one.
    AtLeast(f64),
}

impl Must {
    /// Whether `value` keeps to it.
    pub fn met(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }
}

impl Scenarios {
    /// The scenarios that were asked for, each once, in the order of the list.
    pub fn chosen(&self) -> Vec<Scenario> {
        let chosen = |scenario: &Scenario| self.names.iter().any(|name| name == ALL || name == scenario.name);
        let mut chosen: Vec<_> = catalogue::all().into_iter().filter(chosen).collect();
        let cases = chosen.iter_mut().flat_map(|scenario| &mut scenario.cases);
        cases.for_each(|case| *case.trial.steal_time() = self.steal_time);
        chosen
    }

    /// What `--list` prints.
    pub fn listed() -> String {
        let line = |scenario: Scenario| format!("{:<12} {}\n", scenario.name, scenario.what);
        catalogue::all().into_iter().map(line).collect()
    }
}

/// A scenario, what was tried of it, and what came of that.
#[derive(Clone, Debug)]
pub struct Tried {
    /// The scenario.
    pub scenario: Scenario,
    /// One piece for each run, by case.
    pub evidence: Vec<Vec<Evidence>>,
    /// What came of it.
    pub verdict: Verdict,
}

/// Runs a scenario and judges it; says on stderr what it is at.
///
/// # Errors
/// A run that fails, or the user's wish to end.
pub fn run(scenario: Scenario, runs: u8, interrupt: &Interrupt) -> Result<Tried> {
    let mut evidence = vec![Vec::new(); scenario.cases.len()];
    let mut late = Vec::new();
    let mut clock = Clock::default();
    for round in 0..runs {
        for (number, (case, tried)) in scenario.cases.iter().zip(&mut evidence).enumerate() {
            let (case_of, cases) = (number + 1, scenario.cases.len());
            tell(format_args!(
                "{} run {} of {runs}, case {case_of} of {cases}: {}",
                scenario.name,
                round + 1,
                case.name
            ));
            let trial = || case.trial.run(usize::from(round), interrupt, &mut clock);
            let (found, sleeps) = yardstick::beside(SLEEP, trial);
            tried.push(found?);
            late.push(sleeps);
            ensure!(!interrupt.requested(), "interrupted");
        }
    }
    let mut verdict = Verdict::of(&scenario, runs, &evidence);
    verdict.host_late = HostLate::of(&late);
    Ok(Tried { scenario, evidence, verdict })
}
