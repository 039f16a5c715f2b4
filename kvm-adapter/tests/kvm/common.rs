//! What the tests on real KVM share: a guest under the limiter, and a copy of it that only the dirty log feeds.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use dirtylimit_kvm::{Config, DirtyLimit, Vcpu};
use dirtylimit_test_vm::payload::{self, Mode};
use dirtylimit_test_vm::{Exit, GuestCpu, GuestMemory, Load, Machine, SLOT};

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
        _ = vcpu.before_run()?;
        let exit = cpu.run()?;
        if enough(exit) {
            return Ok(());
        }
    }
}

/// How long `time` on a fast machine is on this one, and never less: the lab's take many times as long for everything.
pub(crate) fn here(time: Duration) -> Duration {
    /// What the machine that these times were chosen on takes for the work that is measured.
    const FAST: Duration = Duration::from_millis(30);
    static SLOWNESS: OnceLock<f64> = OnceLock::new();
    let slowness = SLOWNESS.get_or_init(|| {
        // Where it fails, the test, which does the same, tells why.
        let slowness = unit().map_or(1.0, |unit| unit.div_duration_f64(FAST).max(1.0));
        eprintln!("this machine takes {slowness:.1} times as long as a fast one");
        slowness
    });
    time.mul_f64(*slowness)
}

/// The CPU time that 2,000 pages of a guest and their resets take: how busy the machine is does not matter.
fn unit() -> Result<Duration> {
    let (machine, limit) = machine(&[Load::new(Mode::Write, 4 << 20)], &Config::new().ring_entries(1024))?;
    let mut vcpu = vcpu(&machine, &limit, 0)?;
    let start = cpu_time();
    drive(&mut vcpu, |_| machine.stats(0).accesses() >= 2000)?;
    Ok(cpu_time() - start)
}

/// The calling thread's, its guest's included.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the time.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("less than a second"))
}

/// The smallest ring that this KVM takes: it is to be larger than KVM's reserve, which Intel's PML makes one of 576.
pub(crate) fn smallest_ring() -> u32 {
    let taken = |&entries: &u32| {
        let machine = Machine::new(&[Load::new(Mode::Idle, 0)], payload::image()).unwrap();
        DirtyLimit::enable(machine.vm(), &Config::new().ring_entries(entries)).is_ok()
    };
    [256, 512, 1024].iter().copied().find(taken).expect("KVM takes a ring of 1,024 entries")
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
