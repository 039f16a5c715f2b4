//! Slices that a *kick* ends (a signal that makes the vCPU leave the guest), where the ring cannot: right after it was
//! emptied, or where it is larger than what the guest writes to. What a kick ends is a time, so how many pages that is has
//! to be learned.
//!
//! And slices that the ring ends once the CPU hands its pages over, where those come in lumps: any exit from the guest makes
//! it do so, that of a timer's interrupt too. A timer that fires before the guest is entered is of no use, and then a whole
//! lump may pass; so several are armed, and a run that only the late ones ended makes all of them later.

use core::mem::replace;

use super::pacer::{Charge, MAX_DEBT};
use crate::rate::{Nanos, SECOND};
use crate::ring::PML;
use crate::set_penalty::Penalty;

/// The shortest run before a kick, less than it takes to enter the guest on some hosts; and the longest.
const SHORTEST: Nanos = 5_000;
const LONGEST: Nanos = 10_000_000;
/// So many runs in a row without a page are a guest that does not write, not one that was kicked too soon.
const IDLE: u32 = 8;
/// A run with so many times the pages that it was to have was much too long.
const MANY: u32 = 4;
/// Rings of so many free entries at most may be left to fill.
const FILLABLE: u32 = 4096;
/// And for no longer than so: where the working set is smaller they never fill.
const FILLS: Nanos = 100_000_000;
/// Whether they are is decided in the first runs with a page: later a single late signal would be a burst.
const DECIDED: u32 = 8;

/// The number of timers of a run.
pub const TIMERS: usize = 4;
/// When they fire, in tenths of the run's time …
const TENTHS: [Nanos; TIMERS] = [10, 14, 20, 50];
/// … the shortest of those times, and the first.
const SHORTEST_TIMED: Nanos = 1_000;
const FIRST_TIMED: Nanos = 20_000;

/// How long one vCPU shall run before its kick, learned from its runs before. Owned by the vCPU's thread.
#[derive(Debug)]
pub(crate) struct RunTime {
    run_time: Nanos,
    /// What of a run passes before the guest writes, as far as known: a kick that comes sooner finds no page.
    entry: Nanos,
    /// Runs in a row without a page.
    empty: u32,
    /// Runs with a page since kicks began.
    runs: u32,
    /// How long a page took in the last of them.
    page: Nanos,
    /// The next run, or the one that is over, is to fill the ring.
    fills: bool,
}

impl RunTime {
    /// A vCPU of which nothing is known: its first runs are short.
    pub(crate) const fn new() -> Self {
        Self { run_time: SHORTEST, entry: 0, empty: 0, runs: 0, page: 0, fills: false }
    }

    /// As [`RunTime::new`], for runs with timers: rather too late than too early.
    pub(crate) const fn with_timers() -> Self {
        Self { run_time: FIRST_TIMED, ..Self::new() }
    }

    /// When the next run is to be interrupted, from its beginning on: earliest first.
    pub(crate) fn timers(&self) -> [Nanos; TIMERS] {
        TENTHS.map(|tenths| self.run_time * tenths / 10)
    }

    /// Learns from a run with timers that was to have `slice` pages (at least one), had `pages`, and took `elapsed`. From one
    /// without a page nothing.
    pub(crate) fn learn_timed(&mut self, elapsed: Nanos, slice: u32, pages: u32) {
        if pages == 0 {
            return;
        }
        let before = self.run_time;
        let [.., third, last] = self.timers();
        let fitting = match elapsed {
            // A lump: all came before the guest was entered.
            _ if elapsed >= last * 2 && pages > slice.saturating_mul(MANY) => before * 2,
            // The last timers ended it: the others are too early, or about to be, or the host's scheduler was in the way.
            _ if elapsed >= third => before + before / 8,
            _ => {
                let fitting = before.min(elapsed) * Nanos::from(slice) / Nanos::from(pages);
                match () {
                    // Sooner than any timer: the time is the run's.
                    () if elapsed < before => fitting.max(FIRST_TIMED),
                    // A little down, as too early is worse than too late: that is a lump.
                    () if fitting < before => fitting.max(before - before / 6),
                    () => before.midpoint(fitting),
                }
            }
        };
        self.run_time = fitting.min(before * 2).clamp(SHORTEST_TIMED, LONGEST);
    }

    /// The run that is over was not to be ended by a kick: those begin anew.
    pub(crate) const fn begin(&mut self) {
        self.runs = 0;
    }

    /// How long the next run is to be: 5 µs to 10 ms, or 100 ms where it is to fill the ring.
    pub(crate) const fn get(&self) -> Nanos {
        if self.fills { FILLS } else { self.run_time }
    }

    /// Learns from a run of that time, which was to have `slice` pages (at least one) and had `pages`.
    pub(crate) fn learn(&mut self, slice: u32, pages: u32) {
        if replace(&mut self.fills, false) {
            return; // nothing: it was not to have a slice
        }
        let before = self.run_time;
        let fitting = if pages == 0 {
            self.empty = self.empty.saturating_add(1);
            if self.empty < IDLE {
                self.entry += before.saturating_sub(self.entry).div_ceil(2);
                before + before / 16
            } else {
                before * 2
            }
        } else {
            self.empty = 0;
            // Less and less of it is believed, or one empty run that the host was the reason of would be for good; and much
            // less where there are many pages, which cost more than the empty runs if that was wrong.
            self.entry = match self.entry {
                entry if pages > slice.saturating_mul(MANY) => entry.min(before) / 2,
                entry if entry < before => entry - entry / 64,
                _ => before / 2,
            };
            self.runs = self.runs.saturating_add(1);
            self.page = (before - self.entry) / Nanos::from(pages);
            let fitting = self.entry + (before - self.entry) * Nanos::from(slice) / Nanos::from(pages);
            // Half the way up, all of it down: too long a run is paid for by the guest.
            fitting.min(before.midpoint(fitting))
        };
        self.run_time = fitting.max(before / 8).min(before * 2).clamp(SHORTEST, LONGEST);
    }

    /// Whether the next run is better to fill the ring, which has so much room: kicks end slices of this penalty badly, and
    /// the writer is fast. Who has not filled it by then, or is not asked in its first runs, is kicked on.
    pub(crate) fn is_to_fill(&mut self, penalty: Penalty, room: u32) -> bool {
        let is_fast = (1..=DECIDED).contains(&self.runs) && self.page * Nanos::from(room) <= FILLS;
        self.fills = !ends_slices(penalty) && room <= FILLABLE && is_fast;
        if self.fills {
            self.runs = DECIDED + 1;
        }
        self.fills
    }
}

/// Whether kicks end slices of this penalty well: not below 16 pages in 4 ms, which are written while a signal travels.
/// Where such a slice has a ring that fills by itself, it is better left to fill.
pub fn ends_slices(penalty: Penalty) -> bool {
    cost_of(penalty, 16).is_some_and(|interval| interval <= 4_000_000)
}

/// Whether a kicked vCPU that has logged so many pages since its last pause shall pause again, or run on first.
///
/// Two pauses in a row are one long one to the guest, and a kick may come before its first instruction, or between the
/// write fault that logs a page and the write itself: only from the second page on something was done for certain. Where
/// two pages cost more than one pause pays, each is paid for by itself.
pub(crate) fn is_to_pause(penalty: Penalty, pages: u32, max_pause: Nanos) -> bool {
    match pages {
        0 => false,
        1 => cost_of(penalty, 2).is_some_and(|interval| interval > max_pause),
        _ => true,
    }
}

/// Whether a vCPU whose pages come in lumps shall pause at `now` until all is paid, however long that takes: where nothing
/// ends a lump, and with timers where the next lump that they miss might be more than a vCPU can owe, and be forgiven.
pub(crate) fn is_to_pay_all(penalty: Penalty, charge: &Charge, now: Nanos, is_timed: bool) -> bool {
    let next = cost_of(penalty, PML).unwrap_or(0);
    charge.until > now
        && charge.due > charge.until
        && !(is_timed && charge.due.saturating_add(next) <= now.saturating_add(MAX_DEBT))
}

/// What so many pages cost; `None` where there is no penalty.
fn cost_of(penalty: Penalty, pages: u32) -> Option<Nanos> {
    Some(penalty.terms()?.interval().of(pages))
}

/// Products above do not overflow: runs are at most `LONGEST`.
const _: () = assert!(LONGEST <= SECOND && LONGEST < Nanos::MAX / u32::MAX as Nanos);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::PageRate;
    use crate::set_penalty::Terms;

    /// Runs a writer that needs `entry` to enter the guest and `page` for each page; what 200 runs had at the end.
    fn drive(entry: Nanos, page: Nanos, slice: u32) -> (RunTime, std::vec::Vec<u32>) {
        let mut run = RunTime::new();
        let pages = (0..240)
            .map(|_| {
                let pages = u32::try_from(run.get().saturating_sub(entry) / page).unwrap();
                run.learn(slice, pages);
                pages
            })
            .collect::<std::vec::Vec<_>>();
        (run, pages[40..].to_vec())
    }

    #[test]
    fn the_run_time_follows_the_writer() {
        for page in [600, 2_600, 30_000] {
            let (run, _) = drive(0, page, 100);
            let fitting = (100 * page).clamp(SHORTEST, LONGEST);
            assert!(run.get().abs_diff(fitting) <= fitting / 20, "{page}: {run:?}");
        }
    }

    #[test]
    fn a_few_pages_are_met_although_the_way_into_the_guest_takes_longer() {
        for entry in [8_000, 12_000, 30_000] {
            for slice in [1, 2, 4] {
                let (_, pages) = drive(entry, 2_600, slice);
                let mean = f64::from(pages.iter().sum::<u32>()) / pages.len() as f64;
                assert!(
                    mean <= 1.5 * f64::from(slice) && mean >= 0.4 * f64::from(slice),
                    "{entry}, {slice}: {pages:?}"
                );
                assert!(pages.iter().all(|&pages| pages <= slice + 2), "{entry}, {slice}: {pages:?}");
            }
        }
    }

    /// Runs a writer as KVM does, under timers: a run ends when one of them finds a page, or a lump is full. What the last runs of
    /// 2,000 had.
    fn drive_timed(entry: Nanos, page: Nanos, slice: u32) -> std::vec::Vec<u32> {
        let mut run = RunTime::with_timers();
        let mut had = std::vec::Vec::new();
        for number in 0..2000 {
            // The way in is half as long again at random, and now and then twice as long.
            let entry = entry + entry * (number * 37 % 100) / 200 + if number % 61 == 0 { entry } else { 0 };
            // One that fires outside the guest is lost.
            let found = run.timers().into_iter().find(|timer| *timer >= entry + page);
            let pages = found.map_or(512, |timer| u32::try_from((timer - entry) / page).unwrap());
            let at = found.unwrap_or(entry + 512 * page);
            run.learn_timed(at + entry / 2, slice, pages);
            had.push(pages);
        }
        had[100..].to_vec()
    }

    #[test]
    fn what_the_next_lump_would_make_too_much_is_paid_at_once() {
        let (max_pause, now) = (10_000_000, 50 * SECOND);
        let charge = |owed| Charge { until: now + max_pause.min(owed), due: now + owed, slice: Some(1), scaled: false };
        // At 1,280 pages a second a lump costs 400 ms.
        let penalty = Penalty::new(Terms::Pace(PageRate::from_pages_per_sec(1280).interval()));
        for (owed, off, timed) in [
            (max_pause, false, false),
            (max_pause + 1, true, false),
            (599_000_000, true, false),
            (601_000_000, true, true),
            (SECOND, true, true),
        ] {
            let pays_all = |is_timed| is_to_pay_all(penalty, &charge(owed), now, is_timed);
            assert_eq!((pays_all(false), pays_all(true)), (off, timed), "{owed}");
        }
        let runs_on = Charge { until: now, ..charge(SECOND) };
        assert!(!is_to_pay_all(penalty, &runs_on, now, true), "it is to have a page first");
    }

    #[test]
    fn timers_end_slices_and_lumps_are_rare() {
        for (entry, page) in [(2_500, 300), (3_000, 1_000), (22_000, 2_000), (40_000, 2_000)] {
            for slice in [4, 15, 77] {
                let had = drive_timed(entry, page, slice);
                let lumps = had.iter().filter(|pages| **pages >= 512).count();
                let mean = had.iter().sum::<u32>() / u32::try_from(had.len()).unwrap();
                assert!(lumps == 0 && mean <= 2 * slice + 4, "{entry}, {page}, {slice}: {lumps} lumps, {mean} pages");
            }
        }
    }

    #[test]
    fn what_timers_found_makes_them_later_or_sooner() {
        let after = |elapsed, slice, pages| {
            let mut run = RunTime { run_time: 80_000, ..RunTime::with_timers() };
            run.learn_timed(elapsed, slice, pages);
            run.get()
        };
        assert_eq!(RunTime::with_timers().timers(), [20_000, 28_000, 40_000, 100_000]);
        assert_eq!(after(90_000, 10, 0), 80_000, "nothing from a run without a page");
        assert_eq!(after(90_000, 10, 10), 80_000);
        assert_eq!(after(90_000, 10, 11), 80_000 * 10 / 11);
        assert_eq!(after(90_000, 10, 100), 80_000 - 80_000 / 6, "a little sooner at a time");
        assert_eq!(after(80_000, 10, 100), 80_000 - 80_000 / 6, "the first timer");
        assert_eq!(after(90_000, 10, 5), 120_000, "half the way later");
        assert_eq!(after(160_000, 10, 1), 90_000, "the third timer or the last");
        assert_eq!((after(800_000, 10, 40), after(800_000, 10, 41)), (90_000, 160_000), "none of them");
        assert_eq!(after(799_999, 10, 41), 90_000, "less than twice the last one's time");
        assert_eq!(after(79_999, 10, 10), 79_999, "before any of them");
        assert_eq!(after(51_200, 1, 512), 20_000, "but not too soon");
        let mut run = RunTime::with_timers();
        (0..20).for_each(|_| run.learn_timed(Nanos::MAX, 1, 5));
        assert_eq!(run.get(), LONGEST);
        (0..200).for_each(|_| run.learn_timed(LONGEST, u32::MAX, u32::MAX));
        (0..200).for_each(|_| run.learn_timed(run.get(), 1, u32::MAX));
        assert_eq!(run.get(), SHORTEST_TIMED);
    }

    #[test]
    fn a_run_without_a_page_is_tried_again_a_little_longer_and_the_eighth_twice_as_long() {
        let (mut run, mut expected) = (RunTime::new(), SHORTEST);
        for empty in 1..=9 {
            run.learn(1, 0);
            expected += if empty < 8 { expected / 16 } else { expected };
            assert_eq!(run.get(), expected, "{empty}");
        }
    }

    #[test]
    fn the_way_into_the_guest_is_not_the_writers_time() {
        let grown = || {
            let mut run = RunTime::new();
            (0..4).for_each(|_| run.learn(u32::MAX, 1));
            assert_eq!(run.get(), 80_000, "at most twice as long");
            run
        };
        let mut run = grown();
        run.learn(1, u32::MAX);
        assert_eq!(run.get(), 10_000, "at least an eighth");
        let mut run = grown();
        run.learn(1, 0); // half of it is the way in: 40,000
        run.learn(1, 2); // less a 64th; the rest was for two pages
        assert_eq!(run.get(), 39_375 + (85_000 - 39_375) / 2);
        run.learn(1, 4); // less another
        assert_eq!(run.get(), 38_760 + (62_187 - 38_760) / 4);
        run.learn(1, 5); // that many: less its half
        assert_eq!(run.get(), 19_380 + (44_616 - 19_380) / 5);
        let at = |entry| RunTime { run_time: 30_000, entry, ..RunTime::new() };
        // Pages came sooner than was possible, so the way in is shorter: half of that perhaps, of many pages too.
        for (entry, pages, expected) in [(30_000, 2, 22_500), (40_000, 2, 22_500), (40_000, 8, 16_875)] {
            let mut run = at(entry);
            run.learn(1, pages);
            assert_eq!(run.get(), expected, "{entry}, {pages}");
        }
        let mut run = at(20_000);
        run.learn(2, 8);
        assert_eq!(run.get(), 19_688 + 10_312 * 2 / 8, "four times what it was to have is not yet many");
        let mut run = at(20_000);
        run.learn(2, 9);
        assert_eq!(run.get(), 10_000 + 20_000 * 2 / 9);
    }

    #[test]
    fn a_host_that_was_slow_for_a_while_is_soon_forgotten() {
        for slow in [10, 20, 40, 80] {
            let mut run = RunTime::new();
            let mut had = |entry: Nanos, page: Nanos, runs: Nanos| -> std::vec::Vec<u32> {
                let mut one = |number: Nanos| {
                    // The way in is half as long, or half as long again, and that at random.
                    let entry = entry * (50 + number * 37 % 100) / 100;
                    let pages = u32::try_from(run.get().saturating_sub(entry) / page).unwrap();
                    run.learn(1, pages);
                    pages
                };
                (0..runs).map(&mut one).collect()
            };
            had(15_000, 7_000, 200);
            had(180_000, 84_000, slow);
            let after = had(15_000, 7_000, 60);
            assert!(
                after.iter().sum::<u32>() <= 200 && after[4..].iter().all(|&pages| pages <= 4),
                "{slow}: {after:?}"
            );
        }
    }

    #[test]
    fn an_idle_vcpu_is_kicked_seldom_and_a_burst_reins_it_in() {
        let mut run = RunTime::new();
        (0..40).for_each(|_| run.learn(100, 0));
        assert_eq!(run.get(), LONGEST);
        (0..6).for_each(|_| run.learn(1, 1_000_000));
        assert_eq!(run.get(), SHORTEST);
    }

    #[test]
    fn the_ends_of_the_range_do_not_overflow() {
        for (slice, pages) in [(u32::MAX, 1), (u32::MAX, u32::MAX), (0, 1), (1, u32::MAX)] {
            let mut run = RunTime::new();
            for _ in 0..100 {
                run.learn(slice, pages);
                run.learn(slice, 0);
                assert!((SHORTEST..=LONGEST).contains(&run.get()));
            }
        }
    }

    #[test]
    fn who_is_left_to_fill_and_who_runs_on() {
        let at = |pages| Penalty::new(Terms::Pace(PageRate::from_pages_per_sec(pages).interval()));
        assert!(ends_slices(at(4000)) && !ends_slices(at(3999)) && !ends_slices(Penalty::NONE));
        // A page in 25 µs: 4,000 of them in 100 ms.
        let after = |runs: u32| {
            let mut run = RunTime { run_time: 25_000, ..RunTime::new() };
            (0..runs).for_each(|_| run.learn(1, 1));
            run
        };
        assert!(!after(0).is_to_fill(at(1000), 1), "nothing is known");
        assert!(after(1).is_to_fill(at(1000), 4000) && !after(1).is_to_fill(at(1000), 4001));
        assert!(!after(1).is_to_fill(at(4000), 1), "a kick ends that one well");
        assert!(after(8).is_to_fill(at(1000), 4000) && !after(9).is_to_fill(at(1000), 1), "decided by then");
        // The way in is not the writer's: two pages in 75.2 µs less a 64th of 25.6.
        let mut run = RunTime { run_time: 75_200, entry: 25_600, ..RunTime::new() };
        run.learn(1, 2);
        assert!(run.is_to_fill(at(1000), 4000));
        run.runs = 1;
        assert!(!run.is_to_fill(at(1000), 4001));
        let mut fast = RunTime::new();
        fast.learn(4, 4);
        assert!(fast.is_to_fill(at(1000), 4096));
        assert_eq!(fast.get(), 100_000_000);
        fast.learn(4, 1000);
        assert_eq!(fast.get(), 5_000, "that run taught nothing");
        assert!(!fast.is_to_fill(at(1000), 1), "once");
        fast.begin();
        fast.learn(4, 4);
        assert!(!fast.is_to_fill(at(1000), 4097) && fast.is_to_fill(at(1000), 4096));
        // At 200 pages a second two of them take 10 ms.
        let to_pause = |rate, pages| is_to_pause(at(rate), pages, 10_000_000);
        assert_eq!([0, 1, 2, u32::MAX].map(|pages| to_pause(201, pages)), [false, false, true, true]);
        assert_eq!([0, 1, 2].map(|pages| to_pause(200, pages)), [false, false, true]);
        assert_eq!([0, 1, 2].map(|pages| to_pause(199, pages)), [false, true, true]);
        assert!(!is_to_pause(Penalty::NONE, 1, 0), "nothing is owed");
    }
}
