//! What the VM's lock guards of one vCPU: its ring, the slice that the ring is to end, and what of it is charged to whom.

use core::mem::take;

use super::run_time;
use crate::rate::{Nanos, PageRate};
use crate::ring::OwnPages;
use crate::ring::{Entry, Page, Ring};
use crate::set_penalty::Penalty;
use crate::vcpu_cell::VcpuCell;

/// What a metered page is to the dirty log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Metered {
    /// It is to be sent once more than before.
    New,
    /// An entry of it is in a ring already.
    Again,
    /// No page of a known slot.
    Nowhere,
}

/// One vCPU's ring and what was decided about it, for the holder of the VM's lock.
#[derive(Debug)]
pub struct VcpuRing<E> {
    pub(crate) ring: Ring<E>,
    /// What KVM logs of itself in it.
    own: OwnPages,
    /// The slice that the vCPU was last given and that the ring ends; `None` while it is not limited, or kicked.
    slice: Option<u32>,
    /// The slice that the vCPU's thread has asked for, and that no reset has freed yet; 0: none.
    wanted: u32,
    /// The vCPU's thread has noticed that it is limited.
    limited: bool,
    /// That slice is a scaled one, of a vCPU that dirties the same pages again; taken back when the log is taken.
    pub(crate) scaled: bool,
    /// Pages that were counted when they were metered, and again dirty when they were published: they are sent once.
    merged: u32,
    /// When a sweep last found that the vCPU's thread has not noticed its limit; `None` where it had.
    unnoticed: Option<Nanos>,
    /// Each sweep empties it: a kick ends its slices.
    draining: bool,
}

impl<E: AsRef<[Entry]>> VcpuRing<E> {
    /// Of a vCPU that was not limited yet.
    pub const fn new(ring: Ring<E>) -> Self {
        let own = OwnPages::new();
        Self {
            ring,
            own,
            slice: None,
            wanted: 0,
            limited: false,
            scaled: false,
            merged: 0,
            unnoticed: None,
            draining: false,
        }
    }

    /// The ring, to look at.
    pub const fn ring(&self) -> &Ring<E> {
        &self.ring
    }

    /// Counts what is new in the ring; `log` takes note of each page. Returns how many entries are the guest's.
    ///
    /// A page that is to be sent once more than before is net at once; if it is published before the one before was taken,
    /// both are sent as one, and another is free for it.
    pub fn meter(&mut self, cell: &VcpuCell, mut log: impl FnMut(Page) -> Metered) -> u32 {
        let Self { ring, own, .. } = self;
        let (mut net, mut guest) = (0, 0);
        let entries = ring.meter_guest(|page| {
            let metered = log(page);
            net += u32::from(metered == Metered::New);
            let is_guest = !own.is_own(page, metered == Metered::Again);
            guest += u32::from(is_guest);
            is_guest
        });
        if entries > 0 {
            let free = net.min(self.merged);
            self.merged -= free;
            cell.counters.add_pages(net - free, guest);
        }
        guest
    }

    /// As [`Ring::collect`].
    pub fn collect(&mut self, count: u32, each: impl FnMut(Page)) -> u32 {
        self.ring.collect(count, each)
    }

    /// As [`Ring::reclaim`].
    pub fn reclaim(&mut self) -> u32 {
        self.ring.reclaim()
    }

    /// That number of its pages were published although they were dirty, and not taken, already.
    pub const fn add_merged(&mut self, pages: u32) {
        self.merged = self.merged.saturating_add(pages);
    }

    /// What was decided: the slice that the ring is to end, where it is to end one; whether the vCPU is limited; whether that
    /// slice is a scaled one.
    pub const fn assign(&mut self, slice: Option<u32>, limited: bool, scaled: bool) {
        if limited && !self.limited {
            self.merged = 0; // of a time without a limit
        }
        (self.slice, self.limited, self.scaled) = (slice, limited, scaled);
    }

    /// The slice that the ring is to end, in pages.
    pub const fn slice(&self) -> Option<u32> {
        self.slice
    }

    /// The vCPU asks for room for `slice` more pages (0: for nothing), which a reset frees. For its thread.
    pub fn ask(&mut self, cell: &VcpuCell, slice: u32) {
        self.wanted = slice;
        cell.request.make(slice > 0);
        if slice == 0 {
            self.ring.freed();
        }
    }

    /// From now on each sweep empties the ring, so that it holds no more back than was dirtied since the last one; only a kick
    /// ends a slice then. Or no longer. A reset for the vCPU's own slice still takes no more than that needs: each page that is
    /// given back is protected again, and costs the guest a fault.
    pub const fn set_draining(&mut self, draining: bool) {
        self.draining = draining;
    }

    /// Whether sweeps empty it.
    pub(crate) const fn is_draining(&self) -> bool {
        self.draining
    }

    /// Whether the ring ends such a slice.
    pub(crate) fn ends(&self, slice: u32) -> bool {
        !self.draining && self.ring.ends(slice)
    }

    /// How many entries to collect for what the vCPU has asked for.
    pub fn to_grant(&self) -> u32 {
        if self.wanted > 0 { self.ring.to_collect(self.wanted) } else { 0 }
    }

    /// After a reset: answers the vCPU, if what it has asked for is free.
    pub fn grant(&mut self, cell: &VcpuCell) {
        if self.wanted > 0 && self.to_grant() == 0 {
            self.wanted = 0;
            self.ring.freed();
            cell.request.grant();
        }
    }

    /// How many entries a sweep over a running VM collects: all, but of a limited vCPU what leaves it inside its slice, unless
    /// it is drained.
    /// `limit` is the one in force, asked for where the vCPU's thread has not noticed it.
    pub fn plan_sweep(&mut self, cell: &VcpuCell, now: Nanos, limit: impl FnOnce() -> Option<PageRate>) -> u32 {
        match self.slice {
            // Left to fill, so that it notices: it might never, were it emptied by each sweep.
            None if self.is_to_notice(cell) => {
                limit().map_or(self.ring.held_back(), |limit| self.allowance(limit, now))
            }
            slice => {
                self.unnoticed = None;
                let kept = slice.filter(|_| !self.draining);
                kept.map_or(self.ring.held_back(), |slice| self.ring.to_collect(slice))
            }
        }
    }

    /// What the limit has allowed since the last sweep. So what the guest may dirty anew is no more than that, and a ring of
    /// any size fills, and is noticed, where the guest writes faster.
    fn allowance(&mut self, limit: PageRate, now: Nanos) -> u32 {
        let since = self.unnoticed.unwrap_or(now);
        let interval = limit.interval();
        let allowed = interval.pages_for(now.saturating_sub(since));
        let count = allowed.min(self.ring.held_back());
        // Parts of a page are kept for the next sweep; what the guest had no use for is not.
        self.unnoticed = Some(if count < allowed { now } else { since.saturating_add(interval.of(count)) });
        count
    }

    /// Whether there is a limit that the vCPU's thread has not noticed.
    fn is_to_notice(&self, cell: &VcpuCell) -> bool {
        !self.limited && cell.penalty.accept() != Penalty::NONE
    }

    /// Whether to kick the vCPU at a tick that has metered that many of the guest's entries: its limit is news to it, and its
    /// ring is not better left to fill, as it will have in a few ticks.
    pub fn is_news(&self, cell: &VcpuCell, entries: u32) -> bool {
        let will_fill = || !run_time::ends_slices(cell.penalty.accept()) && entries >= self.ring.room() / 4;
        entries > 0 && self.is_to_notice(cell) && !will_fill()
    }

    /// After a sweep: whether the ring was so emptied that it no longer ends the slice, so that only a kick does. Once.
    pub fn take_emptied(&mut self) -> bool {
        let is_emptied = self.slice.is_some_and(|slice| !self.ends(slice));
        self.slice = self.slice.filter(|_| !is_emptied);
        is_emptied
    }

    /// The log was taken: whether a scaled slice is one no longer, of which the vCPU is to be told. Once.
    pub fn take_scaled(&mut self) -> bool {
        take(&mut self.scaled)
    }
}

#[cfg(test)]
mod tests;
