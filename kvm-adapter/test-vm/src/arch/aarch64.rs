//! 64-bit Arm: EL1 with its MMU on. Without it all memory would be Device memory, which is slow, and neither unaligned nor
//! exclusive accesses work there. No interrupt is ever injected, so the VM has no interrupt controller.

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA, KVM_REG_ARM_CORE, KVM_REG_ARM64,
    KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_U64, kvm_device_attr, kvm_regs, kvm_vcpu_init, user_pt_regs,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::Start;
use crate::PAGE_SIZE;
use crate::layout::{DOORBELL_BYTES, HUGE_PAGE, PAGE_TABLES};
use crate::memory::GuestMemory;
use crate::payload::IMAGE_ADDRESS;

/// How the guest runs, in a word.
pub const LEVEL: &str = "EL1 guest";
/// What is wrong when the guest shuts down, which is what its exception vectors do.
pub const FAULT: &str =
    "an exception: the payload did what EL1 may not do, left its memory, or is for another architecture";

/// Guest-physical address of the exception vectors: the page before the page tables.
const VECTORS: u64 = 0;
const _: () = assert!(VECTORS + 0x800 <= PAGE_TABLES);

const PC: u64 = core(std::mem::offset_of!(kvm_regs, regs) + std::mem::offset_of!(user_pt_regs, pc));
const PSTATE: u64 = core(std::mem::offset_of!(kvm_regs, regs) + std::mem::offset_of!(user_pt_regs, pstate));
const X0: u64 = core(0);
const X1: u64 = core(8);
const SP_EL1: u64 = core(std::mem::offset_of!(kvm_regs, sp_el1));
const ELR_EL1: u64 = core(std::mem::offset_of!(kvm_regs, elr_el1));
const SCTLR_EL1: u64 = system([3, 0, 1, 0, 0]);
const TTBR0_EL1: u64 = system([3, 0, 2, 0, 0]);
const TCR_EL1: u64 = system([3, 0, 2, 0, 2]);
const ESR_EL1: u64 = system([3, 0, 5, 2, 0]);
const FAR_EL1: u64 = system([3, 0, 6, 0, 0]);
const MAIR_EL1: u64 = system([3, 0, 10, 2, 0]);
const VBAR_EL1: u64 = system([3, 0, 12, 0, 0]);

/// KVM's name of a register at that offset in `kvm_regs`.
const fn core(offset: usize) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | (offset as u64 / 4)
}

/// KVM's name of a system register, by op0, op1, CRn, CRm and op2.
const fn system([op0, op1, crn, crm, op2]: [u64; 5]) -> u64 {
    let name = op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2;
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | name
}

/// What all vCPUs of a VM have in common.
#[derive(Debug)]
pub(crate) struct Platform {
    init: kvm_vcpu_init,
}

impl Platform {
    /// The CPU that KVM prefers on this host, with PSCI, by which the guest shuts down.
    pub(crate) fn new(_kvm: &Kvm, vm: &VmFd) -> Result<Self> {
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init).context("KVM_ARM_PREFERRED_TARGET")?;
        init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        Ok(Self { init })
    }

    /// Puts a new vCPU at the image's first byte, its MMU on and interrupts masked.
    pub(crate) fn start(&self, fd: &VcpuFd, start: Start) -> Result<()> {
        fd.vcpu_init(&self.init).context("KVM_ARM_VCPU_INIT")?;
        for (register, value) in [
            (MAIR_EL1, 0x04ff), // attribute 0: normal memory, write-back; 1: a device, as the doorbell
            // T0SZ 25, for 39 bits of address; walks cached and inner shareable; no TTBR1; 40 bits of physical address
            (TCR_EL1, 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32),
            (TTBR0_EL1, PAGE_TABLES),
            (VBAR_EL1, VECTORS),
            (SCTLR_EL1, 0x30d0_0800 | 1 << 12 | 1 << 2 | 1), // what must be 1; I, C, M
            (ESR_EL1, 0),
            (X0, start.stats),
            (X1, start.parameters),
            (SP_EL1, start.stack),
            (PSTATE, 0x3c5), // D, A, I, F; EL1 with its own stack pointer
            (PC, IMAGE_ADDRESS),
        ] {
            fd.set_one_reg(register, &value.to_le_bytes()).with_context(|| format!("KVM refused {register:#x}"))?;
        }
        Ok(())
    }
}

/// Identity-maps all memory by 2 MiB blocks and the doorbell behind it as a device. Access flags are set already, so that
/// nothing writes the tables. Writes the exception vectors, too.
pub(crate) fn write_tables(memory: &GuestMemory) {
    const TABLE: u64 = 0b11;
    /// A block with its access flag, inner shareable, for EL1 alone.
    const BLOCK: u64 = 0b01 | 3 << 8 | 1 << 10;
    const DEVICE_NEVER_EXECUTED: u64 = 1 << 2 | 3 << 53;
    /// PSCI's SYSTEM_OFF: `mov w0, #8`; `movk w0, #0x8400, lsl 16`; `hvc #0`; `b .`
    const SYSTEM_OFF: [u64; 2] = [0x72b0_8000_5280_0100, 0x1400_0000_d400_0002];
    let page = u64::from(PAGE_SIZE);
    let level2 = PAGE_TABLES + page;
    let blocks = (memory.bytes() as u64 + DOORBELL_BYTES) / HUGE_PAGE;
    for table in 0..blocks.div_ceil(512) {
        memory.write(PAGE_TABLES + table * 8, &[(level2 + table * page) | TABLE]);
    }
    for number in 0..blocks {
        let address = number * HUGE_PAGE;
        let kind = if address < memory.bytes() as u64 { BLOCK } else { BLOCK | DEVICE_NEVER_EXECUTED };
        // The tables lie one behind the other, so they are one table of all blocks.
        memory.write(level2 + number * 8, &[address | kind]);
    }
    for vector in 0..16 {
        memory.write(VECTORS + vector * 0x80, &SYSTEM_OFF);
    }
}

/// Ticks of CNTVCT_EL0 in a second, as a vCPU sees them: as many as the host.
pub(crate) fn tsc_hz(_fd: &VcpuFd) -> u64 {
    host_tsc_hz()
}

/// Ticks of CNTVCT_EL0 in a second.
pub fn host_tsc_hz() -> u64 {
    let hz: u64;
    // SAFETY: Linux lets a process read the register, which changes nothing.
    unsafe { std::arch::asm!("mrs {}, cntfrq_el0", out(reg) hz, options(nomem, nostack, preserves_flags)) };
    hz
}

/// Has KVM keep the time stolen from a vCPU at `address`. A Linux guest asks where that is; KVM writes there all the same.
pub(crate) fn enable_steal_time(fd: &VcpuFd, address: u64) -> Result<()> {
    let attribute = kvm_device_attr {
        group: KVM_ARM_VCPU_PVTIME_CTRL,
        attr: u64::from(KVM_ARM_VCPU_PVTIME_IPA),
        addr: (&raw const address).addr() as u64,
        flags: 0,
    };
    fd.set_device_attr(&attribute).context("this host's KVM tells no guest of stolen time (KVM_ARM_VCPU_PVTIME_CTRL)")
}

/// Where a vCPU stopped, for an error; after an exception, where that was.
pub(crate) fn place(fd: &VcpuFd) -> String {
    let read = |register| {
        let mut value = [0; 8];
        fd.get_one_reg(register, &mut value).ok().map(|_| u64::from_le_bytes(value))
    };
    match (read(ESR_EL1), read(ELR_EL1), read(FAR_EL1), read(PC)) {
        (Some(esr @ 1..), Some(elr), Some(far), _) => format!(" at pc {elr:#x} (ESR {esr:#x}, FAR {far:#x})"),
        (_, _, _, Some(pc)) => format!(" at pc {pc:#x}"),
        _ => String::new(),
    }
}

/// Images for tests.
pub mod images {
    /// A loop of one instruction.
    pub const SPIN: &[u8] = &[0x00, 0x00, 0x00, 0x14];
    /// What ends in a fault.
    pub const FAULTY: &[(&str, &[u8])] = &[
        ("an undefined instruction", &[0x00, 0x00, 0x00, 0x00]),
        ("smc, which no EL3 serves: KVM refuses it, and the zeros behind it are undefined", &[0x03, 0x00, 0x00, 0xd4]),
        // movz x0, #0x7000, lsl 16; str x0, [x0]
        ("a store beyond the mapped memory", &[0x00, 0x00, 0xae, 0xd2, 0x00, 0x00, 0x00, 0xf9]),
        // movn x0, #3; br x0
        ("a jump to nowhere", &[0x60, 0x00, 0x80, 0x92, 0x00, 0x00, 0x1f, 0xd6]),
        ("brk without a debugger", &[0x00, 0x00, 0x20, 0xd4]),
    ];
}
