//! What runs inside the guest: the built-in image, and the words that host and guest exchange with it.
//!
//! The image is position independent x86-64 code for CPL 3, assembled with the harness itself, so that nothing but Rust
//! and a linker is needed. It keeps the guest ABI of the harness, as any flat binary in its place must: loaded at
//! [`IMAGE_ADDRESS`], entered at its first byte by every vCPU with rdi = its stats page, rbp = its parameter block,
//! rsp = the top of its own stack, all other registers 0.
//!
//! The loop of every mode is: access a page, read the TSC, count the access and the gap since the last read, turn `delay`
//! empty loops. It uses no stack, so the only memory it writes besides its pages is its stats page. That is dirtied too,
//! and limited: what it waits for that page is a gap of its own, or a low limit's two pauses would look like one.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Guest-physical address of the image.
pub const IMAGE_ADDRESS: u64 = 0x10_0000;
/// The largest image, in bytes.
pub const IMAGE_MAX: usize = 0x10_0000;
/// Guest-physical address of the first byte of workload memory.
pub const WORKLOAD_ADDRESS: u64 = 0x100_0000;
/// Words of the parameter block; the ABI fixes the first seven, the harness uses two more.
pub const PARAMETER_WORDS: usize = 9;

/// What a vCPU does with its memory: word 4 of the parameter block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Mode {
    /// Increments one word in each page, in order, over and over.
    Write = 0,
    /// Reads one word in each page, in order, over and over.
    Read = 1,
    /// Increments one word in a page drawn at random, over and over.
    Random = 2,
    /// Touches nothing; rings the doorbell for ever.
    Idle = 3,
    /// [`Mode::Write`] for a half period, then the doorbell for a half period; time in which the vCPU was paused counts.
    Burst = 4,
}

/// The parameter block: what the host tells a vCPU before it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Guest-physical start of the vCPU's memory.
    pub start: u64,
    /// Its end, exclusive.
    pub end: u64,
    /// Bytes from one access to the next; for [`Mode::Random`] the mask of the page index.
    pub stride: u64,
    /// Empty loop turns after each access.
    pub delay: u64,
    /// What to do.
    pub mode: Mode,
    /// Gaps of more TSC ticks than this are counted as stalls.
    pub stall_ticks: u64,
    /// The vCPU's index.
    pub index: u64,
    /// [`Mode::Burst`]: TSC ticks of half a period.
    pub half_period: u64,
    /// Guest-physical address where a store means "nothing to do for now"; 0 makes the guest spin instead.
    pub doorbell: u64,
}

impl Parameters {
    /// The block as the guest reads it.
    pub const fn words(&self) -> [u64; PARAMETER_WORDS] {
        [
            self.start,
            self.end,
            self.stride,
            self.delay,
            self.mode as u64,
            self.stall_ticks,
            self.index,
            self.half_period,
            self.doorbell,
        ]
    }
}

/// Where the guest keeps what it counts: indices of u64 words in its stats page.
pub mod stats {
    /// Accesses since the start; only the guest writes it.
    pub const ACCESSES: usize = 0;
    /// The longest gap between two TSC reads; the host may zero it.
    pub const LONGEST: usize = 1;
    /// Gaps over the threshold; the host may zero it.
    pub const GAPS: usize = 2;
    /// The TSC at the start.
    pub const START_TSC: usize = 3;
    /// Sum of the gaps over the threshold; the host may zero it.
    pub const GAPS_SUM: usize = 4;
    /// The last TSC read.
    pub const LAST_TSC: usize = 5;
    /// `HISTOGRAM + b`: gaps over the threshold whose highest set bit is `b`; the host may zero them.
    pub const HISTOGRAM: usize = 32;
    /// Words of the histogram.
    pub const HISTOGRAM_WORDS: usize = 64;
    /// `FINE + n`: the same gaps by `gap >> FINE_SHIFT`, the last word for all beyond; the host may zero them. The
    /// built-in image keeps it; another need not.
    pub const FINE: usize = 128;
    /// Words of the fine histogram: to the end of the page.
    pub const FINE_WORDS: usize = 384;
    /// A word of it stands for so many TSC ticks, as a power of two: about 50 µs, so that it reaches 20 ms.
    pub const FINE_SHIFT: u32 = 17;
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
    fine_shift = const stats::FINE_SHIFT,
);

unsafe extern "C" {
    static dirtylimit_payload_start: u8;
    static dirtylimit_payload_end: u8;
}

/// The built-in image.
pub fn image() -> &'static [u8] {
    let (start, end) = (&raw const dirtylimit_payload_start, &raw const dirtylimit_payload_end);
    // SAFETY: both labels stand in one section of this binary, the end after the start, and the bytes between them are
    // read-only data for the life of the process.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Reads an image that stands in for the built-in one.
///
/// # Errors
/// A file that cannot be read, is empty, or is larger than [`IMAGE_MAX`].
pub fn load(path: &Path) -> Result<Vec<u8>> {
    let name = path.display();
    let file = File::open(path).with_context(|| format!("cannot open the payload {name}"))?;
    let mut image = Vec::new();
    // One byte more than fits tells a file that is too large from one that just fits, without reading all of it.
    file.take(IMAGE_MAX as u64 + 1)
        .read_to_end(&mut image)
        .with_context(|| format!("cannot read the payload {name}"))?;
    check(&image).with_context(|| format!("the payload {name} cannot be loaded"))?;
    Ok(image)
}

/// Whether an image fits where it is loaded.
///
/// # Errors
/// An empty image, or one larger than [`IMAGE_MAX`].
pub fn check(image: &[u8]) -> Result<()> {
    ensure!(!image.is_empty(), "the image is empty");
    ensure!(image.len() <= IMAGE_MAX, "the image is larger than {IMAGE_MAX} bytes, the most that fits");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_begins_with_its_entry_and_fits() {
        check(image()).unwrap();
        // mov r12, [rbp]: nothing was laid before the entry, which is the first byte by the ABI.
        assert_eq!(&image()[..4], &[0x4c, 0x8b, 0x65, 0x00]);
    }

    #[test]
    fn an_image_that_does_not_fit_is_refused() {
        assert!(check(&[]).is_err());
        assert!(check(&vec![0x90; IMAGE_MAX]).is_ok());
        assert!(check(&vec![0x90; IMAGE_MAX + 1]).is_err());
        assert!(load(Path::new("/nowhere/payload")).unwrap_err().to_string().contains("/nowhere/payload"));
        // A file without an end is refused too, rather than read for ever.
        assert!(load(Path::new("/dev/zero")).is_err());
    }
}
