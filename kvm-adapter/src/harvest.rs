//! The one way out of a ring: *collect → reset → publish*, under one lock for the whole VM.
//!
//! Reset covers all rings at once (KVM.md, rule 2), so what is collected, what was given back and what may be published
//! are facts of the VM, and one lock owns them all. vCPU threads only ever try it: a thread that does not get it has a
//! pause to spend, or a reset to wait for anyway.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use dirtylimit_core::{BATCH, Nanos, Ring, SECOND, VcpuRing};

use crate::Error;
use crate::batch::Batch;
use crate::error::system;
use crate::shared::{SharedVcpu, VmLimiter};
use crate::slots::Slots;
use crate::sys::{self, Kernel, Reset, RingPages};
use crate::told::{Life, State};

/// Resets in a row that gave nothing back, with entries waiting, before it is an error.
const IDLE_RESETS: u32 = 64;
/// Entries that are metered under the lock before others may have it.
const METERED: u32 = 4 * BATCH;

/// What was done so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
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
    /// Resets that failed, or gave nothing back: what was collected waits for a later one.
    pub failed_resets: u64,
    /// Full exits that ended in [`Error::Wedged`]: the pages of that vCPU are unknown.
    pub wedged: u64,
    /// Collected entries that named no slot, or a page beyond its end.
    pub dropped: u64,
    /// The soft limit of the rings as far as learned, the lowest of them; 0 before the first vCPU.
    pub soft_limit: u32,
}

/// A vCPU's ring and who it belongs to.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) vcpu: VcpuRing<RingPages>,
    /// Entries that the last reset gave back.
    given: u32,
    /// A reset has given some back, so the ring is one of this VM's.
    is_ours: bool,
    /// For the log.
    pub(crate) life: Life,
    pub(crate) shared: Arc<SharedVcpu>,
}

impl Row {
    pub(crate) fn new(ring: Ring<RingPages>, shared: Arc<SharedVcpu>) -> Self {
        Self { vcpu: VcpuRing::new(ring), given: 0, is_ours: false, life: Life::default(), shared }
    }

    /// The ring, to look at.
    pub(crate) const fn ring(&self) -> &Ring<RingPages> {
        self.vcpu.ring()
    }

    /// Counts what is new in the ring; returns how many entries are the guest's.
    fn meter(&mut self, slots: &mut Slots, limiter: &VmLimiter) -> u32 {
        self.vcpu.meter(self.shared.cell(limiter), |page| slots.meter(page))
    }

    /// How much of the ring a pass collects.
    pub(crate) fn plan_sweep(&mut self, limiter: &VmLimiter, now: Nanos) -> u32 {
        let limit = || limiter.query(self.shared.index, now).and_then(|status| status.effective_limit);
        self.vcpu.plan_sweep(self.shared.cell(limiter), now, limit)
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
    pub(crate) rows: BTreeMap<u32, Row>,
    pub(crate) slots: Slots,
    batch: Batch,
    /// The vCPU whose ring is collected first: the one at which the last batch was full.
    first: u32,
    /// When slices were last freed.
    pub(crate) served: Nanos,
    /// Sweeps empty the rings.
    draining: bool,
    cuts: Cuts,
    stats: Stats,
    /// Of which the log is told, beside what is found in the rest; and what it was told.
    pub(crate) news: State,
    pub(crate) told: State,
}

impl Harvest {
    pub(crate) fn new() -> Self {
        Self {
            rows: BTreeMap::new(),
            slots: Slots::default(),
            batch: Batch::new(),
            first: 0,
            served: 0,
            draining: false,
            cuts: Cuts::default(),
            stats: Stats::default(),
            news: State::default(),
            told: State::default(),
        }
    }

    /// A vCPU's ring is one of those from now on.
    pub(crate) fn add(&mut self, id: u32, mut row: Row) {
        row.vcpu.set_draining(self.draining);
        self.rows.insert(id, row);
    }

    /// From now on sweeps empty the rings, or no longer.
    pub(crate) fn set_draining(&mut self, draining: bool) {
        self.draining = draining;
        self.rows.values_mut().for_each(|row| row.vcpu.set_draining(draining));
        self.kick_emptied();
    }

    pub(crate) fn stats(&self) -> Stats {
        let soft_limit = self.soft_limit();
        Stats { dropped: self.slots.dropped, suspect_pages: self.slots.suspects(), soft_limit, ..self.stats }
    }

    fn soft_limit(&self) -> u32 {
        self.rows.values().map(|row| row.ring().soft_limit()).min().unwrap_or(0)
    }

    /// The ring of `id` was found wedged.
    pub(crate) fn found_wedged(&mut self, id: u32) {
        self.stats.wedged += 1;
        self.news.wedged = Some(id);
    }

    /// What the log may be told.
    pub(crate) fn state(&self) -> State {
        State { suspect_resets: self.stats.suspect_resets, soft_limit: self.soft_limit(), ..self.news }
    }

    /// Meters the ring of `id` and passes its row on; `None` if there is none.
    pub(crate) fn meter(&mut self, id: u32, limiter: &VmLimiter) -> Option<&mut Row> {
        let row = self.rows.get_mut(&id)?;
        row.meter(&mut self.slots, limiter);
        Some(row)
    }

    /// Meters rings in the order of their ids, from `from` on, and passes each row on. `Some` is where to go on, when
    /// others had a chance to get the lock.
    pub(crate) fn meter_from(
        &mut self,
        from: u32,
        limiter: &VmLimiter,
        mut each: impl FnMut(u32, &mut Row),
    ) -> Option<u32> {
        let mut entries = 0;
        for (id, row) in self.rows.range_mut(from..) {
            if entries >= METERED {
                return Some(*id);
            }
            entries += row.meter(&mut self.slots, limiter);
            each(*id, row);
        }
        None
    }

    /// Meters every ring, and kicks the vCPUs that dirty pages under a limit that is news to them.
    pub(crate) fn meter_and_kick(&mut self, limiter: &VmLimiter) {
        for row in self.rows.values_mut() {
            let entries = row.meter(&mut self.slots, limiter);
            if row.vcpu.is_news(row.shared.cell(limiter), entries) {
                row.shared.kick();
            }
        }
    }

    /// After a sweep: kicks the vCPUs whose rings were so emptied that they no longer end their slices.
    pub(crate) fn kick_emptied(&mut self) {
        self.rows
            .values_mut()
            .filter_map(|row| row.vcpu.take_emptied().then_some(&row.shared))
            .for_each(|shared| shared.kick());
    }

    /// Forgets a vCPU once nothing is left in its ring. In one hold of the lock: no entry comes between, and none that was
    /// collected is published without its reset.
    pub(crate) fn remove(&mut self, id: u32, kernel: &dyn Kernel, limiter: &VmLimiter) -> Result<(), Error> {
        while let Some(row) = self.meter(id, limiter) {
            let expected = row.ring().occupied();
            if expected == 0 && self.batch.len() == 0 {
                break;
            }
            let all = |other, row: &Row, _| if other == id { row.ring().held_back() } else { 0 };
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
        if let Some(row) = self.rows.remove(&id) {
            limiter.unregister(row.shared.index);
        }
    }

    /// The vCPUs whose rings wait for a reset, and none has ever given an entry of theirs back.
    fn foreign(&self) -> impl Iterator<Item = u32> {
        self.rows.iter().filter(|(_, row)| !row.is_ours && row.ring().awaiting_reset() > 0).map(|(&id, _)| id)
    }

    /// Frees the slices that vCPUs wait for, all by one reset.
    pub(crate) fn grant(&mut self, kernel: &dyn Kernel, limiter: &VmLimiter) -> Result<(), Error> {
        self.collect(kernel, |_, row, _| row.vcpu.to_grant())?;
        self.served = sys::now();
        self.rows.values_mut().for_each(|row| row.vcpu.grant(row.shared.cell(limiter)));
        Ok(())
    }

    /// Collects the oldest entries of each ring, resets, and publishes them and what an earlier reset that failed left;
    /// returns how many. `choose` says how many of a vCPU's ring, given how many there is room for in the batch. Who finds no
    /// room is first the next time.
    pub(crate) fn collect(
        &mut self,
        kernel: &dyn Kernel,
        mut choose: impl FnMut(u32, &Row, u32) -> u32,
    ) -> Result<u32, Error> {
        let Self { rows, batch, .. } = self;
        // A ring without an empty entry stays as it is, and so do its pages: unknown.
        if let Some((&id, _)) = rows.iter().find(|(_, row)| row.ring().occupied() == row.ring().size()) {
            return Err(Error::Overrun(id));
        }
        let mut crowded = None;
        let mut collect = |(&id, row): (&u32, &mut Row)| {
            let room = batch.room();
            let count = choose(id, row, room);
            row.vcpu.collect(count.min(room), |page| batch.push(id, page));
            if count >= room {
                crowded = crowded.or(Some(id));
            }
        };
        rows.range_mut(self.first..).for_each(&mut collect);
        rows.range_mut(..self.first).for_each(&mut collect);
        self.first = crowded.unwrap_or(self.first);
        let reset = self.reset(kernel);
        self.news.reset_error = reset.as_ref().err().map(Error::errno);
        self.stats.failed_resets += u64::from(reset.is_err());
        reset?;
        let Self { rows, batch, slots, .. } = self;
        let published = batch.len();
        batch.publish(slots, |id, merged| {
            rows.entry(id).and_modify(|row| row.vcpu.add_merged(merged));
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
            for row in self.rows.values_mut() {
                row.given = row.vcpu.reclaim();
                row.is_ours |= row.given > 0;
                given += row.given;
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
        self.rows.values().map(|row| row.ring().awaiting_reset()).sum()
    }

    /// The last reset was interrupted. Where it gave back a part of a ring, it stopped there; otherwise it did so at the end of
    /// one of those that it gave back whole, and only KVM knows which, as it goes by the order in which vCPUs were created.
    fn suspect(&mut self) {
        let Self { rows, batch, stats, .. } = self;
        let is_part = |row: &Row| row.given > 0 && row.ring().awaiting_reset() > 0;
        let is_known = rows.values().any(is_part);
        let stopped = rows.iter().filter(|(_, row)| is_part(row) || (!is_known && row.given > 0));
        let suspects: usize = stopped.map(|(id, row)| batch.suspect(*id, row.given, row.ring().awaiting_reset())).sum();
        stats.suspect_resets += u64::from(suspects > 0);
    }

    /// A slot's published pages were handed out. What was a rewriter's slice is so no longer.
    pub(crate) fn taken(&mut self, limiter: &VmLimiter) {
        for row in self.rows.values_mut() {
            if row.vcpu.take_scaled() {
                row.shared.notify(limiter);
            }
        }
    }
}
