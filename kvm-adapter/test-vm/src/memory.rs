//! The guest's RAM, as the host sees it.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::{Context, Result, ensure};

use crate::PAGE_SIZE;

/// u64 words in a page.
const PAGE_WORDS: usize = PAGE_SIZE as usize / 8;

/// Anonymous memory that a guest uses as RAM, or that holds a copy of it.
///
/// The guest writes it while the host reads, so the host reaches it by words, each a relaxed atomic: a word read is one
/// that was there at some time, and nothing is promised about the order of two words.
#[derive(Debug)]
pub struct GuestMemory {
    start: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the value, lives as long as it, and is reached through atomics only.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; atomics may be shared.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Zeroed memory, none of it populated yet.
    ///
    /// # Errors
    /// A size of 0 or not in whole pages, or one that the host cannot map.
    pub fn new(bytes: usize) -> Result<Self> {
        ensure!(
            bytes > 0 && bytes % PAGE_SIZE as usize == 0,
            "guest memory of {bytes} bytes: it must be whole pages of {PAGE_SIZE}"
        );
        // SAFETY: a new private mapping at an address that the kernel chooses touches no memory in use.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            return Err(error).with_context(|| format!("cannot map {} MiB of guest memory", bytes >> 20));
        }
        let start = NonNull::new(start.cast()).context("mmap returned address 0")?;
        Ok(Self { start, bytes })
    }

    /// Host address of the first byte, for `KVM_SET_USER_MEMORY_REGION`.
    pub fn host_address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Size in pages.
    pub fn pages(&self) -> usize {
        self.bytes / PAGE_SIZE as usize
    }

    /// Every word.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `bytes` bytes, is page aligned, zeroed or written since, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes / 8) }
    }

    /// The words of one page.
    ///
    /// # Panics
    /// If `page` is [`pages`](Self::pages) or more.
    pub fn page(&self, page: usize) -> &[AtomicU64] {
        &self.words()[page * PAGE_WORDS..][..PAGE_WORDS]
    }

    /// Writes `words` from the guest-physical `address` on.
    ///
    /// # Panics
    /// If the address is not a multiple of 8 or the words do not fit: the host lays out the memory itself.
    pub fn write(&self, address: u64, words: &[u64]) {
        assert!(address % 8 == 0, "{address:#x} is no address of a word");
        let first = usize::try_from(address / 8).expect("a guest-physical address fits usize");
        for (word, &value) in self.words()[first..][..words.len()].iter().zip(words) {
            word.store(value, Relaxed);
        }
    }

    /// Writes bytes from the guest-physical `address` on; the last word is filled up with zeros.
    ///
    /// # Panics
    /// As [`write`](Self::write).
    pub fn write_bytes(&self, address: u64, bytes: &[u8]) {
        let words: Vec<u64> = bytes
            .chunks(8)
            .map(|chunk| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_le_bytes(word)
            })
            .collect();
        self.write(address, &words);
    }

    /// Asks the host to back the pages of `range` (bytes) now rather than when the guest first touches each.
    ///
    /// It only moves that cost out of what is measured, so a kernel that cannot (before Linux 5.14) is no error.
    ///
    /// # Panics
    /// If the range is not inside the memory, or does not start on a page.
    pub fn populate(&self, range: std::ops::Range<usize>) {
        assert!(range.start % PAGE_SIZE as usize == 0 && range.end <= self.bytes, "{range:x?} is not to be populated");
        // SAFETY: the range is inside the mapping, and populating changes no byte of it.
        unsafe {
            let start = self.start.as_ptr().cast::<u8>().add(range.start);
            libc::madvise(start.cast(), range.len(), libc::MADV_POPULATE_WRITE);
        }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this size, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_land_where_they_were_written() {
        let memory = GuestMemory::new(2 * PAGE_SIZE as usize).unwrap();
        memory.write_bytes(4096, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(memory.page(1)[0].load(Relaxed), 0x0807_0605_0403_0201);
        assert_eq!(memory.page(1)[1].load(Relaxed), 9);
        assert!(memory.page(0).iter().all(|word| word.load(Relaxed) == 0));
        memory.populate(0..8192);
        assert_eq!(memory.page(1)[1].load(Relaxed), 9);
    }

    #[test]
    fn a_size_that_cannot_be_mapped_is_refused() {
        for bytes in [0, 100, usize::MAX - (PAGE_SIZE as usize - 1)] {
            assert!(GuestMemory::new(bytes).is_err(), "{bytes}");
        }
    }
}
