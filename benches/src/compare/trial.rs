//! One try of one case: under ours, or under QEMU. Both end as a [`Recording`] whose rate is the guest's own count.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::qemu::{Board, Counters, Qemu};
use super::rom;
use crate::guest::kvm::affinity::{allowed_cpus, pin_thread};
use crate::guest::kvm::layout::Layout;
use crate::guest::kvm::{self, Hold, Mark, Script, Scripted};
use crate::guest::{Phase, Progress, VcpuNow};
use crate::measure::Measures;
use crate::plan::Plan;
use crate::probe;
use crate::record::{GuestKind, Recording, Sample, Stalls, VcpuRecording};
use crate::report::progress::Interrupt;
use crate::units::{PAGE_SIZE, mib_per_sec};
use crate::workload::Workload;
use dirtylimit_test_vm::host_tsc_hz;
use dirtylimit_test_vm::payload::{self, Parameters, stats};

/// Distance between two readings of the guest's counters.
const SAMPLE: Duration = Duration::from_millis(20);

/// When QEMU begins to log, KVM maps each page anew as the guest comes by, which is slow once.
const WARM_UP: Duration = Duration::from_secs(2);

/// What came of a try.
#[derive(Clone, Debug)]
pub(crate) struct Trial {
    /// `net` of its samples is the guest's own count of accesses, one for each page that it touched.
    pub(crate) recording: Recording,
    /// CPU time of the hypervisor while it limited, guest included, over that time; without what only our harness does.
    pub(crate) cpu_share: f64,
    /// The rate by the limiter's own count at the end, in MiB/s, by vCPU; `None` where it tells none.
    pub(crate) own_mib_s: Vec<Option<f64>>,
}

/// A try under this crate's limiter.
///
/// # Errors
/// As [`kvm::run`].
pub(super) fn ours(plan: &Plan, interrupt: &Interrupt) -> Result<Trial> {
    let mut watch = Watch { interrupt, cpu: None };
    // To hold nobody is to note what the guest has counted.
    let readings = (0u32..).map(|turn| SAMPLE * turn).take_while(|&after| after < plan.limited);
    let holds = readings.map(|after| Hold { after, held: Vec::new() }).collect();
    let script = Script { holds, ..Script::default() };
    let Scripted { mut recording, marks, .. } = kvm::run_scripted(plan, &script, &mut watch)?;
    let measures = recording.vcpus.iter().map(|vcpu| Measures::of(&recording, vcpu));
    let own_mib_s = measures.map(|measures| measures.last().settled_mib_s).collect();
    for vcpu in &mut recording.vcpus {
        let count = |mark: &Mark| mark.accesses[vcpu.index];
        // Of the free phase only the mean is known.
        let free = vcpu.free_accesses as f64 / vcpu.free_time.as_secs_f64().max(1e-3);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count of accesses")]
        let before = (free * recording.limited_at.as_secs_f64()) as u64;
        let base = marks.first().map_or(0, count);
        let limited = marks.iter().map(|mark| sample(mark.at, before + count(mark) - base));
        let samples = [Sample::default(), sample(recording.limited_at, before)].into_iter().chain(limited);
        vcpu.samples = samples.collect();
    }
    let cpu_share = watch.cpu.map_or(0.0, |(first, last)| share(first, last));
    Ok(Trial { recording, cpu_share, own_mib_s })
}

/// CPU time used until an instant.
type Used = (Instant, Duration);

fn share(first: Used, last: Used) -> f64 {
    let time = last.0.duration_since(first.0).as_secs_f64();
    if time > 0.0 { last.1.saturating_sub(first.1).as_secs_f64() / time } else { 0.0 }
}

/// Follows our own run, to know what CPU time its limited phase takes.
struct Watch<'a> {
    interrupt: &'a Interrupt,
    cpu: Option<(Used, Used)>,
}

impl Progress for Watch<'_> {
    fn sample(&mut self, _: Duration, phase: Phase, _: &[VcpuNow]) {
        if phase == Phase::Limited {
            // The copy of the guest is what a migration would make, and nothing that QEMU does here.
            let now = (Instant::now(), process_time("self").saturating_sub(thread_time("copier")));
            self.cpu = Some((self.cpu.map_or(now, |(first, _)| first), now));
        }
    }

    fn interrupted(&self) -> bool {
        self.interrupt.requested()
    }
}

/// CPU time of a process: user and system, all its threads, in steps of 10 ms.
fn process_time(pid: &str) -> Duration {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything; what is behind it has a fixed order.
    let fields: Vec<_> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |field: usize| fields.get(field).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}

/// CPU time of this process's threads of that name.
fn thread_time(name: &str) -> Duration {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let named = tasks
        .map(|task| task.path())
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim_end() == name));
    let nanos = named.filter_map(|task| {
        let text = fs::read_to_string(task.join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}

fn sample(at: Duration, count: u64) -> Sample {
    Sample { at, net: count, gross: count, paused: Duration::ZERO }
}

/// The ROM for vCPUs with these workloads, and the memory of its machine: `ram` bytes, or as much as they need.
///
/// # Errors
/// A guest for which there is no room.
pub(super) fn rom_of(workloads: &[Workload], ram: Option<u64>) -> Result<(Vec<u8>, u64)> {
    let loads: Vec<_> = workloads.iter().map(|&workload| workload.into()).collect();
    let layout = Layout::new(&loads)?;
    let layout = match ram {
        Some(ram) => layout.with_ram(ram)?,
        None => layout,
    };
    // No doorbell: QEMU has no device there, and each store would cost it a lookup under its big lock.
    let blocks: Vec<Parameters> = (0..loads.len()).map(|index| layout.parameters(index, host_tsc_hz(), 0)).collect();
    Ok((rom::image(&blocks, layout.ram(), payload::image())?, layout.ram()))
}

/// A try under QEMU's dirty limit.
///
/// # Errors
/// QEMU cannot be started, fails or hangs; its guest does not begin.
pub(super) fn qemu(plan: &Plan, program: &Path, interrupt: &Interrupt) -> Result<Trial> {
    let workloads: Vec<_> = plan.vcpus.iter().map(|vcpu| vcpu.workload).collect();
    let (rom, ram) = rom_of(&workloads, None)?;
    let board = Board { ring: Some(plan.ring), vcpus: workloads.len(), ram };
    let mut qemu = Qemu::start(program, &rom, board, &[])?;
    qemu.boot()?;
    place(&mut qemu, workloads.len())?;
    let first = qemu.counters()?;
    let recorded = plan.vcpus.iter().enumerate().map(|(index, vcpu)| VcpuRecording {
        index,
        workload: vcpu.workload,
        limits: Vec::new(),
        samples: vec![Sample::default()],
        free_accesses: 0,
        free_time: Duration::ZERO,
        limited_accesses: 0,
        limited_time: Duration::ZERO,
        stalls: Stalls { tsc_hz: host_tsc_hz(), ..Stalls::default() },
        full_exits: 0,
        paused: Duration::ZERO,
        net_pages: 0,
        gross_pages: 0,
        held_back_pages: 0,
    });
    let recording = Recording::begun(GuestKind::Kvm, plan, probe::host(true, None), recorded.collect());
    let mut run = QemuRun { plan, qemu, interrupt, start: Instant::now(), next: SAMPLE, first, recording };
    run.free()?;
    let (cpu_share, own_mib_s) = run.limited()?;
    Ok(Trial { recording: run.recording, cpu_share, own_mib_s })
}

/// Where there are as many vCPUs as CPUs, each gets its own, as under ours.
pub(super) fn place(qemu: &mut Qemu, vcpus: usize) -> Result<()> {
    let cpus = allowed_cpus().unwrap_or_default();
    if cpus.len() == vcpus {
        for (thread, cpu) in qemu.threads()?.into_iter().zip(cpus) {
            // Only fairness hangs on it, so a system that does not let us pin is no error.
            let _ = pin_thread(thread, &[cpu]);
        }
    }
    Ok(())
}

/// A QEMU whose guest runs, and what has been seen of it.
struct QemuRun<'a> {
    plan: &'a Plan,
    qemu: Qemu,
    interrupt: &'a Interrupt,
    start: Instant,
    /// When the next sample is due.
    next: Duration,
    /// What the guest had counted when the recording began.
    first: Vec<Counters>,
    recording: Recording,
}

impl QemuRun<'_> {
    /// The guest unlimited, but with its dirty pages logged, as under ours: QEMU does that while it measures a rate. It
    /// still measures when the limit is set, so that no page is written unlogged meanwhile.
    fn free(&mut self) -> Result<()> {
        let seconds = (WARM_UP + self.plan.free).as_secs_f64().ceil() + 1.0;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole, and 4 to 60")]
        self.qemu.begin_measuring(seconds as u32)?;
        let began = self.start.elapsed() + WARM_UP;
        self.until(began)?;
        let before = self.sample()?;
        self.until(began + self.plan.free)?;
        let (time, after) = (self.start.elapsed().saturating_sub(began), self.sample()?);
        for (vcpu, (before, after)) in self.recording.vcpus.iter_mut().zip(before.iter().zip(&after)) {
            vcpu.free_accesses = after[stats::ACCESSES] - before[stats::ACCESSES];
            vcpu.free_time = time;
        }
        Ok(())
    }

    fn limited(&mut self) -> Result<(f64, Vec<Option<f64>>)> {
        let before = self.sample()?;
        let began = self.start.elapsed();
        self.recording.limited_at = began;
        let pid = self.qemu.pid().to_string();
        let used = (Instant::now(), process_time(&pid));
        for (index, vcpu) in self.plan.vcpus.iter().enumerate() {
            if let Some(limit) = vcpu.limit {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "whole: checked by `cases`"
                )]
                self.qemu.limit(index, mib_per_sec(limit, PAGE_SIZE) as u64)?;
            }
            self.recording.vcpus[index].limits.push((began, vcpu.limit));
        }
        self.until(began + self.plan.limited)?;
        let after = self.sample()?;
        let end = self.start.elapsed();
        self.recording.end = end;
        let cpu_share = share(used, (Instant::now(), process_time(&pid)));
        for (vcpu, (before, after)) in self.recording.vcpus.iter_mut().zip(before.iter().zip(&after)) {
            vcpu.limited_accesses = after[stats::ACCESSES] - before[stats::ACCESSES];
            vcpu.limited_time = end - began;
            vcpu.stalls = stalls_between(before, after, &vcpu.stalls);
        }
        let mut own = vec![None; self.plan.vcpus.len()];
        for (index, rate) in self.qemu.rates()? {
            if let Some(own) = own.get_mut(index) {
                *own = Some(rate as f64);
            }
        }
        Ok((cpu_share, own))
    }

    /// Samples until then, or until the user has enough.
    fn until(&mut self, until: Duration) -> Result<()> {
        while !self.recording.interrupted {
            let now = self.start.elapsed();
            if now >= until {
                break;
            }
            std::thread::sleep(self.next.min(until).saturating_sub(now));
            if self.start.elapsed() >= self.next {
                self.sample()?;
                self.recording.interrupted = self.interrupt.requested();
            }
        }
        Ok(())
    }

    fn sample(&mut self) -> Result<Vec<Counters>> {
        let asked = self.start.elapsed();
        let counters = self.qemu.counters()?;
        // QEMU read them at some time between question and answer.
        let now = self.start.elapsed();
        let at = asked + (now - asked) / 2;
        for (vcpu, (first, counters)) in self.recording.vcpus.iter_mut().zip(self.first.iter().zip(&counters)) {
            vcpu.samples.push(sample(at, counters[stats::ACCESSES] - first[stats::ACCESSES]));
        }
        while self.next <= now {
            self.next += SAMPLE;
        }
        Ok(counters)
    }
}

/// The gaps of a span of time, from the counters at both its ends: QMP reads the guest's memory, but cannot reset it.
///
/// The longest is exact if it is the longest since the guest began; else it is the upper end of the highest step of the
/// histograms in which one was counted, and so at most 50 µs too long, or from 20 ms on at most twice as long.
pub(super) fn stalls_between(before: &Counters, after: &Counters, units: &Stalls) -> Stalls {
    let grown = |word: usize| after[word] - before[word];
    let shift = stats::fine_shift(units.tsc_hz);
    let histogram: [u64; stats::HISTOGRAM_WORDS] = std::array::from_fn(|bit| grown(stats::HISTOGRAM + bit));
    let fine: Vec<u64> = (0..stats::FINE_WORDS).map(|step| grown(stats::FINE + step)).collect();
    let longest = after[stats::LONGEST];
    let longest_ticks = if longest > before[stats::LONGEST] {
        longest
    } else {
        let fine_end = fine.iter().rposition(|&gaps| gaps > 0).map(|step| (step as u64 + 1) << shift);
        let coarse_end = histogram.iter().rposition(|&gaps| gaps > 0).map(|bit| 2 << bit);
        match fine_end {
            Some(end) if end < (stats::FINE_WORDS as u64) << shift => end,
            _ => coarse_end.unwrap_or(0),
        }
        .min(longest)
    };
    Stalls { longest_ticks, histogram, fine, fine_ticks: 1 << shift, ..units.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(longest: u64, gaps: &[(usize, u64)]) -> Counters {
        let mut page = [0; PAGE_SIZE as usize / 8];
        page[stats::LONGEST] = longest;
        for &(word, count) in gaps {
            page[word] = count;
        }
        page
    }

    #[test]
    fn the_longest_gap_of_a_span_is_exact_or_the_end_of_its_step() {
        let (fine, coarse, last) = (stats::FINE, stats::HISTOGRAM, stats::FINE + stats::FINE_WORDS - 1);
        let longest =
            |before: &Counters, after: &Counters| stalls_between(before, after, &Stalls::default()).longest_ticks;
        let before = counters(300 << 17, &[(fine + 2, 7), (coarse + 18, 7)]);
        assert_eq!(
            longest(&before, &counters(301 << 17, &[(fine + 301, 1), (fine + 2, 7), (coarse + 18, 7)])),
            301 << 17
        );
        assert_eq!(longest(&before, &counters(300 << 17, &[(fine + 2, 8), (coarse + 18, 8)])), 3 << 17);
        assert_eq!(longest(&before, &counters(300 << 17, &[(fine + 2, 7), (coarse + 18, 7)])), 0);
        // Beyond the fine steps, powers of two; never more than the longest of all.
        let before = counters(1 << 30, &[(last, 1), (coarse + 29, 1)]);
        assert_eq!(longest(&before, &counters(1 << 30, &[(last, 2), (coarse + 29, 1), (coarse + 26, 1)])), 2 << 26);
        let before = counters(1 << 30, &[(last, 1), (coarse + 30, 1)]);
        assert_eq!(longest(&before, &counters(1 << 30, &[(last, 2), (coarse + 30, 2)])), 1 << 30);
        let stalls = stalls_between(&before, &counters(1 << 30, &[(last, 2), (coarse + 30, 2)]), &Stalls::default());
        assert_eq!((stalls.histogram[30], stalls.fine[stats::FINE_WORDS - 1]), (1, 1));
    }

    #[test]
    fn cpu_time_is_read() {
        let before = (process_time("self"), thread_time("nobody"));
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(60) || process_time("self") == before.0 {
            assert!(begin.elapsed() < Duration::from_secs(60), "no CPU time passes");
        }
        assert_eq!(before.1, Duration::ZERO);
        assert_eq!(process_time("nobody"), Duration::ZERO);
    }
}
