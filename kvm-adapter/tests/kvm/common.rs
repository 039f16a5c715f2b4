//! What the tests on real KVM share: a guest under the limiter, and a copy of it that only the dirty log feeds.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, Result};
use dirtylimit_bench::guest::kvm::{Exit, GuestCpu, GuestMemory, Load, Machine, SLOT};
use dirtylimit_bench::payload;
use dirtylimit_kvm::{Config, DirtyLimit, Vcpu};

/// A vCPU with its limiter.
pub(crate) type Limited = (GuestCpu, Vcpu);

/// A machine whose memory is known to the limiter and logged, without vCPUs.
pub(crate) fn machine(loads: &[Load], config: &Config) -> Result<(Machine, DirtyLimit)> {
    let machine = Machine::new(loads, payload::image())?;
    let limit = DirtyLimit::enable(machine.vm(), config)?;
    limit.add_slot(SLOT, machine.memory().pages() as u64)?;
    machine.plug_memory(true)?;
    Ok((machine, limit))
}

/// vCPU `index`, with its number as its id.
pub(crate) fn vcpu(machine: &Machine, limit: &DirtyLimit, index: usize) -> Result<Limited> {
    let cpu = machine.vcpu(index)?;
    let vcpu = limit.add_vcpu(u32::try_from(index)?, cpu.fd())?;
    Ok((cpu, vcpu))
}

/// Runs a vCPU on this thread, its exits served, until `enough` says so after one of them.
pub(crate) fn drive((cpu, vcpu): &mut Limited, mut enough: impl FnMut(Exit) -> bool) -> Result<()> {
    loop {
        vcpu.before_run()?;
        let exit = cpu.run()?;
        if exit == Exit::RingFull {
            vcpu.ring_full();
        }
        if enough(exit) {
            return Ok(());
        }
    }
}

/// The first word of each page of a guest, kept as a migration's destination would be: copied when the dirty log names the
/// page, and only then. All loops of the payload write that word, and comparing a word a page is quick enough to be done
/// after every take.
#[derive(Debug)]
pub(crate) struct Copy {
    guest: Arc<GuestMemory>,
    words: Vec<u64>,
}

impl Copy {
    /// The guest as it is before it runs.
    pub(crate) fn new(guest: &Arc<GuestMemory>) -> Self {
        let mut copy = Self { guest: guest.clone(), words: Vec::new() };
        copy.words = copy.read();
        copy
    }

    /// Copies the pages of a dirty log, and says how many they were.
    pub(crate) fn take(&mut self, log: &[u64]) -> Result<usize> {
        self.take_at(0, log, None)
    }

    /// Copies the pages of the log of a slot that starts at page `first`; as they were when `read` was read, if that is
    /// given, which is a mistake to show that it is noticed.
    pub(crate) fn take_at(&mut self, first: usize, log: &[u64], read: Option<&[u64]>) -> Result<usize> {
        let mut copied = 0;
        for (index, &bits) in log.iter().enumerate() {
            for page in (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| first + index * 64 + bit) {
                let word = self.words.get_mut(page).context("the log names a page beyond the guest's memory")?;
                *word = read.map_or_else(|| self.guest.page(page)[0].load(Relaxed), |read| read[page]);
                copied += 1;
            }
        }
        Ok(copied)
    }

    /// What the guest's pages hold now.
    pub(crate) fn read(&self) -> Vec<u64> {
        (0..self.guest.pages()).map(|page| self.guest.page(page)[0].load(Relaxed)).collect()
    }

    /// Copies pages without a log: those that the host has written, or of a slot that is new.
    pub(crate) fn refresh(&mut self, pages: std::ops::Range<usize>) {
        for page in pages {
            self.words[page] = self.guest.page(page)[0].load(Relaxed);
        }
    }

    /// How many pages it has wrong: lost ones, if the vCPUs have stood still since the last take began.
    pub(crate) fn lost(&self) -> usize {
        self.words.iter().enumerate().filter(|(page, word)| self.guest.page(*page)[0].load(Relaxed) != **word).count()
    }
}
