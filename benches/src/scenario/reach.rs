//! What was in a limited writer's reach: its limit, or what it writes unpaused where that is less.
//!
//! A guest whose host is slow (its clock has fallen, its write faults are expensive) stays below a high limit whoever
//! limits it, and no pause is the reason. So a rate that is *below* the limit is judged against what was in reach, pauses
//! being all that a limiter answers for; one that is *above* the limit, always against the limit.

use std::iter;
use std::mem::replace;
use std::time::Duration;

use crate::measure::{Series, middle};
use crate::record::{Recording, Sample, VcpuRecording};
use crate::units::mib_per_sec;

/// A vCPU's series against its limits.
#[derive(Debug)]
pub struct Reach<'a> {
    series: Series<'a>,
    /// The samples with the pages that were out of reach added: as if the vCPU had always been fast enough.
    eased: Vec<Sample>,
    vcpu: &'a VcpuRecording,
    end: Duration,
    /// Pages that the limits allowed, and those of them that were out of reach.
    allowed: f64,
    missing: f64,
}

impl<'a> Reach<'a> {
    /// Of a vCPU; `strict` is against the limits alone.
    pub fn of(recording: &'a Recording, vcpu: &'a VcpuRecording, strict: bool) -> Self {
        let (mut allowed, mut missing) = (0.0, 0.0);
        let mut eased = vcpu.samples.clone();
        let intervals = intervals(vcpu);
        for (number, sample) in eased.iter_mut().skip(1).enumerate() {
            allowed += intervals[number].allowed;
            missing += if strict { 0.0 } else { out_of_reach(&intervals, number) };
            sample.net = sample.net.saturating_add(rounded(missing));
        }
        Self { series: Series::of(recording, vcpu), eased, vcpu, end: recording.end, allowed, missing }
    }

    /// Pages that the limits allowed, and those of them that were out of reach.
    pub const fn pages(&self) -> (f64, f64) {
        (self.allowed, self.missing)
    }

    /// How far the second half of the last limit's time is off, in percent.
    pub fn error_pct(&self) -> Option<f64> {
        let (from, to, limit) = self.limits().last()?;
        self.off_pct(middle(from, to), to, limit?)
    }

    /// How far the worst 100 ms window is off, in percent, from so long after the last limit was set.
    pub fn worst_pct(&self, settled: Duration) -> Option<f64> {
        let (from, to, limit) = self.limits().last()?;
        let limit = limit?;
        self.series.worst_pct(from + settled, to, |from, to| self.off_pct(from, to, limit))
    }

    /// From each limit being set until every 100 ms window is within ±10 % of it, in ms; `None` where none ever was.
    pub fn settle_ms(&self) -> impl Iterator<Item = Option<f64>> {
        self.limits().map(|(from, to, limit)| {
            let limit = limit?;
            Some(self.series.settle(from, to, |from, to| self.off_pct(from, to, limit))?.0)
        })
    }

    /// From when to when each limit held, and what it was in MiB/s.
    fn limits(&self) -> impl Iterator<Item = (Duration, Duration, Option<f64>)> {
        let limits = &self.vcpu.limits;
        let ends = limits.iter().skip(1).map(|&(from, _)| from).chain([self.end]);
        let rate = |limit| mib_per_sec(limit, self.series.page_size);
        iter::zip(limits, ends).map(move |(&(from, limit), to)| (from, to, limit.map(rate)))
    }

    fn off_pct(&self, from: Duration, to: Duration, limit: f64) -> Option<f64> {
        let eased = Series { samples: &self.eased, ..self.series };
        let above = self.series.error_pct(from, to, limit)?;
        let below = -eased.error_pct(from, to, limit)?;
        Some(above.max(below).max(0.0))
    }
}

/// What happened between two readings.
#[derive(Clone, Copy, Debug)]
struct Interval {
    pages: f64,
    /// By the limit; 0 without one.
    allowed: f64,
    /// Share of it that the vCPU was paused for, 0 to 1.
    paused: f64,
}

impl Interval {
    /// The share of what was allowed that the vCPU would not have written unpaused either. Who is mostly paused is slower
    /// for that; else it would have gone on as fast as it was, all the time.
    fn out_of_reach(self) -> f64 {
        let short = 1.0 - self.pages / (1.0 - self.paused) / self.allowed;
        if self.is_mostly_paused() || self.allowed == 0.0 { 0.0 } else { short.max(0.0) }
    }

    fn is_mostly_paused(self) -> bool {
        self.paused >= 0.5
    }
}

/// Pages of an interval that were out of reach. In one in which the vCPU becomes slow, or fast again, as large a share may
/// be as in the next one or the one before.
fn out_of_reach(intervals: &[Interval], number: usize) -> f64 {
    let Interval { pages, allowed, .. } = intervals[number];
    let around = &intervals[number.saturating_sub(1)..intervals.len().min(number + 2)];
    let share = around.iter().map(|interval| interval.out_of_reach()).fold(0.0, f64::max);
    let spared = if intervals[number].is_mostly_paused() { 0.0 } else { (share * allowed).min(allowed - pages) };
    spared.max(intervals[number].out_of_reach() * allowed)
}

fn intervals(vcpu: &VcpuRecording) -> Vec<Interval> {
    let pairs = || vcpu.samples.windows(2).map(|pair| (&pair[0], &pair[1]));
    // A pause is counted when it is over, and may have begun before the reading.
    let mut earlier = Duration::ZERO;
    let mut paused: Vec<f64> = pairs()
        .rev()
        .map(|(from, to)| {
            let (pause, time) =
                (to.paused.saturating_sub(from.paused) + replace(&mut earlier, Duration::ZERO), to.at - from.at);
            earlier = pause.saturating_sub(time);
            (pause.as_secs_f64() / time.as_secs_f64().max(1e-9)).min(1.0)
        })
        .collect();
    paused.reverse();
    let limit_at = |at: Duration| vcpu.limits.iter().rev().find(|&&(from, _)| from <= at).and_then(|&(_, limit)| limit);
    let interval = |((from, to), paused): ((&Sample, &Sample), f64)| {
        let rate = limit_at(from.at).filter(|_| limit_at(from.at) == limit_at(to.at));
        let allowed = rate.map_or(0.0, |rate| rate.pages_per_sec() as f64 * (to.at - from.at).as_secs_f64());
        Interval { pages: to.net.saturating_sub(from.net) as f64, allowed, paused }
    };
    iter::zip(pairs(), paused).map(interval).collect()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pages of a run, and saturating")]
fn rounded(pages: f64) -> u64 {
    pages.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    const MS: Duration = Duration::from_millis(1);

    /// The example's writer (free for 1 s, 100 MiB/s from then to 9 s), with these MiB/s and that share of the time paused
    /// in each 10 ms from 5 s on, by the number of the ten milliseconds.
    fn recording(then: impl Fn(u64) -> (u64, f64)) -> Recording {
        let mut recording = example::recording();
        let samples = &mut recording.vcpus[0].samples;
        for at in 501..samples.len() {
            let ((mib, paused), last) = (then(at as u64 - 501), samples[at - 1]);
            samples[at].net = last.net + mib * 256 / 100;
            samples[at].paused = last.paused + MS.mul_f64(10.0 * paused);
        }
        recording
    }

    #[track_caller]
    fn off(recording: &Recording, strict: bool) -> [Option<f64>; 3] {
        let reach = Reach::of(recording, &recording.vcpus[0], strict);
        let rounded = |value: Option<f64>| value.map(|value| (10.0 * value).round() / 10.0);
        [reach.error_pct(), reach.worst_pct(MS * 150), reach.settle_ms().last().unwrap()].map(rounded)
    }

    #[test]
    fn a_guest_that_nothing_pauses_is_spared_and_nothing_else() {
        // 100 ms of each 400 at 50 MiB/s.
        let slow = |at: u64| at % 40 < 10;
        let unpaused = recording(|at| if slow(at) { (50, 0.0) } else { (100, 0.9) });
        assert_eq!(off(&unpaused, false), [Some(0.0), Some(0.0), Some(50.0)]);
        assert_eq!(off(&unpaused, true), [Some(12.5), Some(50.0), Some(7680.0)]);
        let reach = Reach::of(&unpaused, &unpaused.vcpus[0], false).pages();
        assert_eq!(reach, (8.0 * 25_600.0, 100.0 * 128.0));

        // Paused for a fifth of it, the guest would have written 62.5: the pauses have 12.5 of the 50 to answer for.
        let partly = recording(|at| if slow(at) { (50, 0.2) } else { (100, 0.9) });
        assert_eq!(off(&partly, false), [Some(3.1), Some(12.5), Some(7620.0)]);
        // And all, where it was paused most of the time.
        let paused = recording(|at| if slow(at) { (50, 0.5) } else { (100, 0.9) });
        assert_eq!(off(&paused, false), off(&paused, true));
    }

    #[test]
    fn a_spell_that_begins_between_readings_is_spared_as_a_whole() {
        // Nothing from the middle of an interval to that of another, and there half of it paused before, or after.
        let slow = recording(|at| match at % 40 {
            0 | 9 => (50, 0.45),
            1..9 => (0, 0.0),
            _ => (100, 0.9),
        });
        assert_eq!(off(&slow, false), [Some(0.0), Some(0.0), Some(50.0)]);
        // No neighbour is that slow.
        let short = recording(|at| match at % 40 {
            0 | 9 => (50, 0.45),
            _ => (100, 0.9),
        });
        assert_eq!(off(&short, false)[1], Some(8.2), "it would have written 91 unpaused, twice");
    }

    #[test]
    fn a_pause_that_is_counted_when_it_is_over_is_not_taken_for_a_slow_guest() {
        // Nothing for 50 ms, and at their end a pause of 44.
        let paused = recording(|at| match at % 40 {
            0..4 => (0, 0.0),
            4 => (0, 4.4),
            _ => (100, 0.9),
        });
        assert_eq!(off(&paused, false)[1], Some(40.0), "six of the first ten ms are not its");
        assert_eq!(off(&paused, true)[1], Some(50.0));
    }

    #[test]
    fn what_is_caught_up_beyond_the_limit_counts() {
        let caught_up = recording(|at| match at % 40 {
            0..10 => (50, 0.0),
            10..15 => (200, 0.0),
            _ => (100, 0.9),
        });
        assert_eq!(off(&caught_up, false), [Some(0.0), Some(50.0), Some(7740.0)]);
    }

    #[test]
    fn each_limit_is_its_own() {
        let stepped = example::stepped();
        let reach = Reach::of(&stepped, &stepped.vcpus[0], false);
        assert_eq!(reach.settle_ms().count(), stepped.vcpus[0].limits.len());
        let strict = Reach::of(&stepped, &stepped.vcpus[0], true);
        assert_eq!(strict.pages().1, 0.0);
        // Slower than a limit that was only just set, or none, is nobody's fault, and no page of it was allowed.
        let mut unlimited = stepped.clone();
        unlimited.vcpus[0].limits.iter_mut().for_each(|limit| limit.1 = None);
        let reach = Reach::of(&unlimited, &unlimited.vcpus[0], false);
        assert_eq!((reach.pages(), reach.error_pct(), reach.worst_pct(MS)), ((0.0, 0.0), None, None));
        assert!(reach.settle_ms().all(|settled| settled.is_none()));
    }
}
