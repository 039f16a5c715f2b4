//! Mappings of a vCPU's descriptor: its dirty ring, and the page that KVM shares with its owner.

use std::io;
use std::mem::offset_of;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use dirtylimit_core::Entry;
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_INTR, kvm_run};

/// A shared mapping, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; what lies in it is read and written by atomics alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: RawFd, page: u32, bytes: usize, protection: i32) -> io::Result<Self> {
        let offset = i64::from(page) * i64::from(super::page_size());
        // SAFETY: a new mapping at an address of the kernel's choice touches none of ours.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, offset) };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => Ok(Self { start, bytes }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Mapping {
    /// Whether the file has the page at `offset`: who reads one that it has not gets a SIGBUS. The kernel, when it is to read
    /// the word there for a futex, answers with an error; it is given no time to wait.
    fn has(&self, offset: usize) -> bool {
        let over = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the word lies in the mapping, and is aligned; the kernel reads it, and a deadline that is over.
        let result = unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.start.as_ptr().wrapping_byte_add(offset),
                libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG,
                u32::MAX,
                &raw const over,
                std::ptr::null::<u32>(),
                libc::FUTEX_BITSET_MATCH_ANY,
            )
        };
        result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody borrows any more.
        unsafe { libc::munmap(self.start.as_ptr(), self.bytes) };
    }
}

/// A vCPU's dirty ring.
#[derive(Debug)]
pub(crate) struct RingPages {
    mapping: Mapping,
    entries: usize,
}

impl RingPages {
    /// Maps the ring of `entries` entries. It holds the vCPU's file, so the descriptor may be closed. `None` where the vCPU
    /// has no ring of that size.
    pub(crate) fn map(vcpu: RawFd, entries: u32) -> io::Result<Option<Self>> {
        let entries = entries as usize;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let mapping = Mapping::new(vcpu, KVM_DIRTY_LOG_PAGE_OFFSET, entries * size_of::<Entry>(), protection)?;
        // KVM maps what lies beyond a ring, too.
        let last = (entries - 1) * size_of::<Entry>();
        Ok((mapping.has(0) && mapping.has(last)).then_some(Self { mapping, entries }))
    }
}

impl AsRef<[Entry]> for RingPages {
    fn as_ref(&self) -> &[Entry] {
        // SAFETY: the mapping is page-aligned, holds `entries` entries in the kernel's layout (asserted in the core),
        // zeroed by the kernel, and lives as long as `self`. The kernel writes to it while we look, and every field is
        // an atomic.
        unsafe { slice::from_raw_parts(self.mapping.start.as_ptr().cast(), self.entries) }
    }
}

/// The vCPU's `kvm_run` page.
#[derive(Debug)]
pub(crate) struct RunPage(Mapping);

impl RunPage {
    pub(crate) fn map(vcpu: RawFd) -> io::Result<Self> {
        Mapping::new(vcpu, 0, super::page_size() as usize, libc::PROT_READ | libc::PROT_WRITE).map(Self)
    }

    /// Whether the next `KVM_RUN` shall return at once: set by a VMM's signal handler, or to complete pending I/O.
    pub(crate) fn immediate_exit(&self) -> bool {
        // SAFETY: the byte lies in the page, which lives as long as `self`; others write it while we look.
        let byte = unsafe { AtomicU8::from_ptr(self.at(offset_of!(kvm_run, immediate_exit))) };
        // Acquire: pairs with whatever release the VMM's handler makes; a flag by itself otherwise.
        byte.load(Ordering::Acquire) != 0
    }

    /// Whether the last `KVM_RUN` returned because the ring is full. For the vCPU's thread.
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        // Relaxed: KVM writes it in this thread's own system call.
        self.exit_reason().load(Ordering::Relaxed) == KVM_EXIT_DIRTY_RING_FULL
    }

    /// As [`RunPage::is_full`], and answers so once for each exit: a `KVM_RUN` that fails leaves the reason of the one
    /// before, so a full exit that was noted becomes an interrupted one (which says that there is nothing to do). Nobody
    /// but us has a use for that reason.
    pub(crate) fn take_full(&self) -> bool {
        let full = self.is_full();
        if full {
            // Relaxed: as above.
            self.exit_reason().store(KVM_EXIT_INTR, Ordering::Relaxed);
        }
        full
    }

    /// Whether `other` is a mapping of the same vCPU's: then a change of a byte that has no meaning shows there.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let [own, other] = [self, other].map(|page| {
            // SAFETY: the byte is the last of `padding1`, in the page, which lives as long as `self` and `other`.
            unsafe { AtomicU8::from_ptr(page.at(offset_of!(kvm_run, padding1) + 5)) }
        });
        // Relaxed: one thread's accesses to one byte, whatever its address.
        let before = other.load(Ordering::Relaxed);
        own.fetch_xor(1, Ordering::Relaxed);
        let is_same = other.load(Ordering::Relaxed) != before;
        own.fetch_xor(1, Ordering::Relaxed);
        is_same
    }

    fn exit_reason(&self) -> &AtomicU32 {
        // SAFETY: the word lies in the page, which lives as long as `self`, and is aligned; KVM writes it, in KVM_RUN.
        unsafe { AtomicU32::from_ptr(self.at(offset_of!(kvm_run, exit_reason)).cast()) }
    }

    /// The address of a byte of the page.
    fn at(&self, offset: usize) -> *mut u8 {
        self.0.start.as_ptr().cast::<u8>().wrapping_add(offset)
    }
}
