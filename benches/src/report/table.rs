//! The report for people: a table that fits 80 columns and a few lines below it.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;

use crate::measure::{Held, Measures, StepMeasures, VmMeasures, worst_pct};
use crate::plan::PolicyKind;
use crate::record::{GuestKind, Recording};
use crate::units::{Time, significant};

/// A recording, written as a table.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a>(pub &'a Recording);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(recording) = self;
        let measures: Vec<_> = recording.vcpus.iter().map(|vcpu| Measures::of(recording, vcpu)).collect();
        write!(f, "{}, {}, ring {}, ", guest(recording.guest), policy(recording.policy), recording.ring)?;
        write!(f, "pauses up to {}, ", Time(recording.max_pause))?;
        let limited = recording.end.saturating_sub(recording.limited_at);
        writeln!(f, "limited for {:.1} s", limited.as_secs_f64())?;
        writeln!(f)?;
        writeln!(f, "                     limit   free settled  error settle window    stall ms  work")?;
        writeln!(f, "vCPU workload        MiB/s  MiB/s   MiB/s      %     ms  max %   p99   max kept%")?;
        for (vcpu, measures) in recording.vcpus.iter().zip(&measures) {
            let last = measures.last();
            let limit = match last.limit_mib_s {
                Some(limit) if limit < 0.001 => "<0.001".to_owned(),
                Some(limit) => significant(limit, 4),
                None => "none".to_owned(),
            };
            write!(f, "{:>4} {:<14}{:>7}", vcpu.index, short(&vcpu.workload.to_string(), 14), limit)?;
            write!(f, "{:>7}{:>8}", number(measures.free_mib_s), number(last.settled_mib_s))?;
            write!(f, "{:>7}{:>7}", error(last), whole(last.settled_ms()))?;
            write!(f, "{:>7}", number(last.worst_window_error_pct.filter(|_| last.settled_ms().is_some())))?;
            write!(f, "{:>6}{:>6}", number(measures.stall_p99_ms), number(measures.stall_max_ms))?;
            writeln!(f, "{:>6}", number(measures.work_kept_pct))?;
        }
        writeln!(f)?;
        for (vcpu, measures) in recording.vcpus.iter().zip(&measures).filter(|(_, measures)| measures.steps.len() > 1) {
            for step in &measures.steps {
                let from = step.from.saturating_sub(recording.limited_at).as_secs_f64();
                write!(f, "vCPU {} from {from:.1} s: limit ", vcpu.index)?;
                f.write_str(&step.limit_mib_s.map_or("none".to_owned(), |limit| significant(limit, 4)))?;
                let (rate, error) = (number(step.settled_mib_s), signed(step.error_pct));
                match step.held {
                    Some(Held::Settled(ms)) => writeln!(f, ", settled {rate} MiB/s ({error} %) in {ms:.0} ms")?,
                    Some(Held::Unsettled) => writeln!(f, ", mean {rate} MiB/s ({error} %), did not settle")?,
                    Some(Held::Below) => writeln!(f, ", mean {rate} MiB/s, less than it allows")?,
                    Some(Held::TooLow(pause)) => {
                        writeln!(f, ", mean {rate} MiB/s, needs pauses of {}", rounded(pause))?;
                    }
                    None => writeln!(f, ", mean {rate} MiB/s")?,
                }
            }
        }
        if let Some(vm) = VmMeasures::of(recording) {
            write!(f, "VM: {} MiB/s of {} MiB/s", number(vm.settled_mib_s), significant(vm.limit_mib_s, 4))?;
            writeln!(f, " ({} %)", signed(vm.error_pct))?;
        }
        let rate = recording.reset_calls as f64 / limited.max(Duration::from_millis(1)).as_secs_f64();
        writeln!(f, "resets: {} ({rate:.0}/s), {} pages given back", recording.reset_calls, recording.reset_pages)?;
        match recording.lost_pages {
            Some(0) => writeln!(f, "lost pages: 0 (a copy made from the dirty log equals the guest's memory)")?,
            Some(lost) => writeln!(f, "LOST PAGES: {lost} (a copy made from the dirty log is wrong there)")?,
            None => writeln!(f, "lost pages: not checked")?,
        }
        let what = if recording.interrupted { "interrupted" } else { "verdict" };
        writeln!(f, "{what}: {}", verdict(recording, &measures))
    }
}

/// The run in one sentence.
pub(super) fn verdict(recording: &Recording, measures: &[Measures]) -> String {
    if let Some(lost @ 1..) = recording.lost_pages {
        return format!("failed, {lost} pages lost");
    }
    // With a budget of the VM, a vCPU's share may be anything below its own limit: the VM is judged.
    match VmMeasures::of(recording) {
        Some(vm) if vm.below => return "the VM wrote less than its budget allows".to_owned(),
        Some(VmMeasures { error_pct: error @ Some(_), .. }) => {
            return format!("the VM was held to {} % of its budget", signed(error));
        }
        _ => {}
    }
    let limited = || measures.iter().map(Measures::last).filter(|step| step.held.is_some());
    let judged = || limited().filter(|step| step.held != Some(Held::Below));
    let worst = signed(worst_pct(recording));
    let pauses = judged().filter_map(|step| match step.held {
        Some(Held::TooLow(pause)) => Some(pause),
        _ => None,
    });
    let too_low: Vec<_> = pauses.collect();
    let (all, unsettled) = (judged().count(), judged().filter(|step| step.settled_ms().is_none()).count());
    match too_low.iter().max() {
        Some(&pause) => {
            let (count, needed) = (too_low.len(), rounded(pause));
            format!("{count} of {all} limited vCPUs above the limit: it needs pauses of {needed}")
        }
        None if limited().next().is_none() => "no vCPU that writes was limited long enough to judge".to_owned(),
        None if all == 0 => {
            let paused = limited().filter_map(|step| step.paused_pct).fold(0.0, f64::max);
            format!("wrote less than the limit allows, paused for {paused:.0} % of the time at most")
        }
        None if unsettled == 0 => {
            let ms = judged().filter_map(StepMeasures::settled_ms).fold(0.0, f64::max);
            format!("held to {worst} % of the limit at worst, settled within {ms:.0} ms")
        }
        None => format!("{unsettled} of {all} limited vCPUs did not settle; mean error {worst} % at worst"),
    }
}

/// The error, or the word for what it would not tell.
pub(super) fn error(step: &StepMeasures) -> String {
    match step.held {
        Some(Held::Below) => "below".to_owned(),
        Some(Held::TooLow(_)) => "pauses".to_owned(),
        _ => signed(step.error_pct),
    }
}

fn rounded(pause: Duration) -> String {
    match pause.as_secs_f64() {
        seconds @ 1.0.. => format!("{} s", significant(seconds, 2)),
        seconds => format!("{} ms", significant(1e3 * seconds, 2)),
    }
}

pub(super) const fn guest(kind: GuestKind) -> &'static str {
    match kind {
        GuestKind::Kvm => "KVM guest",
        GuestKind::Sim => "simulated guest",
    }
}

pub(super) fn policy(kind: PolicyKind) -> String {
    kind.to_possible_value().map_or_else(String::new, |name| name.get_name().to_owned())
}

/// One decimal, none from 1,000 on, so that it fits five columns; `-` where there is none.
pub(crate) fn number(value: Option<f64>) -> String {
    value.map_or(
        "-".to_owned(),
        |value| if value.abs() < 999.95 { format!("{value:.1}") } else { format!("{value:.0}") },
    )
}

pub(crate) fn signed(value: Option<f64>) -> String {
    // Rounded first, so that nothing prints as -0.0.
    let tenth = |value: f64| (value * 10.0).round() / 10.0 + 0.0;
    value.map_or("-".to_owned(), |value| match value.abs() {
        ..999.95 => format!("{:+.1}", tenth(value)),
        ..99_999.5 => format!("{value:+.0}"),
        _ => ">99999".to_owned(),
    })
}

pub(crate) fn whole(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.0}"))
}

/// At most `width` characters of `text`.
fn short(text: &str, width: usize) -> String {
    if text.chars().count() <= width { text.to_owned() } else { text.chars().take(width - 1).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;
    use crate::workload::Workload;

    #[test]
    fn it_fits_eighty_columns_whatever_the_figures() {
        let mut recording = example::stepped();
        recording.vcpus[0].workload = Workload::Random((1 << 44) - 4096);
        recording.vcpus[0].index = 1023;
        recording.vcpus[0].stalls.tsc_hz = 2_000_000;
        for sample in &mut recording.vcpus[0].samples {
            sample.net *= 60;
        }
        let mut slow = example::recording();
        slow.vcpus[0].limits[0].1 = Some(dirtylimit_core::PageRate::MIN_LIMIT);
        let row = Table(&slow).to_string();
        assert!(row.contains(" <0.001   1500   100.0 pauses "), "{row}");
        for text in [row, Table(&recording).to_string(), Table(&example::recording()).to_string()] {
            let widest = text.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(80), "{widest:?} columns:\n{text}");
        }
    }

    #[test]
    fn a_good_run_says_so() {
        let text = Table(&example::recording()).to_string();
        let row: Vec<_> = text.lines().find(|line| line.contains("write:224MiB")).unwrap().split_whitespace().collect();
        assert_eq!(row, ["0", "write:224MiB", "100", "1500", "100.0", "+0.0", "50", "0.0", "11.0", "11.0", "6.7"]);
        assert!(text.contains("lost pages: 0 "), "{text}");
        assert!(text.contains("resets: 812 (102/s)"), "{text}");
        assert!(text.contains("verdict: held to +0.0 % of the limit at worst"), "{text}");
    }

    #[test]
    fn a_bad_run_says_so() {
        let mut recording = example::recording();
        recording.lost_pages = Some(7);
        recording.vcpus[0].limits[0].1 = recording.vcpus[0].limits[0].1.map(|_| dirtylimit_core::PageRate::MIN_LIMIT);
        let text = Table(&recording).to_string();
        assert!(text.contains("LOST PAGES: 7"), "{text}");
        assert!(text.contains("verdict: failed, 7 pages lost"), "{text}");
        recording.lost_pages = None;
        recording.interrupted = true;
        let text = Table(&recording).to_string();
        assert!(text.contains("not checked") && text.contains("interrupted: "), "{text}");
    }

    #[test]
    fn who_could_not_reach_the_limit_is_not_blamed() {
        let mut recording = example::recording();
        recording.vcpus[0].limits[0].1 = Some(dirtylimit_core::PageRate::from_pages_per_sec(256_000));
        let text = Table(&recording).to_string();
        assert!(text.contains("1 of 1 limited vCPUs did not settle"), "paused and too slow is a fault: {text}");
        let all_dirty = Recording { pass: Duration::from_secs(1), ..recording.clone() };
        let text = Table(&all_dirty).to_string();
        assert!(text.contains("verdict: wrote less than the limit allows"), "224 MiB a pass, not 1000: {text}");
        recording.vcpus[0].samples.iter_mut().for_each(|sample| sample.paused /= 10);
        let text = Table(&recording).to_string();
        assert!(text.contains("verdict: wrote less than the limit allows, paused for 9 % of"), "{text}");
        assert!(text.contains(" 100.0  below      -      -"), "{text}");
        recording.vm_limit = recording.vcpus[0].limits[0].1;
        assert!(verdict(&recording, &[]).contains("the VM wrote less than its budget"));
    }

    #[test]
    fn a_limit_below_a_page_in_a_pause_is_told_in_pauses() {
        let mut recording = example::recording();
        recording.vcpus[0].limits[0].1 = Some(dirtylimit_core::PageRate::from_pages_per_sec(25));
        let text = Table(&recording).to_string();
        assert!(text.contains("verdict: 1 of 1 limited vCPUs above the limit: it needs pauses of 40 ms\n"), "{text}");
        assert!(text.contains(" 100.0 pauses      -      -"), "{text}");
    }

    #[test]
    fn a_few_good_windows_at_the_end_are_not_settled() {
        let mut recording = example::recording();
        for sample in recording.vcpus[0].samples.iter_mut().filter(|sample| sample.at >= Duration::from_secs(8)) {
            sample.net += 10_000;
        }
        let text = Table(&recording).to_string();
        assert!(text.contains("verdict: 1 of 1 limited vCPUs did not settle; mean error +9.8 % at worst"), "{text}");
        assert!(text.contains(" +9.8      -      -"), "no settle time beside that: {text}");
    }

    #[test]
    fn a_budget_is_judged_for_the_vm() {
        let mut recording = example::recording();
        recording.vm_limit = Some(dirtylimit_core::PageRate::from_pages_per_sec(12_800));
        let text = Table(&recording).to_string();
        assert!(text.contains("VM: 100.0 MiB/s of 50 MiB/s (+100.0 %)"), "{text}");
        assert!(text.contains("verdict: the VM was held to +100.0 % of its budget"), "{text}");
    }

    #[test]
    fn steps_have_their_lines() {
        let text = Table(&example::stepped()).to_string();
        assert!(text.contains("vCPU 0 from 0.0 s: limit 100, settled 99.8 MiB/s (-0.2 %) in 0 ms"), "{text}");
        assert!(text.contains("vCPU 0 from 4.0 s: limit 300, settled 299.8 MiB/s (-0.1 %) in 810 ms"), "{text}");
        let mut recording = example::stepped();
        recording.vcpus[0].limits[1].1 = Some(dirtylimit_core::PageRate::from_pages_per_sec(256 * 200));
        let text = Table(&recording).to_string();
        assert!(text.contains("limit 200, mean 299.8 MiB/s (+49.9 %), did not settle\n"), "{text}");
    }
}
