//! The ring's consumer over memory that anybody may write anything to, against lists of the entries' places: no state
//! of the memory makes it panic, loop, go back or see an entry twice, and it passes on exactly what the memory says.
#![no_main]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use dirtylimit_core::{Entry, PML, Page, RESERVED, Ring};
use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};

const DIRTY: u32 = 1;
const COLLECTED: u32 = 2;

#[derive(Arbitrary, Debug)]
struct Input {
    /// 128 to 1,024 entries.
    size: u8,
    start: u32,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A hostile or broken kernel, or a guest that got at the ring: any word of any entry, at any time.
    Write {
        at: u16,
        word: u8,
        value: u32,
    },
    /// The same, for a run of entries and with flags that mean something.
    Flags {
        at: u16,
        count: u8,
        flags: u8,
    },
    /// A well-behaved kernel logs pages where it is to,
    Log {
        count: u16,
    },
    /// and resets what was collected.
    Reset {
        count: u16,
    },
    Meter,
    Collect {
        count: u32,
    },
    /// While the consumer looks (the first so many entries of it), somebody writes a word of an entry a little further on.
    Race {
        collect: bool,
        writes: u8,
        ahead: i8,
        word: u8,
        value: u32,
    },
    Reclaim,
    Learn,
    Slice {
        pages: u32,
    },
}

/// What the memory holds, as it is laid out for the kernel: flags, slot, and the offset's two words.
#[repr(C, align(8))]
struct Raw([AtomicU32; 4]);

impl Raw {
    fn word(&self, word: usize) -> u32 {
        self.0[word & 3].load(Relaxed)
    }

    fn page(&self) -> Page {
        let words = [self.word(2).to_ne_bytes(), self.word(3).to_ne_bytes()];
        let mut offset = [0; 8];
        offset.copy_from_slice(words.as_flattened());
        Page { slot: self.word(1), offset: u64::from_ne_bytes(offset) }
    }
}

fn as_entries(raw: &[Raw]) -> &[Entry] {
    const { assert!(size_of::<Raw>() == size_of::<Entry>() && align_of::<Raw>() == align_of::<Entry>()) };
    // SAFETY: an entry is four 32-bit atomics in the kernel's layout (repr(C), of the size and alignment asserted), any
    // bits of which are valid; both views are shared and change the words by atomic operations alone.
    unsafe { std::slice::from_raw_parts(raw.as_ptr().cast(), raw.len()) }
}

/// The places of the entries in the consumer's hands, oldest first, and the next that it will look at.
struct Oracle<'a> {
    memory: &'a [Raw],
    next: usize,
    held: VecDeque<usize>,
    waiting: VecDeque<usize>,
}

impl Oracle<'_> {
    fn meter(&mut self) -> Vec<Page> {
        let mut pages = vec![];
        while self.held.len() + self.waiting.len() < self.memory.len() && self.memory[self.next].word(0) == DIRTY {
            pages.push(self.memory[self.next].page());
            self.held.push_back(self.next);
            self.next = (self.next + 1) % self.memory.len();
        }
        pages
    }

    fn collect(&mut self, count: u32) -> Vec<Page> {
        let count = self.held.len().min(count as usize);
        let places: Vec<_> = self.held.drain(..count).collect();
        self.waiting.extend(&places);
        places.iter().map(|&at| self.memory[at].page()).collect()
    }

    /// So many entries were collected or metered, whatever was in them.
    fn take(&mut self, collect: bool, count: usize) {
        if collect {
            assert_eq!(count, self.held.len());
            self.waiting.extend(self.held.drain(..));
            return;
        }
        for _ in 0..count {
            self.held.push_back(self.next);
            self.next = (self.next + 1) % self.memory.len();
        }
    }

    fn reclaim(&mut self) -> usize {
        let before = self.waiting.len();
        while self.waiting.front().is_some_and(|&at| self.memory[at].word(0) != COLLECTED) {
            self.waiting.pop_front();
        }
        before - self.waiting.len()
    }
}

fn check(ring: &Ring<&[Entry]>, oracle: &Oracle<'_>) {
    assert_eq!(ring.held_back() as usize, oracle.held.len());
    assert_eq!(ring.awaiting_reset() as usize, oracle.waiting.len());
    assert_eq!(ring.occupied(), ring.held_back() + ring.awaiting_reset());
    assert!(ring.occupied() <= ring.size());
    let soft = ring.soft_limit();
    assert!(0 < soft && soft <= ring.size() - RESERVED && soft + PML + RESERVED >= ring.size().min(PML + RESERVED + 1));
    let mut held = vec![];
    ring.for_each_held_back(|page| held.push(page));
    assert!(held.iter().eq(&oracle.held.iter().map(|&at| oracle.memory[at].page()).collect::<Vec<_>>()));
}

fuzz_target!(|input: Input| {
    let size = 128usize << (input.size & 3);
    let memory: Vec<_> = (0..size).map(|_| Raw(Default::default())).collect();
    let at = |index: usize| &memory[index % size];
    let start = input.start as usize % size;
    let mut ring = Ring::starting_at(as_entries(&memory), input.start).expect("a power of two above 64");
    let mut oracle = Oracle { memory: &memory, next: start, held: VecDeque::new(), waiting: VecDeque::new() };
    // Where the well-behaved kernel logs and resets next.
    let (mut log, mut reset) = (start, start);

    for step in input.steps {
        match step {
            Step::Write { at: index, word, value } => at(index.into()).0[usize::from(word) & 3].store(value, Relaxed),
            Step::Flags { at: index, count, flags } => {
                (0..count.into()).for_each(|i| at(usize::from(index) + i).0[0].store(u32::from(flags & 3), Relaxed));
            }
            Step::Log { count } => {
                for _ in 0..usize::from(count).min(size) {
                    if at(log).word(0) != 0 {
                        break;
                    }
                    as_entries(&memory)[log].push(Page { slot: log as u32, offset: (log as u64) << 40 | 7 });
                    log = (log + 1) % size;
                }
            }
            Step::Reset { count } => {
                for _ in 0..count {
                    let expected = at(reset).page();
                    match as_entries(&memory)[reset].reset() {
                        Some(page) => assert_eq!(page, expected),
                        None => break,
                    }
                    reset = (reset + 1) % size;
                }
            }
            Step::Meter => {
                let mut pages = vec![];
                let count = ring.meter(|page| pages.push(page));
                assert_eq!(pages, oracle.meter());
                assert_eq!(count as usize, pages.len());
            }
            Step::Collect { count } => {
                let mut pages = vec![];
                let collected = ring.collect(count, |page| pages.push(page));
                assert_eq!(pages, oracle.collect(count));
                assert_eq!(collected as usize, pages.len());
                let marked = oracle.waiting.iter().rev().take(pages.len());
                marked.for_each(|&place| assert_eq!(memory[place].word(0), COLLECTED, "left unmarked"));
            }
            Step::Race { collect, writes, ahead, word, value } => {
                let (mut place, mut seen) =
                    (if collect { size + oracle.next - oracle.held.len() } else { oracle.next }, 0);
                let each = |_| {
                    if seen < u32::from(writes) {
                        at((size + place).wrapping_add_signed(ahead.into())).0[usize::from(word) & 3]
                            .store(value, Relaxed);
                    }
                    (place, seen) = (place + 1, seen + 1);
                };
                // Which pages it saw is for the writer to say; how many, and which places, is not.
                let count = if collect { ring.collect(u32::MAX, each) } else { ring.meter(each) };
                assert_eq!(count, seen);
                oracle.take(collect, count as usize);
            }
            Step::Reclaim => assert_eq!(ring.reclaim() as usize, oracle.reclaim()),
            Step::Learn => ring.full_exit(),
            Step::Slice { pages } => {
                let count = ring.to_collect(pages);
                assert!(count <= ring.held_back());
                // All held back that the ring has room for: just the slice is left below the soft limit.
                let left = ring.held_back() - count;
                assert!(left + pages.clamp(1, ring.soft_limit()) <= ring.soft_limit() || count == ring.held_back());
                assert!(count == 0 || left + pages.clamp(1, ring.soft_limit()) == ring.soft_limit());
            }
        }
        check(&ring, &oracle);
    }
});
