//! A model of KVM with a guest that writes its memory: as much of virt/kvm/dirty_ring.c as can lose a page.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU32, Ordering};

use crate::ring::{Entry, Page};

/// Entries of the one ring; with the shim's `RESERVED` its soft limit is one less.
pub const ENTRIES: usize = 4;
/// Pages of guest memory.
pub const PAGES: usize = 3;

/// Kernel, guest memory and the copy that a migration makes of it.
#[derive(Debug)]
pub struct Kernel {
    entries: Vec<Entry>,
    /// One for each entry: written with it by the kernel, read with it by the consumer; loom reports a race on it.
    contents: Vec<UnsafeCell<()>>,
    /// Where the kernel logs next. Written by the vCPU's thread.
    dirty: AtomicU32,
    /// Up to where reset has emptied entries. Written under `slots`.
    reset: AtomicU32,
    /// `slots_lock`: one reset at a time.
    slots: Mutex<()>,
    /// `mmu_lock`, and what hardware does at a TLB flush: whether each page may be written unlogged. A write of the guest
    /// happens under it, since a flush waits for the writes under way.
    writable: Mutex<[bool; PAGES]>,
    memory: [AtomicU32; PAGES],
    /// The sink: one bit for each published page.
    published: AtomicU32,
    /// The migration's copy.
    copy: [AtomicU32; PAGES],
}

/// What [`Kernel::write`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Write {
    /// Written; the page was logged before or just now.
    Done,
    /// Not written: the vCPU exits with a full ring.
    Full,
}

/// The entries of a kernel, as the ring's consumer maps them.
#[derive(Clone, Debug)]
pub struct Mapping(pub Arc<Kernel>);

impl AsRef<[Entry]> for Mapping {
    fn as_ref(&self) -> &[Entry] {
        &self.0.entries
    }
}

impl Default for Kernel {
    fn default() -> Self {
        Self::starting_at(0)
    }
}

impl Kernel {
    /// A kernel whose ring counters start at `start`; every page is protected and zero, and so is the copy.
    pub fn starting_at(start: u32) -> Self {
        Self {
            entries: (0..ENTRIES).map(|_| Entry::new()).collect(),
            contents: (0..ENTRIES).map(|_| UnsafeCell::new(())).collect(),
            dirty: AtomicU32::new(start),
            reset: AtomicU32::new(start),
            slots: Mutex::new(()),
            writable: Mutex::new([false; PAGES]),
            memory: [(); PAGES].map(|()| AtomicU32::new(0)),
            published: AtomicU32::new(0),
            copy: [(); PAGES].map(|()| AtomicU32::new(0)),
        }
    }

    fn at(index: u32) -> usize {
        index as usize % ENTRIES
    }

    /// The guest writes `value` to `page`. For the vCPU's thread alone.
    pub fn write(&self, page: usize, value: u32) -> Write {
        let dirty = self.dirty.load(Ordering::Relaxed);
        // Pairs with the release in `reset`, as the kernel's own locking does.
        if dirty.wrapping_sub(self.reset.load(Ordering::Acquire)) as usize >= ENTRIES - 1 {
            return Write::Full;
        }
        let mut writable = self.writable.lock().expect("not poisoned");
        if !writable[page] {
            writable[page] = true;
            self.log(dirty, page);
        }
        self.memory[page].store(value, Ordering::Relaxed);
        Write::Done
    }

    fn log(&self, dirty: u32, page: usize) {
        self.contents[Self::at(dirty)].with_mut(|_| ());
        // The page's number in each word, so that a torn entry shows.
        let number = u32::try_from(page).expect("few pages") + 1;
        let page = Page { slot: number, offset: u64::from(number) << 32 | u64::from(number) };
        self.entries[Self::at(dirty)].push(page);
        self.dirty.store(dirty.wrapping_add(1), Ordering::Relaxed);
    }

    /// Whether the ring has room for an entry. For the vCPU's thread alone.
    pub fn room(&self) -> bool {
        let used = self.dirty.load(Ordering::Relaxed).wrapping_sub(self.reset.load(Ordering::Acquire)); // as in `write`
        (used as usize) < ENTRIES
    }

    /// An entry without a write, for models of the ring alone. The vCPU's thread makes sure that there is room.
    ///
    /// # Panics
    /// Where there is none.
    pub fn push(&self, page: usize) {
        assert!(self.room(), "the ring overflows");
        self.log(self.dirty.load(Ordering::Relaxed), page);
    }

    /// The consumer reads the entry at `index`: which page it names.
    ///
    /// # Panics
    /// Where the entry is torn, or loom sees the kernel write it meanwhile.
    pub fn read(&self, index: u32, page: Page) -> usize {
        self.contents[Self::at(index)].with(|_| ());
        let number = page.slot;
        assert_eq!(page.offset, u64::from(number) << 32 | u64::from(number), "torn entry");
        assert_ne!(number, 0, "torn entry");
        number as usize - 1
    }

    /// `KVM_RESET_DIRTY_RINGS`: empties what is collected, from the oldest on, and then protects its pages.
    pub fn reset(&self) -> u32 {
        let _slots = self.slots.lock().expect("not poisoned");
        let mut pages = vec![];
        let mut reset = self.reset.load(Ordering::Relaxed);
        while let Some(page) = self.entries[Self::at(reset)].reset() {
            pages.push(page);
            reset = reset.wrapping_add(1);
            // Room for the vCPU at once, before its page is protected: as `reset_index` in the kernel.
            self.reset.store(reset, Ordering::Release);
        }
        if !pages.is_empty() {
            let mut writable = self.writable.lock().expect("not poisoned");
            for page in &pages {
                writable[page.slot as usize - 1] = false;
            }
        }
        u32::try_from(pages.len()).expect("a ring of few")
    }

    /// Publishes a page to the migration. From any thread.
    pub fn publish(&self, page: usize, order: Ordering) {
        // Release: pairs with the acquire in `copy`, which then sees what the guest wrote before the reset.
        self.published.fetch_or(1 << page, order);
    }

    /// The migration takes what is published and copies it. For its thread alone.
    pub fn copy(&self) {
        let published = self.published.swap(0, Ordering::Acquire);
        for page in (0..PAGES).filter(|page| published & 1 << page != 0) {
            self.copy[page].store(self.memory[page].load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// After the last sync, with nobody else running.
    ///
    /// # Panics
    /// Where the copy differs from the guest's memory.
    pub fn assert_nothing_is_lost(&self) {
        for (page, (memory, copy)) in self.memory.iter().zip(&self.copy).enumerate() {
            let (memory, copy) = (memory.load(Ordering::Relaxed), copy.load(Ordering::Relaxed));
            assert_eq!(copy, memory, "lost page {page}");
        }
    }
}
