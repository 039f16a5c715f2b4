//! x86-64: long mode at CPL 3.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::Start;
use crate::PAGE_SIZE;
use crate::layout::{DOORBELL_BYTES, HUGE_PAGE, PAGE_TABLES};
use crate::memory::GuestMemory;
use crate::payload::IMAGE_ADDRESS;

/// How the guest runs, in a word.
pub const LEVEL: &str = "CPL-3 guest";
/// What is wrong when the guest shuts down, which it does on any fault for want of an IDT.
pub const FAULT: &str =
    "a triple fault: the payload did what CPL 3 may not do, left its memory, or is for another architecture";

/// Where a guest says that it wants to be told of stolen time: the address, and 1 for yes.
const MSR_KVM_STEAL_TIME: u32 = 0x4b56_4d03;

/// What all vCPUs of a VM have in common.
#[derive(Debug)]
pub(crate) struct Platform {
    cpuid: CpuId,
}

impl Platform {
    /// As this host's KVM offers it.
    pub(crate) fn new(kvm: &Kvm, _vm: &VmFd) -> Result<Self> {
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
        Ok(Self { cpuid })
    }

    /// Puts a new vCPU at the image's first byte: identity page tables, no IDT. KVM.md's hosts, VT-x and SVM ones all run
    /// this. Interrupts are allowed (RFLAGS.IF) though none is ever injected: where KVM itself runs in Bochs, a guest that
    /// masks them masks the host's too.
    pub(crate) fn start(&self, fd: &VcpuFd, start: Start) -> Result<()> {
        fd.set_cpuid2(&self.cpuid).context("KVM refused the CPUID that it offered")?;
        let mut sregs = fd.get_sregs()?;
        let segment = |selector, type_, l, db| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            dpl: 3,
            db,
            s: 1,
            l,
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(0x33, 0xb, 1, 0);
        let data = segment(0x2b, 0x3, 0, 1);
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.cr0 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = 0x20; // PAE
        sregs.efer = 0xd01; // SCE, LME, LMA, NXE
        fd.set_sregs(&sregs).context("KVM refused the long-mode state at CPL 3")?;
        fd.set_regs(&kvm_regs {
            rip: IMAGE_ADDRESS,
            rdi: start.stats,
            rbp: start.parameters,
            rsp: start.stack,
            rflags: 0x202,
            ..Default::default()
        })?;
        Ok(())
    }
}

/// Identity-maps all memory and the doorbell behind it, for CPL 3, by 2 MiB pages. Accessed and dirty bits are set already,
/// so that nothing writes the tables.
pub(crate) fn write_tables(memory: &GuestMemory) {
    const PRESENT_WRITABLE_USER_ACCESSED: u64 = 0x27;
    const DIRTY_HUGE: u64 = 0xc0;
    let page = u64::from(PAGE_SIZE);
    let (level3, level2) = (PAGE_TABLES + page, PAGE_TABLES + 2 * page);
    memory.write(PAGE_TABLES, &[level3 | PRESENT_WRITABLE_USER_ACCESSED]);
    let huge_pages = (memory.bytes() as u64 + DOORBELL_BYTES) / HUGE_PAGE;
    for directory in 0..huge_pages.div_ceil(512) {
        memory.write(level3 + directory * 8, &[(level2 + directory * page) | PRESENT_WRITABLE_USER_ACCESSED]);
    }
    for number in 0..huge_pages {
        // The directories lie one behind the other, so they are one table of all huge pages.
        memory.write(level2 + number * 8, &[(number * HUGE_PAGE) | PRESENT_WRITABLE_USER_ACCESSED | DIRTY_HUGE]);
    }
}

/// TSC ticks in a second, as a vCPU sees them.
pub(crate) fn tsc_hz(fd: &VcpuFd) -> u64 {
    match fd.get_tsc_khz() {
        Ok(khz @ 1..) => u64::from(khz) * 1000,
        _ => host_tsc_hz(),
    }
}

/// TSC ticks in a second by the host's clock, measured once.
pub fn host_tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    // SAFETY: every x86-64 CPU has the instruction.
    let tsc = || unsafe { core::arch::x86_64::_rdtsc() };
    *HZ.get_or_init(|| {
        let (begin, start) = (Instant::now(), tsc());
        std::thread::sleep(Duration::from_millis(50));
        let (ticks, elapsed) = (tsc().wrapping_sub(start), begin.elapsed());
        u64::try_from(u128::from(ticks) * 1_000_000_000 / elapsed.as_nanos().max(1)).unwrap_or(u64::MAX)
    })
}

/// Has KVM keep the time stolen from a vCPU at `address`, as a Linux guest asks it to.
pub(crate) fn enable_steal_time(fd: &VcpuFd, address: u64) -> Result<()> {
    let entry = kvm_msr_entry { index: MSR_KVM_STEAL_TIME, data: address | 1, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry]).context("a list of one MSR")?;
    let set = fd.set_msrs(&msrs).context("KVM_SET_MSRS")?;
    ensure!(set == 1, "this host's KVM tells no guest of stolen time (it needs CONFIG_SCHED_INFO)");
    Ok(())
}

/// Where a vCPU stopped, for an error.
pub(crate) fn place(fd: &VcpuFd) -> String {
    fd.get_regs().map_or_else(|_| String::new(), |regs| format!(" at rip {:#x}", regs.rip))
}

/// Images for tests.
pub mod images {
    /// A loop of one instruction.
    pub const SPIN: &[u8] = &[0xeb, 0xfe];
    /// What ends in a fault.
    pub const FAULTY: &[(&str, &[u8])] = &[
        ("an undefined instruction", &[0x0f, 0x0b]),
        ("hlt, which CPL 3 may not use", &[0xf4]),
        ("a store beyond the mapped memory", &[0x48, 0xc7, 0x04, 0x25, 0x00, 0x00, 0x00, 0x70, 0, 0, 0, 0]),
        ("a jump to nowhere", &[0x31, 0xc0, 0xff, 0xc8, 0xff, 0xe0]),
        ("int3 without an IDT", &[0xcc]),
    ];
}
