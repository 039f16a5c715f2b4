//! The ioctls on a VM's descriptor, which no crate wraps, behind a trait, so that tests can be the kernel.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use kvm_bindings::{kvm_dirty_log, kvm_enable_cap};

use super::SignalsBlocked;
use super::guarded::Guarded;

/// What one reset did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reset {
    /// Entries given back, over all rings of the VM, whoever collected them.
    pub(crate) entries: u32,
    /// The thread gave up its CPU by itself on the way, as one does that is stopped, traced or frozen, which no mask
    /// prevents; or nobody can tell. Then pages may have been left unprotected although every entry is counted. That it was
    /// preempted is no such sign: the kernel goes on where it was.
    pub(crate) disturbed: bool,
}

/// A VM, as far as the dirty ring goes.
pub(crate) trait Kernel: std::fmt::Debug + Send + Sync {
    /// `KVM_CHECK_EXTENSION`: 0 where `capability` is not offered.
    fn check(&self, capability: u32) -> io::Result<u32>;
    /// `KVM_ENABLE_CAP` with one argument.
    fn enable(&self, capability: u32, argument: u64) -> io::Result<()>;
    /// `KVM_RESET_DIRTY_RINGS`, with every signal blocked.
    fn reset(&self) -> io::Result<Reset>;
    /// `KVM_GET_DIRTY_LOG`: ORs the slot's backup bitmap into `words` and clears it. `EFAULT` where the slot has more pages in
    /// KVM than `words` has bits: then the bitmap was cleared and is lost.
    fn backup_log(&self, slot: u32, words: &mut [u64]) -> io::Result<()>;
}

const fn kvmio(number: u64) -> libc::Ioctl {
    (0xAE00 | number) as libc::Ioctl
}

/// `_IOW(KVMIO, number, T)`, as most architectures encode it; the two KVM ones among the rest (mips, powerpc) do not
/// have dirty rings.
pub(super) const fn kvmio_write<T>(number: u64) -> libc::Ioctl {
    (1 << 30 | (size_of::<T>() as u64) << 16 | 0xAE00 | number) as libc::Ioctl
}

const KVM_CHECK_EXTENSION: libc::Ioctl = kvmio(0x03);
const KVM_RESET_DIRTY_RINGS: libc::Ioctl = kvmio(0xC7);
const KVM_ENABLE_CAP: libc::Ioctl = kvmio_write::<kvm_enable_cap>(0xA3);
const KVM_GET_DIRTY_LOG: libc::Ioctl = kvmio_write::<kvm_dirty_log>(0x42);

/// The kernel's own.
#[derive(Debug)]
pub(crate) struct VmFd(OwnedFd);

impl VmFd {
    /// A duplicate of the VM's descriptor, so that ours stays open on its own.
    pub(crate) fn duplicate(vm: &impl AsRawFd) -> io::Result<Self> {
        // SAFETY: borrowed for the call alone; an invalid descriptor makes it fail.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(checked(vm.as_raw_fd())?) }.try_clone_to_owned().map(Self)
    }

    /// # Safety
    /// `argument` must be what `request` takes.
    unsafe fn ioctl(&self, request: libc::Ioctl, argument: u64) -> io::Result<u32> {
        // SAFETY: the caller's promise.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) };
        u32::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// [`Kernel::reset`] with the signal mask that the thread has.
    pub(super) fn reset_as_it_is(&self) -> io::Result<Reset> {
        let before = voluntary_switches();
        // SAFETY: takes nothing.
        let entries = unsafe { self.ioctl(KVM_RESET_DIRTY_RINGS, 0) }?;
        Ok(Reset { entries, disturbed: before.is_none() || voluntary_switches() != before })
    }
}

/// -1 is no descriptor, and must not be borrowed.
fn checked(fd: RawFd) -> io::Result<RawFd> {
    if fd < 0 { Err(io::Error::from_raw_os_error(libc::EBADF)) } else { Ok(fd) }
}

impl Kernel for VmFd {
    fn check(&self, capability: u32) -> io::Result<u32> {
        // SAFETY: takes a number.
        unsafe { self.ioctl(KVM_CHECK_EXTENSION, capability.into()) }
    }

    fn enable(&self, capability: u32, argument: u64) -> io::Result<()> {
        let cap = kvm_enable_cap { cap: capability, args: [argument, 0, 0, 0], ..Default::default() };
        // SAFETY: takes a pointer to the struct, which it reads.
        unsafe { self.ioctl(KVM_ENABLE_CAP, (&raw const cap).addr() as u64) }.map(drop)
    }

    fn reset(&self) -> io::Result<Reset> {
        let _blocked = SignalsBlocked::new();
        self.reset_as_it_is()
    }

    fn backup_log(&self, slot: u32, words: &mut [u64]) -> io::Result<()> {
        let mut log = Guarded::new(words.len())?;
        let mut request = kvm_dirty_log { slot, ..Default::default() };
        request.__bindgen_anon_1.dirty_bitmap = log.start();
        // SAFETY: takes a pointer to the struct; it writes the bits of KVM's slot to the bitmap, as many as that has, which
        // `Guarded` has room for or refuses.
        unsafe { self.ioctl(KVM_GET_DIRTY_LOG, (&raw const request).addr() as u64) }?;
        words.iter_mut().zip(log.words()).for_each(|(word, more)| *word |= more);
        Ok(())
    }
}

/// How often this thread gave up its CPU by itself; `None` where that is not told (seccomp).
fn voluntary_switches() -> Option<libc::c_long> {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: getrusage initialises `usage` where it returns 0, and is asked for what it wrote only then.
    unsafe { (libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) == 0).then(|| usage.assume_init().ru_nvcsw) }
}
