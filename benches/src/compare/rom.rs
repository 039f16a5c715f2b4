//! The ROM that brings another hypervisor's vCPUs to where the harness' own guest begins.
//!
//! QEMU starts a machine at its reset vector, not at a register state of ours. This ROM (`-bios`) does what firmware
//! would: real mode, protected mode, page tables, long mode, CPL 3, and there the same [payload](dirtylimit_test_vm::payload) by the
//! same ABI, with parameter blocks, stats pages and stacks at the same places. The boot vCPU starts the others by
//! INIT and SIPI.
//!
//! The 64 KiB stand at the top of the first MiB and of the first 4 GiB. Their last page is the boot code; SIPI enters it
//! at its first byte, and so does the reset vector. Each field before it is found by address:
//!
//! | from | what |
//! |---|---|
//! | 0xf0000 | u32: vCPUs, huge pages of RAM |
//! | 0xf1000 | parameter blocks, one behind the other |
//! | 0xf4000 | the payload |
//! | 0xff000 | the boot code |
//!
//! Nothing is written to the ROM, and no interrupt is ever open. Where CPL 0 is interpreted by KVM (KVM without hardware
//! virtualisation), only `sysexit` leads out of it; where the CPU refuses that one in long mode (AMD), its #UD leads to an
//! `iretq`.

use anyhow::{Context, Result, ensure};

use crate::guest::kvm::layout::{HUGE_PAGE, MAX_VCPUS, PAGE_TABLES, PARAMETERS, STACK_BYTES, STACKS, STATS};
use dirtylimit_test_vm::payload::{self, IMAGE_ADDRESS, PARAMETER_WORDS, Parameters};

/// Bytes of the ROM; what QEMU takes is a multiple of this.
const BYTES: usize = 0x1_0000;
const BLOCKS: usize = 0x1000;
const PAYLOAD: usize = 0x4000;
const BOOT: usize = 0xf000;
/// Where its copy below 1 MiB begins.
const ADDRESS: u64 = 0xf_0000;
/// What one page directory of the boot code's simple tables covers, up to where PCI devices begin.
const MAX_RAM: u64 = 3 << 30;
const _: () = assert!(BLOCKS + MAX_VCPUS * PARAMETER_WORDS * 8 <= PAYLOAD);

std::arch::global_asm!(
    r#"
    .pushsection .rodata.dirtylimit_rom, "a", @progbits
    .globl dirtylimit_rom_boot

    .code16
dirtylimit_rom_boot:                    // ff00:0000, real mode, where SIPI leads; EFLAGS.IF is 0 from reset on
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16  // lgdt cs:[offset], all 32 bits of the base
    .short 80f - dirtylimit_rom_boot
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                    // jmp 0x08:20f
    .long 20f - dirtylimit_rom_boot + {boot}
    .short 0x08

    .code32
20: mov eax, 0x18
    mov ss, eax
    mov eax, 0x3b                       // data for CPL 3 serves CPL 0 too, and stays
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ebx, dword ptr [0xfee00020]
    shr ebx, 24                         // ebx = the vCPU's index: its local APIC's id
    jnz 30f

    // The boot vCPU prepares the machine for all.
    mov al, 0xff                        // no interrupt from the old controllers
    out 0x21, al
    out 0xa1, al
    cld
    mov esi, {rom} + {payload}
    mov edi, {image}
    mov ecx, ({boot_offset} - {payload}) / 4
    rep movsd
    mov esi, {rom} + {blocks}
    mov ebp, {parameters}
    mov edx, dword ptr [{rom}]
21: mov edi, ebp
    mov ecx, {parameter_words} * 2
    rep movsd
    add ebp, 0x1000
    dec edx
    jnz 21b
    // Identity page tables: accessed and dirty already, writable, for CPL 3.
    mov dword ptr [{tables}], {tables} + 0x1000 + 0x27
    mov edi, {tables} + 0x1000
    mov eax, {tables} + 0x2000 + 0x27
    mov ecx, 4
22: mov dword ptr [edi], eax
    add edi, 8
    add eax, 0x1000
    dec ecx
    jnz 22b
    mov edi, {tables} + 0x2000
    mov eax, 0xe7
    mov ecx, dword ptr [{rom} + 4]
23: mov dword ptr [edi], eax
    add edi, 8
    add eax, {huge_page}
    dec ecx
    jnz 23b
    mov dword ptr [0xfee00300], 0xc4500 // INIT to all others
    mov dword ptr [0xfee00300], 0xc46ff // SIPI to all others: start at ff00:0000

30: mov eax, 0x20                       // PAE
    mov cr4, eax
    mov eax, {tables}
    mov cr3, eax
    mov ecx, 0xc0000080                 // EFER: SCE, LME, NXE
    mov eax, 0x901
    xor edx, edx
    wrmsr
    mov ecx, 0x174                      // IA32_SYSENTER_CS: sysexit takes CS and SS from 32 and 40 behind it
    mov eax, 0x10
    wrmsr
    .byte 0x0f, 0x01, 0x1d              // lidt [address]
    .long 81f - dirtylimit_rom_boot + {boot}
    mov eax, 0x80050033                 // PG, AM, WP, NE, ET, MP, PE
    mov cr0, eax
    .byte 0xea                          // jmp 0x10:40f
    .long 40f - dirtylimit_rom_boot + {boot}
    .short 0x10

    .code64
40: mov edi, ebx
    shl edi, 12
    lea ebp, [rdi + {parameters}]
    add edi, {stats}
    lea ecx, [rbx + 1]
    imul ecx, ecx, {stack_bytes}
    add ecx, {stacks}
    mov esp, ecx
    .byte 0xba                          // mov edx, 50f
    .long 50f - dirtylimit_rom_boot + {boot}
    .byte 0x48, 0x0f, 0x35              // sysexitq, to rdx with the stack rcx

41: mov esp, ecx                        // #UD: the same by iretq
    push 0x3b
    push rcx
    push 2
    push 0x33
    push rdx
    iretq

50: xor eax, eax                        // CPL 3
    xor ebx, ebx
    xor ecx, ecx
    xor edx, edx
    xor esi, esi
    .byte 0xe9                          // jmp to the payload
    .long {image} - {boot} - (51f - dirtylimit_rom_boot)
51:

    // Descriptors are accessed already, so that no CPU writes them.
    .balign 8
70: .quad 0
    .quad 0x00cf9b000000ffff            // 0x08 code, 32 bits
    .quad 0x00af9b000000ffff            // 0x10 code, 64 bits
    .quad 0x00cf93000000ffff            // 0x18 data
    .quad 0, 0
    .quad 0x00affb000000ffff            // 0x30 code for CPL 3, 64 bits
    .quad 0x00cff3000000ffff            // 0x38 data for CPL 3
71: .fill 12, 8, 0                      // interrupt gates: only #UD is there
    .short 41b - dirtylimit_rom_boot + ({boot} & 0xffff)
    .short 0x10, 0x8e00, {boot} / 0x10000
    .quad 0
72:
80: .short 71b - 70b - 1
    .long 70b - dirtylimit_rom_boot + {boot}
81: .short 72b - 71b - 1
    .long 71b - dirtylimit_rom_boot + {boot}

    .org dirtylimit_rom_boot + 0xff0
    .byte 0xea                          // the reset vector, real mode: jmp ff00:0000
    .short 0, 0xff00
    .org dirtylimit_rom_boot + 0x1000
    .popsection
    "#,
    rom = const ADDRESS,
    boot = const ADDRESS + BOOT as u64,
    boot_offset = const BOOT,
    blocks = const BLOCKS,
    payload = const PAYLOAD,
    image = const IMAGE_ADDRESS,
    parameters = const PARAMETERS,
    parameter_words = const PARAMETER_WORDS,
    tables = const PAGE_TABLES,
    huge_page = const HUGE_PAGE,
    stats = const STATS,
    stacks = const STACKS,
    stack_bytes = const STACK_BYTES,
);

unsafe extern "C" {
    static dirtylimit_rom_boot: [u8; BYTES - BOOT];
}

/// The ROM of a machine with `ram` bytes of memory and a vCPU for each parameter block.
///
/// # Errors
/// More vCPUs or memory than the ROM can set up, or a payload that does not fit in it.
pub(super) fn image(blocks: &[Parameters], ram: u64, payload: &[u8]) -> Result<Vec<u8>> {
    ensure!((1..=MAX_VCPUS).contains(&blocks.len()), "{} vCPUs: the ROM starts 1 to {MAX_VCPUS}", blocks.len());
    ensure!(ram <= MAX_RAM, "{} MiB of guest memory: the ROM sets up {} at most", ram >> 20, MAX_RAM >> 20);
    payload::check(payload)?;
    let mut rom = vec![0; BYTES];
    let huge_pages = u32::try_from(ram / HUGE_PAGE).context("bounded above")?;
    rom[..4].copy_from_slice(&u32::try_from(blocks.len())?.to_le_bytes());
    rom[4..8].copy_from_slice(&huge_pages.to_le_bytes());
    let words = blocks.iter().flat_map(Parameters::words).flat_map(u64::to_le_bytes);
    rom[BLOCKS..PAYLOAD].iter_mut().zip(words).for_each(|(to, byte)| *to = byte);
    let room = &mut rom[PAYLOAD..BOOT];
    ensure!(payload.len() <= room.len(), "a payload of {} bytes: the ROM has room for {}", payload.len(), room.len());
    room[..payload.len()].copy_from_slice(payload);
    // SAFETY: the boot code has exactly this size, as its last `.org` says, and is read-only data for the life of the process.
    rom[BOOT..].copy_from_slice(unsafe { &dirtylimit_rom_boot });
    Ok(rom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dirtylimit_test_vm::payload::Mode;

    const BLOCK: Parameters = Parameters {
        start: 0x100_0000,
        end: 0x200_0000,
        stride: 4096,
        delay: 0,
        mode: Mode::Write,
        stall_ticks: 1,
        index: 0,
        half_period: 0,
        doorbell: 0,
    };

    #[test]
    fn everything_is_where_the_boot_code_looks() {
        let second = Parameters { index: 1, ..BLOCK };
        let rom = image(&[BLOCK, second], 32 << 20, &[0xcc; 100]).unwrap();
        assert_eq!(rom.len(), BYTES);
        let word = |at: usize| u64::from_le_bytes(rom[at..at + 8].try_into().unwrap());
        assert_eq!(word(0), 16 << 32 | 2, "16 huge pages, 2 vCPUs");
        assert_eq!((word(BLOCKS), word(BLOCKS + 8 * PARAMETER_WORDS + 48)), (0x100_0000, 1));
        assert_eq!((rom[PAYLOAD - 1], rom[PAYLOAD], rom[PAYLOAD + 99], rom[PAYLOAD + 100]), (0, 0xcc, 0xcc, 0));
        // jmp ff00:0000, which is where SIPI leads too.
        assert_eq!(rom[0xfff0..0xfff5], [0xea, 0x00, 0x00, 0x00, 0xff]);
        assert_ne!(rom[BOOT], 0);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |vcpus: usize, ram: u64, payload: usize| {
            image(&vec![BLOCK; vcpus], ram, &vec![0x90; payload]).unwrap_err().to_string()
        };
        assert!(refused(0, 1 << 24, 1).contains("1 to 64"));
        assert!(refused(65, 1 << 24, 1).contains("1 to 64"));
        assert!(refused(1, MAX_RAM + HUGE_PAGE, 1).contains("3072 at most"));
        assert!(refused(1, 1 << 24, 0).contains("empty"));
        assert!(refused(1, 1 << 24, BOOT - PAYLOAD + 1).contains("room for 45056"));
        image(&vec![BLOCK; MAX_VCPUS], MAX_RAM, &vec![0x90; BOOT - PAYLOAD]).unwrap();
    }
}
