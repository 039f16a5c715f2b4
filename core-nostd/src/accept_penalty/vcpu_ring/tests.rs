use std::rc::Rc;
use std::vec::Vec;

use super::*;
use crate::rate::SECOND;
use crate::set_penalty::Terms;

const SIZE: u32 = 1024;
const SOFT: u32 = SIZE - crate::ring::RESERVED;

type Entries = Rc<[Entry]>;

fn ring() -> (Entries, VcpuRing<Entries>, VcpuCell) {
    let entries: Entries = (0..SIZE).map(|_| Entry::new()).collect();
    let vcpu = VcpuRing::new(Ring::new(entries.clone()).unwrap());
    (entries, vcpu, VcpuCell::new())
}

fn push(entries: &[Entry], pages: impl IntoIterator<Item = u64>) {
    for (entry, offset) in entries.iter().zip(pages) {
        entry.push(Page { slot: 0, offset });
    }
}

fn limit(cell: &VcpuCell, rate: u32) -> PageRate {
    let rate = PageRate::from_pages_per_sec(rate);
    cell.penalty.set(Penalty::new(Terms::Pace(rate.interval())));
    rate
}

#[test]
fn new_pages_are_net_and_one_that_was_sent_twice_as_one_is_another_free() {
    let (entries, mut vcpu, cell) = ring();
    push(&entries, 0..10);
    assert_eq!(vcpu.meter(&cell, |page| if page.offset < 4 { Metered::New } else { Metered::Nowhere }), 10);
    assert_eq!((cell.counters.counts().net, cell.counters.counts().gross), (4, 10));
    vcpu.add_merged(3);
    push(&entries[10..], 10..15);
    vcpu.meter(&cell, |_| Metered::New);
    assert_eq!((cell.counters.counts().net, cell.counters.counts().gross), (6, 15));
    push(&entries[15..], 15..16);
    vcpu.meter(&cell, |_| Metered::New);
    assert_eq!(cell.counters.counts().net, 7, "three were free, and no more");
    vcpu.add_merged(u32::MAX);
    vcpu.add_merged(1);
    vcpu.assign(None, true, false);
    push(&entries[16..], 16..18);
    vcpu.meter(&cell, |_| Metered::New);
    assert_eq!(cell.counters.counts().net, 9, "what was merged before the limit is nobody's credit");
}

#[test]
fn what_kvm_logs_itself_is_not_the_guests() {
    let (entries, mut vcpu, cell) = ring();
    push(&entries, [5, 5, 6, 5]);
    let mut seen = Vec::new();
    let guest = vcpu.meter(&cell, |page| {
        let again = seen.contains(&page.offset);
        seen.push(page.offset);
        if again { Metered::Again } else { Metered::New }
    });
    assert_eq!((guest, cell.counters.counts().net, cell.counters.counts().gross), (2, 2, 2));
}

#[test]
fn a_request_stands_until_a_reset_has_made_the_room() {
    let (entries, mut vcpu, cell) = ring();
    push(&entries, 0..SOFT.into());
    vcpu.meter(&cell, |_| Metered::New);
    assert_eq!(vcpu.to_grant(), 0, "nothing was asked for");
    vcpu.ask(&cell, 100);
    assert!(cell.request.stands() && vcpu.to_grant() == 100);
    vcpu.grant(&cell);
    assert!(cell.request.stands(), "there is no room yet");
    vcpu.collect(60, |_| ());
    vcpu.grant(&cell);
    assert!(cell.request.stands() && vcpu.to_grant() == 40);
    vcpu.collect(40, |_| ());
    entries.iter().take(100).for_each(|entry| _ = entry.reset());
    assert_eq!(vcpu.reclaim(), 100);
    vcpu.grant(&cell);
    assert!(!cell.request.stands() && vcpu.to_grant() == 0 && vcpu.ring().room() == 100);
    vcpu.ask(&cell, 200);
    vcpu.ask(&cell, 0);
    assert!(!cell.request.stands() && vcpu.to_grant() == 0, "taken back");
}

#[test]
fn a_sweep_leaves_a_limited_vcpu_inside_its_slice_and_takes_all_of_others() {
    let (entries, mut vcpu, cell) = ring();
    push(&entries, 0..SOFT.into());
    vcpu.meter(&cell, |_| Metered::New);
    let now = 1000 * SECOND;
    let unasked = || panic!("there is no limit to ask for");
    assert_eq!(vcpu.plan_sweep(&cell, now, unasked), SOFT);
    vcpu.assign(Some(70), true, false);
    assert_eq!((vcpu.plan_sweep(&cell, now, unasked), vcpu.slice()), (70, Some(70)));
    // Limited, and its thread does not know: what the limit allows since the last sweep, parts of a page kept.
    vcpu.assign(None, false, false);
    let rate = limit(&cell, 100);
    let counts = [0, 15, 5, 10, 1000].map(|ms| {
        let mut at = now;
        at += ms * 1_000_000;
        at
    });
    let mut at = now;
    let mut swept = Vec::new();
    for step in counts {
        at += step - now;
        swept.push(vcpu.plan_sweep(&cell, at, || Some(rate)));
    }
    assert_eq!(swept, [0, 1, 1, 1, 100]);
    assert_eq!(vcpu.plan_sweep(&cell, at + 20 * SECOND, || Some(rate)), SOFT, "all that there is");
    assert_eq!(vcpu.plan_sweep(&cell, at + 20 * SECOND, || Some(rate)), 0, "and nothing is kept of the rest");
    assert_eq!(vcpu.plan_sweep(&cell, at, || None), SOFT, "none any more");
}

#[test]
fn a_limit_is_news_to_a_vcpu_that_writes_until_it_knows_it() {
    let (_, mut vcpu, cell) = ring();
    assert!(!vcpu.is_news(&cell, 10), "no limit");
    limit(&cell, 4000);
    assert!(vcpu.is_news(&cell, 1) && vcpu.is_news(&cell, SOFT) && !vcpu.is_news(&cell, 0));
    // Kicks end such slices badly: a ring that fills in a few ticks is left to.
    limit(&cell, 1000);
    assert!(vcpu.is_news(&cell, SOFT / 4 - 1) && !vcpu.is_news(&cell, SOFT / 4));
    vcpu.assign(None, true, false);
    assert!(!vcpu.is_news(&cell, 1));
}

#[test]
fn a_ring_that_no_longer_ends_its_slice_and_a_slice_that_was_scaled_are_told_once() {
    let (_, mut vcpu, _) = ring();
    vcpu.assign(Some(SOFT), true, true);
    assert!(!vcpu.take_emptied(), "an empty ring ends that one");
    assert_eq!([vcpu.take_scaled(), vcpu.take_scaled()], [true, false]);
    vcpu.assign(Some(100), true, false);
    assert_eq!([vcpu.take_emptied(), vcpu.take_emptied()], [true, false]);
}

#[test]
fn a_full_exit_proves_lumps_where_the_slice_was_free_when_its_run_began() {
    let proves = |then: fn(&mut VcpuRing<Entries>, &VcpuCell)| {
        let (entries, mut vcpu, cell) = ring();
        push(&entries, 0..500);
        vcpu.meter(&cell, |_| Metered::New);
        vcpu.collect(100, |_| ());
        entries.iter().take(100).for_each(|entry| _ = entry.reset());
        vcpu.reclaim();
        then(&mut vcpu, &cell);
        push(&entries[500..], 500..550);
        vcpu.meter(&cell, |_| Metered::New);
        vcpu.ring.full_exit_of_kvm();
        vcpu.ring().has_lumps()
    };
    assert!(proves(|vcpu, cell| vcpu.ask(cell, 0)));
    assert!(proves(|vcpu, cell| {
        vcpu.ask(cell, 10);
        vcpu.grant(cell);
    }));
    assert!(!proves(|_, _| ()), "somebody has taken from the ring since");
    assert!(!proves(|vcpu, cell| vcpu.ask(cell, SOFT)), "it waits");
    assert!(!proves(|vcpu, cell| vcpu.grant(cell)), "nothing was asked for");
}
