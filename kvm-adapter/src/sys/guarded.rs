//! A buffer that the kernel cannot write past, for an ioctl that is not told how long it is.

use std::io;
use std::ptr::NonNull;
use std::slice;

/// What KVM writes for its largest slot, of 2³¹ − 1 pages, a bit a page.
const MOST: usize = 1 << 28;

/// Words of zeros with so much address space behind them that cannot be accessed that `KVM_GET_DIRTY_LOG` fails with
/// `EFAULT`, instead of writing to what is not its own, where a slot has more pages in KVM than its caller believes.
#[derive(Debug)]
pub(super) struct Guarded {
    mapping: NonNull<libc::c_void>,
    mapped: usize,
    /// Bytes before the words, so that these end where the guard begins.
    lead: usize,
    words: usize,
}

impl Guarded {
    pub(super) fn new(words: usize) -> io::Result<Self> {
        let too_long = || io::Error::from_raw_os_error(libc::ENOMEM);
        let bytes = words.checked_mul(size_of::<u64>()).ok_or_else(too_long)?;
        let open = bytes.checked_next_multiple_of(super::page_size() as usize).ok_or_else(too_long)?;
        let mapped = open.checked_add(MOST).ok_or_else(too_long)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches none of ours.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_NONE, flags, -1, 0) };
        let Some(mapping) = NonNull::new(start).filter(|start| start.as_ptr() != libc::MAP_FAILED) else {
            return Err(io::Error::last_os_error());
        };
        let guarded = Self { mapping, mapped, lead: open - bytes, words };
        // SAFETY: the first `open` bytes of our own new mapping.
        if open > 0 && unsafe { libc::mprotect(start, open, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(guarded)
    }

    /// For the kernel to write to.
    pub(super) fn start(&mut self) -> *mut libc::c_void {
        // SAFETY: `lead` is at most what is mapped.
        unsafe { self.mapping.as_ptr().byte_add(self.lead) }
    }

    pub(super) fn words(&self) -> &[u64] {
        // SAFETY: `words` words from `lead` on are mapped, readable and aligned (the mapping is to a page, `lead` a multiple
        // of 8), were zeroed by the kernel, and are written only through `start`, which takes `&mut self`.
        unsafe { slice::from_raw_parts(self.mapping.as_ptr().byte_add(self.lead).cast(), self.words) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody borrows any more.
        unsafe { libc::munmap(self.mapping.as_ptr(), self.mapped) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_words_are_zero_and_then_what_was_written() {
        let mut guarded = Guarded::new(3).unwrap();
        assert_eq!(guarded.words(), [0; 3]);
        // SAFETY: the second of three words.
        unsafe { guarded.start().cast::<u64>().add(1).write(7) };
        assert_eq!(guarded.words(), [0, 7, 0]);
    }

    #[test]
    fn it_is_unmapped_when_it_is_dropped() {
        let is_mapped = || {
            let guarded = Guarded::new(512).unwrap();
            let start = guarded.mapping.as_ptr();
            drop(guarded);
            let mut page = 0;
            // SAFETY: an address that is not mapped is an error; a byte is written for the page.
            unsafe { libc::mincore(start, 1, &raw mut page) == 0 }
        };
        // Another thread may have a mapping there meanwhile, but not each time.
        assert!((0..100).any(|_| !is_mapped()));
    }
}
