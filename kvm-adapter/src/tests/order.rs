//! Who comes first at the lock and in a batch. By order and count: no time is measured.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use dirtylimit_core::{BATCH, Page};

use crate::dirty_log::PIECE;
use crate::fake::{Fake, PAGES, SLOT};
use crate::{Config, Vcpu};

fn rings(fake: &Fake, count: u32) -> (crate::DirtyLimit, Vec<(File, Vcpu)>) {
    let limit = fake.limit(&Config::new().ring_entries(4096)).unwrap();
    limit.add_slot(SLOT, PAGES).unwrap();
    let vcpu = |id| {
        let file = fake.vcpu(4096);
        let vcpu = limit.add_vcpu(id, &file).unwrap();
        (file, vcpu)
    };
    let vcpus = (0..count).map(vcpu).collect();
    (limit, vcpus)
}

/// The guest fills the ring of `vcpu`, with pages of its own; how many entries that took.
fn fill(fake: &Fake, vcpu: u32) -> u32 {
    let page = |offset| Page { slot: 100 + vcpu, offset };
    (0..)
        .take_while(|offset| fake.write(vcpu as usize, page(u64::from(*offset))))
        .last()
        .map_or(0, |last: u32| last + 1)
}

#[test]
fn vcpus_that_fill_their_rings_at_once_are_served_in_turn() {
    for count in [2, 3, 4, 7] {
        let fake = Fake::new();
        let (limit, _vcpus) = rings(&fake, count);
        let given = |id: u32| limit.vm().lock().rows[&id].ring().held_back();
        let mut freed = vec![0; count as usize];
        for id in 0..count {
            fill(&fake, id);
        }
        limit.meter();
        for _ in 0..20 * count {
            let before: Vec<_> = (0..count).map(given).collect();
            let mut harvest = limit.vm().lock();
            harvest.rows.values_mut().for_each(|row| row.vcpu.ask(row.shared.cell(&limit.vm().limiter), BATCH));
            harvest.grant(&fake, &limit.vm().limiter).unwrap();
            drop(harvest);
            for id in 0..count {
                freed[id as usize] += before[id as usize] - given(id);
                // It runs as soon as there is room.
                fill(&fake, id);
            }
            limit.meter();
        }
        let (least, most) = (freed.iter().min().unwrap(), freed.iter().max().unwrap());
        assert!(*least > 15 * BATCH && most - least <= 2 * BATCH, "{count}: {freed:?}");
    }
}

#[test]
fn who_only_tries_the_lock_gets_it_before_a_take_goes_on() {
    const COPIERS: u64 = 2;
    let fake = Fake::new();
    let limit = fake.small();
    limit.add_slot(7, 64 * 100 * PIECE as u64).unwrap();
    let (vm, stop) = (limit.vm(), AtomicBool::new(false));
    let stops = &stop;
    // However often it takes: in between others wait.
    let lock = || {
        loop {
            match vm.try_lock() {
                Some(harvest) => break harvest,
                None => thread::sleep(Duration::from_millis(2)),
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..COPIERS {
            scope.spawn(|| {
                while !stops.load(Relaxed) {
                    limit.take_published(7).unwrap();
                }
            });
        }
        for round in 0..100 {
            let harvest = lock();
            let before = harvest.slots.pieces;
            assert!(vm.try_lock().is_none());
            drop(harvest);
            thread::sleep(Duration::from_millis(2));
            // One each that waited in the mutex already.
            let pieces = lock().slots.pieces - before;
            if pieces > COPIERS {
                stop.store(true, Relaxed);
                panic!("round {round}: {pieces} pieces were taken first");
            }
        }
        stop.store(true, Relaxed);
    });
    assert!(vm.lock().slots.pieces > 100, "nobody took anything");
}

#[test]
fn rings_are_metered_in_pieces() {
    let fake = Fake::new();
    let (limit, _vcpus) = rings(&fake, 9);
    for vcpu in 0..9 {
        fill(&fake, vcpu);
    }
    let vm = limit.vm();
    let (mut seen, mut next, mut pieces) = (Vec::new(), Some(0), 0);
    while let Some(from) = next {
        next = vm.lock().meter_from(from, &vm.limiter, |id, row| seen.push((id, row.ring().held_back())));
        pieces += 1;
    }
    assert_eq!(seen.iter().map(|(id, _)| *id).collect::<Vec<_>>(), (0..9).collect::<Vec<_>>());
    assert!(pieces == 2 && seen.iter().all(|(_, held)| *held > 1000), "{pieces}, {seen:?}");
}

/// It would wait for ever.
#[test]
fn a_tick_waits_for_no_lock() {
    let limit = Fake::new().small();
    let held = limit.vm().lock();
    (0..3).for_each(|_| limit.tick());
    drop(held);
    assert!(limit.vm().limiter.vm().is_leased(crate::sys::now()));
}

#[test]
fn who_gets_the_lock_after_it_tried_in_vain_hurries_nobody() {
    let limit = Fake::new().small();
    let vm = limit.vm();
    let hurry = || format!("{vm:?}").rsplit("hurry: ").next().unwrap().starts_with('1');
    assert!(vm.try_lock().is_some() && !hurry());
    let held = vm.lock();
    assert!(vm.try_lock().is_none());
    drop(held);
    assert!(hurry() && vm.try_lock().is_some() && !hurry());
}
