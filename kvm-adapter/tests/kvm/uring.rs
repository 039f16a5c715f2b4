//! An `io_uring` of the thread that resets: what completes interrupts a reset, and no mask of signals keeps it out.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dirtylimit_kvm::{Config, PlantedBug};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Load, SLOT, kvm_or_skip};

use crate::common::{Copy, machine, vcpu};
use crate::rig::Watchdog;
use crate::stopped::{PAGE, alone};

/// Timeouts at once.
const ENTRIES: u32 = 64;
/// Time from the end of one to the end of the next, in ns.
const APART: i64 = 40_000;
/// Of the mapping that holds both queues; for so few entries it is far less.
const BYTES: usize = 4 << 12;

/// The words of `struct io_uring_params`, and where its offsets lie.
type Params = [u32; 30];
const FEATURES: usize = 5;
const SUBMITTED_TAIL: usize = 11;
const ARRAY: usize = 16;
const COMPLETED_HEAD: usize = 20;
const COMPLETED_TAIL: usize = 21;

/// The head of `struct io_uring_sqe`.
#[repr(C)]
struct Request {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    address: u64,
    length: u32,
    rest: [u32; 9],
}

/// Timeouts of an `io_uring` of the calling thread, without any of the flags by which completions would wait for it.
struct Timeouts {
    ring: OwnedFd,
    params: Params,
    queues: NonNull<libc::c_void>,
    requests: NonNull<libc::c_void>,
    pending: u32,
}

impl Timeouts {
    /// `None` where there is no `io_uring`.
    fn new() -> Result<Option<Self>> {
        const SINGLE_MMAP: u32 = 1;
        const REQUESTS: i64 = 0x1000_0000;
        let mut params: Params = [0; 30];
        // SAFETY: the call reads and writes `params`, which is as large as its struct.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, &raw mut params) };
        if fd < 0 {
            let _ = writeln!(io::stderr(), "SKIPPED: there is no io_uring: {}", io::Error::last_os_error());
            return Ok(None);
        }
        // SAFETY: a new descriptor, and ours.
        let ring = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
        ensure!(params[FEATURES] & SINGLE_MMAP != 0, "a kernel before Linux 5.4");
        let map = |offset| {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let start =
                unsafe { libc::mmap(null_mut(), BYTES, protection, libc::MAP_SHARED, ring.as_raw_fd(), offset) };
            ensure!(start != libc::MAP_FAILED, "mapping the io_uring: {}", io::Error::last_os_error());
            NonNull::new(start).context("mapped at 0")
        };
        let (queues, requests) = (map(0)?, map(REQUESTS)?);
        Ok(Some(Self { ring, params, queues, requests, pending: 0 }))
    }

    /// The word of the queues at the offset that the parameters have at `field`, and `index` words on.
    fn word(&self, field: usize, index: u32) -> &AtomicU32 {
        // SAFETY: the offsets are the kernel's, within the mapping, which lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.queues.as_ptr().byte_add((self.params[field] + 4 * index) as usize).cast()) }
    }

    /// Makes as many timeouts as have ended, from now on; returns how many those were.
    fn renew(&mut self) -> Result<u32> {
        const TIMEOUT: u8 = 11;
        let completed = self.word(COMPLETED_TAIL, 0).load(Ordering::Acquire);
        let ended = completed.wrapping_sub(self.word(COMPLETED_HEAD, 0).swap(completed, Ordering::Release));
        self.pending -= ended;
        let (count, tail) = (ENTRIES - self.pending, self.word(SUBMITTED_TAIL, 0).load(Ordering::Relaxed));
        let times: Vec<_> = (1..=count).map(|nth| [0, i64::from(nth) * APART]).collect();
        for (nth, time) in (0..count).zip(&times) {
            let index = tail.wrapping_add(nth) % ENTRIES;
            let request = Request {
                opcode: TIMEOUT,
                flags: 0,
                priority: 0,
                fd: -1,
                offset: 0,
                address: time.as_ptr().addr() as u64,
                length: 1,
                rest: [0; 9],
            };
            // SAFETY: there are `ENTRIES` of them in the mapping, and the kernel has read those before the tail.
            unsafe { self.requests.as_ptr().cast::<Request>().add(index as usize).write(request) };
            self.word(ARRAY, index).store(index, Ordering::Relaxed);
        }
        self.word(SUBMITTED_TAIL, 0).store(tail.wrapping_add(count), Ordering::Release);
        // SAFETY: the requests and the times that they point to are valid; the kernel copies both in this call.
        let submitted =
            unsafe { libc::syscall(libc::SYS_io_uring_enter, self.ring.as_raw_fd(), count, 0, 0, null_mut::<u8>(), 0) };
        ensure!(submitted == i64::from(count), "{submitted} of {count} submitted: {}", io::Error::last_os_error());
        self.pending += count;
        Ok(ended)
    }
}

impl Drop for Timeouts {
    fn drop(&mut self) {
        for mapping in [self.queues, self.requests] {
            // SAFETY: our own mapping, which nobody borrows any more.
            unsafe { libc::munmap(mapping.as_ptr(), BYTES) };
        }
    }
}

/// One thread runs the guest, resets and copies, while timeouts of its `io_uring` end, until 20 resets were short or a page was
/// lost. Returns how many resets were short, and how many pages are lost; `None` where there is no `io_uring`.
fn completions(bug: Option<PlantedBug>) -> Result<Option<(u64, usize)>> {
    const PAGES: u64 = 8192;
    let config = Config::new().ring_entries(4096);
    let config = if let Some(bug) = bug { config.planted_bug(bug) } else { config };
    let (machine, limit) = machine(&[Load::new(Mode::Write, PAGES * PAGE)], &config)?;
    let mut vcpu = vcpu(&machine, &limit, 0)?;
    let mut copy = Copy::new(machine.memory());
    let Some(mut timeouts) = Timeouts::new()? else { return Ok(None) };
    let (end, mut ended) = (Instant::now() + Duration::from_secs(60), 0);
    loop {
        let goal = machine.stats(0).accesses() + PAGES;
        while machine.stats(0).accesses() < goal {
            _ = vcpu.1.before_run()?;
            vcpu.0.run()?;
        }
        ended += timeouts.renew()?;
        copy.take(&limit.last_round().and_then(|round| round.take(SLOT))?)?;
        let (short, lost) = (limit.stats().suspect_resets, copy.lost());
        if lost > 0 || short >= 20 || Instant::now() >= end {
            eprintln!("{bug:?}: {ended} timeouts ended, {short} resets were short, {lost} pages lost");
            ensure!(ended > 0 || lost > 0, "no timeout has ended");
            return Ok(Some((short, lost)));
        }
    }
}

#[test]
fn an_io_uring_of_the_resetting_thread_costs_no_page_although_it_interrupts_resets() {
    if !kvm_or_skip() {
        return;
    }
    let _alone = alone();
    let _watchdog = Watchdog::new(Duration::from_secs(300));
    let Some((short, lost)) = completions(None).unwrap() else { return };
    assert_eq!(lost, 0);
    if short == 0 {
        let _ = writeln!(io::stderr(), "SKIPPED: nothing interrupts the resets of this kernel (before Linux 6.17)");
        return;
    }
    let trusting = completions(Some(PlantedBug::TrustSuspects)).unwrap();
    assert!(trusting.is_some_and(|(_, lost)| lost > 0), "it does no harm, so this test shows nothing");
}
