//! Keeps each virtual CPU's dirty page rate under a limit: the core, without a clock, an allocator, a thread or a panic.
//!
//! ```text
//!  control plane ──set/cancel/query──► Limiter::tick ─► PREPARE ─► CALCULATE ─► SET PENALTY ─┐
//!                                         ▲            meter       policy       penalty     │ one wait-free store
//!                                         └─ every period           share                   ▼
//!  vCPU thread: KVM_RUN ─► exit, ring full ─► Ring::meter ─► ACCEPT PENALTY: Pacer::settle (one wait-free load), pause
//! ```
//! Each stage is the module of its name. `dirtylimit-kvm` puts KVM under it; an embedder of another kind (a unikernel's
//! VMM, firmware) drives the same parts:
//!
//! ```
//! use dirtylimit_core::{Entry, Limiter, PageRate, Paced, Pacer, Ring, SECOND};
//!
//! static LIMITER: Limiter<Paced, 4> = Limiter::new(Paced);
//! static MEMORY: [Entry; 1024] = [const { Entry::new() }; 1024];
//!
//! let vcpu = LIMITER.register()?;
//! let cell = LIMITER.cell(vcpu).ok_or("no such vCPU")?;
//! let (mut ring, mut pacer) = (Ring::new(&MEMORY[..])?, Pacer::new(&cell.report));
//!
//! // Control plane: 1 MiB/s, in pages of 4 KiB; and the tick, every 10 to 100 ms.
//! LIMITER.set_limit(vcpu, Some(PageRate::from_bytes_per_sec(1 << 20, 4096)));
//! LIMITER.tick(100 * SECOND);
//!
//! // vCPU thread, at an exit with a full ring: meter, settle, pause until `turn.until`, free the next slice.
//! let pages = ring.meter(|page| { /* gross and net are the same here */ });
//! cell.report.add_pages(pages, pages);
//! let turn = pacer.settle(100 * SECOND, LIMITER.vm(), &cell.penalty, &cell.report);
//! ring.collect(ring.to_collect(turn.slice.unwrap_or(u32::MAX)), |page| { /* dirty: publish it after the reset */ });
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`migrate`] says after each round of a live migration which budget the VM needs to meet a downtime, if any.
//!
//! # Wait-freedom
//! [`PenaltyCell::set`] is one store, [`PenaltyCell::accept`] and [`Pacer::owes`] one load each, [`Report`]'s counters a
//! load and a store, and [`Pacer::settle`] has no loop over its eight loads and a store. Each says how many instructions it
//! takes at most, in the optimised code of x86-64, 64-bit Arm and Cortex-M4 (`ci/wait-free.sh` counts them). [`Ring::meter`]
//! and [`Ring::collect`] visit each entry of the ring at most once a call.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
#[macro_use]
extern crate std;

mod controller;
mod enforce;
pub mod kicked;
mod meter;
pub mod migrate;
mod own;
mod pacer;
mod penalty;
mod policy;
mod rate;
mod ring;
mod share;
mod soft_limit;
mod sync;

pub use controller::{Full, Limiter, Status, VcpuCell, VcpuIndex};
pub use enforce::Unenforced;
pub use meter::{Counts, Meter, Reading, Report, Totals};
pub use own::{OWN_PAGES, OwnPages};
pub use pacer::{MAX_DEBT, Pacer, SLICE, Turn};
pub use penalty::{Penalty, PenaltyCell, Terms, VmCell};
pub use policy::{Paced, Policy, Shipped, Stepped, SteppedState};
pub use rate::{Nanos, PageRate, Price, SECOND};
pub use ring::{BadRingSize, Entry, PML, Page, RESERVED, Ring};
pub use share::{Claim, level, share};
