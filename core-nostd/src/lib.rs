//! Keeps each virtual CPU's dirty page rate under a limit: the core, without a clock, an allocator, a thread or a panic.
//!
//! ```text
//!  control plane ──set/cancel/query──► Limiter::tick ─► PREPARE ─► CALCULATE ─► SET PENALTY ─┐
//!                                         ▲                                                 │ one wait-free store
//!                                         └─ every period                                   ▼
//!  vCPU thread: KVM_RUN ─► exit, ring full ─► VcpuRing::meter ─► ACCEPT PENALTY: Machine (one wait-free load), pause
//! ```
//! Each stage is the file or folder of its name (`prepare`, `calculate`, `set_penalty`, `accept_penalty`); a vCPU from an exit to its next entry is one [`Machine`], which decides, and leaves
//! clocks, locks and system calls to its driver. `dirtylimit-kvm` puts KVM under it; an embedder of another kind (a unikernel's
//! VMM, firmware) drives the same parts:
//!
//! ```
//! use dirtylimit_core::{Ended, Entry, Inline, Limiter, Machine, Metered, PageRate, Paced, Ring, SECOND, Step, VcpuRing};
//!
//! static LIMITER: Limiter<Paced, Inline<4>> = Limiter::new(Paced);
//! static MEMORY: [Entry; 1024] = [const { Entry::new() }; 1024];
//!
//! let vcpu = LIMITER.register()?;
//! let cell = LIMITER.cell(vcpu).ok_or("no such vCPU")?;
//! let (mut ring, mut machine) = (VcpuRing::new(Ring::new(&MEMORY[..])?), Machine::new(cell, 1024, false, false));
//!
//! // Control plane: 1 MiB/s, in pages of 4 KiB; and the tick, every 10 to 100 ms.
//! LIMITER.set_limit(vcpu, Some(PageRate::from_bytes_per_sec(1 << 20, 4096)));
//! LIMITER.tick(100 * SECOND);
//!
//! // vCPU thread, at an exit with a full ring.
//! let (vm, now) = (LIMITER.vm(), 100 * SECOND);
//! machine.full_exit(cell);
//! let mut step = machine.begin(now, vm, cell);
//! loop {
//!     step = match step {
//!         Step::Harvest => {
//!             ring.meter(cell, |page| Metered::New);
//!             machine.harvested(now, vm, cell, &mut ring, false)
//!         }
//!         Step::Pause { until, .. } => machine.paused(now, until.max(now), Ended::Due, vm, cell), // sleep until then
//!         Step::Reset => {
//!             ring.collect(ring.to_grant(), |page| { /* dirty: publish it after the reset */ });
//!             ring.reclaim(); // after the kernel's reset
//!             ring.grant(cell);
//!             machine.reset_done(now, cell)
//!         }
//!         Step::Enter(_) | Step::Return(_) | Step::Wedged(_) => break,
//!     };
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`migrate`] says after each round of a live migration which budget the VM needs to meet a downtime, if any.
//!
//! # Wait-freedom
//! [`PenaltyCell::set`] is one store, [`PenaltyCell::accept`] and [`Pacer::owes`] one load each, [`Counters`] a load and a
//! store for each, [`Pacer::charge`] has no loop over its eight loads and a store, and no step of a [`Machine`] has one. Each says
//! how many instructions it takes at most, in the optimised code of x86-64, 64-bit Arm and Cortex-M4 (`ci/wait-free.sh` counts
//! them). [`Ring::meter`] and [`Ring::collect`] visit each entry of the ring at most once a call.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
#[macro_use]
extern crate std;

mod accept_penalty;
mod calculate;
mod controller;
pub mod migrate;
mod prepare;
mod rate;
mod ring;
mod set_penalty;
mod sync;
mod vcpu_cell;

const _: () = assert!(size_of::<Entry>() == 16, "an entry must lie as the kernel's does");

pub use accept_penalty::{
    BATCH, Charge, Ended, MAX_DEBT, Machine, Metered, Pacer, RESET_GAP, Run, SLICE, Step, TIMERS, VcpuRing, ends_slices,
};
pub use calculate::*;
pub use controller::{Full, Inline, Limiter, Status, Store, Unenforced, VcpuIndex};
pub use prepare::{Counters, Counts, RateEstimator, Sample, Totals};
pub use rate::{EmissionInterval, Nanos, PageRate, SECOND};
pub use ring::{BadRingSize, Entry, PML, Page, RESERVED, Ring};
pub use set_penalty::{Penalty, PenaltyCell, Terms, VmCell};
pub use vcpu_cell::{Request, VcpuCell};
