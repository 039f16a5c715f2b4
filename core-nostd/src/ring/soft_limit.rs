//! The occupancy at which a vCPU exits, learned from its full exits: the kernel does not tell it.
//!
//! With entries that come one by one, a full exit happens exactly at the soft limit. A CPU that hands pages over in lumps
//! (Intel's PML, arm64's HDBSS) exits up to a lump above it. So an occupancy says at most what the soft limit is not: it
//! does not lie above that of a full exit, and where the guest got nowhere it does not lie above the occupancy at entry.
//! No occupancy is believed for good: what two full exits in a row agree on is taken over, and what full exits without a page
//! of the guest's refuted is tried again after a while.
//!
//! A full exit below the highest is proof that the kernel keeps room for lumps, where nothing was taken from the ring since
//! the vCPU entered: pages that come one by one get as far as the highest. From then on the occupancy at each such exit is a
//! bound, and the lowest of them is believed. That pages come in lumps is the one thing that is believed for good.
//!
//! Believing too little makes slices longer, which the guest pays for; believing too much makes full exits without a page.

/// The number of full exits in a row at the same occupancy that is believed …
const AGREE: u32 = 2;
/// … and the number where it was refuted before.
const AGREE_AGAIN: u32 = 64;
/// The first full exit without a page of the guest's may be a stale exit reason; from the second on, what is believed falls by
/// so much, and by twice as much each time.
const STEP: u32 = 32;

/// The same where pages come in lumps, and each such exit is a bound itself; up to 2^7 of it.
const LUMP_STEP: u32 = 4;

/// A lump is forgotten by this part at each full exit: a kick that is not needed costs less than a slice that nothing ends.
const FORGET: u32 = 64;

/// What is believed of one ring.
#[derive(Debug)]
pub(crate) struct SoftLimit {
    /// What no kernel exceeds.
    highest: u32,
    believed: u32,
    /// What was refuted: higher occupancies take longer to be believed.
    bound: u32,
    /// The occupancy of the last full exit with a page, 0 before the first; and how many in a row had the same.
    level: u32,
    agreeing: u32,
    /// Full exits in a row without one.
    barren: u32,
    /// How far full exits lie beyond what is believed: the size of a lump.
    lump: u32,
    /// Pages were proved to come in lumps.
    lumps: bool,
}

impl SoftLimit {
    /// Nothing is known but that it is no higher.
    pub(crate) const fn new(highest: u32) -> Self {
        Self { highest, believed: highest, bound: highest, level: 0, agreeing: 0, barren: 0, lump: 0, lumps: false }
    }

    /// From 1 to the highest.
    pub(crate) const fn get(&self) -> u32 {
        self.believed
    }

    /// By how many entries a full exit may miss its slice.
    pub(crate) const fn lump(&self) -> u32 {
        self.lump
    }

    /// Whether pages were proved to come in lumps.
    pub(crate) const fn has_lumps(&self) -> bool {
        self.lumps
    }

    /// A full exit at this occupancy (not 0), and nothing was taken from the ring since the vCPU entered. `barren` is how many
    /// entries the kernel pushed itself in a run without a page of the guest's.
    pub(crate) fn proved(&mut self, occupied: u32, barren: Option<u32>) {
        if !self.lumps && occupied < self.highest {
            (self.lumps, self.believed, self.bound, self.barren) = (true, occupied, occupied, 0);
        }
        if !self.lumps {
            return;
        }
        self.bound = self.bound.min(occupied.saturating_sub(barren.unwrap_or(0))).max(1);
        self.believed = if barren.is_none() {
            self.barren = 0;
            // It may have been taken for too low.
            let below = self.bound - self.believed.min(self.bound);
            self.bound - below / 2
        } else {
            self.barren = self.barren.saturating_add(1);
            let below = if self.barren > 1 { LUMP_STEP << (self.barren - 2).min(7) } else { 0 };
            self.bound.saturating_sub(below).max(1)
        };
    }

    /// A full exit with pages of the guest's, the last of which brought the ring to `level`.
    pub(crate) fn reached(&mut self, level: u32) {
        // At once, but where it looks like a stale exit reason.
        let first = self.level == 0 && level > self.highest / 4;
        self.agreeing = if level == self.level { self.agreeing.saturating_add(1) } else { 1 };
        (self.level, self.barren) = (level, 0);
        // One after the other, pages get no further than the soft limit, which on most hosts is the highest. The first
        // exit below that is no proof of lumps, and what agrees with it refutes them.
        let beyond = if first { self.highest.saturating_sub(level) } else { level.saturating_sub(self.believed) };
        self.lump = beyond.max(self.lump - self.lump.div_ceil(FORGET));
        if self.lumps {
            return;
        }
        let level = level.min(self.highest).max(1);
        let refuted = level > self.bound;
        if first || self.agreeing >= if refuted { AGREE_AGAIN } else { AGREE } {
            self.believed = level;
            self.bound = self.bound.max(level);
        }
    }

    /// A full exit without a page of the guest's, at an occupancy below what is believed.
    pub(crate) fn barren(&mut self, occupied: u32) {
        if self.lumps {
            return; // `proved` has seen it
        }
        self.agreeing = 0;
        self.barren = self.barren.saturating_add(1);
        if self.barren > 1 {
            let step = STEP.checked_shl(self.barren - 2).unwrap_or(u32::MAX).max(STEP);
            self.believed = occupied.saturating_sub(step).min(self.highest).max(1);
            self.bound = self.believed;
        }
    }
}

#[cfg(test)]
mod tests;
