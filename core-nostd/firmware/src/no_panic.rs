//! Calls everything public of dirtylimit-core with arguments that the optimizer knows nothing of, beside a panic handler
//! that cannot be linked. So this links only if no call can panic, whatever it is given; `ci/no-panic.sh` links it, and
//! checks that nothing public is missing here.
#![no_std]
#![no_main]

use core::fmt::{self, Write};
use core::hint::black_box as any;

use dirtylimit_core::migrate::{Goal, Migration, Reason, Round, Verdict};
use dirtylimit_core::{
    BadRingSize, Charge, Claim, Counters, Counts, EmissionInterval, Ended, Entry, Full, Inline, Limiter, Machine,
    Metered, Nanos, Paced, Pacer, Page, PageRate, Penalty, PenaltyCell, Policy, RateEstimator, Request, Ring, Run,
    Sample, Shipped, Status, Step, Stepped, SteppedState, Terms, Totals, Unenforced, VcpuCell, VcpuIndex, VcpuRing,
    VmCell, ends_slices, level, share,
};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe extern "C" {
        fn the_core_can_panic() -> !;
    }
    // SAFETY: there is no such function, so that no program with this call exists.
    unsafe { the_core_can_panic() }
}

#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    rates();
    cells();
    meters();
    pacers();
    machines();
    rings();
    policies();
    shares();
    limiters();
    migrations();
    texts();
    #[cfg(feature = "planted")]
    any(any(None::<u32>).unwrap());
    loop {
        core::hint::spin_loop();
    }
}

fn rate() -> PageRate {
    any(PageRate::MAX)
}

fn interval() -> EmissionInterval {
    any(EmissionInterval::MAX)
}

fn rates() {
    any(PageRate::from_pages_per_sec(any(0)));
    any(PageRate::from_bytes_per_sec(any(0), any(0)));
    any(PageRate::measured(any(0), any(0)));
    any(PageRate::pages_per_sec(rate()));
    any(PageRate::bytes_per_sec(rate(), any(0)));
    any(PageRate::interval(rate()));
    any(EmissionInterval::from_nanos(any(0)));
    any(EmissionInterval::split(any(0), any(0)));
    any(EmissionInterval::of(interval(), any(0)));
    any(EmissionInterval::pages_for(interval(), any(0)));
}

fn cells() {
    for terms in [Terms::Pace(interval()), Terms::Sleep(interval())] {
        any(Terms::interval(terms));
        any(Penalty::new(any(terms)));
    }
    any(Penalty::terms(any(Penalty::NONE)));
    let (cell, vm) = (&any(PenaltyCell::new()), &any(VmCell::new()));
    PenaltyCell::set(cell, any(Penalty::NONE));
    any(PenaltyCell::accept(cell));
    any(VmCell::is_leased(vm, any(0)));
    VmCell::note_taken(vm, any(0));
    any(VmCell::max_pause(vm));
    VmCell::set_max_pause(vm, any(0));
    any(VcpuCell::new());
}

fn meters() {
    let (counters, mut estimator) = (&any(Counters::new()), any(RateEstimator::default()));
    Counters::add_pages(counters, any(0), any(0));
    Counters::add_full_exit(counters);
    Counters::add_pause(counters, any(0));
    Counters::set_needed_pause(counters, any(0));
    any(Counters::needed_pause(counters));
    Counters::add_charge(counters);
    Counters::add_overlong_pause(counters);
    any(Counters::overlong_pauses(counters));
    any(Counters::charges(counters));
    any(Counters::net(counters));
    let counts: Counts = any(Counters::counts(counters));
    any(Counts::since(counts, any(counts)));
    any(Totals::plus(any(Totals::default()), counts));
    any(RateEstimator::starting_at(counts));
    RateEstimator::fold(&mut estimator, counters);
    any(RateEstimator::read(&mut estimator, counters, any(0)));
    let estimator = &any(estimator);
    any(RateEstimator::rate(estimator));
    any(RateEstimator::demand(estimator));
    any(RateEstimator::totals(estimator, counters));
}

fn pacers() {
    let (counters, vm, cell) = (&any(Counters::new()), &any(VmCell::new()), &any(PenaltyCell::new()));
    let mut pacer = any(Pacer::new(counters));
    any(Pacer::owes(&pacer, counters));
    let charge = any(Pacer::charge(&mut pacer, any(0), vm, cell, counters));
    any(charge);
    any(ends_slices(any(Penalty::NONE)));
}

fn machines() {
    static MEMORY: [Entry; 256] = [const { Entry::new() }; 256];
    let (vm, cell) = (&any(VmCell::new()), &any(VcpuCell::new()));
    let request = &any(Request::new());
    Request::make(request, any(false));
    any(Request::stands(request));
    Request::grant(request);
    let Ok(ring) = Ring::starting_at(any(&MEMORY[..]), any(0)) else { return };
    let mut vcpu = any(VcpuRing::new(ring));
    any(VcpuRing::ring(&vcpu));
    any(VcpuRing::meter(&mut vcpu, cell, |page| any((page, Metered::New)).1));
    any(VcpuRing::collect(&mut vcpu, any(0), |page| _ = any(page)));
    any(VcpuRing::reclaim(&mut vcpu));
    VcpuRing::add_merged(&mut vcpu, any(0));
    VcpuRing::assign(&mut vcpu, any(None), any(false), any(false));
    any(VcpuRing::slice(&vcpu));
    VcpuRing::ask(&mut vcpu, cell, any(0));
    VcpuRing::set_draining(&mut vcpu, any(true));
    any(VcpuRing::to_grant(&vcpu));
    VcpuRing::grant(&mut vcpu, cell);
    any(VcpuRing::plan_sweep(&mut vcpu, cell, any(0), || any(Some(rate()))));
    any(VcpuRing::is_news(&vcpu, cell, any(0)));
    any(VcpuRing::take_emptied(&mut vcpu));
    any(VcpuRing::take_scaled(&mut vcpu));
    let mut machine = any(Machine::new(cell, any(0), any(false), any(false)));
    any(Machine::is_quiet(&machine, cell));
    any(Machine::is_run_over(&machine));
    Machine::full_exit(&mut machine, cell);
    let machine = any(&mut machine);
    _ = any(Machine::begin(machine, any(0), vm, cell));
    _ = any(Machine::busy(machine, any(0), cell));
    _ = any(Machine::harvested(machine, any(0), vm, cell, &mut vcpu, any(false)));
    _ = any(Machine::paused(machine, any(0), any(0), any(Ended::Due), vm, cell));
    any(Machine::has_paused(machine, any(0)));
    _ = any(Machine::reset_later(machine, any(0), any(0), vm, cell));
    _ = any(Machine::reset_done(machine, any(0), cell));
    Machine::armed(machine, any(0));
    Machine::failed(machine, cell);
}

fn page() -> Page {
    any(Page { slot: 0, offset: 0 })
}

fn rings() {
    static MEMORY: [Entry; 256] = [const { Entry::new() }; 256];
    let memory = any(&MEMORY[..]);
    any(Entry::new());
    for entry in memory {
        Entry::push(entry, page());
        any(Entry::reset(entry));
    }
    any(Ring::new(memory).is_ok());
    let Ok(mut ring) = Ring::starting_at(memory, any(0)) else { return };
    let ring = any(&mut ring);
    let each = |page: Page| _ = any(page);
    any(Ring::meter(ring, each));
    any(Ring::collect(ring, any(0), each));
    Ring::for_each_held_back(ring, each);
    any(Ring::reclaim(ring));
    any(Ring::occupied(ring));
    any(Ring::held_back(ring));
    any(Ring::awaiting_reset(ring));
    any(Ring::room(ring));
    any(Ring::size(ring));
    any(Ring::is_new(ring));
    any(Ring::soft_limit(ring));
    Ring::full_exit(any(ring));
    any(Ring::has_lumps(ring));
    any(Ring::to_collect(ring, any(0)));
}

fn stepped() -> Stepped {
    any(Stepped::default())
}

fn policies() {
    let (state, sample, current) = (&mut any(SteppedState::default()), &any(Sample::default()), any(Penalty::NONE));
    any(Policy::penalty(&Paced, &mut (), sample, rate(), current));
    any(Policy::penalty(&stepped(), state, sample, rate(), current));
    any(Shipped::named(any("paced")));
    any(Policy::penalty(&any(Shipped::default()), any(state), sample, rate(), any(current)));
}

fn shares() {
    let claims = [(); 64].map(|()| any(Claim::new(rate(), any(0))));
    let claims = any(&claims[..]);
    any(level(claims.iter().copied(), rate()));
    any(share(rate(), any(0)));
}

fn limiters() {
    static LIMITER: Limiter<Shipped, Inline<16>> = Limiter::new(Shipped::Paced(Paced));
    let limiter = any(&LIMITER);
    any::<Limiter<Shipped, Inline<1>>>(Limiter::with_cells(any(Shipped::default()), [VcpuCell::new()]));
    any(Limiter::vm(limiter));
    // Any index, of whatever limiter.
    let Ok(vcpu) = any(Limiter::register(limiter)) else { return };
    any(VcpuIndex::get(vcpu));
    any(Limiter::cell(limiter, vcpu));
    let limit = || any(Some(rate()));
    Limiter::set_limit(limiter, vcpu, limit());
    Limiter::set_limit_all(limiter, limit());
    Limiter::set_vm_limit(limiter, limit());
    Limiter::set_weight(limiter, vcpu, any(0));
    Limiter::set_policy(limiter, any(Shipped::Stepped(stepped())));
    any(Limiter::vm_limit(limiter));
    any(Limiter::query(limiter, vcpu, any(0)));
    Limiter::fold(limiter);
    any(Limiter::news(limiter));
    Limiter::tick(limiter, any(0));
    Limiter::unregister(limiter, vcpu);
}

fn migrations() {
    let goal = any(Goal { deadline: any(Some(0)), bandwidth: any(Some(0)), ..Goal::new(any(0)) });
    let mut migration = any(Migration::new(goal));
    Migration::set_goal(any(&mut migration), goal);
    for _ in 0..any(3) {
        Migration::sample(&mut migration, any(0), any(0));
        Migration::watch(&mut migration, any(0), any(0));
        let plan = any(Migration::finish_round(&mut migration, &any(Round::default())));
        any(Verdict::name(plan.verdict));
    }
}

/// Takes any text, and fails when it likes.
struct Sink;

impl Write for Sink {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        any(text);
        any(Ok(()))
    }
}

fn texts() {
    let _ = write!(Sink, "{}", any(BadRingSize { entries: 0 }));
    let _ = write!(Sink, "{}", any(Unenforced::Lapsed));
    any(Unenforced::name(any(Unenforced::Lapsed)));
    let _ = write!(Sink, "{}", any(Reason::Fits));
    let _ = write!(Sink, "{}", any(Full { capacity: 0 }));
}

/// What the calls above return is public as well.
const _: fn(Charge, Status, Nanos, Step, Run) = |_, _, _, _, _| ();
