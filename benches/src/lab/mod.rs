//! The lab: machines with the KVMs that people have, emulated in virtual time, so that a figure is the same on every host and
//! on every day. Each boots a stock kernel of Debian's, runs one program and turns itself off. `docs/LAB.md` tells more.
//!
//! | file | what is in it |
//! |---|---|
//! | `catalogue` | which machines and kernels there are |
//! | `packages` | Debian's packages, fetched and unpacked below the cache |
//! | `peer` | the QEMU that `compare` runs in the machine beside ours |
//! | `initramfs`, `cpio`, `elf` | what the machine boots: a shell, KVM's modules, the program, the script that runs it |
//! | `emulator` | how each machine's emulator is started |
//! | `run` | one run, watched to its end |

mod catalogue;
mod cpio;
mod elf;
mod emulator;
mod initramfs;
mod packages;
mod peer;
mod run;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};

pub use catalogue::{Kernel, Machine};
use elf::Elf;
use emulator::Setting;
use initramfs::Program;
use packages::Store;

use crate::output::{print, say};
use crate::report::progress::Interrupt;
use crate::units::{parse_duration, parse_size};

/// The least and the most memory of a machine: a kernel with this in its initramfs, and what Bochs can have.
const MEMORY: std::ops::RangeInclusive<u64> = (256 << 20)..=(32 << 30);

/// Run a command of this program in an emulated machine with a KVM of its own, in virtual time
///
/// Two runs give the same figures, to the digit. Takes Debian's packages, which apt fetches into
/// ~/.cache/dirtylimit/lab at the first use; nothing is installed.
///
/// Exit status: that of the command in the machine; 1 also where there was none, 2 bad usage.
#[derive(Clone, Debug, Args)]
#[command(verbatim_doc_comment, arg_required_else_help = true)]
pub struct Lab {
    /// Say which machines and kernels there are
    #[arg(long)]
    pub list: bool,

    /// What to do.
    #[command(subcommand)]
    pub action: Option<Action>,
}

/// What to do in the lab.
#[derive(Clone, Debug, Subcommand)]
pub enum Action {
    /// Fetch all that these machines need, unless it is there
    Setup {
        /// Which ones
        #[arg(required = true, value_name = "MACHINE")]
        machines: Vec<Machine>,

        /// This kernel alone [default: all]
        #[arg(long)]
        kernel: Option<Kernel>,
    },
    /// Run in x86-64 with AMD's SVM and nested page tables (QEMU)
    Svm(Run),
    /// Run in x86-64 with Intel's VT-x, EPT and PML (Bochs)
    Vmx(Run),
    /// Run in 64-bit Arm, KVM at EL2 (QEMU)
    Arm64(Run),
}

/// One run in a machine.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// The kernel that the machine boots
    #[arg(long, value_enum, default_value_t)]
    pub kernel: Kernel,

    /// Number of CPUs; Bochs has one
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u8,

    /// The machine's memory [default: 2GiB, and 1GiB for vmx]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,

    /// Another program than this one, such as a test; its shared libraries come along
    #[arg(long, value_name = "PATH")]
    pub program: Option<PathBuf>,

    /// What the machine's shell (busybox) does before the program runs: `export NAME=VALUE`, `busybox mount …`
    #[arg(long, value_name = "COMMANDS")]
    pub prepare: Option<String>,

    /// Show what the machine's kernel says, too
    #[arg(long)]
    pub console: bool,

    /// End a machine that says nothing for this time, the host's
    #[arg(long, value_name = "T", value_parser = parse_duration, default_value = "300s")]
    pub silence: Duration,

    /// What the program is called with. Files of the host are not there, and what it writes but to standard output is lost
    #[arg(last = true, value_name = "ARGS")]
    pub arguments: Vec<OsString>,
}

impl Lab {
    /// Checks what clap cannot.
    ///
    /// # Errors
    /// What is wrong and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        let Some((machine, run)) = self.action.as_ref().and_then(Action::run) else { return Ok(()) };
        let most = machine.facts().most_cpus;
        if !(1..=most).contains(&run.cpus) {
            return Err(format!("--cpus {}: {machine} has 1 to {most}", run.cpus));
        }
        if run.memory.is_some_and(|memory| !MEMORY.contains(&memory)) {
            return Err("--memory: 256MiB to 32GiB is allowed".to_owned());
        }
        if run.arguments.is_empty() && run.program.is_none() {
            return Err(format!("nothing is to be run: say what after --, as in lab {machine} -- probe"));
        }
        Ok(())
    }

    /// Does it.
    ///
    /// # Errors
    /// Something is missing (the message says what and where to get it), or the machine did not run to its end.
    pub fn execute(&self) -> Result<ExitCode> {
        let mut store = Store::open()?;
        if self.list {
            let text = catalogue::listed(|root| store.has(root));
            print(format_args!("{text}kept in {}", store.home().display()))?;
            return Ok(ExitCode::SUCCESS);
        }
        match &self.action {
            Some(Action::Setup { machines, kernel }) => {
                for &machine in machines {
                    let kernels = kernel.as_ref().map_or(Kernel::value_variants(), std::slice::from_ref);
                    for root in [machine.emulator(), machine.busybox()].iter() {
                        store.root(root)?;
                    }
                    for &kernel in kernels {
                        store.root(&machine.kernel(kernel))?;
                    }
                    say(format_args!("lab: {machine} is ready, in {}", store.home().display()));
                }
                Ok(ExitCode::SUCCESS)
            }
            Some(action) => {
                let (machine, run) = action.run().expect("it is not `setup`");
                run.execute(machine, &mut store)
            }
            None => Ok(ExitCode::SUCCESS),
        }
    }
}

impl Action {
    fn run(&self) -> Option<(Machine, &Run)> {
        match self {
            Self::Setup { .. } => None,
            Self::Svm(run) => Some((Machine::Svm, run)),
            Self::Vmx(run) => Some((Machine::Vmx, run)),
            Self::Arm64(run) => Some((Machine::Arm64, run)),
        }
    }
}

impl Run {
    /// Whether QEMU has to be there.
    fn compares(&self) -> bool {
        self.program.is_none() && self.arguments.first().is_some_and(|command| command == "compare")
    }

    fn execute(&self, machine: Machine, store: &mut Store) -> Result<ExitCode> {
        let path = match &self.program {
            Some(path) => path.clone(),
            None => own_program(machine)?,
        };
        let mut program = Program::read(&path, machine)?;
        if self.compares() {
            program = program.with(peer::files(&store.root(&Machine::Svm.emulator())?)?);
        }
        let (root, busybox) = (store.root(&machine.emulator())?, store.root(&machine.busybox())?);
        let kernel = store.root(&machine.kernel(self.kernel))?;
        let initramfs =
            initramfs::build(machine, &kernel, &busybox, &program, &self.arguments, self.prepare.as_deref())?;
        let place = Place::new(store)?;
        let setting = Setting {
            machine,
            cpus: self.cpus,
            memory: self.memory.unwrap_or(machine.facts().memory),
            root: &root,
            kernel: &initramfs::image(&kernel)?,
            initramfs: &initramfs,
            run: &place.0,
        };
        let (emulator, ports) = setting.command()?;
        let interrupt = Interrupt::install()?;
        let watch = run::Watch { interrupt: &interrupt, silence: self.silence, console: self.console };
        run::run(emulator, &ports, &watch, &mut io::stdout().lock())
    }
}

/// This program, built for `machine`.
fn own_program(machine: Machine) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    if Elf::new(&fs::read(&own)?)?.machine() == machine.facts().elf {
        return Ok(own);
    }
    let other = built_for(&own, machine.facts().target).filter(|path| path.is_file());
    other.with_context(|| {
        format!(
            "there is no build of this program for {machine}: ci/arm64-build.sh makes one, or name one with --program"
        )
    })
}

/// Where cargo puts `program`, a file of its directory for the host, when it builds it for `target`.
fn built_for(program: &Path, target: &str) -> Option<PathBuf> {
    let (name, profile) = (program.file_name()?, program.parent()?);
    Some(profile.parent()?.join(target).join(profile.file_name()?).join(name))
}

/// The directory of a run, gone after it.
struct Place(PathBuf);

impl Place {
    fn new(store: &Store) -> Result<Self> {
        let path = store.home().join(format!("run-{}", std::process::id()));
        // One that a killed process left is of no use.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_for_another_machine_is_beside_that_for_the_host() {
        let own = Path::new("/src/target/release/dirtylimit-bench");
        let other = built_for(own, Machine::Arm64.facts().target).unwrap();
        assert_eq!(other, Path::new("/src/target/aarch64-unknown-linux-gnu/release/dirtylimit-bench"));
        assert_eq!(built_for(Path::new("/dirtylimit-bench"), "x"), None);
    }
}
