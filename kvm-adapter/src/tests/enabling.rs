//! What KVM may offer and refuse.

use crate::fake::{Fake, SLOT, pages};
use crate::{Caps, Config, Error, Kick};

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
    let caps = both.limit(&Config::new()).unwrap().caps();
    assert_eq!((caps.acq_rel, caps.bitmap, caps.max_entries), (true, false, 65_536));
    assert_eq!(both.enabled(), [(ACQ_REL, 65_536)]);
    let plain = Fake::default().with(RING, 1 << 16);
    let limit = plain.limit(&Config::new());
    if cfg!(target_arch = "x86_64") {
        assert_eq!((limit.unwrap().caps().acq_rel, plain.enabled()), (false, vec![(RING, 65_536)]));
    } else {
        assert!(matches!(limit, Err(Error::Unsupported)));
    }
}

#[test]
fn the_bitmap_comes_after_the_ring_and_into_every_take() {
    let fake = Fake::new().with(BITMAP, 1);
    let limit = fake.limit(&Config::new()).unwrap();
    assert_eq!(fake.enabled(), [(ACQ_REL, 65_536), (BITMAP, 0)]);
    limit.add_slot(SLOT, 200).unwrap();
    assert_eq!(pages(&limit.take_dirty_log(SLOT).unwrap()), [69]);
}

#[test]
fn a_ring_that_would_miss_pages_is_refused_before_it_is_enabled() {
    let caps = |bitmap| Caps { acq_rel: true, bitmap, max_entries: 65_536 };
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
        assert!(matches!(error, Error::Enable { entries: 4096, .. }), "{error}");
        assert_eq!(error.errno(), errno);
        let error = Fake::new().with(BITMAP, 1).refusing(BITMAP, errno).limit(&Config::new()).unwrap_err();
        assert!(matches!(error, Error::EnableBitmap(_)), "{error}");
        assert!(error.to_string().contains("make another"), "{error}");
        assert_eq!(error.errno(), errno);
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
