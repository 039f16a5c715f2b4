//! What came of migrations: plain values for scripts, a table for people.

use std::fmt;

use serde::Serialize;

use crate::migrate::result::{Migrated, Verdict};
use crate::record::Host;
use crate::report::json::round;
use crate::scenario::measure::median;
use crate::units::significant;
use crate::workload::Workload;

/// All of them; names and meanings are fixed, what is new comes after what was there.
#[derive(Clone, Debug, Serialize)]
pub struct Migrations {
    /// The machine; its kernel decides how a dirty ring is reset.
    pub host: Host,
    /// What the guest did, one per vCPU.
    pub workloads: Vec<Workload>,
    /// The guest's memory.
    pub memory_mib: u64,
    /// What might be sent.
    pub bandwidth_mib_s: f64,
    /// How long the guest might stand still.
    pub downtime_allowed_ms: f64,
    /// When those that have no goal gave up.
    pub deadline_s: f64,
    /// How often each was to be tried.
    pub rounds: u8,
    /// The user ended it early: some may have fewer rounds, or be missing.
    pub interrupted: bool,
    /// In the order in which they were tried.
    pub sides: Vec<Tried>,
}

/// One way to migrate the guest.
#[derive(Clone, Debug, Serialize)]
pub struct Tried {
    /// Who migrates it, and how.
    pub who: String,
    /// How the source is started, where it is another program, without its connection.
    pub command: Option<String>,
    /// How many came about.
    pub done: usize,
    /// Of each measure the median of the rounds; null where half of them or more have none.
    pub median: Measured,
    /// By round.
    pub rounds: Vec<Outcome>,
}

/// One migration. The measures are those of `migrate`, by the same names.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// How it ended.
    pub verdict: Verdict,
    /// In a sentence: why it ended so.
    pub reason: String,
    /// Its measures.
    #[serde(flatten)]
    pub measured: Measured,
    /// Each vCPU's accesses per second over those of the free guest.
    pub work_kept_pct: Vec<Option<f64>>,
    /// Whether the destination's memory was the source's; null where it was not compared, as under another program.
    pub memory_equal: Option<bool>,
}

/// The measures of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// From the order to migrate to the guest that runs at the destination, or to the end.
    pub total_s: Option<f64>,
    /// From the order to stop to the guest that runs at the destination; null where it never did.
    pub downtime_ms: Option<f64>,
    /// What went over the connection.
    pub sent_mib: Option<f64>,
    /// total × (1 − the mean of the work kept, each vCPU's at most all of it).
    pub lost_guest_s: Option<f64>,
    /// The longest gap of the guest's own clock, but for the switch.
    pub longest_stall_ms: Option<f64>,
    /// The least of the work that a vCPU kept.
    pub least_work_kept_pct: Option<f64>,
}

impl From<&Migrated> for Outcome {
    fn from(of: &Migrated) -> Self {
        let ms = |time: std::time::Duration| 1e3 * time.as_secs_f64();
        let measured = Measured {
            total_s: Some(of.total_s.as_secs_f64()),
            downtime_ms: of.downtime_ms.map(ms),
            sent_mib: Some(of.sent_mib),
            lost_guest_s: of.lost_guest_s,
            longest_stall_ms: Some(ms(of.longest_stall_ms)),
            least_work_kept_pct: None,
        };
        let kept = of.vcpus.iter().map(|vcpu| vcpu.work_kept_pct).collect();
        Self { memory_equal: of.memory_equal, ..Self::new(of.verdict, of.reason.clone(), measured, kept) }
    }
}

impl Outcome {
    /// A migration, with its figures rounded.
    pub(super) fn new(verdict: Verdict, reason: String, measured: Measured, kept: Vec<Option<f64>>) -> Self {
        let least_work_kept_pct = kept.iter().copied().flatten().reduce(f64::min);
        let work_kept_pct = kept.into_iter().map(|kept| kept.map(round)).collect();
        let measured = Measured { least_work_kept_pct, ..measured };
        Self {
            verdict,
            reason,
            measured: Measured::each(|field| field(&measured).map(round)),
            work_kept_pct,
            memory_equal: None,
        }
    }
}

impl Measured {
    fn each(value: impl Fn(fn(&Self) -> Option<f64>) -> Option<f64>) -> Self {
        Self {
            total_s: value(|of| of.total_s),
            downtime_ms: value(|of| of.downtime_ms),
            sent_mib: value(|of| of.sent_mib),
            lost_guest_s: value(|of| of.lost_guest_s),
            longest_stall_ms: value(|of| of.longest_stall_ms),
            least_work_kept_pct: value(|of| of.least_work_kept_pct),
        }
    }
}

impl Tried {
    pub(super) fn of(who: String, command: Option<String>, rounds: Vec<Outcome>) -> Self {
        // A value that is missing is worse than any.
        let of = |field: fn(&Measured) -> Option<f64>| {
            median(rounds.iter().map(|round| field(&round.measured).unwrap_or(f64::INFINITY)).collect())
        };
        let median = Measured::each(of);
        let done = rounds.iter().filter(|round| round.verdict == Verdict::Done).count();
        Self { who, command, done, median, rounds }
    }
}

impl Migrations {
    /// Whether a destination's memory was not the source's.
    pub fn lost(&self) -> bool {
        self.sides.iter().flat_map(|side| &side.rounds).any(|round| round.memory_equal == Some(false))
    }

    /// What the guest did, in a word for each vCPU.
    pub(super) fn guest(&self) -> String {
        self.workloads.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
    }
}

/// Three digits; `-` where there is none.
pub(super) fn number(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| significant(value, 3))
}

/// A line for each, at most 80 columns.
impl fmt::Display for Migrations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (guest, memory, kernel) = (self.guest(), self.memory_mib, &self.host.kernel);
        writeln!(f, "{guest} in {memory} MiB, at {} MiB/s", self.bandwidth_mib_s)?;
        writeln!(f, "downtime allowed: {} ms; kernel {kernel}", self.downtime_allowed_ms)?;
        let rounds = self.sides.iter().map(|side| side.rounds.len()).min().unwrap_or(0);
        let interrupted = if self.interrupted { "interrupted: " } else { "" };
        writeln!(f, "{interrupted}medians of {rounds} rounds of each; kept: the least of a vCPU's work\n")?;
        writeln!(f, "{:<27}   done  total  downtime   sent   lost  stall   kept", "")?;
        writeln!(f, "{:<27}             s        ms    MiB      s     ms      %", "")?;
        for side in &self.sides {
            let of = &side.median;
            let done = format!("{}/{}", side.done, side.rounds.len());
            let [total, downtime, sent, lost, stall, kept] =
                [of.total_s, of.downtime_ms, of.sent_mib, of.lost_guest_s, of.longest_stall_ms, of.least_work_kept_pct]
                    .map(number);
            writeln!(f, "{:<27}{done:>7}{total:>7}{downtime:>10}{sent:>7}{lost:>7}{stall:>7}{kept:>7}", side.who)?;
        }
        for side in &self.sides {
            if let Some(undone) = side.rounds.iter().find(|round| round.verdict != Verdict::Done) {
                writeln!(f, "{}: {}", side.who, undone.reason)?;
            }
        }
        Ok(())
    }
}
