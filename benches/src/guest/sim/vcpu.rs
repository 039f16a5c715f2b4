//! The vCPU's thread: the guest, a full exit, and paying before it enters again. As in `dirtylimit-kvm`'s `vcpu.rs`, as
//! a state machine in virtual time.

use dirtylimit_core::{Nanos, Pacer, Penalty, Policy, Turn, kicked};

use super::adapter::{Adapter, BATCH, RESET_GAP};
use super::costs;
use super::cpu::Cpu;
use super::kick::Kicker;

/// The adapter's: how soon a thread that did not get the lock tries again.
const RETRY: Nanos = 50_000;
/// The adapter's: the longest single wait of a pause.
const LOOK: Nanos = 10_000_000;

/// What the thread does until [`Vcpu::at`].
#[derive(Debug)]
enum State {
    /// It is in the guest.
    Guest,
    /// It is on the way out of the guest, with a full ring or kicked.
    Exit { full: bool },
    /// It pauses.
    Pause(Pay),
    /// It resets.
    Reset(Pay),
}

/// One call of `before_run`.
#[derive(Clone, Copy, Debug)]
struct Pay {
    /// No reset is waited for beyond.
    latest: Nanos,
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
    /// It entered the guest with its slice free.
    entered_free: bool,
    /// KVM has just made a full exit of such a run, and it was not looked at yet.
    filled: bool,
    kicker: Kicker,
    /// The slice last given, where only a kick can end it.
    kicked_slice: Option<u32>,
    /// The slice last given, where timers are to make the CPU hand its pages over.
    timed_slice: Option<u32>,
    /// The run that is over had no page.
    barren: bool,
    /// Ring entries counted when it last paused.
    rested: u32,
    state: State,
    /// When it has something to do next.
    pub(super) at: Nanos,
}

impl Vcpu {
    pub(super) fn new<P: Policy>(id: usize, cpu: Cpu, adapter: &Adapter<P>, now: Nanos) -> Self {
        let at = if cpu.is_idle() { Nanos::MAX } else { now };
        Self {
            id,
            cpu,
            pacer: Pacer::new(&adapter.cell(id).report),
            full: false,
            entered_free: true,
            filled: false,
            kicker: Kicker::new(adapter.has_timers()),
            kicked_slice: None,
            timed_slice: None,
            barren: false,
            rested: 0,
            state: State::Guest,
            at,
        }
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
        if matches!(self.state, State::Pause(_)) {
            self.at = self.at.min(now + self.cpu.dice.oversleep());
        }
        if adapter.kicks() && kicked::ends_slices(adapter.cell(self.id).penalty.accept()) {
            self.kick(now);
        }
    }

    /// Makes it leave the guest, or leave it again at once.
    pub(super) fn kick(&mut self, now: Nanos) {
        self.kicker.kick(now, &mut self.cpu.dice);
    }

    /// Does what is due at `self.at`; in the guest, goes on to `horizon`. Whether a reset has just returned.
    pub(super) fn act<P: Policy>(&mut self, horizon: Nanos, adapter: &mut Adapter<P>, others_run: bool) -> bool {
        let now = self.at;
        match self.state {
            State::Guest => {
                let Adapter { kernel, memory, .. } = adapter;
                let ring = &mut kernel[self.id];
                let timer = self.kicker.timer(now);
                self.at = self.cpu.run(now, horizon.min(self.kicker.at).min(timer), ring, memory);
                if self.at >= timer {
                    ring.flush();
                    self.at += costs::KERNEL_EXIT;
                }
                let full = ring.is_full();
                if full || self.at >= self.kicker.at {
                    ring.flush();
                    ring.account(memory);
                    self.at += costs::EXIT;
                    self.state = State::Exit { full };
                }
                false
            }
            State::Exit { full } => {
                if full {
                    adapter.cell(self.id).report.add_full_exit();
                    self.full = true;
                    self.filled = self.entered_free;
                }
                self.kicker.disarm();
                let mut pay = Pay {
                    latest: now + adapter.limiter.vm().max_pause(),
                    patience: 0,
                    turn: None,
                    until: now,
                    since: now,
                    penalty: Penalty::NONE,
                };
                self.settle(now, &mut pay, adapter);
                // A lump may take longer.
                pay.latest = pay.latest.max(pay.until);
                pay.patience = pay.latest + RESET_GAP;
                self.pay(now, pay, adapter, others_run);
                false
            }
            State::Pause(pay) => {
                self.pay(now, pay, adapter, others_run);
                false
            }
            State::Reset(mut pay) => {
                adapter.finish_serving(now);
                let left = adapter.places[self.id].want != 0;
                self.full &= left;
                if left && now < pay.patience {
                    (pay.until, pay.since) = (now + RETRY, now);
                    self.pay(now, pay, adapter, others_run);
                } else {
                    self.enter(now, adapter);
                }
                true
            }
        }
    }

    fn enter<P: Policy>(&mut self, now: Nanos, adapter: &mut Adapter<P>) {
        if self.kicked_slice.is_some() {
            let gross = adapter.cell(self.id).report.counts().gross;
            self.kicker.arm(now, gross, &mut self.cpu.dice);
        }
        let mut entered = now;
        if self.timed_slice.is_some() {
            entered = self.cpu.catch_up(now);
            self.kicker.arm_timers(entered, adapter.cell(self.id).report.counts().gross);
            entered += self.cpu.dice.entry();
        }
        self.entered_free = adapter.places[self.id].want == 0;
        let Adapter { kernel, memory, .. } = adapter;
        let ring = &mut kernel[self.id];
        if !ring.is_full() {
            ring.account(memory);
        }
        (self.state, self.at) = (State::Guest, entered);
    }

    /// Meters the ring, charges what was metered, and asks for the next slice.
    fn settle<P: Policy>(&mut self, now: Nanos, pay: &mut Pay, adapter: &mut Adapter<P>) {
        pay.since = now;
        if adapter.locked.is_some() {
            pay.turn = None;
            pay.until = now + RETRY;
        } else {
            let turn = self.harvest(now, adapter);
            pay.turn = Some(turn);
            pay.until = turn.until;
        }
        pay.penalty = adapter.cell(self.id).penalty.accept();
    }

    /// What of that is done under the lock.
    fn harvest<P: Policy>(&mut self, now: Nanos, adapter: &mut Adapter<P>) -> Turn {
        adapter.meter(self.id);
        match std::mem::take(&mut self.filled) {
            true => adapter.places[self.id].ring.full_exit_of_kvm(),
            false if self.full => adapter.places[self.id].ring.full_exit(),
            false => {}
        }
        if !adapter.places[self.id].stretched {
            self.pacer.forget_stretch();
        }
        let cell = adapter.cell(self.id);
        let mut turn = self.pacer.settle(now, adapter.limiter.vm(), &cell.penalty, &cell.report);
        let gross = cell.report.counts().gross;
        let in_lumps = turn.slice.is_some() && adapter.places[self.id].ring.has_lumps() && !adapter.kicks();
        let is_timed = in_lumps && adapter.has_timers();
        let room = turn.slice.map(|slice| if is_timed { slice.div_ceil(2) } else { slice });
        adapter.want(self.id, room, self.full);
        let cell = adapter.cell(self.id);
        let (penalty, max_pause, kicks) = (cell.penalty.accept(), adapter.limiter.vm().max_pause(), adapter.kicks());
        let place = &mut adapter.places[self.id];
        let kicked_slice = turn.slice.filter(|slice| kicks && !place.ring.ends(*slice));
        self.barren = gross == self.rested;
        let timed = std::mem::replace(&mut self.timed_slice, turn.slice.filter(|_| is_timed));
        let given = self.kicked_slice.or(timed).or(turn.slice).unwrap_or(BATCH);
        if self.kicker.learn(now, given, gross) {
            if kicked_slice.is_some() && self.kicker.run_time.is_to_fill(penalty, place.ring.room()) {
                self.pacer.forgive();
                turn.until = now;
            }
            if !kicked::is_to_pause(penalty, gross.wrapping_sub(self.rested), max_pause) {
                turn.until = turn.until.min(now);
            }
        }
        if !place.limited && turn.slice.is_some() {
            place.merged = 0;
        }
        (place.limited, place.stretched) = (turn.slice.is_some(), turn.stretched);
        place.slice = room.filter(|_| kicked_slice.is_none());
        self.kicked_slice = kicked_slice.map(|slice| slice.div_ceil(2));
        if in_lumps && kicked::is_to_pay_all(penalty, &turn, now, is_timed) {
            adapter.cell(self.id).report.add_overlong_pause();
            turn.until = turn.due;
        }
        turn
    }

    /// Pauses, or does what follows a pause that is over at `now`.
    fn pay<P: Policy>(&mut self, now: Nanos, mut pay: Pay, adapter: &mut Adapter<P>, others_run: bool) {
        loop {
            let changed = adapter.cell(self.id).penalty.accept() != pay.penalty;
            if now < pay.until && !changed {
                self.at = pay.until.min(now + LOOK) + self.cpu.dice.oversleep();
                self.state = State::Pause(pay);
                return;
            }
            if pay.until > pay.since && pay.turn.is_some_and(|turn| turn.slice.is_some()) {
                let report = &adapter.cell(self.id).report;
                report.add_pause(now - pay.since);
                self.rested = report.counts().gross;
            }
            match pay.turn {
                Some(turn) if now >= pay.until => match self.free(&turn, now, pay.latest, adapter, others_run) {
                    Freed::Done => return self.enter(now, adapter),
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
                return self.enter(now, adapter);
            }
        }
    }

    /// After the pause: makes sure that a reset frees the slice.
    fn free<P: Policy>(
        &mut self,
        turn: &Turn,
        now: Nanos,
        latest: Nanos,
        adapter: &mut Adapter<P>,
        others_run: bool,
    ) -> Freed {
        if adapter.places[self.id].want == 0 {
            self.full = false;
            return Freed::Done;
        }
        if adapter.locked.is_some() {
            return Freed::Retry(now + RETRY);
        }
        let gap = RESET_GAP.min(adapter.limiter.vm().max_pause() / 10 * 9);
        let next_reset = (adapter.served + gap).min(latest);
        let ring = adapter.places[self.id].ring.size();
        let patient = !self.barren && !turn.stretched && turn.slice.is_some_and(|slice| slice < ring / 2);
        if patient && now < next_reset {
            return Freed::Retry(next_reset);
        }
        match adapter.serve(now, others_run) {
            Some(end) => Freed::At(end),
            None => {
                let left = adapter.places[self.id].want != 0;
                self.full &= left;
                if left { Freed::Retry(now + RETRY) } else { Freed::Done }
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
