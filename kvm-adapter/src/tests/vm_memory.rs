//! What is written through `vm-memory`.

use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::{Bytes, VolatileSlice};

use crate::fake::{PAGES, SLOT, pages};
use crate::{Error, SlotBitmap};

/// As a region of guest memory does it, at byte `offset` of the slot.
fn write<B: BitmapSlice>(bitmap: B, offset: usize, bytes: &[u8]) {
    let mut memory = vec![0; bytes.len() + 100];
    // SAFETY: the slice is gone before its memory.
    let slice = unsafe { VolatileSlice::with_bitmap(memory.as_mut_ptr(), memory.len(), bitmap, None) };
    slice.subslice(offset, bytes.len()).unwrap().write_slice(bytes, 0).unwrap();
}

#[test]
fn what_is_written_through_vm_memory_is_in_the_next_round() {
    let (_, limit, _, _vcpu) = super::vm();
    let bitmap = SlotBitmap::new(&limit, SLOT);
    let take = || pages(&limit.round().and_then(|round| round.take(SLOT)).unwrap());
    write(bitmap.slice_at(3 * 4096), 0, &[1; 4096]);
    write(bitmap.slice_at(8 * 4096 - 10).slice_at(1), 8, &[1; 2]);
    write(bitmap.slice_at(0), 50, &[]);
    assert!(bitmap.dirty_at(3 * 4096) && bitmap.dirty_at(4 * 4096 - 1) && !bitmap.dirty_at(4 * 4096));
    assert_eq!(take(), [3, 7, 8]);
    assert!(!bitmap.dirty_at(3 * 4096));
    bitmap.mark_dirty(0, 1);
    assert_eq!(take(), [0]);
    // Beyond the slot: what is within is marked, and the rest is told.
    let end = usize::try_from(PAGES).unwrap() * 4096;
    bitmap.mark_dirty(end - 1, 4097);
    assert!(matches!(limit.round(), Err(Error::UnknownPages { pages: 1, slot: SLOT })));
    bitmap.mark_dirty(end + 4096, usize::MAX);
    assert!(limit.round().is_err() && !bitmap.dirty_at(end + 4096));
    assert_eq!(take(), [PAGES - 1]);
}

#[test]
fn a_region_outlives_its_log_and_its_vm() {
    let (_, limit, _, vcpu) = super::vm();
    let (bitmap, other) = (SlotBitmap::new(&limit, SLOT), SlotBitmap::new(&limit, 7));
    other.mark_dirty(0, 4096);
    assert!(limit.round().is_ok() && !other.dirty_at(0), "a slot that is not in the log");
    drop((limit, vcpu));
    bitmap.mark_dirty(0, 4096);
    assert!(!bitmap.dirty_at(0));
}
