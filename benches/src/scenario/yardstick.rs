//! The host's part in what is measured. How late it ends a sleep: a pause is one, and no limiter ends it better. And
//! whether its clock falls: some hosts run all their CPUs at a tenth of their speed for tens of milliseconds (to save
//! power, or against heat), steal no time meanwhile and say nothing, and a guest cannot write a page in the time it has.

use std::hint::black_box;
use std::mem::{replace, take};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::measure::{median, per_mille};

/// A clock that is so many times slower than its best has fallen. Another thread on the same core halves it at most.
const FALLEN: u32 = 3;

/// How late the sleeps of a thread were that does nothing else.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HostLate {
    /// All but a thousandth of them, those of all runs together, were no later.
    pub p999_ms: f64,
    /// The latest of a run: the median of the runs.
    pub longest_ms: f64,
}

impl HostLate {
    /// Judges the sleeps beside several runs; `None` where there were none.
    pub fn of(runs: &[Vec<Duration>]) -> Option<Self> {
        let ms = |time: Duration| 1e3 * time.as_secs_f64();
        let longest = runs.iter().filter_map(|late| late.iter().max().copied().map(ms)).collect();
        Some(Self { p999_ms: per_mille(&runs.concat(), 999).map(ms)?, longest_ms: median(longest)? })
    }
}

/// Runs `run`, and tells how late each sleep of that length ended beside it.
pub fn beside<T>(sleep: Duration, run: impl FnOnce() -> T) -> (T, Vec<Duration>) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            let mut late = Vec::new();
            // Relaxed: only ends a loop; what the thread found is handed over by joining it.
            while !done.load(Ordering::Relaxed) {
                let start = Instant::now();
                thread::sleep(sleep);
                late.push(start.elapsed().saturating_sub(sleep));
            }
            late
        });
        let end = End(&done);
        let result = run();
        drop(end);
        (result, sleeper.join().unwrap_or_default())
    })
}

/// Ends the sleeper when the run is over, by a panic too: the scope waits for both.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How much the host was too slow.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HostSlow {
    /// Of the pages that limits allowed, those that were out of reach, in percent; see [`Reach`](super::reach::Reach).
    pub out_of_reach_pct: f64,
    /// So many figures would be missed if nothing were spared for that, and for a clock that had fallen.
    pub strictly_missed: usize,
}

/// The clock of the host's CPUs, judged by how long a little work takes.
#[derive(Debug, Default)]
pub struct Clock {
    best: Option<Duration>,
    /// When it was last looked at, and whether it had fallen.
    looked: Duration,
    fallen: bool,
    /// Whether it had at that look or at the one before.
    is_slow: bool,
    slow: Vec<Range<Duration>>,
}

impl Clock {
    /// Looks at the clock, for some ten microseconds, `at` after the start of a recording.
    pub fn look(&mut self, at: Duration) {
        let time = || {
            let start = Instant::now();
            // Each step waits for the one before, and for nothing else: neither memory nor a neighbour.
            black_box((0..2000).fold(black_box(1u64), |x, _| x.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1)));
            start.elapsed()
        };
        // Whoever is interrupted is not so three times in a row.
        self.judge(at, time().min(time()).min(time()));
    }

    fn judge(&mut self, at: Duration, time: Duration) {
        let best = self.best.map_or(time, |best| best.min(time));
        self.best = Some(best);
        let fallen = time > best * FALLEN;
        let before = replace(&mut self.looked, at);
        // From the last look before, as far as is known, to the first one after.
        let goes_on = replace(&mut self.fallen, fallen);
        self.is_slow = fallen || goes_on;
        match self.slow.last_mut() {
            Some(slow) if goes_on => slow.end = at,
            _ if fallen => self.slow.push(before..at),
            _ => {}
        }
    }

    /// Whether it had fallen since the look before the last one.
    pub const fn is_slow(&self) -> bool {
        self.is_slow
    }

    /// When it had fallen, in the recording that is over.
    pub fn over(&mut self) -> Vec<Range<Duration>> {
        (self.looked, self.fallen, self.is_slow) = (Duration::ZERO, false, false);
        take(&mut self.slow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_falls_below_a_third_of_its_best() {
        let ms = Duration::from_millis;
        let mut clock = Clock::default();
        let mut slow = |us: &[u64]| {
            for (number, &us) in (1..).zip(us) {
                clock.judge(ms(10) * number, Duration::from_micros(us));
            }
            clock.over()
        };
        assert_eq!(slow(&[40, 10, 30, 31, 120, 10, 10, 31, 10, 31]), [ms(30)..ms(60), ms(70)..ms(90), ms(90)..ms(100)]);
        assert_eq!(slow(&[31, 30]), [ms(0)..ms(20)], "another recording");
        assert_eq!(slow(&[9, 28]), [ms(10)..ms(20)], "by the best that was ever seen");
        let is_slow = [10, 31, 10, 10].map(|us| {
            clock.judge(ms(0), Duration::from_micros(us));
            clock.is_slow()
        });
        assert_eq!(is_slow, [false, true, true, false]);
    }

    #[test]
    fn the_latest_of_each_run_and_the_bulk_of_all() {
        let ms = Duration::from_millis;
        let runs = [vec![ms(0); 1997], vec![ms(8)], vec![ms(2)]];
        // One of two thousand is beyond the thousandth, and it takes more than one run to be the median.
        assert_eq!(HostLate::of(&runs), Some(HostLate { p999_ms: 2.0, longest_ms: 2.0 }));
        assert_eq!(HostLate::of(&[]), None);
        assert_eq!(HostLate::of(&[vec![]]), None);
    }

    #[test]
    #[should_panic(expected = "the run's own")]
    fn a_run_that_panics_is_over() {
        beside(Duration::from_millis(1), || -> () { panic!("the run's own") });
    }

    #[test]
    fn sleeps_are_counted_while_the_run_lasts() {
        let sleep = Duration::from_millis(3);
        let (result, late) = beside(sleep, || {
            thread::sleep(5 * sleep);
            7
        });
        assert_eq!(result, 7);
        assert!((1..=6).contains(&late.len()), "{}", late.len());
    }
}
