//! The image for x86-64: CPL 3, long mode. It uses no stack.

use super::stats;

/// A word of the fine histogram stands for this many ticks, as a power of two, whatever the TSC's frequency: about 50 µs at
/// 2.5 GHz, so that it reaches 20 ms.
const FINE_SHIFT: u32 = 17;

/// Ticks that a word of the fine histogram stands for, as a power of two, where the TSC has `_hz` ticks a second.
pub(super) const fn fine_shift(_hz: u64) -> u32 {
    FINE_SHIFT
}

std::arch::global_asm!(
    r#"
    .pushsection .rodata.dirtylimit_payload, "a", @progbits
    .globl dirtylimit_payload_start
    .globl dirtylimit_payload_end

    // rdi stats, rbp parameters, rbx accesses, r8 threshold, r10 last TSC, r12 start, r13 end, r14 stride or mask,
    // r15 delay, rsi the address to access; rax, rcx and rdx are scratch, r9 and r11 belong to the mode.

    // rax = TSC
    .macro dirtylimit_tsc
        rdtsc
        shl rdx, 32
        or rax, rdx
    .endm

    // rax = TSC, rcx = what passed since the last one
    .macro dirtylimit_gap
        dirtylimit_tsc
        xor ecx, ecx                    // a TSC that went backwards is no gap
        cmp rax, r10
        jb 19f
        mov rcx, rax
        sub rcx, r10
    19:
    .endm

    // Counts an access and the gap since the last one, then works for `delay` turns.
    .macro dirtylimit_accessed
        inc rbx
        dirtylimit_gap
    20: mov r10, rax
        mov [rdi], rbx
        mov [rdi + 8*5], rax
        cmp rcx, [rdi + 8*1]
        jbe 21f
        mov [rdi + 8*1], rcx
    21: cmp rcx, r8
        jbe 22f
        inc qword ptr [rdi + 8*2]
        add [rdi + 8*4], rcx
        bsr rdx, rcx
        inc qword ptr [rdi + 8*rdx + 8*32]
        shr rcx, {fine_shift}
        mov edx, {fine_words} - 1
        cmp rcx, rdx
        cmova rcx, rdx
        inc qword ptr [rdi + 8*rcx + 8*{fine}]
    22: dirtylimit_gap
        cmp rcx, 1 << {fine_shift}
        ja 20b                          // stopped while it counted
        mov rcx, r15
        test rcx, rcx
        jz 24f
    23: dec rcx
        jnz 23b
    24:
    .endm

    // rsi = the next page in order
    .macro dirtylimit_next
        add rsi, r14
        cmp rsi, r13
        jb 25f
        mov rsi, r12
    25:
    .endm

    // Tells the host that there is nothing to do, or spins where it does not want to know.
    .macro dirtylimit_rest
        mov rax, [rbp + 8*8]
        test rax, rax
        jz 26f
        mov [rax], rbx
    26: pause
    .endm

dirtylimit_payload_start:
    mov r12, [rbp + 8*0]
    mov r13, [rbp + 8*1]
    mov r14, [rbp + 8*2]
    mov r15, [rbp + 8*3]
    mov r8, [rbp + 8*5]
    mov rsi, r12
    xor ebx, ebx
    dirtylimit_tsc
    mov r10, rax
    mov [rdi + 8*3], rax
    mov [rdi + 8*5], rax
    mov rax, [rbp + 8*4]
    cmp rax, 1
    je 40f
    cmp rax, 2
    je 50f
    cmp rax, 3
    je 60f
    cmp rax, 4
    je 70f
    test rax, rax
    jz 30f
    ud2                                 // an unknown mode stops the vCPU, which the host reports

30: inc qword ptr [rsi]                 // write
    dirtylimit_accessed
    dirtylimit_next
    jmp 30b

40: mov rax, [rsi]                      // read
    dirtylimit_accessed
    dirtylimit_next
    jmp 40b

50: mov r11, 6364136223846793005        // random: the high bits of Knuth's linear congruential generator
    mov r9, [rbp + 8*6]
51: imul r9, r11
    add r9, 1442695041
    mov rsi, r9
    shr rsi, 33
    and rsi, r14
    shl rsi, 12
    add rsi, r12
    inc qword ptr [rsi]
    dirtylimit_accessed
    jmp 51b

60: dirtylimit_rest                     // idle
    jmp 60b

70: mov r11, [rbp + 8*7]                // burst
71: lea r9, [r10 + r11]
72: inc qword ptr [rsi]
    dirtylimit_accessed
    dirtylimit_next
    cmp r10, r9
    jb 72b
    add r9, r11
73: dirtylimit_rest
    dirtylimit_tsc
    cmp rax, r9
    jb 73b
    mov r10, rax                        // the rest was the guest's own: no gap
    jmp 71b
dirtylimit_payload_end:
    .popsection
    "#,
    fine = const stats::FINE,
    fine_words = const stats::FINE_WORDS,
    fine_shift = const FINE_SHIFT,
);

/// How the image begins: `mov r12, [rbp]`.
#[cfg(test)]
pub(super) const FIRST: [u8; 4] = [0x4c, 0x8b, 0x65, 0x00];
