//! Pages that come in lumps, and pages that KVM logs itself: the vCPU makes progress, does not spin, and keeps its limit.

use std::time::{Duration, Instant};

use crate::fake::{Copy, Fake, PAGES, SLOT};
use crate::{Config, PageRate};

const SIZE: u32 = 4096;
/// KVM's own page; the guest's lie before it.
const OWN: u64 = PAGES - 1;
const RUNS: u32 = 60;

/// Runs a guest under a limit in pages a second, with a longest pause that allows for it.
fn runs_under(limit: u32, max_pause: Duration, lump: u32, own: Option<u64>) {
    let fake = Fake::new().with_lumps(lump);
    let limiter = fake.limit(&Config::new().ring_entries(SIZE).max_pause(max_pause)).unwrap();
    limiter.add_slot(SLOT, PAGES).unwrap();
    let mut vcpu = limiter.add_vcpu(0, &fake.vcpu(SIZE)).unwrap();
    limiter.set_limit(0, PageRate::from_pages_per_sec(limit)).unwrap();
    let (mut copy, mut offsets) = (Copy::default(), (0..OWN).cycle());
    // The first is of a ring of pages that are forgiven.
    let mut run = || {
        limiter.tick();
        _ = vcpu.before_run().unwrap();
        copy.take(&fake, &limiter.take_published(SLOT).unwrap());
        fake.run(0, own, &mut offsets)
    };
    (0..10).for_each(|_| _ = run());
    let start = Instant::now();
    let runs: Vec<_> = (0..RUNS).map(|_| (run(), limiter.stats().soft_limit)).collect();
    let seconds = start.elapsed().as_secs_f64();
    let wrote = runs.iter().map(|(pages, _)| pages).sum::<u32>();
    let empty = runs.iter().filter(|(pages, _)| *pages == 0).count();
    let longest = runs.split(|(pages, _)| *pages > 0).map(<[_]>::len).max().unwrap_or(0);
    let told = format!(
        "limit {limit}, lumps of {lump}, {own:?}: {wrote} pages in {seconds:.3} s, {empty} runs without a page, {longest} in a row"
    );
    // No spin: what is believed of the soft limit wavers by a few entries, so full exits that bring nothing come, one or two
    // in a row, and then the guest goes on.
    assert!(longest <= 4 && 6 * empty <= runs.len(), "{told}: {runs:?}");
    let allowed = f64::from(limit) * seconds;
    assert!(f64::from(wrote) <= 1.1 * allowed + f64::from(2 * lump + 16), "{told}");
    copy.take(&fake, &limiter.last_round().and_then(|round| round.take(SLOT)).unwrap());
    assert_eq!(copy.lost(&fake), 0, "{told}");
}

#[test]
fn pages_of_kvms_own_use_up_no_slice() {
    for limit in [100, 320, 5000] {
        runs_under(limit, Duration::from_millis(10), 0, Some(OWN));
    }
}

#[test]
fn lumps_are_paid_for_and_make_no_vcpu_spin() {
    for own in [None, Some(OWN)] {
        // 512 pages in 20 ms.
        runs_under(25_600, Duration::from_millis(50), 512, own);
        runs_under(20_000, Duration::from_millis(50), 64, own);
    }
}
