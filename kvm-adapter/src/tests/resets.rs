//! Resets that fall short, fail or are disturbed, and what becomes of the pages.

use dirtylimit_core::{Page, SECOND};

use crate::fake::{Copy, Fake, Goes, PAGES, SLOT, pages};
use crate::harvest::Cuts;
use crate::sys::Kernel;
use crate::{Config, DirtyLimit, Error};

fn take(limit: &DirtyLimit) -> Vec<u64> {
    pages(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap())
}

#[test]
fn what_a_reset_returns_is_not_believed() {
    for answer in [0, 1, 100, u32::MAX] {
        let fake = Fake::new();
        let limit = fake.small();
        let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
        fake.write_all(0, 0..100);
        fake.script([Goes::WellAnd(answer)]);
        assert_eq!(take(&limit), (0..100).collect::<Vec<_>>());
        let stats = limit.stats();
        assert_eq!((stats.resets, stats.reset_calls, stats.suspect_resets), (100, 1, 0), "{answer}");
    }
}

#[test]
fn of_a_short_reset_the_last_run_is_dirty_until_it_is_armed() {
    let fake = Fake::new();
    let limit = fake.small();
    let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    let mut copy = Copy::default();
    fake.write_all(0, 0..200);
    fake.script([Goes::Short(0), Goes::Short(90)]);
    let log = limit.last_round().and_then(|round| round.take(SLOT)).unwrap();
    copy.take(&fake, &log);
    assert_eq!((pages(&log).len(), limit.stats().suspect_resets, limit.stats().suspect_pages), (200, 1, 64));
    // KVM has forgotten 26 of them, which it would have protected together.
    for _ in 0..5 {
        fake.write_all(0, 64..90);
        let log = limit.last_round().and_then(|round| round.take(SLOT)).unwrap();
        assert_eq!(pages(&log), (26..90).collect::<Vec<_>>());
        copy.take(&fake, &log);
        assert_eq!(copy.lost(&fake), 0);
    }
    // Those that come by again are armed; the rest stay.
    fake.write_all(0, 30..64);
    take(&limit);
    let rest: Vec<_> = (26..30).chain(64..90).collect();
    assert_eq!((take(&limit), limit.stats().suspect_pages), (rest, 30));
    limit.trust_slot(SLOT).unwrap();
    assert_eq!((take(&limit).len(), limit.stats().suspect_pages), (0, 0));
}

/// As where completions of the thread's own `io_uring` interrupt it.
#[test]
fn a_short_reset_is_suspect_although_nothing_else_shows_it() {
    let (fake, limit, _file, _vcpu) = super::vm();
    fake.write_all(0, 0..200);
    fake.script([Goes::ShortUntold(90)]);
    assert_eq!((take(&limit).len(), limit.stats().suspect_pages), (200, 64));
}

#[test]
fn a_disturbed_reset_is_suspect_although_complete() {
    for goes in [Goes::Disturbed, Goes::FalseAlarm] {
        let fake = Fake::new();
        let limit = fake.small();
        let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
        let mut copy = Copy::default();
        for round in 0..100 {
            if round % 3 == 0 {
                fake.script([goes]);
            }
            fake.write_all(0, (0..300).map(|page| (page * 7 + round * 13) % PAGES));
            copy.take(&fake, &limit.last_round().and_then(|round| round.take(SLOT)).unwrap());
            assert_eq!(copy.lost(&fake), 0, "round {round}");
        }
        let stats = limit.stats();
        // Each seventh page: ten in a window.
        assert!(stats.suspect_resets == 34 && (10..=340).contains(&stats.suspect_pages), "{stats:?}");
    }
}

#[test]
fn after_three_short_resets_none_is_believed_for_a_while() {
    for (short, lost) in [(2, 10), (3, 0)] {
        let fake = Fake::new();
        let limit = fake.small();
        let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
        let mut copy = Copy::default();
        fake.script((0..short).map(|_| Goes::Short(0)).chain([Goes::Unseen]));
        fake.write_all(0, 0..10);
        copy.take(&fake, &limit.last_round().and_then(|round| round.take(SLOT)).unwrap());
        fake.write_all(0, 0..10);
        copy.take(&fake, &limit.last_round().and_then(|round| round.take(SLOT)).unwrap());
        assert_eq!(copy.lost(&fake), lost, "after {short}");
    }
}

#[test]
fn only_the_ring_at_which_a_reset_stopped_is_suspect() {
    // KVM goes by the order in which the vCPUs were created, not by our ids.
    for ids in [[0, 1, 2], [9, 5, 7]] {
        for (goes, suspects) in [
            (Goes::Short(0), vec![]),
            (Goes::Short(50), vec![1049]),
            (Goes::Short(100), vec![1099]),
            (Goes::Short(150), vec![2049]),
            // At the end of the first or of the second.
            (Goes::Short(200), vec![1099, 2099]),
            (Goes::Short(299), vec![3098]),
            (Goes::Disturbed, vec![1099, 2099, 3099]),
        ] {
            let fake = Fake::new();
            let limit = fake.small();
            let _vcpus = ids.map(|id| limit.add_vcpu(id, &fake.vcpu(1024)).unwrap());
            for vcpu in 0..3 {
                let first = 1000 * (vcpu as u64 + 1);
                fake.write_all(vcpu, (0..100).map(|page| first + page));
            }
            fake.script([goes]);
            take(&limit);
            let found = take(&limit);
            assert!(suspects.iter().all(|page| found.contains(page)), "{ids:?} {goes:?}: {found:?}");
            assert!(found.len() <= 64 * suspects.len(), "{ids:?} {goes:?}: {found:?}");
            assert_eq!(limit.stats().suspect_pages, found.len() as u64);
        }
    }
}

#[test]
fn interrupted_at_random_it_loses_nothing() {
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..15 {
        let fake = Fake::new();
        let limit = fake.small();
        let vcpus = random.u32(1..4);
        let _vcpus: Vec<_> =
            (0..vcpus).map(|index| limit.add_vcpu(random.u32(0..100) * 4 + index, &fake.vcpu(1024)).unwrap()).collect();
        let mut copy = Copy::default();
        for round in 0..20 {
            for vcpu in 0..vcpus {
                let (from, step) = (random.u64(0..PAGES), random.choice([1, 1, 7, 63, 64, 1009]).unwrap());
                fake.write_all(vcpu as usize, (0..random.u64(0..300)).map(|page| (from + page * step) % PAGES));
            }
            let goes = (0..random.usize(0..4)).map(|_| match random.u8(0..5) {
                0 => Goes::Disturbed,
                1 => Goes::ShortFails(random.u32(0..300), libc::EIO),
                2 => Goes::ShortFails(random.u32(0..300), libc::EINTR),
                _ => Goes::Short(random.u32(0..300)),
            });
            fake.script(goes.collect::<Vec<_>>());
            let log = loop {
                match limit.last_round().and_then(|round| round.take(SLOT)) {
                    Ok(log) => break log,
                    Err(error) => assert_eq!(error.errno(), libc::EIO),
                }
            };
            copy.take(&fake, &log);
            assert_eq!(copy.lost(&fake), 0, "round {round}");
        }
    }
}

#[test]
fn what_a_failed_reset_left_unprotected_is_suspect_after_the_next() {
    let fake = Fake::new();
    let limit = fake.small();
    let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    let mut copy = Copy::default();
    fake.write_all(0, 0..100);
    fake.script([Goes::ShortFails(90, libc::EIO)]);
    limit.last_round().map(drop).unwrap_err();
    copy.take(&fake, &limit.last_round().and_then(|round| round.take(SLOT)).unwrap());
    fake.write_all(0, 0..100);
    copy.take(&fake, &limit.last_round().and_then(|round| round.take(SLOT)).unwrap());
    assert_eq!((copy.lost(&fake), limit.stats().suspect_resets), (0, 1));
}

#[test]
fn a_reset_that_never_comes_is_an_error_and_its_pages_come_later() {
    for goes in [Goes::Short(0), Goes::Fails(libc::EINTR)] {
        for first in [0, 50] {
            let fake = Fake::new();
            let limit = fake.small();
            let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
            fake.write_all(0, 0..100);
            fake.script([Goes::Short(first)]);
            fake.always(Some(goes));
            match limit.last_round().and_then(|round| round.take(SLOT)) {
                Err(Error::ShortReset { given, expected: 100, tries: 64 }) => assert_eq!(given, first),
                other => panic!("{goes:?}: {other:?}"),
            }
            assert_eq!(fake.resets(), 64 + u32::from(first > 0));
            assert_eq!(pages(&limit.take_published(SLOT).unwrap()), [0; 0], "published although still writable");
            fake.always(None);
            assert_eq!(take(&limit), (0..100).collect::<Vec<_>>());
        }
    }
}

#[test]
fn resets_that_go_on_a_little_at_a_time_come_to_an_end() {
    let fake = Fake::new();
    let limit = fake.small();
    let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    fake.write_all(0, 0..300);
    // Each time 63 that come to nothing, then one entry.
    for _ in 0..300 {
        fake.script((0..63).map(|_| Goes::Short(0)).chain([Goes::Short(1)]));
    }
    assert_eq!((take(&limit).len(), fake.resets()), (300, 300 * 64));
}

#[test]
fn another_error_of_a_reset_is_passed_on_at_once_and_loses_nothing() {
    let fake = Fake::new();
    let limit = fake.small();
    let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    fake.write_all(0, 0..100);
    fake.script([Goes::Fails(libc::EIO)]);
    assert_eq!(limit.last_round().map(drop).unwrap_err().errno(), libc::EIO);
    assert_eq!(fake.resets(), 1);
    assert_eq!(take(&limit), (0..100).collect::<Vec<_>>());
}

#[test]
fn a_take_is_complete_after_one_that_failed_with_a_full_batch() {
    let fake = Fake::new();
    let limit = fake.limit(&Config::new().ring_entries(16_384)).unwrap();
    limit.add_slot(SLOT, PAGES).unwrap();
    let _vcpu = limit.add_vcpu(0, &fake.vcpu(16_384)).unwrap();
    fake.write_all(0, 0..PAGES);
    fake.always(Some(Goes::Short(0)));
    limit.last_round().map(drop).unwrap_err();
    fake.always(None);
    assert_eq!(take(&limit).len() as u64, PAGES);
}

#[test]
fn resets_of_a_third_party_do_not_confuse_it() {
    let fake = Fake::new();
    let limit = fake.small();
    let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    let mut copy = Copy::default();
    for round in 0..50 {
        fake.write_all(0, (0..500).map(|page| page + round));
        limit.meter();
        fake.reset().unwrap();
        if round % 2 == 0 {
            // It collects, cannot reset, and the other one does it.
            fake.always(Some(Goes::Fails(libc::EIO)));
            limit.last_round().map(drop).unwrap_err();
            fake.always(None);
            fake.reset().unwrap();
        }
        copy.take(&fake, &limit.last_round().and_then(|round| round.take(SLOT)).unwrap());
        assert_eq!(copy.lost(&fake), 0, "round {round}");
    }
}

#[test]
fn entries_that_lie_nowhere_are_dropped_and_counted() {
    let fake = Fake::new();
    let limit = fake.small();
    let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    for page in [(SLOT, PAGES), (SLOT, u64::MAX), (SLOT + 1, 0), (SLOT | 1 << 16, 0), (SLOT, PAGES - 1)] {
        assert!(fake.write(0, Page { slot: page.0, offset: page.1 }));
    }
    // Told once, by whatever collects them; what is known is not lost by it.
    let told = |error| matches!(error, Err(Error::UnknownPages { pages: 4, slot: SLOT }));
    assert!(told(limit.last_round().and_then(|round| round.take(SLOT)).map(drop)));
    assert_eq!(take(&limit), [PAGES - 1]);
    assert_eq!(limit.stats().dropped, 4);
    let totals = limit.query(0).unwrap().totals;
    assert_eq!((totals.net_pages, totals.gross_pages), (1, 5));
}

#[test]
fn pages_of_unknown_slots_are_told_by_the_next_round_whoever_collected_them() {
    let fake = Fake::new();
    let limit = fake.small();
    let mut vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    let write = |slot| assert!(fake.write(0, Page { slot, offset: 0 }));
    // A vCPU's thread, which cannot tell.
    write(SLOT + 1);
    fake.write_all(0, 0..PAGES);
    _ = vcpu.before_run().unwrap();
    assert_eq!(limit.stats().dropped, 1);
    assert!(matches!(limit.round(), Err(Error::UnknownPages { pages: 1, .. })));
    drop(limit.round().unwrap());
    assert!(!pages(&limit.take_published(SLOT).unwrap()).is_empty(), "published all the same");
    // Who changes slots and vCPUs goes on, and the next round tells.
    write(SLOT + 2);
    limit.add_slot(SLOT + 3, 1).unwrap();
    limit.remove_slot(SLOT + 3).unwrap();
    assert!(matches!(limit.last_round().map(drop), Err(Error::UnknownPages { pages: 1, .. })));
    // A removed slot is written to until KVM has deleted it.
    write(SLOT + 3);
    limit.last_round().map(drop).unwrap();
    assert_eq!(limit.stats().dropped, 3);
}

#[test]
fn a_slot_that_comes_again_inherits_nothing() {
    let fake = Fake::new();
    let limit = fake.small();
    let _vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    fake.write_all(0, 0..50);
    limit.last_round().map(drop).unwrap();
    fake.write_all(0, 50..90);
    fake.script([Goes::Disturbed]);
    limit.remove_slot(SLOT).unwrap();
    assert!(matches!(limit.last_round().and_then(|round| round.take(SLOT)), Err(Error::NoSlot(SLOT))));
    // Logged between the removal here and in KVM.
    fake.write_all(0, 90..99);
    limit.add_slot(SLOT, PAGES).unwrap();
    assert_eq!((take(&limit), limit.stats().dropped, limit.stats().suspect_pages), (vec![], 9, 0));
    fake.write_all(0, 95..96);
    assert_eq!(take(&limit), [95]);
    assert!(matches!(limit.add_slot(SLOT, 1), Err(Error::SlotExists { slot: SLOT, pages: PAGES })));
}

#[test]
fn rings_are_collected_for_a_slot_that_comes_again_and_for_no_other() {
    let (fake, limit, _file, _vcpu) = super::vm();
    fake.write_all(0, 0..50);
    limit.add_slot(7, 100).unwrap();
    assert_eq!(fake.resets(), 0);
    limit.remove_slot(7).unwrap();
    fake.write_all(0, 50..99);
    limit.add_slot(7, 100).unwrap();
    assert_eq!((fake.resets(), limit.stats().resets), (2, 99));
}

#[test]
fn three_cuts_within_ten_seconds_are_a_storm_until_ten_after_the_first() {
    let storm = |times: &[u64], end: u64| {
        let mut cuts = Cuts::default();
        for time in times {
            cuts.are_a_storm(true, time * SECOND);
        }
        cuts.are_a_storm(false, end * SECOND)
    };
    assert!(!storm(&[], 0) && !storm(&[1, 2], 2));
    assert!(storm(&[1, 2, 3], 3) && storm(&[1, 6, 11], 11) && storm(&[1, 2, 3], 11));
    assert!(!storm(&[1, 6, 12], 12) && !storm(&[1, 2, 3], 12));
    assert!(storm(&[1, 20, 21, 22], 22), "the last three");
}
