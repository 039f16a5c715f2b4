//! The measures of a recording.
//!
//! - *Settled rate*: the mean of the net dirty page rate over the second half of the limited phase; where the limit was
//!   changed meanwhile, over the second half of the last step. *Error*: (settled − limit) ÷ limit.
//! - *Window*: 100 ms of net rate. Windows start every 10 ms from the instant the limit was set, so they overlap; each but
//!   the first at a reading, the next one: from between two, part of a burst that is over would count.
//! - *Settle time*: from the limit being set to the start of the first window from which on every window is within
//!   ±10 % of the limit.
//! - *Worst window*: how far the worst window after settling is from the limit, without its sign.
//! - *Stall*: a gap between two TSC reads in the guest's loop that reached the stall threshold. The longest is exact; a
//!   percentile is over those gaps alone and interpolated, see [`Stalls::percentile_ms`].
//! - *Work kept*: the guest's own accesses per second, limited over free.
//!
//! Counters are read about every 10 ms, not exactly: between two readings they are interpolated, and beyond the last one
//! nothing is said.

use std::iter;
use std::time::Duration;

use dirtylimit_core::PageRate;

use crate::record::{Recording, Sample, Stalls, VcpuRecording};
use crate::units::mib_per_sec;
use crate::workload::Workload;

/// Length of a window.
pub const WINDOW: Duration = Duration::from_millis(100);
/// Distance between the starts of two windows.
const STRIDE: Duration = Duration::from_millis(10);
/// How far a settled window may be from the limit, in percent.
pub const TOLERANCE_PCT: f64 = 10.0;

/// What a limit did to a vCPU that writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Held {
    /// It was at its limit for all of the second half: settled, in ms.
    Settled(f64),
    /// It was not.
    Unsettled,
    /// It cannot dirty as much: as fast as it was between its pauses, it would have stayed below the limit without them, or all
    /// of its memory is dirty before the next pass.
    Below,
    /// It is above a limit that needs longer pauses than there are, at least of this time: a page is the least it can write between
    /// two.
    TooLow(Duration),
}

/// What one vCPU did between two changes of its limit.
#[derive(Clone, Debug, PartialEq)]
pub struct StepMeasures {
    /// When its limit was set, since the start of the recording.
    pub from: Duration,
    /// When it ended.
    pub to: Duration,
    /// The limit in MiB/s; `None` is no limit.
    pub limit_mib_s: Option<f64>,
    /// Mean rate over its second half.
    pub settled_mib_s: Option<f64>,
    /// `None` without a limit, or where the workload does not write.
    pub error_pct: Option<f64>,
    /// `None` where the rate never settled, and as `error_pct`.
    pub settle_ms: Option<f64>,
    /// As `settle_ms`.
    pub worst_window_error_pct: Option<f64>,
    /// `None` as `error_pct`. Unlike `settle_ms` it says whether the settled rate is one.
    pub held: Option<Held>,
    /// Share of the second half spent in penalty pauses.
    pub paused_pct: Option<f64>,
    /// How far above the limit the highest window of the step was, settled or not; 0 where none was above it. `None` as
    /// `error_pct`.
    pub overshoot_pct: Option<f64>,
}

/// The measures of one vCPU.
#[derive(Clone, Debug)]
pub struct Measures {
    /// Net rate of the free phase: at most the working set for each pass, however fast the guest is.
    pub free_mib_s: Option<f64>,
    /// Gross rate of the free phase, in ring entries.
    pub free_gross_mib_s: Option<f64>,
    /// Every limit in turn; never empty, and the last one is what the run is judged by.
    pub steps: Vec<StepMeasures>,
    /// `None` where the guest reported no stall.
    pub stall_p99_ms: Option<f64>,
    /// As `stall_p99_ms`.
    pub stall_p999_ms: Option<f64>,
    /// The longest gap; `None` where the guest measured none.
    pub stall_max_ms: Option<f64>,
    /// `None` where the guest counted no access in the free phase.
    pub work_kept_pct: Option<f64>,
    /// Share of the limited phase spent in penalty pauses.
    pub paused_pct: Option<f64>,
}

impl Measures {
    /// Measures one vCPU of a recording.
    pub fn of(recording: &Recording, vcpu: &VcpuRecording) -> Self {
        let series = Series::of(recording, vcpu);
        let nothing = [(recording.limited_at, None)];
        let limits = if vcpu.limits.is_empty() { &nothing[..] } else { &vcpu.limits };
        let ends = limits[1..].iter().map(|&(from, _)| from).chain([recording.end]);
        let steps = limits
            .iter()
            .zip(ends)
            .map(|(&(from, limit), to)| series.step(from, to, limit, vcpu.workload, recording))
            .collect();
        let work = |accesses: u64, time: Duration| ratio(accesses as f64, time.as_secs_f64());
        let kept = ratio(
            work(vcpu.limited_accesses, vcpu.limited_time).unwrap_or(f64::NAN),
            work(vcpu.free_accesses, vcpu.free_time).unwrap_or(f64::NAN),
        );
        let limited = recording.end.saturating_sub(recording.limited_at);
        Self {
            free_mib_s: series.mean_mib_s(Duration::ZERO, recording.limited_at),
            free_gross_mib_s: series.gross_mib_s(Duration::ZERO, recording.limited_at),
            steps,
            stall_p99_ms: vcpu.stalls.percentile_ms(99.0),
            stall_p999_ms: vcpu.stalls.percentile_ms(99.9),
            stall_max_ms: vcpu.stalls.longest_ms(),
            work_kept_pct: kept.map(|kept| 100.0 * kept),
            paused_pct: ratio(100.0 * vcpu.paused.as_secs_f64(), limited.as_secs_f64()),
        }
    }

    /// The last step, by which the run is judged.
    pub fn last(&self) -> &StepMeasures {
        self.steps.last().expect("`of` makes at least one step")
    }
}

impl StepMeasures {
    /// The error, unless there are words for why it says nothing about the limiter.
    pub fn judged_pct(&self) -> Option<f64> {
        self.error_pct.filter(|_| matches!(self.held, Some(Held::Settled(_) | Held::Unsettled)))
    }

    /// The settle time, where the settled rate is one.
    pub fn settled_ms(&self) -> Option<f64> {
        match self.held {
            Some(Held::Settled(ms)) => Some(ms),
            _ => None,
        }
    }
}

/// What the whole VM did against its own budget.
#[derive(Clone, Debug, PartialEq)]
pub struct VmMeasures {
    /// The budget in MiB/s.
    pub limit_mib_s: f64,
    /// All vCPUs together over the second half of the limited phase.
    pub settled_mib_s: Option<f64>,
    /// (settled − limit) ÷ limit.
    pub error_pct: Option<f64>,
    /// As [`Held::Below`].
    pub below: bool,
}

impl VmMeasures {
    /// Measures the VM; `None` where it had no budget.
    pub fn of(recording: &Recording) -> Option<Self> {
        let limit_mib_s = mib_per_sec(recording.vm_limit?, recording.page_size);
        let from = middle(recording.limited_at, recording.end);
        let sum = |rate: fn(&Series<'_>, Duration, Duration) -> Option<f64>| {
            recording
                .vcpus
                .iter()
                .map(|vcpu| rate(&Series::of(recording, vcpu), from, recording.end))
                .sum::<Option<f64>>()
        };
        let settled_mib_s = sum(|series, from, to| series.mean_mib_s(from, to));
        let error_pct = settled_mib_s.and_then(|settled| error_pct(settled, limit_mib_s));
        let below = sum(|series, from, to| series.unpaused_mib_s(from, to)).is_some_and(|rate| rate < limit_mib_s);
        Some(Self { limit_mib_s, settled_mib_s, error_pct, below })
    }
}

/// The error that is farthest from 0: of the VM if it has a budget, else of a limited vCPU. Where less was written than the limit
/// allows, there is none.
pub fn worst_pct(recording: &Recording) -> Option<f64> {
    if let Some(vm) = VmMeasures::of(recording) {
        return vm.error_pct.filter(|_| !vm.below);
    }
    let measures: Vec<_> = recording.vcpus.iter().map(|vcpu| Measures::of(recording, vcpu)).collect();
    let held = measures.iter().map(Measures::last).filter(|step| step.held != Some(Held::Below));
    held.filter_map(|step| step.error_pct).max_by(|a, b| a.abs().total_cmp(&b.abs()))
}

/// The samples of one vCPU as a function of time.
#[derive(Clone, Copy, Debug)]
pub struct Series<'a> {
    /// In order of time.
    pub samples: &'a [Sample],
    /// Bytes of a page.
    pub page_size: u32,
}

impl<'a> Series<'a> {
    /// What a vCPU of the recording did.
    pub fn of(recording: &'a Recording, vcpu: &'a VcpuRecording) -> Self {
        Self { samples: &vcpu.samples, page_size: recording.page_size }
    }

    /// A cumulative counter at `at`, interpolated; `None` outside the samples. Before the first sample all counters are 0.
    fn at(&self, at: Duration, counter: impl Fn(&Sample) -> f64) -> Option<f64> {
        let next = self.samples.partition_point(|sample| sample.at < at);
        let right = self.samples.get(next)?;
        let left = next.checked_sub(1).map_or(Sample::default(), |before| self.samples[before]);
        let (from, to) = (counter(&left), counter(right));
        let share = ratio((at - left.at).as_secs_f64(), (right.at - left.at).as_secs_f64()).unwrap_or(1.0);
        Some(from + (to - from) * share)
    }

    /// Growth of a counter per second from `from` to `to`, or to the last sample where that is earlier.
    fn mean(&self, from: Duration, to: Duration, counter: impl Fn(&Sample) -> f64) -> Option<f64> {
        let to = to.min(self.samples.last()?.at);
        let time = to.checked_sub(from)?;
        ratio(self.at(to, &counter)? - self.at(from, &counter)?, time.as_secs_f64())
    }

    /// Mean net rate in MiB/s.
    pub fn mean_mib_s(&self, from: Duration, to: Duration) -> Option<f64> {
        self.mean(from, to, |sample| sample.net as f64).map(|pages| pages * self.page_mib())
    }

    /// Mean gross rate, of ring entries, in MiB/s.
    pub fn gross_mib_s(&self, from: Duration, to: Duration) -> Option<f64> {
        self.mean(from, to, |sample| sample.gross as f64).map(|pages| pages * self.page_mib())
    }

    fn page_mib(&self) -> f64 {
        f64::from(self.page_size) / f64::from(1 << 20)
    }

    /// Share of the time spent in penalty pauses, in percent.
    pub fn paused_pct(&self, from: Duration, to: Duration) -> Option<f64> {
        self.mean(from, to, |sample| sample.paused.as_secs_f64()).map(|share| 100.0 * share)
    }

    /// Mean net rate of the time that is not spent in penalty pauses, in MiB/s; `None` where that is next to none.
    fn unpaused_mib_s(&self, from: Duration, to: Duration) -> Option<f64> {
        let share = 1.0 - self.paused_pct(from, to)? / 100.0;
        self.mean_mib_s(from, to).filter(|_| share > 1e-3).map(|rate| rate / share)
    }

    fn step(
        &self,
        from: Duration,
        to: Duration,
        limit: Option<PageRate>,
        workload: Workload,
        recording: &Recording,
    ) -> StepMeasures {
        let limit_mib_s = limit.map(|limit| mib_per_sec(limit, self.page_size));
        let half = middle(from, to);
        let settled_mib_s = self.mean_mib_s(half, to);
        let judged = limit_mib_s.filter(|_| workload.writes());
        let error_pct = judged.zip(settled_mib_s).and_then(|(limit, settled)| error_pct(settled, limit));
        let settled = judged.and_then(|limit| self.settle(from, to, limit));
        let (settle_ms, worst_window_error_pct) = settled.unzip();
        let overshoot_pct = judged.and_then(|limit| self.over_pct(from, to, WINDOW, limit));
        let held = judged.zip(error_pct).map(|(limit, error)| {
            let page = Duration::from_secs_f64(self.page_mib() / limit);
            let most = workload.bytes() as f64 / f64::from(1 << 20) / recording.pass.as_secs_f64();
            match settle_ms {
                _ if most < limit => Held::Below,
                _ if self.unpaused_mib_s(half, to).is_some_and(|rate| rate < limit) => Held::Below,
                _ if error > TOLERANCE_PCT && page > recording.max_pause => Held::TooLow(page),
                Some(ms) if ms <= 1e3 * (half - from).as_secs_f64() => Held::Settled(ms),
                _ => Held::Unsettled,
            }
        });
        StepMeasures {
            from,
            to,
            limit_mib_s,
            settled_mib_s,
            error_pct,
            settle_ms,
            worst_window_error_pct,
            held,
            paused_pct: self.paused_pct(half, to),
            overshoot_pct,
        }
    }

    /// How far above `limit` (MiB/s) the highest window of that length was, in percent; 0 where none was above it, `None`
    /// where there was no whole window.
    pub fn over_pct(&self, from: Duration, to: Duration, window: Duration, limit: f64) -> Option<f64> {
        let over = self.windows(from, to, window)?.map(|start| self.error_pct(start, start + window, limit));
        over.collect::<Option<Vec<_>>>()?.into_iter().reduce(f64::max).map(|over| over.max(0.0))
    }

    /// When windows of that length start, all within `from` and `to`; `None` where not even the first one is.
    fn windows(&self, from: Duration, to: Duration, window: Duration) -> Option<impl Iterator<Item = Duration>> {
        let last = to.min(self.samples.last()?.at).checked_sub(window)?;
        let strides = iter::successors(Some(from + STRIDE), |&start| Some(start + STRIDE));
        let readings = strides.map_while(|start| {
            let next = self.samples.partition_point(|sample| sample.at < start);
            self.samples.get(next).map(|sample| sample.at)
        });
        Some(iter::once(from).chain(readings).take_while(move |&start| start <= last))
    }

    /// How far the mean rate is above `limit` (MiB/s), in percent.
    pub fn error_pct(&self, from: Duration, to: Duration, limit: f64) -> Option<f64> {
        error_pct(self.mean_mib_s(from, to)?, limit)
    }

    /// How far the worst window is from `limit` (MiB/s), in percent and without its sign; `None` where there is none.
    pub fn worst_pct(&self, from: Duration, to: Duration, limit: f64) -> Option<f64> {
        let errors = self.windows(from, to, WINDOW)?.map(|start| self.error_pct(start, start + WINDOW, limit));
        errors.collect::<Option<Vec<_>>>()?.into_iter().map(f64::abs).reduce(f64::max)
    }

    /// Settle time in ms and the worst window's error after it; `None` where the rate never settled.
    fn settle(&self, from: Duration, to: Duration, limit: f64) -> Option<(f64, f64)> {
        let mut settled: Option<(Duration, f64)> = None;
        for start in self.windows(from, to, WINDOW)? {
            // A millionth of a percent, so that rounding does not decide over a window on the boundary.
            let error = self.error_pct(start, start + WINDOW, limit)?.abs();
            settled = match settled {
                _ if error > TOLERANCE_PCT + 1e-6 => None,
                Some((since, worst)) => Some((since, worst.max(error))),
                None => Some((start, error)),
            };
        }
        settled.map(|(since, worst)| ((since - from).as_secs_f64() * 1e3, worst))
    }
}

impl Stalls {
    /// The longest gap in ms, exact; `None` where the guest measured none.
    pub fn longest_ms(&self) -> Option<f64> {
        if self.longest_ticks == 0 { None } else { self.ms(self.longest_ticks as f64) }
    }

    /// The gap in ms that `percent` of the stalls do not exceed; `None` where there was no stall.
    ///
    /// Where the guest keeps the fine histogram, the answer is less than a step of it (about 50 µs) off, up to its last.
    ///
    /// Else the coarse histogram tells only between which two powers of two a gap lies (the lowest is cut at the threshold, the
    /// highest at the longest gap), so within one bucket gaps are taken to be spread evenly: the answer is in the right
    /// bucket and less than a factor of two off, and never above the longest gap.
    pub fn percentile_ms(&self, percent: f64) -> Option<f64> {
        let buckets = self.buckets();
        let count: u64 = buckets.iter().fold(0, |sum, &(.., gaps)| sum.saturating_add(gaps));
        if count == 0 {
            return None;
        }
        let rank = count as f64 * percent / 100.0;
        let mut below = 0.0;
        for (from, to, gaps) in buckets {
            let gaps = gaps as f64;
            if gaps > 0.0 && below + gaps >= rank {
                let longest = self.longest_ticks as f64;
                let low = from.max(self.threshold_ticks as f64).min(longest);
                let high = to.min(longest);
                return self.ms(low + (high - low).max(0.0) * (rank - below).max(0.0) / gaps);
            }
            below += gaps;
        }
        self.longest_ms()
    }

    /// `(length in ms, how many stalls were at least that long)`, by length; the last is the longest stall. Empty where there
    /// was none.
    pub fn at_least(&self) -> Vec<(f64, u64)> {
        let mut buckets: Vec<_> = self.buckets().into_iter().filter(|&(.., gaps)| gaps > 0).collect();
        let mut points: Vec<_> = self.longest_ms().map(|longest| (longest, 1)).into_iter().collect();
        let mut count = 0u64;
        while let Some((from, _, gaps)) = buckets.pop() {
            count = count.saturating_add(gaps);
            let from = self.ms(from.max(self.threshold_ticks as f64).min(self.longest_ticks as f64));
            points.extend(from.map(|from| (from, count)));
        }
        points.reverse();
        points
    }

    /// From, to (in ticks), and how many gaps between, of the finest histogram that there is.
    fn buckets(&self) -> Vec<(f64, f64, u64)> {
        if self.fine.iter().all(|&gaps| gaps == 0) {
            let powers = (0i32..).zip(self.histogram);
            return powers.map(|(bit, gaps)| (2f64.powi(bit), 2f64.powi(bit + 1), gaps)).collect();
        }
        let step = self.fine_ticks as f64;
        let last = self.fine.len() - 1;
        let fine = self.fine[..last].iter().enumerate();
        let mut buckets: Vec<_> =
            fine.map(|(number, &gaps)| (number as f64 * step, (number + 1) as f64 * step, gaps)).collect();
        // What lies beyond the fine one's reach, the coarse one tells apart.
        let reach = last as f64 * step;
        let powers = (0i32..).zip(self.histogram).map(|(bit, gaps)| (2f64.powi(bit), 2f64.powi(bit + 1), gaps));
        let beyond: Vec<_> = powers.filter(|&(from, _, gaps)| from >= reach && gaps > 0).collect();
        let next = beyond.first().map_or(f64::INFINITY, |&(from, ..)| from);
        let between = self.fine[last].saturating_sub(beyond.iter().map(|&(.., gaps)| gaps).sum());
        buckets.push((reach, next, between));
        buckets.extend(beyond);
        buckets
    }

    /// Adds the stalls of another vCPU or run of the same host.
    pub fn add(&mut self, other: &Self) {
        self.longest_ticks = self.longest_ticks.max(other.longest_ticks);
        std::iter::zip(&mut self.histogram, other.histogram).for_each(|(sum, gaps)| *sum += gaps);
        self.fine.resize(self.fine.len().max(other.fine.len()), 0);
        iter::zip(&mut self.fine, &other.fine).for_each(|(sum, gaps)| *sum += gaps);
    }

    /// All of them together; `None` without any.
    pub fn sum<'a>(all: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        all.into_iter().cloned().reduce(|mut sum, other| {
            sum.add(&other);
            sum
        })
    }

    fn ms(&self, ticks: f64) -> Option<f64> {
        ratio(ticks * 1e3, self.tsc_hz as f64)
    }
}

/// Half-way between two instants.
fn middle(from: Duration, to: Duration) -> Duration {
    from + to.saturating_sub(from) / 2
}

fn error_pct(rate: f64, limit: f64) -> Option<f64> {
    ratio(100.0 * (rate - limit), limit)
}

/// `of ÷ by`; `None` where that is no number.
fn ratio(of: f64, by: f64) -> Option<f64> {
    Some(of / by).filter(|ratio| ratio.is_finite())
}

#[cfg(test)]
mod tests;
