//! 64-bit Arm: memory that KVM writes outside any vCPU, for an interrupt translation service (ITS). Such a page is in no ring.

use anyhow::{Context, Result};
use dirtylimit_kvm::{Config, PageRate};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Exit, Load, Machine, SLOT, kvm_or_skip};
use kvm_bindings::{
    KVM_DEV_ARM_ITS_SAVE_TABLES, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_ITS_REGS, KVM_VGIC_ITS_ADDR_TYPE, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST,
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::DeviceFd;

use crate::common::{Copy, drive, machine, vcpu};
use crate::rig::Watchdog;

const MIB: u64 = 1 << 20;
/// Where the interrupt controller's registers are, above all memory.
const DISTRIBUTOR: u64 = 4 << 30;
const REDISTRIBUTORS: u64 = DISTRIBUTOR + 16 * MIB;
const ITS: u64 = DISTRIBUTOR + 32 * MIB;
/// GITS_BASER1, of the table of collections.
const COLLECTIONS: u32 = 0x108;

/// An attribute of a device; one of no value is a command.
fn set(device: &DeviceFd, group: u32, attribute: u32, value: Option<u64>) -> Result<()> {
    let addr = value.as_ref().map_or(0, |value| (&raw const *value).addr() as u64);
    device
        .set_device_attr(&kvm_device_attr { group, attr: u64::from(attribute), addr, flags: 0 })
        .with_context(|| format!("group {group}, attribute {attribute:#x}"))
}

fn create(machine: &Machine, type_: u32) -> Result<DeviceFd> {
    let mut device = kvm_create_device { type_, ..Default::default() };
    machine.vm().create_device(&mut device).with_context(|| format!("KVM_CREATE_DEVICE {type_}"))
}

/// A GICv3 with an ITS whose table of collections is at `table`; after the vCPUs, as KVM wants it.
fn its(machine: &Machine, table: u64) -> Result<(DeviceFd, DeviceFd)> {
    let gic = create(machine, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3)?;
    set(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST, Some(DISTRIBUTOR))?;
    set(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_REDIST, Some(REDISTRIBUTORS))?;
    set(&gic, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, None)?;
    let its = create(machine, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS)?;
    set(&its, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE, Some(ITS))?;
    set(&its, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, None)?;
    // Valid, one page of 64 KiB.
    set(&its, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, COLLECTIONS, Some(1 << 63 | 2 << 8 | table))?;
    Ok((gic, its))
}

#[test]
fn a_table_that_kvm_saves_outside_any_vcpu_is_in_the_last_log() {
    if !kvm_or_skip() {
        return;
    }
    let _watchdog = Watchdog::new(std::time::Duration::from_secs(60));
    // The second vCPU never runs: its memory is nobody's but the table's.
    let loads = [Load::new(Mode::Write, 8 * MIB), Load::new(Mode::Write, 2 * MIB)];
    let (machine, limit) = machine(&loads, &Config::new().ring_entries(1024)).unwrap();
    assert!(limit.caps().bitmap);
    let mut limited = vcpu(&machine, &limit, 0).unwrap();
    let table = machine.workload(1).start;
    let (_gic, its) = its(&machine, table).unwrap();
    // The table's end is a zero, which KVM writes over this.
    machine.memory().write(table, &[u64::MAX]);
    let mut copy = Copy::new(machine.memory());

    limit.set_limit(0, PageRate::from_pages_per_sec(100_000)).unwrap();
    let mut full = 0;
    drive(&mut limited, |exit| {
        full += u32::from(exit == Exit::RingFull);
        full == 20
    })
    .unwrap();
    set(&its, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_ITS_SAVE_TABLES, None).unwrap();

    let page = usize::try_from(table / 4096).unwrap();
    assert_eq!(machine.memory().page(page)[0].load(std::sync::atomic::Ordering::Relaxed), 0, "KVM wrote no table");
    let names = |log: &[u64]| log[page / 64] >> (page % 64) & 1 == 1;
    // It is in no ring, and so in nothing that a running pass publishes.
    let published = limit.round().and_then(|round| round.take(SLOT)).unwrap();
    assert!(!names(&published));
    copy.take(&published).unwrap();
    assert!(copy.lost() > 0, "the pages that are held back, and the table");
    let last = limit.last_round().and_then(|round| round.take(SLOT)).unwrap();
    assert!(names(&last));
    copy.take(&last).unwrap();
    assert_eq!(copy.lost(), 0);
    assert!(!names(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()), "it is told once");
}
