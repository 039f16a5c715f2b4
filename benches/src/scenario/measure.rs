//! What can be measured in a trial.

use std::time::Duration;

use crate::guest::kvm::{Mark, Scripted};
use crate::late::per_mille;
use crate::measure::{Measures, Series, VmMeasures};
use crate::units::mib_per_sec;
use crate::workload::Workload;

/// From then on after a limit was set, each window counts.
pub const SETTLED: Duration = Duration::from_millis(150);

/// A measure. Where a run has several vCPUs or steps, it is the worst of them, readers and the unlimited left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// How far the settled rate is from the limit, without its sign.
    Error,
    /// How far the worst 100 ms window is from the limit, without its sign, from [`SETTLED`] on. At 2 MiB/s and more, ±2
    /// pages are less than 5 % of a window.
    WorstWindow,
    /// From a limit being set until every 100 ms window stays within ±10 %.
    Settle,
    /// 99.9 % of the guest's stalls were no longer.
    StallP999,
    /// The guest's longest stall.
    StallMax,
    /// How far the highest 100 ms window was above the limit, from the moment that it was set.
    Overshoot,
    /// How far the highest 1 s window was above the limit, from the moment that it was set.
    OneSecond,
    /// Share of the time in penalty pauses.
    Paused,
    /// How far the whole VM is from its budget, without its sign.
    VmError,
    /// What vCPU 0 has of the VM's budget.
    Share,
    /// Jain's index of the vCPUs' settled rates: 1 when all are equal.
    Jain,
    /// The speed of vCPU 0 while nobody is held, of what it has just before and after, while others are: the median over the
    /// spans.
    ReaderKept,
    /// Calls of the reset ioctl per second, of the whole VM.
    ResetCalls,
    /// How long one tick takes.
    Tick,
    /// The guest's speed, of what it has when its ring is served by hand.
    Speed,
    /// From the call that interrupts a pause until the vCPU's thread is back, median.
    Interrupted,
    /// As [`Measure::Interrupted`], 99th percentile.
    InterruptedP99,
}

/// What a trial brought up.
#[derive(Clone, Debug)]
pub enum Evidence {
    /// A run.
    Run(Box<Scripted>),
    /// A ratio of speeds, and the pages that the run on the limiter's side lost.
    Speed(f64, u64),
    /// How long each interruption took; never empty.
    Interrupted(Vec<Duration>),
}

impl Evidence {
    /// Pages that were lost; `None` where no guest was compared.
    pub fn lost_pages(&self) -> Option<u64> {
        match self {
            Self::Run(done) => done.recording.lost_pages,
            Self::Speed(_, lost) => Some(*lost),
            Self::Interrupted(_) => None,
        }
    }
}

impl Measure {
    /// What it is called, and its unit.
    pub const fn name(self) -> (&'static str, &'static str) {
        match self {
            Self::Error => ("error", "%"),
            Self::WorstWindow => ("worst window", "%"),
            Self::Settle => ("settled in", "ms"),
            Self::StallP999 => ("stall p99.9", "ms"),
            Self::StallMax => ("longest stall", "ms"),
            Self::Overshoot => ("overshoot", "%"),
            Self::OneSecond => ("above in 1 s", "%"),
            Self::Paused => ("paused", "%"),
            Self::VmError => ("VM's error", "%"),
            Self::Share => ("its share", "%"),
            Self::Jain => ("Jain's index", ""),
            Self::ReaderKept => ("reader keeps", "%"),
            Self::ResetCalls => ("reset calls", "/s"),
            Self::Tick => ("tick", "us"),
            Self::Speed => ("speed", "x"),
            Self::Interrupted => ("back, median", "ms"),
            Self::InterruptedP99 => ("back, p99", "ms"),
        }
    }

    /// Its value; `None` where there was none, such as a rate that never settled.
    pub fn of(self, evidence: &Evidence) -> Option<f64> {
        match evidence {
            Evidence::Run(done) => self.of_run(done),
            Evidence::Speed(ratio, _) => (self == Self::Speed).then_some(*ratio),
            Evidence::Interrupted(times) => match self {
                Self::Interrupted => per_mille(times, 500).map(|time| 1e3 * time.as_secs_f64()),
                Self::InterruptedP99 => per_mille(times, 990).map(|time| 1e3 * time.as_secs_f64()),
                _ => None,
            },
        }
    }

    fn of_run(self, done: &Scripted) -> Option<f64> {
        let Scripted { recording, ticks, .. } = done;
        let limited = recording.end.saturating_sub(recording.limited_at).as_secs_f64();
        let writers = || recording.vcpus.iter().filter(|vcpu| vcpu.workload.writes());
        let measures = || writers().map(|vcpu| Measures::of(recording, vcpu));
        // The series of each writer, since when it has its last limit, and that in MiB/s.
        let last = || {
            writers().map(|vcpu| {
                let &(from, limit) = vcpu.limits.last()?;
                Some((Series::of(recording, vcpu), from, mib_per_sec(limit?, recording.page_size)))
            })
        };
        match self {
            Self::Error => worst(measures().map(|vcpu| vcpu.last().error_pct.map(f64::abs))),
            Self::WorstWindow => worst(last().map(|vcpu| {
                let (series, from, limit) = vcpu?;
                series.worst_pct(from + SETTLED, recording.end, limit)
            })),
            Self::Settle => worst(measures().flat_map(|vcpu| vcpu.steps).map(|step| step.settle_ms)),
            Self::Overshoot => worst(measures().flat_map(|vcpu| vcpu.steps).map(|step| step.overshoot_pct)),
            Self::StallP999 => worst(measures().map(|vcpu| vcpu.stall_p999_ms)),
            Self::StallMax => worst(measures().map(|vcpu| vcpu.stall_max_ms)),
            Self::Paused => worst(measures().map(|vcpu| vcpu.paused_pct)),
            Self::OneSecond => worst(last().map(|vcpu| {
                let (series, _, limit) = vcpu?;
                series.over_pct(recording.limited_at, recording.end, Duration::from_secs(1), limit)
            })),
            Self::VmError => Some(VmMeasures::of(recording)?.error_pct?.abs()),
            Self::Share => {
                let first = Measures::of(recording, recording.vcpus.first()?).last().settled_mib_s?;
                Some(100.0 * first / VmMeasures::of(recording)?.limit_mib_s)
            }
            Self::Jain => jain(&measures().map(|vcpu| vcpu.last().settled_mib_s).collect::<Option<Vec<_>>>()?),
            Self::ReaderKept => {
                debug_assert!(matches!(recording.vcpus[0].workload, Workload::Read(_)));
                median(kept(&done.marks))
            }
            Self::ResetCalls => Some(recording.reset_calls as f64 / limited).filter(|calls| calls.is_finite()),
            Self::Tick => per_mille(ticks, 500).map(|time| 1e6 * time.as_secs_f64()),
            Self::Speed | Self::Interrupted | Self::InterruptedP99 => None,
        }
    }
}

/// The largest; `None` where there is none, or one of them is none.
fn worst(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    values.collect::<Option<Vec<_>>>()?.into_iter().reduce(f64::max)
}

fn jain(rates: &[f64]) -> Option<f64> {
    let sum: f64 = rates.iter().sum();
    let squares: f64 = rates.iter().map(|rate| rate * rate).sum();
    Some(sum * sum / (rates.len() as f64 * squares)).filter(|index| index.is_finite())
}

/// Spans lie between marks; in the first, and each second one, the others are held. Each but the outermost is compared with
/// the mean of its neighbours, so that a host that becomes slower or faster does not count. In percent.
fn kept(marks: &[Mark]) -> Vec<f64> {
    let speed = |pair: &[Mark]| {
        let accesses = (pair[1].accesses[0] - pair[0].accesses[0]) as f64;
        accesses / (pair[1].at - pair[0].at).as_secs_f64()
    };
    let spans: Vec<_> = marks.windows(2).map(speed).collect();
    let kept = |(number, three): (usize, &[f64])| {
        let (middle, around) = (three[1], three[0].midpoint(three[2]));
        100.0 * if number % 2 == 0 { middle / around } else { around / middle }
    };
    spans.windows(3).enumerate().map(kept).collect()
}

/// The middle one, or the mean of the middle two; `None` for none, or where that is no number.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    let middle = (values[last / 2] + values[last.div_ceil(2)]) / 2.0;
    Some(middle).filter(|middle| middle.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    fn run() -> Scripted {
        Scripted { recording: example::stepped(), marks: Vec::new(), ticks: Vec::new() }
    }

    #[test]
    fn the_worst_step_counts_and_one_that_never_settled_is_none() {
        let mut done = run();
        assert_eq!(Measure::Settle.of_run(&done).map(f64::round), Some(810.0));
        assert!(Measure::Error.of_run(&done) < Some(0.5));
        assert!(Measure::Overshoot.of_run(&done) < Some(3.0));
        done.recording.vcpus[0].limits[0].1 = Some(dirtylimit_core::PageRate::from_pages_per_sec(256));
        assert_eq!(Measure::Settle.of_run(&done), None);
        assert!(Measure::Overshoot.of_run(&done) > Some(9_000.0));
    }

    #[test]
    fn a_second_that_is_above_the_limit_is_seen() {
        let mut done = Scripted { recording: example::recording(), ..run() };
        let calm = Measure::OneSecond.of_run(&done).unwrap();
        assert!((14.0..16.0).contains(&calm), "400 instead of 100 for the first 50 ms: {calm}");
        for sample in done.recording.vcpus[0].samples.iter_mut().filter(|sample| sample.at.as_secs() >= 5) {
            sample.net += 25_600;
        }
        assert!(Measure::OneSecond.of_run(&done) > Some(99.0));
    }

    #[test]
    fn jain_knows_equal_shares_from_unequal_ones() {
        assert_eq!(jain(&[25.0; 4]), Some(1.0));
        assert_eq!(jain(&[100.0, 0.0, 0.0, 0.0]), Some(0.25));
        assert_eq!(jain(&[0.0; 4]), None);
    }

    #[test]
    fn the_reader_is_compared_span_by_span() {
        let ms = Duration::from_millis;
        // The reader's accesses in spans of 200 ms.
        let marks = |spans: &[u64]| {
            let mark = |count: usize| Mark {
                at: ms(200) * u32::try_from(count).unwrap(),
                accesses: vec![spans[..count].iter().sum(), 7],
            };
            (0..=spans.len()).map(mark).collect::<Vec<_>>()
        };
        // 1,000 while the others are held and 900 else, all of it slower and slower.
        assert_eq!(kept(&marks(&[1000, 810, 800, 630, 600, 450, 400])), [90.0; 5]);
        assert_eq!(kept(&marks(&[1000, 900])), [0.0; 0], "no span has two neighbours");
        let all = marks(&[1000, 810, 800, 130, 600]);
        assert_eq!(kept(&all), [90.0, 100.0 * 470.0 / 800.0, 100.0 * 130.0 / 700.0]);
        let mut done = run();
        (done.marks, done.recording.vcpus[0].workload) = (all, Workload::Read(1 << 20));
        assert_eq!(Measure::ReaderKept.of_run(&done), Some(100.0 * 470.0 / 800.0));
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, f64::INFINITY, 1.0]), Some(3.0));
        assert_eq!(median(vec![3.0, f64::INFINITY, f64::INFINITY]), None);
        assert_eq!(median(vec![2.0, 1.0]), Some(1.5));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn a_window_that_is_off_counts_from_the_settle_time_on_whichever_side_it_is() {
        let off = |from: usize, pages: u64| {
            let mut done = Scripted { recording: example::recording(), ..run() };
            for sample in &mut done.recording.vcpus[0].samples[from..] {
                sample.net = sample.net.saturating_add_signed(pages.cast_signed());
            }
            Measure::WorstWindow.of_run(&done)
        };
        // Readings are 10 ms apart, the limit of 25,600 pages a second is set after 1 s.
        assert_eq!(off(500, 0), Some(0.0));
        assert_eq!(off(500, 256).map(f64::round), Some(10.0));
        assert_eq!(off(500, 0u64.wrapping_sub(256)).map(f64::round), Some(10.0));
        assert_eq!(off(114, 256), Some(0.0), "before");
    }
}
