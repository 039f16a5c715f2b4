//! What KVM may offer and refuse.

use std::time::Duration;

use dirtylimit_core::{Shipped, Stepped};
use dirtylimit_test_vm::kvm_or_skip;

use crate::fake::{Fake, PAGES, SLOT, pages};
#[cfg(dirtylimit_planted)]
use crate::sys::PlantedBug;
use crate::sys::{self, Kernel, VmFd, page_size};
use crate::{Caps, Config, Error, Kick};

const MANUAL: u32 = 168;
const RING: u32 = 192;
const ACQ_REL: u32 = 223;
const BITMAP: u32 = 225;

#[test]
fn without_a_capability_it_is_unsupported() {
    let error = Fake::default().limit(&Config::new()).unwrap_err();
    assert!(matches!(error, Error::Unsupported), "{error}");
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    assert!(error.to_string().contains("KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 223"));
}

#[test]
fn the_better_ring_is_enabled_and_the_plain_one_where_x86_allows_it() {
    let both = Fake::new().with(RING, 1 << 20);
    let limit = both.limit(&Config::new()).unwrap();
    let caps = limit.caps();
    assert_eq!(limit.page_size(), page_size());
    assert_eq!((caps.acq_rel, caps.bitmap, caps.max_entries), (true, false, 65_536));
    assert_eq!(both.enabled(), [(ACQ_REL, 16_384)]);
    let plain = Fake::default().with(RING, 1 << 16);
    let limit = plain.limit(&Config::new());
    if cfg!(target_arch = "x86_64") {
        assert_eq!((limit.unwrap().caps().acq_rel, plain.enabled()), (false, vec![(RING, 16_384)]));
    } else {
        assert!(matches!(limit, Err(Error::Unsupported)));
    }
}

#[test]
fn the_bitmap_comes_after_the_ring_and_into_every_take() {
    let fake = Fake::new().with(BITMAP, 1);
    let limit = fake.limit(&Config::new()).unwrap();
    assert_eq!(fake.enabled(), [(ACQ_REL, 16_384), (BITMAP, 0)]);
    limit.add_slot(SLOT, 200).unwrap();
    assert_eq!(pages(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()), [69]);
}

#[test]
fn a_ring_that_would_miss_pages_is_refused_before_it_is_enabled() {
    let caps = |bitmap| Caps { acq_rel: true, bitmap, manual_protect: false, max_entries: 65_536 };
    for (arm64, bitmap) in [(false, false), (false, true), (true, true)] {
        assert_eq!(caps(bitmap).are_enough(arm64).unwrap(), caps(bitmap));
    }
    let error = caps(false).are_enough(true).unwrap_err();
    assert!(matches!(error, Error::NoBitmap) && error.errno() == libc::EOPNOTSUPP, "{error}");
}

#[test]
fn sizes_that_kvm_would_refuse_are_refused_with_what_is_allowed() {
    for entries in [0, 1, 128, 255, 1000, 4097, 1 << 17, 1 << 31] {
        let fake = Fake::new();
        match fake.limit(&Config::new().ring_entries(entries)) {
            Err(Error::RingSize { entries: told, min: 256, max: 65_536 }) => assert_eq!(told, entries),
            other => panic!("{entries}: {other:?}"),
        }
        assert_eq!(fake.enabled(), []);
    }
    for entries in [256, 65_536] {
        Fake::new().limit(&Config::new().ring_entries(entries)).unwrap();
    }
}

#[test]
fn refusals_carry_the_kernels_answer() {
    for errno in [libc::EINVAL, libc::E2BIG] {
        let error = Fake::new().refusing(ACQ_REL, errno).limit(&Config::new()).unwrap_err();
        assert!(matches!(error, Error::Enable { entries: 1024, .. }), "{error}");
        assert_eq!(error.errno(), errno);
        let error = Fake::new().with(BITMAP, 1).refusing(BITMAP, errno).limit(&Config::new()).unwrap_err();
        assert!(matches!(error, Error::EnableBitmap(_)), "{error}");
        assert!(error.to_string().contains("make another"), "{error}");
        assert_eq!(error.errno(), errno);
    }
}

#[test]
fn manual_protection_is_switched_off_before_the_ring_and_with_each_slot() {
    let fake = Fake::new().with(MANUAL, 3);
    let limit = fake.limit(&Config::new()).unwrap();
    limit.add_slot(SLOT, 200).unwrap();
    limit.add_slot(SLOT + 1, 200).unwrap();
    assert_eq!(fake.enabled(), [(MANUAL, 0), (ACQ_REL, 16_384), (MANUAL, 0), (MANUAL, 0)]);
    let error = Fake::new().with(MANUAL, 3).refusing(MANUAL, libc::EINVAL).limit(&Config::new()).unwrap_err();
    assert!(matches!(error, Error::ManualProtect(_)), "{error}");
    assert_eq!(error.errno(), libc::EINVAL);
}

#[test]
fn a_take_is_all_or_nothing() {
    let fake = Fake::new().with(BITMAP, 1);
    let limit = fake.small();
    let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    let log = (0..100).collect::<Vec<_>>();
    fake.write_all(0, log.iter().copied());
    fake.backup_fails(Some(libc::ENOENT));
    assert_eq!(limit.last_round().and_then(|round| round.take(SLOT)).unwrap_err().errno(), libc::ENOENT);
    assert_eq!(pages(&limit.take_published(SLOT).unwrap()), log);
    fake.write_all(0, log.iter().copied());
    assert_eq!(limit.last_round().and_then(|round| round.take(SLOT)).unwrap_err().errno(), libc::ENOENT);
    fake.backup_fails(None);
    assert_eq!(pages(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()), log);
}

#[test]
fn a_slot_that_is_larger_in_kvm_is_told_and_dirty_as_a_whole() {
    let fake = Fake::new().with(BITMAP, 1);
    let limit = fake.small();
    fake.backup_fails(Some(libc::EFAULT));
    let error = limit.last_round().and_then(|round| round.take(SLOT)).unwrap_err();
    assert!(matches!(error, Error::SlotTooShort { slot: SLOT, pages: PAGES }), "{error}");
    assert_eq!(pages(&limit.take_published(SLOT).unwrap()), (0..PAGES).collect::<Vec<_>>());
    assert_eq!(pages(&limit.take_published(SLOT).unwrap()), [0; 0]);
}

/// The kernel writes as many bits as its slot has pages, whatever it is given room for. Without a dirty ring the ioctl is
/// the same on x86.
#[test]
fn kvm_cannot_write_past_the_words_of_a_slot_that_is_larger_than_told() {
    const BYTES: usize = 1 << 30;
    if !kvm_or_skip() {
        return;
    }
    let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice; it stays, and is of no other use.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), BYTES, libc::PROT_READ, flags, -1, 0) };
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags: kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: 0,
        memory_size: BYTES as u64,
        userspace_addr: memory.addr() as u64,
    };
    // SAFETY: the mapping above.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    let kernel = VmFd::duplicate(&vm).unwrap();
    let whole = BYTES / usize::try_from(page_size()).unwrap() / 64;
    for words in [0, 1, 511, 512, 513, whole - 1] {
        let error = kernel.backup_log(0, &mut vec![0; words]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{words} words");
    }
    for words in [whole, whole + 1] {
        kernel.backup_log(0, &mut vec![0; words]).unwrap();
    }
}

#[test]
fn a_kick_that_cannot_be_one_is_refused_before_anything_is_enabled() {
    let refused = |signal| {
        let fake = Fake::new();
        let error = fake.limit(&Config::new().kick(Kick::Signal(signal))).unwrap_err();
        assert_eq!(fake.enabled(), [], "{signal}");
        error
    };
    for signal in [i32::MIN, -1, 0, 9, 10, 14, libc::SIGRTMIN() - 1, libc::SIGRTMAX() + 1, i32::MAX] {
        let error = refused(signal);
        assert!(matches!(error, Error::KickSignal { signal: told, .. } if told == signal), "{error}");
        assert_eq!(error.errno(), libc::EINVAL);
    }
    extern "C" fn nothing(_: libc::c_int) {}
    let (handled, ignored) = (libc::SIGRTMAX() - 1, libc::SIGRTMAX() - 2);
    // SAFETY: a handler that does nothing, and none.
    unsafe {
        libc::signal(handled, nothing as extern "C" fn(libc::c_int) as libc::sighandler_t);
        libc::signal(ignored, libc::SIG_IGN);
    }
    for signal in [handled, ignored] {
        let error = refused(signal);
        assert!(matches!(error, Error::KickSignalTaken(told) if told == signal), "{error}");
        assert_eq!(error.errno(), libc::EBUSY);
    }
    for _ in 0..2 {
        Fake::new().limit(&Config::new().kick(Kick::Signal(libc::SIGRTMAX() - 3))).unwrap();
    }
}

#[test]
fn a_policy_and_pauses_are_as_configured() {
    let config = Config::new().policy(Shipped::Stepped(Stepped::default())).prompt(true);
    assert!(matches!(config.policy, Shipped::Stepped(_)) && matches!(Config::new().policy, Shipped::Paced(_)));
    #[cfg(dirtylimit_planted)]
    assert!(config.clone().planted_bug(PlantedBug::OpenSignals).planted_bug == Some(PlantedBug::OpenSignals));
    let pauses = |pause| Fake::new().limit(&Config::new().max_pause(pause)).unwrap().max_pause();
    for (pause, held) in [(1, 100), (5_000, 5_000), (7_000_000, 1_000_000)] {
        assert_eq!(pauses(Duration::from_micros(pause)), Duration::from_micros(held), "100 µs to 1 s");
    }
    let prompt = |config| Fake::new().limit(config).unwrap().vm().prompt;
    assert!(prompt(&config) && !prompt(&Config::new()));
}

#[test]
fn a_ring_is_as_small_as_the_downtime_asks() {
    let page = u64::from(page_size());
    let ring = |millis, pages_a_second: u64, vcpus| {
        Config::ring_for(Duration::from_millis(millis), pages_a_second * page, vcpus)
    };
    // Half of 300 ms at 51,200 pages a second (200 MiB/s) is 7,680 pages.
    assert_eq!([1, 2, 7, 8].map(|vcpus| ring(300, 51_200, vcpus)), [4096, 2048, 1024, 1024]);
    assert_eq!((ring(0, 51_200, 1), ring(300, 0, 1), ring(300, 51_200, 0)), (1024, 1024, 4096));
    assert_eq!(Config::ring_for(Duration::MAX, u64::MAX, 1), 65_536);
}

#[test]
fn the_throttle_runs_on_the_callers_thread_until_it_is_told_to_stop() {
    let limit = Fake::new().small();
    let is_leased = || limit.vm().limiter.vm().is_leased(sys::now());
    limit.run_throttle(Duration::ZERO, || true);
    assert!(!is_leased(), "no tick");
    let mut left = 3;
    limit.run_throttle(Duration::ZERO, || {
        left -= 1;
        left == 0
    });
    assert!(is_leased() && left == 0);
}
