//! The dirty log of a VM's slots, in the place of KVM_GET_DIRTY_LOG: what a migration's thread calls.
//!
//! Each call does its work in pieces of bounded length, each under a lock of its own, so that a vCPU's thread with a full
//! ring waits for one piece at most, however large the slot and however many the vCPUs.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::Range;

use crate::error::{Error, system};
use crate::events;
use crate::harvest::Row;
use crate::limit::DirtyLimit;
use crate::shared::VmLimiter;
use crate::slots::{Found, Slot, Unknown};
use crate::sys;

/// Words of a slot's bitmap that are taken under the lock before others may have it: the pages of 1 GiB.
pub(crate) const PIECE: usize = 4096;

/// One round of the dirty log: everything that it found is published, and is handed over slot by slot.
///
/// Its type says what it found. [`DirtyLimit::round`], over a running VM, may leave the newest pages of limited vCPUs for
/// later; [`DirtyLimit::last_round`], with the vCPUs stopped, leaves nothing. So whatever ends a migration takes a
/// `Round<Stopped>`, and cannot be handed the other.
#[derive(Debug)]
#[must_use = "its pages are to be merged, and sent"]
pub struct Round<'a, S> {
    limit: &'a DirtyLimit,
    /// Entries that it collected, reset and published.
    published: u64,
    held_back: u64,
    state: PhantomData<S>,
}

/// The vCPUs run: see [`Round`].
#[derive(Debug)]
pub enum Running {}

/// No vCPU is in KVM_RUN, and none enters until the log was merged: see [`Round`].
#[derive(Debug)]
pub enum Stopped {}

impl<S> Round<'_, S> {
    /// Ring entries that the round itself collected, reset and published; what vCPUs published since the last merge comes on
    /// top.
    pub fn published(&self) -> u64 {
        self.published
    }

    /// Ors the dirty pages of a slot into `bitmap`, in the form of `KVM_GET_DIRTY_LOG` (a bit a page, 64 a word), and forgets
    /// them; returns how many there were. Suspect pages (see [`DirtyLimit::trust_slot`]) are in every one. Allocates nothing,
    /// and holds the VM's lock for a GiB of guest memory at a time.
    ///
    /// # Errors
    /// [`Error::NoSlot`]; [`Error::BitmapSize`] where `bitmap` has fewer words than the slot: then nothing is forgotten.
    pub fn merge(&self, slot: u32, bitmap: &mut [u64]) -> Result<u64, Error> {
        let (found, words) = self.limit.room(slot, bitmap)?;
        self.limit.take(found, words)
    }

    /// As [`Round::merge`], into a new bitmap: in the place of kvm-ioctls' `get_dirty_log`.
    ///
    /// # Errors
    /// [`Error::NoSlot`].
    pub fn take(&self, slot: u32) -> Result<Vec<u64>, Error> {
        let found = self.limit.0.lock().slots.find(slot)?;
        let mut taken = vec![0; found.words];
        self.limit.take(found, &mut taken)?;
        Ok(taken)
    }
}

impl Round<'_, Running> {
    /// Pages that the round left in the rings of limited vCPUs, so that they stay inside their slices: dirty, and not in its
    /// log. A later round finds them, and the last finds all: they are a floor under the downtime.
    pub fn held_back(&self) -> u64 {
        self.held_back
    }
}

impl DirtyLimit {
    /// Makes a memory slot known (`address space << 16 | slot`), **before** it is created in KVM or its logging switched
    /// on: entries of unknown slots are in no dirty log ([`Error::UnknownPages`]). One region may have many slots.
    ///
    /// Switches `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` off once more, as [`DirtyLimit::enable`] does: a VMM must not enable it
    /// between this call and the moment when it switches the slot's logging on, nor before it switches it on again later.
    /// With `KVM_DIRTY_LOG_INITIALLY_SET` no page of the slot would ever be logged, and KVM has no way to ask.
    ///
    /// A slot that is known with that size stays as it is, dirty pages and all, so that a start of logging that failed half-way
    /// can be tried again.
    ///
    /// # Errors
    /// [`Error::SlotExists`] with another size, [`Error::SlotSize`], [`Error::ManualProtect`], and what a reset may answer.
    pub fn add_slot(&self, slot: u32, pages: u64) -> Result<(), Error> {
        self.0.caps.forbid_manual_protect(&*self.0.kernel)?;
        // What a former slot of this number left in the rings is not the new one's.
        if self.0.lock().slots.was_removed(slot) {
            self.collect_all()?;
        }
        let added = Slot::new(slot, pages)?;
        self.0.lock().slots.add(slot, added)
    }

    /// Collects, resets, and forgets a slot, **before** it is deleted or changed in KVM. What is dirty in it and not yet
    /// taken is forgotten with it. One that is not known is none to forget.
    ///
    /// # Errors
    /// What a reset may answer: then it is known still.
    pub fn remove_slot(&self, slot: u32) -> Result<(), Error> {
        if self.0.lock().slots.find(slot).is_err() {
            return Ok(());
        }
        self.collect_all()?;
        let removed = self.0.lock().slots.remove(slot);
        drop(removed); // not under the lock
        Ok(())
    }

    /// A round of the dirty log over a running VM: collects, resets and publishes. Of limited vCPUs' rings only what their
    /// slices free is collected (before they have noticed their limit, what it allows since the last round); the rest stays
    /// dirty, and is counted.
    ///
    /// # Errors
    /// What a reset may answer; nothing is lost by it. [`Error::UnknownPages`], once, after everything was published.
    pub fn round(&self) -> Result<Round<'_, Running>, Error> {
        let now = sys::now();
        let round = self.sweep(|row| row.plan_sweep(&self.0.limiter, now))?;
        self.tell_unknown()?;
        Ok(round)
    }

    /// Ors the pages of a slot into `bitmap` that are dirty by now, as [`Round::merge`] does, but forgets none: nothing is reset, and
    /// no page costs the guest another fault. A migration leaves out of the round that goes on what it would send again. A hint:
    /// what KVM has not pushed yet (PML), and what is only in the backup bitmap (arm64), is missing. Allocates nothing, and holds
    /// the VM's lock as `merge` does. From any thread.
    ///
    /// # Errors
    /// [`Error::NoSlot`], [`Error::BitmapSize`].
    pub fn peek(&self, slot: u32, bitmap: &mut [u64]) -> Result<(), Error> {
        let (found, words) = self.room(slot, bitmap)?;
        self.meter_each(|_, _| {});
        let mut pieces = (0..).step_by(PIECE).zip(words.chunks_mut(PIECE));
        pieces.try_for_each(|(first, piece)| self.0.lock().slots.peek(found, first, piece))
    }

    /// For the last rounds of a migration: from now on each round empties the rings of limited vCPUs too, and kicks end their
    /// slices, so that it leaves nothing in them ([`Round::held_back`]); or no longer. From any thread; the running vCPUs are
    /// kicked at once, but with [`crate::Kick::Vmm`], where the VMM kicks them after the call.
    ///
    /// # Errors
    /// [`Error::NoKick`] where the ring alone ends slices: a smaller ring ([`crate::Config::ring_for`]) has fewer pages to hold
    /// back.
    pub fn set_draining(&self, draining: bool) -> Result<(), Error> {
        if draining && !self.0.kick.ends_runs() {
            return Err(Error::NoKick);
        }
        self.0.lock().set_draining(draining);
        Ok(())
    }

    /// The last round, with every vCPU out of KVM_RUN: complete. Where there is a backup bitmap (arm64) it reads that too, by
    /// `KVM_GET_DIRTY_LOG`; call it after the interrupt controller's tables were saved.
    ///
    /// On a VM that runs on, what is dirtied during the call may be missing, and a limited vCPU may run a whole ring before its
    /// next exit (and pays for it).
    ///
    /// # Errors
    /// As [`DirtyLimit::round`]; [`Error::SlotTooShort`]; what `KVM_GET_DIRTY_LOG` may answer. What was found until then stays
    /// dirty for the next.
    pub fn last_round(&self) -> Result<Round<'_, Stopped>, Error> {
        let Round { published, held_back, .. } = self.sweep::<Stopped>(|row| row.ring().held_back())?;
        self.tell_unknown()?;
        if self.0.caps.bitmap {
            let slots = self.0.lock().slots.all();
            slots.into_iter().try_for_each(|found| self.backup_log(found))?;
        }
        Ok(Round { limit: self, published, held_back, state: PhantomData })
    }

    /// Makes pages dirty that no vCPU wrote: what the VMM, its devices or vhost write into guest memory, which KVM does not
    /// log. They are in the next round, and nobody is charged for them. Call it after the write: a page that is marked before
    /// may be taken by a round that comes between. From any thread.
    ///
    /// # Errors
    /// [`Error::NoSlot`]; [`Error::PagesBeyond`] where the range ends beyond the slot: then none of it is marked.
    pub fn mark_dirty(&self, slot: u32, pages: Range<u64>) -> Result<(), Error> {
        let found = self.0.lock().slots.find(slot)?;
        if pages.end > found.pages {
            return Err(Error::PagesBeyond { slot, end: pages.end, pages: found.pages });
        }
        for first in pages.clone().step_by(PIECE * 64) {
            let piece = first..pages.end.min(first + PIECE as u64 * 64);
            self.0.lock().slots.mark(found, piece)?;
        }
        Ok(())
    }

    /// Pages of a slot were written beyond what [`DirtyLimit::add_slot`] was told of it: an error of the next round.
    #[cfg(feature = "vm-memory")]
    pub(crate) fn drop_beyond(&self, slot: u32, pages: u64) {
        self.0.lock().slots.drop_beyond(slot, pages);
    }

    /// Whether a page is in the log, as far as the rings were looked at; false where the slot is not.
    #[cfg(feature = "vm-memory")]
    pub(crate) fn is_dirty(&self, slot: u32, page: u64) -> bool {
        let (mut word, mut harvest) = ([0], self.0.lock());
        let Ok(found) = harvest.slots.find(slot) else { return false };
        page < found.pages
            && harvest.slots.peek(found, (page / 64) as usize, &mut word).is_ok()
            && word[0] & 1 << (page % 64) != 0
    }

    /// Says that a slot's suspect pages are protected again. A reset that was interrupted (the process was stopped, traced
    /// or frozen on the way, or its thread owns an `io_uring` whose completions came) may have left the last pages that it
    /// gave back writable, at most 64 of a vCPU, without a log of what is written there. They stay dirty in every take until
    /// an undisturbed reset gives them back, or until this call: with the vCPUs stopped, switch `KVM_MEM_LOG_DIRTY_PAGES` of
    /// the slot off and on, and take the log, before it.
    ///
    /// # Errors
    /// [`Error::NoSlot`].
    pub fn trust_slot(&self, slot: u32) -> Result<(), Error> {
        let trusted = self.0.lock().slots.trust(slot)?;
        drop(trusted); // not under the lock
        Ok(())
    }

    /// A slot, and its words of the caller's bitmap.
    fn room<'a>(&self, slot: u32, bitmap: &'a mut [u64]) -> Result<(Found, &'a mut [u64]), Error> {
        let found = self.0.lock().slots.find(slot)?;
        let given = bitmap.len();
        let words = bitmap.get_mut(..found.words).ok_or(Error::BitmapSize { slot, given, needed: found.words })?;
        Ok((found, words))
    }

    /// Ors the published pages of a slot into `taken`; returns how many they are.
    fn take(&self, found: Found, taken: &mut [u64]) -> Result<u64, Error> {
        let mut pages = 0;
        for (first, piece) in (0..).step_by(PIECE).zip(taken.chunks_mut(PIECE)) {
            pages += self.0.lock().slots.take(found, first, piece)?;
        }
        self.0.lock().taken(&self.0.limiter);
        self.0.limiter.vm().note_taken(sys::now());
        Ok(pages)
    }

    /// What was published so far, and nothing else.
    #[cfg(test)]
    pub(crate) fn take_published(&self, slot: u32) -> Result<Vec<u64>, Error> {
        Round::<Running> { limit: self, published: 0, held_back: 0, state: PhantomData }.take(slot)
    }

    /// Makes the pages of a slot dirty that its backup bitmap names.
    fn backup_log(&self, found: Found) -> Result<(), Error> {
        let mut words = vec![0; found.words];
        let error = match self.0.kernel.backup_log(found.slot, &mut words) {
            Ok(()) => {
                for (first, piece) in (0..).step_by(PIECE).zip(words.chunks(PIECE)) {
                    self.0.lock().slots.put_back(found, first, piece)?;
                }
                return Ok(());
            }
            Err(error) => error,
        };
        if error.raw_os_error() != Some(libc::EFAULT) {
            return Err(system("KVM_GET_DIRTY_LOG")(error));
        }
        // The slot is larger in KVM, which has forgotten the log all the same: all that it may have named.
        for first in (0..found.words).step_by(PIECE) {
            self.0.lock().slots.soil(found, first, PIECE)?;
        }
        Err(Error::SlotTooShort { slot: found.slot, pages: found.pages })
    }

    /// Everything that was logged before the call is published, and nobody told of unknown pages: for callers that must go on
    /// all the same.
    pub(crate) fn collect_all(&self) -> Result<(), Error> {
        self.sweep::<Stopped>(|row| row.ring().held_back()).map(drop)
    }

    /// An error if pages of unknown slots were collected since the last call, by any thread.
    fn tell_unknown(&self) -> Result<(), Error> {
        let unknown = self.0.lock().slots.take_unknown();
        unknown.map_or(Ok(()), |Unknown { pages, slot }| Err(Error::UnknownPages { pages, slot }))
    }

    /// Meters every ring, and passes each vCPU on; between some of them others may get the lock.
    pub(crate) fn meter_each(&self, mut each: impl FnMut(u32, &mut Row)) {
        let mut next = Some(0);
        while let Some(from) = next {
            next = self.0.lock().meter_from(from, &self.0.limiter, &mut each);
        }
    }

    /// Collects of each ring as much as `choose` says of it at the start, in batches between which others get the lock.
    fn sweep<S>(&self, choose: impl FnMut(&mut Row) -> u32) -> Result<Round<'_, S>, Error> {
        let swept = self.sweep_untold(choose);
        events::tell(&self.0, sys::now());
        swept
    }

    fn sweep_untold<S>(&self, mut choose: impl FnMut(&mut Row) -> u32) -> Result<Round<'_, S>, Error> {
        let mut left = BTreeMap::new();
        self.meter_each(|id, row| {
            left.insert(id, choose(row));
        });
        self.limiter(VmLimiter::fold);
        let mut sum = 0;
        loop {
            let mut harvest = self.0.lock();
            let count = harvest.collect(&*self.0.kernel, |id, row, room| {
                let Some(left) = left.get_mut(&id) else { return 0 };
                // Others may have collected some meanwhile, oldest first, as we do.
                let count = (*left).min(row.ring().held_back()).min(room);
                *left -= count;
                count
            })?;
            sum += u64::from(count);
            if count == 0 {
                if self.0.kick.ends_runs() {
                    harvest.kick_emptied();
                }
                let held_back = harvest.rows.values().map(|row| u64::from(row.ring().held_back())).sum();
                return Ok(Round { limit: self, published: sum, held_back, state: PhantomData });
            }
        }
    }
}
