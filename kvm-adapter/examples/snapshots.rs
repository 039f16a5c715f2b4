//! Snapshots by what changed: one of the whole guest, then only of the pages that it dirtied since; then an older one is
//! restored by the same log, compared with what the guest was, and run on from.
//!
//! `cargo run --release -p dirtylimit-kvm --example snapshots`. No limit is set, nothing ticks, no thread is started and no signal
//! is used: of the library there are [`DirtyLimit::enable`], a slot, a vCPU, [`Vcpu::before_run`] and
//! [`DirtyLimit::last_round`], which read, reset and lose no page of the ring. The lines marked **dirtylimit** are all of it.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dirtylimit_kvm::{Config, Decision, DirtyLimit, Vcpu};
use dirtylimit_test_vm::payload::{self, Mode};
use dirtylimit_test_vm::{GuestCpu, Load, Machine, SLOT};
use kvm_bindings::kvm_regs;

const MIB: u64 = 1 << 20;
/// How long the guest runs between two snapshots.
const RUN: Duration = Duration::from_millis(30);

/// What it takes to bring the guest back: the pages that changed since the snapshot before it, and the vCPU.
struct Snapshot {
    pages: BTreeMap<usize, Vec<u64>>,
    /// A VMM saves all of its vCPUs' state, and its devices'. Of this guest only these change.
    registers: kvm_regs,
    /// Of all memory, to compare.
    hash: u64,
}

struct Vm {
    machine: Machine,
    limit: DirtyLimit,
    cpu: GuestCpu,
    vcpu: Vcpu,
}

fn main() -> Result<()> {
    let Some(mut vm) = start()? else { return Ok(()) };
    let all = (0..vm.machine.memory().pages()).collect();
    let mut snapshots = vec![vm.snapshot(all)?];
    for _ in 0..5 {
        vm.run(RUN)?;
        let changed = vm.changed()?;
        snapshots.push(vm.snapshot(changed)?);
    }
    for (number, snapshot) in snapshots.iter().enumerate() {
        println!("snapshot {number}: {:>6.1} MiB", snapshot.pages.len() as f64 / 256.0);
    }

    vm.run(RUN)?;
    let restored = vm.restore(&snapshots, 2)?;
    ensure!(vm.hash() == snapshots[2].hash, "the restored guest is not what snapshot 2 was");
    println!("snapshot 2 is restored: {restored} pages were written, and all memory is as it was");

    // The next increment is to what was restored.
    snapshots.truncate(3);
    vm.run(RUN)?;
    let changed = vm.changed()?;
    snapshots.push(vm.snapshot(changed)?);
    let from_snapshots: Vec<_> = (0..vm.machine.memory().pages()).map(|page| page_of(&snapshots, page)).collect();
    ensure!(hash(&from_snapshots) == vm.hash(), "full snapshot and increments together are not the guest");
    println!("snapshot 3 anew: {:>6.1} MiB; all four together are the guest", snapshots[3].pages.len() as f64 / 256.0);
    Ok(())
}

/// A guest that writes 32 of its 64 MiB, over and over; `None`, said, where there is no KVM.
fn start() -> Result<Option<Vm>> {
    if let Err(error) = dirtylimit_test_vm::open() {
        eprintln!("SKIPPED: this example needs a host with KVM: {error:#}");
        return Ok(None);
    }
    let load = Load::new(Mode::Write, 32 * MIB);
    let machine = Machine::with_ram(&[load], payload::image(), 64 * MIB)?;
    let limit = DirtyLimit::enable(machine.vm(), &Config::new())?; // dirtylimit
    limit.add_slot(SLOT, machine.memory().pages() as u64)?; // dirtylimit: before the slot is logged
    machine.plug_memory(true)?;
    let cpu = machine.vcpu(0)?;
    let vcpu = limit.add_vcpu(0, cpu.fd())?; // dirtylimit
    Ok(Some(Vm { machine, limit, cpu, vcpu }))
}

impl Vm {
    /// Lets the guest run until it leaves KVM after `time` or more: here each full ring brings it out.
    fn run(&mut self, time: Duration) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < time {
            // dirtylimit: serves a full ring
            if matches!(self.vcpu.before_run()?, Decision::Enter { .. }) {
                self.cpu.run()?;
            }
        }
        Ok(())
    }

    /// What the guest dirtied since it was last asked; the vCPU is out of KVM_RUN, so nothing is missing.
    fn changed(&self) -> Result<Vec<usize>> {
        let log = self.limit.last_round()?.take(SLOT)?; // dirtylimit: in the place of KVM_GET_DIRTY_LOG
        let bits = |(index, word): (usize, &u64)| {
            let word = *word;
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| 64 * index + bit)
        };
        Ok(log.iter().enumerate().flat_map(bits).collect())
    }

    fn snapshot(&self, pages: Vec<usize>) -> Result<Snapshot> {
        let registers = self.cpu.fd().get_regs().context("KVM_GET_REGS")?;
        let pages = pages.into_iter().map(|page| (page, self.page(page))).collect();
        Ok(Snapshot { pages, registers, hash: self.hash() })
    }

    /// Brings snapshot `number` back by writing only what has changed since; returns how many pages that were.
    fn restore(&self, snapshots: &[Snapshot], number: usize) -> Result<usize> {
        let later = snapshots[number + 1..].iter().flat_map(|snapshot| snapshot.pages.keys().copied());
        let mut changed: Vec<_> = later.chain(self.changed()?).collect();
        changed.sort_unstable();
        changed.dedup();
        for &page in &changed {
            self.machine.memory().write(page as u64 * 4096, page_of(&snapshots[..=number], page));
        }
        self.cpu.fd().set_regs(&snapshots[number].registers).context("KVM_SET_REGS")?;
        Ok(changed.len())
    }

    fn page(&self, page: usize) -> Vec<u64> {
        self.machine.memory().page(page).iter().map(|word| word.load(Relaxed)).collect()
    }

    fn hash(&self) -> u64 {
        let pages: Vec<_> = (0..self.machine.memory().pages()).map(|page| self.page(page)).collect();
        hash(&pages)
    }
}

/// A page as it was at the last of `snapshots`.
fn page_of(snapshots: &[Snapshot], page: usize) -> &[u64] {
    snapshots.iter().rev().find_map(|snapshot| snapshot.pages.get(&page)).expect("the first has all pages")
}

fn hash(pages: &[impl AsRef<[u64]>]) -> u64 {
    let mut hasher = DefaultHasher::new();
    pages.iter().for_each(|page| page.as_ref().hash(&mut hasher));
    hasher.finish()
}
