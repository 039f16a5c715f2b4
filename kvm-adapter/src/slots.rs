//! Memory slots, and for each page whether it is dirty: what is in a ring, what may be handed out, what reset may have
//! forgotten.

use std::collections::{BTreeMap, HashSet};

use dirtylimit_core::Page;

use crate::Error;

const BITS: u64 = u64::BITS as u64;

/// One slot's bitmaps, 64 pages a word, as `KVM_GET_DIRTY_LOG` lays them.
#[derive(Debug)]
struct Slot {
    pages: u64,
    /// Metered, and in a ring until it is published.
    logged: Box<[u64]>,
    /// Published: logged, collected, and protected again.
    dirty: Box<[u64]>,
    /// Collected, but the reset may have left it unprotected: dirty in every take, until a clean reset.
    suspect: Box<[u64]>,
}

/// Sets or clears the bit; whether it was set.
fn put(words: &mut [u64], bit: u64, value: bool) -> bool {
    let Some(word) = usize::try_from(bit / BITS).ok().and_then(|i| words.get_mut(i)) else { return false };
    let (mask, old) = (1 << (bit % BITS), *word);
    *word = if value { old | mask } else { old & !mask };
    old & mask != 0
}

/// What a metered entry says of its page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Metered {
    /// It is to be sent once more than before.
    New,
    /// It was metered already, and not published since.
    Again,
    /// It lies in no slot.
    Nowhere,
}

/// The slots of a VM. Entries that name another, or a page beyond a slot's end, are counted and dropped (KVM.md, rule 4).
#[derive(Debug, Default)]
pub(crate) struct Slots {
    /// Looked up for every entry, and few: faster than by a hash.
    slots: BTreeMap<u32, Slot>,
    removed: HashSet<u32>,
    pub(crate) dropped: u64,
}

impl Slots {
    pub(crate) fn add(&mut self, slot: u32, pages: u64) -> Result<(), Error> {
        // KVM's own bound (KVM_MEM_MAX_NR_PAGES).
        let words = match usize::try_from(pages.div_ceil(BITS)) {
            Ok(words) if (1..1 << 31).contains(&pages) => words,
            _ => return Err(Error::SlotSize { slot, pages }),
        };
        if self.slots.contains_key(&slot) {
            return Err(Error::SlotExists(slot));
        }
        let [logged, dirty, suspect] = [(); 3].map(|()| vec![0; words].into());
        self.slots.insert(slot, Slot { pages, logged, dirty, suspect });
        self.removed.remove(&slot);
        Ok(())
    }

    pub(crate) fn remove(&mut self, slot: u32) -> Result<(), Error> {
        self.slots.remove(&slot).ok_or(Error::NoSlot(slot))?;
        self.removed.insert(slot);
        Ok(())
    }

    /// Whether there was such a slot, and is none now.
    pub(crate) fn was_removed(&self, slot: u32) -> bool {
        self.removed.contains(&slot)
    }

    pub(crate) fn knows(&self, slot: u32) -> Result<(), Error> {
        self.slots.contains_key(&slot).then_some(()).ok_or(Error::NoSlot(slot))
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
            return false;
        };
        put(&mut slot.suspect, page.offset, suspect);
        let was_dirty = put(&mut slot.dirty, page.offset, true);
        put(&mut slot.logged, page.offset, false) && was_dirty
    }

    /// Hands out the published pages of a slot; from now on they count as clean, but for the suspect ones.
    pub(crate) fn take(&mut self, slot: u32) -> Result<Vec<u64>, Error> {
        let slot = self.slots.get_mut(&slot).ok_or(Error::NoSlot(slot))?;
        Ok(slot.dirty.iter_mut().zip(&slot.suspect).map(|(dirty, suspect)| std::mem::take(dirty) | suspect).collect())
    }

    /// The pages of the slot were all protected again by other means.
    pub(crate) fn trust(&mut self, slot: u32) -> Result<(), Error> {
        self.slots.get_mut(&slot).ok_or(Error::NoSlot(slot))?.suspect.fill(0);
        Ok(())
    }

    /// How many pages are suspect now.
    pub(crate) fn suspects(&self) -> u64 {
        self.slots.values().flat_map(|slot| &slot.suspect).map(|word| u64::from(word.count_ones())).sum()
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
        slots.add(1, 100).unwrap();
        slots
    }

    #[test]
    fn what_is_counted_less_what_is_counted_back_is_what_is_sent() {
        let (mut slots, page) = (slots(), page(1, 99));
        assert_eq!(slots.meter(page), Metered::New);
        assert_eq!(slots.meter(page), Metered::Again, "two mappings of one page");
        assert_eq!(slots.take(1).unwrap(), [0, 0], "not published");
        assert!(!slots.publish(page, false));
        assert!(!slots.publish(page, false), "the other mapping was not counted");
        assert_eq!(slots.meter(page), Metered::New, "again, after its publish");
        assert!(slots.publish(page, false), "before it was taken");
        assert_eq!(slots.meter(page), Metered::New);
        assert_eq!(slots.take(1).unwrap(), [0, 1 << 35]);
        assert_eq!(slots.meter(page), Metered::Again, "still in the ring");
        assert!(!slots.publish(page, false), "after it was taken");
        assert_eq!(slots.take(1).unwrap(), [0, 1 << 35]);
    }

    #[test]
    fn what_lies_in_no_slot_is_dropped_and_counted() {
        let mut slots = slots();
        for outside in [page(1, 100), page(1, u64::MAX), page(2, 0), page(0x0001_0001, 0)] {
            assert_eq!(slots.meter(outside), Metered::Nowhere);
            assert!(!slots.publish(outside, true));
        }
        assert_eq!((slots.dropped, slots.suspects()), (4, 0));
        assert_eq!(slots.take(1).unwrap(), [0, 0]);
    }

    #[test]
    fn a_suspect_page_stays_dirty_until_a_clean_reset_or_trust() {
        for trust in [false, true] {
            let mut slots = slots();
            slots.publish(page(1, 3), true);
            assert_eq!([(); 3].map(|()| slots.take(1).unwrap()[0]), [8; 3]);
            if trust {
                slots.trust(1).unwrap();
            } else {
                slots.publish(page(1, 3), false);
            }
            assert_eq!([(); 2].map(|()| slots.take(1).unwrap()[0]), [if trust { 0 } else { 8 }, 0]);
        }
    }

    #[test]
    fn bad_slots_are_refused() {
        let mut slots = slots();
        assert!(matches!(slots.add(1, 5), Err(Error::SlotExists(1))));
        for pages in [0, 1 << 31, u64::MAX] {
            assert!(matches!(slots.add(7, pages), Err(Error::SlotSize { slot: 7, .. })));
        }
        assert!(matches!(slots.remove(7), Err(Error::NoSlot(7))));
        assert!(matches!(slots.take(7), Err(Error::NoSlot(7))));
        slots.remove(1).unwrap();
        slots.add(1, 5).unwrap();
    }
}
