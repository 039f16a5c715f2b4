//! A QEMU that runs the [ROM](super::rom), driven by QMP. Dropping it ends it; it leaves no file behind.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use qapi::qmp::{self, DirtyRateMeasureMode, Event};
use qapi::{ExecuteError, Qmp, Stream};

use crate::guest::kvm::layout::STATS;
use crate::units::PAGE_SIZE;
use dirtylimit_test_vm::payload::stats;

/// A QEMU that has not answered by then is stuck.
const PATIENCE: Duration = Duration::from_secs(10);
/// u64 words of a stats page.
const WORDS: usize = PAGE_SIZE as usize / 8;

/// What one vCPU counted: its stats page.
pub(super) type Counters = [u64; WORDS];

type Link = Qmp<Stream<BufReader<UnixStream>, BufWriter<UnixStream>>>;

/// A machine that is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Board {
    /// Entries of each vCPU's dirty ring; `None`: pages are logged in KVM's bitmap.
    pub(super) ring: Option<u32>,
    pub(super) vcpus: usize,
    /// Bytes of memory.
    pub(super) ram: u64,
}

impl Board {
    /// The arguments of a QEMU with that ROM, without how it is driven.
    pub(super) fn arguments(&self, rom: &str) -> Vec<String> {
        let Self { ring, vcpus, ram } = self;
        let ring = ring.map_or(String::new(), |ring| format!(",dirty-ring-size={ring}"));
        let line = format!(
            "-accel kvm{ring} -machine pc -cpu qemu64 -smp {vcpus},sockets={vcpus} -m {}M -nodefaults -no-user-config \
             -no-reboot -display none -bios",
            ram >> 20
        );
        line.split(' ').chain([rom]).map(str::to_owned).collect()
    }
}

/// What a QEMU calls itself.
///
/// # Errors
/// It cannot be started, or is something else.
pub(super) fn version(program: &Path) -> Result<String> {
    let name = program.display();
    let output = Command::new(program).arg("--version").output().with_context(|| format!("cannot start {name}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().next().and_then(|line| line.strip_prefix("QEMU emulator version "));
    let version = version.with_context(|| format!("{name} is no QEMU: it does not tell its version"))?;
    Ok(format!("QEMU {}", version.split_whitespace().next().unwrap_or("of no version")))
}

/// A QEMU, running.
pub(super) struct Qemu {
    child: Child,
    link: Link,
    vcpus: usize,
    /// Where it saves the stats pages: a file without a name, which it finds below our `/proc`.
    saved: File,
    errors: File,
}

impl Qemu {
    /// Starts it, with `more` arguments. The guest may not have begun yet.
    ///
    /// # Errors
    /// It cannot be started, ends at once (no KVM, no dirty ring, bad options), or does not speak QMP.
    pub(super) fn start(program: &Path, rom: &[u8], board: Board, more: &[&str]) -> Result<Self> {
        let (image, saved, errors) = (nameless(c"rom")?, nameless(c"stats")?, nameless(c"errors")?);
        image.write_all_at(rom, 0)?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        ours.set_write_timeout(Some(PATIENCE))?;
        let mut command = Command::new(program);
        command.args(board.arguments(&path(&image))).args(more).args(["-qmp", "stdio"]);
        command.stdin(OwnedFd::from(theirs.try_clone()?)).stdout(OwnedFd::from(theirs)).stderr(errors.try_clone()?);
        // In a group of its own, Ctrl-C on the terminal is for us alone.
        command.process_group(0);
        // SAFETY: between fork and exec the closure makes one system call and touches no memory.
        unsafe {
            // Should this process be killed, so is QEMU.
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        // `command` holds the other end of the link: without it, a QEMU that ends is noticed.
        drop(command);
        let link = Qmp::new(Stream::new(BufReader::new(ours.try_clone()?), BufWriter::new(ours)));
        let mut qemu = Self { child, link, vcpus: board.vcpus, saved, errors };
        // The greeting is waited for here: the handshake takes its absence for a bug.
        loop {
            match qemu.link.inner_mut().fill_buf() {
                Ok([]) => return Err(qemu.gone()),
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(qemu.failed("greeting", error.into())),
            }
        }
        match qemu.link.handshake() {
            Ok(_) => Ok(qemu),
            Err(error) => Err(qemu.failed("qmp_capabilities", error)),
        }
    }

    /// Waits until every vCPU's guest has begun.
    ///
    /// # Errors
    /// It does not, or QEMU fails.
    pub(super) fn boot(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let counters = self.counters()?;
            let Some(late) = counters.iter().position(|page| page[stats::START_TSC] == 0) else { return Ok(()) };
            if Instant::now() > deadline {
                let status = self.execute(qmp::query_status {})?.status;
                bail!(
                    "vCPU {late} of QEMU's guest did not begin in {PATIENCE:?} (status: {status:?}){}",
                    self.complaints()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What each vCPU has counted until now.
    ///
    /// # Errors
    /// QEMU fails.
    pub(super) fn counters(&mut self) -> Result<Vec<Counters>> {
        let mut bytes = vec![0; self.vcpus * PAGE_SIZE as usize];
        let filename = path(&self.saved);
        self.execute(qmp::pmemsave { val: STATS, size: bytes.len() as u64, filename })?;
        self.saved.read_exact_at(&mut bytes, 0).context("QEMU saved less than the stats pages")?;
        let word = |word: &[u8]| u64::from_le_bytes(word.try_into().expect("chunks of 8"));
        Ok(bytes
            .chunks_exact(PAGE_SIZE as usize)
            .map(|page| {
                let mut counters = [0; WORDS];
                counters.iter_mut().zip(page.chunks_exact(8)).for_each(|(to, bytes)| *to = word(bytes));
                counters
            })
            .collect())
    }

    /// Has QEMU measure the dirty rate by the ring for so many seconds, for which it switches dirty logging on.
    ///
    /// # Errors
    /// QEMU fails or refuses.
    pub(super) fn begin_measuring(&mut self, seconds: u32) -> Result<()> {
        self.execute(qmp::calc_dirty_rate {
            calc_time: seconds.into(),
            calc_time_unit: None,
            sample_pages: None,
            mode: Some(DirtyRateMeasureMode::dirty_ring),
        })?;
        Ok(())
    }

    /// Limits a vCPU.
    ///
    /// # Errors
    /// QEMU fails or refuses.
    pub(super) fn limit(&mut self, vcpu: usize, mib_s: u64) -> Result<()> {
        self.execute(qmp::set_vcpu_dirty_limit { cpu_index: Some(i64::try_from(vcpu)?), dirty_rate: mib_s })?;
        Ok(())
    }

    /// The rate that QEMU itself has last measured for a limited vCPU, in MiB/s.
    ///
    /// # Errors
    /// QEMU fails.
    pub(super) fn rates(&mut self) -> Result<Vec<(usize, u64)>> {
        let rates = self.execute(qmp::query_vcpu_dirty_limit {})?;
        Ok(rates
            .into_iter()
            .filter_map(|vcpu| Some((usize::try_from(vcpu.cpu_index).ok()?, vcpu.current_rate)))
            .collect())
    }

    /// The vCPUs' threads, by index.
    ///
    /// # Errors
    /// QEMU fails.
    pub(super) fn threads(&mut self) -> Result<Vec<i32>> {
        let cpus = self.execute(QueryCpusFast {})?;
        Ok(cpus.into_iter().map(|cpu| cpu.thread_id).collect())
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Executes a command.
    ///
    /// # Errors
    /// QEMU fails or refuses.
    pub(super) fn execute<C: qapi::Command>(&mut self, command: C) -> Result<C::Ok> {
        self.link.execute(&command).map_err(|error| self.failed(C::NAME, error))
    }

    /// What has happened since it was last asked.
    ///
    /// # Errors
    /// QEMU fails.
    pub(super) fn events(&mut self) -> Result<Vec<Event>> {
        self.execute(qmp::query_version {})?;
        Ok(self.link.events().collect())
    }

    fn failed(&mut self, command: &str, error: ExecuteError) -> Error {
        match error {
            ExecuteError::Qapi(error) => anyhow!("QEMU refuses {command}: {error}"),
            ExecuteError::Io(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    anyhow!("QEMU does not answer {command}: it was waited for {PATIENCE:?}{}", self.complaints())
                }
                ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => self.gone(),
                _ => Error::new(error).context(format!("QEMU's answer to {command}")),
            },
        }
    }

    /// QEMU has closed the link, which it does only when it ends.
    fn gone(&mut self) -> Error {
        // It may not have ended quite yet.
        let deadline = Instant::now() + Duration::from_secs(1);
        let how = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break format!(" ({status})"),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                _ => break String::new(),
            }
        };
        anyhow!("QEMU ended{how}{}", self.complaints())
    }

    /// The last that it wrote to stderr, to be put behind an error.
    fn complaints(&self) -> String {
        let mut text = Vec::new();
        // The descriptor is shared with QEMU, and so is its position: it is opened anew.
        let read = File::open(path(&self.errors)).and_then(|file| file.take(1 << 16).read_to_end(&mut text));
        let text = String::from_utf8_lossy(&text);
        let last: Vec<_> = text.lines().rev().filter(|line| !line.contains("warning: ")).take(3).collect();
        match read {
            Ok(_) if !last.is_empty() => format!(": {}", last.into_iter().rev().collect::<Vec<_>>().join("; ")),
            _ => String::new(),
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It has no state that is worth a farewell. Who is dead already cannot be killed, and that is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file in memory that goes with its last descriptor.
fn nameless(name: &std::ffi::CStr) -> Result<File> {
    // SAFETY: the name is a C string, and the flag is the one that std sets on all files.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    ensure!(fd >= 0, "cannot make a file in memory: {}", io::Error::last_os_error());
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// How another process of the same user opens the file.
fn path(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

/// As qapi has it, without all that differs from machine to machine.
#[derive(Debug, serde::Serialize)]
struct QueryCpusFast {}

#[derive(Debug, serde::Deserialize)]
struct Cpu {
    #[serde(rename = "thread-id")]
    thread_id: i32,
}

impl qapi::Command for QueryCpusFast {
    const NAME: &'static str = "query-cpus-fast";
    const ALLOW_OOB: bool = false;
    type Ok = Vec<Cpu>;
}
