//! The one way out of a ring: *collect → reset → publish*, under one lock for the whole VM.
//!
//! Reset covers all rings at once (KVM.md, rule 2), so what is collected, what was given back and what may be published
//! are facts of the VM, and one lock owns them all. vCPU threads only ever try it: a thread that does not get it has a
//! pause to spend, or a reset to wait for anyway.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use dirtylimit_core::{Nanos, OwnPages, Penalty, Ring, SECOND, kicked};

use crate::Error;
pub(crate) use crate::batch::BATCH;
use crate::batch::Batch;
use crate::error::system;
use crate::events::{Life, State};
use crate::seat::{Seat, VmLimiter};
use crate::slots::{Metered, Slots};
use crate::sys::{self, Kernel, Reset, RingPages};

/// Resets in a row that gave nothing back, with entries waiting, before it is an error.
const IDLE_RESETS: u32 = 64;
/// Entries that are metered under the lock before others may have it.
const METERED: u32 = 4 * BATCH;

/// What was done so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Entries given back by resets.
    pub resets: u64,
    /// `KVM_RESET_DIRTY_RINGS` calls.
    pub reset_calls: u64,
    /// Resets that may have left pages unprotected, because they were short or the thread was stopped on the way: of each
    /// the last pages that it gave back, at most 64 of a vCPU.
    pub suspect_resets: u64,
    /// Pages that are therefore handed out as dirty by every take, now.
    pub suspect_pages: u64,
    /// Collected entries that named no slot, or a page beyond its end.
    pub dropped: u64,
    /// The soft limit of the rings as far as learned, the lowest of them; 0 before the first vCPU.
    pub soft_limit: u32,
}

/// A vCPU's ring and who it belongs to.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) ring: Ring<RingPages>,
    /// What KVM logs of itself in it.
    own: OwnPages,
    /// The slice that the vCPU was last given and that the ring ends; `None` while it is not limited, or kicked.
    pub(crate) slice: Option<u32>,
    /// The vCPU's thread has noticed that it is limited.
    pub(crate) limited: bool,
    /// That slice is a rewriter's; taken back when the log is taken.
    pub(crate) stretched: bool,
    /// Pages that were counted when they were metered, and again dirty when they were published: they are sent once.
    pub(crate) merged: u32,
    /// Entries that the last reset gave back.
    given: u32,
    /// A reset has given some back, so the ring is one of this VM's.
    is_ours: bool,
    /// When a pass last found that the vCPU's thread has not noticed its limit; `None` where it had.
    pub(crate) unnoticed: Option<Nanos>,
    /// For the log.
    pub(crate) life: Life,
    pub(crate) seat: Arc<Seat>,
}

impl Place {
    pub(crate) fn new(ring: Ring<RingPages>, seat: Arc<Seat>) -> Self {
        Self {
            ring,
            own: OwnPages::new(),
            slice: None,
            limited: false,
            stretched: false,
            merged: 0,
            given: 0,
            is_ours: false,
            unnoticed: None,
            life: Life::default(),
            seat,
        }
    }

    /// How much of a ring a pass collects whose vCPU has not noticed its limit: what the limit has allowed since the last
    /// one did. So what the guest may dirty anew is no more than that, and a ring of any size fills, and is noticed, where
    /// the guest writes faster.
    pub(crate) fn allowance(&mut self, limiter: &VmLimiter, now: Nanos) -> u32 {
        let since = self.unnoticed.unwrap_or(now);
        let Some(limit) = limiter.query(self.seat.index, now).and_then(|status| status.effective_limit) else {
            return self.ring.held_back();
        };
        let allowed = limit.price().pages_for(now.saturating_sub(since));
        let count = allowed.min(self.ring.held_back());
        // Parts of a page are kept for the next pass; what the guest had no use for is not.
        self.unnoticed = Some(if count < allowed { now } else { since + limit.price().of(count) });
        count
    }

    /// Whether there is a limit that the vCPU's thread has not noticed.
    pub(crate) fn is_to_notice(&self, limiter: &VmLimiter) -> bool {
        !self.limited && self.seat.cell(limiter).penalty.accept() != Penalty::NONE
    }
}

/// When resets were last cut short: by a stop, a tracer, a freezer, or an `io_uring`.
///
/// A stop that SIGCONT takes back before the thread has reached it is no voluntary switch. Nothing shows one that comes between
/// the last entry's check for signals and the end of the reset, where KVM forgets what it gathered last. But that moment is short:
/// hundreds of stops fall on an earlier entry, and cut the reset short, for one that falls there. So three cuts within
/// [`STORM`] mean that no reset is believed. A process that is halted now and then has fewer.
#[derive(Default, Debug)]
pub(crate) struct Cuts([Option<Nanos>; 3]);

const STORM: Nanos = 10 * SECOND;

impl Cuts {
    /// Whether a reset that is over now, and that was cut short or not, is in a storm.
    pub(crate) fn are_a_storm(&mut self, cut: bool, now: Nanos) -> bool {
        if cut {
            self.0.rotate_left(1);
            self.0[2] = Some(now);
        }
        self.0[0].is_some_and(|first| now.saturating_sub(first) <= STORM)
    }
}

/// Everything the lock owns.
#[derive(Debug)]
pub(crate) struct Harvest {
    pub(crate) places: BTreeMap<u32, Place>,
    pub(crate) slots: Slots,
    batch: Batch,
    /// The vCPU whose ring is collected first: the one at which the last batch was full.
    first: u32,
    /// When slices were last freed.
    pub(crate) served: Nanos,
    cuts: Cuts,
    stats: Stats,
    /// Of which the log is told, beside what is found in the rest; and what it was told.
    pub(crate) news: State,
    pub(crate) told: State,
}

impl Harvest {
    pub(crate) fn new() -> Self {
        Self {
            places: BTreeMap::new(),
            slots: Slots::default(),
            batch: Batch::new(),
            first: 0,
            served: 0,
            cuts: Cuts::default(),
            stats: Stats::default(),
            news: State::default(),
            told: State::default(),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        let soft_limit = self.soft_limit();
        Stats { dropped: self.slots.dropped, suspect_pages: self.slots.suspects(), soft_limit, ..self.stats }
    }

    fn soft_limit(&self) -> u32 {
        self.places.values().map(|place| place.ring.soft_limit()).min().unwrap_or(0)
    }

    /// What the log may be told.
    pub(crate) fn state(&self) -> State {
        State { suspect_resets: self.stats.suspect_resets, soft_limit: self.soft_limit(), ..self.news }
    }

    /// Meters the ring of `id` and passes its place on, with the number of new entries of the guest's; `None` if there is none.
    pub(crate) fn meter(&mut self, id: u32, limiter: &VmLimiter) -> Option<(&mut Place, u32)> {
        let place = self.places.get_mut(&id)?;
        let entries = meter(place, &mut self.slots, limiter);
        Some((place, entries))
    }

    /// Meters rings in the order of their ids, from `from` on, and passes each place on. `Some` is where to go on, when
    /// others had a chance to get the lock.
    pub(crate) fn meter_from(
        &mut self,
        from: u32,
        limiter: &VmLimiter,
        mut each: impl FnMut(u32, &mut Place),
    ) -> Option<u32> {
        let mut entries = 0;
        for (id, place) in self.places.range_mut(from..) {
            if entries >= METERED {
                return Some(*id);
            }
            entries += meter(place, &mut self.slots, limiter);
            each(*id, place);
        }
        None
    }

    /// Meters every ring, and kicks the vCPUs that dirty pages under a limit that is news to them, unless their rings are
    /// better left to fill and will have in a few ticks.
    pub(crate) fn meter_and_kick(&mut self, limiter: &VmLimiter) {
        for place in self.places.values_mut() {
            let entries = meter(place, &mut self.slots, limiter);
            let penalty = place.seat.cell(limiter).penalty.accept();
            let is_news = entries > 0 && place.is_to_notice(limiter);
            if is_news && (kicked::ends_slices(penalty) || entries < place.ring.room() / 4) {
                place.seat.kick();
            }
        }
    }

    /// After a sweep: kicks the vCPUs whose rings were so emptied that they no longer end their slices.
    pub(crate) fn kick_emptied(&mut self) {
        for place in self.places.values_mut() {
            if place.slice.is_some_and(|slice| !place.ring.ends(slice)) {
                place.slice = None;
                place.seat.kick();
            }
        }
    }

    /// Forgets a vCPU once nothing is left in its ring. In one hold of the lock: no entry comes between, and none that was
    /// collected is published without its reset.
    pub(crate) fn remove(&mut self, id: u32, kernel: &dyn Kernel, limiter: &VmLimiter) -> Result<(), Error> {
        while let Some((place, _)) = self.meter(id, limiter) {
            let expected = place.ring.occupied();
            if expected == 0 && self.batch.len() == 0 {
                break;
            }
            let all = |other, place: &Place, _| if other == id { place.ring.held_back() } else { 0 };
            if self.collect(kernel, all)? == 0 {
                return Err(Error::ShortReset { given: 0, expected, tries: 1 });
            }
        }
        self.forget(id, limiter);
        Ok(())
    }

    /// Forgets a vCPU of another VM, whose entries no reset gives back; those that were collected are published by the next
    /// reset. Whether it is one, as far as resets have shown.
    pub(crate) fn disown(&mut self, id: u32, limiter: &VmLimiter) -> bool {
        let is_foreign = self.foreign().any(|foreign| foreign == id);
        if is_foreign {
            self.forget(id, limiter);
        }
        is_foreign
    }

    fn forget(&mut self, id: u32, limiter: &VmLimiter) {
        if let Some(place) = self.places.remove(&id) {
            limiter.unregister(place.seat.index);
        }
    }

    /// The vCPUs whose rings wait for a reset, and none has ever given an entry of theirs back.
    fn foreign(&self) -> impl Iterator<Item = u32> {
        self.places.iter().filter(|(_, place)| !place.is_ours && place.ring.awaiting_reset() > 0).map(|(&id, _)| id)
    }

    /// Frees the slices that vCPUs wait for, all by one reset.
    pub(crate) fn serve(&mut self, kernel: &dyn Kernel) -> Result<(), Error> {
        let wanted = |place: &Place| match place.seat.wanted() {
            0 => 0,
            slice => place.ring.to_collect(slice),
        };
        self.collect(kernel, |_, place, _| wanted(place))?;
        self.served = sys::now();
        for place in self.places.values_mut().filter(|place| place.seat.wanted() > 0 && wanted(place) == 0) {
            place.ring.freed();
            place.seat.serve();
        }
        Ok(())
    }

    /// Collects the oldest entries of each ring, resets, and publishes them and what an earlier reset that failed left;
    /// returns how many. `choose` says how many of a vCPU's ring, given how many there is room for in the batch. Who finds no
    /// room is first the next time.
    pub(crate) fn collect(
        &mut self,
        kernel: &dyn Kernel,
        mut choose: impl FnMut(u32, &Place, u32) -> u32,
    ) -> Result<u32, Error> {
        let Self { places, batch, .. } = self;
        // A ring without an empty entry stays as it is, and so do its pages: unknown.
        if let Some((&id, _)) = places.iter().find(|(_, place)| place.ring.occupied() == place.ring.size()) {
            return Err(Error::Overrun(id));
        }
        let mut crowded = None;
        let mut collect = |(&id, place): (&u32, &mut Place)| {
            let room = batch.room();
            let count = choose(id, place, room);
            place.ring.collect(count.min(room), |page| batch.push(id, page));
            if count >= room {
                crowded = crowded.or(Some(id));
            }
        };
        places.range_mut(self.first..).for_each(&mut collect);
        places.range_mut(..self.first).for_each(&mut collect);
        self.first = crowded.unwrap_or(self.first);
        let reset = self.reset(kernel);
        self.news.reset_error = reset.as_ref().err().map(Error::errno);
        reset?;
        let Self { places, batch, slots, .. } = self;
        let published = batch.len();
        batch.publish(slots, |id, merged| {
            places.entry(id).and_modify(|place| place.merged += merged);
        });
        Ok(published)
    }

    /// Resets until nothing that was collected waits for it. What the entries say counts, not what the call returns,
    /// which others may have a part in (KVM.md, rule 2).
    fn reset(&mut self, kernel: &dyn Kernel) -> Result<(), Error> {
        let expected = self.waiting();
        let mut left = expected;
        let mut idle = 0;
        while left > 0 {
            let reset = kernel.reset();
            self.stats.reset_calls += 1;
            let mut given = 0;
            for place in self.places.values_mut() {
                place.given = place.ring.reclaim();
                place.is_ours |= place.given > 0;
                given += place.given;
            }
            self.stats.resets += u64::from(given);
            left = self.waiting();
            let undisturbed = matches!(reset, Ok(Reset { disturbed: false, .. }));
            // Even a call that failed may have taken entries and left their pages unprotected.
            if self.cuts.are_a_storm(left > 0, sys::now()) || left > 0 || !undisturbed {
                self.suspect();
            }
            match reset {
                // Some kernels answer so in place of a short count.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(system("KVM_RESET_DIRTY_RINGS")(error)),
                Ok(_) => {}
            }
            idle = if given > 0 { 0 } else { idle + 1 };
            if idle == IDLE_RESETS {
                if let Some(id) = self.foreign().next().filter(|_| undisturbed) {
                    return Err(Error::ForeignVcpu(id));
                }
                return Err(Error::ShortReset { given: expected - left, expected, tries: idle });
            }
        }
        Ok(())
    }

    /// Entries that are collected and not given back.
    fn waiting(&self) -> u32 {
        self.places.values().map(|place| place.ring.awaiting_reset()).sum()
    }

    /// The last reset was interrupted. Where it gave back a part of a ring, it stopped there; otherwise it did so at the end of
    /// one of those that it gave back whole, and only KVM knows which, as it goes by the order in which vCPUs were created.
    fn suspect(&mut self) {
        let Self { places, batch, stats, .. } = self;
        let is_part = |place: &Place| place.given > 0 && place.ring.awaiting_reset() > 0;
        let is_known = places.values().any(is_part);
        let stopped = places.iter().filter(|(_, place)| is_part(place) || (!is_known && place.given > 0));
        let suspects: usize =
            stopped.map(|(id, place)| batch.suspect(*id, place.given, place.ring.awaiting_reset())).sum();
        stats.suspect_resets += u64::from(suspects > 0);
    }

    /// A slot's published pages were handed out. What was a rewriter's slice is so no longer.
    pub(crate) fn taken(&mut self, limiter: &VmLimiter) {
        for place in self.places.values_mut() {
            if std::mem::replace(&mut place.stretched, false) {
                place.seat.tell(limiter);
            }
        }
    }
}

/// Counts what is new in a ring. A page that is to be sent once more than before is net at once; if it is published before
/// the one before was taken, both are sent as one, and another is free for it. Returns how many entries are the guest's.
fn meter(place: &mut Place, slots: &mut Slots, limiter: &VmLimiter) -> u32 {
    let Place { ring, own, .. } = place;
    let (mut net, mut guest) = (0, 0);
    let entries = ring.meter_guest(|page| {
        let metered = slots.meter(page);
        net += u32::from(metered == Metered::New);
        let is_guest = !own.is_own(page, metered == Metered::Again);
        guest += u32::from(is_guest);
        is_guest
    });
    if entries > 0 {
        let free = net.min(place.merged);
        place.merged -= free;
        place.seat.cell(limiter).report.add_pages(net - free, guest);
    }
    guest
}
