//! What can be measured in a trial.

use std::time::Duration;

use super::reach::Reach;
use crate::guest::kvm::{Mark, Scripted};
use crate::measure::{Measures, Series, VmMeasures};
use crate::record::{Recording, Stalls};
use crate::units::mib_per_sec;
use crate::workload::Workload;

/// A limiter has settled so long after a limit was set, or never.
pub const SETTLED: Duration = Duration::from_millis(150);

/// A measure. Where a run has several vCPUs or steps, it is the worst of them, readers and the unlimited left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// How far the settled rate is from the limit, without its sign; this and the next two, where it is below, from what
    /// was in [`Reach`].
    Error,
    /// How far the worst 100 ms window is from the limit, without its sign, from [`SETTLED`] on. At 2 MiB/s and more, ±2
    /// pages are less than 5 % of a window.
    WorstWindow,
    /// From a limit being set until every 100 ms window stays within ±10 %.
    Settle,
    /// 99.9 % of the guest's stalls, those of all runs together, were no longer: one run has too few to tell. Those that
    /// ended while the host's clock had fallen are left out.
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
    /// spans of all runs together. Those in which the host's clock had fallen are left out.
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

    /// The run; `None` where there is none of its own.
    pub fn recording(&self) -> Option<&Recording> {
        match self {
            Self::Run(done) => Some(&done.recording),
            Self::Speed(..) | Self::Interrupted(_) => None,
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

    /// Its value in one trial; `None` where there was none, such as a rate that never settled. `strict`: nothing is spared
    /// because of the host.
    pub fn of(self, evidence: &Evidence, strict: bool) -> Option<f64> {
        match evidence {
            Evidence::Run(done) => self.of_run(done, strict),
            Evidence::Speed(ratio, _) => (self == Self::Speed).then_some(*ratio),
            Evidence::Interrupted(times) => match self {
                Self::Interrupted => per_mille(times, 500).map(|time| 1e3 * time.as_secs_f64()),
                Self::InterruptedP99 => per_mille(times, 990).map(|time| 1e3 * time.as_secs_f64()),
                _ => None,
            },
        }
    }

    /// Its value over all trials, where it is not the median of each one's.
    pub fn of_all(self, trials: &[Evidence], strict: bool) -> Option<f64> {
        let runs = trials.iter().filter_map(|evidence| match evidence {
            Evidence::Run(done) => Some(done),
            Evidence::Speed(..) | Evidence::Interrupted(_) => None,
        });
        match self {
            Self::StallP999 => {
                let vcpus = runs.flat_map(|done| &done.recording.vcpus).filter(|vcpu| vcpu.workload.writes());
                p999(Stalls::sum(vcpus.map(|vcpu| &vcpu.stalls))?, strict)
            }
            Self::ReaderKept => median(runs.flat_map(|done| kept(done, strict)).collect()),
            _ => None,
        }
    }

    fn of_run(self, done: &Scripted, strict: bool) -> Option<f64> {
        let Scripted { recording, ticks, .. } = done;
        let limited = recording.end.saturating_sub(recording.limited_at).as_secs_f64();
        let writers = || recording.vcpus.iter().filter(|vcpu| vcpu.workload.writes());
        let measures = || writers().map(|vcpu| Measures::of(recording, vcpu));
        let reach = || writers().map(|vcpu| Reach::of(recording, vcpu, strict));
        match self {
            Self::Error => worst(reach().map(|vcpu| vcpu.error_pct())),
            Self::WorstWindow => worst(reach().map(|vcpu| vcpu.worst_pct(SETTLED))),
            Self::Settle => worst(reach().map(|vcpu| worst(vcpu.settle_ms()))),
            Self::Overshoot => worst(measures().flat_map(|vcpu| vcpu.steps).map(|step| step.overshoot_pct)),
            Self::StallMax => worst(measures().map(|vcpu| vcpu.stall_max_ms)),
            Self::Paused => worst(measures().map(|vcpu| vcpu.paused_pct)),
            Self::OneSecond => worst(writers().map(|vcpu| {
                let limit = mib_per_sec(vcpu.limits.last()?.1?, recording.page_size);
                let second = Duration::from_secs(1);
                Series::of(recording, vcpu).over_pct(recording.limited_at, recording.end, second, limit)
            })),
            Self::VmError => Some(VmMeasures::of(recording)?.error_pct?.abs()),
            Self::Share => {
                let first = Measures::of(recording, recording.vcpus.first()?).last().settled_mib_s?;
                Some(100.0 * first / VmMeasures::of(recording)?.limit_mib_s)
            }
            Self::Jain => jain(&measures().map(|vcpu| vcpu.last().settled_mib_s).collect::<Option<Vec<_>>>()?),
            Self::ReaderKept => {
                debug_assert!(matches!(recording.vcpus[0].workload, Workload::Read(_)));
                median(kept(done, strict))
            }
            Self::ResetCalls => Some(recording.reset_calls as f64 / limited).filter(|calls| calls.is_finite()),
            Self::Tick => per_mille(ticks, 500).map(|time| 1e6 * time.as_secs_f64()),
            Self::StallP999 => worst(writers().map(|vcpu| p999(vcpu.stalls.clone(), strict))),
            Self::Speed | Self::Interrupted | Self::InterruptedP99 => None,
        }
    }
}

fn p999(stalls: Stalls, strict: bool) -> Option<f64> {
    if strict { stalls } else { stalls.steady() }.percentile_ms(99.9)
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
fn kept(Scripted { marks, slow, .. }: &Scripted, strict: bool) -> Vec<f64> {
    let speed = |pair: &[Mark]| {
        let [from, to] = pair else { return None };
        let is_slow = !strict && slow.iter().any(|slow| slow.start < to.at && from.at < slow.end);
        let accesses = (to.accesses[0] - from.accesses[0]) as f64;
        (!is_slow).then(|| accesses / (to.at - from.at).as_secs_f64())
    };
    let spans: Vec<_> = marks.windows(2).map(speed).collect();
    let kept = |(number, three): (usize, &[Option<f64>])| {
        let &[Some(before), Some(middle), Some(after)] = three else { return None };
        let around = before.midpoint(after);
        Some(100.0 * if number % 2 == 0 { middle / around } else { around / middle })
    };
    spans.windows(3).enumerate().filter_map(kept).collect()
}

/// The middle one, or the mean of the middle two; `None` for none, or where that is no number.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    let middle = (values[last / 2] + values[last.div_ceil(2)]) / 2.0;
    Some(middle).filter(|middle| middle.is_finite())
}

/// The smallest time that `mille` of a thousand do not exceed; `None` for none.
pub(super) fn per_mille(times: &[Duration], mille: usize) -> Option<Duration> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get((sorted.len() * mille).div_ceil(1000).checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    fn run() -> Scripted {
        Scripted { recording: example::stepped(), marks: Vec::new(), ticks: Vec::new(), slow: Vec::new() }
    }

    #[test]
    fn the_worst_step_counts_and_one_that_never_settled_is_none() {
        let mut done = run();
        assert_eq!(Measure::Settle.of_run(&done, false).map(f64::round), Some(810.0));
        assert!(Measure::Error.of_run(&done, false) < Some(0.5));
        assert!(Measure::Overshoot.of_run(&done, false) < Some(3.0));
        done.recording.vcpus[0].limits[0].1 = Some(dirtylimit_core::PageRate::from_pages_per_sec(256));
        assert_eq!(Measure::Settle.of_run(&done, false), None);
        assert!(Measure::Overshoot.of_run(&done, false) > Some(9_000.0));
    }

    #[test]
    fn a_second_that_is_above_the_limit_is_seen() {
        let mut done = Scripted { recording: example::recording(), ..run() };
        let calm = Measure::OneSecond.of_run(&done, false).unwrap();
        assert!((14.0..16.0).contains(&calm), "400 instead of 100 for the first 50 ms: {calm}");
        for sample in done.recording.vcpus[0].samples.iter_mut().filter(|sample| sample.at.as_secs() >= 5) {
            sample.net += 25_600;
        }
        assert!(Measure::OneSecond.of_run(&done, false) > Some(99.0));
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
        // The reader's accesses in spans of 200 ms, of which the clock had fallen in the 4th.
        let scripted = |spans: &[u64]| {
            let mark = |count: usize| Mark {
                at: ms(200) * u32::try_from(count).unwrap(),
                accesses: vec![spans[..count].iter().sum(), 7],
            };
            Scripted { marks: (0..=spans.len()).map(mark).collect(), slow: vec![ms(700)..ms(710)], ..run() }
        };
        // 1,000 while the others are held and 900 else, all of it slower and slower.
        let steady = scripted(&[1000, 810, 800, 630, 600, 450, 400]);
        assert_eq!(kept(&steady, true), [90.0; 5]);
        assert_eq!(kept(&steady, false), [90.0; 2], "none that touches the 4th");
        assert_eq!(kept(&scripted(&[1000, 900]), true), [0.0; 0], "no span has two neighbours");
        let fell = scripted(&[1000, 810, 800, 130, 600]);
        assert_eq!(kept(&fell, true), [90.0, 100.0 * 470.0 / 800.0, 100.0 * 130.0 / 700.0]);
        assert_eq!(kept(&fell, false), [90.0]);

        // Of all runs together: the one with the most spans has the most say.
        let all = [steady, fell].map(|done| Evidence::Run(Box::new(done)));
        assert_eq!(Measure::ReaderKept.of_all(&all, true), Some(90.0));
        assert_eq!(Measure::Error.of_all(&all, true), None);
    }

    #[test]
    fn medians_and_percentiles() {
        assert_eq!(median(vec![3.0, f64::INFINITY, 1.0]), Some(3.0));
        assert_eq!(median(vec![3.0, f64::INFINITY, f64::INFINITY]), None);
        assert_eq!(median(vec![2.0, 1.0]), Some(1.5));
        assert_eq!(median(vec![]), None);
        let times: Vec<_> = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!(per_mille(&times, 500), Some(Duration::from_millis(100)));
        assert_eq!(per_mille(&times, 990), Some(Duration::from_millis(198)));
        assert_eq!(per_mille(&times[..1], 990), Some(Duration::from_millis(200)));
        assert_eq!(per_mille(&[], 990), None);
    }

    #[test]
    fn stalls_of_all_runs_are_judged_together() {
        let with = |longest: usize| {
            let mut done = Scripted { recording: example::recording(), ..run() };
            let stalls = &mut done.recording.vcpus[0].stalls;
            (stalls.fine, stalls.fine_ticks, stalls.longest_ticks) = (vec![0; 384], 100_000, longest as u64 * 100_000);
            stalls.fine[200] += 499;
            stalls.fine[longest - 1] += 1;
            Evidence::Run(Box::new(done))
        };
        // 2 GHz: steps of 50 µs. One stall of 15 ms in 2,000 is beyond p99.9, two of them are too; three are not.
        let p999 =
            |longest: &[usize]| Measure::StallP999.of_all(&longest.iter().map(|&l| with(l)).collect::<Vec<_>>(), false);
        assert!(p999(&[300, 201, 201, 201]).is_some_and(|ms| (10.0..10.1).contains(&ms)));
        assert!(p999(&[300, 300, 300, 201]).is_some_and(|ms| ms > 14.9));
        // Three of them, all while the clock had fallen.
        let mut fell = with(300);
        let Evidence::Run(done) = &mut fell else { panic!("a run") };
        let stalls = &mut done.recording.vcpus[0].stalls;
        (stalls.fine[299], stalls.slow) = (3, vec![0; 384]);
        stalls.slow[299] = 3;
        for (strict, most) in [(false, 10.1), (true, 15.0)] {
            let values = [Measure::StallP999.of(&fell, strict), Measure::StallP999.of_all(&[fell.clone()], strict)];
            assert!(values.iter().all(|ms| ms.is_some_and(|ms| (most - 0.1..most).contains(&ms))), "{values:?}");
        }
        assert_eq!(Measure::Error.of_all(&[with(300)], false), None);
    }
}
