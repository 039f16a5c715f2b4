//! KVM's dirty ring served by hand, as simply as can be: what the probe looks at, and what tests compare the adapter with.
//! It limits nothing.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::PAGE_SIZE;

const ENTRY_BYTES: usize = size_of::<kvm_dirty_gfn>();
const DIRTY: u32 = 1;
const COLLECTED: u32 = 2;

/// Gives every vCPU that `vm` will have a ring of `entries`, and says by which capability.
///
/// # Errors
/// A host without a dirty ring, or what KVM says to this size (or to a VM that has vCPUs, or a ring, already).
pub fn enable(vm: &VmFd, entries: u32) -> Result<u32> {
    for cap in [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING] {
        if vm.check_extension_raw(u64::from(cap)) > 0 {
            let mut request = kvm_enable_cap { cap, ..Default::default() };
            request.args[0] = u64::from(entries) * ENTRY_BYTES as u64;
            vm.enable_cap(&request).with_context(|| format!("KVM refused a dirty ring of {entries} entries"))?;
            // Without the bitmap KVM of 64-bit Arm protects no page, so the ring stays empty.
            if vm.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)) > 0 {
                let bitmap =
                    kvm_enable_cap { cap: kvm_bindings::KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, ..Default::default() };
                vm.enable_cap(&bitmap).context("KVM refused the bitmap beside the ring")?;
            }
            return Ok(cap);
        }
    }
    bail!("this host's KVM offers no dirty ring (capabilities 192 and 223)")
}

/// Re-arms every collected entry of all rings of the VM, and says how many there were.
///
/// # Errors
/// What the ioctl answers.
pub fn reset(vm: &VmFd) -> io::Result<u32> {
    const KVM_RESET_DIRTY_RINGS: libc::c_ulong = 0xaec7;
    // SAFETY: the sets are filled before they are used, and the mask is put back as it was. A reset that finds a
    // signal pending stops early and forgets pages, hence the block.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
        let answer = libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0);
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        u32::try_from(answer).map_err(|_| error)
    }
}

/// One vCPU's ring.
#[derive(Debug)]
pub struct RawRing {
    start: NonNull<kvm_dirty_gfn>,
    entries: usize,
    next: usize,
}

// SAFETY: the mapping belongs to the value; `collect` needs it exclusively, `dirty` only loads atomically.
unsafe impl Send for RawRing {}

impl RawRing {
    /// Maps the ring of a vCPU whose VM has rings of `entries`.
    ///
    /// # Errors
    /// What mmap says, such as for a VM without a ring.
    pub fn map(vcpu: &VcpuFd, entries: u32) -> Result<Self> {
        let entries = entries as usize;
        ensure!(entries > 0, "a ring of 0 entries cannot be mapped");
        let offset = libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * libc::off_t::from(PAGE_SIZE);
        // SAFETY: a new mapping at an address that the kernel chooses touches no memory in use.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                entries * ENTRY_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("cannot map the dirty ring");
        }
        Ok(Self { start: NonNull::new(start.cast()).context("mmap returned address 0")?, entries, next: 0 })
    }

    /// Entries that are logged and not collected.
    pub fn dirty(&self) -> usize {
        (0..self.entries).take_while(|ahead| self.flags(self.next + ahead).load(Ordering::Acquire) == DIRTY).count()
    }

    /// Marks every logged entry collected, hands each out as (slot, page), and says how many there were. The pages are
    /// armed again only by [`reset`], so copy them after it.
    pub fn collect(&mut self, mut page: impl FnMut(u32, u64)) -> usize {
        let mut count = 0;
        // At most one round, so that a guest that goes on logging cannot keep this loop for ever.
        while count < self.entries {
            let flags = self.flags(self.next);
            if flags.load(Ordering::Acquire) != DIRTY {
                break;
            }
            // SAFETY: the index is inside the ring, and the kernel leaves a dirty entry alone until it is collected.
            let entry = unsafe { self.start.add(self.next % self.entries).read() };
            page(entry.slot, entry.offset);
            flags.store(COLLECTED, Ordering::Release);
            self.next = (self.next + 1) % self.entries;
            count += 1;
        }
        count
    }

    fn flags(&self, index: usize) -> &AtomicU32 {
        const { assert!(std::mem::offset_of!(kvm_dirty_gfn, flags) == 0) };
        // SAFETY: the index is inside the ring, and an entry begins with its aligned flags, which both sides use as an
        // atomic.
        unsafe { AtomicU32::from_ptr(self.start.add(index % self.entries).as_ptr().cast()) }
    }
}

impl Drop for RawRing {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this size; no reference into it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.entries * ENTRY_BYTES) };
    }
}
