//! The guest of the rounds for 64-bit Arm.

use std::arch::global_asm;

use anyhow::Result;
use dirtylimit_test_vm::GuestCpu;
use kvm_bindings::{KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_SIZE_U64};

use super::ROUND;

global_asm!(
    r#"
    .pushsection .rodata.dirtylimit_rounds, "a", @progbits
    .globl dirtylimit_rounds_start
    .globl dirtylimit_rounds_end
    .balign 4
dirtylimit_rounds_start:
    ldr x4, [x1]                    // the memory's start
    ldr x5, [x1, 8*2]               // mask of the page's index
    movz w6, 2463534242 & 0xffff
    movk w6, 2463534242 >> 16, lsl 16
10: eor w6, w6, w6, lsl 13          // xorshift32
    eor w6, w6, w6, lsr 17
    eor w6, w6, w6, lsl 5
    and x7, x6, x5
    add x2, x4, x7, lsl 12          // the page's address, until the next one is known
    ldr x3, [x1, 8*{round}]
    str x3, [x2]
    b 10b
dirtylimit_rounds_end:
    .popsection
    "#,
    round = const ROUND,
);

fn register(cpu: &GuestCpu, number: u64) -> Result<u64> {
    let mut value = [0; 8];
    let name = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | u64::from(KVM_REG_ARM_CORE) | (number * 2);
    cpu.fd().get_one_reg(name, &mut value)?;
    Ok(u64::from_le_bytes(value))
}

/// Where the parameter block is.
pub(super) fn parameters(cpu: &GuestCpu) -> Result<u64> {
    register(cpu, 1)
}

/// The address that the guest writes to, and the number that it writes there.
pub(super) fn in_hand(cpu: &GuestCpu) -> Result<(u64, u64)> {
    Ok((register(cpu, 2)?, register(cpu, 3)?))
}
