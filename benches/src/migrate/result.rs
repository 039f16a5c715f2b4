//! What a migration came to: JSON for scripts, a table for people.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::modes::Mode;
use crate::report::json::round;
use crate::units::significant;
use crate::workload::Workload;

/// How it ended, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The guest runs at the destination.
    Done,
    /// The goal could not be met.
    Unreachable,
    /// Neither throttle nor downtime would have helped.
    Stalled,
    /// The user ended it.
    Cancelled,
    /// It failed.
    Failed,
}

impl Verdict {
    /// The exit status that says so.
    pub const fn status(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Unreachable => 4,
            Self::Stalled => 5,
            Self::Cancelled => 6,
        }
    }
}

/// A migration.
#[derive(Clone, Debug, Serialize)]
pub struct Migrated {
    /// What steered it.
    pub mode: Mode,
    /// How it ended.
    pub verdict: Verdict,
    /// From the first page to the guest that runs at the destination, without the comparison of the memory; where that did
    /// not come about, to the end.
    #[serde(serialize_with = "seconds")]
    pub total_s: Duration,
    /// How long the guest stood still at the switch, without the comparison of the memory: by the source's clock from the
    /// order to stop to the answer that it runs, or by the guest's where that is longer. Null where there was no switch.
    #[serde(serialize_with = "opt_millis")]
    pub downtime_ms: Option<Duration>,
    /// Bytes that went over the wire, hashes not counted, in MiB.
    #[serde(serialize_with = "thousandths")]
    pub sent_mib: f64,
    /// Every round, in order.
    pub rounds: Vec<RoundRecord>,
    /// `total_s` × (1 − the mean of the work kept by vCPUs that work, each at most all of it).
    #[serde(serialize_with = "opt_thousandths")]
    pub lost_guest_s: Option<f64>,
    /// The longest gap of the guest's own clock, but for the switch.
    #[serde(serialize_with = "millis")]
    pub longest_stall_ms: Duration,
    /// Whether the destination's memory was the source's at the switch, all pages of it; null where it did not come so far.
    pub memory_equal: Option<bool>,
    /// Each vCPU.
    pub vcpus: Vec<VcpuRecord>,
    /// In a sentence: why it ended so.
    pub reason: String,
    /// Bytes of memory, in MiB.
    pub memory_mib: u64,
    /// The bandwidth that was allowed; null is as much as there was.
    #[serde(serialize_with = "opt_thousandths")]
    pub bandwidth_mib_s: Option<f64>,
    /// The downtime that was allowed.
    #[serde(serialize_with = "millis")]
    pub downtime_allowed_ms: Duration,
    /// By the guest's clock alone: the gap between two looks of a vCPU at its counter. Null where none looked.
    #[serde(serialize_with = "opt_millis")]
    pub guest_downtime_ms: Option<Duration>,
    /// How long the comparison took, in which the guest stood still too.
    #[serde(serialize_with = "opt_millis")]
    pub check_ms: Option<Duration>,
    /// Pages of the destination that were not the source's.
    pub unequal_pages: Option<u64>,
    /// Whether the guest's counters and clocks went on at the destination, and none stepped back.
    pub counters_go_on: Option<bool>,
    /// From the end of a migration that did not come about to the guest's next access at the source, unthrottled.
    #[serde(serialize_with = "opt_millis")]
    pub source_resumed_ms: Option<Duration>,
    /// What the vCPUs that work did in the half second after that, at the source, in percent of the free guest's.
    #[serde(serialize_with = "opt_thousandths")]
    pub source_work_pct: Option<f64>,
    /// How long the limiter kept its vCPUs paused in that half second, all together.
    #[serde(serialize_with = "opt_millis")]
    pub source_paused_ms: Option<Duration>,
    /// Which attempt it was.
    pub attempt: u32,
    /// Entries of each vCPU's ring.
    pub ring: u32,
    /// What the picture is drawn from: every 20 ms or so.
    pub samples: Vec<Sample>,
}

/// A round.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RoundRecord {
    /// Pages sent in it, zero ones included.
    pub sent_pages: u64,
    /// Time spent sending them.
    #[serde(serialize_with = "seconds")]
    pub send_s: Duration,
    /// Dirty when it ended, the held-back ones included.
    pub left_pages: u64,
    /// Of these, in the rings of limited vCPUs.
    pub held_back_pages: u64,
    /// The budget from then on; null is none.
    #[serde(serialize_with = "opt_thousandths")]
    pub budget_mib_s: Option<f64>,
    /// What was decided then.
    pub verdict: String,
    /// Why.
    pub reason: String,
    /// Pages that were not sent, for they were dirty again.
    pub skipped_pages: u64,
    /// All of it, from one look at the log to the next.
    #[serde(serialize_with = "seconds")]
    pub length_s: Duration,
    /// Percent of the time that all vCPUs are kept out of the guest from then on.
    pub held_percent: u32,
}

/// A vCPU.
#[derive(Clone, Debug, Serialize)]
pub struct VcpuRecord {
    /// Its number.
    pub index: usize,
    /// What it ran.
    pub workload: Workload,
    /// Its accesses per second from the first page to the end, over those of the free guest without a dirty log.
    #[serde(serialize_with = "opt_thousandths")]
    pub work_kept_pct: Option<f64>,
    /// Those of the free guest.
    #[serde(serialize_with = "thousandths")]
    pub free_accesses_per_s: f64,
}

/// What was left, sent and dirtied at an instant.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sample {
    /// Since it began.
    #[serde(serialize_with = "seconds")]
    pub at_s: Duration,
    /// Pages still to be sent.
    pub left_pages: u64,
    /// Bytes sent so far.
    pub sent_bytes: u64,
    /// Pages newly dirtied so far.
    pub dirtied_pages: u64,
    /// The budget in force.
    #[serde(serialize_with = "opt_thousandths")]
    pub budget_mib_s: Option<f64>,
}

impl Migrated {
    /// The exit status that says how it ended.
    pub fn status(&self) -> u8 {
        if self.memory_equal == Some(false) || self.counters_go_on == Some(false) { 3 } else { self.verdict.status() }
    }
}

/// The work that each vCPU kept, in percent of its `free` accesses per second (`None` where it has none), and the lost guest
/// time in seconds, from their accesses before and after `time`.
pub(crate) fn kept(free: &[f64], before: &[u64], after: &[u64], time: Duration) -> (Vec<Option<f64>>, Option<f64>) {
    let seconds = time.as_secs_f64();
    let share = |((&free, before), after): ((&f64, &u64), &u64)| {
        (free > 0.0 && seconds > 0.0).then(|| after.saturating_sub(*before) as f64 / seconds / free)
    };
    let shares: Vec<_> = free.iter().zip(before).zip(after).map(share).collect();
    // A reader that runs faster while a writer is throttled makes up for nothing that the writer lost.
    let lost: Vec<_> = shares.iter().flatten().map(|share| 1.0 - share.min(1.0)).collect();
    let mean = (!lost.is_empty()).then(|| seconds * lost.iter().sum::<f64>() / lost.len() as f64);
    (shares.into_iter().map(|share| share.map(|share| 100.0 * share)).collect(), mean)
}

fn seconds<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(round(time.as_secs_f64()))
}

fn millis<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(round(1e3 * time.as_secs_f64()))
}

fn opt_millis<S: Serializer>(time: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    time.map(|time| round(1e3 * time.as_secs_f64())).serialize(to)
}

fn thousandths<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(round(*value))
}

fn opt_thousandths<S: Serializer>(value: &Option<f64>, to: S) -> Result<S::Ok, S::Error> {
    value.map(round).serialize(to)
}

/// A table of the rounds, and what came of them below.
impl fmt::Display for Migrated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |pages: u64| pages as f64 / 256.0;
        write!(f, "mode {}, {} MiB of memory, ", self.mode, self.memory_mib)?;
        match self.bandwidth_mib_s {
            Some(bandwidth) => write!(f, "{} MiB/s, ", significant(bandwidth, 4))?,
            None => f.write_str("no cap, ")?,
        }
        writeln!(f, "downtime of {} ms, ring {}", self.downtime_allowed_ms.as_millis(), self.ring)?;
        writeln!(f)?;
        writeln!(f, "round   sent   skip    time   left   held  then")?;
        writeln!(f, "         MiB    MiB       s    MiB    MiB")?;
        for (number, round) in (1..).zip(&self.rounds) {
            let [sent, skipped, left, held] =
                [round.sent_pages, round.skipped_pages, round.left_pages, round.held_back_pages].map(mib);
            let time = round.length_s.as_secs_f64();
            write!(f, "{number:>5}{sent:>7.1}{skipped:>7.1}{time:>8.3}{left:>7.1}{held:>7.1}  {}", round.verdict)?;
            match round.budget_mib_s {
                Some(budget) => writeln!(f, ", {} MiB/s", significant(budget, 3))?,
                None if round.held_percent > 0 => writeln!(f, ", vCPUs held {} %", round.held_percent)?,
                None => writeln!(f)?,
            }
        }
        writeln!(f)?;
        write!(f, "total: {:.3} s, sent: {:.1} MiB", self.total_s.as_secs_f64(), self.sent_mib)?;
        if let Some(lost) = self.lost_guest_s {
            write!(f, ", lost guest time: {lost:.3} s")?;
        }
        writeln!(f)?;
        if let Some(downtime) = self.downtime_ms {
            write!(f, "downtime: {:.1} ms", 1e3 * downtime.as_secs_f64())?;
            if let Some(guest) = self.guest_downtime_ms {
                write!(f, " ({:.1} by the guest's clock)", 1e3 * guest.as_secs_f64())?;
            }
            let check = 1e3 * self.check_ms.unwrap_or_default().as_secs_f64();
            writeln!(f, ", and {check:.1} for the comparison, which no migration needs")?;
        }
        writeln!(f, "longest stall but for the switch: {:.1} ms", 1e3 * self.longest_stall_ms.as_secs_f64())?;
        for vcpu in &self.vcpus {
            let kept = vcpu.work_kept_pct.map_or("–".to_owned(), |kept| format!("{kept:.1} %"));
            writeln!(f, "vCPU {} ({}): {kept} of its work kept", vcpu.index, vcpu.workload)?;
        }
        match (self.memory_equal, self.unequal_pages) {
            (Some(true), _) => writeln!(f, "memory: equal, all {} pages", self.memory_mib * 256)?,
            (Some(false), pages) => writeln!(f, "MEMORY: {} PAGES ARE NOT THE SOURCE'S", pages.unwrap_or(0))?,
            (None, _) => writeln!(f, "memory: not compared")?,
        }
        if let Some(resumed) = self.source_resumed_ms {
            let resumed = 1e3 * resumed.as_secs_f64();
            write!(f, "the guest goes on at the source since {resumed:.1} ms after the end")?;
            let work = self.source_work_pct.map_or(String::new(), |work| format!(", at {work:.0} % of its free speed"));
            writeln!(f, "{work}")?;
        }
        let verdict = format!("{:?}", self.verdict).to_lowercase();
        writeln!(f, "verdict: {verdict}: {}", self.reason)
    }
}
