//! The dirty log of a VM's slots, in the place of KVM_GET_DIRTY_LOG: what a migration's thread calls.
//!
//! Each call does its work in pieces of bounded length, each under a lock of its own, so that a vCPU's thread with a full
//! ring waits for one piece at most, however large the slot and however many the vCPUs.

use std::collections::BTreeMap;

use crate::error::{Error, system};
use crate::events;
use crate::harvest::Place;
use crate::limit::DirtyLimit;
use crate::seat::VmLimiter;
use crate::slots::{Found, Slot, Unknown};
use crate::sys;

/// Words of a slot's bitmap that are taken under the lock before others may have it: the pages of 1 GiB.
pub(crate) const PIECE: usize = 4096;

/// What a running pass did.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Pass {
    /// Entries that were collected, reset and published by it.
    pub published: u64,
    /// Entries left in the rings of limited vCPUs: their pages stay dirty, for a later pass or the last sync.
    pub held_back: u64,
}

impl DirtyLimit {
    /// Makes a memory slot known (`address space << 16 | slot`), **before** it is created in KVM or its logging switched
    /// on: entries of unknown slots are in no dirty log ([`Error::UnknownPages`]). One region may have many slots.
    ///
    /// Switches `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` off once more, as [`DirtyLimit::enable`] does: a VMM must not enable it
    /// between this call and the moment when it switches the slot's logging on, nor before it switches it on again later.
    /// With `KVM_DIRTY_LOG_INITIALLY_SET` no page of the slot would ever be logged, and KVM has no way to ask.
    ///
    /// # Errors
    /// [`Error::SlotExists`], [`Error::SlotSize`], [`Error::ManualProtect`], and what a reset may answer.
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
    /// taken is forgotten with it.
    ///
    /// # Errors
    /// [`Error::NoSlot`], and what a reset may answer.
    pub fn remove_slot(&self, slot: u32) -> Result<(), Error> {
        self.0.lock().slots.find(slot)?;
        self.collect_all()?;
        let removed = self.0.lock().slots.remove(slot)?;
        drop(removed); // not under the lock
        Ok(())
    }

    /// Collects, resets and publishes everything that was logged before the call. With the vCPUs out of KVM_RUN that is
    /// everything. A limited vCPU may then run a whole ring before its next exit (and pays for it): a pass that comes
    /// around while it runs is better a [`DirtyLimit::pass`].
    ///
    /// # Errors
    /// What a reset may answer; nothing is lost by it. [`Error::UnknownPages`], once, after everything was published.
    pub fn sync(&self) -> Result<(), Error> {
        self.collect_all()?;
        self.tell_unknown()
    }

    /// As [`DirtyLimit::sync`], but leaves limited vCPUs inside their slices: of their rings only what a slice frees is
    /// collected (before they have noticed their limit, what it allows since the last pass), and the rest, which stays
    /// dirty, is counted.
    ///
    /// # Errors
    /// As [`DirtyLimit::sync`].
    pub fn pass(&self) -> Result<Pass, Error> {
        let now = sys::now();
        let pass = self.sweep(|place| place.to_sweep(&self.0.limiter, now))?;
        self.tell_unknown()?;
        Ok(pass)
    }

    /// The dirty pages of a slot since the last call, in the form of `KVM_GET_DIRTY_LOG` (a bit a page, 64 a word):
    /// complete, in its stead. Syncs first, and where there is a backup bitmap (arm64) reads that too, by
    /// `KVM_GET_DIRTY_LOG`.
    ///
    /// All or nothing: after an error every page that it would have named is still dirty in the next. Suspect pages (see
    /// [`DirtyLimit::trust_slot`]) are in every answer.
    ///
    /// # Errors
    /// [`Error::NoSlot`], [`Error::SlotTooShort`], [`Error::UnknownPages`] (once), and what a reset or `KVM_GET_DIRTY_LOG` may
    /// answer.
    pub fn take_dirty_log(&self, slot: u32) -> Result<Vec<u64>, Error> {
        self.sync()?;
        let found = self.0.lock().slots.find(slot)?;
        let mut taken = vec![0; found.words];
        // What may fail comes first.
        if self.0.caps.bitmap {
            self.backup_log(slot, found, &mut taken)?;
        }
        self.take(found, &mut taken)?;
        Ok(taken)
    }

    /// As [`DirtyLimit::take_dirty_log`], of what was published so far (by [`DirtyLimit::pass`], and by the vCPUs'
    /// slices) and nothing else.
    ///
    /// # Errors
    /// [`Error::NoSlot`].
    pub fn take_published(&self, slot: u32) -> Result<Vec<u64>, Error> {
        let found = self.0.lock().slots.find(slot)?;
        let mut taken = vec![0; found.words];
        self.take(found, &mut taken)?;
        Ok(taken)
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

    /// Ors the published pages of a slot into `taken`.
    fn take(&self, found: Found, taken: &mut [u64]) -> Result<(), Error> {
        for (first, piece) in (0..).step_by(PIECE).zip(taken.chunks_mut(PIECE)) {
            self.0.lock().slots.take(found, first, piece)?;
        }
        self.0.lock().taken(&self.0.limiter);
        self.0.limiter.vm().note_taken(sys::now());
        Ok(())
    }

    /// Ors the backup bitmap of a slot into `taken`.
    fn backup_log(&self, slot: u32, found: Found, taken: &mut [u64]) -> Result<(), Error> {
        let Err(error) = self.0.kernel.backup_log(slot, taken) else { return Ok(()) };
        if error.raw_os_error() != Some(libc::EFAULT) {
            return Err(system("KVM_GET_DIRTY_LOG")(error));
        }
        // KVM has forgotten which they were.
        for first in (0..found.words).step_by(PIECE) {
            self.0.lock().slots.soil(found, first, PIECE)?;
        }
        Err(Error::SlotTooShort { slot, pages: found.pages })
    }

    /// [`DirtyLimit::sync`], but for what it tells: for callers that must go on all the same.
    pub(crate) fn collect_all(&self) -> Result<(), Error> {
        self.sweep(|place| place.ring().held_back()).map(drop)
    }

    /// An error if pages of unknown slots were collected since the last call, by any thread.
    fn tell_unknown(&self) -> Result<(), Error> {
        let unknown = self.0.lock().slots.take_unknown();
        unknown.map_or(Ok(()), |Unknown { pages, slot }| Err(Error::UnknownPages { pages, slot }))
    }

    /// Meters every ring, and passes each vCPU on; between some of them others may get the lock.
    pub(crate) fn meter_each(&self, mut each: impl FnMut(u32, &mut Place)) {
        let mut next = Some(0);
        while let Some(from) = next {
            next = self.0.lock().meter_from(from, &self.0.limiter, &mut each);
        }
    }

    /// Collects of each ring as much as `choose` says of it at the start, in batches between which others get the lock.
    fn sweep(&self, choose: impl FnMut(&mut Place) -> u32) -> Result<Pass, Error> {
        let swept = self.sweep_untold(choose);
        events::tell(&self.0, sys::now());
        swept
    }

    fn sweep_untold(&self, mut choose: impl FnMut(&mut Place) -> u32) -> Result<Pass, Error> {
        let mut left = BTreeMap::new();
        self.meter_each(|id, place| {
            left.insert(id, choose(place));
        });
        self.limiter(VmLimiter::fold);
        let mut pass = Pass::default();
        loop {
            let mut harvest = self.0.lock();
            let published = harvest.collect(&*self.0.kernel, |id, place, room| {
                let Some(left) = left.get_mut(&id) else { return 0 };
                // Others may have collected some meanwhile, oldest first, as we do.
                let count = (*left).min(place.ring().held_back()).min(room);
                *left -= count;
                count
            })?;
            pass.published += u64::from(published);
            if published == 0 {
                if self.0.kick.ends_runs() {
                    harvest.kick_emptied();
                }
                pass.held_back = harvest.places.values().map(|place| u64::from(place.ring().held_back())).sum();
                return Ok(pass);
            }
        }
    }
}
