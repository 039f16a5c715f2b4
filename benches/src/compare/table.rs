//! The comparison for people: a block for each case, at most 80 columns.

use std::fmt;

use super::result::{Comparison, Measured, Vcpu};
use crate::report::table::{number, signed, whole};

/// How one measure is written.
struct Row {
    name: &'static str,
    of: fn(&Measured) -> Option<f64>,
    text: fn(Option<f64>) -> String,
    /// Whether it is told how many times larger the peer's is.
    ratio: bool,
}

const fn row(
    name: &'static str,
    of: fn(&Measured) -> Option<f64>,
    text: fn(Option<f64>) -> String,
    ratio: bool,
) -> Row {
    Row { name, of, text, ratio }
}

/// Of a vCPU that is limited.
const LIMITED: [Row; 6] = [
    row("settled rate, MiB/s", |of| of.settled_mib_s, number, false),
    row("error, %", |of| of.error_pct, signed, false),
    row("settle time, ms", |of| of.settle_ms, whole, true),
    row("stall p99, ms", |of| of.stall_p99_ms, number, true),
    row("longest stall, ms", |of| of.stall_max_ms, number, true),
    row("work kept, %", |of| of.work_kept_pct, number, false),
];

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peer = self.peer.split(' ').next().unwrap_or_default();
        let rounds = self.cases.iter().map(|case| case.ours.vcpus[0].rounds.len()).min().unwrap_or(0);
        writeln!(f, "{} and dirtylimit (paced), the same guest, limited for {} s", self.peer, self.seconds)?;
        match (self.interrupted, rounds) {
            (true, _) => writeln!(f, "interrupted: medians of the rounds until then, at least {rounds} of each case")?,
            (false, 1) => writeln!(f, "one round of each case")?,
            (false, _) => writeln!(f, "medians of {rounds} rounds of each case")?,
        }
        for case in &self.cases {
            writeln!(f, "\n{:<40}{peer:>12}{:>12}{:>12}", case.name(), "dirtylimit", "times")?;
            for (theirs, ours) in case.peer.vcpus.iter().zip(&case.ours.vcpus) {
                vcpu(f, theirs, ours)?;
            }
            line(f, "  CPU time, % of a CPU", case.peer.cpu_pct, case.ours.cpu_pct, number, true)?;
        }
        match self.lost_pages {
            0 => write!(f, "\nlost pages of ours: 0"),
            lost => write!(f, "\nLOST PAGES of ours: {lost}"),
        }
    }
}

fn vcpu(f: &mut fmt::Formatter<'_>, theirs: &Vcpu, ours: &Vcpu) -> fmt::Result {
    let limited = if ours.limit_mib_s.is_some() { "" } else { ", not limited" };
    writeln!(f, "  vCPU {}, {}{limited}", ours.index, ours.workload)?;
    // Of who is not limited it matters only what it could do and how it was disturbed.
    for row in &LIMITED[if ours.limit_mib_s.is_some() { 0 } else { 3 }..] {
        let (theirs, ours) = ((row.of)(&theirs.median), (row.of)(&ours.median));
        line(f, &format!("    {}", row.name), theirs, ours, row.text, row.ratio)?;
    }
    Ok(())
}

fn line(
    f: &mut fmt::Formatter<'_>,
    name: &str,
    theirs: Option<f64>,
    ours: Option<f64>,
    text: fn(Option<f64>) -> String,
    ratio: bool,
) -> fmt::Result {
    let times = theirs.zip(ours).filter(|&(_, ours)| ratio && ours > 0.0).map(|(theirs, ours)| theirs / ours);
    let times = times.map_or(String::new(), |times| number(Some(times)));
    writeln!(f, "{}", format!("{name:<40}{:>12}{:>12}{times:>12}", text(theirs), text(ours)).trim_end())
}
