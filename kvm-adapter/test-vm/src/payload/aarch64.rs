//! The image for 64-bit Arm: EL1, its memory mapped one to one. It uses no stack.
//!
//! The counter is read without an `isb`: a store that leaves the guest is taken before what follows it, and a read that is
//! some hundred nanoseconds early is no stall.

use super::stats;

/// Ticks in 100 µs are what the image divides the frequency for.
const FINE_PER_SECOND: u64 = 10_000;

/// Ticks that a word of the fine histogram stands for, as a power of two, where the counter has `hz` ticks a second: the
/// largest that is at most 100 µs. Arm's counters have 1 MHz to 1 GHz, so it cannot be fixed. The image finds the same from
/// CNTFRQ_EL0.
pub(super) const fn fine_shift(hz: u64) -> u32 {
    let ticks = hz / FINE_PER_SECOND;
    if ticks == 0 { 0 } else { ticks.ilog2() }
}

std::arch::global_asm!(
    r#"
    .pushsection .rodata.dirtylimit_payload, "a", @progbits
    .globl dirtylimit_payload_start
    .globl dirtylimit_payload_end
    .balign 4

    // x0 stats, x1 parameters, x2 the address to access, x3 start, x4 end, x5 stride or mask, x6 delay, x7 threshold,
    // x8 last counter, x9 accesses, x10 the fine histogram's shift; x11 to x14 are scratch, x15 to x17 belong to the mode.

    // x11 = counter, x12 = what passed since the last one
    .macro dirtylimit_gap
        mrs x11, cntvct_el0
        subs x12, x11, x8
        csel x12, xzr, x12, lo          // a counter that went backwards is no gap
    .endm

    // One more in the word at \address
    .macro dirtylimit_count address:vararg
        ldr x14, \address
        add x14, x14, 1
        str x14, \address
    .endm

    // Counts an access and the gap since the last one, then works for `delay` turns.
    .macro dirtylimit_accessed
        add x9, x9, 1
        dirtylimit_gap
    20: mov x8, x11
        str x9, [x0]
        str x11, [x0, 8*5]
        ldr x13, [x0, 8*1]
        cmp x12, x13
        b.ls 21f
        str x12, [x0, 8*1]
    21: cmp x12, x7
        b.ls 22f
        dirtylimit_count [x0, 8*2]
        ldr x14, [x0, 8*4]
        add x14, x14, x12
        str x14, [x0, 8*4]
        clz x13, x12
        eor x13, x13, 63                // the highest set bit
        add x13, x0, x13, lsl 3
        dirtylimit_count [x13, 8*32]
        lsr x12, x12, x10
        mov x13, {fine_words} - 1
        cmp x12, x13
        csel x12, x13, x12, hi
        add x12, x0, x12, lsl 3
        dirtylimit_count [x12, 8*{fine}]
    22: dirtylimit_gap
        lsr x13, x12, x10
        cbnz x13, 20b                   // stopped while it counted
        mov x13, x6
        cbz x13, 24f
    23: subs x13, x13, 1
        b.ne 23b
    24:
    .endm

    // x2 = the next page in order
    .macro dirtylimit_next
        add x2, x2, x5
        cmp x2, x4
        csel x2, x2, x3, lo
    .endm

    // Tells the host that there is nothing to do, or spins where it does not want to know.
    .macro dirtylimit_rest
        ldr x13, [x1, 8*8]
        cbz x13, 26f
        str x9, [x13]
    26: yield
    .endm

dirtylimit_payload_start:
    ldp x3, x4, [x1, 8*0]
    ldp x5, x6, [x1, 8*2]
    ldr x7, [x1, 8*5]
    mrs x11, cntfrq_el0
    mov x12, {fine_per_second}
    udiv x11, x11, x12
    orr x11, x11, 1
    clz x11, x11
    eor x10, x11, 63
    mov x2, x3
    mov x9, 0
    mrs x8, cntvct_el0
    str x8, [x0, 8*3]
    str x8, [x0, 8*5]
    ldr x11, [x1, 8*4]
    cbz x11, 30f
    cmp x11, 1
    b.eq 40f
    cmp x11, 2
    b.eq 50f
    cmp x11, 3
    b.eq 60f
    cmp x11, 4
    b.eq 70f
    udf 0                               // an unknown mode stops the vCPU, which the host reports

30: dirtylimit_count [x2]               // write
    dirtylimit_accessed
    dirtylimit_next
    b 30b

40: ldr x14, [x2]                       // read
    dirtylimit_accessed
    dirtylimit_next
    b 40b

50: movz x15, 0x7f2d                    // random: the high bits of Knuth's linear congruential generator,
    movk x15, 0x4c95, lsl 16            // 6364136223846793005
    movk x15, 0xf42d, lsl 32
    movk x15, 0x5851, lsl 48
    movz x16, 1442695041 & 0xffff
    movk x16, 1442695041 >> 16, lsl 16
    ldr x17, [x1, 8*6]
51: madd x17, x17, x15, x16
    lsr x2, x17, 33
    and x2, x2, x5
    add x2, x3, x2, lsl 12
    dirtylimit_count [x2]
    dirtylimit_accessed
    b 51b

60: dirtylimit_rest                     // idle
    b 60b

70: ldr x15, [x1, 8*7]                  // burst
71: add x16, x8, x15
72: dirtylimit_count [x2]
    dirtylimit_accessed
    dirtylimit_next
    cmp x8, x16
    b.lo 72b
    add x16, x16, x15
73: dirtylimit_rest
    mrs x11, cntvct_el0
    cmp x11, x16
    b.lo 73b
    mov x8, x11                         // the rest was the guest's own: no gap
    b 71b
dirtylimit_payload_end:
    .popsection
    "#,
    fine = const stats::FINE,
    fine_words = const stats::FINE_WORDS,
    fine_per_second = const FINE_PER_SECOND,
);

/// How the image begins: `ldp x3, x4, [x1]`.
#[cfg(test)]
pub(super) const FIRST: [u8; 4] = [0x23, 0x10, 0x40, 0xa9];
