//! A VM that is no KVM, for tests: its vCPUs' rings are memory files, and a script says how its resets go wrong.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use dirtylimit_core::{Page, RESERVED};
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, KVM_EXIT_DIRTY_RING_FULL, kvm_run};

use crate::sys::{self, Kernel, Reset, RingPages};
use crate::{Config, DirtyLimit, Error};

pub(crate) const SLOT: u32 = 3;
pub(crate) const PAGES: u64 = 10_000;

/// How a reset goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goes {
    /// Well, but it returns so many.
    WellAnd(u32),
    /// It is interrupted after this number of entries, forgets what it has gathered, and returns the number.
    Short(u32),
    /// The same, and the thread stays on its CPU meanwhile.
    ShortUntold(u32),
    /// The same, but it fails with this error.
    ShortFails(u32, i32),
    /// It gives back all, but is interrupted before it has protected what it has gathered last.
    Disturbed,
    /// The same, by a stop that was taken back at once: nothing shows it.
    Unseen,
    /// It goes well, but looks disturbed.
    FalseAlarm,
    /// Well, and then the guest of the first vCPU writes a page.
    ThenWrites(u64),
    /// It does nothing, and says so.
    Nothing,
    /// It does nothing but fail.
    Fails(i32),
}

#[derive(Debug)]
struct FakeRing {
    file: File,
    pages: RingPages,
    entries: u32,
    dirty_index: u32,
    reset_index: u32,
    /// What the CPU has logged and not handed over.
    log: Vec<Page>,
}

#[derive(Debug, Default)]
struct State {
    caps: HashMap<u32, u32>,
    refuses: HashMap<u32, i32>,
    enabled: Vec<(u32, u64)>,
    rings: Vec<FakeRing>,
    /// For each page that was ever written: its number of writes, and whether the next one is logged.
    memory: HashMap<Page, (u64, bool)>,
    /// Pages that a CPU logs before it hands them over, as with Intel's PML, unless it leaves the guest before; 0: none.
    lump: u32,
    script: VecDeque<Goes>,
    /// When the script is over.
    always: Option<Goes>,
    resets: u32,
    /// Each call of `KVM_GET_DIRTY_LOG`, with this.
    backup_fails: Option<i32>,
    /// The signals that were blocked in each reset: the kernel's set.
    blocked: Vec<u64>,
}

/// The VM. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fake(Arc<Mutex<State>>);

impl Fake {
    /// With capability 223, for rings of up to 65,536 entries.
    pub(crate) fn new() -> Self {
        Self::default().with(223, 1 << 20)
    }

    pub(crate) fn with(self, capability: u32, value: u32) -> Self {
        self.state().caps.insert(capability, value);
        self
    }

    pub(crate) fn refusing(self, capability: u32, errno: i32) -> Self {
        self.state().refuses.insert(capability, errno);
        self
    }

    /// A CPU that hands pages over in lumps, for which the ring keeps more in reserve.
    pub(crate) fn with_lumps(self, lump: u32) -> Self {
        self.state().lump = lump;
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn limit(&self, config: &Config) -> Result<DirtyLimit, Error> {
        DirtyLimit::on(Box::new(self.clone()), config)
    }

    /// A limiter with one slot, and rings of 1,024 entries: 960 to the soft limit.
    pub(crate) fn small(&self) -> DirtyLimit {
        let limit = self.limit(&Config::new().ring_entries(1024)).unwrap();
        limit.add_slot(SLOT, PAGES).unwrap();
        limit
    }

    /// What was enabled, in order.
    pub(crate) fn enabled(&self) -> Vec<(u32, u64)> {
        self.state().enabled.clone()
    }

    /// `KVM_RESET_DIRTY_RINGS` calls.
    pub(crate) fn resets(&self) -> u32 {
        self.state().resets
    }

    /// The signals that were blocked in each reset so far.
    pub(crate) fn blocked(&self) -> Vec<u64> {
        self.state().blocked.clone()
    }

    /// How `KVM_GET_DIRTY_LOG` fails from now on.
    pub(crate) fn backup_fails(&self, errno: Option<i32>) {
        self.state().backup_fails = errno;
    }

    /// How the next resets go.
    pub(crate) fn script(&self, goes: impl IntoIterator<Item = Goes>) {
        self.state().script.extend(goes);
    }

    /// How resets go when the script is over.
    pub(crate) fn always(&self, goes: Option<Goes>) {
        self.state().always = goes;
    }

    /// A new vCPU's descriptor, with a ring of `entries`.
    pub(crate) fn vcpu(&self, entries: u32) -> File {
        // SAFETY: the name is a C string; the descriptor is new, and ours.
        let file = unsafe {
            let fd = libc::memfd_create(c"vcpu".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from(OwnedFd::from_raw_fd(fd))
        };
        let page = u64::from(sys::page_size());
        file.set_len(u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * page + u64::from(entries) * 16).unwrap();
        // One that has no ring is no vCPU of this VM.
        if let Some(pages) = RingPages::map(file.as_raw_fd(), entries.max(1)).unwrap() {
            let own = file.try_clone().unwrap();
            self.state().rings.push(FakeRing {
                file: own,
                pages,
                entries,
                dirty_index: 0,
                reset_index: 0,
                log: Vec::new(),
            });
        }
        file
    }

    /// The guest writes a page on vCPU `vcpu`; `false` where KVM exits first, with a full ring.
    pub(crate) fn write(&self, vcpu: usize, page: Page) -> bool {
        self.state().write(vcpu, page)
    }

    /// KVM_RUN returns with a full ring, wherever that is.
    pub(crate) fn exit_full(&self, vcpu: usize) {
        self.state().exit_full(vcpu);
    }

    /// The vCPU leaves the guest for a moment, as for a timer's interrupt: its CPU hands over what it has logged.
    pub(crate) fn interrupt(&self, vcpu: usize) {
        self.state().rings[vcpu].hand_over();
    }

    /// Writes the pages `offsets` of [`SLOT`] in turn, up to a full exit; how many were written.
    pub(crate) fn write_all(&self, vcpu: usize, offsets: impl IntoIterator<Item = u64>) -> u32 {
        let written = offsets.into_iter().take_while(|&offset| self.write(vcpu, Page { slot: SLOT, offset })).count();
        u32::try_from(written).unwrap()
    }

    /// `KVM_RUN` up to a full exit: before the guest's first instruction and after its last KVM logs its own page of [`SLOT`],
    /// if there is one, whether it is logged already or not. Returns how many pages of [`SLOT`] the guest wrote.
    pub(crate) fn run(&self, vcpu: usize, own: Option<u64>, offsets: &mut impl Iterator<Item = u64>) -> u32 {
        let state = &mut *self.state();
        if state.is_full(vcpu) {
            state.exit_full(vcpu);
            return 0;
        }
        let mut written = 0;
        state.push_own(vcpu, own);
        while !state.is_full(vcpu) {
            let Some(offset) = offsets.next() else { break };
            state.store(vcpu, Page { slot: SLOT, offset });
            written += 1;
        }
        state.exit_full(vcpu);
        state.push_own(vcpu, own);
        written
    }

    /// The ring says full and holds nothing for us, as after KVM wrote past its reserved entries.
    pub(crate) fn wedge(&self, vcpu: usize) {
        let ring = &mut self.state().rings[vcpu];
        ring.dirty_index = ring.dirty_index.wrapping_add(ring.entries);
    }

    /// Times that a page of [`SLOT`] was written.
    pub(crate) fn writes(&self, offset: u64) -> u64 {
        self.state().memory.get(&Page { slot: SLOT, offset }).map_or(0, |(writes, _)| *writes)
    }
}

/// Sets `kvm_run.immediate_exit` of a vCPU.
pub(crate) fn immediate_exit(vcpu: &File, value: bool) {
    vcpu.write_all_at(&[value.into()], offset_of!(kvm_run, immediate_exit) as u64).unwrap();
}

/// Pages that a reset will protect together, as the kernel's gathers them: one slot, one window of 64.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Gathered {
    slot: u32,
    first: u64,
    mask: u64,
}

impl Gathered {
    /// Adds the next entry's page; those that are to be protected first, where it does not fit to them.
    pub(crate) fn add(&mut self, page: Page) -> Self {
        if self.mask != 0 && page.slot == self.slot {
            let (ahead, behind) = (page.offset.wrapping_sub(self.first), self.first.wrapping_sub(page.offset));
            if ahead < 64 {
                self.mask |= 1 << ahead;
                return Self::default();
            }
            if behind < 64 && self.mask << behind >> behind == self.mask {
                (self.first, self.mask) = (page.offset, self.mask << behind | 1);
                return Self::default();
            }
        }
        std::mem::replace(self, Self { slot: page.slot, first: page.offset, mask: 1 })
    }

    pub(crate) fn pages(self) -> Vec<Page> {
        let offsets = (0..64).filter(|bit| self.mask >> bit & 1 == 1).map(|bit| self.first.wrapping_add(bit));
        offsets.map(|offset| Page { slot: self.slot, offset }).collect()
    }
}

impl FakeRing {
    fn push(&mut self, page: Page) {
        self.pages.as_ref()[(self.dirty_index % self.entries) as usize].push(page);
        self.dirty_index = self.dirty_index.wrapping_add(1);
    }

    fn hand_over(&mut self) {
        let logged = std::mem::take(&mut self.log);
        logged.into_iter().for_each(|page| self.push(page));
    }
}

impl State {
    /// As [`Fake::write`].
    fn write(&mut self, vcpu: usize, page: Page) -> bool {
        if self.is_full(vcpu) {
            self.exit_full(vcpu);
            return false;
        }
        self.store(vcpu, page);
        true
    }

    fn is_full(&self, vcpu: usize) -> bool {
        let ring = &self.rings[vcpu];
        ring.dirty_index.wrapping_sub(ring.reset_index) >= ring.entries - RESERVED - self.lump
    }

    fn exit_full(&mut self, vcpu: usize) {
        let reason = KVM_EXIT_DIRTY_RING_FULL.to_ne_bytes();
        let ring = &mut self.rings[vcpu];
        ring.hand_over();
        ring.file.write_all_at(&reason, offset_of!(kvm_run, exit_reason) as u64).unwrap();
    }

    /// KVM logs a page itself, whether it is logged already or not.
    fn push_own(&mut self, vcpu: usize, own: Option<u64>) {
        if let Some(offset) = own {
            let page = Page { slot: SLOT, offset };
            let (writes, armed) = self.memory.entry(page).or_insert((0, true));
            (*writes, *armed) = (*writes + 1, false);
            self.rings[vcpu].push(page);
        }
    }

    /// Writes a page, and logs it if it is armed.
    fn store(&mut self, vcpu: usize, page: Page) {
        let ring = &mut self.rings[vcpu];
        let (writes, armed) = self.memory.entry(page).or_insert((0, true));
        *writes += 1;
        if std::mem::take(armed) {
            ring.log.push(page);
            if ring.log.len() >= self.lump as usize {
                ring.hand_over();
            }
        }
    }

    /// Resets ring by ring, until all is done or, before the next entry, as many were given back as `interrupted` says: then
    /// what that ring has gathered is forgotten, or with `at_end` what the last ring has. Returns how many were given back.
    fn reset(&mut self, interrupted: Option<u32>, at_end: bool) -> u32 {
        let Self { rings, memory, .. } = self;
        let mut protect = |gathered: Gathered| {
            gathered.pages().iter().for_each(|page| memory.get_mut(page).unwrap().1 = true);
        };
        let mut given = 0;
        let mut last = Gathered::default();
        for ring in rings {
            let mut gathered = Gathered::default();
            loop {
                if interrupted == Some(given) {
                    protect(last);
                    return given;
                }
                let Some(page) = ring.pages.as_ref()[(ring.reset_index % ring.entries) as usize].reset() else { break };
                ring.reset_index = ring.reset_index.wrapping_add(1);
                given += 1;
                protect(gathered.add(page));
            }
            if gathered.mask != 0 {
                protect(std::mem::replace(&mut last, gathered));
            }
        }
        if !at_end {
            protect(last);
        }
        given
    }
}

impl Kernel for Fake {
    fn check(&self, capability: u32) -> io::Result<u32> {
        Ok(self.state().caps.get(&capability).copied().unwrap_or(0))
    }

    fn enable(&self, capability: u32, argument: u64) -> io::Result<()> {
        let mut state = self.state();
        match state.refuses.get(&capability) {
            Some(errno) => return Err(io::Error::from_raw_os_error(*errno)),
            None => state.enabled.push((capability, argument)),
        }
        Ok(())
    }

    fn reset(&self) -> io::Result<Reset> {
        let state = &mut *self.state();
        state.resets += 1;
        state.blocked.push(sys::blocked_signals());
        let (entries, disturbed) = match state.script.pop_front().or(state.always) {
            None => (state.reset(None, false), false),
            Some(Goes::WellAnd(answer)) => {
                state.reset(None, false);
                (answer, false)
            }
            // Where it stops at the very end, that the thread was switched out is the only sign.
            Some(Goes::Short(count)) => (state.reset(Some(count), false), true),
            Some(Goes::ShortUntold(count)) => (state.reset(Some(count), false), false),
            Some(Goes::ShortFails(count, errno)) => {
                state.reset(Some(count), false);
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(Goes::Disturbed) => (state.reset(None, true), true),
            Some(Goes::Unseen) => (state.reset(None, true), false),
            Some(Goes::FalseAlarm) => (state.reset(None, false), true),
            Some(Goes::ThenWrites(offset)) => {
                let entries = state.reset(None, false);
                state.write(0, Page { slot: SLOT, offset });
                (entries, false)
            }
            Some(Goes::Nothing) => (0, false),
            Some(Goes::Fails(errno)) => return Err(io::Error::from_raw_os_error(errno)),
        };
        Ok(Reset { entries, disturbed })
    }

    fn backup_log(&self, _slot: u32, words: &mut [u64]) -> io::Result<()> {
        let fails = self.state().backup_fails;
        if let Some(errno) = fails {
            return Err(io::Error::from_raw_os_error(errno));
        }
        // One page of the GIC's tables, dirtied outside any vCPU.
        words[1] |= 1 << 5;
        Ok(())
    }
}

/// The pages of a dirty log.
pub(crate) fn pages(log: &[u64]) -> Vec<u64> {
    let bits = |(word, first): (&u64, u64)| {
        let word = *word;
        (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit)
    };
    log.iter().zip((0..).step_by(64)).flat_map(bits).collect()
}

/// A copy of [`SLOT`] that only the dirty log feeds.
#[derive(Default, Debug)]
pub(crate) struct Copy(HashMap<u64, u64>);

impl Copy {
    pub(crate) fn take(&mut self, fake: &Fake, log: &[u64]) {
        self.0.extend(pages(log).into_iter().map(|page| (page, fake.writes(page))));
    }

    /// Pages that it has wrong.
    pub(crate) fn lost(&self, fake: &Fake) -> usize {
        (0..PAGES).filter(|page| self.0.get(page).copied().unwrap_or(0) != fake.writes(*page)).count()
    }
}
