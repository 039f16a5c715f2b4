//! The VM's handle: what a VMM's control plane and its migration call.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use dirtylimit_core::{Nanos, PageRate, Ring, Shipped, Status};

use crate::caps::{Caps, Config, claim_signal};
use crate::error::{Error, system};
use crate::events::{self, Limit, info};
use crate::harvest::{Row, Stats};
use crate::kick::Kick;
use crate::shared::{SharedVcpu, VmLimiter};
use crate::sync::AtomicU32;
use crate::sys::{self, Kernel, KickSignal, RingPages, RunPage, SignalsBlocked, VmFd};
use crate::throttle::{self, ThrottleThread};
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// One VM under the limiter. Cheap to clone; every method may be called from any thread.
#[derive(Clone, Debug)]
pub struct DirtyLimit(pub(crate) Arc<Vm>);

impl DirtyLimit {
    /// Enables the dirty ring on a VM: right after KVM_CREATE_VM, before its slots and vCPUs. `vm` is duplicated.
    ///
    /// From here on `KVM_GET_DIRTY_LOG` fails with ENXIO on x86: [`DirtyLimit::round`] and [`DirtyLimit::last_round`] take its place.
    ///
    /// # Errors
    /// Where KVM offers no ring, the size is not allowed, or KVM refuses: each says what to do.
    pub fn enable(vm: &impl AsRawFd, config: &Config) -> Result<Self, Error> {
        let kernel = VmFd::duplicate(vm).map_err(system("duplicating the VM's descriptor"))?;
        #[cfg(dirtylimit_planted)]
        if let Some(bug) = config.planted_bug {
            return Self::on(Box::new(sys::Planted::new(kernel, bug)), config);
        }
        Self::on(Box::new(kernel), config)
    }

    /// [`DirtyLimit::enable`] on whatever answers as a VM.
    pub(crate) fn on(kernel: Box<dyn Kernel>, config: &Config) -> Result<Self, Error> {
        let caps = Caps::of(&*kernel)?.are_enough(cfg!(all(target_arch = "aarch64", not(test))))?;
        claim_signal(config.kick)?;
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

    /// Maps a vCPU's ring and gives it a handle; at any time before its first KVM_RUN. `id` is the caller's. After the
    /// handle was dropped, the same `id` and the same `vcpu` attach to the same ring again.
    ///
    /// What cannot be told here is a vCPU of another VM whose ring is as large: the first reset does
    /// ([`Error::ForeignVcpu`]), and each until [`DirtyLimit::remove_vcpu`].
    ///
    /// # Errors
    /// [`Error::VcpuBusy`] while there is a handle; [`Error::SameVcpu`] and [`Error::OtherVcpu`] where id and descriptor do
    /// not belong together; [`Error::NoRing`], [`Error::UsedRing`], [`Error::TooManyVcpus`], and what mapping may answer.
    pub fn add_vcpu(&self, id: u32, vcpu: &impl AsRawFd) -> Result<Vcpu, Error> {
        let vcpu = vcpu.as_raw_fd();
        let mut harvest = self.0.lock();
        let run = RunPage::map(vcpu).map_err(system("mapping the vCPU's kvm_run page"))?;
        if let Some(row) = harvest.rows.get(&id) {
            let shared = row.shared.clone();
            if !shared.take() {
                return Err(Error::VcpuBusy(id));
            }
            if !shared.is_of(&run) {
                shared.leave();
                return Err(Error::OtherVcpu(id));
            }
            drop(harvest);
            info!("vCPU {id} is attached again");
            return Ok(Vcpu::new(self.0.clone(), shared));
        }
        if let Some((&known, _)) = harvest.rows.iter().find(|(_, row)| row.shared.is_of(&run)) {
            return Err(Error::SameVcpu { id, known });
        }
        let (entries, max) = (self.0.ring_entries, self.0.caps.max_entries);
        let pages = RingPages::map(vcpu, entries).map_err(system("mapping the vCPU's dirty ring"))?;
        let pages = pages.ok_or(Error::NoRing { id, entries })?;
        let kick = match self.0.kick {
            Kick::Signal(signal) => {
                Some(KickSignal::new(vcpu, signal).map_err(system("duplicating the vCPU's descriptor, for kicks"))?)
            }
            Kick::Auto | Kick::Off | Kick::Vmm => None,
        };
        let ring = Ring::new(pages).map_err(|_| Error::RingSize { entries, min: entries, max })?;
        if !ring.is_new() {
            return Err(Error::UsedRing(id));
        }
        let index = self.0.limiter.register().map_err(|source| Error::TooManyVcpus { id, source })?;
        let shared = Arc::new(SharedVcpu::new(id, index, run, kick));
        harvest.add(id, Row::new(ring, shared.clone()));
        drop(harvest);
        info!("vCPU {id} is added");
        Ok(Vcpu::new(self.0.clone(), shared))
    }

    /// Collects what a vCPU's ring holds and forgets the vCPU, for VMMs that never run it again.
    ///
    /// # Errors
    /// [`Error::NoVcpu`], [`Error::VcpuBusy`] while there is a handle, and what a reset may answer: then it is not removed.
    pub fn remove_vcpu(&self, id: u32) -> Result<(), Error> {
        let shared = self.with_shared(id, Arc::clone)?;
        // Taken, so that nobody attaches to it meanwhile.
        if !shared.take() {
            return Err(Error::VcpuBusy(id));
        }
        let (kernel, limiter) = (&*self.0.kernel, &self.0.limiter);
        // Most of it in batches, between which others get the lock.
        match self.collect_all().and_then(|()| self.0.lock().remove(id, kernel, limiter)) {
            Ok(()) => {}
            Err(Error::ForeignVcpu(_)) if self.0.lock().disown(id, limiter) => {}
            Err(error) => {
                shared.leave();
                return Err(error);
            }
        }
        info!("vCPU {id} is removed");
        Ok(())
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
        self.limiter(|limiter| limiter.set_limit_all(Some(limit)));
        self.notify_all();
        info!("limit of every vCPU: {}", Limit(Some(limit)));
    }

    /// Lifts every limit.
    pub fn cancel_all(&self) {
        self.limiter(|limiter| limiter.set_limit_all(None));
        self.notify_all();
        info!("limit of every vCPU: none");
    }

    /// Sets the budget of the whole VM, shared by max-min fairness among the vCPUs' demands; `None` lifts it.
    pub fn set_vm_limit(&self, budget: Option<PageRate>) {
        self.limiter(|limiter| limiter.set_vm_limit(budget));
        self.notify_all();
        info!("budget of the VM: {}", Limit(budget));
    }

    /// How much a vCPU counts in the split of the VM's budget (1 by default).
    ///
    /// # Errors
    /// [`Error::NoVcpu`].
    pub fn set_weight(&self, id: u32, weight: u32) -> Result<(), Error> {
        self.with_shared(id, |shared| self.0.limiter.set_weight(shared.index, weight))?;
        info!("weight of vCPU {id}: {weight}");
        Ok(())
    }

    /// Changes the policy.
    pub fn set_policy(&self, policy: Shipped) {
        self.limiter(|limiter| limiter.set_policy(policy));
        self.notify_all();
        info!("policy: {policy:?}");
    }

    /// The longest single pause of a vCPU; others at the VM's lock may add 2.1 ms, and a lump that
    /// no timer ends takes what it costs, a second at most.
    pub fn max_pause(&self) -> Duration {
        Duration::from_nanos(self.0.limiter.vm().max_pause())
    }

    /// Changes the longest single pause, 100 µs to 1 s (clamped).
    pub fn set_max_pause(&self, pause: Duration) {
        self.0.limiter.vm().set_max_pause(Nanos::try_from(pause.as_nanos()).unwrap_or(Nanos::MAX));
        self.notify_all();
        info!("longest pause: {:?}", self.max_pause());
    }

    /// What is known of a vCPU, as of the last [`DirtyLimit::meter`] or tick. [`Status::unenforced`] says whether its limit
    /// is held, and if not, why.
    ///
    /// # Errors
    /// [`Error::NoVcpu`].
    pub fn query(&self, id: u32) -> Result<Status, Error> {
        self.with_shared(id, |shared| self.0.limiter.query(shared.index, sys::now()))?.ok_or(Error::NoVcpu(id))
    }

    /// Pages whose entries wait in a vCPU's ring, as of the last [`DirtyLimit::meter`]: dirty, and not in the log yet.
    ///
    /// # Errors
    /// [`Error::NoVcpu`].
    pub fn held_back(&self, id: u32) -> Result<u32, Error> {
        self.0.lock().rows.get(&id).map(|row| row.ring().held_back()).ok_or(Error::NoVcpu(id))
    }

    /// The ids of the VM's vCPUs, in order.
    pub fn vcpus(&self) -> Vec<u32> {
        self.0.lock().rows.keys().copied().collect()
    }

    /// What was harvested so far.
    pub fn stats(&self) -> Stats {
        self.0.lock().stats()
    }

    /// Peeks at every ring, so that the counts of [`DirtyLimit::query`] are up to date. Disturbs no guest.
    pub fn meter(&self) {
        self.meter_each(|_, _| ());
        self.limiter(VmLimiter::fold);
    }

    /// One tick, by the adapter's own clock: PREPARE (skipping the rings where somebody else harvests just now),
    /// CALCULATE, SET PENALTY. For a VMM's event loop, every 10 to 100 ms.
    pub fn tick(&self) {
        if let Some(mut harvest) = self.0.try_lock() {
            harvest.meter_and_kick(&self.0.limiter);
        }
        let now = sys::now();
        events::tell_lapse(&self.0, now);
        self.limiter(|limiter| limiter.tick(now));
        events::tell(&self.0, now);
    }

    /// Ticks every `period` (1 ms to 1 s, clamped) on the calling thread, whose name, priority and filters are the VMM's, until
    /// `stop`, which is asked before each tick.
    pub fn run_throttle(&self, period: Duration, mut stop: impl FnMut() -> bool) {
        throttle::run(
            || {
                !stop() && {
                    self.tick();
                    true
                }
            },
            &AtomicU32::new(0),
            throttle::nanos(period),
        );
    }

    /// Ticks every `period` (1 ms to 1 s, clamped) from a thread of its own, which ends when it is dropped. It has the filters
    /// of the calling thread; a VMM that wants others for it uses [`DirtyLimit::run_throttle`].
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn throttle_thread(&self, period: Duration) -> Result<ThrottleThread, Error> {
        self.tick();
        let limit = self.downgrade();
        let ends = events::ThrottleThreadEnds;
        let tick = move || {
            let _told = &ends;
            limit.upgrade().map(|limit| limit.tick()).is_some()
        };
        let thread = ThrottleThread::spawn(tick, period)?;
        info!("the throttle thread ticks every {period:?}");
        Ok(thread)
    }

    /// A handle that does not keep the VM alive, for what only watches it.
    pub fn downgrade(&self) -> WeakDirtyLimit {
        WeakDirtyLimit(Arc::downgrade(&self.0))
    }

    #[cfg(test)]
    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.0
    }

    /// Calls `f` on the limiter, whose lock it may take: a handler of this thread must not find that taken.
    pub(crate) fn limiter<R>(&self, f: impl FnOnce(&VmLimiter) -> R) -> R {
        let _signals = SignalsBlocked::new();
        f(&self.0.limiter)
    }

    /// Calls `f` with a vCPU's shared state, under the lock: its place in the limiter is not another vCPU's meanwhile.
    fn with_shared<R>(&self, id: u32, f: impl FnOnce(&Arc<SharedVcpu>) -> R) -> Result<R, Error> {
        self.0.lock().rows.get(&id).map(|row| f(&row.shared)).ok_or(Error::NoVcpu(id))
    }

    fn change(&self, id: u32, limit: Option<PageRate>) -> Result<(), Error> {
        self.with_shared(id, |shared| {
            self.0.limiter.set_limit(shared.index, limit);
            shared.notify(&self.0.limiter);
        })?;
        info!("limit of vCPU {id}: {}", Limit(limit));
        Ok(())
    }

    fn notify_all(&self) {
        self.0.lock().rows.values().for_each(|row| row.shared.notify(&self.0.limiter));
    }
}

/// A [`DirtyLimit`] that does not keep the VM alive.
#[derive(Clone, Debug)]
pub struct WeakDirtyLimit(Weak<Vm>);

impl WeakDirtyLimit {
    /// The VM; `None` once every [`DirtyLimit`] and [`Vcpu`] of it is dropped.
    pub fn upgrade(&self) -> Option<DirtyLimit> {
        self.0.upgrade().map(DirtyLimit)
    }
}
