//! Structs that begin with their size, so that later versions may add to them.

use std::ptr;
use std::slice;

use crate::answer::Failure;

/// No struct is larger; such a size is a mistake.
const LARGEST: usize = 4096;

/// A struct that grows from version to version, by fields at its end of which 0 means what was before.
///
/// # Safety
/// It is `repr(C)`, begins with a `usize`, has no padding, and is valid when it is all zero and with any bytes that a C
/// program may write.
pub(crate) unsafe trait Versioned: Copy {
    /// Its size in the first version.
    const FIRST: usize;
}

/// The size that the struct at `given` says it has.
///
/// # Safety
/// `given` is NULL or points to as many bytes as the first of its words says, one word at least.
unsafe fn size_of_given<T: Versioned>(given: *const T, name: &'static str) -> Result<usize, Failure> {
    if given.is_null() {
        return Err(Failure::Null(name));
    }
    // SAFETY: the caller's promise.
    let size = unsafe { given.cast::<usize>().read() };
    match size {
        _ if size < T::FIRST => {
            Err(Failure::Caller(libc::EINVAL, "the struct's size is too small: set it to its sizeof"))
        }
        _ if size > LARGEST => {
            Err(Failure::Caller(libc::E2BIG, "the struct's size is too large: set it to its sizeof"))
        }
        _ => Ok(size),
    }
}

/// What the caller's struct says; fields that it does not have are 0.
///
/// # Safety
/// As [`size_of_given`], and all of the bytes have values.
pub(crate) unsafe fn read<T: Versioned>(given: *const T, name: &'static str) -> Result<T, Failure> {
    // SAFETY: the caller's promise.
    let size = unsafe { size_of_given(given, name) }?;
    let known = size.min(size_of::<T>());
    // SAFETY: the trait's promise: zeros are a value, and so is what is copied over them, as much as both have.
    let value = unsafe {
        let mut value: T = std::mem::zeroed();
        ptr::copy_nonoverlapping(given.cast::<u8>(), (&raw mut value).cast(), known);
        value
    };
    // SAFETY: the caller's promise: the bytes from `known` to `size` are the struct's.
    let tail = unsafe { slice::from_raw_parts(given.cast::<u8>().add(known), size - known) };
    if tail.iter().any(|byte| *byte != 0) {
        return Err(Failure::Caller(libc::E2BIG, "the struct asks for what this version of the library does not know"));
    }
    Ok(value)
}

/// Writes as much of `value` as the caller's struct has room for, but for its size; what it has beyond becomes 0.
///
/// # Safety
/// As [`size_of_given`], and the bytes are the caller's to write.
pub(crate) unsafe fn fill<T: Versioned>(out: *mut T, name: &'static str, value: T) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    let size = unsafe { size_of_given(out, name) }?;
    let (head, known) = (size_of::<usize>(), size.min(size_of::<T>()));
    // SAFETY: the caller's promise for what is written; what is read is `value`, which has no padding.
    unsafe {
        let (from, to) = ((&raw const value).cast::<u8>(), out.cast::<u8>());
        ptr::copy_nonoverlapping(from.add(head), to.add(head), known - head);
        to.add(known).write_bytes(0, size - known);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A struct of two fields, of which the second is new in the second version.
    #[repr(C)]
    #[derive(Clone, Copy, PartialEq, Debug)]
    struct Grown {
        size: usize,
        old: u64,
        new: u64,
    }
    // SAFETY: three words.
    unsafe impl Versioned for Grown {
        const FIRST: usize = 16;
    }

    fn read_of(words: [u64; 5]) -> Result<Grown, Failure> {
        // SAFETY: as many bytes as any size that is not refused.
        unsafe { read(words.as_ptr().cast(), "words") }
    }

    #[test]
    fn a_struct_of_another_version_is_understood_or_refused() {
        let read = |words| read_of(words).map(|read| (read.old, read.new));
        assert_eq!(read([24, 1, 2, 9, 9]).unwrap(), (1, 2));
        assert_eq!(read([16, 1, 9, 9, 9]).unwrap(), (1, 0), "an older caller's");
        assert_eq!(read([32, 1, 2, 0, 9]).unwrap(), (1, 2), "a newer caller's that asks for nothing new");
        assert!(matches!(read([32, 1, 2, 1 << 63, 9]), Err(Failure::Caller(libc::E2BIG, _))));
        assert!(matches!(read([0, 1, 2, 0, 0]), Err(Failure::Caller(libc::EINVAL, _))));
        assert!(matches!(read([15, 1, 2, 0, 0]), Err(Failure::Caller(libc::EINVAL, _))));
        assert!(matches!(read([u64::MAX, 1, 2, 0, 0]), Err(Failure::Caller(libc::E2BIG, _))));
    }

    #[test]
    fn as_much_is_filled_in_as_there_is_room_for() {
        let value = Grown { size: 77, old: 1, new: 2 };
        for (size, filled) in [(24, [24, 1, 2, 9, 9]), (16, [16, 1, 9, 9, 9]), (32, [32, 1, 2, 0, 9])] {
            let mut words = [size, 9, 9, 9, 9u64];
            // SAFETY: as many bytes as the size says.
            unsafe { fill(words.as_mut_ptr().cast(), "words", value) }.unwrap();
            assert_eq!(words, filled);
        }
        // SAFETY: NULL is allowed.
        assert!(matches!(unsafe { fill(ptr::null_mut(), "out", value) }, Err(Failure::Null("out"))));
    }
}
