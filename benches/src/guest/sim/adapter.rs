//! The adapter's part: *meter*, *collect → reset → publish*, one lock for the whole VM. As in `dirtylimit-kvm`'s
//! `harvest.rs`, but a reset takes virtual time, in which the lock is held and the guest runs on. What is decided is the
//! core's.

use std::rc::Rc;

use anyhow::Result;
use dirtylimit_core::{
    BATCH, Entry, Inline, Limiter, Machine, Metered, Nanos, Page, Policy, Ring, Step, VcpuCell, VcpuIndex, VcpuRing,
};

use super::kernel::{KernelRing, Memory, Published};
use super::{Fault, costs};
use crate::plan::KickKind;

/// As many as the adapter takes.
pub(super) const MAX_VCPUS: usize = 1024;

/// The adapter, and the machine under it.
#[derive(Debug)]
pub(super) struct Adapter<P: Policy> {
    pub(super) limiter: Box<Limiter<P, Inline<MAX_VCPUS>>>,
    pub(super) places: Vec<VcpuRing<Rc<[Entry]>>>,
    indices: Vec<VcpuIndex>,
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
    machine: super::Machine,
}

impl<P: Policy> Adapter<P> {
    pub(super) fn new(policy: P, memory: Memory, machine: super::Machine) -> Self {
        Self {
            limiter: Box::new(Limiter::new(policy)),
            places: Vec::new(),
            indices: Vec::new(),
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
        self.places.push(VcpuRing::new(Ring::new(kernel.entries())?));
        self.indices.push(index);
        self.kernel.push(kernel);
        Ok(index)
    }

    /// The limiter's words of a vCPU.
    pub(super) fn cell(&self, vcpu: usize) -> &VcpuCell {
        cell(&self.limiter, &self.indices, vcpu)
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
    fn meter(&mut self, vcpu: usize) -> u32 {
        let Self { places, memory, limiter, indices, .. } = self;
        let log = |page| if memory.meter(page) { Metered::New } else { Metered::Again };
        places[vcpu].meter(cell(limiter, indices, vcpu), log)
    }

    /// Meters every ring.
    pub(super) fn meter_all(&mut self) {
        for vcpu in 0..self.places.len() {
            self.meter(vcpu);
        }
    }

    /// Meters a vCPU's ring and has it charged.
    pub(super) fn harvest(&mut self, vcpu: usize, now: Nanos, machine: &mut Machine) -> Step {
        self.meter(vcpu);
        let has_timers = self.has_timers();
        let Self { places, limiter, indices, .. } = self;
        machine.harvested(now, limiter.vm(), cell(limiter, indices, vcpu), &mut places[vcpu], has_timers)
    }

    /// Meters every ring, at a tick; whom to kick, because a limit is news to a vCPU that dirties pages.
    pub(super) fn meter_and_kick(&mut self) -> Vec<usize> {
        let vcpus = 0..self.places.len();
        vcpus
            .filter(|&vcpu| {
                let entries = self.meter(vcpu);
                self.places[vcpu].is_news(self.cell(vcpu), entries)
            })
            .collect()
    }

    /// After a pass: whom to kick, because the ring was so emptied that it no longer ends the slice.
    pub(super) fn emptied(&mut self) -> Vec<usize> {
        (0..self.places.len()).filter(|&vcpu| self.places[vcpu].take_emptied()).collect()
    }

    /// What a running pass collects of each ring.
    pub(super) fn pass(&mut self, now: Nanos) -> Vec<u32> {
        let Self { places, limiter, indices, machine, .. } = self;
        let mut of = |(vcpu, place): (usize, &mut VcpuRing<_>)| {
            if machine.fault == Some(Fault::NothingHeldBack) {
                return place.ring().held_back();
            }
            let limit = || limiter.query(indices[vcpu], now).and_then(|status| status.effective_limit);
            place.plan_sweep(cell(limiter, indices, vcpu), now, limit)
        };
        places.iter_mut().enumerate().map(&mut of).collect()
    }

    /// Begins to free what vCPUs wait for: as [`Adapter::begin_reset`], and then [`Adapter::finish_serving`].
    pub(super) fn serve(&mut self, now: Nanos, others_run: bool) -> Option<Nanos> {
        let to_grant = |vcpu: usize| match self.places[vcpu].to_grant() {
            1.. if self.machine.fault == Some(Fault::NothingHeldBack) => self.places[vcpu].ring().held_back(),
            count => count,
        };
        let mut wanted: Vec<u32> = (0..self.places.len()).map(to_grant).collect();
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
        let Self { places, limiter, indices, .. } = self;
        places.iter_mut().enumerate().for_each(|(vcpu, place)| place.grant(cell(limiter, indices, vcpu)));
    }

    /// Collects up to `counts` of each ring, subtracts what it took, and begins the reset. Returns when that is over:
    /// [`Adapter::finish_reset`] is to be called then. `None` where there was nothing to reset.
    pub(super) fn begin_reset(&mut self, now: Nanos, others_run: bool, counts: &mut [u32]) -> Option<Nanos> {
        let Self { places, batch, .. } = self;
        let mut room = BATCH.saturating_sub(u32::try_from(batch.len()).unwrap_or(BATCH));
        for (vcpu, (place, count)) in places.iter_mut().zip(counts).enumerate() {
            let collected = place.collect((*count).min(room), |page| batch.push((vcpu, page)));
            // What others collected meanwhile need not be collected again.
            *count = count.saturating_sub(collected).min(place.ring().held_back());
            room -= collected;
        }
        let waiting: u32 = places.iter().map(|place| place.ring().awaiting_reset()).sum();
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
        self.reset_pages += places.iter_mut().map(|place| u64::from(place.reclaim())).sum::<u64>();
        self.reset_calls += 1;
        self.locked = None;
        self.publish();
    }

    fn publish(&mut self) {
        for (vcpu, page) in self.batch.drain(..) {
            match self.memory.publish(page) {
                Published::New => self.published.push(page),
                Published::Merged => self.places[vcpu].add_merged(1),
                Published::Again => {}
            }
        }
    }

    /// Hands out the published pages. Returns those whose slice it took back, to be told.
    pub(super) fn take(&mut self) -> Vec<usize> {
        self.published.drain(..).for_each(|page| self.memory.take(page));
        let places = self.places.iter_mut().enumerate();
        places.filter_map(|(vcpu, place)| place.take_scaled().then_some(vcpu)).collect()
    }

    /// With every vCPU out of the guest: collects, resets and publishes everything.
    pub(super) fn last_sync(&mut self, now: Nanos) {
        self.kernel.iter_mut().for_each(KernelRing::flush);
        self.meter_all();
        let mut all: Vec<u32> = self.places.iter().map(|place| place.ring().held_back()).collect();
        while self.begin_reset(now, false, &mut all).is_some() {
            self.finish_reset();
        }
        self.take();
    }
}

fn cell<'a, P: Policy>(limiter: &'a Limiter<P, Inline<MAX_VCPUS>>, indices: &[VcpuIndex], vcpu: usize) -> &'a VcpuCell {
    limiter.cell(indices[vcpu]).expect("the index is the limiter's own")
}
