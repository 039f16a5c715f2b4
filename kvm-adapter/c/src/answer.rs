//! What a call answers: 0 or a negative errno, and the text of the thread's last error. No panic gets past it.

use std::cell::Cell;
use std::ffi::{CString, c_char, c_int};
use std::fmt;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use dirtylimit_kvm::Error;

/// The version that this header is of, as dirtylimit_version() gives it: a byte each for major, minor and patch.
pub const DIRTYLIMIT_VERSION: u32 = 0x00_0100;

/// Why a call failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The adapter says so.
    Adapter(Error),
    /// An argument, by its name in the header, is NULL.
    Null(&'static str),
    /// The caller made a mistake that C alone can make.
    Caller(c_int, &'static str),
    /// A bug of the library's.
    Panic,
}

impl Failure {
    fn errno(&self) -> c_int {
        match self {
            Self::Adapter(error) => error.errno(),
            Self::Null(_) => libc::EINVAL,
            Self::Caller(errno, _) => *errno,
            Self::Panic => libc::ENOTRECOVERABLE,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Adapter(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adapter(error) => error.fmt(f),
            Self::Null(argument) => write!(f, "{argument} is NULL"),
            Self::Caller(_, text) => f.write_str(text),
            Self::Panic => f.write_str("dirtylimit has a bug, and has written to stderr where: please report it"),
        }
    }
}

/// A thread's last failure. It is put into words when somebody asks, because `before_run` may fail inside a signal handler.
/// For the same reason it has no destructor, which would be registered at the first use by an allocation.
struct Last {
    /// The failure is being read or replaced, by code that a signal handler has interrupted.
    busy: AtomicBool,
    failure: Cell<ManuallyDrop<Option<Failure>>>,
}

thread_local! {
    static LAST: Last =
        const { Last { busy: AtomicBool::new(false), failure: Cell::new(ManuallyDrop::new(None)) } };
    static TEXT: Cell<CString> = Cell::default();
}

impl Last {
    /// Puts another failure in the place of the last; returns that one, or `None` where a handler has come in between.
    fn replace(&self, failure: Option<Failure>) -> Option<Failure> {
        // Acquire and release: for the compiler alone, since only handlers of this thread come in between.
        if self.busy.swap(true, Ordering::Acquire) {
            return None;
        }
        let last = self.failure.replace(ManuallyDrop::new(failure));
        self.busy.store(false, Ordering::Release);
        ManuallyDrop::into_inner(last)
    }
}

/// Answers what `call` does: its number, or a negative errno. `errno` stays as it was.
pub(crate) fn answer(call: impl FnOnce() -> Result<c_int, Failure>) -> c_int {
    // SAFETY: this thread's own, valid for as long as the thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { errno.read() };
    // What the adapter guards by locks is whole after a panic (its `Vm::lock`); a vCPU's handle owes less or more.
    let result = catch_unwind(AssertUnwindSafe(call)).unwrap_or(Err(Failure::Panic));
    let number = result.unwrap_or_else(|failure| {
        let errno = failure.errno();
        drop(LAST.with(|last| last.replace(Some(failure))));
        -errno
    });
    // SAFETY: as above.
    unsafe { errno.write(before) };
    number
}

/// [`answer`] of a call that has nothing to say.
pub(crate) fn done(call: impl FnOnce() -> Result<(), Failure>) -> c_int {
    answer(|| call().map(|()| 0))
}

/// What a pointer of the caller's points to.
///
/// # Safety
/// `pointer` is NULL or points to a `T` that lives for `'a`, which others use only as `&T`.
pub(crate) unsafe fn get<'a, T>(pointer: *mut T, name: &'static str) -> Result<&'a T, Failure> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }.ok_or(Failure::Null(name))
}

/// Where a new handle is to be put; it is NULL until then.
///
/// # Safety
/// `out` is NULL or the caller's to write for `'a`.
pub(crate) unsafe fn room<'a, T>(out: *mut *mut T, name: &'static str) -> Result<&'a mut *mut T, Failure> {
    if out.is_null() {
        return Err(Failure::Null(name));
    }
    // SAFETY: the caller's promise; written before it is a reference, since it may not have had a value.
    unsafe {
        out.write(std::ptr::null_mut());
        Ok(&mut *out)
    }
}

/// Takes back the handle that a call gave out; NULL is none.
///
/// # Safety
/// `handle` is NULL or came from `Box::into_raw`, and nobody uses it from here on.
pub(crate) unsafe fn free<T>(handle: *mut T) {
    done(|| {
        if !handle.is_null() {
            // SAFETY: the caller's promise.
            drop(unsafe { Box::from_raw(handle) });
        }
        Ok(())
    });
}

/// What the last call that failed on this thread has to say, as a sentence in English without a full stop; "" if none has.
/// Any thread; not from a signal handler. The text is the thread's until it calls this again, or ends.
#[unsafe(no_mangle)]
pub extern "C" fn dirtylimit_last_error() -> *const c_char {
    let said = catch_unwind(|| {
        let text = LAST.with(|last| {
            let failure = last.replace(None)?;
            let text = failure.to_string();
            drop(last.replace(Some(failure)));
            CString::new(text).ok()
        });
        TEXT.try_with(|place| {
            place.set(text.unwrap_or_default());
            // SAFETY: only this thread has the cell, and no reference into it outlives this line.
            unsafe { (*place.as_ptr()).as_ptr() }
        })
    });
    said.map_or(c"".as_ptr(), |text| text.unwrap_or(c"".as_ptr()))
}

/// The version of the library: a byte each for major, minor and patch. A library of the same major and minor version as
/// DIRTYLIMIT_VERSION, and a patch version at least as high, is compatible with this header. Any thread, any signal handler.
#[unsafe(no_mangle)]
pub extern "C" fn dirtylimit_version() -> u32 {
    DIRTYLIMIT_VERSION
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn last() -> String {
        // SAFETY: a text of this thread, which does not ask again before it is copied.
        unsafe { CStr::from_ptr(dirtylimit_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_is_an_errno_and_a_text() {
        assert_eq!(last(), "");
        assert_eq!(done(|| panic!("for a test")), -libc::ENOTRECOVERABLE);
        assert!(last().contains("has a bug"), "{}", last());
        assert_eq!(done(|| Ok(())), 0);
        assert!(last().contains("has a bug"), "a success leaves the text: {}", last());
        assert_eq!(done(|| Err(Error::NoSlot(7).into())), -libc::ENOENT);
        assert_eq!(last(), Error::NoSlot(7).to_string());
        assert_eq!(std::thread::spawn(last).join().unwrap(), "", "each thread has its own");
    }

    #[test]
    fn errno_stays_as_it_was() {
        let errno = || std::io::Error::last_os_error().raw_os_error();
        // SAFETY: no such descriptor: sets errno, and nothing else.
        unsafe { libc::close(-1) };
        assert_eq!(errno(), Some(libc::EBADF));
        done(|| {
            // SAFETY: as above, by another errno.
            unsafe { libc::kill(0, -1) };
            assert_eq!(errno(), Some(libc::EINVAL));
            Ok(())
        });
        assert_eq!(errno(), Some(libc::EBADF));
    }

    #[test]
    fn a_failure_inside_a_handler_leaves_alone_what_it_has_interrupted() {
        let nobody = Last { busy: AtomicBool::new(false), failure: Cell::new(ManuallyDrop::new(None)) };
        nobody.replace(Some(Failure::Null("first")));
        nobody.busy.store(true, Ordering::Relaxed);
        assert!(nobody.replace(Some(Failure::Null("second"))).is_none());
        nobody.busy.store(false, Ordering::Relaxed);
        assert!(matches!(nobody.replace(None), Some(Failure::Null("first"))));
    }

    #[test]
    fn the_version_is_the_packages() {
        let byte = |text: &str| text.parse::<u8>().unwrap();
        let [major, minor, patch] =
            [env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR"), env!("CARGO_PKG_VERSION_PATCH")]
                .map(byte);
        assert_eq!(dirtylimit_version(), u32::from_be_bytes([0, major, minor, patch]));
    }
}
