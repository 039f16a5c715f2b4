//! The machines and kernels of the lab, and the packages of Debian that they are made of.

use std::fmt::{self, Write as _};

use clap::ValueEnum;

use super::packages::{Choice, Root};

/// The suite of Debian that emulators come from.
const SUITE: &str = "trixie";

/// A machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Machine {
    /// x86-64, AMD's SVM, nested page tables, in QEMU
    Svm,
    /// x86-64, Intel's VT-x, EPT, PML, in Bochs
    Vmx,
    /// 64-bit Arm, KVM at EL2, in QEMU
    Arm64,
}

/// A kernel, as Debian builds it for clouds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Kernel {
    /// Debian 12's, the oldest that the README names
    #[value(name = "6.1")]
    Old,
    /// Debian 13's
    #[default]
    #[value(name = "6.12")]
    Stable,
    /// The newest of Debian 13's backports
    Newest,
}

/// What is different from machine to machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    /// As Debian calls it.
    pub(crate) arch: &'static str,
    /// As ELF numbers it.
    pub(crate) elf: u16,
    /// As Rust calls it.
    pub(crate) target: &'static str,
    /// The modules to load; those that they need come along.
    pub(crate) modules: &'static [&'static str],
    /// The emulator's packages.
    emulator: &'static [&'static str],
    /// The most CPUs.
    pub(crate) most_cpus: u8,
    /// Bytes of memory, if nobody says.
    pub(crate) memory: u64,
    /// Its serial ports: one for the console, one for the program's standard output.
    pub(crate) ports: [&'static str; 2],
    /// What to add to the kernel's command line.
    pub(crate) command_line: &'static str,
    /// What it is, for people.
    about: &'static str,
}

impl Machine {
    /// What is special about it.
    pub(crate) const fn facts(self) -> Facts {
        const X86: Facts = Facts {
            arch: "amd64",
            elf: 62,
            target: "x86_64-unknown-linux-gnu",
            modules: &["kvm-amd"],
            emulator: &["qemu-system-x86"],
            most_cpus: 16,
            memory: 2 << 30,
            ports: ["ttyS0", "ttyS1"],
            command_line: "nokaslr mitigations=off tsc=reliable tsc_early_khz=1000000",
            about: "x86-64: kvm_amd with nested page tables, pages protected one by one (QEMU)",
        };
        match self {
            Self::Svm => X86,
            Self::Vmx => Facts {
                modules: &["kvm-intel"],
                emulator: &["bochs", "bochs-term", "isolinux", "syslinux-common", "xorriso"],
                most_cpus: 1,
                memory: 1 << 30,
                command_line: "nokaslr mitigations=off",
                about: "x86-64: kvm_intel with EPT and PML, which hands pages over in lumps (Bochs)",
                ..X86
            },
            Self::Arm64 => Facts {
                arch: "arm64",
                elf: 183,
                target: "aarch64-unknown-linux-gnu",
                modules: &[],
                emulator: &["qemu-system-arm"],
                ports: ["ttyAMA0", "ttyAMA1"],
                command_line: "nokaslr mitigations=off kvm-arm.mode=nvhe",
                about: "64-bit Arm: KVM at EL2, ring with bitmap (QEMU)",
                ..X86
            },
        }
    }

    /// Its emulator.
    pub(crate) fn emulator(self) -> Root {
        let packages = self.facts().emulator;
        Root { suite: SUITE, arch: "amd64", choice: Choice::Whole(packages) }
    }

    /// Its tools: one program that is a shell and all else that a machine needs to get going.
    pub(crate) const fn busybox(self) -> Root {
        Root { suite: SUITE, arch: self.facts().arch, choice: Choice::Alone("busybox-static") }
    }

    /// `kernel`, for it.
    pub(crate) const fn kernel(self, kernel: Kernel) -> Root {
        let suite = match kernel {
            Kernel::Old => "bookworm",
            Kernel::Stable => SUITE,
            Kernel::Newest => "trixie-backports",
        };
        let arch = self.facts().arch;
        let meta = if matches!(self, Self::Arm64) { "linux-image-cloud-arm64" } else { "linux-image-cloud-amd64" };
        Root { suite, arch, choice: Choice::Kernel(meta) }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.to_possible_value().expect("none is hidden").get_name())
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.to_possible_value().expect("none is hidden").get_name())
    }
}

/// The machines and kernels, each with what is ready of it.
pub(crate) fn listed(ready: impl Fn(&Root) -> bool) -> String {
    let mut text = String::new();
    for machine in Machine::value_variants() {
        let all = [machine.emulator(), machine.busybox()];
        let state = if all.iter().all(&ready) { "ready" } else { "to be fetched" };
        let kernels = Kernel::value_variants().iter().map(|&kernel| {
            if ready(&machine.kernel(kernel)) { format!("{kernel} (ready)") } else { kernel.to_string() }
        });
        let kernels = kernels.collect::<Vec<_>>().join(", ");
        let _ = writeln!(text, "{machine:<6} {}\n       {state}; kernels {kernels}", machine.facts().about);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_machine_and_kernel_is_listed_by_the_name_that_chooses_it() {
        let text = listed(|root| matches!(root.choice, Choice::Kernel(_)) && root.suite == "bookworm");
        for machine in Machine::value_variants() {
            assert!(text.lines().any(|line| line.starts_with(&machine.to_string())), "{text}");
        }
        assert_eq!(text.matches("to be fetched; kernels 6.1 (ready), 6.12, newest\n").count(), 3, "{text}");
    }

    #[test]
    fn nothing_of_one_machine_is_kept_where_another_would_find_it() {
        let directory = |root: Root| root.directory();
        let (svm, vmx, arm) = (Machine::Svm, Machine::Vmx, Machine::Arm64);
        assert_ne!(directory(svm.emulator()), directory(vmx.emulator()));
        assert_eq!(directory(svm.busybox()), directory(vmx.busybox()));
        assert_ne!(directory(svm.busybox()), directory(arm.busybox()));
        let mut kernels: Vec<_> = Kernel::value_variants()
            .iter()
            .flat_map(|&kernel| [svm, arm].map(|machine| directory(machine.kernel(kernel))))
            .collect();
        kernels.sort();
        kernels.dedup();
        assert_eq!(kernels.len(), 6, "{kernels:?}");
    }
}
