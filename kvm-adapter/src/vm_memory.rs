//! Feature `vm-memory`: what devices write through `vm-memory` reaches the dirty log.

use std::ops::Range;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::{DirtyLimit, Error, WeakDirtyLimit, sys};

/// The bitmap of a `vm-memory` region whose memory is one slot: every write through the region is marked as by
/// [`DirtyLimit::mark_dirty`], once it is done. So a device model needs no call of its own.
///
/// Such a write takes the VM's lock for a moment, from whichever thread it comes. While the slot is not in the log
/// ([`DirtyLimit::add_slot`]) it leaves no trace, as KVM's own log has none then. Give a region `Option<SlotBitmap>` where some
/// VMs have no dirty ring.
#[derive(Clone, Debug)]
pub struct SlotBitmap {
    limit: WeakDirtyLimit,
    slot: u32,
}

impl SlotBitmap {
    /// Of the region that is all of memory slot `slot`. Does not keep the VM.
    pub fn new(limit: &DirtyLimit, slot: u32) -> Self {
        Self { limit: limit.downgrade(), slot }
    }

    const fn slice(&self, from: usize) -> SlotBitmapSlice<'_> {
        SlotBitmapSlice { bitmap: self, from }
    }
}

/// A [`SlotBitmap`] from some byte on.
#[derive(Clone, Copy, Debug)]
pub struct SlotBitmapSlice<'a> {
    bitmap: &'a SlotBitmap,
    from: usize,
}

impl SlotBitmapSlice<'_> {
    /// The pages of `len` bytes; where the address space ends, up to there.
    fn pages(&self, offset: usize, len: usize) -> Range<u64> {
        let page = sys::page_size() as usize;
        let start = self.from.saturating_add(offset);
        (start / page) as u64..start.saturating_add(len).div_ceil(page) as u64
    }
}

impl<'a> WithBitmapSlice<'a> for SlotBitmap {
    type S = SlotBitmapSlice<'a>;
}

impl Bitmap for SlotBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice(0).dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> SlotBitmapSlice<'_> {
        self.slice(offset)
    }
}

impl WithBitmapSlice<'_> for SlotBitmapSlice<'_> {
    type S = Self;
}

impl BitmapSlice for SlotBitmapSlice<'_> {}

impl Bitmap for SlotBitmapSlice<'_> {
    /// A page beyond the slot is an error of the next round ([`Error::UnknownPages`]).
    fn mark_dirty(&self, offset: usize, len: usize) {
        let (pages, slot) = (self.pages(offset, len), self.bitmap.slot);
        let Some(limit) = self.bitmap.limit.upgrade().filter(|_| len > 0) else { return };
        if let Err(Error::PagesBeyond { pages: known, .. }) = limit.mark_dirty(slot, pages.clone()) {
            // Only where the slot is removed meanwhile.
            let _ = limit.mark_dirty(slot, pages.start..known.max(pages.start));
            limit.drop_beyond(slot, pages.end - known.max(pages.start));
        }
    }

    /// Whether the page is to be sent, as [`DirtyLimit::peek`] says, but for what is in a ring and was not looked at yet.
    fn dirty_at(&self, offset: usize) -> bool {
        let page = self.pages(offset, 1).start;
        self.bitmap.limit.upgrade().is_some_and(|limit| limit.is_dirty(self.bitmap.slot, page))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { from: self.from.saturating_add(offset), ..*self }
    }
}
