//! What the kernel's own `dirty_log_test` (tools/testing/selftests/kvm) demands of the dirty ring, demanded of the adapter:
//! the guest writes the round's number to random pages; after a round, with the vCPU stopped, a clean page's number is
//! older than the round and a dirty page's is the round's. With that test's two exceptions, which the guest's registers
//! tell exactly here: a page is logged a moment before it is written (it may still hold any older number), and the number
//! may have been read before the round began. And one of the adapter's own: a suspect page is dirty in every take.

#[cfg_attr(target_arch = "x86_64", path = "rounds/x86_64.rs")]
#[cfg_attr(target_arch = "aarch64", path = "rounds/aarch64.rs")]
mod guest;

use std::slice;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use dirtylimit_kvm::{Config, DirtyLimit, Kick, PageRate};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{GuestCpu, Load, Machine, SLOT, kvm_or_skip};

use crate::rig::Watchdog;

const PAGES: u64 = 4096;
/// The word of the parameter block that holds the round's number: one that the guest ABI leaves free.
const ROUND: u64 = 15;

fn image() -> &'static [u8] {
    unsafe extern "C" {
        static dirtylimit_rounds_start: u8;
        static dirtylimit_rounds_end: u8;
    }
    let (start, end) = (&raw const dirtylimit_rounds_start, &raw const dirtylimit_rounds_end);
    // SAFETY: both labels stand in one section of read-only data, the end behind the start.
    unsafe { slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// The pages that a round dirtied, and how the rounds are checked.
struct Rounds {
    machine: Machine,
    limit: DirtyLimit,
    /// First page of the workload.
    first: usize,
    /// The page that the guest was at when the round before ended, and the number that it had in hand.
    last: Option<(usize, u64)>,
}

impl Rounds {
    /// Takes the log into `dirty`.
    fn take(&self, dirty: &mut [u64]) -> Result<()> {
        self.limit.last_round()?.merge(SLOT, dirty)?;
        Ok(())
    }

    /// Runs the guest for a round, with the log taken in between (`takes` times) and at its end; returns what is wrong.
    fn round(
        &mut self,
        cpu: &mut GuestCpu,
        vcpu: &mut dirtylimit_kvm::Vcpu,
        round: u64,
        last: bool,
    ) -> Result<Vec<String>> {
        let parameters = guest::parameters(cpu)?;
        self.machine.memory().write(parameters + 8 * ROUND, &[round]);
        let mut dirty = vec![0; self.machine.memory().pages().div_ceil(64)];
        let (stop, kicker) = (&AtomicBool::new(false), cpu.kicker());
        thread::scope(|scope| -> Result<()> {
            let running = scope.spawn(|| -> Result<()> {
                cpu.bind_to_this_thread();
                while !stop.load(Relaxed) {
                    _ = vcpu.before_run()?;
                    cpu.run()?;
                }
                Ok(())
            });
            for _ in 0..4 {
                thread::sleep(Duration::from_millis(2));
                self.take(&mut dirty)?;
            }
            thread::sleep(Duration::from_millis(2));
            stop.store(true, Relaxed);
            while !running.is_finished() {
                kicker.kick();
                thread::sleep(Duration::from_micros(100));
            }
            running.join().unwrap()
        })?;
        if last {
            self.take(&mut dirty)?;
        }
        // Nothing was logged since the last take, so these are the suspect pages.
        let suspects = self.limit.round().and_then(|round| round.take(SLOT))?;
        let (address, number) = guest::in_hand(cpu)?;
        let at = usize::try_from(address / 4096)?;
        let wrong = self.verify(&dirty, &suspects, round, at);
        self.last = Some((at, number));
        Ok(wrong)
    }

    fn verify(&self, dirty: &[u64], suspects: &[u64], round: u64, at: usize) -> Vec<String> {
        let pages = usize::try_from(PAGES).unwrap();
        let wrong = (self.first..self.first + pages).filter_map(|page| {
            let value = self.machine.memory().page(page)[0].load(Relaxed);
            let [logged, suspect] = [dirty, suspects].map(|log| log[page / 64] >> (page % 64) & 1 == 1);
            let right = if logged {
                value == round || suspect || (page == at && value < round) || (Some((page, value)) == self.last)
            } else {
                value < round
            };
            (!right)
                .then(|| format!("page {page}: dirty {logged}, holds {value} in round {round}, the guest is at {at}"))
        });
        wrong.collect()
    }
}

/// What is wrong in the first round that has something wrong. `last` is whether a round ends with a take.
fn rounds(config: &Config, limit: Option<u32>, last: bool) -> Result<Vec<String>> {
    let machine = Machine::new(&[Load::new(Mode::Random, PAGES * 4096)], image())?;
    let limiter = DirtyLimit::enable(machine.vm(), config)?;
    limiter.add_slot(SLOT, machine.memory().pages() as u64)?;
    machine.plug_memory(true)?;
    let mut cpu = machine.vcpu(0)?;
    let mut vcpu = limiter.add_vcpu(0, cpu.fd())?;
    let _throttle = limiter.throttle_thread(Duration::from_millis(10))?;
    if let Some(limit) = limit {
        limiter.set_limit_all(PageRate::from_pages_per_sec(limit));
    }
    let first = usize::try_from(machine.workload(0).start / 4096)?;
    let mut rounds = Rounds { machine, limit: limiter, first, last: None };
    let mut written = 0;
    // On a busy host the guest may hardly run in a round.
    for round in 1..=1000 {
        let wrong = rounds.round(&mut cpu, &mut vcpu, round, last)?;
        if !wrong.is_empty() {
            return Ok(wrong);
        }
        written += (first..first + usize::try_from(PAGES)?)
            .filter(|page| rounds.machine.memory().page(*page)[0].load(Relaxed) == round)
            .count();
        if last && round >= 25 && written > 1000 {
            break;
        }
    }
    ensure!(written > 1000, "the guest hardly wrote: {written} pages");
    Ok(Vec::new())
}

#[test]
fn what_is_clean_is_old_and_what_is_dirty_is_new() {
    if !kvm_or_skip() {
        return;
    }
    let _watchdog = Watchdog::new(Duration::from_secs(300));
    let kick = Kick::Signal(libc::SIGRTMIN() + 7);
    for config in [Config::new().ring_entries(1024), Config::new().ring_entries(8192).kick(kick)] {
        for limit in [None, Some(50_000)] {
            let wrong = rounds(&config, limit, true).unwrap();
            assert!(wrong.is_empty(), "{config:?} {limit:?}: {wrong:#?}");
            let wrong = rounds(&config, limit, false).unwrap();
            assert!(!wrong.is_empty(), "{config:?} {limit:?}: rounds that do not end with a take pass");
        }
    }
}
