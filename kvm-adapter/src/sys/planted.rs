//! Mistakes to order: each takes one precaution out, so that a test can show that it would notice. Not in a production
//! build: the configuration `dirtylimit_planted` is a flag of the compiler's, which no dependency can switch on.

use std::io;

use super::kvm::{Kernel, Reset, VmFd};
use super::signals::set_mask;

/// Which precaution to leave out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlantedBug {
    /// A reset that was short or disturbed is repeated and then believed: its pages are not suspect.
    TrustSuspects,
    /// The same, and signals are open while it runs. (With suspects in place they catch most of what signals do.)
    OpenSignals,
}

/// KVM, as somebody sees it who never read KVM.md's rule 3.
#[derive(Debug)]
pub(crate) struct Planted {
    vm: VmFd,
    bug: PlantedBug,
}

impl Planted {
    pub(crate) fn new(vm: VmFd, bug: PlantedBug) -> Self {
        Self { vm, bug }
    }

    fn reset_once(&self) -> io::Result<u32> {
        let reset = match self.bug {
            PlantedBug::TrustSuspects => self.vm.reset(),
            PlantedBug::OpenSignals => with_open_signals(|| self.vm.reset_as_it_is()),
        };
        match reset {
            Ok(reset) => Ok(reset.entries),
            // Some kernels answer a reset that took nothing so; the next call takes the rest.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(1),
            Err(error) => Err(error),
        }
    }
}

impl Kernel for Planted {
    fn check(&self, capability: u32) -> io::Result<u32> {
        self.vm.check(capability)
    }

    fn enable(&self, capability: u32, argument: u64) -> io::Result<()> {
        self.vm.enable(capability, argument)
    }

    fn reset(&self) -> io::Result<Reset> {
        let mut entries = 0;
        // A reset that found a signal pending may answer 0 although there is more: two in a row are the end.
        let mut zeros = 0;
        while zeros < 2 {
            match self.reset_once()? {
                0 => zeros += 1,
                more => (entries, zeros) = (entries + more, 0),
            }
        }
        Ok(Reset { entries, disturbed: false })
    }

    fn backup_log(&self, slot: u32, words: &mut [u64]) -> io::Result<()> {
        self.vm.backup_log(slot, words)
    }
}

fn with_open_signals<T>(call: impl FnOnce() -> T) -> T {
    let before = set_mask(0);
    let result = call();
    set_mask(before);
    result
}
