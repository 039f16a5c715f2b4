//! The threads of a run: one per vCPU, and the one that copies dirty pages as a migration would.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, ensure};
use dirtylimit_kvm::{DirtyLimit, Vcpu};

use super::{Exit, GuestCpu, Kicker, SLOT, affinity};
use dirtylimit_test_vm::Shadow;

/// How long a vCPU rests when its guest says that it has nothing to do.
const REST: Duration = Duration::from_millis(1);
/// A vCPU that has not stopped by then never will.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// A vCPU with its limiter.
pub(crate) type Limited = (GuestCpu, Vcpu);

/// The vCPUs, running. Dropping it stops them.
#[derive(Debug)]
pub(crate) struct Vcpus {
    stop: Arc<AtomicBool>,
    threads: Vec<VcpuThread>,
}

#[derive(Debug)]
struct VcpuThread {
    /// Gives the vCPU back, so that its ring is mapped until the last sync is done.
    handle: JoinHandle<Result<Limited>>,
    kicker: Kicker,
    held: Arc<AtomicBool>,
}

impl Vcpus {
    /// Starts every vCPU, each on its CPU of `pins` where there is one.
    pub(crate) fn start(vcpus: Vec<Limited>, pins: Option<&[usize]>) -> Result<Self> {
        let mut started = Self { stop: Arc::default(), threads: Vec::with_capacity(vcpus.len()) };
        for (cpu, vcpu) in vcpus {
            let (index, kicker, stop) = (cpu.index(), cpu.kicker(), started.stop.clone());
            let held = Arc::new(AtomicBool::new(false));
            let hold = held.clone();
            let pin = pins.and_then(|pins| pins.get(index).copied());
            let handle = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || drive((cpu, vcpu), pin, &stop, &hold))
                .with_context(|| format!("cannot start the thread of vCPU {index}"))?;
            started.threads.push(VcpuThread { handle, kicker, held });
        }
        Ok(started)
    }

    /// An error if a vCPU has ended, which none does unasked but by failing.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self.threads.iter().position(|thread| thread.handle.is_finished()) {
            Some(index) => Err(join(self.threads.swap_remove(index).handle)
                .map_or_else(|error| error, |_| anyhow!("vCPU {index} ended by itself"))),
            None => Ok(()),
        }
    }

    /// Keeps the chosen vCPUs out of the guest until told otherwise, and lets all others run.
    pub(crate) fn hold(&self, held: impl Fn(usize) -> bool) {
        for (index, thread) in self.threads.iter().enumerate() {
            // Relaxed: the flag publishes nothing but itself; the kick is a system call, and a token wakes who parks late.
            if held(index) && !thread.held.swap(true, Relaxed) {
                thread.kicker.kick();
            } else if !held(index) && thread.held.swap(false, Relaxed) {
                thread.handle.thread().unpark();
            }
        }
    }

    /// Gets every vCPU out of the guest, for good, and gives them back.
    pub(crate) fn stop(mut self) -> Result<Vec<Limited>> {
        self.halt()?;
        self.threads.drain(..).map(|thread| join(thread.handle)).collect()
    }

    fn halt(&self) -> Result<()> {
        // Relaxed: the flag publishes nothing but itself, and the kick is a system call.
        self.stop.store(true, Relaxed);
        let deadline = Instant::now() + STOP_PATIENCE;
        while let Some(stuck) = self.threads.iter().position(|thread| !thread.handle.is_finished()) {
            ensure!(Instant::now() < deadline, "vCPU {stuck} does not stop: it was kicked for {STOP_PATIENCE:?}");
            for thread in self.threads.iter().filter(|thread| !thread.handle.is_finished()) {
                // The limiter sees the request to exit too, so a pause ends as a KVM_RUN does.
                thread.kicker.kick();
                thread.handle.thread().unpark();
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        // Only reached with threads when a run fails, which has its error already.
        let _ = self.halt();
    }
}

/// What a VMM's vCPU thread does: pay, run, serve.
fn drive((mut cpu, mut vcpu): Limited, pin: Option<usize>, stop: &AtomicBool, held: &AtomicBool) -> Result<Limited> {
    if let Some(pin) = pin {
        // Only fairness hangs on it, so a system that does not let us pin is no error.
        let _ = affinity::pin(&[pin]);
    }
    cpu.bind_to_this_thread();
    let index = cpu.index();
    while !stop.load(Relaxed) {
        if held.load(Relaxed) {
            thread::park();
            continue;
        }
        // Signals are not blocked outside KVM_RUN here, so whatever ended a pause is over.
        _ = vcpu.before_run().with_context(|| format!("vCPU {index}: serving its ring"))?;
        match cpu.run()? {
            Exit::RingFull => {}
            Exit::Doorbell => thread::sleep(REST),
            Exit::Interrupted => {}
        }
    }
    Ok((cpu, vcpu))
}

/// The copying thread.
#[derive(Debug)]
pub(super) struct Copier {
    /// `None` once its error has been told.
    thread: Option<JoinHandle<Result<Shadow>>>,
    host_writes: Sender<usize>,
}

impl Copier {
    /// Makes a pass over the dirty log every `interval`, and copies what it published into `shadow`.
    pub(super) fn start(limit: DirtyLimit, mut shadow: Shadow, interval: Duration) -> Result<Self> {
        let (host_writes, written) = mpsc::channel();
        let copy = move || {
            let mut next = Instant::now() + interval;
            loop {
                match written.recv_timeout(next.saturating_duration_since(Instant::now())) {
                    Ok(page) => shadow.host_wrote(page),
                    Err(RecvTimeoutError::Timeout) => {
                        let log = limit.round().and_then(|round| round.take(SLOT));
                        shadow.copy(&log.context("a round of the dirty log")?)?;
                        next = (next + interval).max(Instant::now());
                    }
                    Err(RecvTimeoutError::Disconnected) => return Ok(shadow),
                }
            }
        };
        let thread = thread::Builder::new().name("copier".to_owned()).spawn(copy).context("cannot start the copier")?;
        Ok(Self { thread: Some(thread), host_writes })
    }

    /// Tells it of a page that the host wrote.
    pub(super) fn host_wrote(&self, page: usize) {
        // A copier that is gone has failed, which `check` tells.
        let _ = self.host_writes.send(page);
    }

    /// An error if it has ended, which it does not unasked but by failing.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.thread.take_if(|thread| thread.is_finished()) {
            Some(thread) => Err(join(thread).map_or_else(|error| error, |_| anyhow!("the copier ended by itself"))),
            None => Ok(()),
        }
    }

    /// Ends it and gives the copy back.
    pub(super) fn finish(self) -> Result<Shadow> {
        drop(self.host_writes);
        join(self.thread.context("the copier has failed")?)
    }
}

fn join<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    let name = thread.thread().name().unwrap_or("unnamed").to_owned();
    thread.join().unwrap_or_else(|_| Err(Error::msg(format!("the thread {name} panicked"))))
}
