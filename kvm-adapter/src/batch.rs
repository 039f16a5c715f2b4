//! What was collected and waits for its reset: on the way from the rings to the dirty log.

use dirtylimit_core::{BATCH, Page};

use crate::coalesce::LastRun;
use crate::slots::Slots;

#[derive(Debug)]
struct Collected {
    /// Whose ring it was in.
    vcpu: u32,
    page: Page,
    /// A reset gave the entry back and may have left the page unprotected.
    suspect: bool,
}

/// Collected and not yet published; of each ring in its order.
#[derive(Debug)]
pub(crate) struct Batch(Vec<Collected>);

impl Batch {
    pub(crate) fn new() -> Self {
        Self(Vec::with_capacity(BATCH as usize))
    }

    /// How many more there is room for.
    pub(crate) fn room(&self) -> u32 {
        BATCH.saturating_sub(self.len())
    }

    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(BATCH)
    }

    pub(crate) fn push(&mut self, vcpu: u32, page: Page) {
        self.0.push(Collected { vcpu, page, suspect: false });
    }

    /// A reset was interrupted, perhaps in this vCPU's ring. It has given back `given` entries of that, and `waiting` still
    /// wait: the last run of what it gave back is suspect. Returns how many entries that is.
    pub(crate) fn suspect(&mut self, vcpu: u32, given: u32, waiting: u32) -> usize {
        let mut run = LastRun::default();
        let newest_first = self.0.iter_mut().rev().filter(|collected| collected.vcpu == vcpu);
        newest_first
            .skip(waiting as usize)
            .take(given as usize)
            .take_while(|collected| run.reaches(collected.page))
            .map(|collected| collected.suspect = true)
            .count()
    }

    /// Makes all of it known as dirty, after the reset, and tells `merged` of each vCPU's pages how many were dirty already.
    pub(crate) fn publish(&mut self, slots: &mut Slots, mut merged: impl FnMut(u32, u32)) {
        for ring in self.0.chunk_by(|one, other| one.vcpu == other.vcpu) {
            let publish = |collected: &Collected| u32::from(slots.publish(collected.page, collected.suspect));
            merged(ring[0].vcpu, ring.iter().map(publish).sum());
        }
        self.0.clear();
    }
}
