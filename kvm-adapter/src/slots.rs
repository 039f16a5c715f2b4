//! Memory slots, and for each page whether it is dirty: what is in a ring, what may be handed out, what reset may have
//! forgotten.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;

use dirtylimit_core::{Metered, Page};

use crate::Error;

const BITS: u64 = u64::BITS as u64;

/// One slot's bitmaps, 64 pages a word, as `KVM_GET_DIRTY_LOG` lays them.
#[derive(Debug)]
pub(crate) struct Slot {
    pages: u64,
    /// Tells slots apart that have the same number one after the other.
    birth: u64,
    /// Metered, and in a ring until it is published.
    logged: Box<[u64]>,
    /// Published: logged, collected, and protected again.
    dirty: Box<[u64]>,
    /// Collected, but the reset may have left it unprotected: dirty in every take, until a clean reset. Few.
    suspect: BTreeSet<u64>,
}

impl Slot {
    /// All clean. A large one takes a while: not to be made under the VM's lock, nor dropped.
    pub(crate) fn new(slot: u32, pages: u64) -> Result<Self, Error> {
        // KVM's own bound (KVM_MEM_MAX_NR_PAGES).
        let words = match usize::try_from(pages.div_ceil(BITS)) {
            Ok(words) if (1..1 << 31).contains(&pages) => words,
            _ => return Err(Error::SlotSize { slot, pages }),
        };
        let [logged, dirty] = [(); 2].map(|()| vec![0; words].into());
        Ok(Self { pages, birth: 0, logged, dirty, suspect: BTreeSet::new() })
    }

    fn found(&self, slot: u32) -> Found {
        Found { slot, birth: self.birth, pages: self.pages, words: self.dirty.len() }
    }

    /// The words of the page numbers from `first` on, as far as there are both.
    fn words(&self, first: usize, count: usize) -> Range<usize> {
        let end = first.saturating_add(count).min(self.dirty.len());
        first.min(end)..end
    }
}

/// A slot between two looks at it: which, and that it is still the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) slot: u32,
    birth: u64,
    pub(crate) pages: u64,
    /// Words of its bitmaps.
    pub(crate) words: usize,
}

/// Sets or clears the bit; whether it was set.
fn put(words: &mut [u64], bit: u64, value: bool) -> bool {
    let Some(word) = usize::try_from(bit / BITS).ok().and_then(|i| words.get_mut(i)) else { return false };
    let (mask, old) = (1 << (bit % BITS), *word);
    *word = if value { old | mask } else { old & !mask };
    old & mask != 0
}

/// The slots of a VM. Entries that name another, or a page beyond a slot's end, are counted and dropped (KVM.md, rule 4).
#[derive(Debug, Default)]
pub(crate) struct Slots {
    /// Looked up for every entry, and few: faster than by a hash.
    slots: BTreeMap<u32, Slot>,
    births: u64,
    removed: HashSet<u32>,
    pub(crate) dropped: u64,
    /// Those among them that the VMM has not been told of: not left over from a slot that it removed.
    unknown: Option<Unknown>,
    /// Pieces that were taken.
    #[cfg(test)]
    pub(crate) pieces: u64,
}

/// Pages of slots that were never added, or that lie beyond what was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Unknown {
    pub(crate) pages: u64,
    /// The slot of the first of them.
    pub(crate) slot: u32,
}

impl Slots {
    /// Again as large as it is already: it stays as it is.
    pub(crate) fn add(&mut self, number: u32, slot: Slot) -> Result<(), Error> {
        match self.slots.get(&number) {
            Some(known) if known.pages == slot.pages => return Ok(()),
            Some(known) => return Err(Error::SlotExists { slot: number, pages: known.pages }),
            None => {}
        }
        self.births += 1;
        self.slots.insert(number, Slot { birth: self.births, ..slot });
        self.removed.remove(&number);
        Ok(())
    }

    /// What is returned is to be dropped without the lock.
    pub(crate) fn remove(&mut self, slot: u32) -> Option<Slot> {
        let gone = self.slots.remove(&slot)?;
        self.removed.insert(slot);
        Some(gone)
    }

    /// Whether there was such a slot, and is none now.
    pub(crate) fn was_removed(&self, slot: u32) -> bool {
        self.removed.contains(&slot)
    }

    pub(crate) fn find(&self, slot: u32) -> Result<Found, Error> {
        self.slots.get(&slot).map(|known| known.found(slot)).ok_or(Error::NoSlot(slot))
    }

    pub(crate) fn all(&self) -> Vec<Found> {
        self.slots.iter().map(|(number, slot)| slot.found(*number)).collect()
    }

    fn again(&mut self, found: Found) -> Result<&mut Slot, Error> {
        let slot = self.slots.get_mut(&found.slot).filter(|slot| slot.birth == found.birth);
        slot.ok_or(Error::NoSlot(found.slot))
    }

    fn of(&mut self, page: Page) -> Option<&mut Slot> {
        self.slots.get_mut(&page.slot).filter(|slot| page.offset < slot.pages)
    }

    /// Notes that a page was metered: what that makes of it.
    pub(crate) fn meter(&mut self, page: Page) -> Metered {
        match self.of(page).map(|slot| put(&mut slot.logged, page.offset, true)) {
            Some(false) => Metered::New,
            Some(true) => Metered::Again,
            None => Metered::Nowhere,
        }
    }

    /// Makes a collected page known as dirty, after its reset; a `suspect` one for good, or until it comes by again.
    /// Whether it was dirty already, so that it is to be sent once less than metered.
    pub(crate) fn publish(&mut self, page: Page, suspect: bool) -> bool {
        let Some(slot) = self.of(page) else {
            self.dropped += 1;
            // A guest may write to a slot until KVM has deleted it.
            if !self.removed.contains(&page.slot) {
                self.drop_beyond(page.slot, 1);
            }
            return false;
        };
        if suspect {
            slot.suspect.insert(page.offset);
        } else {
            slot.suspect.remove(&page.offset);
        }
        let was_dirty = put(&mut slot.dirty, page.offset, true);
        put(&mut slot.logged, page.offset, false) && was_dirty
    }

    /// A slot and `count` of its words from `first` on, with the suspect pages among them dirty.
    fn soiled(&mut self, found: Found, first: usize, count: usize) -> Result<(&mut Slot, Range<usize>), Error> {
        let slot = self.again(found)?;
        let words = slot.words(first, count);
        for page in slot.suspect.range(words.start as u64 * BITS..words.end as u64 * BITS) {
            put(&mut slot.dirty, *page, true);
        }
        Ok((slot, words))
    }

    /// Ors the published pages of a slot into `taken`, from word `first` on; from now on they count as clean, but for the
    /// suspect ones. How many they are.
    pub(crate) fn take(&mut self, found: Found, first: usize, taken: &mut [u64]) -> Result<u64, Error> {
        #[cfg(test)]
        {
            self.pieces += 1;
        }
        let (slot, words) = self.soiled(found, first, taken.len())?;
        let mut pages = 0;
        for (dirty, taken) in slot.dirty[words].iter_mut().zip(taken) {
            // Memory that was never written is not touched.
            if *dirty != 0 {
                pages += u64::from(dirty.count_ones());
                *taken |= std::mem::take(dirty);
            }
        }
        Ok(pages)
    }

    /// Ors the pages of a slot into `seen`, from word `first` on, that a take finds once all rings were collected.
    pub(crate) fn peek(&mut self, found: Found, first: usize, seen: &mut [u64]) -> Result<(), Error> {
        let (slot, words) = self.soiled(found, first, seen.len())?;
        let log = slot.logged[words.clone()].iter().zip(&slot.dirty[words]);
        seen.iter_mut().zip(log).for_each(|(seen, (logged, dirty))| *seen |= logged | dirty);
        Ok(())
    }

    /// Makes pages dirty whose bits are set in `words`, from word `first` on.
    pub(crate) fn put_back(&mut self, found: Found, first: usize, words: &[u64]) -> Result<(), Error> {
        let slot = self.again(found)?;
        let range = slot.words(first, words.len());
        slot.dirty[range]
            .iter_mut()
            .zip(words)
            .filter(|(_, word)| **word != 0)
            .for_each(|(dirty, word)| *dirty |= word);
        Ok(())
    }

    /// Makes a range of pages dirty, all of which are the slot's.
    pub(crate) fn mark(&mut self, found: Found, pages: Range<u64>) -> Result<(), Error> {
        let slot = self.again(found)?;
        pages.for_each(|page| _ = put(&mut slot.dirty, page, true));
        Ok(())
    }

    /// Makes pages dirty that may be: all of the words from `first` on.
    pub(crate) fn soil(&mut self, found: Found, first: usize, count: usize) -> Result<(), Error> {
        let slot = self.again(found)?;
        let (words, pages) = (slot.words(first, count), slot.pages);
        let is_last = words.end == slot.dirty.len();
        slot.dirty[words].fill(u64::MAX);
        if let (true, Some(last)) = (is_last && pages % BITS > 0, slot.dirty.last_mut()) {
            *last &= !(u64::MAX << (pages % BITS));
        }
        Ok(())
    }

    /// Pages that lie in no slot are dropped.
    pub(crate) fn drop_beyond(&mut self, slot: u32, pages: u64) {
        let unknown = self.unknown.get_or_insert(Unknown { pages: 0, slot });
        unknown.pages = unknown.pages.saturating_add(pages);
    }

    /// What was dropped since this was last asked and is nobody's leftover: its pages are dirty and in no log.
    pub(crate) fn take_unknown(&mut self) -> Option<Unknown> {
        self.unknown.take()
    }

    /// The pages of the slot were all protected again by other means. What is returned is to be dropped without the lock.
    pub(crate) fn trust(&mut self, slot: u32) -> Result<BTreeSet<u64>, Error> {
        self.slots.get_mut(&slot).ok_or(Error::NoSlot(slot)).map(|slot| std::mem::take(&mut slot.suspect))
    }

    /// How many pages are suspect now.
    pub(crate) fn suspects(&self) -> u64 {
        self.slots.values().map(|slot| slot.suspect.len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn page(slot: u32, offset: u64) -> Page {
        Page { slot, offset }
    }

    fn slots() -> Slots {
        let mut slots = Slots::default();
        slots.add(1, Slot::new(1, 100).unwrap()).unwrap();
        slots
    }

    fn take(slots: &mut Slots) -> Vec<u64> {
        let found = slots.find(1).unwrap();
        let mut taken = vec![0; found.words];
        slots.take(found, 0, &mut taken).unwrap();
        taken
    }

    #[test]
    fn what_is_counted_less_what_is_counted_back_is_what_is_sent() {
        let (mut slots, page) = (slots(), page(1, 99));
        assert_eq!(slots.meter(page), Metered::New);
        assert_eq!(slots.meter(page), Metered::Again, "two mappings of one page");
        assert_eq!(take(&mut slots), [0, 0], "not published");
        assert!(!slots.publish(page, false));
        assert!(!slots.publish(page, false), "the other mapping was not counted");
        assert_eq!(slots.meter(page), Metered::New, "again, after its publish");
        assert!(slots.publish(page, false), "before it was taken");
        assert_eq!(slots.meter(page), Metered::New);
        assert_eq!(take(&mut slots), [0, 1 << 35]);
        assert_eq!(slots.meter(page), Metered::Again, "still in the ring");
        assert!(!slots.publish(page, false), "after it was taken");
        assert_eq!(take(&mut slots), [0, 1 << 35]);
    }

    #[test]
    fn what_lies_in_no_slot_is_dropped_and_counted() {
        let mut slots = slots();
        for outside in [page(1, 100), page(1, u64::MAX), page(2, 0), page(0x0001_0001, 0)] {
            assert_eq!(slots.meter(outside), Metered::Nowhere);
            assert!(!slots.publish(outside, true));
        }
        assert_eq!((slots.dropped, slots.suspects()), (4, 0));
        assert_eq!(take(&mut slots), [0, 0]);
    }

    #[test]
    fn a_suspect_page_stays_dirty_until_a_clean_reset_or_trust() {
        for trust in [false, true] {
            let mut slots = slots();
            slots.publish(page(1, 3), true);
            assert_eq!([(); 3].map(|()| take(&mut slots)[0]), [8; 3]);
            if trust {
                assert_eq!(slots.trust(1).unwrap().len(), 1);
            } else {
                slots.publish(page(1, 3), false);
            }
            assert_eq!([(); 2].map(|()| take(&mut slots)[0]), [if trust { 0 } else { 8 }, 0]);
        }
    }

    #[test]
    fn bad_slots_are_refused() {
        let mut slots = slots();
        slots.add(1, Slot::new(1, 100).unwrap()).unwrap(); // as it is
        let other = slots.add(1, Slot::new(1, 5).unwrap());
        assert!(matches!(other, Err(Error::SlotExists { slot: 1, pages: 100 })));
        for pages in [0, 1 << 31, u64::MAX] {
            assert!(matches!(Slot::new(7, pages), Err(Error::SlotSize { slot: 7, .. })));
        }
        assert!(slots.remove(7).is_none());
        assert!(matches!(slots.find(7), Err(Error::NoSlot(7))));
        let found = slots.find(1).unwrap();
        slots.remove(1).unwrap();
        slots.add(1, Slot::new(1, 5).unwrap()).unwrap();
        slots.publish(page(1, 0), false);
        let mut taken = [0];
        assert!(matches!(slots.take(found, 0, &mut taken), Err(Error::NoSlot(1))), "another of the same number");
        assert!(matches!(slots.soil(found, 0, 1), Err(Error::NoSlot(1))));
        assert_eq!((taken, take(&mut slots)), ([0], vec![1]));
    }

    #[test]
    fn a_slot_is_taken_and_soiled_in_pieces() {
        let mut slots = Slots::default();
        slots.add(1, Slot::new(1, 200).unwrap()).unwrap();
        let found = slots.find(1).unwrap();
        for (offset, suspect) in [(0, false), (63, true), (64, false), (128, true), (199, false)] {
            slots.publish(page(1, offset), suspect);
        }
        let mut piece = [0];
        slots.take(found, 1, &mut piece).unwrap();
        assert_eq!(piece, [1]);
        assert_eq!(take(&mut slots), [1 | 1 << 63, 0, 1, 1 << 7]);
        assert_eq!(take(&mut slots), [1 << 63, 0, 1, 0], "the suspects again");
        slots.soil(found, 1, 1).unwrap();
        assert_eq!(take(&mut slots), [1 << 63, u64::MAX, 1, 0]);
        slots.soil(found, 0, 100).unwrap();
        assert_eq!(take(&mut slots), [u64::MAX, u64::MAX, u64::MAX, (1 << 8) - 1]);
        slots.take(found, 50, &mut piece).unwrap();
        let mut third = [0];
        slots.take(found, 2, &mut third).unwrap();
        assert_eq!(third, [1], "a suspect one, in the piece that it lies in");
    }

    #[test]
    fn a_slot_whose_last_word_is_whole_is_soiled_as_a_whole() {
        let mut slots = Slots::default();
        slots.add(1, Slot::new(1, 128).unwrap()).unwrap();
        slots.soil(slots.find(1).unwrap(), 0, 2).unwrap();
        assert_eq!(take(&mut slots), [u64::MAX; 2]);
    }
}
