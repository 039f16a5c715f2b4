//! What there is to tell of a VM and of each vCPU, kept under the harvest's lock until a log is told.

use dirtylimit_core::{Counters, Nanos, SECOND};

/// What there is to tell of what goes on under the harvest's lock.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct State {
    pub(crate) suspect_resets: u64,
    pub(crate) soft_limit: u32,
    /// The `errno` of the last reset, if it failed.
    pub(crate) reset_error: Option<i32>,
    /// The last vCPU whose ring was found wedged.
    pub(crate) wedged: Option<u32>,
    /// There are limits, and no ticks.
    pub(crate) lapsed: bool,
    /// The first vCPU with a full exit that nobody serves.
    pub(crate) unserved: Option<u32>,
}

/// When a vCPU last showed that it goes on, and by which counts.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Life {
    at: Nanos,
    gross: u32,
    charges: u32,
    /// A full exit was seen since, of which its thread has taken no note.
    full: bool,
}

impl Life {
    /// Whether the vCPU has left KVM_RUN with a full ring, and for a second neither dirtied a page nor come to pay.
    pub(crate) fn is_unserved(&mut self, counters: &Counters, is_full: bool, now: Nanos) -> bool {
        let (gross, charges) = (counters.counts().gross, counters.charges());
        if self.at == 0 || (self.gross, self.charges) != (gross, charges) {
            *self = Self { at: now, gross, charges, full: false };
        }
        // KVM changes the exit's reason now and then, where KVM_RUN is called again and again.
        self.full |= is_full;
        self.full && now.saturating_sub(self.at) >= SECOND
    }
}
