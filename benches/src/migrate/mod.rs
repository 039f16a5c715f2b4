//! `migrate`: a guest that runs goes from one process to another over a real socket.
//!
//! | file | what |
//! |---|---|
//! | `wire`, `address`, `pages` | the format; sockets; memory as it goes over |
//! | `guest`, `state` | the machine of either half; a vCPU's registers |
//! | `link`, `source`, `attempt` | the source: its end of the connection, rounds and switch, and what comes of them |
//! | `modes` | what decides after each round |
//! | `destination` | takes a guest in |
//! | `result`, `progress`, `picture`, `cli` | what people and scripts see |

pub mod address;
mod attempt;
pub mod cli;
mod destination;
mod guest;
mod link;
mod modes;
mod pages;
pub mod picture;
mod progress;
pub mod result;
mod source;
mod state;
pub mod wire;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{self, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dirtylimit_kvm::{Config, Kick};
use dirtylimit_test_vm::payload;

use crate::guest::kvm::{Load, check_memory};
use crate::output::{say, tell};
use crate::report::progress::Interrupt;
use address::{Address, Listener, Stream};
use attempt::Subject;
use cli::Plan;
use guest::Guest;
use link::End;
pub use modes::Mode;
use progress::Lines;
use result::{Migrated, Verdict};

/// How often a waiting half looks whether the user wants an end.
const LOOK: Duration = Duration::from_millis(20);
/// How long a destination that was started here may take to end.
const CHILD_PATIENCE: Duration = Duration::from_secs(2);

/// Starts the guest, and migrates it.
///
/// # Errors
/// No usable KVM; a guest that this host has no room for; a payload that faults. What becomes of the migration itself is in
/// its result.
pub fn migrate(plan: &Plan, interrupt: &Interrupt) -> Result<Migrated> {
    check_memory(plan.memory)?;
    let image = plan.payload.as_deref().map(payload::load).transpose()?;
    let loads: Vec<Load> = plan.workloads.iter().map(|&workload| workload.into()).collect();
    let config = Config::new().ring_entries(plan.ring).max_pause(plan.max_pause).prompt(true);
    // SIGRTMIN itself is the machine's own kick. Without a kick no ring can be drained.
    let config = config.kick(Kick::Signal(libc::SIGRTMIN() + 1));
    let guest = Guest::new(&loads, image.as_deref().unwrap_or(payload::image()), plan.memory, &config)?;
    guest.start()?;
    let free = run_free(&guest, plan.free, interrupt)?;
    let subject = Subject { guest: &guest, plan, free: &free };
    for attempt in 1.. {
        let mut destination = None;
        let mut migrated = match connect(plan, &mut destination) {
            Ok(stream) => subject.attempt(attempt, stream, interrupt, &mut Lines::new()),
            Err(error) => subject.failed(attempt, &End::Failed(error)),
        };
        drop(destination);
        if migrated.verdict != Verdict::Done {
            subject.run_on(&mut migrated);
            guest.check()?;
        }
        let again = migrated.verdict == Verdict::Failed && migrated.memory_equal != Some(false);
        if !again || attempt > plan.retry {
            return Ok(migrated);
        }
        tell(format_args!("attempt {attempt} failed: {}; trying again", migrated.reason));
    }
    unreachable!("attempts end")
}

/// Accesses per second of each vCPU without a dirty log. The first quarter is not counted: the guest touches its memory for
/// the first time there.
fn run_free(guest: &Guest, time: Duration, interrupt: &Interrupt) -> Result<Vec<f64>> {
    pause(time / 4, interrupt);
    let (before, begin) = (guest.accesses(), Instant::now());
    pause(time * 3 / 4, interrupt);
    let time = begin.elapsed().as_secs_f64().max(1e-3);
    guest.check()?;
    Ok(guest.accesses().iter().zip(before).map(|(now, before)| (now - before) as f64 / time).collect())
}

fn pause(time: Duration, interrupt: &Interrupt) {
    let end = Instant::now() + time;
    while !interrupt.requested() {
        let Some(rest) = end.checked_duration_since(Instant::now()).filter(|rest| !rest.is_zero()) else { return };
        thread::sleep(rest.min(LOOK));
    }
}

fn connect(plan: &Plan, destination: &mut Option<Child>) -> Result<Stream> {
    match &plan.connect {
        Some(address) => address.connect(),
        None => {
            let (ours, theirs) = UnixStream::pair().context("cannot make a pair of sockets")?;
            *destination = Some(Child::start(theirs)?);
            Ok(Stream::Unix(ours))
        }
    }
}

/// A destination that was started here.
#[derive(Debug)]
struct Child(process::Child);

impl Child {
    fn start(socket: UnixStream) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program")?;
        Command::new(program)
            .args(["migrate", "--listen", "inherited"])
            .stdin(OwnedFd::from(socket))
            .stdout(Stdio::null())
            // Ctrl-C at the terminal is for the source, which tells the destination.
            .process_group(0)
            .spawn()
            .map(Self)
            .context("cannot start the destination")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let deadline = Instant::now() + CHILD_PATIENCE;
        while Instant::now() < deadline {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(LOOK);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for a guest at `address`, and takes it in. Where an attempt fails it says so, and waits for the next. Returns the
/// exit status: 0, or that of a migration that was cancelled or, for a destination that a source has started, failed.
///
/// # Errors
/// An address where nobody can listen.
pub fn listen(address: &Address, interrupt: &Interrupt) -> Result<u8> {
    if *address == Address::Inherited {
        // The source is told what is wrong, and tells the user.
        let came = destination::take_in(address.connect()?, interrupt).is_ok();
        return Ok(u8::from(!came));
    }
    let listener = address.listen()?;
    say(format_args!("Waiting for a guest at {}.", listener.address()));
    loop {
        if interrupt.requested() {
            return Ok(Verdict::Cancelled.status());
        }
        let Some(stream) = listener.accept().context("cannot accept a source")? else {
            thread::sleep(LOOK);
            continue;
        };
        say("A source has connected.");
        match refusing_others(&listener, || destination::take_in(stream, interrupt)) {
            Ok(report) => {
                let did: Vec<_> = report.accesses.iter().map(|(came, end)| end - came).collect();
                say(format_args!("The guest came, and ran here: {did:?} accesses by its vCPUs."));
                return Ok(0);
            }
            Err(error) => tell(format_args!("No guest came: {error:#}. Waiting for the next.")),
        }
    }
}

/// Runs `run`, and tells all who connect meanwhile that another migration goes on.
fn refusing_others<T>(listener: &Listener, run: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::Write as _;
            // Relaxed: only ends a loop.
            while !done.load(Relaxed) {
                match listener.accept() {
                    Ok(Some(mut other)) => {
                        say("Another source has connected, and is refused.");
                        let _ = other.set_timeouts(None, Some(LOOK));
                        if other.write_all(&wire::preamble()).is_ok() {
                            destination::refuse(&mut other, "another migration goes on here");
                        }
                    }
                    Ok(None) | Err(_) => thread::sleep(LOOK),
                }
            }
        });
        let _end = attempt::Raise(&done);
        run()
    })
}
