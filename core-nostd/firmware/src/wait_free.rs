//! The wait-free operations, each under a name of its own, for `ci/wait-free.sh` to look at their machine code; and what
//! must not pass there.
#![no_std]

use core::sync::atomic::{AtomicU32, Ordering};

use dirtylimit_core::{
    Charge, Counters, Ended, Machine, Nanos, Pacer, Penalty, PenaltyCell, Request, Step, VcpuCell, VmCell,
};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// Functions under their own names, none inlined into another.
macro_rules! functions {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub fn $name($($argument: $type),*) $(-> $result)? $body
        )*
    };
}

functions! {
    fn wait_free_set(cell: &PenaltyCell, penalty: Penalty) { cell.set(penalty) }
    fn wait_free_accept(cell: &PenaltyCell) -> Penalty { cell.accept() }
    fn wait_free_is_leased(vm: &VmCell, now: Nanos) -> bool { vm.is_leased(now) }
    fn wait_free_max_pause(vm: &VmCell) -> Nanos { vm.max_pause() }
    fn wait_free_owes(pacer: &Pacer, counters: &Counters) -> bool { pacer.owes(counters) }
    fn wait_free_charge(pacer: &mut Pacer, now: Nanos, vm: &VmCell, cell: &PenaltyCell, counters: &Counters) -> Charge {
        pacer.charge(now, vm, cell, counters)
    }
    fn wait_free_add_pages(counters: &Counters, net: u32, gross: u32) { counters.add_pages(net, gross) }
    fn wait_free_add_full_exit(counters: &Counters) { counters.add_full_exit() }
    fn wait_free_add_charge(counters: &Counters) { counters.add_charge() }
    fn wait_free_add_overlong_pause(counters: &Counters) { counters.add_overlong_pause() }
    fn wait_free_add_pause(counters: &Counters, pause: Nanos) { counters.add_pause(pause) }
    fn wait_free_set_needed_pause(counters: &Counters, pause: Nanos) { counters.set_needed_pause(pause) }
    fn wait_free_net(counters: &Counters) -> u32 { counters.net() }
    fn wait_free_make(request: &Request, stands: bool) { request.make(stands) }
    fn wait_free_stands(request: &Request) -> bool { request.stands() }
    fn wait_free_grant(request: &Request) { request.grant() }
    fn wait_free_begin(machine: &mut Machine, now: Nanos, vm: &VmCell, cell: &VcpuCell) -> Step {
        machine.begin(now, vm, cell)
    }
    fn wait_free_busy(machine: &mut Machine, now: Nanos, cell: &VcpuCell) -> Step { machine.busy(now, cell) }
    fn wait_free_paused(
        machine: &mut Machine, from: Nanos, now: Nanos, ended: Ended, vm: &VmCell, cell: &VcpuCell
    ) -> Step {
        machine.paused(from, now, ended, vm, cell)
    }
    fn wait_free_reset_later(
        machine: &mut Machine, now: Nanos, last: Nanos, vm: &VmCell, cell: &VcpuCell
    ) -> Option<Step> {
        machine.reset_later(now, last, vm, cell)
    }
    fn wait_free_reset_done(machine: &mut Machine, now: Nanos, cell: &VcpuCell) -> Step { machine.reset_done(now, cell) }

    // Each breaks one rule.
    fn planted_add(word: &AtomicU32) -> u32 { word.fetch_add(1, Ordering::Relaxed) }
    fn planted_swap(word: &AtomicU32) -> u32 { word.swap(1, Ordering::Relaxed) }
    fn planted_retry(word: &AtomicU32) -> bool {
        word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| old.checked_mul(3)).is_ok()
    }
    fn planted_wait(cell: &PenaltyCell) { while cell.accept() != Penalty::NONE {} }
    fn planted_call(counters: &Counters, each: fn(u32)) -> u32 {
        each(counters.net());
        counters.net()
    }
    fn planted_tail_call(counters: &Counters, each: fn(u32)) { each(counters.net()) }
}
