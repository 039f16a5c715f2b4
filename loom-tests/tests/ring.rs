//! The ring: entries handed over untorn, and no page lost.
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "loom's cells are not Sync; its threads are coroutines of one thread"
)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dirtylimit_loom::explore::{ALL, FULL, fails, holds};
use dirtylimit_loom::kernel::{ENTRIES, Kernel, Mapping, Write};
use dirtylimit_loom::ring::Ring;
use dirtylimit_loom::weaken::site;
use loom::sync::Mutex;
use loom::thread;

/// Counters start here, so that they wrap within a model.
const START: u32 = u32::MAX - 1;

/// The kernel logs three pages; the consumer meters and collects; a third thread resets, knowing of the collected entries
/// by their flags alone; the kernel logs over what was reset.
fn handed_over() {
    let kernel = Arc::new(Kernel::starting_at(START));
    kernel.push(0);
    kernel.push(1);
    kernel.push(0);
    let consumer = thread::spawn({
        let kernel = kernel.clone();
        move || {
            let mut ring = Ring::starting_at(Mapping(kernel.clone()), START).expect("a good size");
            let (mut met, mut seen) = (START, vec![]);
            let mut read = |page, at: &mut u32| {
                seen.push(kernel.read(*at, page));
                *at = at.wrapping_add(1);
            };
            ring.meter(|page| read(page, &mut met));
            ring.collect(1, |page| {
                kernel.read(START, page);
            });
            ring.meter(|page| read(page, &mut met));
            assert_eq!(seen, [0, 1, 0, 1, 0][..seen.len()], "in the order of logging");
            assert!(seen.len() >= 3, "what was logged before is seen");
        }
    });
    let resetter = thread::spawn({
        let kernel = kernel.clone();
        move || kernel.reset()
    });
    kernel.push(1);
    if kernel.room() {
        kernel.push(0);
    }
    consumer.join().expect("no panic");
    assert!(resetter.join().expect("no panic") <= 1);
}

#[test]
fn entries_are_handed_over() {
    holds("entries_are_handed_over", ALL, 150, handed_over);
}

#[test]
fn twin_push_publishes_nothing() {
    fails("push relaxed", ALL, Some(site("ring/consumer.rs", "push")), "Causality violation", handed_over);
}

#[test]
fn twin_peek_acquires_nothing() {
    fails("peek relaxed", ALL, Some(site("ring/consumer.rs", "peek")), "Causality violation", handed_over);
}

#[test]
fn twin_collect_releases_nothing() {
    fails("collect relaxed", ALL, Some(site("ring/consumer.rs", "collect")), "Causality violation", handed_over);
}

#[test]
fn twin_reset_acquires_nothing() {
    fails("reset relaxed", ALL, Some(site("ring/consumer.rs", "reset")), "Causality violation", handed_over);
}

/// When and how a pass publishes the pages that it collected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Publish {
    /// After a reset begun after the collection has returned.
    AfterReset,
    /// A twin: before.
    BeforeReset,
    /// A twin: before, and copies it at once.
    AndCopyBeforeReset,
    /// A twin: as soon as the entries are seen to be given back, by whose reset ever.
    WhenGivenBack,
    /// A twin: at the right time, but ordering nothing.
    Relaxed,
}

struct Vm {
    kernel: Arc<Kernel>,
    ring: Mutex<Ring<Mapping>>,
}

impl Vm {
    fn new() -> Arc<Self> {
        let kernel = Arc::new(Kernel::starting_at(START));
        let ring = Ring::starting_at(Mapping(kernel.clone()), START).expect("a good size");
        Arc::new(Self { kernel, ring: Mutex::new(ring) })
    }

    /// Meters all, collects all or what leaves the vCPU `slice`, lets go of the ring, resets and publishes.
    fn pass(&self, publish: Publish, slice: Option<u32>) {
        let mut pages = vec![];
        let mut ring = self.ring.lock().expect("not poisoned");
        ring.reclaim();
        ring.meter(|_| ());
        let count = slice.map_or(u32::MAX, |slice| ring.to_collect(slice));
        ring.collect(count, |page| pages.push(page.slot as usize - 1));
        drop(ring);
        let order = if publish == Publish::Relaxed { Ordering::Relaxed } else { Ordering::Release };
        let publish_all = || pages.iter().for_each(|page| self.kernel.publish(*page, order));
        let skip_reset = publish == Publish::WhenGivenBack && {
            let mut ring = self.ring.lock().expect("not poisoned");
            ring.reclaim();
            ring.awaiting_reset() == 0
        };
        let early = matches!(publish, Publish::BeforeReset | Publish::AndCopyBeforeReset);
        if early {
            publish_all();
        }
        if publish == Publish::AndCopyBeforeReset {
            self.kernel.copy();
        }
        if !skip_reset {
            self.kernel.reset();
        }
        if !early {
            publish_all();
        }
    }

    /// The vCPU writes, serving its own full exits by slices of one page.
    fn write(&self, page: usize, value: u32) {
        // While another pass has collected all and not reset yet, there is nothing to free: once round for each entry.
        for _ in 0..ENTRIES {
            if self.kernel.write(page, value) == Write::Done {
                return;
            }
            self.pass(Publish::AfterReset, Some(1));
        }
        panic!("a wedged ring");
    }

    /// Everybody has stopped: the last sync takes all that is left, or what leaves a slice.
    fn end(&self, slice: Option<u32>) {
        self.pass(Publish::AfterReset, slice);
        self.kernel.copy();
        self.kernel.assert_nothing_is_lost();
    }
}

/// The vCPU writes while a migration takes the log and copies what it got, beside `others` that only take the log.
fn migration(publish: Publish, writes: &[usize], others: usize) {
    let vm = Vm::new();
    let migration = thread::spawn({
        let vm = vm.clone();
        move || {
            vm.pass(publish, None);
            vm.kernel.copy();
        }
    });
    let others: Vec<_> = (0..others)
        .map(|_| {
            let vm = vm.clone();
            thread::spawn(move || vm.pass(publish, None))
        })
        .collect();
    for (value, page) in (1..).zip(writes) {
        vm.write(*page, value);
    }
    migration.join().expect("no panic");
    for other in others {
        other.join().expect("no panic");
    }
    vm.end(None);
}

/// Two passes beside a vCPU have more executions than can be explored: up to so many preemptions.
const PASSES: Option<usize> = Some(if FULL { 3 } else { 2 });

const WRITES: &[usize] = if FULL { &[0, 1, 0] } else { &[0, 0] };

#[test]
fn no_page_is_lost_in_a_pass() {
    holds("no_page_is_lost_in_a_pass", ALL, 100, || migration(Publish::AfterReset, WRITES, 0));
}

#[test]
fn twin_copies_before_the_reset() {
    fails("copy before reset", ALL, None, "lost page", || migration(Publish::AndCopyBeforeReset, WRITES, 0));
}

#[test]
fn no_page_is_lost_in_concurrent_passes() {
    holds("no_page_is_lost_in_concurrent_passes", PASSES, 1000, || migration(Publish::AfterReset, &[0, 0], 1));
}

#[test]
fn twin_publishes_before_the_reset() {
    fails("publish before reset", PASSES, None, "lost page", || migration(Publish::BeforeReset, &[0, 0], 1));
}

#[test]
fn twin_publishes_what_another_threads_reset_gave_back() {
    fails("publish when given back", PASSES, None, "lost page", || migration(Publish::WhenGivenBack, &[0, 0], 1));
}

#[test]
fn twin_publishes_relaxed() {
    fails("publish relaxed", PASSES, None, "lost page", || migration(Publish::Relaxed, &[0, 0], 1));
}

/// A full ring: the vCPU frees a slice of one page at each exit, holding the rest back, beside a pass of the migration.
fn held_back(last: Option<u32>) {
    let vm = Vm::new();
    for page in 0..ENTRIES - 1 {
        vm.write(page, 1);
    }
    let migration = thread::spawn({
        let vm = vm.clone();
        move || {
            vm.pass(Publish::AfterReset, None);
            vm.kernel.copy();
        }
    });
    vm.pass(Publish::AfterReset, Some(1));
    vm.write(0, 2);
    vm.write(1, 3);
    migration.join().expect("no panic");
    vm.end(last);
}

#[test]
fn no_page_is_lost_while_entries_are_held_back() {
    holds("no_page_is_lost_while_entries_are_held_back", PASSES, 1500, || held_back(None));
}

#[test]
fn twin_holds_back_in_the_last_sync() {
    fails("held back to the end", PASSES, None, "lost page", || held_back(Some(1)));
}
