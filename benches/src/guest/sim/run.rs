//! One run in virtual time: free, then limited, then the proof that nothing was lost.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dirtylimit_core::{Nanos, PageRate, Policy, SECOND, Totals, VcpuIndex};

use super::adapter::{Adapter, MAX_VCPUS};
use super::costs::Dice;
use super::cpu::Cpu;
use super::kernel::Memory;
use super::vcpu::Vcpu;
use super::{Machine, costs};
use crate::guest::{Phase, Progress, VcpuNow};
use crate::plan::Plan;
use crate::record::{GuestKind, Host, Recording, Sample, Stalls, VcpuRecording};
use crate::units::PAGE_SIZE;

/// Distance between two samples.
const SAMPLE: Nanos = 10_000_000;
/// Interval of the throttle tick.
const TICK: Nanos = 50_000_000;
/// The machine's clock when the run starts: not 0, as no host's is.
const START: Nanos = 1000 * SECOND;
/// Clocks of vCPUs may be so far apart.
const SLACK: Nanos = 10_000;
/// So many pages are simulated at most: 64 GiB.
const MAX_PAGES: u64 = 1 << 24;

/// What happens beside the vCPUs, in the order in which it does when it is due at the same time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Event {
    /// The throttle tick.
    Tick,
    /// A pass over the dirty log goes on.
    Pass,
    /// The first quarter of the free phase is over, in which the guest touches its memory for the first time.
    Warm,
    /// The limit is set: step 0 is the first one, the plan's own are counted from 1.
    Limit(usize),
    Sample,
    End,
}

/// A run that goes on.
pub(super) struct Run<'a, P: Policy> {
    plan: &'a Plan,
    progress: &'a mut dyn Progress,
    adapter: Adapter<P>,
    vcpus: Vec<Vcpu>,
    indices: Vec<VcpuIndex>,
    /// What happens next; each event that recurs puts itself back.
    events: Vec<(Nanos, Event)>,
    /// What a pass that goes on has left to collect of each ring, and when its reset returns.
    pass: Option<(Vec<u32>, bool)>,
    dice: Dice,
    phase: Phase,
    /// At the start of the phase: when, the accesses, and the totals of each vCPU, and the resets.
    since: Nanos,
    accesses: Vec<u64>,
    totals: Vec<Totals>,
    resets: (u64, u64),
    recording: Recording,
}

impl<'a, P: Policy> Run<'a, P> {
    pub(super) fn new(machine: Machine, policy: P, plan: &'a Plan, progress: &'a mut dyn Progress) -> Result<Self> {
        ensure!(plan.vcpus.len() <= MAX_VCPUS, "{} vCPUs: at most {MAX_VCPUS} are simulated", plan.vcpus.len());
        let sizes = plan.vcpus.iter().map(|vcpu| vcpu.workload.bytes() / u64::from(PAGE_SIZE));
        let pages = sizes.clone().fold(0, u64::saturating_add);
        ensure!(
            pages <= MAX_PAGES,
            "the workloads take {} MiB together: at most {} MiB are simulated",
            pages >> 8,
            MAX_PAGES >> 8
        );
        let pages_of_all = pages;
        let mut adapter = Adapter::new(policy, Memory::new(usize::try_from(pages)? + plan.vcpus.len()), machine);
        adapter.limiter.vm().set_max_pause(nanos(plan.max_pause));
        let (mut vcpus, mut indices, mut first) = (Vec::new(), Vec::new(), 0);
        for (id, (vcpu, pages)) in plan.vcpus.iter().zip(sizes).enumerate() {
            // Behind the workloads' memory.
            let steal = machine.steal_time.then_some(usize::try_from(pages_of_all)? + id);
            indices.push(adapter.add_vcpu(plan.ring, steal).with_context(|| format!("cannot add vCPU {id}"))?);
            let end = first + usize::try_from(pages)?;
            let cpu = Cpu::new(vcpu.workload, first..end, machine.seed, id, START);
            vcpus.push(Vcpu::new(id, cpu, &adapter, START));
            first = end;
        }
        let limited = START + nanos(plan.free);
        let mut events = vec![
            (START, Event::Tick),
            (START + nanos(plan.pass), Event::Pass),
            (START + nanos(plan.free / 4), Event::Warm),
            (START + SAMPLE, Event::Sample),
            (limited, Event::Limit(0)),
            (limited + nanos(plan.limited), Event::End),
        ];
        let steps = plan.steps.iter().enumerate();
        events.extend(steps.map(|(index, step)| (limited + nanos(step.after), Event::Limit(index + 1))));
        let recording = Recording::begun(
            GuestKind::Sim,
            plan,
            host(&machine, plan.vcpus.len()),
            (0..plan.vcpus.len()).map(|index| recorded(plan, index)).collect(),
        );
        let dice = Dice::new(machine.seed, u64::MAX);
        Ok(Self {
            accesses: vec![0; vcpus.len()],
            totals: vec![Totals::default(); vcpus.len()],
            plan,
            progress,
            adapter,
            vcpus,
            indices,
            events,
            pass: None,
            dice,
            phase: Phase::Free,
            since: START,
            resets: (0, 0),
            recording,
        })
    }

    pub(super) fn all(mut self) -> Result<Recording> {
        let end = loop {
            let (at, event) = *self.events.iter().min().context("the run has no end")?;
            self.run_vcpus(at);
            self.events.retain(|other| *other != (at, event));
            if self.recording.interrupted || event == Event::End {
                break at;
            }
            self.happen(at, event);
        };
        self.end(end);
        self.show(Phase::Checking, end);
        // A reset that was under way when the vCPUs stopped returns first.
        if self.adapter.locked.is_some() {
            self.adapter.finish_reset();
        }
        self.adapter.last_sync(end);
        self.recording.lost_pages = Some(self.adapter.memory.lost());
        Ok(self.recording)
    }

    /// Lets the vCPUs do what they have to do before `until`, in order of their clocks.
    fn run_vcpus(&mut self, until: Nanos) {
        let mut due = self.due();
        let mut in_guest = self.vcpus.iter().filter(|vcpu| vcpu.is_in_guest()).count();
        while let Some((at, who)) = due.pop_first().filter(|(at, _)| *at < until) {
            debug_assert_eq!(at, self.vcpus[who].at);
            let next = due.first().map_or(Nanos::MAX, |(at, _)| *at);
            let horizon = until.min(next.saturating_add(SLACK));
            in_guest -= usize::from(self.vcpus[who].is_in_guest());
            let has_reset = self.vcpus[who].act(horizon, &mut self.adapter, in_guest > 0);
            in_guest += usize::from(self.vcpus[who].is_in_guest());
            if has_reset {
                self.flush_others(who);
                due = self.due();
            } else {
                due.insert((self.vcpus[who].at, who));
            }
        }
    }

    /// When each vCPU has something to do next.
    fn due(&self) -> BTreeSet<(Nanos, usize)> {
        self.vcpus.iter().enumerate().map(|(id, vcpu)| (vcpu.at, id)).collect()
    }

    fn flush_others(&mut self, who: usize) {
        self.vcpus.iter_mut().enumerate().filter(|(id, _)| *id != who).for_each(|(_, vcpu)| vcpu.flushed());
    }

    fn happen(&mut self, now: Nanos, event: Event) {
        match event {
            Event::Tick => {
                if self.adapter.locked.is_none() {
                    let kicked = self.adapter.meter_and_kick();
                    self.kick(now, &kicked);
                }
                self.adapter.limiter.tick(now);
                self.events.push((now + TICK - (now - START) % TICK + self.dice.oversleep(), event));
            }
            Event::Pass => self.pass(now),
            Event::Warm => self.begin(now),
            Event::Limit(0) => self.limit(now),
            Event::Limit(step) => {
                let limit = self.plan.steps.get(step - 1).and_then(|step| step.limit);
                (0..self.vcpus.len()).for_each(|vcpu| self.set_limit(now, vcpu, limit));
            }
            // The lock is waited for.
            Event::Sample if self.adapter.locked.is_some_and(|until| until > now) => {
                self.events.push((self.adapter.locked.unwrap_or(now) + 1, event));
            }
            Event::Sample => {
                self.sample(now);
                self.events.push((now + SAMPLE - (now - START) % SAMPLE, event));
            }
            Event::End => {}
        }
    }

    /// A pass begins, or one of its batches was reset.
    fn pass(&mut self, now: Nanos) {
        let resetting = matches!(self.pass, Some((_, true)));
        if let Some(until) = self.adapter.locked.filter(|_| !resetting) {
            return self.events.push((until.max(now) + 1, Event::Pass));
        }
        let mut left = match self.pass.take() {
            None => {
                self.adapter.meter_all();
                self.adapter.pass(now)
            }
            Some((left, true)) => {
                self.adapter.finish_reset();
                self.flush_others(usize::MAX);
                // For a moment others may have the lock.
                self.pass = Some((left, false));
                return self.events.push((now + 1000, Event::Pass));
            }
            Some((left, false)) => left,
        };
        let others_run = self.vcpus.iter().any(Vcpu::is_in_guest);
        if let Some(end) = self.adapter.begin_reset(now, others_run, &mut left) {
            self.pass = Some((left, true));
            return self.events.push((end, Event::Pass));
        }
        if self.adapter.kicks() {
            let emptied = self.adapter.emptied();
            self.kick(now, &emptied);
        }
        for vcpu in self.adapter.take() {
            self.tell(now, vcpu);
        }
        let interval = nanos(self.plan.pass).max(1);
        self.events.push((now + interval - (now - START) % interval + self.dice.oversleep(), Event::Pass));
    }

    fn kick(&mut self, now: Nanos, vcpus: &[usize]) {
        let kicks = self.adapter.kicks();
        vcpus.iter().filter(|_| kicks).for_each(|vcpu| self.vcpus[*vcpu].kick(now));
    }

    fn tell(&mut self, now: Nanos, vcpu: usize) {
        self.vcpus[vcpu].tell(now, &self.adapter);
    }

    /// From here on is counted.
    fn begin(&mut self, now: Nanos) {
        self.since = now;
        self.accesses = self.vcpus.iter().map(|vcpu| vcpu.cpu.accesses).collect();
        self.totals = (0..self.vcpus.len()).map(|vcpu| self.totals(vcpu)).collect();
        self.resets = (self.adapter.reset_pages, self.adapter.reset_calls);
    }

    fn limit(&mut self, now: Nanos) {
        for (recorded, (vcpu, before)) in self.recording.vcpus.iter_mut().zip(self.vcpus.iter_mut().zip(&self.accesses))
        {
            (recorded.free_accesses, recorded.free_time) = (vcpu.cpu.accesses - before, since(self.since, now));
            vcpu.cpu.begin_phase();
        }
        self.sample(now);
        self.begin(now);
        self.phase = Phase::Limited;
        self.recording.limited_at = since(START, now);
        self.adapter.limiter.set_vm_limit(self.plan.vm_limit);
        for vcpu in 0..self.vcpus.len() {
            self.set_limit(now, vcpu, self.plan.vcpus[vcpu].limit);
        }
    }

    fn set_limit(&mut self, now: Nanos, vcpu: usize, limit: Option<PageRate>) {
        self.adapter.limiter.set_limit(self.indices[vcpu], limit);
        self.tell(now, vcpu);
        self.recording.vcpus[vcpu].limits.push((since(START, now), limit));
    }

    /// The limited phase is over, or the user has enough.
    fn end(&mut self, now: Nanos) {
        self.recording.end = since(START, now);
        if self.phase == Phase::Free {
            self.recording.limited_at = self.recording.end;
            self.begin(now);
        }
        self.sample(now);
        self.recording.reset_pages = self.adapter.reset_pages - self.resets.0;
        self.recording.reset_calls = self.adapter.reset_calls - self.resets.1;
        for id in 0..self.vcpus.len() {
            let (last, first) = (self.totals(id), self.totals[id]);
            if last.full_exits > 0 {
                let soft = self.adapter.places[id].ring().soft_limit();
                self.recording.host.soft_limit = Some(self.recording.host.soft_limit.map_or(soft, |low| low.min(soft)));
            }
            let (recorded, cpu) = (&mut self.recording.vcpus[id], &self.vcpus[id].cpu);
            (recorded.limited_accesses, recorded.limited_time) =
                (cpu.accesses - self.accesses[id], since(self.since, now));
            recorded.stalls = cpu.stalls.clone();
            recorded.full_exits = last.full_exits - first.full_exits;
            recorded.paused = Duration::from_micros(last.paused_us - first.paused_us);
            recorded.net_pages = last.net_pages - first.net_pages;
            recorded.gross_pages = last.gross_pages - first.gross_pages;
            recorded.held_back_pages = self.adapter.places[id].ring().held_back();
        }
    }

    fn totals(&self, vcpu: usize) -> Totals {
        self.adapter.limiter.query(self.indices[vcpu], START).map_or(Totals::default(), |status| status.totals)
    }

    fn sample(&mut self, now: Nanos) {
        self.adapter.meter_all();
        let at = since(START, now);
        for id in 0..self.vcpus.len() {
            let Totals { net_pages: net, gross_pages: gross, paused_us, .. } = self.totals(id);
            let samples = &mut self.recording.vcpus[id].samples;
            if samples.last().is_none_or(|last| last.at < at) {
                samples.push(Sample { at, net, gross, paused: Duration::from_micros(paused_us) });
            }
        }
        self.show(self.phase, now);
        self.recording.interrupted |= self.progress.interrupted();
    }

    fn show(&mut self, phase: Phase, now: Nanos) {
        let vcpus: Vec<VcpuNow> = self.recording.vcpus.iter().map(VcpuNow::of).collect();
        self.progress.sample(since(START, now), phase, &vcpus);
    }
}

fn since(earlier: Nanos, now: Nanos) -> Duration {
    Duration::from_nanos(now - earlier)
}

fn nanos(time: Duration) -> Nanos {
    // A year is as good as for ever.
    u64::try_from(time.as_nanos()).unwrap_or(Nanos::MAX).min(365 * 86_400 * SECOND)
}

fn host(machine: &Machine, cpus: usize) -> Host {
    let kernel = format!("none: simulated, seed {}", machine.seed);
    let cpu = if machine.pml { "modelled, with PML" } else { "modelled" };
    Host { kernel, cpu: cpu.into(), cpus, ..Host::default() }
}

fn recorded(plan: &Plan, index: usize) -> VcpuRecording {
    VcpuRecording {
        index,
        workload: plan.vcpus[index].workload,
        limits: Vec::new(),
        samples: Vec::new(),
        free_accesses: 0,
        free_time: Duration::ZERO,
        limited_accesses: 0,
        limited_time: Duration::ZERO,
        stalls: Stalls { threshold_ticks: costs::STALL, ..Stalls::default() },
        full_exits: 0,
        paused: Duration::ZERO,
        net_pages: 0,
        gross_pages: 0,
        held_back_pages: 0,
    }
}
