//! Enabling the dirty ring on a VM.

use std::time::Duration;

use dirtylimit_core::{Entry, Nanos, RESERVED, Shipped};

use crate::Error;
use crate::error::system;
use crate::kick::Kick;
use crate::sys::{self, Kernel};

const KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: u32 = 168;
const KVM_CAP_DIRTY_LOG_RING: u32 = 192;
const KVM_CAP_DIRTY_LOG_RING_ACQ_REL: u32 = 223;
const KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: u32 = 225;

/// How to limit a VM.
#[derive(Clone, Debug)]
pub struct Config {
    pub(crate) ring_entries: u32,
    pub(crate) max_pause: Nanos,
    pub(crate) policy: Shipped,
    pub(crate) kick: Kick,
    pub(crate) prompt: bool,
    #[cfg(dirtylimit_planted)]
    pub(crate) planted_bug: Option<sys::PlantedBug>,
}

impl Default for Config {
    /// Rings of 1,024 entries, pauses of at most 10 ms, paced, [`Kick::Auto`], threads scheduled as they are.
    fn default() -> Self {
        Self {
            ring_entries: 1024,
            max_pause: 10_000_000,
            policy: Shipped::default(),
            kick: Kick::Auto,
            prompt: false,
            #[cfg(dirtylimit_planted)]
            planted_bug: None,
        }
    }
}

impl Config {
    /// The default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Entries in each vCPU's ring, of 16 bytes: a power of two, at least a page of them (256 of 4 KiB) and more than KVM
    /// keeps in reserve (64, and 512 with Intel's PML, so 1,024 there), at most what KVM says, which is 65,536 (Linux 6.18).
    /// A small ring is exact sooner after it was emptied, and holds less back: see [`Config::ring_for`]. A large one costs an
    /// unlimited guest fewer exits.
    #[must_use]
    pub fn ring_entries(self, entries: u32) -> Self {
        Self { ring_entries: entries, ..self }
    }

    /// The largest ring whose pages that rounds hold back take at most half of a migration's downtime to send.
    ///
    /// A limited vCPU runs inside its slice because its ring is kept full but for that: its soft limit less the slice stays
    /// in the ring, dirty, until the vCPU is stopped, and no running round drains it. `bandwidth` in bytes a second, of the
    /// wire; `vcpus` those that write. From 1,024, which is the least with Intel's PML, to 65,536 entries: where even 1,024
    /// take longer, the downtime is not to be had with that many vCPUs.
    #[must_use]
    pub fn ring_for(downtime: Duration, bandwidth: u64, vcpus: u32) -> u32 {
        let bytes = u128::from(bandwidth).saturating_mul(downtime.as_millis()) / 1000 / 2;
        let pages = bytes / u128::from(sys::page_size()) / u128::from(vcpus.max(1));
        let pages = u32::try_from(pages).unwrap_or(u32::MAX).clamp(1024, 65_536);
        1 << pages.ilog2()
    }

    /// The longest single pause of a vCPU, from 100 µs to 1 s (clamped).
    #[must_use]
    pub fn max_pause(self, pause: Duration) -> Self {
        Self { max_pause: Nanos::try_from(pause.as_nanos()).unwrap_or(Nanos::MAX), ..self }
    }

    /// How penalties are found.
    #[must_use]
    pub fn policy(self, policy: Shipped) -> Self {
        Self { policy, ..self }
    }

    /// Who ends the slices that the ring cannot end. The default does where pages come in lumps; rings larger than what the
    /// guest writes to need another.
    #[must_use]
    pub fn kick(self, kick: Kick) -> Self {
        Self { kick, ..self }
    }

    /// Whether pauses shall end on time on a busy host too. The thread of a limited vCPU then asks the scheduler for a
    /// short time slice, 0.5 ms: it takes the CPU from a thread with an ordinary slice, instead of waiting until that is
    /// used up (up to 4 ms, at 250 ticks a second). When the limit is lifted it has the system's slice again. Takes no
    /// privilege; needs Linux 6.12, and without it, or where a filter answers with an error, pauses end as late as anybody's.
    #[must_use]
    pub fn prompt(self, prompt: bool) -> Self {
        Self { prompt, ..self }
    }

    /// Makes a mistake, so that a test can show that it would notice.
    #[cfg(dirtylimit_planted)]
    #[doc(hidden)]
    #[must_use]
    pub fn planted_bug(self, bug: sys::PlantedBug) -> Self {
        Self { planted_bug: Some(bug), ..self }
    }
}

/// Makes the kick signal the library's.
pub(crate) fn claim_signal(kick: Kick) -> Result<(), Error> {
    let Kick::Signal(signal) = kick else { return Ok(()) };
    let (min, max) = (libc::SIGRTMIN(), libc::SIGRTMAX());
    if !(min..=max).contains(&signal) {
        return Err(Error::KickSignal { signal, min, max });
    }
    match sys::claim(signal).map_err(system("sigaction, for kicks"))? {
        true => Ok(()),
        false => Err(Error::KickSignalTaken(signal)),
    }
}

/// The dirty ring as a VM's KVM offers it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Caps {
    /// With acquire and release semantics spelled out (`KVM_CAP_DIRTY_LOG_RING_ACQ_REL`); without, x86's own order serves.
    pub acq_rel: bool,
    /// Pages dirtied outside a vCPU go to a bitmap beside the ring (`KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP`, arm64).
    pub bitmap: bool,
    /// The most entries that a ring may have.
    pub max_entries: u32,
    /// The VM can leave the protection of pages to its VMM (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`), which is kept off: see
    /// [`crate::DirtyLimit::add_slot`].
    pub manual_protect: bool,
}

impl Caps {
    /// Asks the VM.
    pub(crate) fn of(vm: &dyn Kernel) -> Result<Self, Error> {
        let check = |capability| vm.check(capability).map_err(system("KVM_CHECK_EXTENSION on the VM's descriptor"));
        let acq_rel = check(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)?;
        // Without the acquire and release of the newer one only a machine with total store order can follow the ring.
        let plain = if cfg!(target_arch = "x86_64") { check(KVM_CAP_DIRTY_LOG_RING)? } else { 0 };
        let bytes = if acq_rel > 0 { acq_rel } else { plain };
        if bytes == 0 {
            return Err(Error::Unsupported);
        }
        let max_entries = bytes / ENTRY;
        let bitmap = check(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)? > 0;
        let manual_protect = check(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)? > 0;
        Ok(Self { acq_rel: acq_rel > 0, bitmap, max_entries, manual_protect })
    }

    /// Refuses, before anything is enabled, what would lose pages: where the interrupt controller's tables are written
    /// outside any vCPU (`arm64`), a ring needs the bitmap beside it.
    pub(crate) fn are_enough(self, arm64: bool) -> Result<Self, Error> {
        if arm64 && !self.bitmap { Err(Error::NoBitmap) } else { Ok(self) }
    }

    /// Enables rings of `entries` entries, then the bitmap where there is one: KVM wants this order, and takes neither back.
    pub(crate) fn enable(&self, vm: &dyn Kernel, entries: u32) -> Result<(), Error> {
        let min = (sys::page_size() / ENTRY).max((RESERVED + 1).next_power_of_two());
        let max = self.max_entries;
        if !entries.is_power_of_two() || entries < min || entries > max {
            return Err(Error::RingSize { entries, min, max });
        }
        self.forbid_manual_protect(vm)?;
        let ring = if self.acq_rel { KVM_CAP_DIRTY_LOG_RING_ACQ_REL } else { KVM_CAP_DIRTY_LOG_RING };
        vm.enable(ring, u64::from(entries) * u64::from(ENTRY)).map_err(|source| Error::Enable { entries, source })?;
        if self.bitmap {
            vm.enable(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0).map_err(Error::EnableBitmap)?;
        }
        Ok(())
    }

    /// Switches manual protection off, where there is any. With `KVM_DIRTY_LOG_INITIALLY_SET` no page of a slot is protected
    /// when its logging begins: it waits for `KVM_CLEAR_DIRTY_LOG`, which a VM with a ring does not have, and nothing would
    /// ever be logged. KVM does not tell whether it is on, so it is switched off whether it was or not.
    pub(crate) fn forbid_manual_protect(&self, vm: &dyn Kernel) -> Result<(), Error> {
        if self.manual_protect {
            vm.enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0).map_err(Error::ManualProtect)?;
        }
        Ok(())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "16 bytes")]
const ENTRY: u32 = size_of::<Entry>() as u32;
