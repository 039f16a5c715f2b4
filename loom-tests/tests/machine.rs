//! The machine of a vCPU beside another thread that resets: the two meet at the VM's lock and at the vCPU's request.
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "loom's cells are not Sync; its threads are coroutines of one thread"
)]

use std::sync::Arc;

use dirtylimit_loom::accept_penalty::{Ended, Machine, Metered, Step, VcpuRing};
use dirtylimit_loom::calculate::Paced;
use dirtylimit_loom::controller::{Inline, Limiter, VcpuIndex};
use dirtylimit_loom::explore::{ALL, fails, holds};
use dirtylimit_loom::kernel::{ENTRIES, Kernel, Mapping};
use dirtylimit_loom::rate::{PageRate, SECOND};
use dirtylimit_loom::ring::Ring;
use dirtylimit_loom::vcpu_cell::VcpuCell;
use dirtylimit_loom::weaken::site;
use loom::cell::UnsafeCell;
use loom::sync::Mutex;
use loom::thread;

const NOW: u64 = 1000 * SECOND;

/// A vCPU with a full ring, whose limit allows slices of one page.
struct Vm {
    limiter: Limiter<Paced, Inline<1>>,
    index: VcpuIndex,
    kernel: Arc<Kernel>,
    vcpu: Mutex<VcpuRing<Mapping>>,
    /// Written by the thread that resets, before the slice is free; read by the vCPU once it enters.
    freed: UnsafeCell<()>,
}

impl Vm {
    fn new() -> Arc<Self> {
        let limiter = Limiter::new(Paced);
        let index = limiter.register().expect("room for one");
        limiter.set_limit(index, Some(PageRate::from_pages_per_sec(400)));
        limiter.tick(NOW);
        let kernel = Arc::new(Kernel::default());
        (0..ENTRIES - 1).for_each(|_| kernel.push(0));
        let ring = Ring::new(Mapping(kernel.clone())).expect("a good size");
        let (vcpu, freed) = (Mutex::new(VcpuRing::new(ring)), UnsafeCell::new(()));
        Arc::new(Self { limiter, index, kernel, vcpu, freed })
    }

    fn cell(&self) -> &VcpuCell {
        self.limiter.cell(self.index).expect("its own")
    }

    /// The vCPU's thread, from its full exit on; whether it enters.
    fn exit(&self, machine: &mut Machine) -> bool {
        let (words, cell) = (self.limiter.vm(), self.cell());
        machine.full_exit(cell);
        assert_eq!(machine.begin(NOW, words, cell), Step::Harvest);
        let mut vcpu = self.vcpu.lock().expect("not poisoned");
        vcpu.meter(cell, |_| Metered::New);
        let step = machine.harvested(NOW, words, cell, &mut vcpu, false);
        drop(vcpu);
        assert!(matches!(step, Step::Pause { until: NOW, .. }), "pages of a time without a limit are free: {step:?}");
        let enters = matches!(machine.paused(NOW, NOW, Ended::Due, words, cell), Step::Enter(_));
        if enters {
            self.freed.with(|_| ());
        }
        enters
    }

    /// Another thread's reset, for whatever was asked for; a twin's grants too `early`. Whether there was anything.
    fn serve(&self, early: bool) -> bool {
        let mut vcpu = self.vcpu.lock().expect("not poisoned");
        let count = vcpu.to_grant();
        if count > 0 {
            assert_eq!(vcpu.collect(count, |_| ()), 1);
            if early {
                vcpu.grant(self.cell());
            }
            self.kernel.reset();
            vcpu.reclaim();
            self.freed.with_mut(|_| ());
            vcpu.grant(self.cell());
        }
        count > 0
    }
}

fn slices(early: bool) {
    let vm = Vm::new();
    let vcpu = thread::spawn({
        let vm = vm.clone();
        move || {
            let mut machine = Machine::new(vm.cell(), 4, false, false);
            vm.exit(&mut machine)
        }
    });
    let served = vm.serve(early);
    let enters = vcpu.join().expect("no panic");
    assert!(served || !enters, "nobody else frees it");
}

#[test]
fn a_slice_is_free_when_its_reset_is_over() {
    holds("a_slice_is_free_when_its_reset_is_over", ALL, 6, || slices(false));
}

#[test]
fn twin_grants_before_the_reset() {
    fails("granted before the reset", ALL, None, "Causality violation", || slices(true));
}

#[test]
fn twin_grants_relaxed() {
    fails("grant relaxed", ALL, Some(site("vcpu_cell.rs", "grant")), "Causality violation", || slices(false));
}

#[test]
fn twin_looks_for_its_slice_relaxed() {
    fails("stands relaxed", ALL, Some(site("vcpu_cell.rs", "stands")), "Causality violation", || slices(false));
}
