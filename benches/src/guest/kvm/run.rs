//! One run: free, then limited, then the proof that nothing was lost.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dirtylimit_core::{PageRate, Status, Totals};
use dirtylimit_kvm::{Config, DirtyLimit, Kick, ThrottleThread};

use super::affinity::Placement;
use super::control::Control;
use super::metrics::Exporter;
use super::script::{Event, Mark, Script, Scripted};
use super::threads::{Copier, Limited, Vcpus};
use super::{GuestCpu, Load, Machine, SLOT};
use crate::guest::{Phase, Progress, VcpuNow};
use crate::plan::{KickKind, Plan};
use crate::probe;
use crate::record::{GuestKind, Recording, Sample, Stalls, VcpuRecording};
use crate::workload::Workload;
use dirtylimit_test_vm::Shadow;
use dirtylimit_test_vm::payload;

/// Distance between two samples.
const SAMPLE: Duration = Duration::from_millis(10);
/// Interval of the throttle thread.
const TICK: Duration = Duration::from_millis(10);
/// The same as in the README.
const EMBEDDED_TICK: Duration = Duration::from_millis(50);
/// Memory that must stay free for everybody else.
const SPARE: u64 = 128 << 20;

/// Runs `plan` on KVM and records it. The caller's thread samples, and is kept on certain CPUs meanwhile.
///
/// # Errors
/// No usable KVM; a plan that this host has no room for; a payload that cannot be loaded or faults; whatever the limiter
/// reports. All vCPUs are stopped by then. Lost pages are no error but in the recording.
pub fn run(plan: &Plan, progress: &mut dyn Progress) -> Result<Recording> {
    Ok(run_scripted(plan, &Script::default(), progress)?.recording)
}

/// As [`run`], and does what the script says beside.
///
/// # Errors
/// As [`run`].
pub fn run_scripted(plan: &Plan, script: &Script, progress: &mut dyn Progress) -> Result<Scripted> {
    let image = plan.payload.as_deref().map(payload::load).transpose()?;
    let loads: Vec<Load> = plan.vcpus.iter().map(|vcpu| vcpu.workload.into()).collect();
    let machine = Machine::new(&loads, image.as_deref().unwrap_or(payload::image()))?;
    check_memory(machine.memory().bytes() as u64)?;

    let kick = match plan.kick {
        KickKind::Auto => Kick::Auto,
        KickKind::Off => Kick::Off,
        // SIGRTMIN itself is the machine's own kick.
        KickKind::Signal => Kick::Signal(libc::SIGRTMIN() + 1),
    };
    let config = Config::new().ring_entries(plan.ring).max_pause(plan.max_pause).policy(plan.policy.into());
    let ours = |config: Config| config.kick(kick).prompt(true);
    let (config, tick) = if script.as_embedded { (config, EMBEDDED_TICK) } else { (ours(config), TICK) };
    let limit = DirtyLimit::enable(machine.vm(), &config).context("cannot enable the limiter")?;
    limit.add_slot(SLOT, machine.memory().pages() as u64).context("cannot add the guest's memory to the limiter")?;
    machine.plug_memory(true)?;
    let vcpus = (0..loads.len())
        .map(|index| {
            let cpu = machine.vcpu(index)?;
            if plan.steal_time {
                cpu.enable_steal_time(machine.steal_time(index)).context("--steal-time")?;
            }
            let vcpu = limit.add_vcpu(id(index), cpu.fd()).with_context(|| format!("cannot add vCPU {index}"))?;
            Ok((cpu, vcpu))
        })
        .collect::<Result<Vec<Limited>>>()?;
    let recorded = std::iter::zip(&plan.vcpus, &loads)
        .zip(&vcpus)
        .map(|((planned, load), (cpu, _))| recorded(planned.workload, load, cpu))
        .collect();
    let shadow = Shadow::new(machine.memory().clone())?;
    machine.memory().populate(0..machine.memory().bytes());

    let placement = Placement::new(plan);
    let throttle = limit.throttle_thread(tick).context("cannot start the throttle thread")?;
    let copier = Copier::start(limit.clone(), shadow, plan.pass)?;
    let vcpus = Vcpus::start(vcpus, placement.vcpus.as_deref())?;
    let recording = Recording::begun(GuestKind::Kvm, plan, probe::host(true, None), recorded);
    let control = plan.qmp.as_deref().map(|path| Control::serve(&limit, path)).transpose()?;
    let exporter = plan.metrics.as_ref().map(|to| Exporter::start(&limit, to)).transpose()?;
    let start = Instant::now();
    let done = Scripted { recording, marks: Vec::new(), ticks: Vec::new() };
    Run {
        plan,
        script,
        progress,
        machine: &machine,
        limit,
        vcpus,
        copier,
        _throttle: throttle,
        control,
        exporter,
        start,
        next: SAMPLE,
        done,
    }
    .all()
}

/// A run that goes on.
struct Run<'a> {
    plan: &'a Plan,
    script: &'a Script,
    progress: &'a mut dyn Progress,
    machine: &'a Machine,
    // Fields drop in this order: first the vCPUs stop, then the copier ends, last the throttle thread.
    vcpus: Vcpus,
    copier: Copier,
    _throttle: ThrottleThread,
    control: Option<Control>,
    exporter: Option<Exporter>,
    limit: DirtyLimit,
    start: Instant,
    /// When the next sample is due.
    next: Duration,
    done: Scripted,
}

impl Run<'_> {
    fn all(mut self) -> Result<Scripted> {
        self.free()?;
        self.limited()?;
        self.check()
    }

    /// The guest unlimited. Its first quarter is not counted: the guest touches its memory for the first time there.
    fn free(&mut self) -> Result<()> {
        self.until(self.plan.free / 4, Phase::Free)?;
        let (counted, before) = (self.start.elapsed(), self.accesses());
        self.until(self.plan.free, Phase::Free)?;
        let time = self.start.elapsed() - counted;
        for (index, accesses) in self.accesses().into_iter().enumerate() {
            let vcpu = &mut self.done.recording.vcpus[index];
            (vcpu.free_accesses, vcpu.free_time) = (accesses - before[index], time);
        }
        Ok(())
    }

    fn limited(&mut self) -> Result<()> {
        for index in 0..self.plan.vcpus.len() {
            let stats = self.machine.stats(index);
            stats.begin_phase();
            self.copier.host_wrote(stats.number());
        }
        self.sample(Phase::Limited)?;
        let (before, stats) = (self.accesses(), self.limit.stats());
        let first: Vec<_> = (0..self.plan.vcpus.len()).map(|index| self.totals(index)).collect::<Result<_>>()?;
        let began = self.start.elapsed();
        self.done.recording.limited_at = began;
        if !self.done.recording.interrupted {
            if !self.overridden() {
                self.limit.set_vm_limit(self.plan.vm_limit);
            }
            for index in 0..self.plan.vcpus.len() {
                self.set_limit(index, self.plan.vcpus[index].limit, began)?;
            }
            for (after, event) in self.script.events(self.plan) {
                self.until(began + after, Phase::Limited)?;
                if self.done.recording.interrupted {
                    break;
                }
                match event {
                    Event::Limit(limit) => {
                        let now = self.start.elapsed();
                        for index in 0..self.plan.vcpus.len() {
                            self.set_limit(index, limit, now)?;
                        }
                    }
                    Event::Hold(held) => {
                        self.vcpus.hold(|index| held.contains(&index));
                        self.mark();
                    }
                }
            }
            self.until(began + self.plan.limited, Phase::Limited)?;
        }
        self.sample(Phase::Limited)?;
        self.exporter.as_mut().map_or(Ok(()), Exporter::write)?;
        self.mark();
        self.done.recording.end = self.start.elapsed();
        let (after, resets) = (self.accesses(), self.limit.stats());
        self.done.recording.reset_pages = resets.resets - stats.resets;
        self.done.recording.reset_calls = resets.reset_calls - stats.reset_calls;
        for (index, first) in first.into_iter().enumerate() {
            let last = self.totals(index)?;
            if last.full_exits > 0 {
                // Before the first full exit it is no more than an assumption.
                self.done.recording.host.soft_limit = Some(resets.soft_limit);
            }
            let stats = self.machine.stats(index);
            let time = self.done.recording.end - began;
            let vcpu = &mut self.done.recording.vcpus[index];
            (vcpu.limited_accesses, vcpu.limited_time) = (after[index] - before[index], time);
            let stalls = &mut vcpu.stalls;
            (stalls.longest_ticks, stalls.histogram, stalls.fine) = (stats.longest(), stats.histogram(), stats.fine());
            vcpu.full_exits = last.full_exits - first.full_exits;
            vcpu.paused = Duration::from_micros(last.paused_us - first.paused_us);
            vcpu.net_pages = last.net_pages - first.net_pages;
            vcpu.gross_pages = last.gross_pages - first.gross_pages;
            vcpu.held_back_pages = self.limit.held_back(id(index)).with_context(|| format!("vCPU {index}"))?;
        }
        Ok(())
    }

    /// Stops the guest, makes the last complete sync, and compares the copy with the guest.
    fn check(mut self) -> Result<Scripted> {
        self.show(Phase::Checking);
        let Self { vcpus, copier, limit, mut done, .. } = self;
        let stopped = vcpus.stop()?;
        let mut shadow = copier.finish()?;
        let log = limit.last_round().and_then(|round| round.take(SLOT)).context("the last sync of the dirty log")?;
        shadow.copy(&log)?;
        done.recording.lost_pages = Some(shadow.lost().len() as u64);
        let stats = limit.stats();
        (done.recording.suspect_pages, done.recording.suspect_resets) = (stats.suspect_pages, stats.suspect_resets);
        drop(stopped);
        Ok(done)
    }

    /// Samples until `until`, or until the user has enough.
    fn until(&mut self, until: Duration, phase: Phase) -> Result<()> {
        while !self.done.recording.interrupted {
            let now = self.start.elapsed();
            if now >= until {
                return Ok(());
            }
            std::thread::sleep(self.next.min(until).saturating_sub(now));
            if self.start.elapsed() >= self.next {
                self.sample(phase)?;
                let quit = self.control.as_ref().is_some_and(Control::quits);
                self.done.recording.interrupted = quit || self.progress.interrupted();
            }
        }
        Ok(())
    }

    /// Reads every vCPU's counters, shows them, and sees whether all threads are well.
    fn sample(&mut self, phase: Phase) -> Result<()> {
        self.vcpus.check()?;
        self.copier.check()?;
        if self.script.time_ticks && phase == Phase::Limited {
            let begin = Instant::now();
            self.limit.tick();
            self.done.ticks.push(begin.elapsed());
        }
        self.limit.meter();
        for index in 0..self.plan.vcpus.len() {
            let Status { limit, totals, .. } = self.query(index)?;
            let Totals { net_pages: net, gross_pages: gross, paused_us, .. } = totals;
            let (at, paused) = (self.start.elapsed(), Duration::from_micros(paused_us));
            let overridden = self.overridden();
            let vcpu = &mut self.done.recording.vcpus[index];
            vcpu.samples.push(Sample { at, net, gross, paused });
            if overridden && vcpu.limits.last().is_some_and(|&(_, recorded)| recorded != limit) {
                vcpu.limits.push((at, limit));
            }
        }
        // A sample that is late is not made up for: the next one stands where it would have stood anyway.
        let now = self.start.elapsed();
        while self.next <= now {
            self.next += SAMPLE;
        }
        self.exporter.as_mut().map_or(Ok(()), Exporter::write_if_due)?;
        self.show(phase);
        Ok(())
    }

    fn show(&mut self, phase: Phase) {
        let now: Vec<VcpuNow> = self.done.recording.vcpus.iter().map(VcpuNow::of).collect();
        self.progress.sample(self.start.elapsed(), phase, &now);
    }

    /// Sets or lifts a vCPU's limit, and records it as of `at`. The control socket has the last word.
    fn set_limit(&mut self, index: usize, limit: Option<PageRate>, at: Duration) -> Result<()> {
        let limit = if self.overridden() {
            self.query(index)?.limit
        } else {
            match limit {
                Some(rate) => self.limit.set_limit(id(index), rate),
                None => self.limit.cancel(id(index)),
            }
            .with_context(|| format!("cannot set the limit of vCPU {index}"))?;
            limit
        };
        self.done.recording.vcpus[index].limits.push((at, limit));
        Ok(())
    }

    /// Whether somebody has set a limit by the control socket.
    fn overridden(&self) -> bool {
        self.control.as_ref().is_some_and(Control::overrides)
    }

    fn query(&self, index: usize) -> Result<Status> {
        self.limit.query(id(index)).with_context(|| format!("cannot query vCPU {index}"))
    }

    fn totals(&self, index: usize) -> Result<Totals> {
        Ok(self.query(index)?.totals)
    }

    fn mark(&mut self) {
        let mark = Mark { at: self.start.elapsed(), accesses: self.accesses() };
        self.done.marks.push(mark);
    }

    fn accesses(&self) -> Vec<u64> {
        (0..self.plan.vcpus.len()).map(|index| self.machine.stats(index).accesses()).collect()
    }
}

/// The limiter's name of a vCPU.
fn id(index: usize) -> u32 {
    u32::try_from(index).expect("the machine has at most 64 vCPUs")
}

fn recorded(workload: Workload, load: &Load, cpu: &GuestCpu) -> VcpuRecording {
    let stalls = Stalls {
        tsc_hz: cpu.tsc_hz(),
        threshold_ticks: cpu.ticks(load.stall),
        fine_ticks: 1 << payload::stats::fine_shift(cpu.tsc_hz()),
        ..Stalls::default()
    };
    VcpuRecording {
        index: cpu.index(),
        workload,
        limits: Vec::new(),
        samples: Vec::new(),
        free_accesses: 0,
        free_time: Duration::ZERO,
        limited_accesses: 0,
        limited_time: Duration::ZERO,
        stalls,
        full_exits: 0,
        paused: Duration::ZERO,
        net_pages: 0,
        gross_pages: 0,
        held_back_pages: 0,
    }
}

/// The guest and its copy must fit into what is free: the kernel would end this process, or another, in mid-run.
pub(crate) fn check_memory(guest: u64) -> Result<()> {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    // A system that does not tell is not judged.
    let Some(available) = available.map(|kib| kib << 10) else { return Ok(()) };
    let needed = 2 * guest + SPARE;
    ensure!(
        needed <= available,
        "the guest and its copy need {} MiB of memory, and {} MiB are available: take fewer or smaller workloads",
        needed >> 20,
        available >> 20
    );
    Ok(())
}
