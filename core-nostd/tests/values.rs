//! What the small values say of themselves, and that a default is a fresh one.

use dirtylimit_core::{
    Counters, Counts, Entry, Full, Inline, Limiter, Paced, PageRate, Penalty, PenaltyCell, RateEstimator, Ring, SECOND,
    Terms, VcpuCell, VmCell,
};

#[test]
fn defaults_are_fresh() {
    let cell = VcpuCell::default();
    assert_eq!((cell.penalty.accept(), cell.counters.counts()), (Penalty::NONE, Counts::default()));
    cell.counters.add_full_exit();
    assert_eq!(cell.counters.counts(), Counts { full_exits: 1, ..Counts::default() });
    assert_eq!(PenaltyCell::default().accept(), Penalty::NONE);
    assert_eq!(VmCell::LEASE, 5 * SECOND);
    let (vm, new) = (VmCell::default(), VmCell::new());
    assert_eq!((vm.max_pause(), vm.is_leased(SECOND)), (new.max_pause(), new.is_leased(SECOND)));
    assert_eq!(Entry::default().reset(), None);
    let ring = Ring::new([const { Entry::new() }; 128]).unwrap();
    assert_eq!((ring.size(), ring.room(), ring.held_back()), (128, 64, 0));
}

#[test]
fn they_say_what_they_are() {
    assert_eq!(format!("{:?}", PageRate::from_pages_per_sec(256)), "256 pages/s");
    assert_eq!(Full { capacity: 7 }.to_string(), "all 7 places for vCPUs are taken");
    assert_eq!(format!("{:?}", Penalty::NONE), "None");
    let interval = PageRate::from_pages_per_sec(256).interval();
    assert!(format!("{:?}", Penalty::new(Terms::Pace(interval))).starts_with("Some(Pace(EmissionInterval("));
}

#[test]
fn a_limiter_has_only_the_places_it_was_made_with() {
    let (small, large) = (Limiter::<Paced, Inline<1>>::new(Paced), Limiter::<Paced, Inline<3>>::new(Paced));
    let indices = [(); 3].map(|()| large.register().unwrap());
    assert_eq!(indices.map(|index| small.cell(index).is_some()), [true, false, false]);
    assert_eq!(indices.map(|index| index.get()), [0, 1, 2]);
    large.set_weight(indices[1], 0);
    small.set_weight(indices[2], 3);
    small.unregister(indices[2]);
    assert_eq!(small.query(indices[0], 0), None);
}

#[test]
fn demand_is_what_running_shows() {
    const TENTH: u64 = SECOND / 10;
    let (counters, mut estimator) = (Counters::new(), RateEstimator::default());
    let mut read = |pages, paused, elapsed| {
        counters.add_pages(pages, pages);
        counters.add_pause(paused);
        estimator.read(&counters, elapsed);
        (estimator.rate().pages_per_sec(), estimator.demand().pages_per_sec())
    };
    assert_eq!(read(100, TENTH / 2, TENTH), (1000, 2000), "a rate is all there after two time constants");
    assert_eq!(read(0, TENTH, TENTH), (0, 2000), "who was only paused has shown none");
    assert_eq!(read(0, 0, 0), (0, 2000), "no time, no news");
    assert_eq!(read(0, TENTH / 2, TENTH), (0, 0), "who ran and wrote nothing wants nothing");
    assert_eq!(read(100, TENTH, TENTH), (1000, 64_000), "never over less than a 64th of the time");
    assert_eq!(read(100, 0, TENTH / 2).0, 1500, "half of a step after one time constant");
}

#[test]
fn more_pages_than_fit_in_64_bits_are_measured() {
    assert_eq!(PageRate::measured(1 << 31, 64 * SECOND), PageRate::from_pages_per_sec(1 << 25));
}
