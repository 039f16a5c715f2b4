//! What the log is told, and what not.

use std::cell::RefCell;
use std::sync::{Mutex, Once};
use std::thread;
use std::time::Duration;

use dirtylimit_core::{SECOND, Stepped, VmCell};
use log::Level::{self, Error, Info, Warn};
use log::{LevelFilter, Log, Metadata, Record};

use crate::events::tell;
use crate::fake::{Fake, Goes, PAGES, SLOT};
use crate::{DirtyLimit, PageRate, Shipped, sys};

thread_local!(static TOLD: RefCell<Vec<(Level, String)>> = const { RefCell::new(Vec::new()) });
/// By threads called "dirtylimit".
static TOLD_BY_THROTTLE_THREADS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps what is told by the thread that tells it, so that tests beside each other do not mix.
struct Capture;

impl Log for Capture {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        assert!(record.target().starts_with("dirtylimit_kvm"));
        let message = record.args().to_string();
        if thread::current().name() == Some("dirtylimit") {
            TOLD_BY_THROTTLE_THREADS.lock().unwrap().push(message.clone());
        }
        TOLD.with_borrow_mut(|told| told.push((record.level(), message)));
    }

    fn flush(&self) {}
}

/// What this thread told since the last call.
fn told() -> Vec<(Level, String)> {
    TOLD.take()
}

fn vm() -> (Fake, DirtyLimit) {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        log::set_logger(&Capture).unwrap();
        log::set_max_level(LevelFilter::Trace);
    });
    told();
    let fake = Fake::new();
    let limit = fake.small();
    (fake, limit)
}

fn info(message: &str) -> Vec<(Level, String)> {
    vec![(Info, message.to_owned())]
}

#[test]
fn what_the_control_plane_does_is_told_once() {
    let (fake, limit) = vm();
    let enabled = told();
    limit.tick();
    assert!(matches!(&enabled[..], [(Info, message)] if message.starts_with("enabled: dirty rings of 1024")));
    let file = fake.vcpu(1024);
    let vcpu = limit.add_vcpu(3, &file).unwrap();
    assert_eq!(told(), info("vCPU 3 is added"));
    drop(vcpu);
    let vcpu = limit.add_vcpu(3, &file).unwrap();
    assert_eq!(told(), info("vCPU 3 is attached again"));
    let rate = PageRate::from_bytes_per_sec(25 << 20, sys::page_size());
    limit.set_limit(3, rate).unwrap();
    assert_eq!(told(), info("limit of vCPU 3: 25.0 MiB/s"));
    limit.cancel(3).unwrap();
    assert_eq!(told(), info("limit of vCPU 3: none"));
    limit.set_limit_all(rate);
    assert_eq!(told(), info("limit of every vCPU: 25.0 MiB/s"));
    limit.cancel_all();
    assert_eq!(told(), info("limit of every vCPU: none"));
    limit.set_vm_limit(Some(rate));
    assert_eq!(told(), info("budget of the VM: 25.0 MiB/s"));
    limit.set_weight(3, 2).unwrap();
    assert_eq!(told(), info("weight of vCPU 3: 2"));
    limit.set_policy(Shipped::Stepped(Stepped::default()));
    assert!(matches!(&told()[..], [(Info, message)] if message.starts_with("policy: Stepped")));
    limit.set_max_pause(Duration::from_secs(7));
    assert_eq!(told(), info("longest pause: 1s"));
    drop(vcpu);
    limit.tick();
    limit.remove_vcpu(3).unwrap();
    assert_eq!(told(), info("vCPU 3 is removed"));
    limit.tick();
    assert_eq!(told(), [], "nor of soft limits, where there is no ring");
    limit.set_limit(3, rate).unwrap_err();
    limit.remove_vcpu(3).unwrap_err();
    assert_eq!(told(), [], "what is refused changes nothing");
}

#[test]
fn a_limited_vcpu_that_runs_and_ticks_that_come_tell_nothing() {
    let (fake, limit) = vm();
    let mut vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    limit.set_limit(0, PageRate::from_pages_per_sec(20_000)).unwrap();
    limit.tick();
    told();
    for round in 0..20 {
        assert!(fake.write_all(0, (0..PAGES).cycle().skip(round * 1000).take(5000)) > 0);
        while fake.write_all(0, 0..1) == 0 {
            _ = vcpu.before_run().unwrap();
        }
        limit.tick();
        drop(limit.round().unwrap());
    }
    assert!(limit.query(0).unwrap().totals.full_exits > 0);
    assert_eq!(told(), []);
}

#[test]
fn what_vcpu_threads_meet_is_told_by_the_next_tick_alone() {
    let (fake, limit) = vm();
    let mut vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    let mut full = || {
        fake.write_all(0, 0..PAGES);
        vcpu.before_run().map_err(|error| error.errno())
    };
    limit.tick();
    told();
    fake.script([Goes::Disturbed]);
    _ = full().unwrap();
    assert_eq!(told(), []);
    limit.tick();
    assert!(matches!(&told()[..], [(Warn, message)] if message.starts_with("1 resets were short or disturbed")));
    fake.script([Goes::Disturbed, Goes::Disturbed]);
    _ = full().unwrap();
    _ = full().unwrap();
    limit.tick();
    assert!(matches!(&told()[..], [(Warn, message)] if message.starts_with("2 resets were short or disturbed")));

    fake.always(Some(Goes::Fails(libc::ENODEV)));
    assert_eq!((full(), full()), (Err(libc::ENODEV), Err(libc::ENODEV)));
    assert_eq!(told(), []);
    for _ in 0..3 {
        limit.tick();
    }
    let failed = told();
    assert!(failed.iter().any(|(level, message)| *level == Error && message.contains("errno 19")), "{failed:?}");
    assert_eq!(failed.iter().filter(|(level, _)| *level == Error).count(), 1, "{failed:?}");
    fake.always(None);
    _ = full().unwrap();
    limit.tick();
    assert_eq!(told(), info("KVM_RESET_DIRTY_RINGS works again"));

    limit.last_round().and_then(|round| round.take(crate::fake::SLOT)).unwrap();
    fake.wedge(0);
    while full() != Err(libc::EIO) {}
    assert_eq!(told(), []);
    let wedged = (Error, "the dirty ring of vCPU 0 is wedged: its dirty pages are unknown".to_owned());
    limit.tick();
    assert_eq!(told(), [wedged]);
    limit.tick();
    assert_eq!(told(), [], "once");
}

#[test]
fn a_soft_limit_that_is_not_as_assumed_is_told() {
    let (fake, limit) = vm();
    let mut vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    limit.tick();
    told();
    fake.write_all(0, 0..500);
    fake.exit_full(0);
    _ = vcpu.before_run().unwrap();
    assert_eq!(told(), []);
    limit.tick();
    assert_eq!(told(), info("a ring is full at 500 entries, not 960"));
}

#[test]
fn a_tick_that_comes_too_late_says_so() {
    let (fake, limit) = vm();
    let late = || {
        limit.vm().limiter.tick(sys::now() - 2 * VmCell::LEASE);
        limit.tick();
        limit.tick();
        told()
    };
    told();
    assert_eq!(late(), [], "there is no limit that could lapse");
    let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    limit.set_limit(0, PageRate::from_pages_per_sec(1000)).unwrap();
    told();
    let lapsed = (Warn, "no tick has come for over 5 s: limits have lapsed".to_owned());
    let holds = (Info, "limits hold again".to_owned());
    assert_eq!(late(), [lapsed.clone(), holds.clone()]);
    // Where no tick ever comes, the thread that takes the log tells.
    limit.vm().limiter.tick(sys::now() - 2 * VmCell::LEASE);
    drop(limit.round().unwrap());
    drop(limit.round().unwrap());
    assert_eq!(told(), [lapsed]);
    limit.tick();
    assert_eq!(told(), [holds]);
}

#[test]
fn a_limit_that_is_not_enforced_is_told_once_and_when_it_is_again() {
    let (fake, limit) = vm();
    let _vcpu = limit.add_vcpu(7, &fake.vcpu(1024)).unwrap();
    limit.set_limit(7, PageRate::from_pages_per_sec(500)).unwrap();
    // So that none of the ticks to come is a lease away from our clock.
    let mut now = sys::now() - 4 * SECOND;
    limit.vm().limiter.tick(now);
    told();
    // Each second somebody empties the ring, so that nothing ends the vCPU's run.
    let mut seconds = |pages| {
        for _ in 0..3 {
            assert_eq!(u64::from(fake.write_all(0, 0..pages)), pages, "a ring that fills");
            limit.last_round().and_then(|round| round.take(SLOT)).unwrap();
            now += SECOND;
            limit.vm().limiter.tick(now);
            limit.last_round().map(drop).unwrap();
        }
        told()
    };
    let unpaid = "the limit of vCPU 7 is not enforced: its thread does not pay: nothing ends its run (a smaller ring or a kick \
                  would), or before_run is not called";
    assert_eq!(seconds(900), [(Warn, unpaid.to_owned())]);
    assert_eq!(seconds(900), []);
    assert_eq!(seconds(100), info("the limit of vCPU 7 is enforced again, or lifted"));
}

/// Without a limit there is nothing else that shows it.
#[test]
fn a_vcpu_whose_full_exits_nobody_serves_is_told_once() {
    let (fake, limit) = vm();
    let files = [fake.vcpu(1024), fake.vcpu(1024)];
    let [mut first, _second] = [3, 7].map(|id| limit.add_vcpu(id, &files[id as usize / 7]).unwrap());
    let start = sys::now();
    let mut tenths = 0;
    let mut seconds = |tenths_more: u64| {
        for _ in 0..tenths_more {
            tenths += 1;
            limit.meter();
            tell(limit.vm(), start + tenths * SECOND / 10);
        }
        told()
    };
    told();
    seconds(30);
    assert_eq!(told(), [], "vCPUs that stand still");
    fake.write_all(0, 0..PAGES);
    fake.write_all(1, 0..900);
    assert_eq!(seconds(10), [], "not yet");
    let unserved = "vCPU 3 left KVM_RUN with a full ring over a second ago, and its thread has not called before_run since: it \
                    is stopped, or the VMM forgets to";
    assert_eq!(seconds(30), [(Warn, unserved.to_owned())], "once, and not of one that was not full");
    _ = first.before_run().unwrap();
    fake.write_all(0, 0..PAGES);
    assert_eq!(seconds(9), [], "it goes on");
    _ = first.before_run().unwrap();
    assert_eq!(seconds(30), [], "served");
    fake.write_all(0, 2000..PAGES);
    assert_eq!(seconds(30), [(Warn, unserved.to_owned())], "again");
}

#[test]
fn a_throttle_thread_begins_and_ends() {
    let (_fake, limit) = vm();
    told();
    let thread = limit.throttle_thread(Duration::from_millis(1)).unwrap();
    assert_eq!(told(), info("the throttle thread ticks every 1ms"));
    let ends = || TOLD_BY_THROTTLE_THREADS.lock().unwrap().iter().filter(|told| told.ends_with("ends")).count();
    assert_eq!(ends(), 0, "this test has the only one");
    drop(thread);
    assert_eq!((ends(), told()), (1, vec![]));
}
