//! The guest of the rounds for x86-64.

use std::arch::global_asm;

use anyhow::Result;
use dirtylimit_test_vm::GuestCpu;

use super::ROUND;

global_asm!(
    r#"
    .pushsection .rodata.dirtylimit_rounds, "a", @progbits
    .globl dirtylimit_rounds_start
    .globl dirtylimit_rounds_end
dirtylimit_rounds_start:
    mov r12, [rbp]                  // the memory's start
    mov r14, [rbp + 8*2]            // mask of the page's index
    mov eax, 2463534242
10: mov ecx, eax                    // xorshift32
    shl ecx, 13
    xor eax, ecx
    mov ecx, eax
    shr ecx, 17
    xor eax, ecx
    mov ecx, eax
    shl ecx, 5
    xor eax, ecx
    mov rsi, rax
    and rsi, r14
    shl rsi, 12
    lea rdx, [r12 + rsi]            // the page's address, until the next one is known
    mov rcx, [rbp + 8*{round}]
    mov [rdx], rcx
    jmp 10b
dirtylimit_rounds_end:
    .popsection
    "#,
    round = const ROUND,
);

/// Where the parameter block is.
pub(super) fn parameters(cpu: &GuestCpu) -> Result<u64> {
    Ok(cpu.fd().get_regs()?.rbp)
}

/// The address that the guest writes to, and the number that it writes there.
pub(super) fn in_hand(cpu: &GuestCpu) -> Result<(u64, u64)> {
    let registers = cpu.fd().get_regs()?;
    Ok((registers.rdx, registers.rcx))
}
