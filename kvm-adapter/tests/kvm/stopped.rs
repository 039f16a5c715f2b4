//! How tests keep a process from running: stopped, traced, frozen. No mask prevents that in the middle of a reset; see
//! `storms.rs`.

use std::io::{BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use rustix::process::{Signal, set_parent_process_death_signal};

pub(crate) const PAGE: u64 = 4096;

/// Those who disturb run one after the other, so that they do not disturb each other's timing.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a process is kept from running.
#[derive(Clone, Debug)]
pub(crate) enum Halt {
    /// SIGSTOP, SIGCONT.
    Stop,
    /// A tracer stops each thread, and lets go of it.
    Trace,
    /// A freezer cgroup of its own.
    Freeze(Freezer),
}

/// A freezer cgroup (of version 1 or 2).
#[derive(Clone, Debug)]
pub(crate) struct Freezer {
    group: PathBuf,
    /// The file that freezes, and what to write to it.
    state: &'static str,
    words: [&'static str; 2],
}

impl Freezer {
    /// One for each version that this system lets us use; says so where there is none.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let mut freezers = Vec::new();
        for mount in fs::read_to_string("/proc/self/mounts")?.lines() {
            let mut fields = mount.split(' ').skip(1);
            let (Some(at), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next()) else { continue };
            let (state, words, controller) = match kind {
                "cgroup2" => ("cgroup.freeze", ["0", "1"], ""),
                "cgroup" if options.split(',').any(|option| option == "freezer") => {
                    ("freezer.state", ["THAWED", "FROZEN"], "freezer")
                }
                _ => continue,
            };
            // "6:freezer:/where", "0::/where"
            let ours = own.lines().find_map(|line| {
                let mut fields = line.splitn(3, ':').skip(1);
                fields.next()?.split(',').any(|name| name == controller).then(|| fields.next())?
            });
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let name = format!("dirtylimit-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
            let group = PathBuf::from(format!("{at}{}", ours.unwrap_or("/"))).join(name);
            if fs::create_dir(&group).is_ok() {
                freezers.push(Self { group, state, words });
            }
        }
        if freezers.is_empty() {
            // The raw descriptor: the test runner does not capture it.
            let _ = writeln!(std::io::stderr(), "SKIPPED: there is no cgroup freezer that this user may use");
        }
        Ok(freezers)
    }

    fn set(&self, frozen: bool) -> Result<()> {
        let (file, word) = (self.group.join(self.state), self.words[usize::from(frozen)]);
        fs::write(&file, word).with_context(|| format!("{}: {word}", file.display()))
    }

    /// Of no use any more, once its process has ended.
    pub(crate) fn remove(&self) -> Result<()> {
        fs::remove_dir(&self.group).with_context(|| self.group.display().to_string())
    }
}

/// A child: this test once more, with a role. Ended with the test, however that ends.
#[derive(Debug)]
pub(crate) struct Halted(Child);

impl Drop for Halted {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Halted {
    /// Starts the test of the calling thread with `role` in its environment.
    pub(crate) fn start((name, role): (&str, &str)) -> Result<(Self, BufReader<ChildStdout>)> {
        let test = thread::current().name().context("a test has a name")?.to_owned();
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args([&test, "--exact", "--nocapture", "--test-threads=1"])
            .env(name, role)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        // A watchdog ends this process without a word to its children.
        let die_with_the_test = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
        // SAFETY: a system call and no more, as is allowed between fork and exec.
        unsafe { command.pre_exec(die_with_the_test) };
        let mut child = command.spawn()?;
        let says = BufReader::new(child.stdout.take().context("piped")?);
        Ok((Self(child), says))
    }

    /// Puts it where [`Halt::Freeze`] reaches it.
    pub(crate) fn prepare(&self, halt: &Halt) -> Result<()> {
        match halt {
            Halt::Freeze(freezer) => Ok(fs::write(freezer.group.join("cgroup.procs"), self.0.id().to_string())?),
            _ => Ok(()),
        }
    }

    /// Keeps it from running for `time`.
    pub(crate) fn halt(&self, halt: &Halt, time: Duration) -> Result<()> {
        match halt {
            Halt::Stop => {
                self.signal(libc::SIGSTOP)?;
                thread::sleep(time);
                self.signal(libc::SIGCONT)
            }
            Halt::Freeze(freezer) => {
                freezer.set(true)?;
                thread::sleep(time);
                freezer.set(false)
            }
            Halt::Trace => {
                let mut traced = Vec::new();
                for thread in fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
                    let thread = thread?.file_name().to_str().context("a number")?.parse()?;
                    // One that has ended since is not there to be stopped.
                    if ptrace(libc::PTRACE_SEIZE, thread, 0)
                        .and_then(|()| ptrace(libc::PTRACE_INTERRUPT, thread, 0))
                        .is_ok()
                    {
                        traced.extend(stopped(thread)?.map(|signal| (thread, signal)));
                    }
                }
                thread::sleep(time);
                traced.into_iter().try_for_each(|(thread, signal)| ptrace(libc::PTRACE_DETACH, thread, signal))
            }
        }
    }

    /// Stops it and lets it go on, perhaps before it has noticed.
    pub(crate) fn stop_and_continue(&self, between: impl FnOnce()) -> Result<()> {
        self.signal(libc::SIGSTOP)?;
        between();
        self.signal(libc::SIGCONT)
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: our own child, not waited for yet, so that its number is its own.
        ensure!(unsafe { libc::kill(libc::pid_t::try_from(self.0.id())?, signal) } == 0);
        Ok(())
    }
}

fn ptrace(request: libc::c_uint, thread: libc::pid_t, data: i32) -> Result<()> {
    // SAFETY: these requests take numbers.
    ensure!(unsafe { libc::ptrace(request, thread, 0usize, data as usize) } == 0, std::io::Error::last_os_error());
    Ok(())
}

/// Waits until a seized thread has stopped; the signal that it was about to get, to be handed on, or 0. `None` if it ended.
fn stopped(thread: libc::pid_t) -> Result<Option<i32>> {
    let mut status = 0;
    // SAFETY: writes the status.
    ensure!(unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) } == thread, std::io::Error::last_os_error());
    // The stop that was asked for is an event, in the bits above the signal.
    let signal = if status >> 16 == 0 { libc::WSTOPSIG(status) } else { 0 };
    Ok(libc::WIFSTOPPED(status).then_some(signal))
}
