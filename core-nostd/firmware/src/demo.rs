//! dirtylimit's core as firmware of a Cortex-M4: a guest that fills a dirty ring as fast as it can, ticks, a limit, and
//! pauses, in a time of their own. Prints what it saw and PASS; `ci/no-panic.sh` runs it in QEMU.
#![no_std]
#![no_main]

use core::ops::RangeInclusive;

use cortex_m_rt::entry;
use cortex_m_semihosting::{debug, hprintln};
use dirtylimit_core::{
    BadRingSize, Ended, Entry, Inline, Limiter, Machine, Metered, Nanos, Paced, Page, PageRate, Ring, SECOND, Step,
    VcpuCell, VcpuRing, VmCell,
};

static LIMITER: Limiter<Paced, Inline<4>> = Limiter::new(Paced);
static MEMORY: [Entry; 1024] = [const { Entry::new() }; 1024];

/// The guest writes a page in that time: 500,000 pages a second.
const WRITE: Nanos = 2_000;
const TICK: Nanos = SECOND / 20;

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = hprintln!("{}", info);
    leave(debug::EXIT_FAILURE)
}

fn leave(status: debug::ExitStatus) -> ! {
    debug::exit(status);
    loop {
        core::hint::spin_loop();
    }
}

/// A vCPU with its ring and, in `dirty` and `reset`, what a kernel knows of that.
struct Vcpu {
    cell: &'static VcpuCell,
    vcpu: VcpuRing<&'static [Entry]>,
    machine: Machine,
    now: Nanos,
    next_tick: Nanos,
    dirty: u32,
    reset: u32,
    served: Nanos,
}

impl Vcpu {
    fn new(cell: &'static VcpuCell) -> Result<Self, BadRingSize> {
        let vcpu = VcpuRing::new(Ring::new(&MEMORY[..])?);
        let machine = Machine::new(cell, vcpu.ring().size(), false, false);
        Ok(Self { cell, vcpu, machine, now: SECOND, next_tick: 0, dirty: 0, reset: 0, served: 0 })
    }

    fn entry(index: u32) -> &'static Entry {
        &MEMORY[index as usize % MEMORY.len()]
    }

    /// KVM_RUN: the guest writes until its ring is full.
    fn run(&mut self, ticks: bool) {
        while self.dirty.wrapping_sub(self.reset) < self.vcpu.ring().soft_limit() {
            Self::entry(self.dirty).push(Page { slot: 0, offset: self.dirty.into() });
            self.dirty = self.dirty.wrapping_add(1);
            self.now += WRITE;
            if ticks && self.now >= self.next_tick {
                LIMITER.tick(self.now);
                self.next_tick = self.now + TICK;
            }
        }
    }

    /// From the full exit to the next entry.
    fn serve(&mut self) {
        let Self { cell, vcpu, machine, now, reset, served, .. } = self;
        let vm = LIMITER.vm();
        machine.full_exit(cell);
        let mut step = machine.begin(*now, vm, cell);
        loop {
            step = match step {
                Step::Harvest => {
                    vcpu.meter(cell, |_| Metered::New);
                    machine.harvested(*now, vm, cell, vcpu, false)
                }
                Step::Pause { until, .. } => {
                    let from = *now;
                    *now = from.max(until);
                    machine.paused(from, *now, Ended::Due, vm, cell)
                }
                Step::Reset => {
                    if let Some(later) = machine.reset_later(*now, *served, vm, cell) {
                        step = later;
                        continue;
                    }
                    vcpu.collect(vcpu.to_grant(), |_| ());
                    while Self::entry(*reset).reset().is_some() {
                        *reset = reset.wrapping_add(1);
                    }
                    vcpu.reclaim();
                    vcpu.grant(cell);
                    *served = *now;
                    machine.reset_done(*now, cell)
                }
                Step::Enter(_) | Step::Return(_) | Step::Wedged(_) => return,
            };
        }
    }

    /// Runs so long, and returns the dirty page rate.
    fn rate(&mut self, time: Nanos, ticks: bool) -> u64 {
        let (start, dirty) = (self.now, self.dirty);
        while self.now < start + time {
            self.run(ticks);
            self.serve();
        }
        u64::from(self.dirty.wrapping_sub(dirty)) * SECOND / (self.now - start)
    }
}

fn expect(what: &str, rate: u64, range: RangeInclusive<u64>) -> bool {
    let good = range.contains(&rate);
    let _ = hprintln!("{}: {} pages/s, {}", what, rate, if good { "as it should be" } else { "WRONG" });
    good
}

#[entry]
fn main() -> ! {
    let vcpu = LIMITER.register().ok().and_then(|index| Some((index, Vcpu::new(LIMITER.cell(index)?).ok()?)));
    let Some((index, mut vcpu)) = vcpu else { leave(debug::EXIT_FAILURE) };
    let limit = |rate: u32| LIMITER.set_limit(index, Some(PageRate::from_pages_per_sec(rate)));

    let mut good = expect("without a limit", vcpu.rate(SECOND / 5, true), 499_000..=500_000);
    limit(25_600);
    vcpu.rate(SECOND / 10, true);
    good &= expect("limited to 25600", vcpu.rate(SECOND, true), 25_100..=26_100);
    limit(2_560);
    vcpu.rate(SECOND / 10, true);
    good &= expect("limited to 2560", vcpu.rate(SECOND, true), 2_510..=2_610);
    vcpu.rate(VmCell::LEASE + SECOND, false);
    good &= expect("the controller is dead", vcpu.rate(SECOND / 5, false), 499_000..=500_000);
    LIMITER.tick(vcpu.now);
    vcpu.rate(SECOND / 10, true);
    good &= expect("and back", vcpu.rate(SECOND, true), 2_510..=2_610);
    LIMITER.set_limit(index, None);
    good &= expect("cancelled", vcpu.rate(SECOND / 5, true), 499_000..=500_000);

    let counted = LIMITER.query(index, vcpu.now).map(|status| status.totals.net_pages);
    good &= counted == Some(vcpu.dirty.into());
    let _ = hprintln!("{} pages counted, {}", vcpu.dirty, if good { "PASS" } else { "FAIL" });
    leave(if good { debug::EXIT_SUCCESS } else { debug::EXIT_FAILURE })
}
