//! One attempt to migrate a guest over a connection; whatever comes of it, the guest runs on one of its two sides.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use super::address::Stream;
use super::cli::Plan;
use super::guest::Guest;
use super::link::{End, Link};
use super::modes::{Mode, Steering, mib_s};
use super::result::{Migrated, VcpuRecord, Verdict, kept};
use super::source::{SILENCE, Source, Switched, Watcher};
use crate::report::progress::Interrupt;
use crate::workload::Workload;

/// How long all vCPUs run between two holds, as in QEMU's auto-converge.
const TIMESLICE: Duration = Duration::from_millis(10);
/// How long the guest is watched at the source, after a migration that did not come about.
const RUN_ON: Duration = Duration::from_millis(500);
/// How long the guest may take at the source until it is seen to go on.
const RESUME: Duration = Duration::from_secs(2);

/// A guest that runs at the source.
#[derive(Debug)]
pub(super) struct Subject<'a> {
    pub(super) guest: &'a Guest,
    pub(super) plan: &'a Plan,
    /// Accesses per second of each vCPU without a dirty log.
    pub(super) free: &'a [f64],
}

impl Subject<'_> {
    /// Migrates the guest over `stream`. Where that does not come about, the guest runs on, without a throttle.
    pub(super) fn attempt(
        &self,
        number: u32,
        stream: Stream,
        interrupt: &Interrupt,
        watcher: &mut dyn Watcher,
    ) -> Migrated {
        let plan = self.plan;
        let steering = Steering::new(plan.mode, plan.downtime, plan.deadline, plan.carry_on);
        let link = match Link::new(stream, plan.bandwidth, SILENCE, interrupt.clone()) {
            Ok(link) => link,
            Err(end) => return self.failed(number, &end),
        };
        let first = steering.first(plan.bandwidth);
        let held_percent = AtomicU32::new(0);
        let mut source = Source::new(self.guest, link, steering, plan.downtime, &held_percent, watcher);
        let outcome = self.holding(&held_percent, || source.run(first));
        let ended = Instant::now();
        let mut migrated = self.failed(number, &End::Cancelled);
        let before = self.guest.accesses();
        let time = match &outcome {
            Ok(switched) => {
                self.note_switch(&mut migrated, &before, switched);
                switched.at - source.begun - switched.check
            }
            Err(end) => {
                (migrated.verdict, migrated.reason) = (verdict(end), end.to_string());
                if !source.handed_over {
                    migrated.source_resumed_ms = self.resume(&before, ended, &mut migrated);
                }
                ended - source.begun
            }
        };
        migrated.total_s = time;
        migrated.sent_mib = source.sent() as f64 / f64::from(1 << 20);
        migrated.memory_equal = source.unequal.map(|pages| pages == 0);
        migrated.unequal_pages = source.unequal;
        migrated.longest_stall_ms = migrated.longest_stall_ms.max(self.guest.longest_gap());
        let (shares, lost) = kept(self.free, source.accesses_before(), &before, time);
        migrated.vcpus.iter_mut().zip(shares).for_each(|(vcpu, share)| vcpu.work_kept_pct = share);
        migrated.lost_guest_s = lost;
        (migrated.rounds, migrated.samples) = (source.rounds, source.samples);
        migrated
    }

    /// What there is to say of an attempt that ended before its first round.
    pub(super) fn failed(&self, attempt: u32, end: &End) -> Migrated {
        let plan = self.plan;
        let vcpu = |(index, &workload): (usize, &Workload)| VcpuRecord {
            index,
            workload,
            work_kept_pct: None,
            free_accesses_per_s: self.free.get(index).copied().unwrap_or(0.0),
        };
        Migrated {
            mode: plan.mode,
            verdict: verdict(end),
            total_s: Duration::ZERO,
            downtime_ms: None,
            sent_mib: 0.0,
            rounds: Vec::new(),
            lost_guest_s: None,
            longest_stall_ms: Duration::ZERO,
            memory_equal: None,
            vcpus: plan.workloads.iter().enumerate().map(vcpu).collect(),
            reason: end.to_string(),
            memory_mib: plan.memory >> 20,
            bandwidth_mib_s: mib_s(plan.bandwidth),
            downtime_allowed_ms: plan.downtime,
            guest_downtime_ms: None,
            check_ms: None,
            unequal_pages: None,
            counters_go_on: None,
            source_resumed_ms: None,
            source_work_pct: None,
            source_paused_ms: None,
            attempt,
            ring: plan.ring,
            samples: Vec::new(),
        }
    }

    /// Lets the guest run for a while, and notes what it does, and how much of that the limiter keeps it paused.
    pub(super) fn run_on(&self, migrated: &mut Migrated) {
        let (before, begin) = (self.guest.work(), Instant::now());
        thread::sleep(RUN_ON);
        let (after, time) = (self.guest.work(), begin.elapsed());
        let (shares, _) = kept(self.free, &before.accesses, &after.accesses, time);
        let shares: Vec<_> = shares.into_iter().flatten().collect();
        migrated.source_work_pct = (!shares.is_empty()).then(|| shares.iter().sum::<f64>() / shares.len() as f64);
        migrated.source_paused_ms = Some(after.paused.saturating_sub(before.paused));
    }

    /// Runs `run`, and beside it keeps all vCPUs out of the guest for that share of the time, where the mode does so.
    fn holding<T>(&self, percent: &AtomicU32, run: impl FnOnce() -> T) -> T {
        if self.plan.mode != Mode::Uniform {
            return run();
        }
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                // Relaxed: numbers by themselves.
                while !done.load(Relaxed) {
                    let percent = percent.load(Relaxed).min(99);
                    if percent > 0 {
                        self.guest.hold(true);
                        thread::sleep(TIMESLICE * percent / (100 - percent));
                        self.guest.hold(false);
                    }
                    thread::sleep(TIMESLICE);
                }
            });
            let _end = Raise(&done);
            run()
        })
    }

    fn note_switch(&self, migrated: &mut Migrated, before: &[u64], switched: &Switched) {
        migrated.verdict = Verdict::Done;
        migrated.reason = "the guest runs at the destination".into();
        migrated.guest_downtime_ms = switched.by_guest;
        migrated.downtime_ms = Some(switched.downtime.max(switched.by_guest.unwrap_or_default()));
        migrated.check_ms = Some(switched.check);
        let report = &switched.report;
        migrated.longest_stall_ms = Duration::from_nanos(report.longest);
        let goes_on = |((&before, &(came, end)), workload): ((&u64, &(u64, u64)), &Workload)| {
            came == before && (end > came || *workload == Workload::Idle)
        };
        let all = report.accesses.len() == before.len()
            && before.iter().zip(&report.accesses).zip(&self.plan.workloads).all(goes_on);
        migrated.counters_go_on = Some(all && report.steps_back == 0);
    }

    /// The guest goes on at the source, without throttle and log. Returns how long after `ended` it was seen to.
    fn resume(&self, before: &[u64], ended: Instant, migrated: &mut Migrated) -> Option<Duration> {
        self.guest.set_budget(None);
        self.guest.hold(false);
        let resumed = self.guest.set_draining(false).and_then(|()| self.guest.start()).map(|()| {
            let works = self.guest.wait_for_work(before, false, RESUME);
            works.then(|| ended.elapsed())
        });
        match resumed.and_then(|resumed| self.guest.log(false).map(|()| resumed)) {
            Ok(resumed) => resumed,
            Err(error) => {
                migrated.reason += &format!("; and the guest cannot go on at the source: {error:#}");
                None
            }
        }
    }
}

/// Ends the thread beside, by a panic too: the scope waits for it.
pub(super) struct Raise<'a>(pub(super) &'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn verdict(end: &End) -> Verdict {
    match end {
        End::Cancelled => Verdict::Cancelled,
        End::Unreachable(_) => Verdict::Unreachable,
        End::Stalled(_) => Verdict::Stalled,
        End::Unequal(_) | End::Failed(_) => Verdict::Failed,
    }
}
