//! The vCPU's thread: the guest, its exits, and the steps of the core's machine in virtual time.

use dirtylimit_core::{Ended, Machine, Nanos, Penalty, Policy, Run, Step, TIMERS, ends_slices};

use super::adapter::Adapter;
use super::costs;
use super::cpu::Cpu;

/// The adapter's: the longest single wait of a pause.
const LOOK: Nanos = 10_000_000;

/// What the thread does until [`Vcpu::at`].
#[derive(Clone, Copy, Debug)]
enum State {
    /// It is in the guest.
    Guest,
    /// It is on the way out of the guest, with a full ring or kicked.
    Exit { full: bool },
    /// It pauses.
    Pause { from: Nanos, until: Nanos, penalty: Penalty },
    /// It resets.
    Reset,
}

/// A vCPU and its thread.
#[derive(Debug)]
pub(super) struct Vcpu {
    id: usize,
    pub(super) cpu: Cpu,
    machine: Machine,
    /// When the kick's signal arrives; one that comes outside the guest ends the next run at once.
    kick: Nanos,
    /// When its timers fire.
    timers: [Nanos; TIMERS],
    state: State,
    /// When it has something to do next.
    pub(super) at: Nanos,
}

impl Vcpu {
    pub(super) fn new<P: Policy>(id: usize, cpu: Cpu, adapter: &Adapter<P>, now: Nanos) -> Self {
        let at = if cpu.is_idle() { Nanos::MAX } else { now };
        let ring = adapter.places[id].ring().size();
        let machine = Machine::new(adapter.cell(id), ring, adapter.kicks(), adapter.has_timers());
        Self { id, cpu, machine, kick: Nanos::MAX, timers: [0; TIMERS], state: State::Guest, at }
    }

    /// Whether it is in the guest, and does something there.
    pub(super) fn is_in_guest(&self) -> bool {
        matches!(self.state, State::Guest) && !self.cpu.is_idle()
    }

    /// Somebody else's reset flushed its TLB.
    pub(super) fn flushed(&mut self) {
        if self.is_in_guest() {
            self.at += costs::FLUSHED;
        }
    }

    /// The penalty may be another: ends a pause, and a run where that is of use.
    pub(super) fn tell<P: Policy>(&mut self, now: Nanos, adapter: &Adapter<P>) {
        if matches!(self.state, State::Pause { .. }) {
            self.at = self.at.min(now + self.cpu.dice.oversleep());
        }
        if adapter.kicks() && ends_slices(adapter.cell(self.id).penalty.accept()) {
            self.kick(now);
        }
    }

    /// Makes it leave the guest, or leave it again at once.
    pub(super) fn kick(&mut self, now: Nanos) {
        self.kick = self.kick.min(now + self.cpu.dice.signal());
    }

    /// Does what is due at `self.at`; in the guest, goes on to `horizon`. Whether a reset has just returned.
    pub(super) fn act<P: Policy>(&mut self, horizon: Nanos, adapter: &mut Adapter<P>, others_run: bool) -> bool {
        let now = self.at;
        let step = match self.state {
            State::Guest => {
                self.run(now, horizon, adapter);
                return false;
            }
            State::Exit { full } => {
                if full {
                    self.machine.full_exit(adapter.cell(self.id));
                }
                self.kick = Nanos::MAX;
                self.machine.begin(now, adapter.limiter.vm(), adapter.cell(self.id))
            }
            State::Pause { from, until, penalty } => {
                let is_changed = adapter.cell(self.id).penalty.accept() != penalty;
                match (now >= until, is_changed) {
                    (true, _) => self.paused(from, now, Ended::Due, adapter),
                    (_, true) => self.paused(from, now, Ended::Changed, adapter),
                    _ => {
                        self.at = until.min(now + LOOK) + self.cpu.dice.oversleep();
                        return false;
                    }
                }
            }
            State::Reset => {
                adapter.finish_serving(now);
                let step = self.machine.reset_done(now, adapter.cell(self.id));
                self.take(step, now, adapter, others_run);
                return true;
            }
        };
        self.take(step, now, adapter, others_run);
        false
    }

    /// In the guest.
    fn run<P: Policy>(&mut self, now: Nanos, horizon: Nanos, adapter: &mut Adapter<P>) {
        let Adapter { kernel, memory, .. } = adapter;
        let ring = &mut kernel[self.id];
        // One that fires outside the guest is of no use.
        let timer = self.timers.into_iter().find(|at| *at > now).unwrap_or(Nanos::MAX);
        self.at = self.cpu.run(now, horizon.min(self.kick).min(timer), ring, memory);
        if self.at >= timer {
            ring.flush();
            self.at += costs::KERNEL_EXIT;
        }
        let full = ring.is_full();
        if full || self.at >= self.kick {
            ring.flush();
            ring.account(memory);
            self.at += costs::EXIT;
            self.state = State::Exit { full };
        }
    }

    /// Takes the machine's steps, up to one that takes time.
    fn take<P: Policy>(&mut self, mut step: Step, now: Nanos, adapter: &mut Adapter<P>, others_run: bool) {
        loop {
            step = match step {
                Step::Harvest | Step::Reset if adapter.locked.is_some() => {
                    self.machine.busy(now, adapter.cell(self.id))
                }
                Step::Harvest => adapter.harvest(self.id, now, &mut self.machine),
                Step::Pause { until, .. } if until <= now => self.paused(now, now, Ended::Due, adapter),
                Step::Pause { until, penalty } => {
                    self.at = until.min(now + LOOK) + self.cpu.dice.oversleep();
                    self.state = State::Pause { from: now, until, penalty };
                    return;
                }
                Step::Reset => {
                    let (vm, cell) = (adapter.limiter.vm(), adapter.cell(self.id));
                    match self.machine.reset_later(now, adapter.served, vm, cell) {
                        Some(step) => step,
                        None => match adapter.serve(now, others_run) {
                            Some(end) => {
                                (self.state, self.at) = (State::Reset, end);
                                return;
                            }
                            None => self.machine.reset_done(now, adapter.cell(self.id)),
                        },
                    }
                }
                Step::Enter(run) | Step::Return(run) => return self.enter(run, now, adapter),
                Step::Wedged(exits) => panic!("the model's ring is wedged: {exits} exits"),
            }
        }
    }

    fn paused<P: Policy>(&mut self, from: Nanos, now: Nanos, ended: Ended, adapter: &Adapter<P>) -> Step {
        self.machine.paused(from, now, ended, adapter.limiter.vm(), adapter.cell(self.id))
    }

    fn enter<P: Policy>(&mut self, run: Run, now: Nanos, adapter: &mut Adapter<P>) {
        if let Some(time) = run.kick_after {
            self.kick(now + time);
        }
        self.timers = [0; TIMERS];
        let mut entered = now;
        if let Some(times) = run.timers {
            entered = self.cpu.catch_up(now);
            self.machine.armed(entered);
            self.timers = times.map(|time| entered + time);
            entered += self.cpu.dice.entry();
        }
        let Adapter { kernel, memory, .. } = adapter;
        let ring = &mut kernel[self.id];
        if !ring.is_full() {
            ring.account(memory);
        }
        (self.state, self.at) = (State::Guest, entered);
    }
}
