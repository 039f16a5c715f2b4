//! One vCPU, for its thread and its handlers, and what ends its pauses.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::answer::{Failure, answer, done, free, get, room};
use crate::vm::Limit;

/// kick_after_ns: nothing has to end the run.
pub const DIRTYLIMIT_NO_KICK: u64 = u64::MAX;

/// What dirtylimit_before_run() wants the vCPU's thread to do.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Call KVM_RUN.
    DIRTYLIMIT_ENTER = 0,
    /// A signal, an interrupter or stop() ended a pause: the VMM wants its thread for something else. See to that first, and
    /// call dirtylimit_before_run() again: what is owed stays owed, and the ring may be full. A VMM that saves the vCPU's state
    /// now calls KVM_RUN once before, with immediate_exit set: that completes an I/O exit which it has answered.
    DIRTYLIMIT_RETURN = 1,
}

/// One vCPU, beside the VMM's own: for its thread of the moment.
#[derive(Debug)]
pub struct Vcpu {
    vcpu: UnsafeCell<dirtylimit_kvm::Vcpu>,
    /// Somebody is inside `vcpu`.
    busy: AtomicBool,
    interrupter: dirtylimit_kvm::Interrupter,
}

impl Vcpu {
    /// Calls `f` with the vCPU, unless somebody else is inside a call on it.
    fn with<R>(&self, f: impl FnOnce(&mut dirtylimit_kvm::Vcpu) -> Result<R, Failure>) -> Result<R, Failure> {
        struct Leave<'a>(&'a AtomicBool);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                // Release: pairs with the acquire in `with`, so that the next call comes after this one.
                self.0.store(false, Ordering::Release);
            }
        }
        // Acquire: pairs with the release above.
        if self.busy.swap(true, Ordering::Acquire) {
            return Err(Failure::Caller(
                libc::EBUSY,
                "the vCPU's handle is in use, by another thread or by what this signal handler has interrupted",
            ));
        }
        let _leave = Leave(&self.busy);
        // SAFETY: `busy` lets one caller at a time in here.
        f(unsafe { &mut *self.vcpu.get() })
    }
}

/// What ends the pauses of one vCPU.
#[derive(Debug)]
pub struct Interrupter(dirtylimit_kvm::Interrupter);

/// Says whether a pause shall end, by any number but 0. Called on the vCPU's thread, in pauses, at least every 10 ms. It must
/// return: no longjmp, no C++ exception.
pub type Stop = Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>;

/// `stop`, as the adapter calls it.
///
/// # Safety
/// `stop` may be called with `opaque`, on this thread, for as long as the closure lives.
pub(crate) unsafe fn asks(stop: Stop, opaque: *mut c_void) -> impl FnMut() -> bool {
    // SAFETY: the caller's promise.
    move || stop.is_some_and(|stop| unsafe { stop(opaque) } != 0)
}

/// Maps a vCPU's dirty ring and makes a handle of it; after KVM_CREATE_VCPU and before its first KVM_RUN. id is the caller's.
/// After the handle was freed, the same id and descriptor attach to the same ring again. vcpu_fd may be closed afterwards. Any
/// thread.
///
/// -EBUSY: the vCPU has a handle, or its ring was consumed by somebody else. -EEXIST, -EBADF: id and descriptor do not belong
/// together. -ENXIO: it has no ring, since the VM had none when it was created, or is another. -ENOSPC: there are too many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_add_vcpu(
    limit: *mut Limit,
    id: u32,
    vcpu_fd: c_int,
    vcpu: *mut *mut Vcpu,
) -> c_int {
    done(|| {
        // SAFETY: the header's rules for places of new handles, and for handles.
        let (place, limit) = unsafe { (room(vcpu, "vcpu")?, get(limit, "limit")?) };
        let vcpu = limit.0.add_vcpu(id, &vcpu_fd)?;
        let interrupter = vcpu.interrupter();
        let busy = AtomicBool::new(false);
        *place = Box::into_raw(Box::new(Vcpu { vcpu: UnsafeCell::new(vcpu), busy, interrupter }));
        Ok(())
    })
}

/// Frees a vCPU's handle; its ring, and what is dirty in it, stays with the VM. NULL is none. The vCPU's thread, or any once that
/// thread is done with it.
///
/// -EBUSY: somebody is inside dirtylimit_before_run(), and the handle stays.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_vcpu_free(vcpu: *mut Vcpu) -> c_int {
    done(|| {
        if !vcpu.is_null() {
            // SAFETY: the header's rule for handles.
            unsafe { get(vcpu, "vcpu") }?.with(|_| Ok(()))?;
            // SAFETY: as above, and nobody is inside, nor may anybody use it from here on.
            unsafe { free(vcpu) };
        }
        Ok(())
    })
}

/// Collects what a vCPU's ring holds and forgets the vCPU, for VMMs that never run it again. Not needed at the end of a VM. Any
/// thread.
///
/// -ENOENT: no such vCPU. -EBUSY: it has a handle. Any other: the pages cannot be reset, and the vCPU stays.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_remove_vcpu(limit: *mut Limit, id: u32) -> c_int {
    // SAFETY: the header's rule for handles.
    done(|| Ok(unsafe { get(limit, "limit") }?.0.remove_vcpu(id)?))
}

/// To be called before each KVM_RUN, limit or not: pays what is owed, and frees room in a full ring. The VMM does nothing at
/// KVM_EXIT_DIRTY_RING_FULL but to come here. Answers DIRTYLIMIT_ENTER or DIRTYLIMIT_RETURN, or a negative errno.
///
/// Pauses at most max_pause_ns a call (and 2.1 ms where others hold the VM's lock, or as long as a lump of pages takes where no
/// timer ends it). A signal to the thread ends a pause at once, kvm_run.immediate_exit within 10 ms; while that is set there is
/// no pause: the answer is DIRTYLIMIT_ENTER.
///
/// kick_after_ns may be NULL; else it is set to the time after which the VMM shall make KVM_RUN return, with
/// DIRTYLIMIT_KICK_VMM, or to DIRTYLIMIT_NO_KICK.
///
/// The vCPU's thread, signal handlers included: allocates nothing and waits for no lock. A handler of the vCPU's thread may also
/// block for as long as it likes in the middle of a call, for the VM to be stopped: the library's locks are free then.
///
/// -EBUSY: called by two threads at once, or by a handler that has interrupted it. -EIO: the ring is wedged, and every page of
/// the VM must be sent again, or KVM_RESET_DIRTY_RINGS gave too little back: the text tells. -EXDEV: a vCPU of this VM is
/// another VM's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_before_run(vcpu: *mut Vcpu, kick_after_ns: *mut u64) -> c_int {
    // SAFETY: the caller's promises are the same.
    unsafe { dirtylimit_before_run_unless(vcpu, None, std::ptr::null_mut(), kick_after_ns) }
}

/// As dirtylimit_before_run(), for VMMs that block their kick signal outside KVM_RUN: a pause also ends within 10 ms of stop(opaque)
/// returning anything but 0 (whether a signal is pending, say). stop may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_before_run_unless(
    vcpu: *mut Vcpu,
    stop: Stop,
    opaque: *mut c_void,
    kick_after_ns: *mut u64,
) -> c_int {
    answer(|| {
        // SAFETY: the header's rule for handles.
        let vcpu = unsafe { get(vcpu, "vcpu") }?;
        // SAFETY: the caller wants it called, until this call returns.
        let stop = unsafe { asks(stop, opaque) };
        let decision = vcpu.with(|vcpu| Ok(vcpu.before_run_unless(stop)?))?;
        let (decision, kick_after) = match decision {
            dirtylimit_kvm::Decision::Enter { kick_after } => (Decision::DIRTYLIMIT_ENTER, kick_after),
            dirtylimit_kvm::Decision::Return => (Decision::DIRTYLIMIT_RETURN, None),
        };
        if !kick_after_ns.is_null() {
            let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(DIRTYLIMIT_NO_KICK);
            // SAFETY: not NULL, so it is the caller's place for the time.
            unsafe { kick_after_ns.write(kick_after.map_or(DIRTYLIMIT_NO_KICK, nanos)) };
        }
        Ok(decision as c_int)
    })
}

/// Makes what ends the vCPU's pauses. It may outlive the vCPU's handle; the same vCPU, attached again, has the same. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_interrupter(vcpu: *mut Vcpu, interrupter: *mut *mut Interrupter) -> c_int {
    done(|| {
        // SAFETY: the header's rules for places of new handles, and for handles.
        let (place, vcpu) = unsafe { (room(interrupter, "interrupter")?, get(vcpu, "vcpu")?) };
        *place = Box::into_raw(Box::new(Interrupter(vcpu.interrupter.clone())));
        Ok(())
    })
}

/// Makes the vCPU's current dirtylimit_before_run(), or else the next one that would pause, answer DIRTYLIMIT_RETURN at once. Not
/// needed where the VMM's kick is a signal to the thread that is open outside KVM_RUN. Any thread, any signal handler.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_interrupt(interrupter: *mut Interrupter) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        unsafe { get(interrupter, "interrupter") }?.0.interrupt();
        Ok(())
    })
}

/// Frees it. NULL is none. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_interrupter_free(interrupter: *mut Interrupter) {
    // SAFETY: the header's rule for handles.
    unsafe { free(interrupter) };
}
