//! The adapter's words outside its lock: pauses, interrupts, kicks, and which handle a vCPU belongs to. No time passes, so that a
//! wake-up that is lost is a deadlock.
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "loom's cells are not Sync; its threads are coroutines of one thread"
)]

use std::sync::Arc;

use dirtylimit_loom::adapter::{Vcpu, throttle};
use dirtylimit_loom::explore::{ALL, FULL, fails, holds};
use dirtylimit_loom::weaken::site;
use loom::cell::UnsafeCell;
use loom::thread;

/// Each of `others` has something for the VMM's thread, which pauses until it has heard of all.
fn interrupts(others: usize, blind: bool) {
    let vcpu = Vcpu::new(false);
    let tasks: Arc<Vec<_>> = Arc::new((0..others).map(|_| UnsafeCell::new(())).collect());
    let thread = thread::spawn({
        let (vcpu, tasks) = (vcpu.clone(), tasks.clone());
        move || {
            let penalty = vcpu.penalty();
            let mut known = 0;
            while known as usize != tasks.len() {
                assert!(vcpu.pause(penalty, known, blind), "nothing but interrupts ends this pause");
                known = vcpu.interrupts();
            }
            tasks.iter().for_each(|task| task.with(|_| ()));
        }
    });
    let interrupt = |vcpu: &Vcpu, tasks: &[UnsafeCell<()>], at: usize| {
        tasks[at].with_mut(|_| ());
        vcpu.interrupt();
    };
    let more: Vec<_> = (1..others)
        .map(|at| {
            let (vcpu, tasks) = (vcpu.clone(), tasks.clone());
            thread::spawn(move || interrupt(&vcpu, &tasks, at))
        })
        .collect();
    interrupt(&vcpu, &tasks, 0);
    for other in more {
        other.join().expect("no panic");
    }
    thread.join().expect("no panic");
}

#[test]
fn no_interrupt_is_lost() {
    holds("no_interrupt_is_lost", ALL, 60, || interrupts(1, false));
}

/// Two at once have more executions than can be explored: up to so many preemptions.
const TWO: Option<usize> = Some(if FULL { 4 } else { 2 });

#[test]
fn no_interrupt_of_two_is_lost() {
    holds("no_interrupt_of_two_is_lost", TWO, 1500, || interrupts(2, false));
}

#[test]
fn twin_sleeps_without_a_second_look() {
    fails("a futex that does not compare", ALL, None, "deadlock", || interrupts(1, true));
}

#[test]
fn twin_pokes_relaxed() {
    fails("poke relaxed", TWO, Some(site("shared.rs", "wake")), "deadlock", || interrupts(2, false));
}

#[test]
fn twin_pauses_relaxed() {
    fails("pause relaxed", ALL, Some(site("shared.rs", "pause")), "deadlock", || interrupts(1, false));
}

#[test]
fn twin_interrupts_relaxed() {
    let site = site("shared.rs", "interrupt");
    fails("interrupt relaxed", ALL, Some(site), "Causality violation", || interrupts(1, false));
}

#[test]
fn twin_hears_relaxed() {
    let site = site("shared.rs", "interrupts");
    fails("interrupts relaxed", ALL, Some(site), "Causality violation", || interrupts(1, false));
}

/// A limit changes while its vCPU pauses, or is about to.
fn changes(told_first: bool) {
    let vcpu = Vcpu::new(false);
    let penalty = vcpu.penalty();
    let thread = thread::spawn({
        let vcpu = vcpu.clone();
        move || {
            assert!(!vcpu.pause(penalty, 0, false), "nobody interrupts");
            assert_ne!(vcpu.penalty(), penalty, "the new limit");
        }
    });
    if told_first {
        vcpu.tell();
        vcpu.set_limit(20_000);
    } else {
        vcpu.set_limit(20_000);
        vcpu.tell();
    }
    thread.join().expect("no panic");
}

#[test]
fn a_pause_ends_when_its_limit_changes() {
    holds("a_pause_ends_when_its_limit_changes", ALL, 60, || changes(false));
}

#[test]
fn twin_tells_before_the_limit_is_set() {
    fails("told before set", ALL, None, "deadlock", || changes(true));
}

/// Two threads want the shared state that a third leaves.
fn owners() {
    let vcpu = Vcpu::new(false);
    let state = Arc::new(UnsafeCell::new(()));
    let own = |vcpu: &Vcpu, state: &UnsafeCell<()>| {
        if vcpu.take() {
            state.with_mut(|_| ());
            vcpu.leave();
        }
    };
    let others = [(); 2].map(|()| {
        let (vcpu, state) = (vcpu.clone(), state.clone());
        thread::spawn(move || own(&vcpu, &state))
    });
    state.with_mut(|_| ());
    vcpu.leave();
    for other in others {
        other.join().expect("no panic");
    }
    assert!(vcpu.take() && !vcpu.take(), "it is for one");
}

#[test]
fn a_vcpu_has_one_owner() {
    holds("a_vcpu_has_one_owner", ALL, 100, owners);
}

#[test]
fn twin_leaves_relaxed() {
    fails("leave relaxed", ALL, Some(site("shared.rs", "leave")), "Causality violation", owners);
}

#[test]
fn twin_takes_relaxed() {
    fails("take relaxed", ALL, Some(site("shared.rs", "take")), "Causality violation", owners);
}

/// What a twin does wrong about kicks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kicked {
    Right,
    /// As it should be, for two limits, one after the other.
    Twice,
    /// The kick is counted before its signal is sent.
    CountedFirst,
    /// The kick goes out before the limit is set.
    BeforeTheLimit,
}

/// A limit is news to a vCPU that runs, or is about to.
fn kicks(how: Kicked) {
    let vcpu = Vcpu::new(how == Kicked::CountedFirst);
    let penalty = vcpu.penalty();
    let mut kicks = vcpu.kicks();
    let thread = thread::spawn({
        let vcpu = vcpu.clone();
        move || {
            if kicks.look(&vcpu) {
                let news = vcpu.is_kicked() || vcpu.penalty() != penalty;
                assert!(news || how == Kicked::CountedFirst, "a kick taken back for nothing");
            }
            kicks
        }
    });
    match how {
        Kicked::Right => {
            vcpu.set_limit(20_000);
            vcpu.tell();
        }
        Kicked::Twice => {
            for pages in [20_000, 30_000] {
                vcpu.set_limit(pages);
                vcpu.tell();
            }
        }
        Kicked::CountedFirst => {
            vcpu.set_limit(20_000);
            vcpu.tell();
            vcpu.raise();
        }
        Kicked::BeforeTheLimit => {
            vcpu.tell();
            vcpu.set_limit(20_000);
        }
    }
    let mut kicks = thread.join().expect("no panic");
    // It looks again when the kick has ended its run, and then runs on.
    kicks.look(&vcpu);
    assert!(!vcpu.is_kicked(), "one kick ends every run");
}

#[test]
fn a_kick_ends_one_run() {
    holds("a_kick_ends_one_run", ALL, 5, || kicks(Kicked::Right));
}

/// Between two kicks it may be taking the first one back.
#[test]
fn a_kick_of_two_ends_one_run() {
    holds("a_kick_of_two_ends_one_run", ALL, 130, || kicks(Kicked::Twice));
}

#[test]
fn twin_counts_a_kick_before_it_is_sent() {
    fails("kick counted first", ALL, None, "ends every run", || kicks(Kicked::CountedFirst));
}

#[test]
fn twin_kicks_before_the_limit_is_set() {
    fails("kicked before set", ALL, None, "for nothing", || kicks(Kicked::BeforeTheLimit));
}

#[test]
fn the_throttle_thread_ends_when_it_is_dropped() {
    holds("the_throttle_thread_ends_when_it_is_dropped", ALL, 25, || throttle(false));
}

#[test]
fn twin_throttle_thread_sleeps_without_a_second_look() {
    fails("a throttle thread's futex that does not compare", ALL, None, "deadlock", || throttle(true));
}
