//! The VM: enabling, slots, limits, ticks.

use std::ffi::{c_int, c_void};
use std::time::Duration;

use dirtylimit_kvm::{DirtyLimit, PageRate, ThrottleThread};

use crate::answer::{Failure, done, free, get, room};
use crate::sized::{self, Versioned};
use crate::vcpu::{Stop, asks};

/// A rate: no limit.
pub const DIRTYLIMIT_UNLIMITED: u64 = u64::MAX;
/// A flag of dirtylimit_config_t: pauses end on time on a busy host too, because the thread of a limited vCPU asks the scheduler
/// for its shortest time slice (Linux 6.12; takes no privilege).
pub const DIRTYLIMIT_PROMPT: u32 = 1;

/// One VM under the limiter.
#[derive(Debug)]
pub struct Limit(pub(crate) DirtyLimit);

impl From<DirtyLimit> for Limit {
    /// For C to drive what Rust has enabled.
    fn from(limit: DirtyLimit) -> Self {
        Self(limit)
    }
}

/// A thread that ticks.
#[derive(Debug)]
pub struct Throttle(#[expect(dead_code, reason = "dropping it ends the thread")] ThrottleThread);

/// What ends a slice that the ring does not.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kick {
    /// The ring alone, and timers of the vCPU's thread where the CPU hands pages over in lumps (Intel's PML): no signal.
    DIRTYLIMIT_KICK_AUTO = 0,
    /// Nothing: the vCPU runs until its ring is full, and pays for that.
    DIRTYLIMIT_KICK_OFF = 1,
    /// The library, by the real-time signal kick_signal, which is its own. Not for VMMs that use KVM_SET_SIGNAL_MASK.
    DIRTYLIMIT_KICK_SIGNAL = 2,
    /// The VMM: when a limit was set, and when kick_after_ns has passed since dirtylimit_before_run() returned.
    DIRTYLIMIT_KICK_VMM = 3,
}

/// How to limit a VM. Set size to its sizeof and the rest to 0: 0 is the default of each field, those of later versions too.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// sizeof(dirtylimit_config_t).
    pub size: usize,
    /// Entries in each vCPU's ring: a power of two, 1,024 (the default) to 65,536; 256 and 512 where the CPU has no PML.
    pub ring_entries: u32,
    /// One of dirtylimit_kick.
    pub kick: u32,
    /// With DIRTYLIMIT_KICK_SIGNAL: SIGRTMIN to SIGRTMAX.
    pub kick_signal: i32,
    /// DIRTYLIMIT_PROMPT or 0.
    pub flags: u32,
    /// The longest single pause of a vCPU, from 100 µs to 1 s (clamped); 10 ms by default.
    pub max_pause_ns: u64,
}
// SAFETY: the sizes of its fields add up to its own, as the assertion says, and numbers have any bits.
unsafe impl Versioned for Config {
    const FIRST: usize = 32;
}
const _: () = assert!(size_of::<Config>() == 32);

/// The adapter's configuration; a field that is 0 is the default.
fn configured(given: Config) -> Result<dirtylimit_kvm::Config, Failure> {
    let kick = match given.kick {
        kick if kick == Kick::DIRTYLIMIT_KICK_AUTO as u32 => dirtylimit_kvm::Kick::Auto,
        kick if kick == Kick::DIRTYLIMIT_KICK_OFF as u32 => dirtylimit_kvm::Kick::Off,
        kick if kick == Kick::DIRTYLIMIT_KICK_SIGNAL as u32 => dirtylimit_kvm::Kick::Signal(given.kick_signal),
        kick if kick == Kick::DIRTYLIMIT_KICK_VMM as u32 => dirtylimit_kvm::Kick::Vmm,
        _ => return Err(Failure::Caller(libc::EINVAL, "kick is none of dirtylimit_kick")),
    };
    if given.flags & !DIRTYLIMIT_PROMPT != 0 {
        return Err(Failure::Caller(libc::EINVAL, "flags has a bit that is not DIRTYLIMIT_PROMPT's"));
    }
    let mut config = dirtylimit_kvm::Config::new().kick(kick).prompt(given.flags & DIRTYLIMIT_PROMPT != 0);
    if given.ring_entries != 0 {
        config = config.ring_entries(given.ring_entries);
    }
    if given.max_pause_ns != 0 {
        config = config.max_pause(Duration::from_nanos(given.max_pause_ns));
    }
    Ok(config)
}

/// A limit; `None` for none.
fn rate(limit: &Limit, bytes: u64) -> Result<Option<PageRate>, Failure> {
    match bytes {
        0 => Err(Failure::Caller(libc::EINVAL, "a limit of 0 bytes a second: DIRTYLIMIT_UNLIMITED lifts a limit")),
        DIRTYLIMIT_UNLIMITED => Ok(None),
        _ => Ok(Some(PageRate::from_bytes_per_sec(bytes, limit.0.page_size()))),
    }
}

/// Enables the dirty ring on a VM: right after KVM_CREATE_VM, before its slots and vCPUs. vm_fd may be closed afterwards. config
/// may be NULL, for the default. From here on KVM_GET_DIRTY_LOG fails on x86; dirtylimit_round() and dirtylimit_last_round() take
/// its place. Any thread.
///
/// -EOPNOTSUPP: this KVM has no ring of a kind that the machine can use. -EINVAL: the ring's size, the kick or its signal are not
/// allowed. -E2BIG: config asks for something that only a later version of the library knows. -EBUSY: the signal is handled or
/// ignored already. Others: what KVM answered; the text tells what to do.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_enable(vm_fd: c_int, config: *const Config, limit: *mut *mut Limit) -> c_int {
    done(|| {
        // SAFETY: the header's rule for places of new handles.
        let place = unsafe { room(limit, "limit") }?;
        let config = match config.is_null() {
            true => dirtylimit_kvm::Config::new(),
            // SAFETY: the header's rule for structs with a size.
            false => configured(unsafe { sized::read(config, "config") }?)?,
        };
        *place = Box::into_raw(Box::new(Limit(DirtyLimit::enable(&vm_fd, &config)?)));
        Ok(())
    })
}

/// Frees the VM's handle. NULL is none. Handles of vCPUs, rounds, interrupters and throttle threads stay valid until they are freed
/// themselves; the thread stops ticking. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_free(limit: *mut Limit) {
    // SAFETY: the header's rule for handles.
    unsafe { free(limit) };
}

/// The size of the pages that slots and dirty logs count, in bytes: the host's. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_page_size(limit: *mut Limit) -> u32 {
    // SAFETY: the header's rule for handles.
    unsafe { limit.as_ref() }.map_or(0, |limit| limit.0.page_size())
}

/// The largest ring whose pages that rounds hold back take at most half of a migration's downtime to send, for
/// dirtylimit_config_t's ring_entries: 1,024 to 65,536. bandwidth is the wire's, in bytes a second; vcpus are those that write. Any
/// thread.
#[unsafe(no_mangle)]
pub extern "C" fn dirtylimit_ring_for(downtime_ns: u64, bandwidth: u64, vcpus: u32) -> u32 {
    dirtylimit_kvm::Config::ring_for(Duration::from_nanos(downtime_ns), bandwidth, vcpus)
}

/// Makes a memory slot known (address space << 16 | slot), before it is created in KVM or its logging switched on: pages of unknown
/// slots are in no dirty log. A slot that is known with that size stays as it is. The VMM must not enable
/// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. Any thread.
///
/// -EEXIST: known with another size. -EINVAL: 0 pages, or 2^31 and more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_add_slot(limit: *mut Limit, slot: u32, pages: u64) -> c_int {
    // SAFETY: the header's rule for handles.
    done(|| Ok(unsafe { get(limit, "limit") }?.0.add_slot(slot, pages)?))
}

/// Collects and forgets a slot, with what is dirty in it, before it is deleted or changed in KVM. One that is not known is none to
/// forget. Any thread.
///
/// Any error: KVM_RESET_DIRTY_RINGS failed, and the slot is known still.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_remove_slot(limit: *mut Limit, slot: u32) -> c_int {
    // SAFETY: the header's rule for handles.
    done(|| Ok(unsafe { get(limit, "limit") }?.0.remove_slot(slot)?))
}

/// Limits a vCPU to that many bytes a second of newly dirty pages, in force while ticks come (dirtylimit_tick(),
/// dirtylimit_throttle_start()); DIRTYLIMIT_UNLIMITED lifts its limit, and ends a pause at once. Any thread.
///
/// -ENOENT: no such vCPU. -EINVAL: 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_set_limit(limit: *mut Limit, id: u32, bytes_per_second: u64) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        let limit = unsafe { get(limit, "limit") }?;
        match rate(limit, bytes_per_second)? {
            Some(rate) => limit.0.set_limit(id, rate)?,
            None => limit.0.cancel(id)?,
        }
        Ok(())
    })
}

/// As dirtylimit_set_limit(), for every vCPU, present and to come.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_set_limit_all(limit: *mut Limit, bytes_per_second: u64) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        let limit = unsafe { get(limit, "limit") }?;
        match rate(limit, bytes_per_second)? {
            Some(rate) => limit.0.set_limit_all(rate),
            None => limit.0.cancel_all(),
        }
        Ok(())
    })
}

/// Sets the budget of the whole VM, shared by max-min fairness among its vCPUs' demands; DIRTYLIMIT_UNLIMITED lifts it. Any thread.
///
/// -EINVAL: 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_set_vm_limit(limit: *mut Limit, bytes_per_second: u64) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        let limit = unsafe { get(limit, "limit") }?;
        limit.0.set_vm_limit(rate(limit, bytes_per_second)?);
        Ok(())
    })
}

/// How much a vCPU counts in the split of the VM's budget: 1 until told otherwise. Any thread.
///
/// -ENOENT: no such vCPU.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_set_weight(limit: *mut Limit, id: u32, weight: u32) -> c_int {
    // SAFETY: the header's rule for handles.
    done(|| Ok(unsafe { get(limit, "limit") }?.0.set_weight(id, weight)?))
}

/// Changes the longest single pause of a vCPU, from 100 µs to 1 s (clamped). Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_set_max_pause(limit: *mut Limit, max_pause_ns: u64) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        unsafe { get(limit, "limit") }?.0.set_max_pause(Duration::from_nanos(max_pause_ns));
        Ok(())
    })
}

/// One tick: measures each vCPU, and sets its penalty. For a VMM's event loop, every 10 to 100 ms. Limits lapse 5 s after the last
/// tick. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_tick(limit: *mut Limit) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        unsafe { get(limit, "limit") }?.0.tick();
        Ok(())
    })
}

/// Ticks every period_ns (1 ms to 1 s, clamped) on the calling thread, whose name, priority and seccomp filter are the VMM's, until
/// stop(opaque), which is asked before each tick, returns anything but 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_run_throttle(
    limit: *mut Limit,
    period_ns: u64,
    stop: Stop,
    opaque: *mut c_void,
) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        let limit = unsafe { get(limit, "limit") }?;
        stop.ok_or(Failure::Null("stop"))?;
        // SAFETY: the caller wants it called, until this call returns.
        limit.0.run_throttle(Duration::from_nanos(period_ns), unsafe { asks(stop, opaque) });
        Ok(())
    })
}

/// Ticks every period_ns (1 ms to 1 s, clamped) from a thread of its own, with all signals blocked and the seccomp filter of the
/// calling one. Any thread.
///
/// -EAGAIN and others: no thread can be started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_throttle_start(
    limit: *mut Limit,
    period_ns: u64,
    throttle: *mut *mut Throttle,
) -> c_int {
    done(|| {
        // SAFETY: the header's rules for places of new handles, and for handles.
        let (place, limit) = unsafe { (room(throttle, "throttle")?, get(limit, "limit")?) };
        *place = Box::into_raw(Box::new(Throttle(limit.0.throttle_thread(Duration::from_nanos(period_ns))?)));
        Ok(())
    })
}

/// Ends the thread, and waits for its end. NULL is none. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_throttle_stop(throttle: *mut Throttle) {
    // SAFETY: the header's rule for handles.
    unsafe { free(throttle) };
}
