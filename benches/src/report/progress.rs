//! How a run goes on, while it does: live lines on a terminal, plain ones about once a second elsewhere. On stderr.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use console::Term;
use dirtylimit_core::PageRate;

use super::table::number;
use crate::guest::{Phase, Progress, VcpuNow};
use crate::output::{is_quiet, say};
use crate::plan::Plan;
use crate::units::{PAGE_SIZE, mib_per_sec, significant};

/// More vCPUs than these are not shown one by one, however large the terminal; in plain lines, than those.
const MAX_LINES: usize = 16;
const MAX_PLAIN: usize = 2;
/// The most columns of a sparkline, and the time that each one stands for.
const MAX_SPARKS: usize = 80;
const SPARK: Duration = Duration::from_millis(250);
/// Columns before a sparkline, and before the bar in the first line with its brackets.
const FIGURES: usize = 43;
const CLOCK: usize = 40;
/// Distance between two pictures on a terminal.
const REDRAW: Duration = Duration::from_millis(100);
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

    /// A wish that nobody has.
    #[cfg(test)]
    pub(crate) fn never() -> Self {
        Self(Arc::new(AtomicBool::new(false)))
    }

    /// Whether the user wants the run to end.
    pub fn requested(&self) -> bool {
        // Relaxed: as above; the guest asks again within 100 ms.
        self.0.load(Ordering::Relaxed)
    }
}

/// The time that is left of work whose parts have known lengths.
#[derive(Clone, Copy, Debug)]
pub struct Left(pub Duration);

impl Left {
    /// As text, when a part begins, whose length it subtracts then.
    pub fn begin(&mut self, part: Duration) -> String {
        let left = self.0;
        self.0 = left.saturating_sub(part);
        match left.as_secs_f64() {
            seconds @ ..90.0 => format!("{seconds:.0} s left"),
            seconds => format!("{:.0} min left", seconds / 60.0),
        }
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
    Terminal { term: Term, screen: Screen, drawn: Drawn },
    Plain { next: Duration },
}

impl Live {
    /// Shows a run of `plan` as fits what stderr is.
    pub fn new(plan: &Plan, interrupt: Interrupt) -> Self {
        let term = Term::stderr();
        // A dumb terminal cannot move its cursor.
        let view = if !is_quiet() && term.is_term() && std::env::var_os("TERM").is_none_or(|name| name != "dumb") {
            View::Terminal { term, screen: Screen::new(plan), drawn: Drawn::default() }
        } else {
            View::Plain { next: PLAIN / 2 }
        };
        Self { interrupt, total: plan.time(), view }
    }

    /// Takes the live lines away.
    pub fn finish(&mut self) {
        if let View::Terminal { term, drawn, .. } = &mut self.view {
            drawn.replace(term, Vec::new());
        }
    }
}

impl Progress for Live {
    fn sample(&mut self, at: Duration, phase: Phase, vcpus: &[VcpuNow]) {
        match &mut self.view {
            View::Terminal { term, screen, drawn } => {
                screen.remember(at, vcpus);
                if drawn.at.is_none_or(|last| last.elapsed() >= REDRAW) {
                    let (rows, columns) = term.size();
                    let lines = screen.lines(at, phase, vcpus, usize::from(rows), usize::from(columns));
                    drawn.replace(term, lines);
                }
            }
            View::Plain { next } if at >= *next => {
                *next = at + PLAIN;
                let figures: Vec<_> = match vcpus.len() {
                    0..=MAX_PLAIN => {
                        vcpus.iter().enumerate().map(|(index, now)| format!("vCPU {index} {}", figures(now))).collect()
                    }
                    count => vec![format!("{count} vCPUs {}", figures(&sum(vcpus, None)))],
                };
                say(format_args!("{}, {}: {}", clock(at, self.total), name(phase), figures.join("; ")));
            }
            View::Plain { .. } => {}
        }
    }

    fn interrupted(&self) -> bool {
        self.interrupt.requested()
    }
}

/// The lines that stand on the terminal now.
#[derive(Debug, Default)]
struct Drawn {
    at: Option<Instant>,
    lines: Vec<String>,
}

impl Drawn {
    /// Puts `lines` where the last ones are. The cursor stays below them, so that what the terminal echoes (`^C`) is
    /// overwritten.
    fn replace(&mut self, term: &Term, lines: Vec<String>) {
        // A terminal that became narrower has wrapped the last ones.
        let columns = usize::from(term.size().1).max(1);
        let up: usize = self.lines.iter().map(|line| line.chars().count().div_ceil(columns).max(1)).sum();
        let mut text = if up > 0 { format!("\r\x1b[{up}A") } else { String::new() };
        // First to the end of the line, and at the end below the lines, so that nothing flickers.
        lines.iter().for_each(|line| text.extend([line, "\x1b[K\n"]));
        text.push_str("\x1b[J");
        // A terminal that is gone ends no run.
        let _ = term.write_str(&text);
        (self.at, self.lines) = (Some(Instant::now()), lines);
    }
}

/// What there is to show, without a terminal.
#[derive(Debug)]
struct Screen {
    total: Duration,
    vm_limit: Option<PageRate>,
    /// Of all together, then of each vCPU; the newest first.
    history: Vec<VecDeque<PageRate>>,
    next: Duration,
    /// The vCPUs that are shown, where there is no room for all of them.
    fastest: Vec<usize>,
}

impl Screen {
    fn new(plan: &Plan) -> Self {
        Self {
            total: plan.time(),
            vm_limit: plan.vm_limit,
            history: vec![VecDeque::new(); 1 + plan.vcpus.len()],
            next: Duration::ZERO,
            fastest: Vec::new(),
        }
    }

    /// Keeps the rates for the sparklines.
    fn remember(&mut self, at: Duration, vcpus: &[VcpuNow]) {
        if at < self.next {
            return;
        }
        self.next = at + SPARK;
        let rates = std::iter::once(sum(vcpus, None).rate).chain(vcpus.iter().map(|now| now.rate));
        for (history, rate) in self.history.iter_mut().zip(rates) {
            history.truncate(MAX_SPARKS - 1);
            history.push_front(rate);
        }
        self.fastest = (0..vcpus.len()).collect();
        self.fastest.sort_by_key(|&index| std::cmp::Reverse(vcpus[index].rate));
    }

    /// At most `rows - 1` lines of at most `columns` characters: all vCPUs or the fastest, and the sum of all.
    fn lines(&self, at: Duration, phase: Phase, vcpus: &[VcpuNow], rows: usize, columns: usize) -> Vec<String> {
        let sparks = columns.saturating_sub(FIGURES).min(MAX_SPARKS);
        let shown = SPARK.as_secs_f64() * sparks as f64;
        let done = at.as_secs_f64() / self.total.as_secs_f64().max(1e-3);
        let bar = columns.saturating_sub(CLOCK).min(32);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a few columns")]
        let full = (done.min(1.0) * bar as f64) as usize;
        let clock = format!("{}, {}", clock(at, self.total), name(phase));
        let mut lines = vec![
            if bar > 0 { format!("{clock:<38}[{:<bar$}]", "=".repeat(full)) } else { clock },
            format!("vCPU  rate MiB/s  limit MiB/s  paused %  last {shown:.0} s, the limit at half height"),
        ];
        let line = |name: &str, now: &VcpuNow, history: &VecDeque<PageRate>| {
            let rate = number(Some(mib_per_sec(now.rate, PAGE_SIZE)));
            let limit = now.limit.map_or("none".to_owned(), |limit| significant(mib_per_sec(limit, PAGE_SIZE), 4));
            let (paused, spark) = (100.0 * now.paused_share, spark(history, now.limit, sparks));
            format!("{name:>4}  {rate:>10}  {limit:>11}  {paused:>8.0}  {spark}")
        };
        // Two lines above, one for all, one for those that are left out, and the cursor's.
        let room = rows.saturating_sub(5).clamp(1, MAX_LINES);
        let mut chosen: Vec<_> = (0..vcpus.len()).collect();
        if vcpus.len() > room {
            chosen = self.fastest.iter().copied().take(room).collect();
            chosen.sort_unstable();
        }
        if vcpus.len() > 1 {
            lines.push(line("all", &sum(vcpus, self.vm_limit), &self.history[0]));
        }
        lines.extend(chosen.iter().map(|&index| line(&index.to_string(), &vcpus[index], &self.history[1 + index])));
        if chosen.len() < vcpus.len() {
            lines.push(format!("and {} vCPUs that are slower now", vcpus.len() - chosen.len()));
        }
        let cut = |line: String| line.trim_end().chars().take(columns).collect();
        lines.into_iter().map(cut).collect()
    }
}

/// All vCPUs as one: `limit`, or if there is none, the sum of theirs.
fn sum(vcpus: &[VcpuNow], limit: Option<PageRate>) -> VcpuNow {
    let sum = |rate: fn(&VcpuNow) -> PageRate| {
        let bytes = vcpus.iter().fold(0u64, |sum, now| sum.saturating_add(rate(now).bytes_per_sec(PAGE_SIZE)));
        PageRate::from_bytes_per_sec(bytes, PAGE_SIZE)
    };
    let limited = vcpus.iter().all(|now| now.limit.is_some());
    VcpuNow {
        rate: sum(|now| now.rate),
        limit: limit.or_else(|| limited.then(|| sum(|now| now.limit.unwrap_or_default()))),
        paused_share: vcpus.iter().map(|now| now.paused_share).sum::<f64>() / vcpus.len().max(1) as f64,
    }
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

/// The newest rates as bars, at most `width`, the newest last. Half the height is the limit, so that it is seen to be kept; without one, the full
/// height is the largest rate.
fn spark(history: &VecDeque<PageRate>, limit: Option<PageRate>, width: usize) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let rates = || history.iter().take(width);
    let most = rates().max().map_or(0.0, |&rate| mib_per_sec(rate, PAGE_SIZE));
    let full = limit.map_or(most, |limit| 2.0 * mib_per_sec(limit, PAGE_SIZE));
    #[expect(clippy::cast_possible_truncation, reason = "clamped to 0..=7")]
    let bar = |rate: f64| if full > 0.0 { BARS[(rate / full * 8.0).clamp(0.0, 7.0) as usize] } else { BARS[0] };
    let bars: Vec<_> = rates().map(|&rate| bar(mib_per_sec(rate, PAGE_SIZE))).collect();
    bars.into_iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn now(rate: u32, limit: Option<u32>) -> VcpuNow {
        let mib = |mib| PageRate::from_pages_per_sec(256 * mib);
        VcpuNow { rate: mib(rate), limit: limit.map(mib), paused_share: 0.5 }
    }

    fn plan(vcpus: usize) -> Plan {
        let line = ["dirtylimit-bench", "run", "--free-seconds", "1", "--seconds", "8", "--vcpus", &vcpus.to_string()];
        match Cli::try_parse_from(line).unwrap().command {
            Command::Run(run) => run.plan().unwrap(),
            _ => unreachable!("`run` was given"),
        }
    }

    fn shown(vcpus: &[VcpuNow], rows: usize, columns: usize) -> String {
        let mut screen = Screen::new(&plan(vcpus.len()));
        for quarter in 0..18 {
            screen.remember(SPARK * quarter, vcpus);
        }
        screen.lines(SPARK * 18, Phase::Limited, vcpus, rows, columns).join("\n")
    }

    #[test]
    fn a_terminal_shows_each_vcpu_and_all() {
        let vcpus = [now(100, Some(100)), now(1500, None), now(49, Some(50))];
        let expected = "\
4.5 s of 9.0 s, limited               [================                ]
vCPU  rate MiB/s  limit MiB/s  paused %  last 9 s, the limit at half height
 all        1649         none        50  ██████████████████
   0       100.0          100        50  ▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅
   1        1500         none        50  ██████████████████
   2        49.0           50        50  ▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄";
        assert_eq!(shown(&vcpus, 24, 80), expected);
        assert_eq!(shown(&vcpus[..1], 24, 80).lines().count(), 3, "one is all");
    }

    #[test]
    fn nothing_is_higher_or_wider_than_the_terminal() {
        let vcpus: Vec<_> = (0..64).map(|rate| now(rate, Some(50))).collect();
        for (rows, columns) in [(24, 80), (24, 40), (8, 80), (10, 20), (60, 300), (6, 1)] {
            let text = shown(&vcpus, rows, columns);
            let widest = text.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(columns) && text.lines().count() < rows, "{rows} x {columns}:\n{text}");
        }
        let text = shown(&vcpus, 24, 80);
        assert!(text.contains("\n all        2016         3200 "), "{text}");
        assert!(text.contains("\n  63        63.0           50 ") && !text.contains("\n   7 "), "{text}");
        assert!(text.ends_with("and 48 vCPUs that are slower now"), "{text}");
    }

    #[test]
    fn a_kept_limit_is_half_a_spark_high() {
        let history = |rates: &[u32]| rates.iter().map(|&rate| now(rate, None).rate).collect::<VecDeque<_>>();
        // The newest comes first in the history and last in the picture.
        assert_eq!(spark(&history(&[100, 100, 1500, 0]), now(0, Some(100)).limit, 80), "▁█▅▅");
        assert_eq!(spark(&history(&[1000, 500, 2000]), None, 2), "▅█");
        assert_eq!(spark(&history(&[0]), None, 80), "▁");
        assert_eq!(spark(&history(&[]), None, 80), "");
    }

    #[test]
    fn what_is_left_is_told_as_each_part_begins() {
        let mut left = Left(SPARK * 1000);
        assert_eq!([680, 320, 1].map(|quarters| left.begin(SPARK * quarters)), ["4 min left", "80 s left", "0 s left"]);
    }

    #[test]
    fn a_budget_is_the_limit_of_all() {
        let vcpus = vec![now(100, Some(50)); 20];
        assert_eq!(figures(&sum(&vcpus, None)), "2000.0 of 1000 MiB/s, paused 50 %");
        let budget = now(0, Some(700)).limit;
        assert_eq!(figures(&sum(&vcpus, budget)), "2000.0 of 700 MiB/s, paused 50 %");
        assert_eq!(figures(&sum(&[now(1, None), now(2, Some(3)), now(4, None)], None)), "7.0 MiB/s");
    }
}
