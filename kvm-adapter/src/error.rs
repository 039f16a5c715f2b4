//! What can go wrong, and what to do about it.

use std::io;

/// Why a call on the adapter failed. Nothing is lost by any of them: pages that were collected stay dirty.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The VM has no dirty ring of a kind that this machine can use.
    #[error(
        "this KVM offers no dirty ring (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 223{}): it needs Linux 5.11 or later on x86, \
         6.2 or later on arm64, and a descriptor of a VM",
        if cfg!(target_arch = "x86_64") { ", or KVM_CAP_DIRTY_LOG_RING, 192" } else { "" }
    )]
    Unsupported,
    /// The VM's ring would not log what is dirtied outside its vCPUs.
    #[error(
        "this KVM offers no KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP (225), without which a dirty ring does not log the interrupt \
         controller's tables: it needs Linux 6.2 or later on arm64"
    )]
    NoBitmap,
    /// The ring's size is not one that KVM takes.
    #[error("a dirty ring of {entries} entries: the number must be a power of two from {min} to {max} on this host")]
    RingSize {
        /// What was asked for.
        entries: u32,
        /// The smallest on this host: a page, and more than the reserved entries.
        min: u32,
        /// The largest, by `KVM_CHECK_EXTENSION`.
        max: u32,
    },
    /// KVM refused to enable the ring.
    #[error(
        "KVM refused a dirty ring of {entries} entries: {source}; enable it once, right after KVM_CREATE_VM and before \
         the first vCPU, with more entries than KVM keeps in reserve (64, and 512 with Intel's PML)"
    )]
    Enable {
        /// What was asked for.
        entries: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// KVM refused the backup bitmap.
    #[error(
        "KVM refused KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: {0}; the ring without it is enabled for good and would lose pages, \
         so this VM cannot be used: make another one, and enable its ring before its first memory slot"
    )]
    EnableBitmap(io::Error),
    /// The rings are to be drained, and nothing but a full one ends a run.
    #[error(
        "rings are drained only where kicks end the vCPUs' runs: this VM was enabled with Kick::Auto or Kick::Off; take \
         Kick::Signal or Kick::Vmm, or a smaller ring (Config::ring_for)"
    )]
    NoKick,
    /// KVM refused to switch its manual protection of the dirty log off.
    #[error(
        "KVM refused to switch KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 off: {0}; with it on, pages would be left unprotected that \
         are then never logged"
    )]
    ManualProtect(io::Error),
    /// KVM has more pages in the slot than it was added with.
    #[error(
        "memory slot {slot:#x} has more pages in KVM than the {pages} that it was added with: remove it and add it as large \
         as it is; all of its pages are dirty in the next take"
    )]
    SlotTooShort {
        /// Which.
        slot: u32,
        /// Its size as added.
        pages: u64,
    },
    /// The kick signal is not one that the library can use.
    #[error(
        "signal {signal} cannot be the kick: it must be a real-time signal from SIGRTMIN ({min}) to SIGRTMAX ({max})"
    )]
    KickSignal {
        /// What was asked for.
        signal: i32,
        /// The lowest real-time signal.
        min: i32,
        /// The highest.
        max: i32,
    },
    /// The kick signal is somebody else's.
    #[error(
        "signal {0} cannot be the kick: this process handles or ignores it already; take one that nobody else uses"
    )]
    KickSignalTaken(i32),
    /// A call of the system failed.
    #[error("{call}: {source}")]
    System {
        /// Which, and on what.
        call: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The slot is known already, with another size.
    #[error(
        "memory slot {slot:#x} is added already, with {pages} pages: remove it before it is added with another size"
    )]
    SlotExists {
        /// Which.
        slot: u32,
        /// Its size as added.
        pages: u64,
    },
    /// No such slot.
    #[error("no memory slot {0:#x}: add it (address space << 16 | slot) before it is created in KVM")]
    NoSlot(u32),
    /// The bitmap is too short for the slot.
    #[error("a bitmap of {given} words for memory slot {slot:#x}, which takes {needed}: a bit a page, 64 a word")]
    BitmapSize {
        /// Which.
        slot: u32,
        /// The words that were given.
        given: usize,
        /// Those that it takes.
        needed: usize,
    },
    /// Pages that the slot does not have.
    #[error("pages up to {end} of memory slot {slot:#x}, which has {pages}")]
    PagesBeyond {
        /// Which.
        slot: u32,
        /// Where the range ends.
        end: u64,
        /// The slot's size as added.
        pages: u64,
    },
    /// A slot of no pages, or of more than KVM can have.
    #[error("memory slot {slot:#x} of {pages} pages: it must have 1 to 2^31 - 1")]
    SlotSize {
        /// Which.
        slot: u32,
        /// Its size as given.
        pages: u64,
    },
    /// The guest has dirtied pages of which the limiter does not know the slot. Told once; they are in no dirty log.
    #[error(
        "the guest has dirtied {pages} pages of slots that are not known, or shorter than KVM's (first of slot {slot:#x}): \
         they are in no dirty log and must be sent again; add each slot, in its whole size, before it is created in KVM"
    )]
    UnknownPages {
        /// How many entries of the rings named one.
        pages: u64,
        /// The slot of the first (address space << 16 | slot).
        slot: u32,
    },
    /// The vCPU's handle is still held by somebody.
    #[error("vCPU {0} has a handle already: drop it before the vCPU is added again")]
    VcpuBusy(u32),
    /// The vCPU has an id already.
    #[error("this descriptor is that of vCPU {known}, so it cannot be vCPU {id} too: give each id its own vCPU")]
    SameVcpu {
        /// Under which it was to be added.
        id: u32,
        /// Under which it is known.
        known: u32,
    },
    /// The id is another vCPU's.
    #[error("this descriptor is not that of vCPU {0}, which is added already: remove it before its id is another's")]
    OtherVcpu(u32),
    /// The vCPU has no ring of the VM's size.
    #[error(
        "vCPU {id} has no dirty ring of {entries} entries: it is a vCPU of another VM, or KVM_CREATE_VCPU came before \
         the ring was enabled"
    )]
    NoRing {
        /// Which.
        id: u32,
        /// The size of this VM's rings.
        entries: u32,
    },
    /// The vCPU is another VM's, which KVM does not tell when it is added: no reset gives its entries back. Or somebody else has
    /// consumed its ring from the start.
    #[error(
        "the dirty ring of vCPU {0} is not of this VM, or somebody else consumes it: KVM_RESET_DIRTY_RINGS was not disturbed \
         and gave none of its entries back, now or ever; remove it (remove_vcpu), and add it to its own VM's limiter; nothing is \
         published until then"
    )]
    ForeignVcpu(u32),
    /// Somebody has consumed the vCPU's ring.
    #[error(
        "the dirty ring of vCPU {0} is not new: where KVM goes on in it is unknown; a vCPU that was removed, or whose ring \
         somebody else has read, cannot be added"
    )]
    UsedRing(u32),
    /// No such vCPU.
    #[error("no vCPU {0}: add it first")]
    NoVcpu(u32),
    /// No room for another vCPU.
    #[error("vCPU {id}: {source}")]
    TooManyVcpus {
        /// Which.
        id: u32,
        /// How many there is room for.
        source: dirtylimit_core::Full,
    },
    /// The kernel says that the ring is full, and there is nothing in it to collect or to reset.
    #[error(
        "the dirty ring of vCPU {id} is wedged: KVM_RUN returned full {exits} times in a row with nothing to collect and \
         nothing for reset to take (KVM has written past its reserved entries, or somebody else consumes this ring); its \
         dirty pages are unknown, so every page of this VM must be sent again"
    )]
    Wedged {
        /// Which vCPU.
        id: u32,
        /// How often it came back.
        exits: u32,
    },
    /// The kernel has used up its reserve: every entry of a ring is dirty.
    #[error(
        "KVM has filled the dirty ring of vCPU {0} to its last entry, beyond those that it keeps in reserve, and may have \
         overwritten some: its dirty pages are unknown, so every page of this VM must be sent again"
    )]
    Overrun(u32),
    /// Resets went on to give nothing back.
    #[error(
        "KVM_RESET_DIRTY_RINGS gave back {given} of {expected} collected entries, and then nothing {tries} times in a row: \
         the pages stay unpublished until a later reset takes the rest"
    )]
    ShortReset {
        /// Entries given back.
        given: u32,
        /// Entries collected.
        expected: u32,
        /// How often in a row it gave nothing back.
        tries: u32,
    },
}

impl Error {
    /// The `errno` closest to it, for C interfaces and VMMs that speak in them.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Unsupported | Self::NoBitmap | Self::NoKick => libc::EOPNOTSUPP,
            Self::RingSize { .. }
            | Self::SlotSize { .. }
            | Self::SlotTooShort { .. }
            | Self::BitmapSize { .. }
            | Self::PagesBeyond { .. }
            | Self::KickSignal { .. } => libc::EINVAL,
            Self::Enable { source, .. }
            | Self::EnableBitmap(source)
            | Self::ManualProtect(source)
            | Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::NoSlot(_) | Self::NoVcpu(_) | Self::UnknownPages { .. } => libc::ENOENT,
            Self::VcpuBusy(_) | Self::KickSignalTaken(_) | Self::UsedRing(_) => libc::EBUSY,
            Self::SlotExists { .. } | Self::SameVcpu { .. } => libc::EEXIST,
            Self::OtherVcpu(_) => libc::EBADF,
            Self::ForeignVcpu(_) => libc::EXDEV,
            Self::NoRing { .. } => libc::ENXIO,
            Self::TooManyVcpus { .. } => libc::ENOSPC,
            Self::Wedged { .. } | Self::Overrun(_) | Self::ShortReset { .. } => libc::EIO,
        }
    }
}

/// Names the call of a system error.
pub(crate) fn system(call: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { call, source }
}

/// The kick signal got another handler.
pub(crate) fn kick_is_taken(signal: i32) -> Error {
    Error::KickSignalTaken(signal)
}
