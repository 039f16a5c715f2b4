//! The one way out of a ring: *collect → reset → publish*, under one lock for the whole VM.
//!
//! Reset covers all rings at once (KVM.md, rule 2), so what is collected, what was given back and what may be published
//! are facts of the VM, and one lock owns them all. vCPU threads only ever try it: a thread that does not get it has a
//! pause to spend, or a reset to wait for anyway.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use dirtylimit_core::{Nanos, OwnPages, Page, Penalty, Ring, kicked};

use crate::Error;
use crate::error::system;
use crate::events::State;
use crate::seat::{Seat, VmLimiter};
use crate::slots::{Metered, Slots};
use crate::sys::{self, Kernel, Reset, RingPages};

/// At most so many entries are collected for one reset, so that nobody waits for longer than a fraction of a
/// millisecond; the largest ring of today's kernels takes sixteen.
pub(crate) const BATCH: u32 = 4096;
/// A short reset is repeated so often before it is an error.
const TRIES: u32 = 16;

/// What was done so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Entries given back by resets.
    pub resets: u64,
    /// `KVM_RESET_DIRTY_RINGS` calls.
    pub reset_calls: u64,
    /// Resets that may have left pages unprotected, because they were short or the thread was stopped on the way.
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
    pub(crate) seat: Arc<Seat>,
}

impl Place {
    pub(crate) fn new(ring: Ring<RingPages>, seat: Arc<Seat>) -> Self {
        Self { ring, own: OwnPages::new(), slice: None, limited: false, stretched: false, merged: 0, seat }
    }

    /// Whether there is a limit that the vCPU's thread has not noticed.
    pub(crate) fn is_to_notice(&self, limiter: &VmLimiter) -> bool {
        !self.limited && self.seat.cell(limiter).penalty.accept() != Penalty::NONE
    }
}

/// Everything the lock owns.
#[derive(Debug)]
pub(crate) struct Harvest {
    pub(crate) places: BTreeMap<u32, Place>,
    pub(crate) slots: Slots,
    /// Collected, not yet published, and the vCPUs whose they are.
    batch: Vec<(u32, Page)>,
    /// A reset since the batch was last empty may have left pages unprotected.
    suspect: bool,
    /// When slices were last freed.
    pub(crate) served: Nanos,
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
            batch: Vec::with_capacity(BATCH as usize),
            suspect: false,
            served: 0,
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

    /// Meters every ring.
    pub(crate) fn meter_all(&mut self, limiter: &VmLimiter) {
        for place in self.places.values_mut() {
            meter(place, &mut self.slots, limiter);
        }
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

    /// Frees the slices that vCPUs wait for, all by one reset.
    pub(crate) fn serve(&mut self, kernel: &dyn Kernel) -> Result<(), Error> {
        let wanted = |place: &Place| match place.seat.wanted() {
            0 => 0,
            slice => place.ring.to_collect(slice),
        };
        self.collect(kernel, |_, place, _| wanted(place))?;
        self.served = sys::now();
        for place in self.places.values().filter(|place| wanted(place) == 0) {
            place.seat.serve();
        }
        Ok(())
    }

    /// Collects the oldest entries of each ring, resets, and publishes them and what an earlier reset that failed left;
    /// returns how many. `choose` says how many of a vCPU's ring, given how many there is room for in the batch.
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
        for (id, place) in places {
            let room = BATCH.saturating_sub(u32::try_from(batch.len()).unwrap_or(BATCH));
            let count = choose(*id, place, room).min(room);
            place.ring.collect(count, |page| batch.push((*id, page)));
        }
        let reset = self.reset(kernel);
        self.news.reset_error = reset.as_ref().err().map(Error::errno);
        reset?;
        let published = u32::try_from(self.batch.len()).unwrap_or(BATCH);
        for pages in self.batch.chunk_by(|(one, _), (other, _)| one == other) {
            let merged = pages.iter().map(|(_, page)| u32::from(self.slots.publish(*page, self.suspect))).sum::<u32>();
            self.places.entry(pages[0].0).and_modify(|place| place.merged += merged);
        }
        self.batch.clear();
        self.suspect = false;
        Ok(published)
    }

    /// Resets until nothing that was collected waits for it. What the entries say counts, not what the call returns,
    /// which others may have a part in (KVM.md, rule 2).
    fn reset(&mut self, kernel: &dyn Kernel) -> Result<(), Error> {
        let waiting =
            |places: &BTreeMap<u32, Place>| -> u32 { places.values().map(|place| place.ring.awaiting_reset()).sum() };
        let expected = waiting(&self.places);
        let mut left = expected;
        for _ in 0..TRIES {
            if left == 0 {
                break;
            }
            let reset = kernel.reset();
            // Even a call that failed may have taken entries and left their pages unprotected.
            self.stats.resets += self.places.values_mut().map(|place| u64::from(place.ring.reclaim())).sum::<u64>();
            self.stats.reset_calls += 1;
            left = waiting(&self.places);
            if left > 0 || !matches!(reset, Ok(Reset { disturbed: false, .. })) {
                self.stats.suspect_resets += 1;
                self.suspect = true;
            }
            match reset {
                // Some kernels answer so in place of a short count.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(system("KVM_RESET_DIRTY_RINGS")(error)),
                Ok(_) => {}
            }
        }
        if left > 0 {
            return Err(Error::ShortReset { given: expected - left, expected, tries: TRIES });
        }
        Ok(())
    }

    /// Hands out a slot's published pages. What was a rewriter's slice is so no longer.
    pub(crate) fn take(&mut self, slot: u32, limiter: &VmLimiter) -> Result<Vec<u64>, Error> {
        let taken = self.slots.take(slot)?;
        for place in self.places.values_mut() {
            if std::mem::replace(&mut place.stretched, false) {
                place.seat.tell(limiter);
            }
        }
        Ok(taken)
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
