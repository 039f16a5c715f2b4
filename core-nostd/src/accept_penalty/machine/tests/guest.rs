//! A guest with its kernel, driven by the machine.

use std::rc::Rc;

use super::*;

/// A vCPU with its kernel. Time passes in pauses alone.
pub(super) struct Guest {
    pub(super) entries: Rc<[Entry]>,
    pub(super) vcpu: VcpuRing<Rc<[Entry]>>,
    pub(super) machine: Machine,
    pub(super) vm: VmCell,
    pub(super) cell: VcpuCell,
    pub(super) now: Nanos,
    /// Entries pushed and reset.
    pub(super) dirty: u32,
    pub(super) reset: u32,
    /// Pages that the CPU hands over together.
    pub(super) lump: u32,
    pub(super) served: Nanos,
    pub(super) longest: Nanos,
    pub(super) has_timers: bool,
}

impl Guest {
    pub(super) fn new(kicks: bool, timers: bool) -> Self {
        let entries: Rc<[Entry]> = (0..SIZE).map(|_| Entry::new()).collect();
        let vcpu = VcpuRing::new(Ring::new(entries.clone()).unwrap());
        let (vm, cell) = (VmCell::new(), VcpuCell::new());
        let machine = Machine::new(&cell, SIZE, kicks, timers);
        let now = 1000 * SECOND;
        vm.renew(now);
        Self {
            entries,
            vcpu,
            machine,
            vm,
            cell,
            now,
            dirty: 0,
            reset: 0,
            lump: 1,
            served: 0,
            longest: 0,
            has_timers: timers,
        }
    }

    pub(super) fn limited(rate: u32) -> Self {
        let mut guest = Self::new(false, false);
        guest.limit(rate);
        assert_eq!(guest.write(u32::MAX), SOFT);
        assert!(is_enter(guest.exit()));
        guest
    }

    /// Another limit, in pages a second.
    pub(super) fn limit(&self, rate: u32) {
        self.cell.penalty.set(Penalty::new(Terms::Pace(PageRate::from_pages_per_sec(rate).interval())));
    }

    pub(super) fn entry(&self, index: u32) -> &Entry {
        &self.entries[(index % SIZE) as usize]
    }

    /// KVM_RUN: the guest writes that number of pages, each another one, or fills its ring. How many it wrote.
    pub(super) fn write(&mut self, pages: u32) -> u32 {
        let begin = self.dirty;
        while self.dirty - begin < pages && self.dirty - self.reset < SOFT + 1 - self.lump {
            for _ in 0..self.lump {
                self.entry(self.dirty).push(Page { slot: 0, offset: self.dirty.into() });
                self.dirty += 1;
            }
        }
        self.dirty - begin
    }

    /// KVM_RUN returned with a full ring: up to what is to follow.
    pub(super) fn exit(&mut self) -> Step {
        self.machine.full_exit(&self.cell);
        self.before_run()
    }

    pub(super) fn before_run(&mut self) -> Step {
        self.vm.renew(self.now);
        let step = self.machine.begin(self.now, &self.vm, &self.cell);
        self.follow(step)
    }

    pub(super) fn follow(&mut self, mut step: Step) -> Step {
        loop {
            step = match step {
                Step::Harvest => self.harvest(),
                Step::Pause { until, .. } => self.pause(until, Ended::Due),
                Step::Reset => match self.machine.reset_later(self.now, self.served, &self.vm, &self.cell) {
                    Some(step) => step,
                    None => self.grant(),
                },
                Step::Enter(Run { timers: Some(_), .. }) => {
                    self.machine.armed(self.now);
                    return step;
                }
                Step::Enter(_) | Step::Return(_) | Step::Wedged(_) => return step,
            };
        }
    }

    pub(super) fn harvest(&mut self) -> Step {
        self.vcpu.meter(&self.cell, |_| Metered::New);
        let Self { machine, now, vm, cell, vcpu, has_timers, .. } = self;
        machine.harvested(*now, vm, cell, vcpu, *has_timers)
    }

    pub(super) fn pause(&mut self, until: Nanos, ended: Ended) -> Step {
        let from = self.now;
        self.now = self.now.max(until);
        self.longest = self.longest.max(self.now - from);
        self.machine.paused(from, self.now, ended, &self.vm, &self.cell)
    }

    /// A reset, for what the vCPU has asked for.
    pub(super) fn grant(&mut self) -> Step {
        self.empty(self.vcpu.to_grant());
        self.vcpu.grant(&self.cell);
        self.served = self.now;
        self.machine.reset_done(self.now, &self.cell)
    }

    pub(super) fn empty(&mut self, count: u32) {
        self.vcpu.collect(count, |_| ());
        while self.entry(self.reset).reset().is_some() {
            self.reset += 1;
        }
        self.vcpu.reclaim();
    }
}
