//! How late the host ends a sleep. A pause is one, and no limiter ends it better.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Runs `run`, and tells how late a thread was meanwhile that only sleeps, for `sleep` each time: in ms, all but a thousandth
/// of its sleeps ended no later. `None` where it ended none.
pub fn beside<T>(sleep: Duration, run: impl FnOnce() -> T) -> (T, Option<f64>) {
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
        let late = sleeper.join().unwrap_or_default();
        (result, per_mille(&late, 999).map(|late| 1e3 * late.as_secs_f64()))
    })
}

/// Ends the sleeper when the run is over, by a panic too: the scope waits for both.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The smallest time that `mille` of a thousand do not exceed; `None` for none.
pub(crate) fn per_mille(times: &[Duration], mille: usize) -> Option<Duration> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get((sorted.len() * mille).div_ceil(1000).checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let times: Vec<_> = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!(per_mille(&times, 500), Some(Duration::from_millis(100)));
        assert_eq!(per_mille(&times, 990), Some(Duration::from_millis(198)));
        assert_eq!(per_mille(&times[..1], 990), Some(Duration::from_millis(200)));
        assert_eq!(per_mille(&[], 990), None);
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
        assert!(late.is_some_and(|ms| ms >= 0.0), "{late:?}");
    }
}
