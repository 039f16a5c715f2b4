//! Named scenarios: each figure that the limiter must reach, which anybody can measure again.
//!
//! A scenario is data: cases, what each of them runs ([`Trial`]), and the bounds on what is measured ([`catalogue`]). Each
//! case runs once and is judged against its bounds alone. In the lab, in virtual time, that is exact, and makes the rows of
//! `benches/lab.txt`; on a host that ends sleeps late a case is invalid instead.

pub mod by_hand;
pub mod catalogue;
pub mod interrupt;
pub mod measure;
pub mod row;
pub mod trial;
pub mod verdict;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::cli::named;
use crate::late;
use crate::output::{print, say};
use crate::report::progress::{Interrupt, Left};
pub use measure::{Evidence, Measure};
pub use row::row;
pub use trial::Trial;
pub use verdict::Verdict;

/// Sleeps beside the runs are as long as the limiter's slices.
const SLEEP: Duration = Duration::from_millis(3);
/// Where all but a thousandth of the sleeps of a thread that only sleeps end later than this, a case is invalid: it is as much as
/// a pause may be late.
const LATE_MS: f64 = 0.5;
/// The name that stands for all scenarios.
const ALL: &str = "all";

/// The options of `scenario`.
#[derive(Clone, Debug, Args)]
pub struct Scenarios {
    /// Which ones; `all` for all of them
    #[arg(required_unless_present = "list", value_name = "NAME", value_parser = names())]
    pub names: Vec<String>,

    /// Print the rows of the lab's table instead, each when its case is over. What is missed is in its row and not in the
    /// exit status, and no case is invalid: this is for virtual time
    #[arg(long, conflicts_with = "json")]
    pub rows: bool,

    /// Write the result as JSON; `-` is standard output, and nothing else goes there then
    #[arg(long, value_name = "FILE|-")]
    pub json: Option<PathBuf>,

    /// Write a page with pictures, DIR/index.html; it needs no network
    #[arg(long, value_name = "DIR", value_parser = named())]
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

/// One thing that is tried.
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
        catalogue::all().into_iter().filter(chosen).collect()
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
    /// What was tried, by case.
    pub tries: Vec<Try>,
    /// What came of it.
    pub verdict: Verdict,
}

/// A case that was tried.
#[derive(Clone, Debug)]
pub struct Try {
    /// What it brought up.
    pub evidence: Evidence,
    /// How late the host ended sleeps meanwhile, see [`late::beside`].
    pub late_p999_ms: Option<f64>,
}

impl Try {
    /// Whether the host was too late to show anything.
    pub fn is_invalid(&self) -> bool {
        self.late_p999_ms.is_some_and(|late| late > LATE_MS)
    }
}

/// Runs a scenario and judges it; says on stderr what it is at. With `rows`, prints each case's row. If the user interrupts it,
/// what was done before is judged.
///
/// # Errors
/// A run that fails.
pub fn run(scenario: Scenario, rows: bool, left: &mut Left, interrupt: &Interrupt) -> Result<Tried> {
    let mut tries = Vec::new();
    for (number, case) in (1..).zip(&scenario.cases) {
        let (of, left) = (scenario.cases.len(), left.begin(case.trial.time()));
        say(format_args!("{}, case {number} of {of}: {}, about {left}", scenario.name, case.name));
        let (evidence, late_p999_ms) = match rows {
            true => (case.trial.run(interrupt), None),
            false => late::beside(SLEEP, || case.trial.run(interrupt)),
        };
        // What a run says that was cut short is no evidence.
        if interrupt.requested() {
            break;
        }
        let evidence = evidence?;
        if rows {
            print(row(&scenario, case, &evidence))?;
        }
        tries.push(Try { evidence, late_p999_ms });
    }
    let verdict = Verdict::of(&scenario, &tries);
    Ok(Tried { scenario, tries, verdict })
}
