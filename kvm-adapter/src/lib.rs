//! Keeps each virtual CPU's dirty page rate under a limit, by KVM's dirty ring, so that a live migration converges while
//! vCPUs that only read keep their full speed.
//!
//! [`dirtylimit_core`] decides; this crate is its hands on Linux: it enables and maps the rings, harvests them, pauses
//! vCPUs, and offers the dirty log in the place of `KVM_GET_DIRTY_LOG`.
//!
//! # What a VMM adds
//! | where | what |
//! |---|---|
//! | after `KVM_CREATE_VM` | [`DirtyLimit::enable`] |
//! | before a memory slot is created, deleted | [`DirtyLimit::add_slot`], [`DirtyLimit::remove_slot`] |
//! | after `KVM_CREATE_VCPU` | [`DirtyLimit::add_vcpu`]: a [`Vcpu`] beside the VMM's own handle |
//! | before each `KVM_RUN` | [`Vcpu::before_run`] |
//! | at exit 31 | nothing: the next [`Vcpu::before_run`] sees it, from the first instruction on, limit or not |
//! | instead of `KVM_GET_DIRTY_LOG` | [`DirtyLimit::round`] while it runs, [`DirtyLimit::last_round`] at the end, and [`Round::merge`] for each slot |
//! | before the last rounds, where kicks end slices | [`DirtyLimit::set_draining`]: fewer pages are left for the downtime |
//! | within a round, to leave out what is dirty again | [`DirtyLimit::peek`] |
//! | where the VMM or a device writes guest memory | [`DirtyLimit::mark_dirty`] |
//! | where vCPUs are kicked | [`Interrupter::interrupt`], if the kick is not a signal to the thread |
//! | control plane | [`DirtyLimit::set_limit`], [`DirtyLimit::cancel`], [`DirtyLimit::set_vm_limit`], [`DirtyLimit::query`]; `dirtylimit-qmp` and `dirtylimit-metrics` serve them |
//! | event loop, or once | [`DirtyLimit::tick`], or [`DirtyLimit::throttle_thread`] |
//!
//! `examples/unikernel.rs` is a whole VMM with it, in under 200 lines; `examples/snapshots.rs` uses the dirty log alone.
//!
//! # Features
//! Both off by default. `log`: changes of state as records of the `log` crate. `vm-memory`: `SlotBitmap`, by which what is written
//! through `vm-memory` is marked as by [`DirtyLimit::mark_dirty`].
//!
//! # How it keeps its promises
//! - **No dirty page is lost.** An entry leaves a ring by one path, under one lock: *collect → reset → publish*
//!   (`harvest.rs`). Resets run with all 64 signals blocked; one that was interrupted all the same (the process was stopped,
//!   traced or frozen; the completions of an `io_uring` that the thread owns cannot be blocked either, so own none there) leaves
//!   at most 64 pages of a vCPU that stay dirty until they are known to be protected again. When a call fails, what was
//!   collected stays for the next.
//! - **No pause above `max_pause`**, but where others hold the VM's lock, 2.1 ms at most, or no timer ends a lump. A limited vCPU runs in slices of pages: entries
//!   are held back in its ring so that it exits when the slice is used up, pauses until it is paid for, and gets the next. No signal,
//!   and timers only where pages come in lumps ([`Kick::Auto`]); another [`Kick`] is an option for rings that never fill. What
//!   one pause does not cover stays owed.
//! - **A pause ends at once** when the limit is lifted or changed, when a signal reaches the thread, or when the
//!   [`Interrupter`] is called; within 10 ms when `immediate_exit` is set or `stop` returns true. Penalties lapse 5 s after
//!   the last tick (a second later where the vCPU stood still meanwhile), so that a dead control plane cannot hold a guest.
//! - **A limit that is not held says so**: [`Status::unenforced`], and the log.
//! - **vCPU threads never wait for a lock**, allocate nothing, and run their critical sections with signals blocked: the
//!   pause may sit in a signal handler.
//!
//! # Seccomp
//! vCPU threads need `ioctl` 0xaec7 (`KVM_RESET_DIRTY_RINGS`), `futex` (WAIT_BITSET and WAKE, private), `rt_sigprocmask`,
//! `getrusage`, and `clock_gettime` where there is no vDSO; threads that take the dirty log need the same (on arm64 also
//! `ioctl` 0x4010ae42, `KVM_GET_DIRTY_LOG`, with `mmap`, `mprotect` and `munmap`), and [`DirtyLimit::add_slot`] `ioctl`
//! 0x4068aea3 (`KVM_ENABLE_CAP`). Where `getrusage` is refused with an error each reset counts as interrupted. With
//! [`Kick::Auto`], the default, vCPU threads also need `timerfd_create` and `timerfd_settime` where the CPU has PML; where they
//! are refused with an error see [`Unenforced::Lumps`], and where a filter kills for them take [`Kick::Off`]. With
//! [`Kick::Signal`] also `ioctl` 0x4004ae8b (`KVM_SET_SIGNAL_MASK`), `timer_create`, `timer_settime`, `timer_delete`,
//! `rt_sigtimedwait`, `rt_sigaction`, `gettid` and `tgkill` on vCPU threads, and `tgkill` where limits are set and ticks
//! come from; with
//! [`Config::prompt`] `sched_getattr` and `sched_setattr`. The throttle thread, which
//! starts with a `clone`, is not required: [`DirtyLimit::tick`] serves an event loop.

#[cfg(not(target_os = "linux"))]
compile_error!("KVM is Linux's");

pub use dirtylimit_core;

mod batch;
mod caps;
mod coalesce;
mod dirty_log;
mod error;
mod events;
#[cfg(dirtylimit_planted)]
#[cfg_attr(not(test), expect(dead_code, reason = "what only this crate's own tests order"))]
mod fake;
#[cfg(dirtylimit_planted)]
mod fake_vm;
mod harvest;
mod kick;
mod limit;
mod shared;
mod slots;
mod snapshot;
mod sync;
mod sys;
// Not where it was unpacked from its package, which has neither them nor what they need (ci/package.sh).
#[cfg(all(test, dirtylimit_planted))]
mod tests;
mod thread;
mod throttle;
mod told;
mod vcpu;
mod vcpu_cells;
mod vm;
#[cfg(feature = "vm-memory")]
mod vm_memory;

pub use caps::{Caps, Config};
pub use dirty_log::{Round, Running, Stopped};
pub use dirtylimit_core::{Paced, PageRate, Shipped, Status, Stepped, Unenforced};
pub use error::Error;
#[cfg(dirtylimit_planted)]
#[doc(hidden)]
pub use fake_vm::FakeVm;
pub use harvest::Stats;
pub use kick::Kick;
pub use limit::{DirtyLimit, WeakDirtyLimit};
pub use shared::Interrupter;
pub use snapshot::Snapshot;
#[cfg(dirtylimit_planted)]
#[doc(hidden)]
pub use sys::PlantedBug;
pub use thread::spawn_without_signals;
pub use throttle::ThrottleThread;
pub use vcpu::{Decision, Vcpu};
#[cfg(feature = "vm-memory")]
pub use vm_memory::{SlotBitmap, SlotBitmapSlice};

/// The exit reason of a full dirty ring (`KVM_EXIT_DIRTY_RING_FULL`); kvm-ioctls hands it over as
/// `VcpuExit::Unsupported(31)`.
pub const EXIT_DIRTY_RING_FULL: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// The README's Rust compiles. (Its place is outside of the package.)
#[cfg(all(doctest, dirtylimit_planted))]
#[doc = include_str!("../../README.md")]
struct Readme;
