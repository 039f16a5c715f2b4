//! Guest memory as it goes over the wire: sets of pages, frames of them, and their hashes.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::{Result, ensure};
use xxhash_rust::xxh3::xxh3_64;

use super::wire::{MAX_DATA, Run};
use crate::guest::kvm::GuestMemory;
use crate::units::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;
/// The most runs of a frame: with ten bytes each they are far below the longest message.
const MAX_RUNS: usize = 1024;
/// The most pages that are looked at for one frame, zero ones included: they are 16 MiB.
const MAX_LOOKED_AT: usize = 4096;

/// A set of pages, a bit each.
pub(super) type Bitmap = Vec<u64>;

/// All pages of a guest that has `pages`.
pub(super) fn all(pages: usize) -> Bitmap {
    let mut bitmap = vec![u64::MAX; pages.div_ceil(64)];
    if let (Some(last), rest @ 1..) = (bitmap.last_mut(), pages % 64) {
        *last = (1 << rest) - 1;
    }
    bitmap
}

/// How many pages are in it.
pub(super) fn count(bitmap: &[u64]) -> u64 {
    bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// How many pages are in one of two.
pub(super) fn count_either(one: &[u64], other: &[u64]) -> u64 {
    one.iter().zip(other).map(|(one, other)| u64::from((one | other).count_ones())).sum()
}

pub(super) fn has(bitmap: &[u64], page: usize) -> bool {
    bitmap.get(page / 64).is_some_and(|word| word >> (page % 64) & 1 != 0)
}

/// Pages that are to be sent, in order.
#[derive(Debug)]
pub(super) struct Sweep {
    /// What is still to be sent.
    pub(super) pending: Bitmap,
    /// Everything before this word was seen.
    word: usize,
}

/// Pages that fit in a frame.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) runs: Vec<Run>,
    data: Vec<u64>,
    /// Pages in it.
    pub(super) pages: u64,
    /// Pages that were left out, for they are dirty again.
    pub(super) skipped: u64,
}

impl Sweep {
    pub(super) fn new(pending: Bitmap) -> Self {
        Self { pending, word: 0 }
    }

    /// The next pages, but those that are in `again`: they are dirty again, and the next round sends them. `false` at the end.
    pub(super) fn next(&mut self, memory: &GuestMemory, again: &[u64], batch: &mut Batch) -> bool {
        batch.runs.clear();
        batch.data.clear();
        (batch.pages, batch.skipped) = (0, 0);
        let mut looked_at = 0;
        while let Some(word) = self.pending.get_mut(self.word) {
            if *word == 0 {
                self.word += 1;
                continue;
            }
            let full = batch.bytes().len() + PAGE > MAX_DATA || batch.runs.len() >= MAX_RUNS;
            if full || looked_at >= MAX_LOOKED_AT {
                return true;
            }
            let page = self.word * 64 + word.trailing_zeros() as usize;
            *word &= *word - 1;
            looked_at += 1;
            if has(again, page) {
                batch.skipped += 1;
            } else {
                batch.add(page, memory.page(page));
            }
        }
        looked_at > 0
    }
}

impl Batch {
    /// The data of its frame.
    pub(super) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.data)
    }

    fn add(&mut self, page: usize, words: &[AtomicU64]) {
        let start = self.data.len();
        // The guest may write meanwhile; then the page is dirty again, for it was armed before it was read.
        self.data.extend(words.iter().map(|word| word.load(Relaxed).to_le()));
        let zero = self.data[start..].iter().all(|&word| word == 0);
        if zero {
            self.data.truncate(start);
        }
        let first = page as u64;
        self.pages += 1;
        match self.runs.last_mut() {
            Some(run) if run.zero == zero && run.first + u64::from(run.pages) == first => run.pages += 1,
            _ => self.runs.push(Run { first, pages: 1, zero }),
        }
    }
}

/// Writes the pages of a frame to memory. `written` has the pages that may be other than zero.
///
/// # Errors
/// Runs that are not in the memory, or do not have these data: then nothing is written.
pub(super) fn write(memory: &GuestMemory, written: &mut Bitmap, runs: &[Run], data: &[u8]) -> Result<()> {
    let pages = memory.pages() as u64;
    let mut told = 0;
    for run in runs {
        let end = run.first.checked_add(u64::from(run.pages));
        ensure!(
            end.is_some_and(|end| end <= pages),
            "{} pages from page {} on: the guest has {pages}",
            run.pages,
            run.first
        );
        told += if run.zero { 0 } else { u64::from(run.pages) * PAGE as u64 };
    }
    ensure!(told == data.len() as u64, "runs of {told} bytes with {} bytes of data", data.len());
    let mut contents = data.chunks_exact(PAGE);
    for run in runs {
        let first = usize::try_from(run.first)?;
        for page in first..first + run.pages as usize {
            let words = memory.page(page);
            if !run.zero {
                let content = contents.next().unwrap_or_default();
                for (word, bytes) in words.iter().zip(content.chunks_exact(8)) {
                    word.store(u64::from_le_bytes(bytes.try_into()?), Relaxed);
                }
                written[page / 64] |= 1 << (page % 64);
            } else if has(written, page) {
                words.iter().for_each(|word| word.store(0, Relaxed));
            }
        }
    }
    Ok(())
}

/// The hash of a page. XXH3 has nothing in common with the frames' checksums.
pub(super) fn hash(memory: &GuestMemory, page: usize, buffer: &mut Vec<u64>) -> u64 {
    buffer.clear();
    buffer.extend(memory.page(page).iter().map(|word| word.load(Relaxed).to_le()));
    xxh3_64(bytemuck::cast_slice(buffer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn memory(pages: usize) -> GuestMemory {
        GuestMemory::new(pages * PAGE).unwrap()
    }

    /// Sends what is pending, and returns how many pages were sent and how many skipped.
    fn send(from: &GuestMemory, to: &GuestMemory, pending: Bitmap, again: &[u64], written: &mut Bitmap) -> (u64, u64) {
        let (mut sweep, mut batch, mut sums) = (Sweep::new(pending), Batch::default(), (0, 0));
        while sweep.next(from, again, &mut batch) {
            assert!(batch.bytes().len() <= MAX_DATA);
            write(to, written, &batch.runs, batch.bytes()).unwrap();
            sums = (sums.0 + batch.pages, sums.1 + batch.skipped);
        }
        assert_eq!(count(&sweep.pending), 0);
        sums
    }

    fn unequal(one: &GuestMemory, other: &GuestMemory) -> Vec<usize> {
        let mut buffer = Vec::new();
        let pages = 0..one.pages();
        pages.filter(|&page| hash(one, page, &mut buffer) != hash(other, page, &mut buffer)).collect()
    }

    #[test]
    fn all_pages_go_over_and_zeros_replace_what_was_there() {
        let (from, to) = (memory(300), memory(300));
        for page in (0..300).step_by(3) {
            from.write(page * PAGE as u64 + 8, &[page + 1]);
        }
        let mut written = vec![0; 5];
        assert_eq!(send(&from, &to, all(300), &[], &mut written), (300, 0));
        assert_eq!(unequal(&from, &to), [0usize; 0]);
        from.write(8, &[0]);
        from.write(4096, &[5]);
        assert_eq!(unequal(&from, &to), [0, 1]);
        assert_eq!(send(&from, &to, vec![0b111], &[0b10], &mut written), (2, 1));
        assert_eq!(unequal(&from, &to), [1], "it was dirty again");
    }

    #[test]
    fn runs_that_make_no_sense_write_nothing() {
        let to = memory(4);
        let mut written = vec![0];
        let page = [7; PAGE];
        for (first, pages, zero, data) in [
            (4, 1, false, &page[..]),
            (u64::MAX, 2, true, &[]),
            (0, u32::MAX, true, &[]),
            (0, 2, false, &page),
            (0, 0, false, &page),
            (0, 1, false, &page[1..]),
            (0, 1, true, &page),
        ] {
            let bad = Run { first, pages, zero };
            let good = Run { first: 0, pages: 1, zero: false };
            let with = [&page, data].concat();
            assert!(write(&to, &mut written, &[good, bad], &with).is_err(), "{bad:?}");
            assert_eq!(count(&written), 0);
        }
        assert!(to.words().iter().all(|word| word.load(Relaxed) == 0));
    }

    #[test]
    fn a_set_of_all_has_no_page_beyond() {
        for pages in [1, 63, 64, 65, 128] {
            assert_eq!(count(&all(pages)), pages as u64);
            assert!(!has(&all(pages), pages));
        }
    }

    proptest! {
        #[test]
        fn any_pages_go_over(words in prop::collection::vec(any::<u64>(), 3), values in prop::collection::vec(0u64..3, 192)) {
            let (from, to) = (memory(192), memory(192));
            for (page, &value) in values.iter().enumerate() {
                from.write((page * PAGE) as u64, &[value]);
            }
            let mut written = vec![0; 3];
            let sent = send(&from, &to, words.clone(), &[], &mut written);
            prop_assert_eq!(sent, (count(&words), 0));
            let expected: Vec<_> = (0..192).filter(|&page| values[page] != 0 && !has(&words, page)).collect();
            prop_assert_eq!(unequal(&from, &to), expected);
        }
    }
}
