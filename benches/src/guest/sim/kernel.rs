//! The modelled kernel: the guest's pages with their protection, the rings that it pushes to, and reset.

use std::rc::Rc;

use anyhow::{Result, ensure};
use dirtylimit_core::{Entry, PML, Page, RESERVED};

/// The one memory slot.
const SLOT: u32 = 0;
/// The largest ring of today's kernels.
const MAX_RING: u32 = 65_536;

/// One page, as the kernel, the adapter and the migration see it.
#[derive(Clone, Copy, Default, Debug)]
struct PageState {
    /// Counts the guest's writes.
    version: u32,
    /// The version that the migration copied last.
    copy: u32,
    flags: u8,
}

/// The kernel has mapped it.
const MAPPED: u8 = 1;
/// Writes go unnoticed: it was logged, and not reset since.
const WRITABLE: u8 = 2;
/// The adapter metered it, and has not published it since.
const LOGGED: u8 = 4;
/// The adapter published it since it was last taken.
const DIRTY: u8 = 8;

/// What publishing a page did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Published {
    /// It was clean.
    New,
    /// It was dirty already, and metered since: it is sent once less than metered.
    Merged,
    /// It was dirty already.
    Again,
}

/// All of the guest's pages.
#[derive(Debug)]
pub(super) struct Memory(Vec<PageState>);

impl Memory {
    pub(super) fn new(pages: usize) -> Self {
        Self(vec![PageState::default(); pages])
    }

    /// Sets or clears a flag; whether it was set.
    fn put(&mut self, page: Page, flag: u8, value: bool) -> bool {
        let flags = &mut self.0[index(page)].flags;
        let was_set = *flags & flag != 0;
        *flags = if value { *flags | flag } else { *flags & !flag };
        was_set
    }

    /// Notes that the adapter metered a page; whether it is to be sent once more than before.
    pub(super) fn meter(&mut self, page: Page) -> bool {
        !self.put(page, LOGGED, true)
    }

    /// Publishes a page: whoever migrates copies it as it is now.
    pub(super) fn publish(&mut self, page: Page) -> Published {
        let state = &mut self.0[index(page)];
        state.copy = state.version;
        let was_dirty = self.put(page, DIRTY, true);
        let was_logged = self.put(page, LOGGED, false);
        match was_dirty {
            false => Published::New,
            true if was_logged => Published::Merged,
            true => Published::Again,
        }
    }

    /// Hands a published page out: from now on it is clean.
    pub(super) fn take(&mut self, page: Page) {
        self.put(page, DIRTY, false);
    }

    /// Pages that the migration has wrong.
    pub(super) fn lost(&self) -> u64 {
        self.0.iter().filter(|page| page.version != page.copy).count() as u64
    }
}

/// The model's kernel names no slot but [`SLOT`], and no page beyond its end.
#[expect(clippy::cast_possible_truncation, reason = "a page of `Memory`, whose length is a usize")]
fn index(page: Page) -> usize {
    page.offset as usize
}

/// What an access made of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Access {
    /// Nothing that anybody noticed.
    Plain,
    /// A fault; the page is in the ring.
    Fault,
    /// The CPU logged it; `full`: that was the last place in its log, which the kernel then emptied into the ring.
    Logged { full: bool },
}

/// One vCPU's ring, from the kernel's side.
#[derive(Debug)]
pub(super) struct KernelRing {
    entries: Rc<[Entry]>,
    /// Entries pushed, and reset; they run freely and wrap.
    pushed: u32,
    reset: u32,
    soft: u32,
    /// The CPU's page modification log, where it has one.
    log: Option<Vec<Page>>,
    /// The vCPU's steal-time page, where the guest has turned that on.
    steal: Option<usize>,
}

impl KernelRing {
    /// # Errors
    /// A size that the kernel refuses.
    pub(super) fn new(size: u32, pml: bool, steal: Option<usize>) -> Result<Self> {
        let reserved = RESERVED + if pml { PML } else { 0 };
        ensure!(
            size.is_power_of_two() && size > reserved && size <= MAX_RING,
            "a dirty ring of {size} entries: the number must be a power of two above {reserved}, at most {MAX_RING}"
        );
        let entries = (0..size).map(|_| Entry::new()).collect();
        Ok(Self { entries, pushed: 0, reset: 0, soft: size - reserved, log: pml.then(Vec::new), steal })
    }

    /// The entries, as the adapter maps them.
    pub(super) fn entries(&self) -> Rc<[Entry]> {
        self.entries.clone()
    }

    fn entry(&self, index: u32) -> &Entry {
        &self.entries[index as usize & (self.entries.len() - 1)]
    }

    fn push(&mut self, page: Page) {
        let used = self.pushed.wrapping_sub(self.reset) as usize;
        assert!(used < self.entries.len(), "the model let a vCPU run on with a full ring");
        self.entry(self.pushed).push(page);
        self.pushed = self.pushed.wrapping_add(1);
    }

    /// Whether the vCPU may not run.
    pub(super) fn is_full(&self) -> bool {
        self.pushed.wrapping_sub(self.reset) >= self.soft
    }

    /// The guest touches a page.
    pub(super) fn touch(&mut self, memory: &mut Memory, page: usize, write: bool) -> Access {
        let state = &mut memory.0[page];
        state.version = state.version.wrapping_add(u32::from(write));
        let known = state.flags;
        if known & MAPPED != 0 && (!write || known & WRITABLE != 0) {
            return Access::Plain;
        }
        state.flags |= MAPPED | WRITABLE;
        let page = Page { slot: SLOT, offset: page as u64 };
        match &mut self.log {
            Some(log) if known & MAPPED != 0 => {
                log.push(page);
                let full = log.len() >= PML as usize;
                if full {
                    self.flush();
                }
                Access::Logged { full }
            }
            // A first touch maps the page writable and logs it, even a read.
            _ => {
                self.push(page);
                Access::Fault
            }
        }
    }

    /// The vCPU is about to enter the guest, or has left it for the VMM: KVM writes its steal-time page, and logs that
    /// whether or not it is protected.
    pub(super) fn account(&mut self, memory: &mut Memory) {
        let Some(page) = self.steal else { return };
        let state = &mut memory.0[page];
        state.version = state.version.wrapping_add(1);
        state.flags |= MAPPED | WRITABLE;
        self.push(Page { slot: SLOT, offset: page as u64 });
    }

    /// Empties the CPU's modification log into the ring, as at every exit.
    pub(super) fn flush(&mut self) {
        if let Some(mut log) = self.log.take() {
            log.drain(..).for_each(|page| self.push(page));
            self.log = Some(log);
        }
    }

    /// This ring's part of `KVM_RESET_DIRTY_RINGS`: takes what was collected, in order, and protects it again.
    pub(super) fn reset(&mut self, memory: &mut Memory) {
        while let Some(page) = self.entry(self.reset).reset() {
            memory.0[index(page)].flags &= !WRITABLE;
            self.reset = self.reset.wrapping_add(1);
        }
    }
}
