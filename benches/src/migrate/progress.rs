//! How a migration goes on, for a person, on stderr: a line for each round, and one every half second within.

use std::time::{Duration, Instant};

use super::modes::{Next, mib_s};
use super::result::{RoundRecord, Sample};
use super::source::Watcher;
use crate::output::say;
use crate::units::significant;

/// Distance between two lines.
const LINE: Duration = Duration::from_millis(500);
const MIB: f64 = (1 << 20) as f64;
const PAGES_PER_MIB: f64 = 256.0;

/// Tells of a migration.
#[derive(Debug)]
pub(super) struct Lines {
    told: Instant,
    /// What the rates are counted from.
    last: Sample,
}

impl Lines {
    pub(super) fn new() -> Self {
        Self { told: Instant::now(), last: Sample::default() }
    }
}

impl Watcher for Lines {
    fn sample(&mut self, round: usize, sample: Sample, next: &Next) {
        if self.told.elapsed() < LINE {
            return;
        }
        self.told = Instant::now();
        let time = sample.at_s.saturating_sub(self.last.at_s).as_secs_f64().max(1e-3);
        let sent = sample.sent_bytes.saturating_sub(self.last.sent_bytes) as f64 / MIB / time;
        let dirtied = sample.dirtied_pages.saturating_sub(self.last.dirtied_pages) as f64 / PAGES_PER_MIB / time;
        self.last = sample;
        let left = sample.left_pages as f64 / PAGES_PER_MIB;
        let (at, budget) = (sample.at_s.as_secs_f64(), budget(next));
        let [left, sent, dirtied] = [left, sent, dirtied].map(|value| significant(value, 3));
        let rates = format!("sending {sent} MiB/s, dirtied {dirtied} MiB/s");
        say(format_args!("{at:6.2} s  round {round}: {left} MiB left, {rates}, {budget}{}", expected(next)));
    }

    fn round(&mut self, number: usize, record: &RoundRecord, next: &Next) {
        let [sent, left] = [record.sent_pages, record.left_pages].map(|pages| pages as f64 / PAGES_PER_MIB);
        let [sent, left] = [sent, left].map(|value| significant(value, 3));
        let (time, verdict, reason) = (record.length_s.as_secs_f64(), &next.verdict, &next.reason);
        say(format_args!(
            "round {number}: sent {sent} MiB in {time:.2} s, {left} MiB left; {verdict} ({reason}): {}{}",
            budget(next),
            expected(next)
        ));
    }
}

fn budget(next: &Next) -> String {
    match mib_s(next.budget) {
        Some(budget) => format!("budget {} MiB/s", significant(budget, 3)),
        None if next.held_percent > 0 => format!("vCPUs held {} %", next.held_percent),
        None => "no throttle".to_owned(),
    }
}

fn expected(next: &Next) -> String {
    next.end.map_or(String::new(), |end| format!(", over at {:.1} s", end.as_secs_f64()))
}
