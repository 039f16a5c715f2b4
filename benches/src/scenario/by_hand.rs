//! A guest whose ring is served by hand, and nothing limits: what the limiter's own cost is compared with.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::guest::kvm::raw_ring::{self, RawRing};
use crate::guest::kvm::{Exit, GuestCpu, Load, Machine};
use crate::plan::Plan;
use crate::workload::Workload;
use dirtylimit_test_vm::payload::{self, Mode};

/// A guest whose ring is collected and reset by hand: when it is full, and at an interval too where there is one.
#[derive(Clone, Copy, Debug)]
pub struct HandServed {
    /// Entries of the ring.
    pub ring: u32,
    /// The interval.
    pub every: Option<Duration>,
}

/// Runs the one writer of `plan` for as long as the plan says, and gives its accesses per second of the limited phase.
///
/// # Errors
/// A plan that is not one writer; what KVM answers.
pub fn accesses_per_s(plan: &Plan, served: HandServed) -> Result<f64> {
    let [vcpu] = plan.vcpus.as_slice() else { bail!("by hand only one vCPU is served, not {}", plan.vcpus.len()) };
    let Workload::Write(bytes) = vcpu.workload else { bail!("by hand only a writer is served, not {}", vcpu.workload) };
    let machine = Machine::new(&[Load::new(Mode::Write, bytes)], payload::image())?;
    raw_ring::enable(machine.vm(), served.ring)?;
    machine.plug_memory(true)?;
    let mut cpu = machine.vcpu(0)?;
    if plan.steal_time {
        cpu.enable_steal_time(machine.steal_time(0))?;
    }
    let ring = Mutex::new(RawRing::map(cpu.fd(), served.ring)?);
    machine.memory().populate(0..machine.memory().bytes());
    let (stop, kicker) = (AtomicBool::new(false), cpu.kicker());
    thread::scope(|scope| {
        let driver = scope.spawn(|| drive(&machine, &mut cpu, &ring, &stop));
        let measured = measure(&machine, &ring, plan, served);
        stop.store(true, Relaxed);
        while !driver.is_finished() {
            kicker.kick();
            thread::sleep(std::time::Duration::from_millis(1));
        }
        driver.join().unwrap_or_else(|_| Err(anyhow!("the vCPU's thread panicked")))?;
        measured
    })
}

fn measure(machine: &Machine, ring: &Mutex<RawRing>, plan: &Plan, served: HandServed) -> Result<f64> {
    let start = Instant::now();
    let serve_until = |end| -> Result<()> {
        let mut next = start.elapsed();
        while start.elapsed() < end {
            next = served.every.map_or(end, |every| (next + every).max(start.elapsed()));
            thread::sleep(next.min(end).saturating_sub(start.elapsed()));
            if served.every.is_some() {
                serve(machine, ring)?;
            }
        }
        Ok(())
    };
    serve_until(plan.free)?;
    let (begin, before) = (Instant::now(), machine.stats(0).accesses());
    serve_until(plan.free + plan.limited)?;
    Ok((machine.stats(0).accesses() - before) as f64 / begin.elapsed().as_secs_f64())
}

fn drive(machine: &Machine, cpu: &mut GuestCpu, ring: &Mutex<RawRing>, stop: &AtomicBool) -> Result<()> {
    cpu.bind_to_this_thread();
    while !stop.load(Relaxed) {
        if cpu.run()? == Exit::RingFull {
            serve(machine, ring)?;
        }
    }
    Ok(())
}

fn serve(machine: &Machine, ring: &Mutex<RawRing>) -> Result<()> {
    let mut ring = ring.lock().map_err(|_| anyhow!("the other thread panicked"))?;
    ring.collect(|_, _| {});
    raw_ring::reset(machine.vm()).context("KVM_RESET_DIRTY_RINGS").map(drop)
}
