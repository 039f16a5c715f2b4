//! How late this host ends a sleep. A pause is a sleep: no limiter ends it better than that, so it is measured beside
//! every run, and whoever reads a missed figure can tell the host's part in it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::measure::{median, per_mille};

/// As long as the limiter's slices.
const SLEEP: Duration = Duration::from_millis(3);

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

/// Runs `run`, and tells how late each sleep was beside it.
pub fn beside<T>(run: impl FnOnce() -> T) -> (T, Vec<Duration>) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            let mut late = Vec::new();
            // Relaxed: only ends a loop; what the thread found is handed over by joining it.
            while !done.load(Ordering::Relaxed) {
                let start = Instant::now();
                thread::sleep(SLEEP);
                late.push(start.elapsed().saturating_sub(SLEEP));
            }
            late
        });
        let result = run();
        done.store(true, Ordering::Relaxed);
        (result, sleeper.join().unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn sleeps_are_counted_while_the_run_lasts() {
        let (result, late) = beside(|| {
            thread::sleep(5 * SLEEP);
            7
        });
        assert_eq!(result, 7);
        assert!((1..=6).contains(&late.len()), "{}", late.len());
    }
}
