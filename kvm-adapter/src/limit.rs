//! The VM's handle: what a VMM's control plane and its migration call.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use dirtylimit_core::{Nanos, PageRate, Ring, Shipped, Status};

use crate::caps::{Caps, Config};
use crate::error::{Error, system};
use crate::events::{self, Limit, info};
use crate::harvest::{BATCH, Place, Stats};
use crate::kick::Kick;
use crate::seat::Seat;
use crate::sys::{self, Kernel, KickSignal, RingPages, RunPage, VmFd};
use crate::throttle::ThrottleThread;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// One VM under the limiter. Cheap to clone; every method may be called from any thread.
#[derive(Clone, Debug)]
pub struct DirtyLimit(Arc<Vm>);

/// What a running pass did.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Pass {
    /// Entries that were collected, reset and published by it.
    pub published: u64,
    /// Entries left in the rings of limited vCPUs: their pages stay dirty, for a later pass or the last sync.
    pub held_back: u64,
}

impl DirtyLimit {
    /// Enables the dirty ring on a VM: right after KVM_CREATE_VM, before its slots and vCPUs. `vm` is duplicated.
    ///
    /// From here on `KVM_GET_DIRTY_LOG` fails with ENXIO on x86: [`DirtyLimit::take_dirty_log`] takes its place.
    ///
    /// # Errors
    /// Where KVM offers no ring, the size is not allowed, or KVM refuses: each says what to do.
    pub fn enable(vm: &impl AsRawFd, config: &Config) -> Result<Self, Error> {
        let kernel = VmFd::duplicate(vm).map_err(system("duplicating the VM's descriptor"))?;
        #[cfg(feature = "planted-bugs")]
        if let Some(bug) = config.planted_bug {
            return Self::on(Box::new(sys::Planted::new(kernel, bug)), config);
        }
        Self::on(Box::new(kernel), config)
    }

    /// [`DirtyLimit::enable`] on whatever answers as a VM.
    pub(crate) fn on(kernel: Box<dyn Kernel>, config: &Config) -> Result<Self, Error> {
        let caps = Caps::of(&*kernel)?;
        caps.enable(&*kernel, config.ring_entries)?;
        info!("enabled: dirty rings of {} entries, {caps:?}", config.ring_entries);
        Ok(Self(Arc::new(Vm::new(kernel, caps, config))))
    }

    /// What KVM offered.
    pub fn caps(&self) -> Caps {
        self.0.caps
    }

    /// The size of the pages that rates and dirty logs count: the host's.
    pub fn page_size(&self) -> u32 {
        sys::page_size()
    }

    /// Makes a memory slot known (`address space << 16 | slot`), **before** it is created in KVM or its logging switched
    /// on: entries of unknown slots are dropped. One region may have many slots.
    ///
    /// # Errors
    /// [`Error::SlotExists`], [`Error::SlotSize`], and what a reset may answer.
    pub fn add_slot(&self, slot: u32, pages: u64) -> Result<(), Error> {
        // What a former slot of this number left in the rings is not the new one's.
        if self.0.lock().slots.was_removed(slot) {
            self.sync()?;
        }
        self.0.lock().slots.add(slot, pages)
    }

    /// Collects, resets, and forgets a slot, **before** it is deleted or changed in KVM. What is dirty in it and not yet
    /// taken is forgotten with it.
    ///
    /// # Errors
    /// [`Error::NoSlot`], and what a reset may answer.
    pub fn remove_slot(&self, slot: u32) -> Result<(), Error> {
        self.0.lock().slots.knows(slot)?;
        self.sync()?;
        self.0.lock().slots.remove(slot)
    }

    /// Maps a vCPU's ring and gives it a handle; at any time before its first KVM_RUN. `id` is the caller's. After the
    /// handle was dropped the same `id` attaches to the same ring again, and `vcpu` is not looked at.
    ///
    /// # Errors
    /// [`Error::VcpuBusy`] while there is a handle, [`Error::TooManyVcpus`], and what mapping may answer.
    pub fn add_vcpu(&self, id: u32, vcpu: &impl AsRawFd) -> Result<Vcpu, Error> {
        let mut harvest = self.0.lock();
        if let Some(place) = harvest.places.get(&id) {
            if !place.seat.take() {
                return Err(Error::VcpuBusy(id));
            }
            let seat = place.seat.clone();
            drop(harvest);
            info!("vCPU {id} is attached again");
            return Ok(Vcpu::new(self.0.clone(), seat));
        }
        let pages =
            RingPages::map(vcpu.as_raw_fd(), self.0.ring_entries).map_err(system("mapping the vCPU's dirty ring"))?;
        let run = RunPage::map(vcpu.as_raw_fd()).map_err(system("mapping the vCPU's kvm_run page"))?;
        let kick = match self.0.kick {
            Kick::Signal(signal) => {
                let signal =
                    KickSignal::new(vcpu.as_raw_fd(), signal).map_err(system("taking a real-time signal for kicks"))?;
                Some(signal)
            }
            Kick::Off | Kick::Vmm => None,
        };
        let (entries, max) = (self.0.ring_entries, self.0.caps.max_entries);
        let ring = Ring::new(pages).map_err(|_| Error::RingSize { entries, min: entries, max })?;
        let index = self.0.limiter.register().map_err(|source| Error::TooManyVcpus { id, source })?;
        let seat = Arc::new(Seat::new(id, index, run, kick));
        harvest.places.insert(id, Place::new(ring, seat.clone()));
        drop(harvest);
        info!("vCPU {id} is added");
        Ok(Vcpu::new(self.0.clone(), seat))
    }

    /// Collects what a vCPU's ring holds and forgets the vCPU, for VMMs that never run it again.
    ///
    /// # Errors
    /// [`Error::NoVcpu`], [`Error::VcpuBusy`] while there is a handle, and what a reset may answer.
    pub fn remove_vcpu(&self, id: u32) -> Result<(), Error> {
        let seat = self.with_seat(id, Arc::clone)?;
        // Taken, so that nobody attaches to it meanwhile.
        if !seat.take() {
            return Err(Error::VcpuBusy(id));
        }
        if let Err(error) = self.sync() {
            seat.leave();
            return Err(error);
        }
        if let Some(place) = self.0.lock().places.remove(&id) {
            self.0.limiter.unregister(place.seat.index);
        }
        info!("vCPU {id} is removed");
        Ok(())
    }

    /// Collects, resets and publishes everything that was logged before the call. With the vCPUs out of KVM_RUN that is
    /// everything. A limited vCPU may then run a whole ring before its next exit (and pays for it): a pass that comes
    /// around while it runs is better a [`DirtyLimit::pass`].
    ///
    /// # Errors
    /// What a reset may answer; nothing is lost by it.
    pub fn sync(&self) -> Result<(), Error> {
        self.sweep(|place| place.ring.held_back()).map(drop)
    }

    /// As [`DirtyLimit::sync`], but leaves limited vCPUs inside their slices: of their rings only what a slice frees is
    /// collected (nothing before they have noticed their limit), and the rest, which stays dirty, is counted.
    ///
    /// # Errors
    /// As [`DirtyLimit::sync`].
    pub fn pass(&self) -> Result<Pass, Error> {
        self.sweep(|place| match place.slice {
            // Left to fill, so that it notices: it might never, were it emptied by each pass.
            None if place.ring.size() <= BATCH && place.is_to_notice(&self.0.limiter) => 0,
            None => place.ring.held_back(),
            Some(slice) => place.ring.to_collect(slice),
        })
    }

    /// The dirty pages of a slot since the last call, in the form of `KVM_GET_DIRTY_LOG` (a bit a page, 64 a word):
    /// complete, in its stead. Syncs first.
    ///
    /// Suspect pages (see [`DirtyLimit::trust_slot`]) are in every answer.
    ///
    /// # Errors
    /// [`Error::NoSlot`], and what a reset may answer.
    pub fn take_dirty_log(&self, slot: u32) -> Result<Vec<u64>, Error> {
        self.sync()?;
        let mut taken = self.take_published(slot)?;
        if self.0.caps.bitmap {
            self.0.kernel.backup_log(slot, &mut taken).map_err(system("KVM_GET_DIRTY_LOG"))?;
        }
        Ok(taken)
    }

    /// As [`DirtyLimit::take_dirty_log`], of what was published so far (by [`DirtyLimit::pass`], and by the vCPUs'
    /// slices) and nothing else.
    ///
    /// # Errors
    /// [`Error::NoSlot`].
    pub fn take_published(&self, slot: u32) -> Result<Vec<u64>, Error> {
        self.0.lock().take(slot, &self.0.limiter)
    }

    /// Says that a slot's suspect pages are protected again. A reset that was disturbed (the process was stopped, traced
    /// or frozen on the way) may have left pages writable that will never be logged again, so they stay dirty in every
    /// take until an undisturbed reset comes by, or until this call: with the vCPUs stopped, switch
    /// `KVM_MEM_LOG_DIRTY_PAGES` of the slot off and on, and take the log, before it.
    ///
    /// # Errors
    /// [`Error::NoSlot`].
    pub fn trust_slot(&self, slot: u32) -> Result<(), Error> {
        self.0.lock().slots.trust(slot)
    }

    /// Limits a vCPU from its next full exit on, or at once by a [`Kick`]; what it dirtied before is forgiven. Takes a
    /// tick now and then to stay in force: [`DirtyLimit::tick`] or [`DirtyLimit::throttle_thread`].
    ///
    /// # Errors
    /// [`Error::NoVcpu`].
    pub fn set_limit(&self, id: u32, limit: PageRate) -> Result<(), Error> {
        self.change(id, Some(limit))
    }

    /// Lifts a vCPU's limit; a pause ends at once.
    ///
    /// # Errors
    /// [`Error::NoVcpu`].
    pub fn cancel(&self, id: u32) -> Result<(), Error> {
        self.change(id, None)
    }

    /// Limits every vCPU, present and to come.
    pub fn set_limit_all(&self, limit: PageRate) {
        self.0.limiter.set_limit_all(Some(limit));
        self.tell_all();
        info!("limit of every vCPU: {}", Limit(Some(limit)));
    }

    /// Lifts every limit.
    pub fn cancel_all(&self) {
        self.0.limiter.set_limit_all(None);
        self.tell_all();
        info!("limit of every vCPU: none");
    }

    /// Sets the budget of the whole VM, shared by max-min fairness among the vCPUs' demands; `None` lifts it.
    pub fn set_vm_limit(&self, budget: Option<PageRate>) {
        self.0.limiter.set_vm_limit(budget);
        self.tell_all();
        info!("budget of the VM: {}", Limit(budget));
    }

    /// How much a vCPU counts in the split of the VM's budget (1 by default).
    ///
    /// # Errors
    /// [`Error::NoVcpu`].
    pub fn set_weight(&self, id: u32, weight: u32) -> Result<(), Error> {
        self.with_seat(id, |seat| self.0.limiter.set_weight(seat.index, weight))?;
        info!("weight of vCPU {id}: {weight}");
        Ok(())
    }

    /// Changes the policy.
    pub fn set_policy(&self, policy: Shipped) {
        self.0.limiter.set_policy(policy);
        self.tell_all();
        info!("policy: {policy:?}");
    }

    /// The longest single pause of a vCPU.
    pub fn max_pause(&self) -> Duration {
        Duration::from_nanos(self.0.limiter.vm().max_pause())
    }

    /// Changes the longest single pause, 100 µs to 1 s (clamped).
    pub fn set_max_pause(&self, pause: Duration) {
        self.0.limiter.vm().set_max_pause(Nanos::try_from(pause.as_nanos()).unwrap_or(Nanos::MAX));
        self.tell_all();
        info!("longest pause: {:?}", self.max_pause());
    }

    /// What is known of a vCPU, as of the last [`DirtyLimit::meter`] or tick.
    ///
    /// # Errors
    /// [`Error::NoVcpu`].
    pub fn query(&self, id: u32) -> Result<Status, Error> {
        self.with_seat(id, |seat| self.0.limiter.query(seat.index))?.ok_or(Error::NoVcpu(id))
    }

    /// Pages whose entries wait in a vCPU's ring, as of the last [`DirtyLimit::meter`]: dirty, and not in the log yet.
    ///
    /// # Errors
    /// [`Error::NoVcpu`].
    pub fn held_back(&self, id: u32) -> Result<u32, Error> {
        self.0.lock().places.get(&id).map(|place| place.ring.held_back()).ok_or(Error::NoVcpu(id))
    }

    /// The ids of the VM's vCPUs, in order.
    pub fn vcpus(&self) -> Vec<u32> {
        self.0.lock().places.keys().copied().collect()
    }

    /// What was harvested so far.
    pub fn stats(&self) -> Stats {
        self.0.lock().stats()
    }

    /// Peeks at every ring, so that the counts of [`DirtyLimit::query`] are up to date. Disturbs no guest.
    pub fn meter(&self) {
        self.0.lock().meter_all(&self.0.limiter);
    }

    /// One tick, by the adapter's own clock: PREPARE (skipping the rings where somebody else harvests just now),
    /// CALCULATE, SET PENALTY. For a VMM's event loop, every 10 to 100 ms.
    pub fn tick(&self) {
        if let Some(mut harvest) = self.0.try_lock() {
            harvest.meter_and_kick(&self.0.limiter);
        }
        let now = sys::now();
        events::tell_lapse(&self.0, now);
        self.0.limiter.tick(now);
        events::tell(&self.0);
    }

    /// Ticks every `period` (1 ms to 1 s, clamped) from a thread of its own, which ends when it is dropped.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn throttle_thread(&self, period: Duration) -> Result<ThrottleThread, Error> {
        self.tick();
        let vm = Arc::downgrade(&self.0);
        let ends = events::ThrottleThreadEnds;
        let tick = move || {
            let _told = &ends;
            vm.upgrade().map(|vm| Self(vm).tick()).is_some()
        };
        let thread = ThrottleThread::spawn(tick, period)?;
        info!("the throttle thread ticks every {period:?}");
        Ok(thread)
    }

    #[cfg(any(test, feature = "metrics"))]
    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.0
    }

    /// Calls `f` with a vCPU's seat, under the lock: its place in the limiter is not another vCPU's meanwhile.
    fn with_seat<R>(&self, id: u32, f: impl FnOnce(&Arc<Seat>) -> R) -> Result<R, Error> {
        self.0.lock().places.get(&id).map(|place| f(&place.seat)).ok_or(Error::NoVcpu(id))
    }

    fn change(&self, id: u32, limit: Option<PageRate>) -> Result<(), Error> {
        self.with_seat(id, |seat| {
            self.0.limiter.set_limit(seat.index, limit);
            seat.tell(&self.0.limiter);
        })?;
        info!("limit of vCPU {id}: {}", Limit(limit));
        Ok(())
    }

    fn tell_all(&self) {
        self.0.lock().places.values().for_each(|place| place.seat.tell(&self.0.limiter));
    }

    /// Collects of each ring as much as `choose` says of it at the start, in batches between which others get the lock.
    fn sweep(&self, choose: impl Fn(&Place) -> u32) -> Result<Pass, Error> {
        let swept = self.sweep_untold(choose);
        events::tell(&self.0);
        swept
    }

    fn sweep_untold(&self, choose: impl Fn(&Place) -> u32) -> Result<Pass, Error> {
        let mut left: BTreeMap<u32, u32> = {
            let mut harvest = self.0.lock();
            harvest.meter_all(&self.0.limiter);
            harvest.places.iter().map(|(id, place)| (*id, choose(place))).collect()
        };
        let mut pass = Pass::default();
        loop {
            let mut harvest = self.0.lock();
            let published = harvest.collect(&*self.0.kernel, |id, place, room| {
                let Some(left) = left.get_mut(&id) else { return 0 };
                // Others may have collected some meanwhile, oldest first, as we do.
                let count = (*left).min(place.ring.held_back()).min(room);
                *left -= count;
                count
            })?;
            pass.published += u64::from(published);
            if published == 0 {
                if self.0.kick != Kick::Off {
                    harvest.kick_emptied();
                }
                pass.held_back = harvest.places.values().map(|place| u64::from(place.ring.held_back())).sum();
                return Ok(pass);
            }
        }
    }
}
