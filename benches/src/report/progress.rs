//! How a run goes on, while it does: live lines on a terminal, plain ones about once a second elsewhere. On stderr.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use dirtylimit_core::PageRate;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::guest::{Phase, Progress, VcpuNow};
use crate::plan::Plan;
use crate::units::{PAGE_SIZE, mib_per_sec, significant};

/// More vCPUs than these are shown by their sum.
const MAX_LINES: usize = 16;
const MAX_PLAIN: usize = 2;
/// Columns of a sparkline, and the time that each one stands for.
const SPARKS: usize = 24;
const SPARK: Duration = Duration::from_millis(250);
/// Distance between two plain lines.
const PLAIN: Duration = Duration::from_secs(1);

/// The user's wish to end the run: Ctrl-C, SIGTERM or SIGHUP.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes the signals over. The second one ends the process at once, with status 130.
    ///
    /// # Errors
    /// Somebody took them already, or the system refuses.
    pub fn install() -> Result<Self> {
        let wish = Self(Arc::new(AtomicBool::new(false)));
        let handler = wish.clone();
        // Relaxed: the flag publishes nothing but itself.
        ctrlc::set_handler(move || {
            if handler.0.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        })
        .context("cannot handle Ctrl-C")?;
        Ok(wish)
    }

    /// Whether the user wants the run to end.
    pub fn requested(&self) -> bool {
        // Relaxed: as above; the guest asks again within 100 ms.
        self.0.load(Ordering::Relaxed)
    }
}

/// Shows a run on stderr.
#[derive(Debug)]
pub struct Live {
    interrupt: Interrupt,
    total: Duration,
    view: View,
}

#[derive(Debug)]
enum View {
    Terminal { head: ProgressBar, lines: Vec<ProgressBar>, history: Vec<VecDeque<PageRate>>, next: Duration },
    Plain { next: Duration },
}

impl Live {
    /// Shows a run of `plan` as fits what stderr is.
    ///
    /// # Errors
    /// None today; the templates of the live lines are checked when they are made.
    pub fn new(plan: &Plan, interrupt: Interrupt) -> Result<Self> {
        let total = plan.free + plan.limited;
        let view = if std::io::stderr().is_terminal() {
            let shown = if plan.vcpus.len() <= MAX_LINES { plan.vcpus.len() } else { 1 };
            let all = MultiProgress::new();
            let head = ProgressBar::new(u64::try_from(total.as_millis())?)
                .with_style(ProgressStyle::with_template("[{bar:24}] {wide_msg}")?.progress_chars("=> "));
            let line = ProgressStyle::with_template("{wide_msg}")?;
            let lines = (0..shown).map(|_| all.add(ProgressBar::new_spinner().with_style(line.clone()))).collect();
            let history = vec![VecDeque::with_capacity(SPARKS); shown];
            View::Terminal { head: all.add(head), lines, history, next: Duration::ZERO }
        } else {
            View::Plain { next: PLAIN / 2 }
        };
        Ok(Self { interrupt, total, view })
    }

    /// Takes the live lines away.
    pub fn finish(&self) {
        if let View::Terminal { head, lines, .. } = &self.view {
            lines.iter().chain([head]).for_each(ProgressBar::finish_and_clear);
        }
    }
}

impl Progress for Live {
    fn sample(&mut self, at: Duration, phase: Phase, vcpus: &[VcpuNow]) {
        match &mut self.view {
            View::Terminal { head, lines, history, next } => {
                head.set_position(u64::try_from(at.min(self.total).as_millis()).unwrap_or(u64::MAX));
                head.set_message(format!("{}, {}", clock(at, self.total), name(phase)));
                let push = at >= *next;
                if push {
                    *next = at + SPARK;
                }
                for (index, ((line, history), now)) in
                    lines.iter().zip(history).zip(shown(vcpus, MAX_LINES)).enumerate()
                {
                    if push {
                        history.truncate(SPARKS - 1);
                        history.push_front(now.rate);
                    }
                    let who = who(index, vcpus.len(), MAX_LINES);
                    line.set_message(format!("{who:>8} {:<SPARKS$} {}", spark(history, now.limit), figures(&now)));
                }
            }
            View::Plain { next } if at >= *next => {
                *next = at + PLAIN;
                let now = shown(vcpus, MAX_PLAIN);
                let now: Vec<_> = now
                    .iter()
                    .enumerate()
                    .map(|(index, now)| format!("{} {}", who(index, vcpus.len(), MAX_PLAIN), figures(now)))
                    .collect();
                eprintln!("{}, {}: {}", clock(at, self.total), name(phase), now.join("; "));
            }
            View::Plain { .. } => {}
        }
    }

    fn interrupted(&self) -> bool {
        self.interrupt.requested()
    }
}

/// The vCPUs themselves, or where there are more than `most`, one that stands for all.
fn shown(vcpus: &[VcpuNow], most: usize) -> Vec<VcpuNow> {
    if vcpus.len() <= most {
        return vcpus.to_vec();
    }
    let sum = |rate: fn(&VcpuNow) -> PageRate| {
        let bytes = vcpus.iter().fold(0u64, |sum, now| sum.saturating_add(rate(now).bytes_per_sec(PAGE_SIZE)));
        PageRate::from_bytes_per_sec(bytes, PAGE_SIZE)
    };
    let limited = vcpus.iter().all(|now| now.limit.is_some());
    vec![VcpuNow {
        rate: sum(|now| now.rate),
        limit: limited.then(|| sum(|now| now.limit.unwrap_or_default())),
        paused_share: vcpus.iter().map(|now| now.paused_share).sum::<f64>() / vcpus.len() as f64,
    }]
}

fn who(index: usize, vcpus: usize, most: usize) -> String {
    if vcpus <= most { format!("vCPU {index}") } else { format!("{vcpus} vCPUs") }
}

fn clock(at: Duration, total: Duration) -> String {
    format!("{:.1} s of {:.1} s", at.as_secs_f64(), total.as_secs_f64())
}

const fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Free => "running free",
        Phase::Limited => "limited",
        Phase::Checking => "comparing the copy with the guest",
    }
}

fn figures(now: &VcpuNow) -> String {
    let rate = mib_per_sec(now.rate, PAGE_SIZE);
    match now.limit {
        Some(limit) => {
            let limit = significant(mib_per_sec(limit, PAGE_SIZE), 4);
            format!("{rate:.1} of {limit} MiB/s, paused {:.0} %", 100.0 * now.paused_share)
        }
        None => format!("{rate:.1} MiB/s"),
    }
}

/// Rates as bars, the newest last. Half the height is the limit, so that it is seen to be kept; without one, the full
/// height is the largest rate.
fn spark(history: &VecDeque<PageRate>, limit: Option<PageRate>) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = history.iter().max().map_or(0.0, |&rate| mib_per_sec(rate, PAGE_SIZE));
    let full = limit.map_or(most, |limit| 2.0 * mib_per_sec(limit, PAGE_SIZE));
    #[expect(clippy::cast_possible_truncation, reason = "clamped to 0..=7")]
    let bar = |rate: f64| if full > 0.0 { BARS[(rate / full * 8.0).clamp(0.0, 7.0) as usize] } else { BARS[0] };
    history.iter().rev().map(|&rate| bar(mib_per_sec(rate, PAGE_SIZE))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(rate: u32, limit: Option<u32>) -> VcpuNow {
        let mib = |mib| PageRate::from_pages_per_sec(256 * mib);
        VcpuNow { rate: mib(rate), limit: limit.map(mib), paused_share: 0.5 }
    }

    #[test]
    fn a_kept_limit_is_half_a_spark_high() {
        let history = |rates: &[u32]| rates.iter().map(|&rate| now(rate, None).rate).collect::<VecDeque<_>>();
        // The newest comes first in the history and last in the picture.
        assert_eq!(spark(&history(&[100, 100, 1500, 0]), now(0, Some(100)).limit), "▁█▅▅");
        assert_eq!(spark(&history(&[1000, 500]), None), "▅█");
        assert_eq!(spark(&history(&[0]), None), "▁");
        assert_eq!(spark(&history(&[]), None), "");
    }

    #[test]
    fn many_vcpus_are_shown_by_their_sum() {
        let vcpus = vec![now(100, Some(50)); 20];
        let all = shown(&vcpus, MAX_LINES);
        assert_eq!(all.len(), 1);
        assert_eq!(figures(&all[0]), "2000.0 of 1000 MiB/s, paused 50 %");
        assert_eq!(who(0, 20, MAX_LINES), "20 vCPUs");
        let mixed = [now(1, None), now(2, Some(3)), now(4, None)];
        assert_eq!(figures(&shown(&mixed, MAX_PLAIN)[0]), "7.0 MiB/s");
        assert_eq!(shown(&mixed, 3).len(), 3);
    }
}
