//! The consumer's side of a vCPU's dirty ring: *meter* entries by peeking at them, *collect* the oldest, *reclaim* what
//! reset gave back.
//!
//! ```text
//!        reset          collected              metered        (the kernel's dirty_index)
//!  free    │ awaiting reset │ held back, unpublished │ not yet seen │  free
//!          └──────────────── occupied ───────────────┘
//! ```
//! An entry is metered where it lies (no ioctl, no write fault for the guest) and leaves only through reset, oldest
//! first. The vCPU exits when `dirty_index − reset` reaches the soft limit, so holding entries back decides how many
//! more pages it may dirty: see [`Ring::to_collect`]. A collected page is still writable: it may be published only after
//! the reset that re-protects it (`kvm_dirty_ring_reset`, virt/kvm/dirty_ring.c).

use core::mem::take;

use super::soft_limit::SoftLimit;
pub use crate::sync::RESERVED;
use crate::sync::{Ordering, Word, const_fn};

/// A page of guest memory, as the ring names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Page {
    /// `address space << 16 | slot`.
    pub slot: u32,
    /// In host pages from the slot's start. Whoever indexes with it checks it against the slot first.
    pub offset: u64,
}

/// One entry, laid out as the kernel's `struct kvm_dirty_gfn`.
#[derive(Debug)]
#[repr(C, align(8))]
pub struct Entry {
    flags: Word,
    slot: Word,
    /// The offset's two words: 32-bit machines have no lock-free 64-bit atomic.
    first: Word,
    second: Word,
}

const EMPTY: u32 = 0;
const DIRTY: u32 = 1;
const COLLECTED: u32 = 2;

impl Entry {
    const_fn! {
        /// An empty entry, for rings that are not the kernel's.
        pub fn new() -> Self {
            Self { flags: Word::new(EMPTY), slot: Word::new(0), first: Word::new(0), second: Word::new(0) }
        }
    }

    /// The low and the high word of the offset.
    #[inline]
    fn offset(&self) -> (&Word, &Word) {
        if cfg!(target_endian = "little") { (&self.first, &self.second) } else { (&self.second, &self.first) }
    }

    #[inline]
    fn page(&self) -> Page {
        let (low, high) = self.offset();
        // Relaxed: ordered by the acquire in `peek`; the kernel leaves a dirty entry alone until it is reset.
        let load = |word: &Word| word.load(Ordering::Relaxed);
        Page { slot: load(&self.slot), offset: u64::from(load(high)) << 32 | u64::from(load(low)) }
    }

    /// The page, where the entry is dirty.
    #[inline]
    fn peek(&self) -> Option<Page> {
        // Acquire: pairs with the kernel's release in `kvm_dirty_gfn_set_dirtied` (here: `Entry::push`), so that slot
        // and offset are those of this entry.
        (self.flags.load(Ordering::Acquire) == DIRTY).then(|| self.page())
    }

    #[inline]
    fn collect(&self) {
        // Release: pairs with the kernel's acquire in `kvm_dirty_gfn_harvested` (here: `Entry::reset`), so that our
        // reads of the page come before the kernel writes another one.
        self.flags.store(COLLECTED, Ordering::Release);
    }

    /// Whether the kernel has never written it. (An entry of page 0 of slot 0 that was reset looks so, too.)
    fn is_unused(&self) -> bool {
        // Relaxed: nothing is read for it but the entry's own words, which are zero.
        self.flags.load(Ordering::Relaxed) == EMPTY && self.page() == Page { slot: 0, offset: 0 }
    }

    /// Whether the kernel has reset the entry since it was collected.
    #[inline]
    fn is_given_back(&self) -> bool {
        // Relaxed: the kernel empties an entry before it re-protects the page, so nothing may be published for this; it
        // only makes room. Dirty counts too: reset, then used again.
        self.flags.load(Ordering::Relaxed) != COLLECTED
    }

    /// The *kernel's* side, for simulations and models: logs `page`.
    pub fn push(&self, page: Page) {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
        let (low, high) = (page.offset as u32, (page.offset >> 32) as u32);
        // Relaxed: ordered by the release below.
        let store = |word: &Word, value| word.store(value, Ordering::Relaxed);
        store(&self.slot, page.slot);
        store(self.offset().0, low);
        store(self.offset().1, high);
        // Release: pairs with the acquire in `Entry::peek`.
        self.flags.store(DIRTY, Ordering::Release);
    }

    /// The *kernel's* side, for simulations and models: empties a collected entry and returns its page, to re-protect
    /// before the reset returns.
    pub fn reset(&self) -> Option<Page> {
        // Acquire: pairs with the release in `Entry::collect`.
        if self.flags.load(Ordering::Acquire) != COLLECTED {
            return None;
        }
        let page = self.page();
        // Relaxed: publishes nothing, see `Entry::is_given_back`. (The kernel's own is a release.)
        self.flags.store(EMPTY, Ordering::Relaxed);
        Some(page)
    }
}

impl Default for Entry {
    fn default() -> Self {
        Self::new()
    }
}

/// Why a ring cannot be consumed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadRingSize {
    /// The number of entries; it must be a power of two above [`RESERVED`], at most 2³¹.
    pub entries: usize,
}

impl core::fmt::Display for BadRingSize {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "a dirty ring of {} entries: the number must be a power of two above {RESERVED}", self.entries)
    }
}

impl core::error::Error for BadRingSize {}

/// The most that a CPU's page modification log adds to them: Intel's PML.
pub const PML: u32 = 512;

/// The consumer of one ring, wherever its entries live: a mapping, a static, a vector.
///
/// One owner at a time: every method that moves takes `&mut self`. No method waits; each loop runs over the ring at most
/// once.
#[derive(Debug)]
pub struct Ring<E> {
    entries: E,
    size: u32,
    /// Entries from here to `collected` are marked and wait for reset. Counters run freely and wrap.
    reset: u32,
    /// Entries from here to `metered` are held back.
    collected: u32,
    /// The first entry not yet seen.
    metered: u32,
    soft: SoftLimit,
    /// `reset` when the slice was freed in which the vCPU runs.
    freed: u32,
    /// Entries of the kernel's own that precede the last of the guest's in a slice, as in the last one.
    own: u32,
    run: Run,
}

/// What was metered since the last full exit.
#[derive(Clone, Copy, Default, Debug)]
struct Run {
    /// The occupancy once the last of the guest's entries was in, if there was one.
    level: Option<u32>,
    /// The kernel's own entries: all of them, and those before that one.
    own: u32,
    own_before: u32,
}

/// The most entries of the kernel's own that a slice has room for; a larger slice has room for as many as the guest's.
const OWN: u32 = 16;

impl<E: AsRef<[Entry]>> Ring<E> {
    /// The consumer of a ring that the kernel has not written to yet.
    ///
    /// # Errors
    /// Where the number of entries is not a power of two above [`RESERVED`].
    pub fn new(entries: E) -> Result<Self, BadRingSize> {
        Self::starting_at(entries, 0)
    }

    /// As [`Ring::new`], with the counters at `start` (modulo the size, the kernel's own).
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn starting_at(entries: E, start: u32) -> Result<Self, BadRingSize> {
        let count = entries.as_ref().len();
        match u32::try_from(count) {
            Ok(size) if size.is_power_of_two() && size > RESERVED => Ok(Self {
                entries,
                size,
                reset: start,
                collected: start,
                metered: start,
                soft: SoftLimit::new(size - RESERVED),
                freed: start,
                own: 0,
                run: Run::default(),
            }),
            _ => Err(BadRingSize { entries: count }),
        }
    }

    /// The entries `from..from + count`, in order, as the two runs that a ring lays them in.
    ///
    /// Two slices, not one chained iterator: a loop over them costs a third.
    fn span(&self, from: u32, count: u32) -> [&[Entry]; 2] {
        let (entries, count) = (self.entries.as_ref(), count as usize);
        let (early, late) = entries.split_at_checked((from & (self.size - 1)) as usize).unwrap_or((entries, &[]));
        let late = late.get(..count).unwrap_or(late);
        [late, early.get(..count - late.len()).unwrap_or(early)]
    }

    /// Peeks at every entry logged since the last call and passes its page to `each`; returns how many. Marks nothing. Counts
    /// all of them as the guest's.
    pub fn meter(&mut self, mut each: impl FnMut(Page)) -> u32 {
        self.meter_guest(|page| {
            each(page);
            true
        })
    }

    /// As [`Ring::meter`], but `each` says whether the entry is the guest's: those that the kernel pushed itself (see
    /// `OwnPages`) use up no slice.
    pub(crate) fn meter_guest(&mut self, mut each: impl FnMut(Page) -> bool) -> u32 {
        let occupied = self.occupied();
        let room = self.size.saturating_sub(occupied);
        let (mut seen, mut last, mut own, mut own_before) = (0, 0, 0, 0);
        'runs: for run in self.span(self.metered, room) {
            for entry in run {
                let Some(page) = entry.peek() else { break 'runs };
                seen += 1;
                if each(page) {
                    (last, own_before) = (seen, own);
                } else {
                    own += 1;
                }
            }
        }
        if last > 0 {
            self.run.level = Some(occupied + last);
            self.run.own_before = self.run.own.saturating_add(own_before);
        }
        self.run.own = self.run.own.saturating_add(own);
        self.metered = self.metered.wrapping_add(seen);
        seen
    }

    /// Marks up to `count` of the oldest held-back entries for reset and passes their pages to `each`, which must not
    /// publish them before that reset; returns how many.
    pub fn collect(&mut self, count: u32, mut each: impl FnMut(Page)) -> u32 {
        let count = count.min(self.held_back());
        for entry in self.span(self.collected, count).into_iter().flatten() {
            each(entry.page());
            entry.collect();
        }
        self.collected = self.collected.wrapping_add(count);
        count
    }

    /// Whether no entry was reset yet, as far as they show: those that the kernel has written are dirty, from the first on.
    /// One that was consumed before goes on elsewhere, and cannot be followed.
    pub fn is_new(&self) -> bool {
        let entries = self.entries.as_ref().iter();
        entries.skip_while(|entry| entry.peek().is_some()).all(Entry::is_unused)
    }

    /// Passes the pages of the held-back entries to `each`, oldest first.
    pub fn for_each_held_back(&self, mut each: impl FnMut(Page)) {
        self.span(self.collected, self.held_back()).into_iter().flatten().for_each(|entry| each(entry.page()));
    }

    /// Takes note of the entries that reset has given back; returns how many. The rest still wait for one.
    ///
    /// It only makes room: a page may be published when a reset *begun after* it was collected has *returned*. While
    /// another thread's reset runs, entries are given back whose pages are not yet re-protected.
    pub fn reclaim(&mut self) -> u32 {
        let waiting = self.span(self.reset, self.awaiting_reset()).into_iter().flatten();
        let given = waiting.take_while(|entry| entry.is_given_back()).count();
        #[expect(clippy::cast_possible_truncation, reason = "at most awaiting_reset()")]
        let given = given as u32;
        self.reset = self.reset.wrapping_add(given);
        given
    }

    /// Entries in the ring as far as metered; what counts against the soft limit.
    pub fn occupied(&self) -> u32 {
        self.metered.wrapping_sub(self.reset)
    }

    /// Metered entries that were not collected: their pages are dirty, unprotected and unpublished.
    pub fn held_back(&self) -> u32 {
        self.metered.wrapping_sub(self.collected)
    }

    /// Collected entries that reset has not given back.
    pub fn awaiting_reset(&self) -> u32 {
        self.collected.wrapping_sub(self.reset)
    }

    /// How many entries it takes until the vCPU exits, once all that was collected is reset.
    pub fn room(&self) -> u32 {
        self.soft.get().saturating_sub(self.held_back())
    }

    /// The number of entries.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// The occupancy at which the vCPU exits, as far as known: the size less [`RESERVED`] until [`Ring::full_exit`].
    pub fn soft_limit(&self) -> u32 {
        self.soft.get()
    }

    /// The vCPU may enter: its slice is free.
    pub(crate) fn freed(&mut self) {
        self.freed = self.reset;
    }

    /// As [`Ring::full_exit`], of an exit that KVM has just made because the ring was full.
    pub(crate) fn full_exit_of_kvm(&mut self) {
        if self.freed == self.reset && self.occupied() > 0 {
            // Without a page of the guest's it was full when the vCPU entered, or made so by the first entries of the kernel's.
            let barren = self.run.level.is_none().then_some(self.run.own);
            self.soft.proved(self.occupied(), barren);
        }
        self.full_exit();
    }

    /// After a full exit, everything metered: learns the soft limit, and how many entries of its own the kernel pushes in a
    /// slice. Where it brought no entry of the guest's, the next slice has more room. A call too many does no harm.
    pub fn full_exit(&mut self) {
        let run = take(&mut self.run);
        let occupied = self.occupied();
        match run.level {
            Some(level) => {
                self.own = run.own_before;
                self.soft.reached(level);
            }
            // It had no room to begin with: nobody has freed its slice yet.
            None if occupied.saturating_sub(run.own) >= self.soft.get() => {}
            // No soft limit is 0: the ring is wedged.
            None if occupied == 0 => {}
            None if occupied >= self.soft.get() && self.own < OWN => self.own = run.own.max(self.own + 1),
            None => self.soft.barren(occupied),
        }
    }

    /// Entries of the kernel's own that a slice has room for.
    fn own(&self, slice: u32) -> u32 {
        self.own.min(slice.max(OWN))
    }

    /// Whether the CPU was seen to hand pages over in lumps, so that the ring ends a slice only when it does.
    pub fn has_lumps(&self) -> bool {
        self.soft.has_lumps()
    }

    /// Whether the ring, once all that was collected is reset, ends a slice of `slice` pages, give or take a quarter: not
    /// where it has more room, nor where pages come in lumps of half a slice or more.
    pub(crate) fn ends(&self, slice: u32) -> bool {
        let most = slice.saturating_add(slice / 4).saturating_add(self.own(slice));
        self.room() <= most && slice / 2 >= self.soft.lump()
    }

    /// How many of the held-back entries to collect so that, after the reset, the vCPU exits again when it has dirtied
    /// `slice` more pages (at least one; all of the ring for more than that). Where pages come in lumps it is exact to a lump.
    pub fn to_collect(&self, slice: u32) -> u32 {
        let (held, soft) = (self.held_back(), self.soft.get());
        let room = slice.max(1).saturating_add(self.own(slice)).min(soft);
        (room + held).saturating_sub(soft).min(held)
    }
}

#[cfg(test)]
mod tests;
