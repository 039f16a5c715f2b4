//! The dirty log, round by round.

use std::ffi::{c_int, c_void};
use std::slice;

use dirtylimit_kvm::{DirtyLimit, Error, Running, Stopped};

use crate::answer::{Failure, done, free, get, room};
use crate::vm::Limit;

/// One round of the dirty log, whose pages are to be merged slot by slot.
#[derive(Debug)]
pub struct Round {
    /// `None` while it is dropped.
    kind: Option<Kind>,
    /// What `kind` borrows, the round's own.
    limit: *mut DirtyLimit,
}

#[derive(Debug)]
enum Kind {
    Running(dirtylimit_kvm::Round<'static, Running>),
    Last(dirtylimit_kvm::Round<'static, Stopped>),
}

impl Round {
    fn begin(limit: &Limit, make: impl FnOnce(&'static DirtyLimit) -> Result<Kind, Error>) -> Result<Self, Error> {
        let limit = Box::into_raw(Box::new(limit.0.clone()));
        let mut round = Self { kind: None, limit };
        // SAFETY: it lives until `round` is dropped, which drops `kind` first and lets nobody else have the reference.
        round.kind = Some(make(unsafe { &*limit })?);
        Ok(round)
    }

    fn merge(&self, slot: u32, bitmap: &mut [u64]) -> Result<u64, Error> {
        match &self.kind {
            Some(Kind::Running(round)) => round.merge(slot, bitmap),
            Some(Kind::Last(round)) => round.merge(slot, bitmap),
            None => Ok(0),
        }
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        self.kind = None;
        // SAFETY: made by `begin`, and what borrowed it is gone.
        drop(unsafe { Box::from_raw(self.limit) });
    }
}

/// A round of the dirty log over a running VM: collects, resets, publishes. Of limited vCPUs it leaves the newest pages in their
/// rings, for a later round, so that they stay inside their slices. Free it after its slots were merged. Any thread; a round
/// itself is used by one thread at a time.
///
/// -ENOENT, once, after everything was published: the guest has dirtied pages of slots that are not known, or shorter than KVM's,
/// and they are in no dirty log. -EIO and others: KVM_RESET_DIRTY_RINGS failed, and nothing is lost by it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_round(limit: *mut Limit, round: *mut *mut Round) -> c_int {
    // SAFETY: the caller's promises are the same.
    unsafe { start(limit, round, |limit| limit.round().map(Kind::Running)) }
}

/// For the last rounds of a migration: with 1 each round empties the rings of limited vCPUs too, and kicks end their slices, so
/// that it leaves nothing in them; 0 ends that. With DIRTYLIMIT_KICK_VMM the VMM kicks its vCPUs after the call. Any thread.
///
/// -EOPNOTSUPP: the ring alone ends slices (DIRTYLIMIT_KICK_AUTO or _OFF); a smaller one (dirtylimit_ring_for()) holds less back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_set_draining(limit: *mut Limit, draining: c_int) -> c_int {
    // SAFETY: the header's rule for handles.
    done(|| Ok(unsafe { get(limit, "limit") }?.0.set_draining(draining != 0)?))
}

/// The last round: complete. No vCPU is in KVM_RUN, and none enters until its slots were merged. On arm64 it reads the backup
/// bitmap, so call it after the interrupt controller's tables were saved. Free it. Any thread but a vCPU's that is stopped by it.
///
/// As dirtylimit_round(); -EINVAL: KVM has more pages in a slot than it was added with.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_last_round(limit: *mut Limit, round: *mut *mut Round) -> c_int {
    // SAFETY: the caller's promises are the same.
    unsafe { start(limit, round, |limit| limit.last_round().map(Kind::Last)) }
}

/// # Safety
/// As [`get`] and [`room`].
unsafe fn start(
    limit: *mut Limit,
    round: *mut *mut Round,
    make: impl FnOnce(&'static DirtyLimit) -> Result<Kind, Error>,
) -> c_int {
    done(|| {
        // SAFETY: the caller's promise.
        let (place, limit) = unsafe { (room(round, "round")?, get(limit, "limit")?) };
        *place = Box::into_raw(Box::new(Round::begin(limit, make)?));
        Ok(())
    })
}

/// Ors the dirty pages of a slot into bitmap, in the form of KVM_GET_DIRTY_LOG: a bit a page from the slot's first, 64 a word; and
/// forgets them. bitmap is aligned to 8 bytes and has at least (pages of the slot + 63) / 64 * 8 of them; nobody else uses it
/// meanwhile. pages may be NULL; else the number of pages is added to it. The round's thread.
///
/// -ENOENT: no such slot. -EINVAL: the bitmap is too short, or not aligned, and nothing is forgotten.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_merge(
    round: *mut Round,
    slot: u32,
    bitmap: *mut c_void,
    bytes: usize,
    pages: *mut u64,
) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        let round = unsafe { get(round, "round") }?;
        // SAFETY: the caller's own bitmap of that many bytes.
        let words = unsafe { words(bitmap, bytes) }?;
        let merged = round.merge(slot, words)?;
        // SAFETY: NULL, or the caller's place for the count.
        if let Some(pages) = unsafe { pages.as_mut() } {
            *pages += merged;
        }
        Ok(())
    })
}

/// Ors the pages of a slot into bitmap that are dirty by now, as dirtylimit_merge does, but forgets none: nothing is reset, and no
/// page costs the guest another fault. A migration leaves out of the round that goes on what it would send again. A hint: what
/// KVM has not pushed yet (PML), and what is only in the backup bitmap (arm64), is missing. Any thread.
///
/// -ENOENT: no such slot. -EINVAL: the bitmap is too short, or not aligned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_peek(limit: *mut Limit, slot: u32, bitmap: *mut c_void, bytes: usize) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles; the caller's own bitmap of that many bytes.
        let (limit, words) = unsafe { (get(limit, "limit")?, words(bitmap, bytes)?) };
        limit.0.peek(slot, words)?;
        Ok(())
    })
}

/// The words of a bitmap.
///
/// # Safety
/// NULL, or `bytes` bytes that nobody else uses while the words live.
unsafe fn words<'a>(bitmap: *mut c_void, bytes: usize) -> Result<&'a mut [u64], Failure> {
    let words = bitmap.cast::<u64>();
    if words.is_null() {
        return Err(Failure::Null("bitmap"));
    }
    if !words.is_aligned() {
        return Err(Failure::Caller(libc::EINVAL, "the bitmap is not aligned to 8 bytes"));
    }
    // SAFETY: aligned, and the caller's own, of that many bytes; every bit pattern is a word.
    Ok(unsafe { slice::from_raw_parts_mut(words, bytes / size_of::<u64>()) })
}

/// Ring entries that the round itself has collected, reset and published; what vCPUs have published since the last merge comes
/// on top. 0 for NULL. The round's thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_round_published(round: *mut Round) -> u64 {
    // SAFETY: the header's rule for handles.
    match unsafe { round.as_ref() }.and_then(|round| round.kind.as_ref()) {
        Some(Kind::Running(round)) => round.published(),
        Some(Kind::Last(round)) => round.published(),
        None => 0,
    }
}

/// Pages that a round over a running VM has left in the rings of limited vCPUs: dirty, not in its log, and a floor under the
/// downtime. 0 for the last round, and for NULL. The round's thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_round_held_back(round: *mut Round) -> u64 {
    // SAFETY: the header's rule for handles.
    match unsafe { round.as_ref() }.and_then(|round| round.kind.as_ref()) {
        Some(Kind::Running(round)) => round.held_back(),
        Some(Kind::Last(_)) | None => 0,
    }
}

/// Frees a round. What was not merged is in the next. NULL is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_round_free(round: *mut Round) {
    // SAFETY: the header's rule for handles.
    unsafe { free(round) };
}

/// Makes pages of a slot dirty that no vCPU wrote: what the VMM, its devices or vhost write into guest memory, which KVM does not
/// log. They are in the next round, and no vCPU is charged for them. Call it after the write: a page that is
/// marked before may be taken by a round that comes between. Any thread.
///
/// -ENOENT: no such slot. -EINVAL: the pages end beyond it, and none is marked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_mark_dirty(limit: *mut Limit, slot: u32, first_page: u64, pages: u64) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        let limit = unsafe { get(limit, "limit") }?;
        Ok(limit.0.mark_dirty(slot, first_page..first_page.saturating_add(pages))?)
    })
}

/// Says that a slot's suspect pages (dirtylimit_stats_t) are protected again: with the vCPUs stopped, switch
/// KVM_MEM_LOG_DIRTY_PAGES of the slot off and on, and merge it, before this call. Any thread.
///
/// -ENOENT: no such slot.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_trust_slot(limit: *mut Limit, slot: u32) -> c_int {
    // SAFETY: the header's rule for handles.
    done(|| Ok(unsafe { get(limit, "limit") }?.0.trust_slot(slot)?))
}
