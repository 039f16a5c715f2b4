//! The vCPU's thread: carries out what the core's machine decides between two KVM_RUNs.

use std::sync::Arc;
use std::time::Duration;

use dirtylimit_core::{Machine, Nanos, Penalty, Run, Step};

use crate::Error;
use crate::kick::{Kick, Kicker};
use crate::shared::{Interrupter, SharedVcpu};
use crate::sys;
use crate::vm::Vm;

/// What the vCPU's thread is to do after [`Vcpu::before_run`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "where it is to return, KVM_RUN might return at once, again and again"]
pub enum Decision {
    /// Call KVM_RUN.
    Enter {
        /// The vCPU should not run for longer than that: its ring cannot end its slice. With [`crate::Kick::Vmm`] the VMM makes
        /// KVM_RUN return; with [`crate::Kick::Signal`] a timer is armed.
        kick_after: Option<Duration>,
    },
    /// A signal, the [`Interrupter`] or `stop` ended a pause: the VMM wants its thread for something else. See to that first,
    /// and call [`Vcpu::before_run`] again: what is owed stays owed, and the ring may be full. A VMM that saves the vCPU's state
    /// now calls KVM_RUN once before, with `immediate_exit` set: that completes an I/O exit which it has answered.
    Return,
}

/// One vCPU, as its thread sees it: a field beside the VMM's own handle.
///
/// All methods are for the vCPU's thread of the moment. Dropping it leaves the ring, and what is dirty in it, with the VM:
/// [`crate::DirtyLimit::add_vcpu`] takes up from there.
#[derive(Debug)]
pub struct Vcpu {
    vm: Arc<Vm>,
    shared: Arc<SharedVcpu>,
    machine: Machine,
    kicker: Kicker,
    /// Its thread wakes promptly.
    prompt: bool,
    /// Interrupts that were answered.
    answered: u32,
    /// How long the last call paused.
    paused: Duration,
}

impl Vcpu {
    pub(crate) fn new(vm: Arc<Vm>, shared: Arc<SharedVcpu>) -> Self {
        let kicker = Kicker::new(vm.kick);
        let cell = shared.cell(&vm.limiter);
        let machine = Machine::new(cell, vm.ring_entries, vm.kick.ends_runs(), vm.kick == Kick::Auto);
        let answered = shared.interrupts();
        Self { vm, shared, machine, kicker, prompt: false, answered, paused: Duration::ZERO }
    }

    /// Whether it has made timers.
    #[cfg(test)]
    pub(crate) fn has_made_timers(&self) -> bool {
        self.kicker.has_made_timers()
    }

    /// What ends this vCPU's pauses.
    pub fn interrupter(&self) -> Interrupter {
        Interrupter(self.shared.clone())
    }

    /// How long the last [`Vcpu::before_run`] paused; [`crate::Status::totals`] has the sum.
    pub fn paused(&self) -> Duration {
        self.paused
    }

    /// Notes a full exit, if there was one since the last call.
    fn note_exit(&mut self) {
        if self.shared.take_full() {
            self.machine.full_exit(self.shared.cell(&self.vm.limiter));
        }
    }

    /// To be called before each KVM_RUN: pays what is owed and frees room in a full ring. Two loads when there is neither.
    /// It sees for itself whether KVM_RUN returned with a full ring ([`crate::EXIT_DIRTY_RING_FULL`]; kvm-ioctls:
    /// `VcpuExit::Unsupported(31)`), so the VMM does nothing at that exit but come here; the exit's reason in `kvm_run` becomes
    /// `KVM_EXIT_INTR` once it is noted, so that a KVM_RUN that fails leaves no stale one.
    ///
    /// Pauses at most `max_pause` a call, and 2.1 ms where others hold the VM's lock, but where a lump takes longer: nothing
    /// ends it ([`crate::Kick::Off`]), or timers miss too many. The kernel ends a pause up to the thread's timer slack late,
    /// 50 µs unless PR_SET_TIMERSLACK says less. With `immediate_exit` set there is no pause: the VMM wants KVM_RUN to be
    /// called.
    ///
    /// # Errors
    /// [`Error::Wedged`], and what a reset may answer.
    #[inline]
    pub fn before_run(&mut self) -> Result<Decision, Error> {
        self.before_run_unless(|| false)
    }

    /// As [`Vcpu::before_run`], for VMMs that block their kick signal outside KVM_RUN: a pause ends within 10 ms of `stop`
    /// returning true (`sigpending`, say).
    ///
    /// # Errors
    /// As [`Vcpu::before_run`].
    #[inline]
    pub fn before_run_unless(&mut self, mut stop: impl FnMut() -> bool) -> Result<Decision, Error> {
        self.paused = Duration::ZERO;
        let is_quiet = || self.machine.is_quiet(self.shared.cell(&self.vm.limiter));
        if !self.shared.is_full() && !self.kicker.is_due(&self.shared) && is_quiet() {
            return Ok(Decision::Enter { kick_after: None });
        }
        self.pay(&mut stop)
    }

    #[cold]
    fn pay(&mut self, stop: &mut dyn FnMut() -> bool) -> Result<Decision, Error> {
        self.note_exit();
        self.kicker.disarm(&self.shared, self.machine.is_run_over())?;
        self.wake_promptly();
        let decision = self.drive(stop);
        if decision.is_err() {
            self.machine.failed(self.shared.cell(&self.vm.limiter));
        }
        decision
    }

    /// With [`crate::Config::prompt`], from the first pause under a limit until it is lifted.
    fn wake_promptly(&mut self) {
        let promptly = self.vm.prompt && self.shared.cell(&self.vm.limiter).penalty.accept() != Penalty::NONE;
        if promptly != self.prompt {
            self.prompt = promptly;
            // Only how soon pauses end hangs on it.
            let _ = sys::wake_promptly(promptly);
        }
    }

    /// Takes the machine's steps up to the entry.
    fn drive(&mut self, stop: &mut dyn FnMut() -> bool) -> Result<Decision, Error> {
        let (vm, shared) = (self.vm.clone(), self.shared.clone());
        let (words, cell) = (vm.limiter.vm(), shared.cell(&vm.limiter));
        let mut now = sys::now();
        let mut step = self.machine.begin(now, words, cell);
        loop {
            step = match step {
                Step::Harvest => self.harvest(now)?,
                Step::Pause { until, penalty } => {
                    let from = sys::now();
                    let ended = shared.pause(until, cell, penalty, self.answered, stop);
                    now = sys::now();
                    if self.machine.has_paused(from) {
                        self.paused += Duration::from_nanos(now - from);
                    }
                    self.machine.paused(from, now, ended, words, cell)
                }
                Step::Reset => self.reset(now)?,
                Step::Enter(run) => return Ok(Decision::Enter { kick_after: self.arm(run) }),
                Step::Return(run) => {
                    self.answered = shared.interrupts();
                    self.arm(run);
                    return Ok(Decision::Return);
                }
                Step::Wedged(exits) => return Err(Error::Wedged { id: shared.id, exits }),
            }
        }
    }

    /// Meters the ring and has it charged, unless somebody else harvests.
    fn harvest(&mut self, now: Nanos) -> Result<Step, Error> {
        let Self { vm, shared, machine, kicker, .. } = self;
        let cell = shared.cell(&vm.limiter);
        let Some(mut harvest) = vm.try_lock() else { return Ok(machine.busy(now, cell)) };
        let row = harvest.meter(shared.id, &vm.limiter).ok_or(Error::NoVcpu(shared.id))?;
        let in_lumps = row.vcpu.ring().has_lumps() && cell.penalty.accept() != Penalty::NONE;
        let has_timers = in_lumps && kicker.has_timers();
        let step = machine.harvested(now, vm.limiter.vm(), cell, &mut row.vcpu, has_timers);
        if let Step::Wedged(_) = step {
            harvest.found_wedged(shared.id);
        }
        Ok(step)
    }

    /// Makes sure that a reset has freed the slice, unless somebody else harvests.
    fn reset(&mut self, now: Nanos) -> Result<Step, Error> {
        let Self { vm, shared, machine, .. } = self;
        let cell = shared.cell(&vm.limiter);
        let Some(mut harvest) = vm.try_lock() else { return Ok(machine.busy(now, cell)) };
        if let Some(later) = machine.reset_later(now, harvest.served, vm.limiter.vm(), cell) {
            return Ok(later);
        }
        harvest.grant(&*vm.kernel, &vm.limiter)?;
        Ok(machine.reset_done(now, cell))
    }

    /// Arms what is to end the run to come; returns after which time a kick is to.
    fn arm(&mut self, run: Run) -> Option<Duration> {
        if let Some(time) = run.kick_after {
            self.kicker.arm(time);
        }
        if let Some(times) = run.timers {
            self.machine.armed(sys::now());
            self.kicker.arm_timers(times);
        }
        run.kick_after.map(Duration::from_nanos)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.kicker.release(&self.shared);
        self.shared.leave();
    }
}

/// VMMs keep it in a `Send + Sync` vCPU object.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Vcpu>();
};
