//! The smallest VMM that limits its guest: one vCPU, one memory slot, and a "unikernel" of six instructions that writes
//! one word in each page of its memory, over and over.
//!
//! `cargo run --release -p dirtylimit-kvm --example unikernel` prints the guest's dirty page rate free, limited to
//! 100 MiB/s, limited to 10 MiB/s, and free again. The lines marked **dirtylimit** are all that a VMM has to add.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dirtylimit_kvm::{Config, Decision, DirtyLimit, EXIT_DIRTY_RING_FULL, PageRate, Vcpu};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const MEMORY: usize = 128 << 20;
const IMAGE: usize = 0x10_0000;
const FIRST_PAGE: u64 = 0x100_0000;
const SLOT: u32 = 0;

// Long mode, ring 3: rdi = first byte, rsi = end, rdx = a page.
std::arch::global_asm!(
    ".global unikernel, unikernel_end",
    "unikernel: mov rax, rdi",
    "2: inc qword ptr [rax]",
    "add rax, rdx",
    "cmp rax, rsi",
    "jb 2b",
    "jmp unikernel",
    "unikernel_end:",
);

unsafe extern "C" {
    static unikernel: u8;
    static unikernel_end: u8;
}

fn main() -> Result<()> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("SKIPPED: /dev/kvm does not open ({error}): this example needs a host with KVM");
            return Ok(());
        }
    };
    let vm = kvm.create_vm()?;

    // dirtylimit: right after KVM_CREATE_VM, and each slot before it is created.
    let limit = DirtyLimit::enable(&vm, &Config::new().max_pause(Duration::from_millis(10)))?;
    limit.add_slot(SLOT, (MEMORY / 4096) as u64)?;
    let _throttle = limit.throttle_thread(Duration::from_millis(50))?;

    guest_memory(&vm)?;
    let vcpu_fd = vm.create_vcpu(0)?;
    vcpu_fd.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?; // without long mode in it, there is none
    start_state(&vcpu_fd)?;
    let vcpu = limit.add_vcpu(0, &vcpu_fd)?; // dirtylimit
    let interrupter = vcpu.interrupter(); // dirtylimit

    let stop = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn({
        let stop = stop.clone();
        move || run(vcpu_fd, vcpu, &stop)
    });
    let mib = |mib: u64| PageRate::from_bytes_per_sec(mib << 20, limit.page_size());
    for goal in [None, Some(mib(100)), Some(mib(10)), None] {
        match goal {
            Some(rate) => limit.set_limit(0, rate)?, // dirtylimit
            None => limit.cancel(0)?,                // dirtylimit
        }
        std::thread::sleep(Duration::from_millis(200));
        let dirtied = measure(&limit, Duration::from_secs(1))?;
        let goal = goal.map_or("free:".into(), |rate| format!("limit {:>3} MiB/s:", rate.bytes_per_sec(4096) >> 20));
        println!("{goal:<16} {:>7.1} MiB/s dirtied", dirtied / f64::from(1 << 20));
        if thread.is_finished() {
            break;
        }
    }
    stop.store(true, Ordering::Relaxed);
    interrupter.interrupt(); // dirtylimit
    thread.join().map_err(|_| "the vCPU's thread panicked")?
}

/// The vCPU's loop. The guest never exits on its own, so a full ring is also the time to look at `stop`.
fn run(mut fd: VcpuFd, mut vcpu: Vcpu, stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        // dirtylimit: pays what is owed
        if vcpu.before_run()? == Decision::Return {
            continue;
        }
        match fd.run() {
            Ok(VcpuExit::Unsupported(EXIT_DIRTY_RING_FULL)) => {} // dirtylimit
            Ok(other) => return Err(format!("the guest stopped: {other:?}").into()),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Bytes dirtied a second, as a migration would see it: every tenth of a second it takes the dirty log.
fn measure(limit: &DirtyLimit, time: Duration) -> Result<f64> {
    let mut log = vec![0; MEMORY / 4096 / 64]; // a bit a page, as KVM_GET_DIRTY_LOG
    limit.round()?.merge(SLOT, &mut log)?; // what was dirty before
    let (start, mut pages) = (Instant::now(), 0);
    while start.elapsed() < time {
        std::thread::sleep(Duration::from_millis(100));
        // dirtylimit: collect → reset → publish, while the guest runs; `log` says which pages
        pages += limit.round()?.merge(SLOT, &mut log)?;
    }
    Ok((pages * 4096) as f64 / start.elapsed().as_secs_f64())
}

/// 128 MiB, the image in it, and page tables that map it one to one for ring 3 by pages of 2 MiB.
fn guest_memory(vm: &VmFd) -> Result<()> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping, never unmapped.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), MEMORY, protection, flags, -1, 0) }.cast::<u8>();
    if memory.cast() == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: all addresses lie in the 128 MiB just mapped, which nobody else knows, and the image between its symbols.
    unsafe {
        let (image, end) = (&raw const unikernel, &raw const unikernel_end);
        memory.add(IMAGE).copy_from_nonoverlapping(image, end.addr() - image.addr());
        let entry = |table: usize, index: usize, value: usize| {
            memory.add(table).cast::<u64>().add(index).write(value as u64);
        };
        const TABLE: usize = 0x67; // present, writable, user, accessed, dirty
        const HUGE: usize = 0x80;
        entry(0x1000, 0, 0x2000 | TABLE);
        entry(0x2000, 0, 0x3000 | TABLE);
        for i in 0..MEMORY >> 21 {
            entry(0x3000, i, i << 21 | TABLE | HUGE);
        }
    }
    let region = kvm_userspace_memory_region {
        slot: SLOT,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.addr() as u64,
    };
    // SAFETY: the memory stays mapped for as long as the process lives.
    unsafe { vm.set_user_memory_region(region)? };
    Ok(())
}

/// Long mode at CPL 3, at the image's first instruction.
fn start_state(vcpu: &VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    let segment = kvm_segment { limit: u32::MAX, present: 1, dpl: 3, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x33, type_: 0xb, l: 1, ..segment };
    let data = kvm_segment { selector: 0x2b, type_: 3, db: 1, ..segment };
    (sregs.ss, sregs.ds, sregs.es) = (data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, 0x1000, 0x20, 0xd01);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (IMAGE as u64, 0x202);
    (regs.rdi, regs.rsi, regs.rdx) = (FIRST_PAGE, MEMORY as u64, 4096);
    vcpu.set_regs(&regs)?;
    Ok(())
}
