//! The wait-free operations, each under a name of its own, for `ci/wait-free.sh` to look at their machine code; and what
//! must not pass there.
#![no_std]

use core::sync::atomic::{AtomicU32, Ordering};

use dirtylimit_core::{
    Ended, Machine, Nanos, Pacer, Penalty, PenaltyCell, Report, Request, Step, Turn, VcpuCell, VmCell,
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
    fn wait_free_owes(pacer: &Pacer, report: &Report) -> bool { pacer.owes(report) }
    fn wait_free_settle(pacer: &mut Pacer, now: Nanos, vm: &VmCell, cell: &PenaltyCell, report: &Report) -> Turn {
        pacer.settle(now, vm, cell, report)
    }
    fn wait_free_add_pages(report: &Report, net: u32, gross: u32) { report.add_pages(net, gross) }
    fn wait_free_add_full_exit(report: &Report) { report.add_full_exit() }
    fn wait_free_add_turn(report: &Report) { report.add_turn() }
    fn wait_free_add_overlong_pause(report: &Report) { report.add_overlong_pause() }
    fn wait_free_add_pause(report: &Report, pause: Nanos) { report.add_pause(pause) }
    fn wait_free_set_needed_pause(report: &Report, pause: Nanos) { report.set_needed_pause(pause) }
    fn wait_free_net(report: &Report) -> u32 { report.net() }
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
    fn planted_call(report: &Report, each: fn(u32)) -> u32 {
        each(report.net());
        report.net()
    }
    fn planted_tail_call(report: &Report, each: fn(u32)) { each(report.net()) }
}
