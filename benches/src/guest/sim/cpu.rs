//! The modelled vCPU while it is in the guest: its workload, and the gaps that the guest sees.

use std::ops::Range;

use dirtylimit_core::Nanos;

use super::costs::{self, Dice, STALL, TIMER, TOUCH};
use super::kernel::{Access, KernelRing, Memory};
use crate::record::Stalls;
use crate::workload::Workload;

/// One vCPU's workload.
#[derive(Debug)]
pub(super) struct Cpu {
    workload: Workload,
    pages: Range<usize>,
    /// The next page, but for `random`.
    next: usize,
    /// When the workload began; bursts count from there.
    began: Nanos,
    /// The guest's last look at its clock.
    looked: Nanos,
    disturbed: Nanos,
    /// The next host timer interrupt.
    timer: Nanos,
    /// Where the workload is, and apart from that what the machine does: a workload must not depend on the latter.
    choices: Dice,
    pub(super) dice: Dice,
    /// Pages known to be mapped, from the first one on: readers fault on none of these.
    mapped: usize,
    pub(super) accesses: u64,
    pub(super) stalls: Stalls,
}

impl Cpu {
    pub(super) fn new(workload: Workload, pages: Range<usize>, seed: u64, index: usize, began: Nanos) -> Self {
        let (index, next) = (index as u64, pages.start);
        let mut dice = Dice::new(seed, 2 * index);
        let (disturbed, timer) = (began + dice.undisturbed(), began + dice.next() % TIMER);
        let stalls = Stalls { threshold_ticks: STALL, ..Stalls::default() };
        let choices = Dice::new(seed, 2 * index + 1);
        Self {
            workload,
            pages,
            next,
            began,
            looked: began,
            disturbed,
            timer,
            choices,
            dice,
            mapped: 0,
            accesses: 0,
            stalls,
        }
    }

    /// Whether it never touches memory.
    pub(super) fn is_idle(&self) -> bool {
        self.pages.is_empty()
    }

    /// Forgets the stalls seen so far.
    pub(super) fn begin_phase(&mut self) {
        (self.stalls.longest_ticks, self.stalls.histogram) = (0, [0; 64]);
    }

    /// What came for this CPU while the vCPU paused does not come after it: a thread that wakes waits for the host's work
    /// first, and the host's timers fired meanwhile. Returns when that is done.
    pub(super) fn catch_up(&mut self, mut now: Nanos) -> Nanos {
        if now >= self.disturbed {
            now += self.dice.preempted();
            self.disturbed = now + self.dice.undisturbed();
        }
        if now >= self.timer {
            self.timer = now - (now - self.timer) % TIMER + TIMER;
        }
        now
    }

    /// Runs from `now` until `horizon` or until its ring is full, whichever comes first; returns when that is.
    pub(super) fn run(&mut self, mut now: Nanos, horizon: Nanos, ring: &mut KernelRing, memory: &mut Memory) -> Nanos {
        while now < horizon && !ring.is_full() {
            if now >= self.disturbed {
                now += self.dice.preempted();
                self.disturbed = now + self.dice.undisturbed();
            }
            if now >= self.timer {
                ring.flush();
                now += costs::KERNEL_EXIT;
                self.timer = now - (now - self.timer) % TIMER + TIMER;
                continue;
            }
            if let Some(work) = self.rest(now) {
                now = work.min(self.timer).min(horizon);
                self.looked = now;
                continue;
            }
            now = self.access(now, horizon, ring, memory);
        }
        now
    }

    /// Until when the workload rests.
    fn rest(&self, now: Nanos) -> Option<Nanos> {
        if !matches!(self.workload, Workload::Burst(_)) {
            return None;
        }
        let into = (now - self.began) % (2 * costs::HALF_PERIOD);
        (into >= costs::HALF_PERIOD).then(|| now - into + 2 * costs::HALF_PERIOD)
    }

    fn access(&mut self, now: Nanos, horizon: Nanos, ring: &mut KernelRing, memory: &mut Memory) -> Nanos {
        let write = self.workload.writes();
        if !write && self.mapped == self.pages.len() {
            // Reading mapped pages changes nothing: all of it at once.
            self.look(now);
            let count = (horizon.min(self.disturbed).min(self.timer).max(now + 1) - now).div_ceil(TOUCH);
            self.accesses += count;
            self.looked = now + (count - 1) * TOUCH;
            return now + count * TOUCH;
        }
        self.look(now);
        let page = self.choose();
        let access = ring.touch(memory, page, write);
        self.accesses += 1;
        let work = match self.workload {
            Workload::Slow(_) => costs::SLOW_WORK,
            Workload::Steady(_) => costs::STEADY_WORK,
            _ => 0,
        };
        now + TOUCH
            + work
            + match access {
                Access::Plain => 0,
                Access::Fault => self.dice.fault(),
                Access::Logged { full: false } => costs::LOGGED,
                Access::Logged { full: true } => costs::LOGGED + costs::KERNEL_EXIT,
            }
    }

    fn choose(&mut self) -> usize {
        if matches!(self.workload, Workload::Random(_)) {
            return self.pages.start + self.choices.below(self.pages.len());
        }
        let page = self.next;
        self.mapped = self.mapped.max(page + 1 - self.pages.start);
        self.next = if page + 1 == self.pages.end { self.pages.start } else { page + 1 };
        page
    }

    /// The guest reads its clock before an access.
    fn look(&mut self, now: Nanos) {
        let gap = now - self.looked;
        self.looked = now;
        self.stalls.longest_ticks = self.stalls.longest_ticks.max(gap);
        if gap >= STALL {
            self.stalls.histogram[gap.ilog2() as usize] += 1;
        }
    }
}
