//! Rounds: how much a running one takes from the ring of a limited vCPU, and how they are handed over.

use std::thread::sleep;
use std::time::{Duration, Instant};

use dirtylimit_core::Page;

use crate::batch::Batch;
use crate::dirty_log::PIECE;
use crate::fake::{Fake, PAGES, SLOT, pages};
use crate::slots::{Slot, Slots};
use crate::{Config, DirtyLimit, Error, Kick, PageRate, Vcpu};

/// A VM whose vCPU, with 960 entries to its soft limit, has written `pages` and does not know of its limit of a page in
/// 10 ms: the host may stand still for seconds before the ring is what ends a pass.
fn unnoticed(pages: u64) -> (Fake, DirtyLimit, Vcpu) {
    let (fake, limit, _, vcpu) = super::vm();
    limit.set_limit(0, PageRate::from_pages_per_sec(100)).unwrap();
    limit.tick();
    fake.write_all(0, 0..pages);
    (fake, limit, vcpu)
}

#[test]
fn a_pass_takes_what_the_limit_allows_of_who_has_not_noticed_it() {
    let (fake, limit, _vcpu) = unnoticed(960);
    let before = Instant::now();
    assert_eq!((limit.round().unwrap().published(), limit.held_back(0).unwrap()), (0, 960));
    let (after, mut next, mut published, mut last) = (Instant::now(), 960, 0, Instant::now());
    for _ in 0..30 {
        // One page and a part of one.
        sleep(Duration::from_millis(16));
        limit.tick();
        last = Instant::now();
        let taken = limit.round().unwrap().published();
        fake.write_all(0, next..next + taken);
        (published, next) = (published + taken, next + taken);
    }
    // No part of a page is lost from one pass to the next.
    let (least, most) = ((last - after).as_millis() / 10, before.elapsed().as_millis() / 10);
    assert!((least..=most + 1).contains(&u128::from(published)), "{published}, not {least} to {most}");
}

#[test]
fn what_the_limit_allowed_and_nobody_wrote_is_not_kept_for_later() {
    let (fake, limit, _vcpu) = unnoticed(10);
    drop(limit.round().unwrap());
    sleep(Duration::from_millis(200));
    limit.tick();
    assert_eq!(limit.round().unwrap().published(), 10, "all that there is");
    limit.tick();
    let before = Instant::now();
    fake.write_all(0, 10..910);
    let published = u128::from(limit.round().unwrap().published());
    assert!(published <= before.elapsed().as_millis() / 10 + 1, "{published}");
}

#[test]
fn a_pass_takes_what_a_slice_frees_and_no_more() {
    let (fake, limit, _, _vcpu) = super::vm();
    fake.write_all(0, 0..960);
    limit.vm().lock().rows.get_mut(&0).unwrap().vcpu.assign(Some(10), true, false);
    let pass = limit.round().unwrap();
    assert_eq!((pass.published(), pass.held_back()), (10, 950));
}

#[test]
fn a_drained_ring_is_left_empty_by_a_round_that_of_a_later_vcpu_too_and_only_where_there_are_kicks() {
    for kick in [Kick::Auto, Kick::Off] {
        let limit = Fake::new().limit(&Config::new().kick(kick)).unwrap();
        assert!(matches!(limit.set_draining(true), Err(Error::NoKick)));
        limit.set_draining(false).unwrap();
    }
    let fake = Fake::new();
    let limit = fake.limit(&Config::new().ring_entries(1024).kick(Kick::Vmm)).unwrap();
    limit.add_slot(SLOT, PAGES).unwrap();
    let round = |id: u32| {
        fake.write_all(id as usize, 0..PAGES);
        limit.vm().lock().rows.get_mut(&id).unwrap().vcpu.assign(Some(10), true, false);
        let round = limit.round().unwrap();
        (round.published(), round.held_back())
    };
    let [first, second] = [(); 2].map(|()| fake.vcpu(1024));
    let _first = limit.add_vcpu(0, &first).unwrap();
    assert_eq!(round(0), (10, 950));
    limit.set_draining(true).unwrap();
    assert_eq!(round(0), (960, 0));
    let _second = limit.add_vcpu(1, &second).unwrap();
    assert_eq!(round(1), (960, 0));
    limit.set_draining(false).unwrap();
    assert_eq!(round(1), (10, 950));
}

#[test]
fn who_wrote_what_was_dirty_already_is_told_apart() {
    let mut slots = Slots::default();
    slots.add(SLOT, Slot::new(SLOT, 1024).unwrap()).unwrap();
    let page = |offset| Page { slot: SLOT, offset };
    for offset in 10..13 {
        slots.publish(page(offset), false);
    }
    let mut batch = Batch::new();
    for (vcpu, offset) in [(0, 0), (0, 1), (1, 10), (1, 11), (1, 12)] {
        slots.meter(page(offset));
        batch.push(vcpu, page(offset));
    }
    let mut merged = Vec::new();
    batch.publish(&mut slots, |vcpu, pages| merged.push((vcpu, pages)));
    assert_eq!(merged, [(0, 0), (1, 3)]);
}

#[test]
fn a_round_is_ored_into_the_callers_words_and_forgotten_once_it_was_handed_over_whole() {
    let (fake, limit, _, _vcpu) = super::vm();
    fake.write_all(0, [3, 64, 9_999]);
    let words = usize::try_from(PAGES.div_ceil(64)).unwrap();
    let round = limit.last_round().unwrap();
    assert_eq!(round.published(), 3);
    let mut bitmap = vec![0; words + 1];
    (bitmap[0], bitmap[words]) = (1, 7);
    assert!(matches!(
        round.merge(SLOT, &mut bitmap[..words - 1]),
        Err(Error::BitmapSize { slot: SLOT, given, needed }) if (given, needed) == (words - 1, words)
    ));
    assert!(matches!(round.merge(SLOT + 1, &mut bitmap), Err(Error::NoSlot(_))));
    assert_eq!(round.merge(SLOT, &mut bitmap).unwrap(), 3);
    assert_eq!((bitmap[0], bitmap[1], bitmap[words - 1], bitmap[words]), (0b1001, 1, 1 << (9_999 % 64), 7));
    assert_eq!(round.merge(SLOT, &mut bitmap).unwrap(), 0, "once");
}

#[test]
fn what_is_dirty_is_seen_without_being_taken() {
    let (fake, limit, _, _vcpu) = super::vm();
    let words = usize::try_from(PAGES.div_ceil(64)).unwrap();
    let peek = |bitmap: &mut [u64]| limit.peek(SLOT, bitmap);
    let seen = || {
        let mut bitmap = vec![0; words];
        peek(&mut bitmap).unwrap();
        pages(&bitmap)
    };
    let resets = || fake.resets();
    fake.write_all(0, [3, 64]);
    limit.mark_dirty(SLOT, 9_999..10_000).unwrap();
    let before = resets();
    assert_eq!(seen(), [3, 64, 9_999], "in a ring, and published");
    assert_eq!((seen(), resets()), (vec![3, 64, 9_999], before), "again, and nothing is reset");
    // Published and not taken; written again since; taken.
    let round = limit.round().unwrap();
    fake.write_all(0, [4]);
    assert_eq!(seen(), [3, 4, 64, 9_999]);
    assert_eq!(pages(&round.take(SLOT).unwrap()), [3, 64, 9_999], "each is still there");
    assert_eq!(seen(), [4]);
    let mut bitmap = vec![1 << 9; words + 1];
    peek(&mut bitmap).unwrap();
    assert_eq!((bitmap[0], bitmap[1], bitmap[words]), (1 << 9 | 1 << 4, 1 << 9, 1 << 9), "what was set stays");
    assert!(matches!(peek(&mut vec![0; words - 1]), Err(Error::BitmapSize { .. })));
    assert!(matches!(limit.peek(7, &mut bitmap), Err(Error::NoSlot(7))));
}

#[test]
fn what_the_vmm_writes_itself_is_in_the_next_round_and_charged_to_nobody() {
    let (fake, limit, _, _vcpu) = super::vm();
    fake.write_all(0, [5]);
    limit.mark_dirty(SLOT, 4..7).unwrap();
    limit.mark_dirty(SLOT, 9_999..10_000).unwrap();
    limit.mark_dirty(SLOT, 20..20).unwrap();
    assert!(matches!(limit.mark_dirty(SLOT, 9..10_001), Err(Error::PagesBeyond { end: 10_001, pages: PAGES, .. })));
    assert!(matches!(limit.mark_dirty(7, 0..1), Err(Error::NoSlot(7))));
    let taken = limit.round().and_then(|round| round.take(SLOT)).unwrap();
    assert_eq!(pages(&taken), [4, 5, 6, 9_999]);
    assert_eq!(limit.query(0).unwrap().totals.net_pages, 1);
    // A range of several pieces, of a slot that no vCPU writes.
    let (words, large) = (3 * PIECE, 64 * 3 * PIECE as u64);
    limit.add_slot(9, large).unwrap();
    limit.mark_dirty(9, 1..large - 1).unwrap();
    let mut bitmap = vec![0; words];
    assert_eq!(limit.round().and_then(|round| round.merge(9, &mut bitmap)).unwrap(), large - 2);
    assert_eq!((bitmap[0], bitmap[PIECE], bitmap.last().copied()), (!1, u64::MAX, Some(u64::MAX >> 1)));
}

#[test]
fn a_slot_is_added_and_removed_as_often_as_its_logging_is_switched() {
    let (fake, limit, _, _vcpu) = super::vm();
    fake.write_all(0, [5]);
    limit.add_slot(SLOT, PAGES).unwrap();
    assert_eq!(pages(&limit.round().and_then(|round| round.take(SLOT)).unwrap()), [5], "what is dirty stays so");
    limit.remove_slot(SLOT).unwrap();
    limit.remove_slot(SLOT).unwrap();
    limit.add_slot(SLOT, PAGES).unwrap();
    assert_eq!(pages(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()), [0; 0]);
}
