//! Guests with steal time, as every Linux guest has it: KVM logs a page of its own at nearly each entry and exit, which must
//! not use up a slice.

use std::time::Duration;

use dirtylimit_kvm::{Config, PageRate, Unenforced};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Exit, Load, SLOT, kvm_or_skip};

use crate::common::{Copy, machine, vcpu};
use crate::rig::Watchdog;

const RING: u32 = 1024;
const MIB: u64 = 1 << 20;
/// In the guest's memory, but behind what it writes to, and before the doorbell.
const BEHIND: u64 = 2 * MIB;
const PAUSE: Duration = Duration::from_millis(10);

#[test]
fn a_guest_with_steal_time_makes_progress_under_every_limit() {
    if !kvm_or_skip() {
        return;
    }
    for limit in [25, 100, 255, 256, 320, 400, 5120, 25_600] {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let loads = [Load::new(Mode::Write, 32 * MIB), Load::new(Mode::Write, BEHIND)];
        let (machine, limiter) = machine(&loads, &Config::new().ring_entries(RING).max_pause(PAUSE)).unwrap();
        let (mut cpu, mut handle) = vcpu(&machine, &limiter, 0).unwrap();
        cpu.enable_steal_time(machine.workload(1).start).unwrap();
        let mut copy = Copy::new(machine.memory());
        limiter.set_limit(0, PageRate::from_pages_per_sec(limit)).unwrap();
        let (mut full, mut empty, mut pauses, mut paused) = (0u32, 0u32, 0u32, Duration::ZERO);
        let (mut in_a_row, mut longest) = (0, 0);
        // Begins with a ring that is full, of pages that are forgiven; a complete take in the middle empties it once more.
        for run in 0..160 {
            if run == 80 {
                copy.take(&limiter.last_round().and_then(|round| round.take(SLOT)).unwrap()).unwrap();
                assert_eq!(copy.lost(), 0);
            }
            limiter.tick();
            _ = handle.before_run().unwrap();
            (pauses, paused) = (pauses + u32::from(!handle.paused().is_zero()), paused.max(handle.paused()));
            let before = machine.stats(0).accesses();
            if cpu.run().unwrap() == Exit::RingFull {
                full += 1;
            }
            let wrote = machine.stats(0).accesses() - before;
            in_a_row = if wrote == 0 { in_a_row + 1 } else { 0 };
            (empty, longest) = (empty + u32::from(wrote == 0), longest.max(in_a_row));
        }
        let told = format!(
            "{limit} pages/s: {full} full exits, {empty} runs without a page, {longest} in a row, {pauses} pauses"
        );
        eprintln!("{told}, the longest {paused:?}");
        assert!(full >= 150, "{told}");
        // KVM pushes more where the host takes the CPU away: such a slice may be used up, and the next has room for it.
        assert!(longest <= 8 && empty <= 60, "{told}");
        // None was longer than the longest on purpose, as for a lump. How late the host ends one is not judged here.
        limiter.tick();
        let why = limiter.query(0).unwrap().unenforced;
        assert_ne!(why, Some(Unenforced::Lumps), "{told}");
        copy.take(&limiter.last_round().and_then(|round| round.take(SLOT)).unwrap()).unwrap();
        assert_eq!(copy.lost(), 0, "{told}");
    }
}
