//! The guest of either half: a machine, its vCPUs under the limiter, and its dirty log, which is off but for a migration.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dirtylimit_core::PageRate;
use dirtylimit_kvm::{Config, DirtyLimit, Round, Running, Stopped, ThrottleThread};
use dirtylimit_test_vm::payload;

use super::state::CpuState;
use crate::guest::kvm::{GuestMemory, Limited, Load, Machine, SLOT, Vcpus};

/// Interval of the throttle thread.
const TICK: Duration = Duration::from_millis(10);

/// A guest, stopped or running.
#[derive(Debug)]
pub(super) struct Guest {
    machine: Machine,
    limit: DirtyLimit,
    // Dropped before the machine and its throttle thread.
    running: Mutex<Option<Vcpus>>,
    stopped: Mutex<Vec<Limited>>,
    _throttle: ThrottleThread,
    vcpus: usize,
    tsc_hz: u64,
}

/// What all vCPUs did so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Work {
    /// Accesses of each vCPU, as the guest counts them.
    pub(super) accesses: Vec<u64>,
    /// Pages newly dirtied since each was last taken.
    pub(super) net: u64,
    /// Ring entries.
    pub(super) gross: u64,
    /// How long the limiter kept vCPUs paused, all together.
    pub(super) paused: Duration,
}

impl Guest {
    /// A guest that stands at its first instruction, with `memory` bytes.
    pub(super) fn new(loads: &[Load], image: &[u8], memory: u64, config: &Config) -> Result<Self> {
        let machine = Machine::with_ram(loads, image, memory)?;
        let limit = DirtyLimit::enable(machine.vm(), config).context("cannot enable the limiter")?;
        machine.plug_memory(false)?;
        let stopped = (0..loads.len())
            .map(|index| {
                let cpu = machine.vcpu(index)?;
                let vcpu = limit.add_vcpu(id(index), cpu.fd()).with_context(|| format!("cannot add vCPU {index}"))?;
                Ok((cpu, vcpu))
            })
            .collect::<Result<Vec<Limited>>>()?;
        machine.memory().populate(0..machine.memory().bytes());
        let throttle = limit.throttle_thread(TICK).context("cannot start the throttle thread")?;
        let tsc_hz = stopped.first().map_or(1, |(cpu, _)| cpu.tsc_hz());
        Ok(Self {
            machine,
            limit,
            running: Mutex::new(None),
            stopped: Mutex::new(stopped),
            _throttle: throttle,
            vcpus: loads.len(),
            tsc_hz,
        })
    }

    /// A guest that is to come by a migration.
    pub(super) fn blank(vcpus: usize, memory: u64) -> Result<Self> {
        let idle = Load::new(payload::Mode::Idle, 0);
        Self::new(&vec![idle; vcpus], payload::image(), memory, &Config::new())
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        self.machine.memory()
    }

    pub(super) fn vcpus(&self) -> usize {
        self.vcpus
    }

    /// Ticks of the guest's counter in a second.
    pub(super) fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    pub(super) fn page_size(&self) -> u32 {
        self.limit.page_size()
    }

    /// Lets every vCPU run.
    pub(super) fn start(&self) -> Result<()> {
        let stopped = std::mem::take(&mut *self.vcpus_stopped());
        if !stopped.is_empty() {
            let vcpus = Vcpus::start(stopped, None)?;
            *self.vcpus_running() = Some(vcpus);
        }
        Ok(())
    }

    /// Gets every vCPU out of the guest.
    pub(super) fn stop(&self) -> Result<()> {
        let running = self.vcpus_running().take();
        if let Some(vcpus) = running {
            let mut stopped = vcpus.stop()?;
            stopped.sort_by_key(|(cpu, _)| cpu.index());
            *self.vcpus_stopped() = stopped;
        }
        Ok(())
    }

    /// An error if a vCPU has failed.
    pub(super) fn check(&self) -> Result<()> {
        self.vcpus_running().as_mut().map_or(Ok(()), Vcpus::check)
    }

    /// Keeps all running vCPUs out of the guest, or lets them go on.
    pub(super) fn hold(&self, held: bool) {
        if let Some(vcpus) = &*self.vcpus_running() {
            vcpus.hold(|_| held);
        }
    }

    fn vcpus_stopped(&self) -> MutexGuard<'_, Vec<Limited>> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vcpus_running(&self) -> MutexGuard<'_, Option<Vcpus>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins or ends the dirty log. When it begins, all that the guest writes from then on is in it; when it has ended,
    /// what was in it is forgotten.
    pub(super) fn log(&self, on: bool) -> Result<()> {
        if on {
            let pages = self.memory().pages() as u64;
            self.limit.add_slot(SLOT, pages).context("cannot add the guest's memory to the limiter")?;
            self.machine.plug_memory(true)
        } else {
            self.machine.plug_memory(false)?;
            self.limit.remove_slot(SLOT).context("cannot end the dirty log")
        }
    }

    /// A round of the dirty log while the guest runs. Adds its pages to `bitmap`; returns how many more are held back.
    pub(super) fn round(&self, bitmap: &mut [u64]) -> Result<u64> {
        let round: Round<'_, Running> = self.limit.round().context("a round of the dirty log")?;
        round.merge(SLOT, bitmap).context("a round of the dirty log")?;
        Ok(round.held_back())
    }

    /// Adds the pages to `bitmap` that are dirty by now; they stay in the log.
    pub(super) fn peek(&self, bitmap: &mut [u64]) -> Result<()> {
        self.limit.peek(SLOT, bitmap).context("a look at the dirty log")
    }

    /// The last round, with the guest stopped.
    pub(super) fn last_round(&self, bitmap: &mut [u64]) -> Result<()> {
        ensure!(self.vcpus_running().is_none(), "the last round needs a guest that stands still");
        let round: Round<'_, Stopped> = self.limit.last_round().context("the last round of the dirty log")?;
        round.merge(SLOT, bitmap).context("the last round of the dirty log").map(drop)
    }

    /// Puts a budget of the whole VM in force, or lifts it.
    pub(super) fn set_budget(&self, budget: Option<PageRate>) {
        self.limit.set_vm_limit(budget);
        if budget.is_some() {
            // The VM's budget is split at a tick.
            self.limit.tick();
        }
    }

    /// Has the next rounds drain the rings, or not.
    pub(super) fn set_draining(&self, draining: bool) -> Result<()> {
        self.limit.set_draining(draining).context("cannot drain the rings")
    }

    /// What the vCPUs did so far.
    pub(super) fn work(&self) -> Work {
        self.limit.meter();
        let mut work = Work { accesses: self.accesses(), ..Work::default() };
        for index in 0..self.vcpus {
            if let Ok(status) = self.limit.query(id(index)) {
                work.net += status.totals.net_pages;
                work.gross += status.totals.gross_pages;
                work.paused += Duration::from_micros(status.totals.paused_us);
            }
        }
        work
    }

    /// Accesses of each vCPU, as the guest counts them.
    pub(super) fn accesses(&self) -> Vec<u64> {
        (0..self.vcpus).map(|index| self.machine.stats(index).accesses()).collect()
    }

    /// How long each vCPU's clock has run, in its ticks.
    pub(super) fn clocks(&self) -> Vec<u64> {
        (0..self.vcpus).map(|index| self.machine.stats(index).running()).collect()
    }

    /// Has the guest measure its gaps anew. Writes its stats pages.
    pub(super) fn measure_gaps(&self) {
        (0..self.vcpus).for_each(|index| self.machine.stats(index).begin_phase());
    }

    /// The longest gap that a vCPU saw since.
    pub(super) fn longest_gap(&self) -> Duration {
        let ticks = (0..self.vcpus).map(|index| self.machine.stats(index).longest()).max().unwrap_or(0);
        let nanos = u128::from(ticks) * 1_000_000_000 / u128::from(self.tsc_hz.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// The state of each vCPU; the guest stands still.
    pub(super) fn save(&self) -> Result<Vec<CpuState>> {
        self.vcpus_stopped().iter().map(|(cpu, _)| CpuState::save(cpu.fd())).collect()
    }

    /// Gives a vCPU its state; the guest stands still.
    pub(super) fn restore(&self, index: usize, state: &CpuState) -> Result<()> {
        let stopped = self.vcpus_stopped();
        let (cpu, _) = stopped.get(index).with_context(|| format!("there is no vCPU {index}"))?;
        state.restore(cpu.fd()).with_context(|| format!("vCPU {index}"))
    }

    /// Lets a vCPU's clock go on as of `passed` after it was saved.
    pub(super) fn restore_clock(&self, index: usize, state: &CpuState, passed: Duration) -> Result<()> {
        let stopped = self.vcpus_stopped();
        let (cpu, _) = stopped.get(index).with_context(|| format!("there is no vCPU {index}"))?;
        state.restore_clock(cpu.fd(), cpu.ticks(passed)).with_context(|| format!("vCPU {index}"))
    }

    /// Waits until one vCPU, or each that ever did, has counted an access beyond `before`, at most `patience`. Returns
    /// whether one has.
    pub(super) fn wait_for_work(&self, before: &[u64], all: bool, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let working = before.iter().filter(|&&before| before > 0).count();
        loop {
            let moved = self.accesses().iter().zip(before).filter(|(now, before)| now > before).count();
            if moved > 0 && (!all || moved >= working) {
                return true;
            }
            if Instant::now() >= deadline {
                return moved > 0;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Fields are dropped in order, and the machine comes first.
        *self.vcpus_running() = None;
    }
}

/// The limiter's name of a vCPU.
fn id(index: usize) -> u32 {
    u32::try_from(index).expect("the machine has at most 64 vCPUs")
}
