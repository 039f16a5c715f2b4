//! A vCPU in a long pause, to be interrupted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use dirtylimit_kvm::{Config, Decision, DirtyLimit, Interrupter, PageRate, ThrottleThread};

use crate::guest::kvm::{Kicker, Load, Machine, SLOT};
use dirtylimit_test_vm::payload::{self, Mode};

/// The longest pause that there is: interruptions come much sooner.
const PAUSE: Duration = Duration::from_secs(1);
/// Pages a second: one page is paid for in a second of pauses.
const LIMIT: u32 = 1;
/// A thread that has gone back to its pause is asleep by then.
const ASLEEP: Duration = Duration::from_millis(3);
/// What takes so long does not come.
const PATIENCE: Duration = Duration::from_secs(10);

/// A vCPU whose thread is in a penalty pause, again and again.
#[derive(Debug)]
pub struct Paused {
    interrupter: Interrupter,
    stop: Arc<AtomicBool>,
    kicker: Kicker,
    /// When the thread was back in the VMM from a pause that was interrupted.
    back: Receiver<Instant>,
    thread: Option<JoinHandle<Result<()>>>,
    _throttle: ThrottleThread,
    limit: DirtyLimit,
    _machine: Machine,
}

impl Paused {
    /// Starts a guest that writes, limits it to next to nothing, and waits until it is paused.
    ///
    /// # Errors
    /// What KVM and the limiter answer.
    pub fn new() -> Result<Self> {
        let machine = Machine::new(&[Load::new(Mode::Write, 16 << 20)], payload::image())?;
        let config = Config::new().ring_entries(1024).max_pause(PAUSE);
        let limit = DirtyLimit::enable(machine.vm(), &config)?;
        limit.add_slot(SLOT, machine.memory().pages() as u64)?;
        machine.plug_memory(true)?;
        let mut cpu = machine.vcpu(0)?;
        let mut vcpu = limit.add_vcpu(0, cpu.fd())?;
        limit.set_limit(0, PageRate::from_pages_per_sec(LIMIT))?;
        let throttle = limit.throttle_thread(Duration::from_millis(50))?;
        let (interrupter, kicker, stop) = (vcpu.interrupter(), cpu.kicker(), Arc::new(AtomicBool::new(false)));
        let (tell, back) = mpsc::channel();
        let stopped = stop.clone();
        let drive = move || {
            cpu.bind_to_this_thread();
            while !stopped.load(Relaxed) {
                let decision = vcpu.before_run()?;
                let now = Instant::now();
                if decision == Decision::Return && !stopped.load(Relaxed) {
                    // What was owed still is, so the next turn pauses on.
                    tell.send(now).context("nobody listens")?;
                } else {
                    cpu.run()?;
                }
            }
            Ok(())
        };
        let thread = thread::Builder::new().name("paused".into()).spawn(drive).context("cannot start the vCPU")?;
        let mut paused = Self {
            interrupter,
            stop,
            kicker,
            back,
            thread: Some(thread),
            _throttle: throttle,
            limit,
            _machine: machine,
        };
        // The first ring must fill and be served before anything is owed.
        let deadline = Instant::now() + PATIENCE;
        while paused.limit.query(0)?.totals.paused_us < 1000 {
            paused.interrupt()?;
            ensure!(Instant::now() < deadline, "the vCPU is never paused");
        }
        Ok(paused)
    }

    /// Interrupts the pause: the time from the call until the vCPU's thread is back in the VMM.
    ///
    /// # Errors
    /// The thread has failed, or does not come back.
    pub fn interrupt(&mut self) -> Result<Duration> {
        thread::sleep(ASLEEP);
        while self.back.try_recv().is_ok() {}
        let called = Instant::now();
        self.interrupter.interrupt();
        let back = self.back.recv_timeout(PATIENCE);
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.halt()?;
        }
        Ok(back.context("the vCPU does not come back from its pause")?.saturating_duration_since(called))
    }

    /// Ends the guest.
    ///
    /// # Errors
    /// What its thread had to say.
    pub fn stop(mut self) -> Result<()> {
        self.halt()
    }

    fn halt(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.stop.store(true, Relaxed);
        while !thread.is_finished() {
            self.interrupter.interrupt();
            self.kicker.kick();
            thread::sleep(Duration::from_millis(1));
        }
        thread.join().unwrap_or_else(|_| Err(anyhow!("the vCPU's thread panicked")))
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        // Only reached with a thread where there is an error already.
        let _ = self.halt();
    }
}
