//! The vCPU's thread: serve a full exit, and ACCEPT PENALTY before KVM_RUN.

use std::mem::replace;
use std::sync::Arc;
use std::time::Duration;

use dirtylimit_core::{Nanos, Pacer, Penalty, Turn, kicked};

use crate::Error;
use crate::harvest::BATCH;
use crate::kick::Kicker;
use crate::seat::{Ended, Interrupter, Seat};
use crate::sys;
use crate::vm::Vm;

/// Resets are at least so far apart (at most 476 a second), or nine tenths of a shorter `max_pause`, unless a vCPU waits
/// for one that has no limit, or rewrites dirty pages, or whose slice is half its ring or more, or that has paused for as long
/// as it may, or had no page since its last pause.
const RESET_GAP: Nanos = 2_100_000;
/// How soon a thread that did not get the lock tries again.
const RETRY: Nanos = 50_000;
/// A ring is wedged after this number of full exits in a row that moved nothing.
const WEDGED: u32 = 64;

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
    pacer: Pacer,
    /// A full exit has not been served.
    full: bool,
    kicker: Kicker,
    /// Its thread wakes promptly.
    prompt: bool,
    /// It was last let go before its slice was freed: others may do so while it runs.
    unserved: bool,
    /// The slice last given, where only a kick can end it.
    kicked_slice: Option<u32>,
    /// The slice last given, where timers are to make the CPU hand its pages over.
    timed_slice: Option<u32>,
    /// The run that is over had no page, so that no wait is to follow the pause before it: both are one to the guest.
    barren: bool,
    /// Ring entries counted at the end of the last pause.
    rested: u32,
    /// Interrupts that were answered.
    answered: u32,
    /// KVM_RUN has returned with a full ring, which was not judged yet.
    exited: bool,
    idle: Idle,
}

/// Full exits in a row that moved nothing.
#[derive(Debug)]
struct Idle {
    exits: u32,
    /// Ring entries counted at the last full exit of either kind.
    gross: u32,
}

impl Vcpu {
    pub(crate) fn new(vm: Arc<Vm>, seat: Arc<Seat>) -> Self {
        let kicker = Kicker::new(vm.kick);
        let pacer = Pacer::new(&seat.cell(&vm.limiter).report);
        let answered = seat.interrupts();
        let gross = seat.cell(&vm.limiter).report.counts().gross;
        Self {
            vm,
            seat,
            pacer,
            full: false,
            kicker,
            prompt: false,
            unserved: false,
            kicked_slice: None,
            timed_slice: None,
            barren: false,
            rested: 0,
            answered,
            exited: false,
            idle: Idle { exits: 0, gross },
        }
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
        self.full = true;
        self.note_exit();
    }

    /// Notes a full exit, if there was one since the last call.
    fn note_exit(&mut self) {
        if self.seat.take_full() {
            self.seat.cell(&self.vm.limiter).report.add_full_exit();
            (self.full, self.exited) = (true, true);
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
        let owes = || self.pacer.owes(&self.seat.cell(&self.vm.limiter).report);
        if !self.full && !self.seat.is_full() && !self.kicker.is_due(&self.seat) && !owes() {
            return Ok(Paid::default());
        }
        self.pay(&mut stop)
    }

    #[cold]
    fn pay(&mut self, stop: &mut dyn FnMut() -> bool) -> Result<Paid, Error> {
        self.note_exit();
        self.kicker.disarm(&self.seat)?;
        self.wake_promptly();
        let paid = self.settle_and_pause(stop);
        self.unserved = self.seat.wanted() != 0;
        let mut paid = paid?;
        let gross = self.gross();
        if self.kicked_slice.is_some() {
            paid.kick_after = Some(self.kicker.arm(gross));
        }
        if self.timed_slice.is_some() {
            self.kicker.arm_timers(gross);
        }
        Ok(paid)
    }

    /// Ring entries counted.
    fn gross(&self) -> u32 {
        self.seat.cell(&self.vm.limiter).report.counts().gross
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

    /// Settle, pause, free; again from where it is due as long as patience lasts.
    fn settle_and_pause(&mut self, stop: &mut dyn FnMut() -> bool) -> Result<Paid, Error> {
        let (vm, seat) = (self.vm.clone(), self.seat.clone());
        let cell = seat.cell(&vm.limiter);
        let start = sys::now();
        // However often the limit changes meanwhile.
        let mut latest = start.saturating_add(vm.limiter.vm().max_pause());
        let mut paid = Paid::default();
        // What was settled, and under which penalty: read before, so that no change between the two goes unseen.
        let mut penalty = cell.penalty.accept();
        let mut turn = self.settle(start)?;
        // A lump may take longer.
        latest = latest.max(turn.map_or(0, |turn| turn.until));
        let patience = latest.saturating_add(RESET_GAP);
        let mut until = turn.map_or(start + RETRY, |turn| turn.until);
        loop {
            let from = sys::now();
            let ended = seat.pause(until, cell, penalty, self.answered, stop);
            let now = sys::now();
            if until > from && turn.is_some_and(|turn| turn.slice.is_some()) {
                cell.report.add_pause(now - from);
                self.rested = cell.report.counts().gross;
                paid.paused += Duration::from_nanos(now - from);
            }
            if ended == Ended::Wanted {
                self.answered = seat.interrupts();
                paid.interrupted = true;
                return Ok(paid);
            }
            let again = match turn {
                Some(turn) if ended == Ended::Due => self.free(&turn, now, latest)?,
                _ => {
                    penalty = cell.penalty.accept();
                    turn = self.settle(now)?;
                    Some(turn.map_or(now + RETRY, |turn| turn.until.min(latest)))
                }
            };
            match again {
                Some(at) if now < patience => until = at,
                _ => return Ok(paid),
            }
        }
    }

    /// Meters the ring where it is full or nobody else will, charges what was metered, and asks for the next slice. `None`
    /// where somebody else harvests.
    fn settle(&mut self, now: Nanos) -> Result<Option<Turn>, Error> {
        let Self { vm, seat, pacer, kicker, .. } = self;
        let cell = seat.cell(&vm.limiter);
        if !self.full && !kicker.is_on() {
            let turn = pacer.settle(now, vm.limiter.vm(), &cell.penalty, &cell.report);
            self.timed_slice = self.timed_slice.filter(|_| turn.slice.is_some());
            return Ok(Some(turn));
        }
        let Some(mut harvest) = vm.try_lock() else { return Ok(None) };
        let (place, _) = harvest.meter(seat.id, &vm.limiter).ok_or(Error::NoVcpu(seat.id))?;
        match self.full {
            true if self.exited && !self.unserved => place.ring.full_exit_of_kvm(),
            true => place.ring.full_exit(),
            false => {}
        }
        if !place.stretched {
            pacer.forget_stretch();
        }
        let mut turn = pacer.settle(now, vm.limiter.vm(), &cell.penalty, &cell.report);
        let in_lumps = turn.slice.is_some() && place.ring.has_lumps() && !kicker.is_on();
        let is_timed = in_lumps && kicker.has_timers();
        let slice = turn.slice.unwrap_or(BATCH);
        // Timers are not exact: whatever is handed over from half a slice on ends it.
        let room = if is_timed { slice.div_ceil(2) } else { slice };
        let wanted = place.ring.to_collect(room) > 0 || (self.full && place.ring.awaiting_reset() > 0);
        seat.ask(if wanted { room } else { 0 });
        if !wanted {
            place.ring.freed();
        }
        let gross = cell.report.counts().gross;
        let kicked_slice = turn.slice.filter(|slice| kicker.is_on() && !place.ring.ends(*slice));
        self.barren = gross == self.rested;
        let given = self.kicked_slice.or(replace(&mut self.timed_slice, turn.slice.filter(|_| is_timed)));
        let penalty = cell.penalty.accept();
        if kicker.learn(given.unwrap_or(slice), gross) {
            if kicked_slice.is_some() && kicker.run_time.is_to_fill(penalty, place.ring.room()) {
                pacer.forgive();
                turn.until = now;
            }
            if !kicked::is_to_pause(penalty, gross.wrapping_sub(self.rested), vm.limiter.vm().max_pause()) {
                turn.until = turn.until.min(now);
            }
        }
        if in_lumps && kicked::is_to_pay_all(penalty, &turn, now, is_timed) {
            cell.report.add_overlong_pause();
            turn.until = turn.due;
        }
        if !place.limited && turn.slice.is_some() {
            place.merged = 0; // of a time without a limit
        }
        (place.limited, place.stretched) = (turn.slice.is_some(), turn.stretched);
        place.slice = turn.slice.filter(|_| kicked_slice.is_none()).map(|_| room);
        // A kick is not exact: half a slice, give or take as much, is no more than one.
        self.kicked_slice = kicked_slice.map(|slice| slice.div_ceil(2));
        let occupied = place.ring.occupied();
        drop(harvest);
        if replace(&mut self.exited, false) {
            // What others took from the ring since the last full exit was counted, too.
            let moved = gross != replace(&mut self.idle.gross, gross) || occupied > 0;
            turn.until = turn.until.max(now + self.idle_exit(moved)?);
        }
        Ok(Some(turn))
    }

    /// Counts a full exit, if it `moved` nothing; how long to wait before the next.
    fn idle_exit(&mut self, moved: bool) -> Result<Nanos, Error> {
        self.idle.exits = if moved { 0 } else { self.idle.exits.saturating_add(1) };
        match self.idle.exits {
            0 => Ok(0),
            exits if exits < WEDGED => Ok(1000 << exits.min(10)),
            exits => {
                if let Some(mut harvest) = self.vm.try_lock() {
                    harvest.news.wedged = Some(self.seat.id);
                }
                Err(Error::Wedged { id: self.seat.id, exits })
            }
        }
    }

    /// After the pause: makes sure that a reset has freed the slice, and waits for one until `latest` at most. `Some` is when
    /// to try again.
    fn free(&mut self, turn: &Turn, now: Nanos, latest: Nanos) -> Result<Option<Nanos>, Error> {
        if self.seat.wanted() == 0 {
            self.full = false;
            return Ok(None);
        }
        let Some(mut harvest) = self.vm.try_lock() else { return Ok(Some(now + RETRY)) };
        let gap = RESET_GAP.min(self.vm.limiter.vm().max_pause() / 10 * 9);
        let next_reset = harvest.served.saturating_add(gap).min(latest);
        let patient =
            !self.barren && !turn.stretched && turn.slice.is_some_and(|slice| slice < self.vm.ring_entries / 2);
        if patient && now < next_reset {
            return Ok(Some(next_reset));
        }
        harvest.serve(&*self.vm.kernel)?;
        drop(harvest);
        // What is left over is for the next full exit.
        let left = self.seat.wanted() != 0;
        self.full &= left;
        Ok(left.then_some(now + RETRY))
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
