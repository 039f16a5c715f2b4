//! An embedding of Cloud Hypervisor's shape: the kick is a signal whose handler does nothing, with `immediate_exit`; vCPU threads
//! park while the VM is paused, under a seccomp filter of their own; vCPUs and memory come and go; the log is switched on for each
//! migration, whose thread blocks. Lines that end with `//+` are what the limiter adds to such a VMM.

use std::io::Error as IoError;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Once};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, ensure};
use dirtylimit_kvm::{Config, Decision, DirtyLimit, PageRate, Round, Stopped, Vcpu}; //+
use dirtylimit_test_vm::payload::{self, Mode};
use dirtylimit_test_vm::{GuestCpu, Kicker, Load, Machine, kvm_or_skip};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};

use crate::common::{Copy, smallest_ring};
use crate::rig::Watchdog;

/// The number of the last system call that a filter refused; -1: none.
static REFUSED: AtomicI32 = AtomicI32::new(-1);

/// From here on this thread makes the calls of a vCPU's thread alone; another is refused, and told in [`REFUSED`].
fn sandbox() -> Result<()> {
    extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: of a SIGSYS: the call's number stands behind the three words of the signal, padding, and the call's address.
        REFUSED.store(unsafe { info.cast::<i32>().add(6).read() }, SeqCst);
    }
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        let handler = refused as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
        // SAFETY: the action is zeroed, then given a handler of the kind that SA_SIGINFO says, which stores a number.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()), 0);
        }
    });
    const KVM_RUN: u32 = 0xae80;
    const KVM_RESET_DIRTY_RINGS: u32 = 0xaec7; //+
    let ioctls = [KVM_RUN, KVM_RESET_DIRTY_RINGS]; //+
    let mut calls = vec![libc::SYS_rt_sigreturn, libc::SYS_exit, libc::SYS_munmap, libc::SYS_madvise, libc::SYS_close];
    calls.extend([libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_brk, libc::SYS_sigaltstack, libc::SYS_write]);
    calls.extend([libc::SYS_futex, libc::SYS_rt_sigprocmask, libc::SYS_getrusage, libc::SYS_clock_gettime]); //+
    calls.extend([libc::SYS_timerfd_create, libc::SYS_timerfd_settime]); //+
    let statement = |code: u32, k, jt, jf| libc::sock_filter { code: u16::try_from(code).expect("a code"), jt, jf, k };
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0);
    let jump = |k, jt, jf| statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k, jt, jf);
    let answer = |k| statement(libc::BPF_RET | libc::BPF_K, k, 0, 0);
    let mut filter = vec![load(0)];
    for call in calls {
        filter.extend([jump(u32::try_from(call)?, 0, 1), answer(libc::SECCOMP_RET_ALLOW)]);
    }
    // An ioctl by its request, the second argument.
    filter.extend([jump(u32::try_from(libc::SYS_ioctl)?, 1, 0), answer(libc::SECCOMP_RET_TRAP), load(24)]);
    for ioctl in ioctls {
        filter.extend([jump(ioctl, 0, 1), answer(libc::SECCOMP_RET_ALLOW)]);
    }
    filter.push(answer(libc::SECCOMP_RET_TRAP));
    let program = libc::sock_fprog { len: u16::try_from(filter.len())?, filter: filter.as_mut_ptr() };
    // SAFETY: the first takes numbers; the second reads the program, and holds for this thread alone.
    unsafe {
        ensure!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, IoError::last_os_error());
        let set = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program);
        ensure!(set == 0, IoError::last_os_error());
    }
    Ok(())
}

/// What the VMM tells its vCPU threads.
#[derive(Default)]
struct State {
    pause: AtomicBool,
    parked: AtomicUsize,
}

/// A vCPU's thread.
struct Running {
    kill: Arc<AtomicBool>,
    kicker: Kicker,
    thread: JoinHandle<Result<GuestCpu>>,
}

fn run(mut cpu: GuestCpu, mut limited: Vcpu, state: &State, kill: &AtomicBool) -> Result<GuestCpu> {
    cpu.bind_to_this_thread();
    sandbox()?;
    while !kill.load(SeqCst) {
        if state.pause.load(SeqCst) {
            state.parked.fetch_add(1, SeqCst);
            while state.pause.load(SeqCst) {
                thread::park();
            }
            state.parked.fetch_sub(1, SeqCst);
        }
        if let Decision::Enter { .. } = limited.before_run()? {
            //+
            cpu.run()?;
        } //+
    }
    Ok(cpu)
}

/// The VMM. Slot 0 has vCPU 0's memory and what both need, slot 1 vCPU 1's.
struct Vmm {
    machine: Machine,
    limit: DirtyLimit, //+
    state: Arc<State>,
    cpus: [Option<Running>; 2],
    slots: Vec<u32>,
}

impl Vmm {
    fn new() -> Result<Self> {
        let machine = Machine::new(&[Load::new(Mode::Write, 16 << 20); 2], payload::image())?;
        let limit = DirtyLimit::enable(machine.vm(), &Config::new().ring_entries(smallest_ring()))?; //+
        let mut vmm = Self { machine, limit, state: Arc::default(), cpus: [None, None], slots: Vec::new() };
        vmm.plug_memory(0)?;
        Ok(vmm)
    }

    /// The first page of a slot, and how many it has.
    fn pages(&self, slot: u32) -> (u64, u64) {
        let split = self.machine.workload(1).start / 4096;
        if slot == 0 { (0, split) } else { (split, self.machine.memory().pages() as u64 - split) }
    }

    fn set_region(&self, slot: u32, pages: u64, logged: bool) -> Result<()> {
        let first = self.pages(slot).0 * 4096;
        let region = kvm_userspace_memory_region {
            slot,
            flags: if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: first,
            memory_size: pages * 4096,
            userspace_addr: self.machine.memory().host_address() + first,
        };
        // SAFETY: the region lies in the guest's memory, which outlives its vCPUs.
        Ok(unsafe { self.machine.vm().set_user_memory_region(region) }?)
    }

    fn plug_memory(&mut self, slot: u32) -> Result<()> {
        self.slots.push(slot);
        self.set_region(slot, self.pages(slot).1, false)
    }

    fn unplug_memory(&mut self, slot: u32) -> Result<()> {
        self.slots.retain(|other| *other != slot);
        self.limit.remove_slot(slot)?; //+
        self.set_region(slot, 0, false)
    }

    fn start_vcpu(&mut self, index: usize, cpu: GuestCpu) -> Result<()> {
        let limited = self.limit.add_vcpu(u32::try_from(index)?, cpu.fd())?; //+
        let (kicker, state, kill) = (cpu.kicker(), self.state.clone(), Arc::new(AtomicBool::new(false)));
        let thread = thread::spawn({
            let kill = kill.clone();
            move || run(cpu, limited, &state, &kill)
        });
        self.cpus[index] = Some(Running { kill, kicker, thread });
        Ok(())
    }

    fn stop_vcpu(&mut self, index: usize) -> Result<Option<GuestCpu>> {
        let Some(Running { kill, kicker, thread }) = self.cpus[index].take() else { return Ok(None) };
        kill.store(true, SeqCst);
        while !thread.is_finished() {
            kicker.kick();
            thread::sleep(Duration::from_millis(1));
        }
        Ok(Some(thread.join().expect("no panic")?))
    }

    fn pause(&self) -> Result<()> {
        self.state.pause.store(true, SeqCst);
        while self.state.parked.load(SeqCst) < self.cpus.iter().flatten().count() {
            for cpu in self.cpus.iter().flatten() {
                ensure!(!cpu.thread.is_finished(), "a vCPU's thread has ended");
                cpu.kicker.kick();
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn resume(&self) {
        self.state.pause.store(false, SeqCst);
        self.cpus.iter().flatten().for_each(|cpu| cpu.thread.thread().unpark());
        while self.state.parked.load(SeqCst) > 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn start_log(&self) -> Result<()> {
        for slot in &self.slots {
            self.limit.add_slot(*slot, self.pages(*slot).1)?; //+
            self.set_region(*slot, self.pages(*slot).1, true)?;
        }
        Ok(())
    }

    fn stop_log(&self) -> Result<()> {
        self.limit.set_vm_limit(None); //+
        for slot in &self.slots {
            self.limit.remove_slot(*slot)?; //+
            self.set_region(*slot, self.pages(*slot).1, false)?;
        }
        Ok(())
    }

    /// Copies what the log of each slot names.
    fn send(
        &self,
        copy: &mut Copy,
        merge: impl Fn(u32, &mut [u64]) -> Result<u64, dirtylimit_kvm::Error>,
    ) -> Result<()> {
        for slot in &self.slots {
            let (first, pages) = self.pages(*slot);
            let mut bitmap = vec![0; usize::try_from(pages)?.div_ceil(64)];
            merge(*slot, &mut bitmap)?;
            copy.take_at(usize::try_from(first)?, &bitmap, None)?;
        }
        Ok(())
    }

    /// Sends the rest, of a round that is complete: another does not compile. How many pages the copy has wrong.
    fn switch(&self, copy: &mut Copy, last: &Round<'_, Stopped>) -> Result<usize> {
        self.send(copy, |slot, bitmap| last.merge(slot, bitmap))?;
        Ok(copy.lost())
    }

    /// The migration's thread; how many pages its copy has wrong at the end.
    fn migrate(&self, rounds: u32) -> Result<usize> {
        self.start_log()?;
        self.start_log()?; // as after a start that failed half-way
        let mut copy = Copy::new(self.machine.memory());
        self.limit.set_vm_limit(Some(PageRate::from_bytes_per_sec(10 << 20, 4096))); //+
        for _ in 0..rounds {
            thread::sleep(Duration::from_millis(30));
            let round = self.limit.round()?; //+
            self.send(&mut copy, |slot, bitmap| round.merge(slot, bitmap))?;
        }
        self.pause()?;
        let lost = self.switch(&mut copy, &self.limit.last_round()?)?; //+
        self.stop_log()?;
        self.resume();
        Ok(lost)
    }
}

#[test]
fn a_vmm_of_cloud_hypervisors_shape_migrates_again_and_again_while_vcpus_and_memory_come_and_go() {
    if !kvm_or_skip() {
        return;
    }
    let _watchdog = Watchdog::new(Duration::from_secs(120));
    let mut vmm = Vmm::new().unwrap();
    let _throttle = vmm.limit.throttle_thread(Duration::from_millis(20)).unwrap(); //+
    vmm.start_vcpu(0, vmm.machine.vcpu(0).unwrap()).unwrap();
    assert_eq!(vmm.migrate(5).unwrap(), 0);
    vmm.plug_memory(1).unwrap();
    let mut second = vmm.machine.vcpu(1).unwrap();
    for _ in 0..3 {
        vmm.start_vcpu(1, second).unwrap();
        assert_eq!(vmm.migrate(5).unwrap(), 0);
        let before = [0, 1].map(|index| vmm.machine.stats(index).accesses());
        // It has stopped for a migration, and goes on unlimited.
        while [0, 1].iter().any(|&index| vmm.machine.stats(index).accesses() < before[index] + 1000) {
            thread::sleep(Duration::from_millis(1));
        }
        second = vmm.stop_vcpu(1).unwrap().unwrap();
    }
    vmm.limit.remove_vcpu(1).unwrap(); //+
    vmm.unplug_memory(1).unwrap();
    assert_eq!(vmm.migrate(5).unwrap(), 0);
    let paused = vmm.limit.query(0).unwrap().totals.paused_us;
    assert!(paused > 0, "it was limited");
    vmm.stop_vcpu(0).unwrap();
    assert_eq!(REFUSED.load(SeqCst), -1, "a system call that the documented filter refuses");
}
