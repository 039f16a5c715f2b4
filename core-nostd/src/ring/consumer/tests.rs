use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::prelude::v1::*;

fn entries(count: usize) -> Vec<Entry> {
    (0..count).map(|_| Entry::new()).collect()
}

#[test]
fn an_entry_has_the_kernels_layout() {
    let entry = Entry::new();
    entry.push(Page { slot: 0x0001_0002, offset: 0x1122_3344_5566_7788 });
    // SAFETY-free check of the layout: through the fields' own order, as `repr(C)` lays them.
    assert_eq!(core::mem::offset_of!(Entry, flags), 0);
    assert_eq!(core::mem::offset_of!(Entry, slot), 4);
    assert_eq!(core::mem::offset_of!(Entry, first), 8);
    assert_eq!(entry.peek(), Some(Page { slot: 0x0001_0002, offset: 0x1122_3344_5566_7788 }));
    if cfg!(target_endian = "little") {
        assert_eq!(entry.first.load(Ordering::Relaxed), 0x5566_7788);
    }
}

#[test]
fn bad_sizes_are_refused() {
    for count in [0, 1, 64, 100, 127, 4095] {
        let error = Ring::new(entries(count)).unwrap_err();
        assert_eq!(error, BadRingSize { entries: count });
        assert!(error.to_string().contains("power of two above 64"), "{error}");
    }
    assert!(Ring::new(entries(128)).is_ok());
}

#[test]
fn a_ring_that_somebody_has_consumed_is_not_new() {
    let memory = entries(128);
    let is_new = || Ring::new(memory.as_slice()).unwrap().is_new();
    assert!(is_new());
    let page = |offset| Page { slot: 0, offset };
    memory[0].push(page(0));
    memory[1].push(page(7));
    assert!(is_new(), "written, from the first entry on");
    let mut ring = Ring::new(memory.as_slice()).unwrap();
    ring.meter(|_| ());
    ring.collect(2, |_| ());
    assert!(!is_new(), "collected");
    assert!(memory[0].reset().is_some() && memory[1].reset().is_some());
    assert!(!is_new(), "reset");
    memory[0].push(page(9));
    assert!(!is_new(), "on its second round");
    for entry in &memory {
        entry.push(page(1));
    }
    ring = Ring::new(memory.as_slice()).unwrap();
    ring.meter(|_| ());
    ring.collect(1, |_| ());
    assert!(memory[0].reset().is_some());
    assert!(!is_new(), "dirty, but not from the first entry on");
}

#[test]
fn the_soft_limit_is_learned_from_full_exits_alone() {
    let memory = entries(1024);
    let mut ring = Ring::new(memory.as_slice()).unwrap();
    assert_eq!(ring.soft_limit(), 960);
    let fill = |ring: &mut Ring<_>, to: u32| {
        while ring.occupied() < to {
            memory[ring.occupied() as usize].push(Page { slot: 0, offset: 0 });
            ring.meter(|_| ());
        }
        ring.full_exit();
        ring.soft_limit()
    };
    assert_eq!(fill(&mut ring, 448), 448, "the first is all there is");
    assert!(!ring.ends(100), "it may be lumps");
    assert_eq!(fill(&mut ring, 959), 448, "a lump beyond, or a stale exit reason before");
    assert_eq!(fill(&mut ring, 960), 448, "two that differ");
    ring.full_exit();
    assert_eq!(ring.soft_limit(), 448, "nothing new, as nobody has freed a slice");
    for (run, expected) in [(0, 448), (1, 501)] {
        ring.collect(ring.occupied() - 500, |_| ());
        memory.iter().filter_map(Entry::reset).count();
        ring.reclaim();
        memory[960 + run].push(Page { slot: 0, offset: 0 });
        ring.meter(|_| ());
        ring.full_exit();
        assert_eq!(ring.soft_limit(), expected, "two that agree");
    }
}

#[test]
fn entries_of_the_kernels_own_use_up_no_slice() {
    let memory = entries(1024);
    let mut ring = Ring::new(memory.as_slice()).unwrap();
    let mut next = 0;
    let mut exit = |ring: &mut Ring<&[Entry]>, whose: &str| {
        for _ in whose.bytes() {
            memory[next & 1023].push(Page { slot: 0, offset: 0 });
            next += 1;
        }
        let mut whose = whose.bytes();
        ring.meter_guest(|_| whose.next() == Some(b'g'));
        ring.full_exit();
        let collected = ring.collect(ring.to_collect(1), |_| ());
        memory.iter().filter_map(Entry::reset).count();
        ring.reclaim();
        (collected, ring.room(), ring.soft_limit())
    };
    assert_eq!(exit(&mut ring, &"g".repeat(960)), (1, 1, 960));
    assert_eq!(exit(&mut ring, "kk"), (4, 3, 960), "used up: room for both the next time");
    assert_eq!(exit(&mut ring, "kggk"), (3, 2, 960), "what follows the guest's last one took nothing from it");
    assert_eq!(exit(&mut ring, "kgk"), (3, 2, 960));
    assert!(ring.ends(1) && !ring.ends(0));
}

#[test]
fn a_full_exit_without_a_page_of_the_guests_says_what_the_ring_shows() {
    let memory = entries(1024);
    let mut ring = Ring::new(memory.as_slice()).unwrap();
    assert_eq!(ring.size(), 1024);
    let mut next = 0;
    let mut push = |ring: &mut Ring<&[Entry]>, count: u32, guest: bool| {
        for _ in 0..count {
            memory[next & 1023].push(Page { slot: 0, offset: 0 });
            next += 1;
        }
        ring.meter_guest(|_| guest);
    };
    let free = |ring: &mut Ring<&[Entry]>, count: u32| {
        ring.collect(count, |_| ());
        memory.iter().filter_map(Entry::reset).count();
        ring.reclaim();
        ring.freed();
    };
    for _ in 0..3 {
        ring.full_exit_of_kvm();
        assert!((ring.soft_limit(), ring.has_lumps()) == (960, false), "an empty ring says nothing");
    }
    push(&mut ring, 960, true);
    ring.full_exit();
    for _ in 0..3 {
        ring.full_exit();
        assert_eq!((ring.to_collect(1), ring.soft_limit()), (1, 960), "it had no room");
    }
    // KVM's own entry takes the room each time: there is more and more, up to 16 of them.
    for room in (2..18).chain([17, 17 + 32]) {
        free(&mut ring, 1);
        push(&mut ring, 1, false);
        ring.full_exit();
        assert_eq!(ring.to_collect(1), room);
    }
    assert_eq!(ring.soft_limit(), 960 - 32, "and then the ring is said to be full sooner");
    let memory = entries(1024);
    let mut ring = Ring::new(memory.as_slice()).unwrap();
    for (entries, expected) in [(0..500, 960), (500..501, 501 - 32)] {
        memory[entries].iter().for_each(|entry| entry.push(Page { slot: 0, offset: 0 }));
        ring.meter_guest(|_| false);
        ring.full_exit();
        assert_eq!(ring.soft_limit(), expected, "full below what was believed, twice");
    }
}

#[test]
fn a_ring_ends_slices_that_its_room_fits() {
    let memory = entries(4096);
    let mut ring = Ring::new(memory.as_slice()).unwrap();
    assert_eq!(ring.room(), 4032);
    assert_eq!([3225, 3226].map(|slice| ring.ends(slice)), [false, true], "give or take a quarter");
    memory[..3520].iter().for_each(|entry| entry.push(Page { slot: 0, offset: 0 }));
    ring.meter(|_| ());
    ring.full_exit();
    assert_eq!(ring.room(), 0, "PML");
    assert_eq!([1023, 1024].map(|slice| ring.ends(slice)), [false, true], "not what lumps may overshoot");
}

#[test]
fn holding_back_leaves_exactly_a_slice() {
    let memory = entries(1024);
    let mut ring = Ring::starting_at(memory.as_slice(), u32::MAX - 500).unwrap();
    let mut next = u32::MAX - 500;
    let mut push = |count: u32| {
        for _ in 0..count {
            memory[(next & 1023) as usize].push(Page { slot: 0, offset: next.into() });
            next = next.wrapping_add(1);
        }
    };
    push(960);
    for slice in [1, 17, 959, 960, 5000, 0, 300] {
        ring.meter(|_| ());
        assert_eq!(ring.occupied(), 960);
        let count = ring.to_collect(slice);
        assert_eq!(count, slice.clamp(1, 960));
        assert_eq!(ring.collect(count, |_| ()), count);
        assert_eq!(ring.reclaim(), 0, "not reset yet");
        assert_eq!(ring.to_collect(slice), 0, "asked twice, collected once");
        assert_eq!(memory.iter().filter_map(Entry::reset).count(), count as usize);
        assert_eq!(ring.reclaim(), count);
        push(count);
    }
}

/// The kernel and an obviously correct consumer: three lists.
#[derive(Default)]
struct Oracle {
    unseen: VecDeque<Page>,
    held: VecDeque<Page>,
    waiting: VecDeque<Page>,
}

#[derive(Clone, Debug)]
enum Step {
    Push(u32),
    Meter,
    Collect(u32),
    Reset(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1u32..200).prop_map(Step::Push),
        Just(Step::Meter),
        (0u32..200).prop_map(Step::Collect),
        (0u32..200).prop_map(Step::Reset),
    ]
}

proptest! {
    #[test]
    fn the_consumer_agrees_with_three_lists(
        start in prop_oneof![Just(0u32), Just(u32::MAX - 300), any::<u32>()],
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let memory = entries(128);
        let at = |i: u32| &memory[(i & 127) as usize];
        let mut ring = Ring::starting_at(memory.as_slice(), start).unwrap();
        let (mut dirty, mut reset) = (start, start);
        let mut oracle = Oracle::default();
        let mut serial = 0;
        for step in steps {
            match step {
                Step::Push(count) => for _ in 0..count {
                    if dirty.wrapping_sub(reset) == 128 { break }
                    serial += 1;
                    let page = Page { slot: serial & 7, offset: u64::from(serial) << 20 };
                    at(dirty).push(page);
                    dirty = dirty.wrapping_add(1);
                    oracle.unseen.push_back(page);
                },
                Step::Meter => {
                    let mut seen = vec![];
                    // The ring knows of room only as far as it has reclaimed.
                    let known = ring.awaiting_reset() as usize - oracle.waiting.len();
                    let room = 128 - ring.occupied() as usize;
                    ring.meter(|page| seen.push(page));
                    let expected: Vec<_> = oracle.unseen.drain(..oracle.unseen.len().min(room)).collect();
                    prop_assert_eq!(&seen, &expected, "{} given back unseen", known);
                    oracle.held.extend(expected);
                }
                Step::Collect(count) => {
                    let mut seen = vec![];
                    ring.collect(count, |page| seen.push(page));
                    let expected: Vec<_> = oracle.held.drain(..oracle.held.len().min(count as usize)).collect();
                    prop_assert_eq!(&seen, &expected);
                    oracle.waiting.extend(expected);
                }
                Step::Reset(count) => {
                    for _ in 0..count {
                        let Some(page) = at(reset).reset() else { break };
                        reset = reset.wrapping_add(1);
                        prop_assert_eq!(Some(page), oracle.waiting.pop_front());
                    }
                    ring.reclaim();
                }
            }
            let mut held = VecDeque::new();
            ring.for_each_held_back(|page| held.push_back(page));
            prop_assert_eq!(&held, &oracle.held);
            prop_assert_eq!(ring.held_back() as usize, oracle.held.len());
            prop_assert_eq!(ring.awaiting_reset() as usize, oracle.waiting.len());
        }
    }
}

proptest! {
    /// Somebody writes to the ring at any time, in the middle of a call too: what was seen is counted, and nothing more.
    #[test]
    fn a_hostile_ring_is_counted_and_no_more(
        start in any::<u32>(),
        steps in prop::collection::vec((0u8..4, any::<u32>(), 0usize..128, 0u32..4), 1..300),
    ) {
        let memory = entries(128);
        let mut ring = Ring::starting_at(memory.as_slice(), start).unwrap();
        let (mut held, mut waiting) = (0, 0);
        for (call, number, at, flags) in steps {
            memory[at].flags.store(flags, Ordering::Relaxed);
            memory[at].slot.store(number, Ordering::Relaxed);
            let mut seen = 0;
            let mut each = |_| {
                seen += 1;
                memory[(at + 7 * seen) % 128].flags.store(flags, Ordering::Relaxed);
            };
            match call {
                0 => held += ring.meter(&mut each),
                1 => {
                    let count = ring.collect(number % 256, &mut each);
                    prop_assert_eq!(count, held.min(number % 256));
                    (held, waiting) = (held - count, waiting + count);
                }
                2 => {
                    let given = ring.reclaim();
                    prop_assert!(given <= waiting);
                    waiting -= given;
                }
                _ => ring.full_exit(),
            }
            prop_assert!(seen <= 128);
            prop_assert_eq!((ring.held_back(), ring.awaiting_reset()), (held, waiting));
            prop_assert!(ring.occupied() <= 128 && ring.to_collect(number) <= held && ring.room() <= 64);
        }
    }
}
