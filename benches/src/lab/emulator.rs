//! How each machine's emulator is started. All run in virtual time: a guest's second is a number of instructions, and the host's
//! clock, its load and its random numbers do not matter.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::catalogue::Machine;
use super::packages::output;

/// Bochs' instructions in a second of the guest.
const IPS: u32 = 200_000_000;
/// When the guest's clock starts: 2026-01-01, in seconds since 1970.
const START: u32 = 1_767_225_600;

/// A machine to be started.
#[derive(Debug)]
pub(crate) struct Setting<'a> {
    /// Which one.
    pub(crate) machine: Machine,
    /// Number of CPUs.
    pub(crate) cpus: u8,
    /// Bytes of memory.
    pub(crate) memory: u64,
    /// What the emulator's packages were unpacked in.
    pub(crate) root: &'a Path,
    /// The kernel's image.
    pub(crate) kernel: &'a Path,
    /// The initramfs.
    pub(crate) initramfs: &'a [u8],
    /// The directory of this run.
    pub(crate) run: &'a Path,
}

/// Where a machine's serial ports end up.
#[derive(Debug)]
pub(crate) struct Ports {
    /// What the kernel, and the program's standard error, say.
    pub(crate) console: PathBuf,
    /// The program's standard output.
    pub(crate) result: PathBuf,
    /// What the emulator itself says.
    pub(crate) complaints: PathBuf,
}

impl Setting<'_> {
    /// The emulator, ready to be started.
    ///
    /// # Errors
    /// A file of the run cannot be written.
    pub(crate) fn command(&self) -> Result<(Command, Ports)> {
        let ports = Ports {
            console: self.run.join("console"),
            result: self.run.join("result"),
            complaints: self.run.join("emulator"),
        };
        for port in [&ports.console, &ports.result] {
            fs::write(port, "")?;
        }
        let mut command = match self.machine {
            Machine::Vmx => self.bochs(&ports)?,
            Machine::Svm | Machine::Arm64 => self.qemu(&ports)?,
        };
        let complaints = fs::File::create(&ports.complaints)?;
        command.stdin(Stdio::null()).stdout(complaints.try_clone()?).stderr(complaints);
        // In a group of its own, Ctrl-C on the terminal is for us alone.
        command.process_group(0);
        // SAFETY: between fork and exec the closure makes one system call and touches no memory.
        unsafe {
            // Should this process be killed, so is the emulator.
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        Ok((command, ports))
    }

    fn command_line(&self) -> String {
        let facts = self.machine.facts();
        let console = facts.ports[0];
        format!("console={console},115200 quiet panic=-1 rdinit=/init {}", facts.command_line)
    }

    fn qemu(&self, ports: &Ports) -> Result<Command> {
        let initramfs = self.run.join("initramfs");
        fs::write(&initramfs, self.initramfs)?;
        let file = |path: &Path| format!("file:{}", path.display());
        let (program, machine): (_, &[&str]) = match self.machine {
            Machine::Arm64 => (
                "qemu-system-aarch64",
                &["-machine", "virt,virtualization=on,gic-version=3,dtb-randomness=off", "-cpu", "max,pauth-impdef=on"],
            ),
            _ => ("qemu-system-x86_64", &["-machine", "q35", "-cpu", "max,+svm,+npt,-rdrand,-rdseed"]),
        };
        let mut command = program_of(self.root, program);
        command
            .env("QEMU_MODULE_DIR", self.root.join("usr/lib/x86_64-linux-gnu/qemu"))
            .args(["seabios", "qemu"].iter().flat_map(|directory| {
                [OsStr::new("-L").to_owned(), self.root.join("usr/share").join(directory).into()]
            }))
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(machine)
            .args(["-accel", "tcg,thread=single", "-icount", "shift=1,sleep=off", "-seed", "1"])
            .args(["-rtc", "base=2026-01-01,clock=vm"])
            .args(["-smp", &self.cpus.to_string(), "-m", &format!("{}M", self.memory >> 20)])
            .args(["-serial", &file(&ports.console), "-serial", &file(&ports.result)])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &self.command_line()]);
        Ok(command)
    }

    /// Bochs boots from a disc, which is made here.
    fn bochs(&self, ports: &Ports) -> Result<Command> {
        let (run, root) = (self.run, self.root);
        let tree = run.join("disc");
        fs::create_dir(&tree)?;
        fs::copy(root.join("usr/lib/ISOLINUX/isolinux.bin"), tree.join("isolinux.bin"))?;
        fs::copy(root.join("usr/lib/syslinux/modules/bios/ldlinux.c32"), tree.join("ldlinux.c32"))?;
        fs::copy(self.kernel, tree.join("kernel"))?;
        fs::write(tree.join("initrd"), self.initramfs)?;
        let entry = format!("default lab\nlabel lab\nkernel kernel\ninitrd initrd\nappend {}\n", self.command_line());
        fs::write(tree.join("isolinux.cfg"), entry)?;
        let disc = run.join("disc.iso");
        output(
            program_of(root, "xorriso")
                .args(["-as", "mkisofs", "-quiet", "-o"])
                .arg(&disc)
                .args([
                    "-b",
                    "isolinux.bin",
                    "-c",
                    "boot.cat",
                    "-no-emul-boot",
                    "-boot-load-size",
                    "4",
                    "-boot-info-table",
                ])
                .arg(&tree),
        )
        .context("cannot make the disc that Bochs boots from")?;
        let (share, megs) = (root.join("usr/share/bochs"), self.memory >> 20);
        let (share, disc, run) = (share.display(), disc.display(), run.display());
        let (console, result) = (ports.console.display(), ports.result.display());
        let settings = self.run.join("bochsrc");
        fs::write(
            &settings,
            format!(
                "memory: guest={megs}, host={megs}\n\
                 romimage: file={share}/BIOS-bochs-latest\n\
                 vgaromimage: file={share}/VGABIOS-lgpl-latest\n\
                 cpu: model=corei7_skylake_x, count=1, ips={IPS}, reset_on_triple_fault=0\n\
                 clock: sync=none, time0={START}\n\
                 ata0-master: type=cdrom, path={disc}, status=inserted\n\
                 boot: cdrom\n\
                 com1: enabled=1, mode=file, dev={console}\n\
                 com2: enabled=1, mode=file, dev={result}\n\
                 sound: driver=dummy\n\
                 speaker: enabled=0\n\
                 display_library: term\n\
                 log: {run}/bochs.log\n\
                 panic: action=fatal\n"
            ),
        )?;
        // Debian's starts in its debugger.
        let go = self.run.join("go");
        fs::write(&go, "c\n")?;
        let mut command = program_of(root, "bochs-bin");
        command
            .env("LTDL_LIBRARY_PATH", root.join("usr/lib/x86_64-linux-gnu/bochs/plugins"))
            .env("BXSHARE", root.join("usr/share/bochs"))
            .env("TERM", "vt100")
            .args(["-q", "-f"])
            .arg(settings)
            .arg("-rc")
            .arg(go);
        Ok(command)
    }
}

/// `name` of the packages below `root`, run by their own loader with their own libraries.
fn program_of(root: &Path, name: &str) -> Command {
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    let mut path = libraries.clone().into_os_string();
    path.push(":");
    path.push(libraries.join("pulseaudio"));
    command.arg("--library-path").arg(path).arg(root.join("usr/bin").join(name));
    command
}
