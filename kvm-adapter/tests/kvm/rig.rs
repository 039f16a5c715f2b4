//! A guest at work, for faults to be thrown at: a thread for each vCPU, one that copies the guest as a migration does, and
//! the throttle thread. Whatever is done to it, [`Rig::finish`] says how many pages the copy has wrong.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};
use dirtylimit_kvm::{Config, DirtyLimit, ThrottleThread};
use dirtylimit_test_vm::payload;
use dirtylimit_test_vm::{Exit, GuestCpu, Kicker, Load, Machine};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};

use crate::common::{Copy, Limited, drive, here};

/// What does not end within that time hangs, on a fast machine.
const PATIENCE: Duration = Duration::from_secs(20);
const TICK: Duration = Duration::from_millis(10);

/// How the guest is copied.
#[derive(Clone, std::marker::Copy, PartialEq, Eq, Debug)]
pub(crate) enum Copying {
    /// By running passes, each fourth time by a complete take.
    Right,
    /// By running passes alone, which leave limited vCPUs inside their slices.
    Passes,
    /// As [`Copying::Right`], but what is sent was read before the pages were protected again: it loses pages, and so shows
    /// that a test notices.
    TooEarly,
}

/// Ends the process when it is not dropped in time, so that a hang is a failure with a name.
#[derive(Debug)]
pub(crate) struct Watchdog(#[expect(dead_code, reason = "dropping it is what ends the watch")] Sender<()>);

impl Watchdog {
    /// `time` is a fast machine's.
    pub(crate) fn new(time: Duration) -> Self {
        let time = here(time);
        let (alive, watched) = mpsc::channel::<()>();
        let test = thread::current().name().unwrap_or("unnamed").to_owned();
        thread::spawn(move || {
            if watched.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout) {
                // The raw descriptor: what the test runner captures is lost with the process.
                let _ = writeln!(std::io::stderr(), "{test} HANGS: it was to end within {time:?}");
                std::process::abort();
            }
        });
        Self(alive)
    }
}

/// The guest, at work. Each vCPU's memory is a slot of its own, with the vCPU's number; slot 0 has what all of them need, too.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(crate) limit: DirtyLimit,
    pub(crate) machine: Arc<Machine>,
    vcpus: Vec<Place>,
    copies: Arc<Mutex<Copies>>,
    copier: Option<Worker<()>>,
    throttle: Option<ThrottleThread>,
    _watchdog: Watchdog,
}

/// The copy, and the slots that there are.
#[derive(Debug)]
pub(crate) struct Copies {
    pub(crate) copy: Copy,
    copying: Copying,
    slots: BTreeMap<u32, Range<usize>>,
}

impl Copies {
    /// Takes the log of each slot with `take`, and copies what it names.
    fn take(&mut self, take: impl Fn(u32) -> Result<Vec<u64>, dirtylimit_kvm::Error>) -> Result<()> {
        for (&slot, pages) in &self.slots {
            let read = (self.copying == Copying::TooEarly).then(|| {
                let read = self.copy.read();
                thread::sleep(Duration::from_millis(3));
                read
            });
            self.copy.take_at(pages.start, &take(slot)?, read.as_deref())?;
        }
        Ok(())
    }
}

/// Where a vCPU is.
#[derive(Debug)]
enum Place {
    Unborn,
    Still(GuestCpu),
    Running(Worker<GuestCpu>, Kicker),
}

/// A thread that runs until it is told to stop.
#[derive(Debug)]
struct Worker<T> {
    name: String,
    stop: Arc<AtomicBool>,
    tid: i32,
    thread: JoinHandle<Result<T>>,
}

impl<T: Send + 'static> Worker<T> {
    fn start(name: &str, work: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, (says, tid)) = (stop.clone(), mpsc::channel());
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            // SAFETY: takes nothing.
            says.send(unsafe { libc::gettid() })?;
            work(&stopped)
        })?;
        // A storm is for every thread: none is left out because it has not begun yet.
        Ok(Self { name: name.to_owned(), stop, tid: tid.recv()?, thread })
    }

    /// Stops it, `again` and again nudging it.
    fn stop(self, again: impl Fn()) -> Result<T> {
        let patience = here(PATIENCE);
        let deadline = Instant::now() + patience;
        self.stop.store(true, Relaxed);
        while !self.thread.is_finished() {
            if Instant::now() > deadline {
                bail!("{} hangs: it was told to stop {patience:?} ago", self.name);
            }
            again();
            thread::sleep(Duration::from_millis(1));
        }
        let name = self.name;
        self.thread.join().unwrap_or_else(|_| Err(Error::msg("panicked"))).context(name)
    }
}

impl Rig {
    /// A machine with these vCPUs, none of which runs yet, under ticks and copied all the time.
    pub(crate) fn new(loads: &[Load], config: &Config, copying: Copying) -> Result<Self> {
        let watchdog = Watchdog::new(15 * PATIENCE);
        let machine = Machine::new(loads, payload::image())?;
        let limit = DirtyLimit::enable(machine.vm(), config)?;
        let copies = Copies { copy: Copy::new(machine.memory()), copying, slots: BTreeMap::new() };
        let copies = Arc::new(Mutex::new(copies));
        let copier = {
            let (limit, copies) = (limit.clone(), copies.clone());
            Worker::start("copier", move |stop| copier(&limit, &copies, stop))?
        };
        let rig = Self {
            throttle: Some(limit.throttle_thread(TICK)?),
            limit,
            machine: Arc::new(machine),
            vcpus: loads.iter().map(|_| Place::Unborn).collect(),
            copies,
            copier: Some(copier),
            _watchdog: watchdog,
        };
        (0..loads.len()).try_for_each(|index| rig.add_slot(index))?;
        Ok(rig)
    }

    /// The same, with all vCPUs running.
    pub(crate) fn running(loads: &[Load], config: &Config, copying: Copying) -> Result<Self> {
        let mut rig = Self::new(loads, config, copying)?;
        (0..loads.len()).try_for_each(|index| rig.start(index))?;
        Ok(rig)
    }

    /// Starts a vCPU: plugs it in if it is not yet, or else goes on with it on a new thread, and a new handle on its ring.
    pub(crate) fn start(&mut self, index: usize) -> Result<()> {
        let cpu = match std::mem::replace(&mut self.vcpus[index], Place::Unborn) {
            Place::Unborn => self.birth(index)?,
            Place::Still(cpu) => cpu,
            running @ Place::Running(..) => {
                self.vcpus[index] = running;
                bail!("vCPU {index} runs already");
            }
        };
        let kicker = cpu.kicker();
        let vcpu = self.limit.add_vcpu(u32::try_from(index)?, cpu.fd())?;
        let thread = Worker::start(&format!("vcpu{index}"), move |stop| work((cpu, vcpu), stop))?;
        self.vcpus[index] = Place::Running(thread, kicker);
        Ok(())
    }

    /// A vCPU that has never run, without a handle.
    pub(crate) fn birth(&self, index: usize) -> Result<GuestCpu> {
        let cpu = self.machine.vcpu(index)?;
        // The host has written its parameters, which KVM does not log.
        self.copies().copy.refresh(0..WORKLOAD_PAGE);
        Ok(cpu)
    }

    /// Stops a vCPU: its thread ends, its handle is dropped, its ring stays.
    pub(crate) fn stop(&mut self, index: usize) -> Result<()> {
        match std::mem::replace(&mut self.vcpus[index], Place::Unborn) {
            Place::Running(thread, kicker) => {
                self.vcpus[index] = Place::Still(thread.stop(|| kicker.kick())?);
            }
            other => self.vcpus[index] = other,
        }
        Ok(())
    }

    /// The threads of the vCPUs and the copier.
    pub(crate) fn threads(&self) -> Vec<i32> {
        let vcpus = self.vcpus.iter().filter_map(|vcpu| match vcpu {
            Place::Running(thread, _) => Some(thread.tid),
            _ => None,
        });
        vcpus.chain(self.copier.iter().map(|copier| copier.tid)).collect()
    }

    /// Keeps the copier from taking logs for as long as it is held.
    fn copies(&self) -> MutexGuard<'_, Copies> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages of vCPU `index`'s slot.
    fn pages(&self, index: usize) -> Range<usize> {
        let start = |index| usize::try_from(self.machine.workload(index).start / 4096).unwrap();
        let from = if index == 0 { 0 } else { start(index) };
        from..if index + 1 < self.vcpus.len() { start(index + 1) } else { self.machine.memory().pages() }
    }

    /// Plugs a vCPU's slot in, as a VMM does: the limiter first.
    pub(crate) fn add_slot(&self, index: usize) -> Result<()> {
        let (slot, pages) = (u32::try_from(index)?, self.pages(index));
        let mut copies = self.copies();
        self.limit.add_slot(slot, pages.len() as u64)?;
        self.set_region(index, pages.len(), true)?;
        // A migration sends all of a new slot.
        copies.copy.refresh(pages.clone());
        copies.slots.insert(slot, pages);
        Ok(())
    }

    /// Unplugs the slot of a vCPU, which must not run (nor any, if it is slot 0), as a VMM does: the limiter first.
    pub(crate) fn remove_slot(&self, index: usize) -> Result<()> {
        let mut copies = self.copies();
        let slot = u32::try_from(index)?;
        copies.slots.remove(&slot);
        self.limit.remove_slot(slot)?;
        self.set_region(index, 0, false)?;
        copies.copy.refresh(self.pages(index));
        Ok(())
    }

    /// Stops every vCPU and protects all pages again, as a VMM does that wants none to be suspect.
    pub(crate) fn rearm(&mut self) -> Result<()> {
        for index in 0..self.vcpus.len() {
            self.stop(index)?;
        }
        let mut copies = self.copies();
        for index in 0..self.vcpus.len() {
            let (slot, pages) = (u32::try_from(index)?, self.pages(index));
            self.set_region(index, pages.len(), false)?;
            self.set_region(index, pages.len(), true)?;
            copies.copy.take_at(pages.start, &self.limit.last_round().and_then(|round| round.take(slot))?, None)?;
            self.limit.trust_slot(slot)?;
        }
        Ok(())
    }

    fn set_region(&self, index: usize, pages: usize, logged: bool) -> Result<()> {
        let first = self.pages(index).start as u64 * 4096;
        let region = kvm_userspace_memory_region {
            slot: u32::try_from(index)?,
            flags: if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: first,
            memory_size: pages as u64 * 4096,
            userspace_addr: self.machine.memory().host_address() + first,
        };
        // SAFETY: the region lies in the mapping of `memory`, which outlives every vCPU: each holds a reference to it.
        unsafe { self.machine.vm().set_user_memory_region(region) }.with_context(|| format!("slot {index}"))
    }

    /// Ends the throttle thread, or starts another.
    pub(crate) fn throttle(&mut self, on: bool) -> Result<()> {
        self.throttle = if on { Some(self.limit.throttle_thread(TICK)?) } else { None };
        Ok(())
    }

    /// An error if a thread has ended, which none does unasked but by failing.
    pub(crate) fn check(&mut self) -> Result<()> {
        for index in 0..self.vcpus.len() {
            if matches!(&self.vcpus[index], Place::Running(worker, _) if worker.thread.is_finished()) {
                self.stop(index)?;
                bail!("vCPU {index} ended by itself");
            }
        }
        match self.copier.take_if(|copier| copier.thread.is_finished()) {
            Some(copier) => copier.stop(|| ()),
            None => Ok(()),
        }
    }

    /// Lets it run on for a while.
    pub(crate) fn run_for(&mut self, time: Duration) -> Result<()> {
        thread::sleep(time);
        self.check()
    }

    /// Accesses of a vCPU so far.
    pub(crate) fn accesses(&self, index: usize) -> u64 {
        self.machine.stats(index).accesses()
    }

    /// Stops everything, takes the last log, and says how many pages the copy has wrong.
    pub(crate) fn finish(mut self) -> Result<usize> {
        for index in 0..self.vcpus.len() {
            self.stop(index)?;
        }
        if let Some(copier) = self.copier.take() {
            copier.stop(|| ())?;
        }
        self.throttle = None;
        let mut copies = self.copies();
        copies.take(|slot| self.limit.last_round().and_then(|round| round.take(slot)))?;
        Ok(copies.copy.lost())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Only reached with threads when a test fails, which has its error already.
        for index in 0..self.vcpus.len() {
            let _ = self.stop(index);
        }
        self.copier.take().map(|copier| copier.stop(|| ()));
    }
}

/// The first page of the workload's memory: what lies before it is the host's to lay out.
const WORKLOAD_PAGE: usize = (dirtylimit_test_vm::payload::WORKLOAD_ADDRESS / 4096) as usize;

/// A vCPU's thread.
fn work(mut limited: Limited, stop: &AtomicBool) -> Result<GuestCpu> {
    limited.0.bind_to_this_thread();
    drive(&mut limited, |exit| {
        if exit == Exit::Doorbell {
            thread::sleep(Duration::from_micros(200));
        }
        stop.load(Relaxed)
    })?;
    Ok(limited.0)
}

fn copier(limit: &DirtyLimit, copies: &Mutex<Copies>, stop: &AtomicBool) -> Result<()> {
    let copies = || copies.lock().unwrap_or_else(PoisonError::into_inner);
    for round in 0u32.. {
        if stop.load(Relaxed) {
            break;
        }
        thread::sleep(Duration::from_millis(3));
        if round % 4 == 0 && copies().copying != Copying::Passes {
            copies().take(|slot| limit.last_round().and_then(|round| round.take(slot)))?;
        } else {
            copies().take(|slot| limit.round().and_then(|round| round.take(slot)))?;
        }
    }
    Ok(())
}
