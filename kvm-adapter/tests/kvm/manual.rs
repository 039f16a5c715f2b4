//! Manual protection of the dirty log (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`): left on, a VM with a ring logs nothing at all.

use anyhow::{Result, ensure};
use dirtylimit_kvm::{Config, DirtyLimit};
use dirtylimit_test_vm::payload::{self, Mode};
use dirtylimit_test_vm::{Exit, Load, Machine, SLOT, kvm_or_skip};
use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, kvm_enable_cap};

use crate::common::{Copy, drive};

/// When a VMM enables it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Before {
    TheRing,
    AddSlot,
    /// Against the rules.
    Logging,
}

/// How many pages are lost of a guest whose logging begins while it is at work; `None` where KVM has no such protection.
fn lost(when: Before, argument: u64) -> Result<Option<usize>> {
    let machine = Machine::new(&[Load::new(Mode::Write, 2048 * 4096)], payload::image())?;
    let enable = |now| -> Result<bool> {
        let cap =
            kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args: [argument, 0, 0, 0], ..Default::default() };
        Ok(now != when || machine.vm().enable_cap(&cap).is_ok())
    };
    let mut offered = enable(Before::TheRing)?;
    let limit = DirtyLimit::enable(machine.vm(), &Config::new().ring_entries(1024))?;
    ensure!(limit.caps().manual_protect || !offered || when != Before::TheRing);
    offered &= enable(Before::AddSlot)?;
    limit.add_slot(SLOT, machine.memory().pages() as u64)?;
    machine.plug_memory(false)?;
    let cpu = machine.vcpu(0)?;
    let handle = limit.add_vcpu(0, cpu.fd())?;
    cpu.bind_to_this_thread();
    let (kicker, mut vcpu) = (cpu.kicker(), (cpu, handle));
    // It writes to all of its memory, so that every page is mapped, and writable.
    let mut run = |accesses| -> Result<()> {
        let goal = machine.stats(0).accesses() + accesses;
        while machine.stats(0).accesses() < goal {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                    kicker.kick();
                });
                drive(&mut vcpu, |exit| exit == Exit::Interrupted)
            })?;
        }
        Ok(())
    };
    run(4096)?;
    offered &= enable(Before::Logging)?;
    machine.plug_memory(true)?;
    let mut copy = Copy::new(machine.memory());
    for _ in 0..3 {
        run(3000)?;
        copy.take(&limit.last_round().and_then(|round| round.take(SLOT))?)?;
    }
    Ok(offered.then(|| copy.lost()))
}

#[test]
fn manual_protection_is_switched_off() {
    if !kvm_or_skip() {
        return;
    }
    for argument in [1, 3] {
        for when in [Before::TheRing, Before::AddSlot] {
            if let Some(lost) = lost(when, argument).unwrap() {
                assert_eq!(lost, 0, "{argument}, {when:?}");
            }
        }
    }
    // What happens where nobody switches it off: so this test would notice.
    if let Some(lost) = lost(Before::Logging, 3).unwrap() {
        assert!(lost > 1000, "{lost}: no harm is done, so this test shows nothing");
    }
}
