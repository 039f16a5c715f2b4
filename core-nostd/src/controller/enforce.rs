//! Whether a limit is enforced, and if not, why: one `Watch` for each vCPU, fed by the ticks.

use core::fmt;

use crate::rate::{Nanos, PageRate, SECOND};

/// Why a limit is not, or cannot be, held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Unenforced {
    /// No tick has come for `VmCell::LEASE`, so that penalties have lapsed.
    Lapsed,
    /// The vCPU has dirtied more than its limit for seconds, and its thread has not come to be charged: nothing brings it out of
    /// the guest (its ring never fills, because it is emptied faster or larger than what the guest writes to), or the VMM
    /// does not let it pay.
    NotAccepted,
    /// A pause longer than the longest would be needed: `Status::needs_pause`.
    NeedsPause,
    /// The vCPU has dirtied more than its limit for seconds, although its thread comes to be charged.
    Exceeded,
    /// The guest writes faster than its limit, but to pages that nobody takes: a page that is dirty and not taken is not
    /// counted again.
    LogNotTaken,
    /// It is held, but by pauses longer than the longest: the CPU hands pages over in lumps, and no timer ends them: there is
    /// none, none is wanted, or too many come before the guest is entered.
    Lumps,
}

impl Unenforced {
    /// A name for machines: lower case, words joined by `-`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lapsed => "lapsed",
            Self::NotAccepted => "not-accepted",
            Self::NeedsPause => "needs-pause",
            Self::Exceeded => "exceeded",
            Self::LogNotTaken => "log-not-taken",
            Self::Lumps => "lumps",
        }
    }
}

impl fmt::Display for Unenforced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lapsed => "no tick comes, so that limits have lapsed",
            Self::NotAccepted => {
                "its thread does not pay: nothing ends its run (a smaller ring or a kick would), or before_run is not called"
            }
            Self::NeedsPause => "it would need a longer pause than the longest that is allowed",
            Self::Exceeded => "the vCPU exceeds it all the same",
            Self::Lumps => {
                "it is held by longer pauses than the longest: pages come in lumps that no timer ends"
            }
            Self::LogNotTaken => "nobody takes the dirty log, and a page that is not taken is not counted again",
        })
    }
}

/// What a vCPU has counted, and how often its thread was charged: free-running, they wrap.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Seen {
    pub(crate) net: u32,
    pub(crate) gross: u32,
    pub(crate) charges: u32,
    pub(crate) overlong: u32,
}

/// What else a verdict rests on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    /// The limit since the last look; `None`: there was none.
    pub(crate) limit: Option<PageRate>,
    /// A longer pause than the longest is needed.
    pub(crate) needs_pause: bool,
    /// Somebody took the dirty log within the last minute.
    pub(crate) taken: bool,
}

/// Compares what a vCPU dirtied with what its limit allowed, a window at a time. Two windows in a row make a verdict: in
/// one there may be what was dirtied before the vCPU could notice its limit, up to a whole ring.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Watch {
    seen: Seen,
    /// So far in this window, in µs.
    elapsed: u32,
    /// What the limit allowed in it, in 1/1024 pages/s × µs.
    allowed: u64,
    /// What the window before this one showed.
    last: Option<Unenforced>,
    verdict: Option<Unenforced>,
    told: Option<Unenforced>,
}

/// The least that a window is long, in µs.
const WINDOW: u32 = 1_000_000;
/// This number of pages beyond a limit and a quarter of it is no fault in a window: a lump, a page of KVM's own.
const SLACK: u64 = 16;
/// Nor is this number of entries beyond twice a limit: KVM pushes some of its own at each entry to the guest.
const GROSS_SLACK: u64 = 1024;

impl Watch {
    pub(crate) fn starting_at(seen: Seen) -> Self {
        Self { seen, ..Self::default() }
    }

    /// Looks at what the vCPU has counted, `elapsed` after the last look.
    pub(crate) fn look(&mut self, elapsed: Nanos, seen: Seen, facts: Facts) {
        let Some(limit) = facts.limit else {
            *self = Self { told: self.told, ..Self::starting_at(seen) };
            return;
        };
        let micros = u32::try_from(elapsed / 1000).unwrap_or(u32::MAX);
        self.elapsed = self.elapsed.saturating_add(micros);
        self.allowed = self.allowed.saturating_add(limit.raw().saturating_mul(micros.into()));
        if self.elapsed < WINDOW {
            return;
        }
        let shown = self.shown(seen, facts);
        // The later of two is the better informed.
        self.verdict = self.last.and(shown);
        *self = Self { seen, elapsed: 0, allowed: 0, last: shown, ..*self };
    }

    /// What this window shows.
    fn shown(&self, seen: Seen, facts: Facts) -> Option<Unenforced> {
        let allowed = self.allowed / (1024 * (SECOND / 1000));
        let [net, gross] =
            [seen.net.wrapping_sub(self.seen.net), seen.gross.wrapping_sub(self.seen.gross)].map(u64::from);
        let exceeded = net > allowed.saturating_add(allowed / 4).saturating_add(SLACK);
        let rewrites = gross > allowed.saturating_mul(2).saturating_add(GROSS_SLACK);
        match () {
            () if exceeded && seen.charges == self.seen.charges => Some(Unenforced::NotAccepted),
            () if facts.needs_pause => Some(Unenforced::NeedsPause),
            () if exceeded => Some(Unenforced::Exceeded),
            () if rewrites && !facts.taken => Some(Unenforced::LogNotTaken),
            () if seen.overlong != self.seen.overlong => Some(Unenforced::Lumps),
            () => None,
        }
    }

    /// What the last two windows show.
    pub(crate) fn verdict(&self) -> Option<Unenforced> {
        self.verdict
    }

    /// The verdict, where it is another than when this was last called.
    pub(crate) fn news(&mut self) -> Option<Option<Unenforced>> {
        let is_news = self.told != self.verdict;
        self.told = self.verdict;
        is_news.then_some(self.verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Nanos = SECOND / 20;

    struct Vcpu {
        watch: Watch,
        seen: Seen,
        facts: Facts,
    }

    impl Vcpu {
        /// Limited to 1,000 pages a second, with a log that is taken.
        fn new() -> Self {
            let seen = Seen { net: u32::MAX - 5000, gross: u32::MAX - 9000, charges: u32::MAX - 3, overlong: u32::MAX };
            let limit = Some(PageRate::from_pages_per_sec(1000));
            Self { watch: Watch::starting_at(seen), seen, facts: Facts { limit, needs_pause: false, taken: true } }
        }

        /// Goes on for `seconds` at these rates, a second; what is said at the end.
        fn run(&mut self, seconds: u32, net: u32, gross: u32, charges: u32) -> Option<Unenforced> {
            for _ in 0..seconds * 20 {
                self.seen.net = self.seen.net.wrapping_add(net / 20);
                self.seen.gross = self.seen.gross.wrapping_add(gross / 20);
                self.seen.charges = self.seen.charges.wrapping_add(charges / 20);
                self.watch.look(TICK, self.seen, self.facts);
            }
            self.watch.verdict()
        }
    }

    #[test]
    fn a_limit_that_is_held_is() {
        let mut vcpu = Vcpu::new();
        for (net, gross) in [(1000, 1000), (1240, 1240), (0, 0), (1000, 60_000), (0, 60_000)] {
            assert_eq!(vcpu.run(4, net, gross, 400), None, "{net}, {gross}");
        }
        assert_eq!(vcpu.run(4, 1000, 1000, 0), None, "who keeps below its limit owes nothing");
        let mut vcpu = Vcpu::new();
        let windows = [1000, 400_000, 1000].map(|pages| vcpu.run(1, pages, pages, 20));
        assert_eq!(windows, [None; 3], "what was counted before the first is not in it");
    }

    #[test]
    fn a_vcpu_that_nothing_brings_out_of_the_guest_is_told_in_the_third_second() {
        let mut vcpu = Vcpu::new();
        assert_eq!(vcpu.run(1, 400_000, 400_000, 0), None, "a ring of pages from before the limit");
        assert_eq!(vcpu.run(1, 400_000, 400_000, 0), Some(Unenforced::NotAccepted));
        assert_eq!(vcpu.run(2, 400_000, 400_000, 20), Some(Unenforced::Exceeded));
        assert_eq!(vcpu.run(1, 1000, 1000, 20), None);
        vcpu.run(1, 400_000, 400_000, 20);
        assert_eq!(vcpu.run(1, 1000, 1000, 20), None, "one window alone");
    }

    #[test]
    fn a_pause_that_would_be_too_long_is_told_while_it_is_needed() {
        let mut vcpu = Vcpu::new();
        vcpu.facts.needs_pause = true;
        assert_eq!(vcpu.run(2, 4000, 4000, 100), Some(Unenforced::NeedsPause));
        assert_eq!(vcpu.run(2, 4000, 4000, 0), Some(Unenforced::NotAccepted), "nobody pauses at all");
        vcpu.facts.needs_pause = false;
        assert_eq!(vcpu.run(1, 1000, 1000, 100), None);
    }

    #[test]
    fn a_log_that_nobody_takes_is_told_where_the_guest_rewrites_what_is_dirty() {
        let mut vcpu = Vcpu::new();
        vcpu.facts.taken = false;
        assert_eq!(vcpu.run(4, 0, 3000, 100), None, "entries of KVM's own");
        assert_eq!(vcpu.run(2, 500, 100_000, 100), Some(Unenforced::LogNotTaken));
        vcpu.facts.taken = true;
        assert_eq!(vcpu.run(1, 500, 100_000, 100), None);
    }

    #[test]
    fn a_limit_that_is_held_by_too_long_pauses_is_told_as_such() {
        let mut vcpu = Vcpu::new();
        for expected in [None, Some(Unenforced::Lumps)] {
            vcpu.seen.overlong = vcpu.seen.overlong.wrapping_add(1);
            assert_eq!(vcpu.run(1, 1000, 1000, 20), expected);
        }
        assert_eq!(vcpu.run(2, 1000, 1000, 20), None);
    }

    #[test]
    fn without_a_limit_nothing_is_told_and_a_new_one_is_judged_anew() {
        let mut vcpu = Vcpu::new();
        vcpu.run(2, 400_000, 400_000, 0);
        assert_eq!(vcpu.watch.news(), Some(Some(Unenforced::NotAccepted)));
        assert_eq!(vcpu.watch.news(), None);
        let limit = vcpu.facts.limit.take();
        assert_eq!(vcpu.run(1, 400_000, 400_000, 0), None);
        assert_eq!(vcpu.watch.news(), Some(None));
        vcpu.facts.limit = limit;
        assert_eq!(vcpu.run(1, 400_000, 400_000, 0), None);
        assert_eq!(vcpu.run(1, 400_000, 400_000, 0), Some(Unenforced::NotAccepted));
    }

    #[test]
    fn a_quarter_more_and_16_pages_are_no_fault_nor_twice_as_many_entries_and_1024() {
        let (exceeded, rewrites) = (Some(Unenforced::Exceeded), Some(Unenforced::LogNotTaken));
        for (net, gross, expected) in
            [(1266, 1266, None), (1267, 1267, exceeded), (1000, 3024, None), (1000, 3025, rewrites)]
        {
            let mut vcpu = Vcpu::new();
            vcpu.facts.taken = false;
            for _ in 0..2 {
                let Seen { net: before, gross: entries, charges, .. } = vcpu.seen;
                (vcpu.seen.net, vcpu.seen.gross) = (before.wrapping_add(net), entries.wrapping_add(gross));
                vcpu.seen.charges = charges.wrapping_add(1);
                vcpu.watch.look(SECOND, vcpu.seen, vcpu.facts);
            }
            assert_eq!(vcpu.watch.verdict(), expected, "{net}, {gross}");
        }
    }

    #[test]
    fn windows_follow_limits_that_change_and_ticks_that_are_late() {
        // A budget's share changes at each tick: what counts is what was allowed in all.
        let mut vcpu = Vcpu::new();
        for tick in 0..80 {
            let rate = if tick % 2 == 0 { 2000 } else { 20 };
            vcpu.facts.limit = Some(PageRate::from_pages_per_sec(rate));
            vcpu.seen.net = vcpu.seen.net.wrapping_add(50);
            vcpu.watch.look(TICK, vcpu.seen, vcpu.facts);
            assert_eq!(vcpu.watch.verdict(), None);
        }
        for elapsed in [3 * SECOND, Nanos::MAX, 0, 1, SECOND] {
            vcpu.watch.look(elapsed, vcpu.seen, vcpu.facts);
            assert_eq!(vcpu.watch.verdict(), None);
        }
        vcpu.facts.limit = Some(PageRate::MAX);
        vcpu.watch.look(Nanos::MAX, Seen::default(), vcpu.facts);
        assert_eq!(vcpu.watch.verdict(), None);
    }

    #[test]
    fn names_and_texts_tell_reasons_apart() {
        use Unenforced::{Exceeded, Lapsed, LogNotTaken, Lumps, NeedsPause, NotAccepted};
        let all = [Lapsed, NotAccepted, NeedsPause, Exceeded, LogNotTaken, Lumps];
        let distinct = |of: fn(&Unenforced) -> std::string::String| {
            all.iter().map(of).collect::<std::collections::BTreeSet<_>>().len()
        };
        assert_eq!((distinct(|why| why.name().into()), distinct(|why| std::format!("{why}"))), (6, 6));
    }
}
