//! One vCPU: its start state, its exits, and the kick that gets it out of the guest.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::arch::{self, Platform, Start};
use super::layout::{self, DOORBELL_BYTES};
use super::memory::GuestMemory;
use crate::PAGE_SIZE;

/// Why a vCPU left the guest, where that is no fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Its dirty ring is full to the soft limit.
    RingFull,
    /// The guest has nothing to do for now.
    Doorbell,
    /// A kick or another signal; the request to exit is taken back.
    Interrupted,
}

/// A vCPU in the guest's start state, or running.
#[derive(Debug)]
pub struct GuestCpu {
    fd: VcpuFd,
    index: usize,
    tsc_hz: u64,
    doorbell: u64,
    kicker: Kicker,
    // The VM writes it for as long as the vCPU runs.
    _memory: Arc<GuestMemory>,
}

impl GuestCpu {
    /// Puts a new vCPU at the image's first byte.
    pub(super) fn new(
        fd: VcpuFd,
        index: usize,
        platform: &Platform,
        start: Start,
        memory: &Arc<GuestMemory>,
    ) -> Result<Self> {
        platform.start(&fd, start).with_context(|| format!("vCPU {index}: cannot set its start state"))?;
        let kicker =
            Kicker(Arc::new(RunPage::map(&fd).with_context(|| format!("vCPU {index}: cannot map its run page"))?));
        let tsc_hz = arch::tsc_hz(&fd);
        Ok(Self { fd, index, tsc_hz, doorbell: memory.bytes() as u64, kicker, _memory: memory.clone() })
    }

    /// The vCPU's descriptor, for whoever maps its ring.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The vCPU's id.
    pub fn index(&self) -> usize {
        self.index
    }

    /// TSC ticks in a second, as the guest sees them.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// `time` in TSC ticks, rounded down.
    pub fn ticks(&self, time: Duration) -> u64 {
        layout::ticks(time, self.tsc_hz)
    }

    /// What gets this vCPU out of the guest, for other threads.
    pub fn kicker(&self) -> Kicker {
        self.kicker.clone()
    }

    /// Makes the calling thread the one that [`Kicker::kick`] signals. Call it on the vCPU's thread, before it runs.
    pub fn bind_to_this_thread(&self) {
        install_kick_handler();
        // SAFETY: the set is made by sigemptyset before it is used, and only this thread's mask changes.
        let thread = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGRTMIN());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
            libc::gettid()
        };
        // SAFETY: an attribute of this thread. Its sleeps, pauses too, else end up to 50 µs late; QEMU sets the same.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
        // SeqCst with `kick`: either it sees the thread, or this thread's next KVM_RUN sees the request to exit.
        self.kicker.0.thread.store(thread, Ordering::SeqCst);
    }

    /// Has KVM keep the time stolen from this vCPU at the guest-physical `address`, as a Linux guest asks it to. KVM then
    /// writes there, and logs that page, at nearly every entry and exit.
    ///
    /// # Errors
    /// A host that does not count stolen time; an address that is no multiple of 64, or has no memory.
    pub fn enable_steal_time(&self, address: u64) -> Result<()> {
        let index = self.index;
        let in_memory = address % 64 == 0 && address < self.doorbell;
        ensure!(in_memory, "vCPU {index}: no place for the stolen time: {address:#x}");
        arch::enable_steal_time(&self.fd, address).with_context(|| format!("vCPU {index}"))
    }

    /// Runs the guest until something happens.
    ///
    /// # Errors
    /// Whatever ends the guest: a fault, an access outside its memory, or an
    /// exit that has no place here. The vCPU must not be run again.
    pub fn run(&mut self) -> Result<Exit> {
        let doorbell = self.doorbell..self.doorbell + DOORBELL_BYTES;
        let what = match self.fd.run() {
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => return Ok(Exit::RingFull),
            Ok(VcpuExit::MmioWrite(address, _)) if doorbell.contains(&address) => return Ok(Exit::Doorbell),
            Ok(VcpuExit::MmioWrite(address, _) | VcpuExit::MmioRead(address, _)) => {
                anyhow!("it reached for {address:#x}, where the guest has no memory")
            }
            Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => anyhow!(arch::FAULT),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                anyhow!("CPU {cpu} refused to enter the guest (hardware reason {reason:#x})")
            }
            Ok(VcpuExit::InternalError) => {
                let run = self.fd.get_kvm_run();
                // SAFETY: every bit pattern is a u32, and KVM filled this part of the union for this exit.
                let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
                anyhow!("KVM could not run the payload (internal error, suberror {suberror})")
            }
            Ok(exit) => anyhow!("an exit that this guest has no use for: {exit:?}"),
            Err(error) if error.errno() == libc::EINTR => {
                self.kicker.0.immediate_exit().store(0, Ordering::SeqCst);
                return Ok(Exit::Interrupted);
            }
            Err(error) if error.errno() == libc::EAGAIN => return Ok(Exit::Interrupted),
            Err(error) => anyhow!("KVM_RUN: {error}"),
        };
        Err(what.context(format!("vCPU {} stopped{}", self.index, arch::place(&self.fd))))
    }
}

impl Drop for GuestCpu {
    fn drop(&mut self) {
        self.kicker.0.thread.store(0, Ordering::SeqCst);
    }
}

/// Gets one vCPU out of the guest. Any thread may hold and use it, also after the vCPU is gone.
#[derive(Clone, Debug)]
pub struct Kicker(Arc<RunPage>);

impl Kicker {
    /// Ends the vCPU's current or next `KVM_RUN` with [`Exit::Interrupted`]; a second kick before that is no other.
    ///
    /// Set what the vCPU shall find (a flag to stop) first. Async-signal-safe.
    pub fn kick(&self) {
        self.0.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.0.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // A thread id that was given to another thread of this process meanwhile costs that one an EINTR, no more.
            // SAFETY: sends a signal whose handler does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGRTMIN()) };
        }
    }
}

/// The first page of `kvm_run`, mapped once more so that other threads reach the request to exit.
#[derive(Debug)]
struct RunPage {
    page: NonNull<u8>,
    /// The vCPU's thread, 0 for none.
    thread: AtomicI32,
}

// SAFETY: the mapping belongs to the value, and only one byte of it is used, as an atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(fd: &impl AsRawFd) -> io::Result<Self> {
        let fd: RawFd = fd.as_raw_fd();
        // SAFETY: a new mapping at an address that the kernel chooses touches no memory in use.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        match NonNull::new(page.cast()) {
            Some(mapped) if page != libc::MAP_FAILED => Ok(Self { page: mapped, thread: AtomicI32::new(0) }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte is inside the mapping, which lives as long as `self`; the kernel only reads it, and the
        // kvm-ioctls mapping of the same page is never used to write it.
        unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(std::mem::offset_of!(kvm_run, immediate_exit))) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this size; no reference into it outlives `self`.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE_SIZE as usize) };
    }
}

/// The kick signal only has to interrupt, so its handler does nothing; without one it would end the process.
fn install_kick_handler() {
    extern "C" fn nothing(_: libc::c_int) {}
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the action is zeroed, then given a handler that touches nothing; no SA_RESTART, so calls return EINTR.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
            libc::sigaction(libc::SIGRTMIN(), &raw const action, std::ptr::null_mut());
        }
    });
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// A machine without KVM, a user who may not use it, or a kernel whose KVM speaks another API: each says what to do.
pub fn open() -> Result<kvm_ioctls::Kvm> {
    let kvm = kvm_ioctls::Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => {
            anyhow!("this machine has no usable /dev/kvm ({error}): load the kvm module, or enable virtualisation")
        }
        libc::EACCES | libc::EPERM => {
            anyhow!("this user may not open /dev/kvm ({error}): join the group that owns it, or run as root")
        }
        _ => anyhow!("cannot open /dev/kvm: {error}"),
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        ..0 => bail!("/dev/kvm opens but does not answer as KVM does: it is another device"),
        other => bail!("/dev/kvm speaks version {other} of the KVM API; this program needs version 12"),
    }
}
