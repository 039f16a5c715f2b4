//! A virtual machine of loops: its memory and its layout. It knows nothing of any limiter, so that tests can put
//! one, or none, on it.
//!
//! ```no_run
//! use dirtylimit_test_vm::{Exit, Load, Machine};
//! use dirtylimit_test_vm::payload::{self, Mode};
//!
//! # fn main() -> anyhow::Result<()> {
//! let machine = Machine::new(&[Load::new(Mode::Write, 64 << 20)], payload::image())?;
//! // Here, before memory and vCPUs, is the place to enable a dirty ring on `machine.vm()`.
//! machine.plug_memory(true)?;
//! let mut cpu = machine.vcpu(0)?;
//! cpu.bind_to_this_thread();
//! while cpu.run()? != Exit::Interrupted {}
//! println!("{} accesses", machine.stats(0).accesses());
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::{Context, Result, ensure};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::arch::{self, Platform, Start};
use super::cpu::{self, GuestCpu};
use super::layout::{Layout, Load, MAX_VCPUS, PARAMETERS, STACK_BYTES, STACKS, STATS, STEAL_TIMES};
use super::memory::GuestMemory;
use crate::PAGE_SIZE;
use crate::payload::{self, IMAGE_ADDRESS, stats};

/// The id of the one memslot.
pub const SLOT: u32 = 0;

/// A VM with its memory, whose vCPUs are made one by one.
#[derive(Debug)]
pub struct Machine {
    vm: VmFd,
    platform: Platform,
    memory: Arc<GuestMemory>,
    layout: Layout,
}

impl Machine {
    /// A VM with a vCPU's memory for each load, and the image in it; no memslot and no vCPU yet.
    ///
    /// # Errors
    /// No usable KVM, an impossible load, an image that does not fit, more vCPUs or memory than there is room for.
    pub fn new(loads: &[Load], image: &[u8]) -> Result<Self> {
        Self::of(loads, image, Ok)
    }

    /// The same with `ram` bytes of memory, the rest of which no load touches.
    ///
    /// # Errors
    /// As [`Machine::new`]; less memory than the loads need, or no multiple of 2 MiB.
    pub fn with_ram(loads: &[Load], image: &[u8], ram: u64) -> Result<Self> {
        Self::of(loads, image, |layout| layout.with_ram(ram))
    }

    fn of(loads: &[Load], image: &[u8], size: impl FnOnce(Layout) -> Result<Layout>) -> Result<Self> {
        let kvm = cpu::open()?;
        let most = MAX_VCPUS.min(kvm.get_max_vcpus());
        ensure!((1..=most).contains(&loads.len()), "{} vCPUs: this machine's guest has 1 to {most}", loads.len());
        payload::check(image)?;
        let layout = size(Layout::new(loads)?)?;
        let memory = GuestMemory::new(usize::try_from(layout.ram())?)?;
        arch::write_tables(&memory);
        memory.write_bytes(IMAGE_ADDRESS, image);
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        let platform = Platform::new(&kvm, &vm)?;
        Ok(Self { vm, platform, memory: Arc::new(memory), layout })
    }

    /// The VM's descriptor.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Guest-physical range of the memory that vCPU `index` works on.
    ///
    /// # Panics
    /// If there is no load of that index.
    pub fn workload(&self, index: usize) -> std::ops::Range<u64> {
        self.layout.workload(index)
    }

    /// Gives the VM its memory as slot [`SLOT`]; again, to switch its dirty logging on or off.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn plug_memory(&self, logged: bool) -> Result<()> {
        let flags = if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        self.set_region(self.memory.bytes() as u64, flags).context("cannot give the VM its memory")
    }

    /// Takes the memory away again, as a VMM that unplugs it does.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn unplug_memory(&self) -> Result<()> {
        self.set_region(0, 0).context("cannot take the VM's memory away")
    }

    fn set_region(&self, memory_size: u64, flags: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            flags,
            guest_phys_addr: 0,
            memory_size,
            userspace_addr: self.memory.host_address(),
        };
        // SAFETY: the region is the mapping of `memory`, which outlives every vCPU: each holds a reference to it.
        Ok(unsafe { self.vm.set_user_memory_region(region) }?)
    }

    /// Makes vCPU `index` in its start state; `KVM_CREATE_VCPU` allows it once for each.
    ///
    /// # Errors
    /// What KVM answers.
    ///
    /// # Panics
    /// If there is no load of that index.
    pub fn vcpu(&self, index: usize) -> Result<GuestCpu> {
        let id = index as u64;
        let fd = self.vm.create_vcpu(id).with_context(|| format!("cannot create vCPU {index}"))?;
        let page = u64::from(PAGE_SIZE);
        let parameters = PARAMETERS + id * page;
        let start = Start { stats: STATS + id * page, parameters, stack: STACKS + (id + 1) * STACK_BYTES };
        let cpu = GuestCpu::new(fd, index, &self.platform, start, &self.memory)?;
        let block = self.layout.parameters(index, cpu.tsc_hz(), self.layout.ram());
        self.memory.write(parameters, &block.words());
        Ok(cpu)
    }

    /// Guest-physical address of the page for [`GuestCpu::enable_steal_time`] of vCPU `index`. Nothing else uses it.
    ///
    /// # Panics
    /// If there is no load of that index.
    pub fn steal_time(&self, index: usize) -> u64 {
        assert!(index < self.layout.vcpus(), "no vCPU {index}");
        STEAL_TIMES + index as u64 * u64::from(PAGE_SIZE)
    }

    /// What vCPU `index` counts.
    ///
    /// # Panics
    /// If there is no load of that index.
    pub fn stats(&self, index: usize) -> StatsPage<'_> {
        assert!(index < self.layout.vcpus(), "no vCPU {index}");
        let number = usize::try_from(STATS / u64::from(PAGE_SIZE)).expect("the layout fits usize") + index;
        StatsPage { number, words: self.memory.page(number) }
    }
}

/// A vCPU's stats page, which the guest may be writing.
#[derive(Clone, Copy, Debug)]
pub struct StatsPage<'a> {
    number: usize,
    words: &'a [AtomicU64],
}

impl StatsPage<'_> {
    /// The page's number, counted from the start of the memory.
    pub fn number(&self) -> usize {
        self.number
    }

    /// Accesses since the guest started.
    pub fn accesses(&self) -> u64 {
        self.words[stats::ACCESSES].load(Relaxed)
    }

    /// TSC ticks from the guest's start to its last access.
    pub fn running(&self) -> u64 {
        let [last, start] = [stats::LAST_TSC, stats::START_TSC].map(|word| self.words[word].load(Relaxed));
        last.saturating_sub(start)
    }

    /// The longest gap since the start or [`begin_phase`](Self::begin_phase), in TSC ticks.
    pub fn longest(&self) -> u64 {
        self.words[stats::LONGEST].load(Relaxed)
    }

    /// Gaps over the threshold since then, by highest set bit.
    pub fn histogram(&self) -> [u64; stats::HISTOGRAM_WORDS] {
        std::array::from_fn(|bit| self.words[stats::HISTOGRAM + bit].load(Relaxed))
    }

    /// The same gaps by `gap >> fine_shift`; all 0 where the image does not keep it.
    pub fn fine(&self) -> Vec<u64> {
        (0..stats::FINE_WORDS).map(|word| self.words[stats::FINE + word].load(Relaxed)).collect()
    }

    /// Forgets the gaps so far. KVM logs no write of the host, so whoever copies the guest must copy this page again.
    pub fn begin_phase(&self) {
        let histogram = stats::HISTOGRAM..stats::HISTOGRAM + stats::HISTOGRAM_WORDS;
        let fine = stats::FINE..stats::FINE + stats::FINE_WORDS;
        for word in [stats::LONGEST, stats::GAPS, stats::GAPS_SUM].into_iter().chain(histogram).chain(fine) {
            self.words[word].store(0, Relaxed);
        }
    }
}
