//! The vCPU's thread: carries out what the core's machine decides between two KVM_RUNs.

use std::sync::Arc;
use std::time::Duration;

use dirtylimit_core::{Machine, Nanos, Penalty, Run, Step};

use crate::Error;
use crate::kick::{Kick, Kicker};
use crate::seat::{Interrupter, Seat};
use crate::sys;
use crate::vm::Vm;

/// What [`Vcpu::before_run`] did.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Paid {
    /// How long it paused.
    pub paused: Duration,
    /// A signal, the [`Interrupter`], `immediate_exit` or `stop` ended it: the thread is wanted elsewhere. What is owed
    /// stays owed.
    pub interrupted: bool,
    /// The vCPU should not run for longer than that: its ring cannot end its slice. A timer is armed with
    /// [`crate::Kick::Signal`]; with [`crate::Kick::Vmm`] the VMM makes KVM_RUN return.
    pub kick_after: Option<Duration>,
}

/// One vCPU, as its thread sees it: a field beside the VMM's own handle.
///
/// All methods are for the vCPU's thread of the moment. Dropping it leaves the ring, and what is dirty in it, with the VM:
/// [`crate::DirtyLimit::add_vcpu`] takes up from there.
#[derive(Debug)]
pub struct Vcpu {
    vm: Arc<Vm>,
    seat: Arc<Seat>,
    machine: Machine,
    kicker: Kicker,
    /// Its thread wakes promptly.
    prompt: bool,
    /// Interrupts that were answered.
    answered: u32,
}

impl Vcpu {
    pub(crate) fn new(vm: Arc<Vm>, seat: Arc<Seat>) -> Self {
        let kicker = Kicker::new(vm.kick);
        let cell = seat.cell(&vm.limiter);
        let machine = Machine::new(cell, vm.ring_entries, vm.kick.ends_runs(), vm.kick == Kick::Auto);
        let answered = seat.interrupts();
        Self { vm, seat, machine, kicker, prompt: false, answered }
    }

    /// Whether it has made timers.
    #[cfg(test)]
    pub(crate) fn has_made_timers(&self) -> bool {
        self.kicker.has_made_timers()
    }

    /// What ends this vCPU's pauses.
    pub fn interrupter(&self) -> Interrupter {
        Interrupter(self.seat.clone())
    }

    /// To be called when KVM_RUN returned [`crate::EXIT_DIRTY_RING_FULL`] (kvm-ioctls: `VcpuExit::Unsupported(31)`). The
    /// work is done by [`Vcpu::before_run`], which sees that exit even so; calling it twice, or for the stale exit reason of
    /// a KVM_RUN that failed, does no harm. The exit's reason in `kvm_run` becomes `KVM_EXIT_INTR` once it is noted.
    pub fn ring_full(&mut self) {
        self.machine.say_full();
        self.note_exit();
    }

    /// Notes a full exit, if there was one since the last call.
    fn note_exit(&mut self) {
        if self.seat.take_full() {
            self.machine.full_exit(self.seat.cell(&self.vm.limiter));
        }
    }

    /// To be called before each KVM_RUN: pays what is owed and frees room in a full ring. Two loads when there is neither.
    ///
    /// Pauses at most `max_pause` a call, and 2.1 ms where others hold the VM's lock, but where a lump takes longer: nothing
    /// ends it ([`crate::Kick::Off`]), or timers miss too many. The kernel ends a pause up to the thread's timer slack late,
    /// 50 µs unless PR_SET_TIMERSLACK says less. KVM_RUN may follow in any case: a ring that is still full exits again at
    /// once.
    ///
    /// # Errors
    /// [`Error::Wedged`], and what a reset may answer.
    #[inline]
    pub fn before_run(&mut self) -> Result<Paid, Error> {
        self.before_run_unless(|| false)
    }

    /// As [`Vcpu::before_run`], for VMMs that block their kick signal outside KVM_RUN: a pause ends within 10 ms of `stop`
    /// returning true (`sigpending`, say).
    ///
    /// # Errors
    /// As [`Vcpu::before_run`].
    #[inline]
    pub fn before_run_unless(&mut self, mut stop: impl FnMut() -> bool) -> Result<Paid, Error> {
        let is_quiet = || self.machine.is_quiet(self.seat.cell(&self.vm.limiter));
        if !self.seat.is_full() && !self.kicker.is_due(&self.seat) && is_quiet() {
            return Ok(Paid::default());
        }
        self.pay(&mut stop)
    }

    #[cold]
    fn pay(&mut self, stop: &mut dyn FnMut() -> bool) -> Result<Paid, Error> {
        self.note_exit();
        self.kicker.disarm(&self.seat, self.machine.is_run_over())?;
        self.wake_promptly();
        let paid = self.drive(stop);
        if paid.is_err() {
            self.machine.failed(self.seat.cell(&self.vm.limiter));
        }
        paid
    }

    /// With [`crate::Config::prompt`], from the first pause under a limit until it is lifted.
    fn wake_promptly(&mut self) {
        let promptly = self.vm.prompt && self.seat.cell(&self.vm.limiter).penalty.accept() != Penalty::NONE;
        if promptly != self.prompt {
            self.prompt = promptly;
            // Only how soon pauses end hangs on it.
            let _ = sys::wake_promptly(promptly);
        }
    }

    /// Takes the machine's steps up to the entry.
    fn drive(&mut self, stop: &mut dyn FnMut() -> bool) -> Result<Paid, Error> {
        let (vm, seat) = (self.vm.clone(), self.seat.clone());
        let (words, cell) = (vm.limiter.vm(), seat.cell(&vm.limiter));
        let mut paid = Paid::default();
        let mut now = sys::now();
        let mut step = self.machine.begin(now, words, cell);
        loop {
            step = match step {
                Step::Harvest => self.harvest(now)?,
                Step::Pause { until, penalty } => {
                    let from = sys::now();
                    let ended = seat.pause(until, cell, penalty, self.answered, stop);
                    now = sys::now();
                    if self.machine.has_paused(from) {
                        paid.paused += Duration::from_nanos(now - from);
                    }
                    self.machine.paused(from, now, ended, words, cell)
                }
                Step::Reset => self.reset(now)?,
                Step::Enter(run) => {
                    self.arm(run, &mut paid);
                    return Ok(paid);
                }
                Step::Return(run) => {
                    self.answered = seat.interrupts();
                    paid.interrupted = true;
                    self.arm(run, &mut paid);
                    return Ok(paid);
                }
                Step::Wedged(exits) => return Err(Error::Wedged { id: seat.id, exits }),
            }
        }
    }

    /// Meters the ring and has it charged, unless somebody else harvests.
    fn harvest(&mut self, now: Nanos) -> Result<Step, Error> {
        let Self { vm, seat, machine, kicker, .. } = self;
        let cell = seat.cell(&vm.limiter);
        let Some(mut harvest) = vm.try_lock() else { return Ok(machine.busy(now, cell)) };
        let place = harvest.meter(seat.id, &vm.limiter).ok_or(Error::NoVcpu(seat.id))?;
        let in_lumps = place.vcpu.ring().has_lumps() && cell.penalty.accept() != Penalty::NONE;
        let has_timers = in_lumps && kicker.has_timers();
        let step = machine.harvested(now, vm.limiter.vm(), cell, &mut place.vcpu, has_timers);
        if let Step::Wedged(_) = step {
            harvest.news.wedged = Some(seat.id);
        }
        Ok(step)
    }

    /// Makes sure that a reset has freed the slice, unless somebody else harvests.
    fn reset(&mut self, now: Nanos) -> Result<Step, Error> {
        let Self { vm, seat, machine, .. } = self;
        let cell = seat.cell(&vm.limiter);
        let Some(mut harvest) = vm.try_lock() else { return Ok(machine.busy(now, cell)) };
        if let Some(later) = machine.reset_later(now, harvest.served, vm.limiter.vm(), cell) {
            return Ok(later);
        }
        harvest.serve(&*vm.kernel, &vm.limiter)?;
        Ok(machine.reset_done(now, cell))
    }

    /// Arms what is to end the run to come.
    fn arm(&mut self, run: Run, paid: &mut Paid) {
        if let Some(time) = run.kick_after {
            paid.kick_after = Some(Duration::from_nanos(time));
            self.kicker.arm(time);
        }
        if let Some(times) = run.timers {
            self.machine.armed(sys::now());
            self.kicker.arm_timers(times);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.kicker.release(&self.seat);
        self.seat.leave();
    }
}

/// VMMs keep it in a `Send + Sync` vCPU object.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Vcpu>();
};
