//! Where everything is in the guest's memory, and what each vCPU works on.
//!
//! Guest-physical layout, one memslot (id 0) for all of it:
//!
//! | from | what |
//! |---|---|
//! | 0 | exception vectors, where the architecture has them in memory |
//! | 0x1000 | page tables, which nothing writes |
//! | 0x100000 | the image, at most 1 MiB |
//! | 0x200000 | stats pages, one per vCPU |
//! | 0x280000 | parameter blocks, one page per vCPU |
//! | 0x300000 | stacks, 16 KiB per vCPU |
//! | 0x400000 | steal-time pages, one per vCPU; KVM writes them where they are turned on |
//! | 0x1000000 | workload memory, each vCPU's from the next multiple of 2 MiB |
//! | end of RAM | 2 MiB that are mapped for the guest but have no memory: the doorbell |

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::PAGE_SIZE;
use crate::payload::{IMAGE_ADDRESS, Mode, Parameters, WORKLOAD_ADDRESS};

/// The most vCPUs that the layout has room for.
pub const MAX_VCPUS: usize = 64;
/// Guest-physical address of the top page table.
pub const PAGE_TABLES: u64 = 0x1000;
/// Bytes of the doorbell, a huge page.
pub const DOORBELL_BYTES: u64 = HUGE_PAGE;

/// Where the first vCPU's stats page is; the others' follow it.
pub const STATS: u64 = 0x20_0000;
/// The same of the parameter blocks, a page each, and of the stacks.
pub const PARAMETERS: u64 = 0x28_0000;
/// Guest-physical address of the first vCPU's stack.
pub const STACKS: u64 = 0x30_0000;
/// Bytes of a vCPU's stack.
pub const STACK_BYTES: u64 = 0x4000;
/// Where the first vCPU's steal-time page is; the others' follow it.
pub const STEAL_TIMES: u64 = 0x40_0000;
/// RAM is a multiple of it.
pub const HUGE_PAGE: u64 = 2 << 20;
/// The page directories must end below the image: one page of them maps 1 GiB.
const MAX_RAM: u64 = 64 << 30;
const _: () = assert!(PAGE_TABLES + (2 + MAX_RAM / (1 << 30)) * PAGE_SIZE as u64 <= IMAGE_ADDRESS);
const _: () = assert!(STACKS + MAX_VCPUS as u64 * STACK_BYTES <= STEAL_TIMES);
const _: () = assert!(STEAL_TIMES + MAX_VCPUS as u64 * PAGE_SIZE as u64 <= WORKLOAD_ADDRESS);

/// What one vCPU works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// What it does.
    pub mode: Mode,
    /// Bytes of its memory, in whole pages; a power of two for [`Mode::Random`], and may be 0 for [`Mode::Idle`] only.
    pub bytes: u64,
    /// Empty loop turns after each access.
    pub delay: u64,
    /// A gap between two TSC reads that is longer counts as a stall.
    pub stall: Duration,
    /// How long a [`Mode::Burst`] writes, and how long it rests.
    pub half_period: Duration,
}

impl Load {
    /// `mode` on `bytes` of memory at full speed, with stalls counted from 50 µs and bursts of 100 ms.
    pub const fn new(mode: Mode, bytes: u64) -> Self {
        Self { mode, bytes, delay: 0, stall: Duration::from_micros(50), half_period: Duration::from_millis(100) }
    }

    fn check(&self) -> Result<()> {
        let Self { mode, bytes, .. } = *self;
        let page = u64::from(PAGE_SIZE);
        ensure!(bytes % page == 0, "{bytes} bytes of memory: it must be whole pages of {page}");
        ensure!(bytes > 0 || mode == Mode::Idle, "no memory: {mode:?} needs at least one page of {page} bytes");
        ensure!(
            mode != Mode::Random || bytes.is_power_of_two(),
            "{bytes} bytes of memory: Random needs a power of two"
        );
        Ok(())
    }
}

/// `time` in ticks of a TSC of that frequency, rounded down.
pub fn ticks(time: Duration, tsc_hz: u64) -> u64 {
    u64::try_from(time.as_nanos() * u128::from(tsc_hz) / 1_000_000_000).unwrap_or(u64::MAX)
}

/// Each vCPU's load, and where its memory is.
#[derive(Clone, Debug)]
pub struct Layout {
    placed: Vec<(Load, u64)>,
    ram: u64,
}

impl Layout {
    /// Places the memory of each load behind that of the last one.
    ///
    /// # Errors
    /// An impossible load, or more memory than there is room for.
    pub fn new(loads: &[Load]) -> Result<Self> {
        let mut ram = WORKLOAD_ADDRESS;
        let mut placed = Vec::with_capacity(loads.len());
        for (index, load) in loads.iter().enumerate() {
            load.check().with_context(|| format!("vCPU {index}"))?;
            placed.push((*load, ram));
            ram = ram
                .checked_add(load.bytes)
                .and_then(|end| end.checked_next_multiple_of(HUGE_PAGE))
                .filter(|&end| end <= MAX_RAM - DOORBELL_BYTES)
                .with_context(|| format!("vCPU {index}: a guest has less than {} GiB of memory", MAX_RAM >> 30))?;
        }
        Ok(Self { placed, ram })
    }

    /// The same loads in `bytes` of memory, the rest of which no load touches.
    ///
    /// # Errors
    /// Less than the loads need, no multiple of [`HUGE_PAGE`], or more than there is room for.
    pub fn with_ram(self, bytes: u64) -> Result<Self> {
        let (least, most) = (self.ram, MAX_RAM - DOORBELL_BYTES);
        ensure!(
            bytes % HUGE_PAGE == 0 && (least..=most).contains(&bytes),
            "{} KiB of memory: this guest can have {} to {} MiB, in steps of 2 MiB",
            bytes >> 10,
            least >> 20,
            most >> 20
        );
        Ok(Self { ram: bytes, ..self })
    }

    /// Bytes of memory, a multiple of [`HUGE_PAGE`].
    pub fn ram(&self) -> u64 {
        self.ram
    }

    /// How many vCPUs.
    pub fn vcpus(&self) -> usize {
        self.placed.len()
    }

    /// Guest-physical range of the memory that vCPU `index` works on.
    ///
    /// # Panics
    /// If there is no load of that index.
    pub fn workload(&self, index: usize) -> Range<u64> {
        let (load, start) = self.placed[index];
        start..start + load.bytes
    }

    /// The parameter block of vCPU `index`; a `doorbell` of 0 makes it spin where it has nothing to do.
    ///
    /// # Panics
    /// If there is no load of that index.
    pub fn parameters(&self, index: usize, tsc_hz: u64, doorbell: u64) -> Parameters {
        let (load, start) = self.placed[index];
        let page = u64::from(PAGE_SIZE);
        Parameters {
            start,
            end: start + load.bytes,
            stride: if load.mode == Mode::Random { load.bytes / page - 1 } else { page },
            delay: load.delay,
            mode: load.mode,
            stall_ticks: ticks(load.stall, tsc_hz),
            index: index as u64,
            half_period: ticks(load.half_period, tsc_hz),
            doorbell,
        }
    }
}
