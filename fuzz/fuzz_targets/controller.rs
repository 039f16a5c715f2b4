//! The controller under any sequence of calls, times and reports, against a model of what was asked of it: nothing
//! panics, every limit, penalty and total is the model's, and the budget is neither exceeded nor left unused.
#![no_main]

use dirtylimit_core::{
    Inline, Limiter, MAX_DEBT, Paced, Pacer, PageRate, Penalty, Shipped, Stepped, Terms, Totals, VcpuIndex, VmCell,
};
use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};

const VCPUS: usize = 4;
type Vm = Limiter<Shipped, Inline<VCPUS>>;

#[derive(Arbitrary, Debug)]
enum Step {
    Register,
    Unregister { vcpu: u8 },
    Limit { vcpu: u8, limit: Option<Rate> },
    LimitAll { limit: Option<Rate> },
    Budget { budget: Option<Rate> },
    Weight { vcpu: u8, weight: u32 },
    Paced,
    Stepped { period: u64, far: u8, near: u8, step: u8 },
    MaxPause { nanos: u64 },
    Tick { time: Time },
    Counters { vcpu: u8, net: u32, gross: u32, paused: u64 },
    Settle { vcpu: u8, time: Time },
}

/// Mostly rates that somebody would set, sometimes any.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Rate {
    Pages(u16),
    Bytes(u64, u16),
}

impl From<Rate> for PageRate {
    fn from(rate: Rate) -> Self {
        match rate {
            Rate::Pages(pages) => Self::from_pages_per_sec(pages.into()),
            Rate::Bytes(bytes, page_size) => Self::from_bytes_per_sec(bytes, page_size.into()),
        }
    }
}

/// Mostly a while after the last one, sometimes any.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Time {
    Later(u32),
    At(u64),
}

/// What one vCPU was asked for and told, since it was registered.
struct Vcpu {
    index: VcpuIndex,
    limit: Option<PageRate>,
    weight: u32,
    /// As of the last tick, and since.
    totals: Totals,
    since: [u64; 4],
    pacer: Pacer,
    /// What its pacer last said that it would need, in ns.
    needed_pause: u64,
}

struct Model {
    vcpus: [Option<Vcpu>; VCPUS],
    /// The indices handed out, the last for each place: stale ones must do no harm.
    known: [Option<VcpuIndex>; VCPUS],
    limit: Option<PageRate>,
    budget: Option<PageRate>,
    policy: Shipped,
    ticked: Option<u64>,
    now: u64,
}

/// A rate in its own unit, 1/1024 pages per second.
fn raw(rate: PageRate) -> u128 {
    u128::from(rate.bytes_per_sec(1024))
}

fn raised(limit: Option<Rate>) -> Option<PageRate> {
    limit.map(|limit| PageRate::from(limit).max(PageRate::MIN_LIMIT))
}

impl Model {
    fn known(&self, vcpu: u8) -> Option<VcpuIndex> {
        self.known[usize::from(vcpu) % VCPUS]
    }

    fn vcpu(&mut self, vcpu: u8) -> Option<&mut Vcpu> {
        self.vcpus[usize::from(vcpu) % VCPUS].as_mut()
    }

    fn time(&mut self, time: Time) -> u64 {
        self.now = match time {
            Time::Later(nanos) => self.now.saturating_add(nanos.into()),
            Time::At(nanos) => nanos,
        };
        self.now
    }

    fn step(&mut self, vm: &Vm, step: Step) {
        match step {
            Step::Register => self.register(vm),
            Step::Unregister { vcpu } => {
                if let Some(index) = self.known(vcpu) {
                    vm.unregister(index);
                    self.vcpus[index.get()] = None;
                }
            }
            Step::Limit { vcpu, limit } => {
                if let Some(index) = self.known(vcpu) {
                    vm.set_limit(index, limit.map(PageRate::from));
                }
                if let Some(vcpu) = self.vcpu(vcpu) {
                    vcpu.limit = raised(limit);
                }
            }
            Step::LimitAll { limit } => {
                vm.set_limit_all(limit.map(PageRate::from));
                self.limit = raised(limit);
                self.vcpus.iter_mut().flatten().for_each(|vcpu| vcpu.limit = raised(limit));
            }
            Step::Budget { budget } => {
                vm.set_vm_limit(budget.map(PageRate::from));
                self.budget = raised(budget);
                self.check_budget(vm);
            }
            Step::Weight { vcpu, weight } => {
                if let Some(index) = self.known(vcpu) {
                    vm.set_weight(index, weight);
                }
                if let Some(vcpu) = self.vcpu(vcpu) {
                    vcpu.weight = weight.max(1);
                }
            }
            Step::Paced => self.set_policy(vm, Shipped::Paced(Paced)),
            Step::Stepped { period, far, near, step } => {
                let stepped = Stepped { period, far_percent: far, near_percent: near, step_percent: step };
                self.set_policy(vm, Shipped::Stepped(stepped));
            }
            Step::MaxPause { nanos } => vm.vm().set_max_pause(nanos),
            Step::Tick { time } => {
                let now = self.time(time);
                vm.tick(now);
                self.ticked = Some(now);
                for vcpu in self.vcpus.iter_mut().flatten() {
                    vcpu.totals = vcpu.totals_now();
                    vcpu.since = [0; 4];
                }
                self.check_budget(vm);
            }
            Step::Counters { vcpu, net, gross, paused } => {
                let Some(vcpu) = self.vcpu(vcpu) else { return };
                let counters = &vm.cell(vcpu.index).expect("a place of the table").counters;
                counters.add_pages(net, gross);
                counters.add_full_exit();
                counters.add_pause(paused);
                // No counter wraps between two looks: each step is followed by a query, which folds.
                for (sum, more) in vcpu.since.iter_mut().zip([net, gross, 1, (paused / 1000) as u32]) {
                    *sum += u64::from(more);
                }
            }
            Step::Settle { vcpu, time } => self.charge(vm, vcpu, time),
        }
    }

    fn register(&mut self, vm: &Vm) {
        match vm.register() {
            Ok(index) => {
                assert!(self.vcpus[index.get()].is_none(), "a place given away twice");
                let counters = &vm.cell(index).expect("a place of the table").counters;
                let (pacer, totals) = (Pacer::new(counters), Totals::default());
                self.known[index.get()] = Some(index);
                self.vcpus[index.get()] =
                    Some(Vcpu { index, limit: self.limit, weight: 1, totals, since: [0; 4], pacer, needed_pause: 0 });
            }
            Err(full) => {
                assert!(self.vcpus.iter().all(Option::is_some), "a place is free");
                assert_eq!(full.capacity, VCPUS);
            }
        }
    }

    fn set_policy(&mut self, vm: &Vm, policy: Shipped) {
        vm.set_policy(policy);
        self.policy = policy;
    }

    fn charge(&mut self, vm: &Vm, vcpu: u8, time: Time) {
        let (now, ticked) = (self.time(time), self.ticked);
        let Some(vcpu) = self.vcpu(vcpu) else { return };
        let cell = vm.cell(vcpu.index).expect("a place of the table");
        let charge = vcpu.pacer.charge(now, vm.vm(), &cell.penalty, &cell.counters);
        assert!(charge.until <= now.saturating_add(vm.vm().max_pause().min(MAX_DEBT)), "longer than the longest pause");
        match charge.slice {
            Some(slice) => assert!(slice > 0 && cell.penalty.accept() != Penalty::NONE),
            None => assert_eq!(charge.until, now, "a pause without a limit"),
        }
        assert!(ticked != Some(now) || charge.slice.is_some() == (cell.penalty.accept() != Penalty::NONE));
        assert!(!vcpu.pacer.owes(&cell.counters) || charge.until > now, "owes, but need not pause");
        assert_eq!(
            vcpu.pacer.charge(now, vm.vm(), &cell.penalty, &cell.counters),
            charge,
            "nothing new, another answer"
        );
        vcpu.needed_pause = cell.counters.needed_pause();
    }

    /// After a split: all together, each taking what it asks for and may, use up the budget where they ask for so much.
    fn check_budget(&self, vm: &Vm) {
        let Some(budget) = self.budget else { return };
        let (mut asked, mut used, mut slack) = (0u128, 0u128, 0u128);
        for vcpu in self.vcpus.iter().flatten() {
            let status = vm.query(vcpu.index, 0).expect("registered");
            let wants = vcpu.limit.map_or(status.demand, |limit| limit.min(status.demand));
            asked += raw(wants);
            used += raw(wants.min(status.effective_limit.expect("a budget limits every vCPU")));
            // Levels are rounded to whole units, times the weight; a limit is at least one unit.
            slack += u128::from(vcpu.weight) + 1;
        }
        assert!(used <= raw(budget) + slack, "{used} of {budget:?} used, {slack} is rounding");
        assert!(used + slack >= asked.min(raw(budget)), "{used} of {budget:?} used, {asked} asked for");
    }

    fn check(&self, vm: &Vm) {
        for (place, vcpu) in self.vcpus.iter().enumerate() {
            let Some(index) = self.known[place] else { continue };
            let penalty = vm.cell(index).expect("a place of the table").penalty.accept();
            let Some(vcpu) = vcpu else {
                assert_eq!(vm.query(index, 0), None);
                assert_eq!(penalty, Penalty::NONE, "nobody's penalty");
                continue;
            };
            let status = vm.query(index, 0).expect("registered");
            assert_eq!(status.limit, vcpu.limit);
            assert_eq!(status.totals, vcpu.totals_now());
            assert_eq!(status.penalty, penalty);
            assert_eq!(status.effective_limit.is_some(), vcpu.limit.is_some() || self.budget.is_some());
            assert!(vcpu.limit.is_none_or(|limit| status.effective_limit.is_some_and(|effective| effective <= limit)));
            match (status.effective_limit, self.policy) {
                (None, _) => assert_eq!(penalty, Penalty::NONE),
                (Some(limit), Shipped::Paced(_)) => assert_eq!(penalty.terms(), Some(Terms::Pace(limit.interval()))),
                (Some(_), Shipped::Stepped(_)) => assert!(!matches!(penalty.terms(), Some(Terms::Pace(_)))),
                _ => {}
            }
            let pause = penalty.terms().map(|terms| terms.interval().of(1).max(vcpu.needed_pause));
            assert_eq!(status.needs_pause, pause.filter(|pause| *pause > vm.vm().max_pause()));
        }
        if let Some(now) = self.ticked {
            assert!(vm.vm().is_leased(now));
            assert!(!vm.vm().is_leased(now.wrapping_add(2 * VmCell::LEASE)), "a lease outlives the controller");
        }
    }
}

impl Vcpu {
    fn totals_now(&self) -> Totals {
        let [net, gross, full_exits, paused] = self.since;
        let mut totals = self.totals;
        totals.net_pages += net;
        totals.gross_pages += gross;
        totals.full_exits += full_exits;
        totals.paused_us += paused;
        totals
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let vm = Vm::new(Shipped::default());
    let mut model = Model {
        vcpus: [const { None }; VCPUS],
        known: [None; VCPUS],
        limit: None,
        budget: None,
        policy: Shipped::default(),
        ticked: None,
        now: 0,
    };
    for step in steps {
        model.step(&vm, step);
        model.check(&vm);
    }
});
