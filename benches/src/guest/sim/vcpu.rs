//! The vCPU's thread: the guest, a full exit, and paying before it enters again. As in `dirtylimit-kvm`'s `vcpu.rs`, as
//! a state machine in virtual time.

use dirtylimit_core::{Nanos, Pacer, Penalty, Turn};

use super::adapter::{Adapter, RESET_GAP};
use super::costs;
use super::cpu::Cpu;

/// The adapter's: how soon a thread that did not get the lock tries again.
const RETRY: Nanos = 50_000;
/// The adapter's: the longest single wait of a pause.
const LOOK: Nanos = 10_000_000;

/// What the thread does until [`Vcpu::at`].
#[derive(Debug)]
enum State {
    /// It is in the guest.
    Guest,
    /// It is on the way out of the guest, with a full ring.
    Exit,
    /// It pauses.
    Pause(Pay),
    /// It resets.
    Reset(Pay),
}

/// One call of `before_run`.
#[derive(Clone, Copy, Debug)]
struct Pay {
    start: Nanos,
    /// From here on it is let through, come what may.
    patience: Nanos,
    /// `None` while somebody else harvests.
    turn: Option<Turn>,
    until: Nanos,
    /// When the pause began.
    since: Nanos,
    penalty: Penalty,
}

/// A vCPU and its thread.
#[derive(Debug)]
pub(super) struct Vcpu {
    id: usize,
    pub(super) cpu: Cpu,
    pacer: Pacer,
    /// A full exit has not been served.
    full: bool,
    state: State,
    /// When it has something to do next.
    pub(super) at: Nanos,
}

impl Vcpu {
    pub(super) fn new(id: usize, cpu: Cpu, adapter: &Adapter, now: Nanos) -> Self {
        let at = if cpu.is_idle() { Nanos::MAX } else { now };
        Self { id, cpu, pacer: Pacer::new(&adapter.cell(id).report), full: false, state: State::Guest, at }
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

    /// Wakes a pausing thread, so that it looks at its penalty again.
    pub(super) fn poke(&mut self, now: Nanos) {
        if matches!(self.state, State::Pause(_)) {
            self.at = self.at.min(now + self.cpu.dice.oversleep());
        }
    }

    /// Does what is due at `self.at`; in the guest, goes on to `horizon`. Whether a reset has just returned.
    pub(super) fn act(&mut self, horizon: Nanos, adapter: &mut Adapter, others_run: bool) -> bool {
        let now = self.at;
        match self.state {
            State::Guest => {
                let Adapter { kernel, memory, .. } = adapter;
                let ring = &mut kernel[self.id];
                self.at = self.cpu.run(now, horizon, ring, memory);
                if ring.is_full() {
                    ring.flush();
                    self.at += costs::EXIT;
                    self.state = State::Exit;
                }
                false
            }
            State::Exit => {
                adapter.cell(self.id).report.add_full_exit();
                self.full = true;
                let mut pay = Pay {
                    start: now,
                    patience: now + adapter.limiter.vm().max_pause() + RESET_GAP,
                    turn: None,
                    until: now,
                    since: now,
                    penalty: Penalty::NONE,
                };
                self.settle(now, &mut pay, adapter);
                self.pay(now, pay, adapter, others_run);
                false
            }
            State::Pause(pay) => {
                self.pay(now, pay, adapter, others_run);
                false
            }
            State::Reset(mut pay) => {
                adapter.finish_reset(now);
                self.full = adapter.places[self.id].want != 0;
                if self.full && now < pay.patience {
                    (pay.until, pay.since) = (now + RETRY, now);
                    self.pay(now, pay, adapter, others_run);
                } else {
                    self.enter(now);
                }
                true
            }
        }
    }

    fn enter(&mut self, now: Nanos) {
        (self.state, self.at) = (State::Guest, now);
    }

    /// Meters a full ring, charges what was metered, and asks for the next slice.
    fn settle(&mut self, now: Nanos, pay: &mut Pay, adapter: &mut Adapter) {
        pay.since = now;
        if self.full && adapter.locked.is_some() {
            pay.turn = None;
            pay.until = now + RETRY;
        } else {
            if self.full {
                adapter.meter(self.id);
                adapter.places[self.id].ring.learn_soft_limit();
            }
            let cell = adapter.cell(self.id);
            let turn = self.pacer.settle(now, adapter.limiter.vm(), &cell.penalty, &cell.report);
            if self.full {
                adapter.want(self.id, turn.slice);
            }
            pay.turn = Some(turn);
            pay.until = turn.until;
        }
        pay.penalty = adapter.cell(self.id).penalty.accept();
    }

    /// Pauses, or does what follows a pause that is over at `now`.
    fn pay(&mut self, now: Nanos, mut pay: Pay, adapter: &mut Adapter, others_run: bool) {
        loop {
            let changed = adapter.cell(self.id).penalty.accept() != pay.penalty;
            if now < pay.until && !changed {
                self.at = pay.until.min(now + LOOK) + self.cpu.dice.oversleep();
                self.state = State::Pause(pay);
                return;
            }
            if pay.until > pay.since && pay.turn.is_some_and(|turn| turn.slice.is_some()) {
                adapter.cell(self.id).report.add_pause(now - pay.since);
            }
            match pay.turn {
                Some(turn) if now >= pay.until => match self.free(&turn, now, pay.start, adapter, others_run) {
                    Freed::Done => return self.enter(now),
                    Freed::At(end) => {
                        (self.state, self.at) = (State::Reset(pay), end);
                        return;
                    }
                    Freed::Retry(at) => {
                        (pay.until, pay.since) = (at, now);
                        pay.penalty = adapter.cell(self.id).penalty.accept();
                    }
                },
                _ => self.settle(now, &mut pay, adapter),
            }
            if now >= pay.patience {
                return self.enter(now);
            }
        }
    }

    /// After the pause: makes sure that a reset frees the slice.
    fn free(&mut self, turn: &Turn, now: Nanos, start: Nanos, adapter: &mut Adapter, others_run: bool) -> Freed {
        if !self.full || adapter.places[self.id].want == 0 {
            self.full = false;
            return Freed::Done;
        }
        if adapter.locked.is_some() {
            return Freed::Retry(now + RETRY);
        }
        let next_reset = adapter.last_reset + RESET_GAP;
        let ring = adapter.places[self.id].ring.size();
        let patient = turn.until > start && turn.slice.is_some_and(|slice| slice < ring / 2);
        if patient && now < next_reset {
            return Freed::Retry(next_reset);
        }
        match adapter.serve(now, others_run) {
            Some(end) => Freed::At(end),
            None => {
                self.full = adapter.places[self.id].want != 0;
                if self.full { Freed::Retry(now + RETRY) } else { Freed::Done }
            }
        }
    }
}

/// What became of a full ring.
enum Freed {
    /// There is room.
    Done,
    /// There will be, when the reset returns.
    At(Nanos),
    /// Not yet; try again then.
    Retry(Nanos),
}
