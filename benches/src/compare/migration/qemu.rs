//! One migration between two QEMUs of this machine, over a unix socket.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use dirtylimit_test_vm::host_tsc_hz;
use dirtylimit_test_vm::payload::stats;
use qapi::qmp::{self, Event, MigrateSetParameters, MigrationCapability, MigrationCapabilityStatus, MigrationStatus};

use super::result::{Measured, Outcome};
use crate::compare::qemu::{Board, Counters, Qemu};
use crate::compare::trial::{place, rom_of, stalls_between};
use crate::migrate::cli::Plan;
use crate::migrate::result::{Verdict, kept};
use crate::record::Stalls;
use crate::report::progress::Interrupt;
use crate::units::{PAGE_SIZE, mib_per_sec};

/// Entries of a vCPU's ring where the dirty limit is on: as QEMU's documentation has it.
const RING: u32 = 4096;
/// Distance between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// How long the guest is watched at the destination.
const RUN_ON: Duration = Duration::from_millis(500);
/// What the guest may take to touch all its memory, and QEMU to begin at the destination once the source is done, or to cancel.
const PATIENCE: Duration = Duration::from_secs(10);

/// What QEMU does about a guest that does not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Throttle {
    None,
    AutoConverge,
    DirtyLimit { mib_s: u32 },
}

impl fmt::Display for Throttle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::AutoConverge => f.write_str("auto-converge"),
            Self::DirtyLimit { mib_s } => write!(f, "dirty-limit {mib_s}"),
        }
    }
}

/// QEMU's machine: with rings only where its dirty limit needs them.
pub(super) fn board(plan: &Plan, throttle: Throttle) -> Board {
    let ring = matches!(throttle, Throttle::DirtyLimit { .. }).then_some(RING);
    Board { ring, vcpus: plan.workloads.len(), ram: plan.memory }
}

/// Starts the guest, and migrates it.
///
/// # Errors
/// A guest that does not start. A migration that does not come about is a result.
pub(super) fn migrate(
    program: &Path,
    throttle: Throttle,
    plan: &Plan,
    deadline: Duration,
    interrupt: &Interrupt,
) -> Result<Outcome> {
    let (rom, _) = rom_of(&plan.workloads, Some(plan.memory))?;
    let board = board(plan, throttle);
    let socket = Socket::new();
    let mut source = Qemu::start(program, &rom, board, &[])?;
    source.boot()?;
    place(&mut source, board.vcpus)?;
    let free = run_free(&mut source, plan)?;
    let mut destination = Qemu::start(program, &rom, board, &["-incoming", &socket.uri()])?;
    configure(&mut source, throttle, plan)?;

    let before = source.counters()?;
    let begun = now();
    let mut moving = Moving { source: &mut source, destination: &mut destination, deadline, interrupt, sent: 0 };
    let ended = moving.run(socket.uri());
    let sent = moving.sent;
    let (verdict, reason, moved) = match ended {
        Ok(End::Moved(moved)) => (Verdict::Done, "the guest runs at the destination".to_owned(), Some(moved)),
        Ok(End::GaveUp) => (Verdict::Unreachable, format!("it was not over after {deadline:?}"), None),
        Ok(End::Failed(why)) => (Verdict::Failed, why, None),
        Err(error) => (Verdict::Failed, format!("{error:#}"), None),
    };
    let total = moved.as_ref().map_or_else(now, |moved| moved.resumed).saturating_sub(begun);
    // One that has failed may be gone, and with it what its guest counted.
    let after = source.counters().unwrap_or_else(|_| before.clone());
    let (work_kept_pct, lost) = kept(&free, &accesses(&before), &accesses(&after), total);
    let measured = Measured {
        total_s: Some(total.as_secs_f64()),
        downtime_ms: moved.as_ref().map(|moved| 1e3 * moved.downtime.as_secs_f64()),
        sent_mib: Some(sent as f64 / f64::from(1 << 20)),
        lost_guest_s: lost,
        longest_stall_ms: Some(longest(&before, &after)),
        ..Measured::default()
    };
    let mut outcome = Outcome::new(verdict, reason, measured, work_kept_pct);
    if moved.is_some() {
        thread::sleep(RUN_ON);
        let there = accesses(&destination.counters()?);
        if there.iter().zip(accesses(&after)).zip(&free).any(|((&there, after), &free)| free > 0.0 && there <= after) {
            (outcome.verdict, outcome.reason) =
                (Verdict::Failed, "the guest stands still at the destination".to_owned());
        }
    }
    Ok(outcome)
}

fn accesses(counters: &[Counters]) -> Vec<u64> {
    counters.iter().map(|page| page[stats::ACCESSES]).collect()
}

/// Accesses per second of each vCPU without a dirty log, once all its memory is mapped: QEMU maps a page as it is touched.
fn run_free(qemu: &mut Qemu, plan: &Plan) -> Result<Vec<f64>> {
    let begin = Instant::now();
    let touched = |accesses: &[u64]| {
        let pages = plan.workloads.iter().map(|workload| workload.bytes() / u64::from(PAGE_SIZE));
        accesses.iter().zip(pages).all(|(&accesses, pages)| accesses >= pages)
    };
    let mut before = accesses(&qemu.counters()?);
    while !touched(&before) && begin.elapsed() < PATIENCE {
        thread::sleep(LOOK);
        before = accesses(&qemu.counters()?);
    }
    let begin = Instant::now();
    thread::sleep(plan.free);
    let (after, time) = (accesses(&qemu.counters()?), begin.elapsed().as_secs_f64().max(1e-3));
    Ok(after.iter().zip(before).map(|(after, before)| (after - before) as f64 / time).collect())
}

/// The longest gap of the guest's clock between two looks, in ms.
fn longest(before: &[Counters], after: &[Counters]) -> f64 {
    let units = Stalls { tsc_hz: host_tsc_hz(), ..Stalls::default() };
    let ticks = before.iter().zip(after).map(|(before, after)| stalls_between(before, after, &units).longest_ticks);
    1e3 * ticks.max().unwrap_or(0) as f64 / units.tsc_hz.max(1) as f64
}

fn configure(source: &mut Qemu, throttle: Throttle, plan: &Plan) -> Result<()> {
    let capability = match throttle {
        Throttle::None => None,
        Throttle::AutoConverge => Some(MigrationCapability::auto_converge),
        Throttle::DirtyLimit { .. } => Some(MigrationCapability::dirty_limit),
    };
    if let Some(capability) = capability {
        let capabilities = vec![MigrationCapabilityStatus { capability, state: true }];
        source.execute(qmp::migrate_set_capabilities { capabilities })?;
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole MiB/s")]
    let max_bandwidth = plan.bandwidth.map(|rate| (mib_per_sec(rate, PAGE_SIZE) as u64) << 20);
    let vcpu_dirty_limit = match throttle {
        Throttle::DirtyLimit { mib_s } => Some(mib_s.into()),
        _ => None,
    };
    let downtime_limit = u64::try_from(plan.downtime.as_millis()).ok();
    let parameters = MigrateSetParameters { max_bandwidth, downtime_limit, vcpu_dirty_limit, ..Default::default() };
    source.execute(qmp::migrate_set_parameters(parameters))?;
    Ok(())
}

/// Where the two meet. Dropping it removes what QEMU made there.
struct Socket(PathBuf);

impl Socket {
    fn new() -> Self {
        let socket = Self(std::env::temp_dir().join(format!("dirtylimit-migration-{}", std::process::id())));
        socket.remove();
        socket
    }

    fn uri(&self) -> String {
        format!("unix:{}", self.0.display())
    }

    fn remove(&self) {
        // Mostly there is none.
        let _ = fs::remove_file(&self.0);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.remove();
    }
}

/// How it ended.
enum End {
    Moved(Moved),
    GaveUp,
    Failed(String),
}

/// The guest is at the destination.
struct Moved {
    /// From the source's guest being stopped to the destination's running: by the time of day that both QEMUs tell, or what
    /// the source counts, where that is more.
    downtime: Duration,
    /// When the guest ran there, by the time of day.
    resumed: Duration,
}

/// The time of day, as QEMU stamps its events.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

struct Moving<'a> {
    source: &'a mut Qemu,
    destination: &'a mut Qemu,
    deadline: Duration,
    interrupt: &'a Interrupt,
    /// Bytes of memory and its frames, when they were last asked for; QEMU does not count what its devices have.
    sent: i64,
}

impl Moving<'_> {
    fn run(&mut self, uri: String) -> Result<End> {
        let begin = Instant::now();
        self.source.execute(qmp::migrate { channels: None, detach: None, resume: None, uri: Some(uri) })?;
        let told = loop {
            thread::sleep(LOOK);
            let told = self.source.execute(qmp::query_migrate {})?;
            self.sent = told.ram.as_ref().map_or(self.sent, |ram| ram.transferred);
            match told.status {
                Some(MigrationStatus::completed) => break told,
                Some(MigrationStatus::failed) => {
                    return Ok(End::Failed(told.error_desc.unwrap_or_else(|| "QEMU says only that it failed".into())));
                }
                _ if begin.elapsed() >= self.deadline || self.interrupt.requested() => return self.cancel(),
                _ => {}
            }
        };
        let stopped = stamp(&mut *self.source, |event| matches!(event, Event::STOP { .. }))?;
        let resumed = stamp(&mut *self.destination, |event| matches!(event, Event::RESUME { .. }))?;
        let counted = Duration::from_millis(told.downtime.unwrap_or(0).try_into().unwrap_or(0));
        Ok(End::Moved(Moved { downtime: resumed.saturating_sub(stopped).max(counted), resumed }))
    }

    fn cancel(&mut self) -> Result<End> {
        self.source.execute(qmp::migrate_cancel {})?;
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            match self.source.execute(qmp::query_migrate {})?.status {
                Some(MigrationStatus::cancelled | MigrationStatus::failed) => return Ok(End::GaveUp),
                Some(MigrationStatus::completed) => break,
                _ => thread::sleep(LOOK),
            }
        }
        Ok(End::Failed("QEMU does not cancel".into()))
    }
}

/// When the event happened, the last one of its kind; it is waited for.
fn stamp(qemu: &mut Qemu, is: impl Fn(&Event) -> bool) -> Result<Duration> {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        if let Some(event) = qemu.events()?.iter().rfind(|event| is(event)) {
            return time_of(event);
        }
        thread::sleep(Duration::from_millis(5));
    }
    bail!("QEMU did not stop the guest here, or start it there, in {PATIENCE:?}")
}

fn time_of(event: &Event) -> Result<Duration> {
    let told = serde_json::to_value(event.timestamp())?;
    let number = |name: &str| told[name].as_u64().with_context(|| format!("an event of QEMU's without its {name}"));
    Ok(Duration::from_secs(number("seconds")?) + Duration::from_micros(number("microseconds")?))
}
