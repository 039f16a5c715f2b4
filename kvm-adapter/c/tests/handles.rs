//! What the C interface makes of its arguments, on a VM that is no KVM.
#![cfg(dirtylimit_planted)]

use std::ffi::{CStr, c_int, c_void};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;

use dirtylimit::*;
use dirtylimit_kvm::FakeVm;

/// The slot that the VM has, and its pages.
const SLOT: u32 = 3;
const PAGES: usize = 10_000;
const BYTES: usize = PAGES.div_ceil(64) * 8;

/// A VM of two vCPUs, and its handle.
struct Vm {
    fake: FakeVm,
    limit: *mut Limit,
}

impl Vm {
    fn new() -> Self {
        let fake = FakeVm::new(&[0, 1]);
        let limit = Box::into_raw(Box::new(Limit::from(fake.limit.clone())));
        Self { fake, limit }
    }

    fn round(&self, of: unsafe extern "C" fn(*mut Limit, *mut *mut Round) -> c_int) -> *mut Round {
        let mut round = null_mut();
        // SAFETY: a handle, and a place for another.
        assert_eq!(unsafe { of(self.limit, &raw mut round) }, 0, "{}", said());
        round
    }

    fn status(&self, id: u32) -> Result<Status, c_int> {
        // SAFETY: numbers and a pointer that may be null.
        let mut status: Status = unsafe { std::mem::zeroed() };
        status.size = size_of::<Status>();
        // SAFETY: a handle, and a struct of its size.
        match unsafe { dirtylimit_query(self.limit, id, &raw mut status) } {
            0 => Ok(status),
            errno => Err(errno),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // SAFETY: a handle that nobody else has.
        unsafe { dirtylimit_free(self.limit) };
    }
}

fn said() -> String {
    // SAFETY: this thread's text, copied before it asks again.
    unsafe { CStr::from_ptr(dirtylimit_last_error()) }.to_str().unwrap().to_owned()
}

fn merge(round: *mut Round, slot: u32, bitmap: *mut c_void, bytes: usize) -> (c_int, u64) {
    let mut pages = 100;
    // SAFETY: a handle, and buffers of the sizes that are told.
    let answer = unsafe { dirtylimit_merge(round, slot, bitmap, bytes, &raw mut pages) };
    (answer, pages - 100)
}

#[test]
fn a_merge_ors_and_nothing_is_forgotten_before_it_is_handed_over_whole() {
    let vm = Vm::new();
    vm.fake.write(0, 64, 3);
    let round = vm.round(dirtylimit_round);
    // SAFETY: a handle.
    assert_eq!(unsafe { (dirtylimit_round_published(round), dirtylimit_round_held_back(round)) }, (3, 0));
    let mut words = vec![0u64; BYTES / 8 + 1];
    words[1] = 0x30;
    let bitmap = words.as_mut_ptr().cast::<c_void>();
    assert_eq!(merge(round, SLOT, bitmap, BYTES - 1), (-libc::EINVAL, 0));
    assert!(said().contains("takes 157"), "{}", said());
    assert_eq!(merge(round, SLOT, bitmap.wrapping_byte_add(4), BYTES), (-libc::EINVAL, 0));
    assert!(said().contains("aligned"), "{}", said());
    assert_eq!(merge(round, SLOT, null_mut(), BYTES), (-libc::EINVAL, 0));
    assert_eq!(merge(round, SLOT + 1, bitmap, BYTES), (-libc::ENOENT, 0));
    assert_eq!(words[1], 0x30);
    let mut seen = vec![8u64; BYTES / 8];
    let mut peek = |slot, bytes| {
        // SAFETY: a handle, and a bitmap of at least that size.
        unsafe { dirtylimit_peek(vm.limit, slot, seen.as_mut_ptr().cast(), bytes) }
    };
    assert_eq!((peek(SLOT, BYTES - 1), peek(SLOT + 1, BYTES)), (-libc::EINVAL, -libc::ENOENT));
    assert_eq!((peek(SLOT, BYTES), seen[0], seen[1]), (0, 8, 8 | 7));
    assert_eq!(merge(round, SLOT, words.as_mut_ptr().cast(), BYTES + 7), (0, 3));
    assert_eq!(words[1], 0x37);
    assert_eq!(merge(round, SLOT, words.as_mut_ptr().cast(), BYTES), (0, 0));
    // SAFETY: a handle that nobody else has.
    unsafe { dirtylimit_round_free(round) };
}

#[test]
fn what_a_device_writes_is_in_the_last_round_which_outlives_the_vms_handle() {
    let vm = Vm::new();
    let mark = |slot, first, pages| {
        // SAFETY: a handle.
        unsafe { dirtylimit_mark_dirty(vm.limit, slot, first, pages) }
    };
    assert_eq!(mark(SLOT, 9_999, 2), -libc::EINVAL);
    assert_eq!(mark(SLOT, u64::MAX, 2), -libc::EINVAL);
    assert_eq!(mark(SLOT + 1, 0, 1), -libc::ENOENT);
    assert_eq!(mark(SLOT, 9_998, 2), 0);
    let round = vm.round(dirtylimit_last_round);
    drop(vm);
    let mut words = vec![0u64; BYTES / 8];
    assert_eq!(merge(round, SLOT, words.as_mut_ptr().cast(), BYTES), (0, 2));
    assert_eq!(words[9_998 / 64] >> (9_998 % 64), 3);
    // SAFETY: a handle that nobody else has.
    unsafe { dirtylimit_round_free(round) };
}

#[test]
fn limits_are_set_told_and_lifted() {
    let vm = Vm::new();
    let unlimited = |status: Status| {
        assert_eq!((status.limit, status.effective_limit), (DIRTYLIMIT_UNLIMITED, DIRTYLIMIT_UNLIMITED));
        assert!(status.unenforced == Why::DIRTYLIMIT_HELD as u32 && status.unenforced_text.is_null());
    };
    unlimited(vm.status(0).unwrap());
    // SAFETY: handles, here and below.
    unsafe {
        assert_eq!(dirtylimit_set_limit(vm.limit, 0, 1 << 20), 0);
        assert_eq!(dirtylimit_set_limit(vm.limit, 2, 1 << 20), -libc::ENOENT);
        assert_eq!(dirtylimit_set_limit(vm.limit, 0, 0), -libc::EINVAL);
        assert!(said().contains("DIRTYLIMIT_UNLIMITED"), "{}", said());
        assert_eq!(dirtylimit_set_limit_all(vm.limit, 0), -libc::EINVAL);
        assert_eq!(dirtylimit_set_vm_limit(vm.limit, 0), -libc::EINVAL);
        assert_eq!(dirtylimit_set_draining(vm.limit, 1), -libc::EOPNOTSUPP);
        assert_eq!(dirtylimit_set_draining(vm.limit, 0), 0);
    }
    let status = vm.status(0).unwrap();
    assert_eq!((status.size, status.limit, status.effective_limit), (size_of::<Status>(), 1 << 20, 1 << 20));
    // SAFETY: as above.
    unsafe {
        assert_eq!(dirtylimit_set_vm_limit(vm.limit, 1 << 19), 0);
        assert_eq!(dirtylimit_set_weight(vm.limit, 1, 3), 0);
        assert_eq!(dirtylimit_tick(vm.limit), 0);
        let share = vm.status(0).unwrap().effective_limit;
        assert!((4096..=1 << 19).contains(&share), "{share}");
        assert_eq!(dirtylimit_set_vm_limit(vm.limit, DIRTYLIMIT_UNLIMITED), 0);
        assert_eq!(dirtylimit_set_limit(vm.limit, 0, DIRTYLIMIT_UNLIMITED), 0);
        unlimited(vm.status(0).unwrap());
        assert_eq!(dirtylimit_set_limit_all(vm.limit, 1 << 20), 0);
        assert_eq!(vm.status(1).unwrap().limit, 1 << 20);
        assert_eq!(dirtylimit_set_limit_all(vm.limit, DIRTYLIMIT_UNLIMITED), 0);
    }
    unlimited(vm.status(1).unwrap());
    assert_eq!(vm.status(2).unwrap_err(), -libc::ENOENT);
}

/// A file that looks as a new vCPU's.
fn vcpu_file() -> File {
    // SAFETY: a new descriptor, which the file owns.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"vcpu".as_ptr(), 0)) };
    file.set_len(1 << 20).unwrap();
    file
}

/// Plays KVM: the vCPU writes this number of pages, and exits with a full ring.
fn write_and_exit(vcpu: &File, pages: u32) {
    const FULL: u32 = 31;
    for page in 0..pages {
        let entry: Vec<u8> = [1, SLOT, page, 0].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        vcpu.write_all_at(&entry, 64 * 4096 + u64::from(page) * 16).unwrap();
    }
    vcpu.write_all_at(&FULL.to_ne_bytes(), 8).unwrap();
}

#[test]
fn a_vcpus_handle_is_for_one_at_a_time() {
    struct Inside {
        vcpu: *mut Vcpu,
        answers: [c_int; 2],
    }
    /// Called in a pause, and so inside a call.
    unsafe extern "C" fn stop(opaque: *mut c_void) -> c_int {
        // SAFETY: the test's own.
        let inside = unsafe { &mut *opaque.cast::<Inside>() };
        // SAFETY: a handle, which is in use.
        inside.answers = unsafe { [dirtylimit_before_run(inside.vcpu, null_mut()), dirtylimit_vcpu_free(inside.vcpu)] };
        1
    }
    let (vm, file) = (Vm::new(), vcpu_file());
    let (mut vcpu, mut another) = (null_mut(), null_mut());
    let mut kick_after = 0;
    // SAFETY: handles and places for them, here and below.
    unsafe {
        assert_eq!(dirtylimit_add_vcpu(vm.limit, 7, file.as_raw_fd(), &raw mut vcpu), 0, "{}", said());
        assert_eq!(dirtylimit_add_vcpu(vm.limit, 7, file.as_raw_fd(), &raw mut another), -libc::EBUSY);
        assert_eq!(dirtylimit_add_vcpu(vm.limit, 8, file.as_raw_fd(), &raw mut another), -libc::EEXIST);
        assert!(another.is_null());
        assert_eq!(dirtylimit_before_run(vcpu, &raw mut kick_after), Decision::DIRTYLIMIT_ENTER as c_int);
        assert_eq!(kick_after, DIRTYLIMIT_NO_KICK);
        assert_eq!(dirtylimit_remove_vcpu(vm.limit, 7), -libc::EBUSY);

        let mut interrupter = null_mut();
        assert_eq!(dirtylimit_interrupter(vcpu, &raw mut interrupter), 0);
        let mut inside = Inside { vcpu, answers: [0; 2] };
        assert_eq!(dirtylimit_set_limit(vm.limit, 7, 1 << 20), 0);
        assert_eq!(dirtylimit_tick(vm.limit), 0);
        assert_eq!(dirtylimit_before_run(vcpu, null_mut()), Decision::DIRTYLIMIT_ENTER as c_int);
        write_and_exit(&file, 500);
        let opaque = (&raw mut inside).cast();
        let decision = dirtylimit_before_run_unless(vcpu, Some(stop), opaque, &raw mut kick_after);
        assert_eq!(decision, Decision::DIRTYLIMIT_RETURN as c_int, "{}", said());
        assert_eq!(inside.answers, [-libc::EBUSY; 2]);
        assert_eq!(dirtylimit_interrupt(interrupter), 0);
        assert_eq!(dirtylimit_before_run(vcpu, null_mut()), Decision::DIRTYLIMIT_RETURN as c_int);

        assert_eq!(dirtylimit_vcpu_free(vcpu), 0);
        assert_eq!(dirtylimit_interrupt(interrupter), 0);
        dirtylimit_interrupter_free(interrupter);
        assert_eq!(dirtylimit_add_vcpu(vm.limit, 7, file.as_raw_fd(), &raw mut vcpu), 0, "{}", said());
        assert_eq!(dirtylimit_vcpu_free(vcpu), 0);
    }
}

#[test]
fn a_thread_ticks_until_it_is_stopped() {
    unsafe extern "C" fn thrice(opaque: *mut c_void) -> c_int {
        // SAFETY: the test's own.
        let asked = unsafe { &mut *opaque.cast::<c_int>() };
        *asked += 1;
        c_int::from(*asked > 3)
    }
    let vm = Vm::new();
    let (mut throttle, mut asked) = (null_mut(), 0);
    // SAFETY: handles, and places for them and for the count.
    unsafe {
        assert_eq!(dirtylimit_throttle_start(vm.limit, 1_000_000, &raw mut throttle), 0);
        dirtylimit_throttle_stop(throttle);
        assert_eq!(dirtylimit_run_throttle(vm.limit, 1_000_000, Some(thrice), (&raw mut asked).cast()), 0);
        assert_eq!(asked, 4);
        assert_eq!(dirtylimit_run_throttle(vm.limit, 1_000_000, None, null_mut()), -libc::EINVAL);
        let mut stats = Stats {
            size: size_of::<Stats>(),
            resets: 9,
            reset_calls: 0,
            suspect_resets: 0,
            suspect_pages: 0,
            dropped: 0,
            soft_limit: 0,
            failed_resets: 9,
            wedged: 9,
        };
        assert_eq!(dirtylimit_stats(vm.limit, &raw mut stats), 0);
        assert_eq!((stats.size, stats.resets, stats.soft_limit > 0), (size_of::<Stats>(), 0, true));
        assert_eq!((stats.failed_resets, stats.wedged), (0, 0));
    }
}
