//! The adapter's part: *meter*, *collect → reset → publish*, one lock for the whole VM. As in `dirtylimit-kvm`'s
//! `harvest.rs`, but a reset takes virtual time, in which the lock is held and the guest runs on.

use std::rc::Rc;

use anyhow::Result;
use dirtylimit_core::{Entry, Limiter, Nanos, OwnPages, Page, Penalty, Policy, Ring, VcpuCell, VcpuIndex, kicked};

use super::kernel::{KernelRing, Memory, Published};
use super::{Fault, Machine, costs};
use crate::record::KickKind;

/// As many as the adapter takes.
pub(super) const MAX_VCPUS: usize = 1024;
/// The adapter's: entries collected for one reset.
pub(super) const BATCH: u32 = 4096;
/// The adapter's: resets are so far apart unless somebody cannot wait.
pub(super) const RESET_GAP: Nanos = 2_100_000;

/// A vCPU's ring, and what it waits for.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) ring: Ring<Rc<[Entry]>>,
    /// What the kernel logs of itself in it.
    own: OwnPages,
    /// The slice that the vCPU was last given and that the ring ends; `None` while it is not limited, or kicked.
    pub(super) slice: Option<u32>,
    /// The vCPU's thread has noticed that it is limited.
    pub(super) limited: bool,
    /// The slice last given is a rewriter's; taken back when the log is taken.
    pub(super) stretched: bool,
    /// Slice to free at the next reset, in pages; 0 when it is free.
    pub(super) want: u32,
    /// Pages that were counted when they were metered, and again dirty when they were published: they are sent once.
    pub(super) merged: u32,
    /// When a pass last found that the vCPU's thread has not noticed its limit.
    unnoticed: Option<Nanos>,
    index: VcpuIndex,
}

/// The adapter, and the machine under it.
#[derive(Debug)]
pub(super) struct Adapter<P: Policy> {
    pub(super) limiter: Box<Limiter<P, MAX_VCPUS>>,
    pub(super) places: Vec<Place>,
    pub(super) kernel: Vec<KernelRing>,
    pub(super) memory: Memory,
    /// Collected, not yet published, and the vCPUs whose they are.
    batch: Vec<(usize, Page)>,
    /// Published, not yet taken.
    published: Vec<Page>,
    /// A reset is under way until then: nobody else gets the lock.
    pub(super) locked: Option<Nanos>,
    /// When slices were last freed.
    pub(super) served: Nanos,
    pub(super) reset_pages: u64,
    pub(super) reset_calls: u64,
    machine: Machine,
}

impl<P: Policy> Adapter<P> {
    pub(super) fn new(policy: P, memory: Memory, machine: Machine) -> Self {
        Self {
            limiter: Box::new(Limiter::new(policy)),
            places: Vec::new(),
            kernel: Vec::new(),
            memory,
            batch: Vec::new(),
            published: Vec::new(),
            locked: None,
            served: 0,
            reset_pages: 0,
            reset_calls: 0,
            machine,
        }
    }

    /// # Errors
    /// A ring that the core or the kernel refuses, too many vCPUs.
    pub(super) fn add_vcpu(&mut self, ring: u32, steal: Option<usize>) -> Result<VcpuIndex> {
        let kernel = KernelRing::new(ring, self.machine.pml, steal)?;
        let index = self.limiter.register()?;
        self.places.push(Place {
            ring: Ring::new(kernel.entries())?,
            own: OwnPages::new(),
            slice: None,
            limited: false,
            stretched: false,
            want: 0,
            merged: 0,
            unnoticed: None,
            index,
        });
        self.kernel.push(kernel);
        Ok(index)
    }

    /// The limiter's words of a vCPU.
    pub(super) fn cell(&self, vcpu: usize) -> &VcpuCell {
        self.limiter.cell(self.places[vcpu].index).expect("the index is the limiter's own")
    }

    /// Whether there is somebody to end a slice.
    pub(super) fn kicks(&self) -> bool {
        self.machine.kick == KickKind::Signal
    }

    /// Whether there are timers.
    pub(super) fn has_timers(&self) -> bool {
        self.machine.kick == KickKind::Auto
    }

    /// Meters a vCPU's ring; returns the number of new entries of the guest's.
    pub(super) fn meter(&mut self, vcpu: usize) -> u32 {
        let Self { places, memory, limiter, .. } = self;
        let Place { ring, own, merged, index, .. } = &mut places[vcpu];
        let (mut net, mut guest) = (0, 0);
        ring.meter_guest(|page| {
            let is_new = memory.meter(page);
            net += u32::from(is_new);
            let is_guest = !own.is_own(page, !is_new);
            guest += u32::from(is_guest);
            is_guest
        });
        let free = net.min(*merged);
        *merged -= free;
        limiter.cell(*index).expect("the index is the limiter's own").report.add_pages(net - free, guest);
        guest
    }

    /// Meters every ring.
    pub(super) fn meter_all(&mut self) {
        for vcpu in 0..self.places.len() {
            self.meter(vcpu);
        }
    }

    /// Whether there is a limit that the vCPU's thread has not noticed.
    fn is_to_notice(&self, vcpu: usize) -> bool {
        !self.places[vcpu].limited && self.cell(vcpu).penalty.accept() != Penalty::NONE
    }

    /// Meters every ring, at a tick; whom to kick, because a limit is news to a vCPU that dirties pages.
    pub(super) fn meter_and_kick(&mut self) -> Vec<usize> {
        let mut kicked = Vec::new();
        for vcpu in 0..self.places.len() {
            let entries = self.meter(vcpu);
            let is_news = entries > 0 && self.is_to_notice(vcpu);
            let will_fill = entries >= self.places[vcpu].ring.room() / 4;
            if is_news && (kicked::ends_slices(self.cell(vcpu).penalty.accept()) || !will_fill) {
                kicked.push(vcpu);
            }
        }
        kicked
    }

    /// After a pass: whom to kick, because the ring was so emptied that it no longer ends the slice.
    pub(super) fn emptied(&mut self) -> Vec<usize> {
        let emptied =
            |(vcpu, place): (usize, &mut Place)| place.slice.take_if(|slice| !place.ring.ends(*slice)).map(|_| vcpu);
        self.places.iter_mut().enumerate().filter_map(emptied).collect()
    }

    /// How much of a ring to collect, so that its vCPU may dirty `slice` more pages.
    fn to_collect(&self, vcpu: usize, slice: u32) -> u32 {
        let ring = &self.places[vcpu].ring;
        match self.machine.fault {
            Some(Fault::NothingHeldBack) => ring.held_back(),
            _ => ring.to_collect(slice),
        }
    }

    /// How much of a ring a vCPU waits for.
    fn wanted(&self, vcpu: usize) -> u32 {
        match self.places[vcpu].want {
            0 => 0,
            slice => self.to_collect(vcpu, slice),
        }
    }

    /// What a vCPU shall be freed at the next reset, once it was metered and is given `slice`; `full`: because it waits.
    pub(super) fn want(&mut self, vcpu: usize, slice: Option<u32>, full: bool) {
        let pages = slice.unwrap_or(BATCH);
        let wanted = self.to_collect(vcpu, pages) > 0 || full && self.places[vcpu].ring.awaiting_reset() > 0;
        self.places[vcpu].want = if wanted { pages } else { 0 };
        if !wanted {
            self.places[vcpu].ring.freed();
        }
    }

    /// What a running pass collects of each ring.
    pub(super) fn pass(&mut self, now: Nanos) -> Vec<u32> {
        let vcpus = self.places.len();
        let mut of = |vcpu: usize| match self.places[vcpu].slice {
            _ if self.machine.fault == Some(Fault::NothingHeldBack) => self.places[vcpu].ring.held_back(),
            // Left to fill, so that it notices.
            None if self.is_to_notice(vcpu) => self.allowance(vcpu, now),
            slice => {
                self.places[vcpu].unnoticed = None;
                slice.map_or(self.places[vcpu].ring.held_back(), |slice| self.to_collect(vcpu, slice))
            }
        };
        (0..vcpus).map(&mut of).collect()
    }

    /// How much of a ring a pass collects whose vCPU has not noticed its limit.
    fn allowance(&mut self, vcpu: usize, now: Nanos) -> u32 {
        let place = &mut self.places[vcpu];
        let since = place.unnoticed.unwrap_or(now);
        let Some(limit) = self.limiter.query(place.index, now).and_then(|status| status.effective_limit) else {
            return place.ring.held_back();
        };
        let allowed = limit.price().pages_for(now.saturating_sub(since));
        let count = allowed.min(place.ring.held_back());
        place.unnoticed = Some(if count < allowed { now } else { since + limit.price().of(count) });
        count
    }

    /// Begins to free what vCPUs wait for: as [`Adapter::begin_reset`], and then [`Adapter::finish_serving`].
    pub(super) fn serve(&mut self, now: Nanos, others_run: bool) -> Option<Nanos> {
        let mut wanted: Vec<u32> = (0..self.places.len()).map(|vcpu| self.wanted(vcpu)).collect();
        let end = self.begin_reset(now, others_run, &mut wanted);
        if end.is_none() {
            self.note_served(now);
        }
        end
    }

    /// The reset that frees slices returned.
    pub(super) fn finish_serving(&mut self, now: Nanos) {
        self.finish_reset();
        self.note_served(now);
    }

    fn note_served(&mut self, now: Nanos) {
        self.served = now;
        for vcpu in 0..self.places.len() {
            if self.places[vcpu].want > 0 && self.wanted(vcpu) == 0 {
                self.places[vcpu].ring.freed();
                self.places[vcpu].want = 0;
            }
        }
    }

    /// Collects up to `counts` of each ring, subtracts what it took, and begins the reset. Returns when that is over:
    /// [`Adapter::finish_reset`] is to be called then. `None` where there was nothing to reset.
    pub(super) fn begin_reset(&mut self, now: Nanos, others_run: bool, counts: &mut [u32]) -> Option<Nanos> {
        let Self { places, batch, .. } = self;
        let mut room = BATCH.saturating_sub(u32::try_from(batch.len()).unwrap_or(BATCH));
        for (vcpu, (place, count)) in places.iter_mut().zip(counts).enumerate() {
            let collected = place.ring.collect((*count).min(room), |page| batch.push((vcpu, page)));
            // What others collected meanwhile need not be collected again.
            *count = count.saturating_sub(collected).min(place.ring.held_back());
            room -= collected;
        }
        let waiting: u32 = places.iter().map(|place| place.ring.awaiting_reset()).sum();
        if waiting == 0 {
            return None;
        }
        if self.machine.fault == Some(Fault::PublishBeforeReset) {
            self.publish();
        }
        let end = now + costs::reset(waiting, others_run);
        self.locked = Some(end);
        Some(end)
    }

    /// The reset returned: the pages are protected again, and published.
    pub(super) fn finish_reset(&mut self) {
        let Self { kernel, memory, places, .. } = self;
        kernel.iter_mut().for_each(|ring| ring.reset(memory));
        self.reset_pages += places.iter_mut().map(|place| u64::from(place.ring.reclaim())).sum::<u64>();
        self.reset_calls += 1;
        self.locked = None;
        self.publish();
    }

    fn publish(&mut self) {
        for (vcpu, page) in self.batch.drain(..) {
            match self.memory.publish(page) {
                Published::New => self.published.push(page),
                Published::Merged => self.places[vcpu].merged += 1,
                Published::Again => {}
            }
        }
    }

    /// Hands out the published pages. Returns those whose slice it took back, to be told.
    pub(super) fn take(&mut self) -> Vec<usize> {
        self.published.drain(..).for_each(|page| self.memory.take(page));
        let places = self.places.iter_mut().enumerate();
        places.filter_map(|(vcpu, place)| std::mem::replace(&mut place.stretched, false).then_some(vcpu)).collect()
    }

    /// With every vCPU out of the guest: collects, resets and publishes everything.
    pub(super) fn last_sync(&mut self, now: Nanos) {
        self.kernel.iter_mut().for_each(KernelRing::flush);
        self.meter_all();
        let mut all: Vec<u32> = self.places.iter().map(|place| place.ring.held_back()).collect();
        while self.begin_reset(now, false, &mut all).is_some() {
            self.finish_reset();
        }
        self.take();
    }
}
