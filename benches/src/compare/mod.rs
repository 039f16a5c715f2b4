//! The same guest under QEMU's dirty limit and under ours, by turns, on the same machine.
//!
//! QEMU runs our payload behind a ROM (`rom.rs`) and is driven by QMP (`qemu.rs`); ours runs it as `run` does. What
//! counts is what the guest itself saw: its own count of page writes, and the gaps in its own clock. Each case is tried in
//! rounds, so that a spell of noise on the host does not fall on one side alone, and of each measure the median is told.

mod cases;
mod migration;
mod page;
mod qemu;
mod result;
#[cfg_attr(not(target_arch = "x86_64"), path = "no_rom.rs")]
mod rom;
mod table;
mod trial;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use dirtylimit_core::PageRate;

use crate::cli::{named, ring, within};
use crate::output::say;
use crate::plan::PolicyKind;
use crate::probe;
use crate::report::progress::{Interrupt, Left};
use crate::units::{parse_duration, parse_rate, parse_seconds};
use crate::workload::Workload;
pub use cases::Case;
pub use migration::{Migrating, Migration, Migrations, page as migrations_page};
pub use page::page;
use qemu::Board;
use result::Compared;
pub use result::Comparison;
use trial::Trial;

/// What QEMU is called where no other is named.
const QEMU: &str = "qemu-system-x86_64";
/// How to get it.
const HOW: &str = "on Debian 12: apt-get install -t bookworm-backports qemu-system-x86; or name one by --qemu PATH";

/// The options of `compare`.
#[derive(Clone, Debug, Args)]
pub struct Compare {
    /// Limits to compare, in whole MiB/s
    #[arg(long, value_name = "RATE", value_delimiter = ',', value_parser = parse_rate)]
    pub limit: Vec<PageRate>,

    /// Rings to compare, in entries: powers of two, 1024 to 65536
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = ring::<1024>)]
    pub ring: Vec<u32>,

    /// What the guest does, one per vCPU: write:SIZE, slow:SIZE, steady:SIZE, burst:SIZE, read:SIZE or
    /// idle
    #[arg(long, value_name = "W", value_delimiter = ',')]
    pub workload: Vec<Workload>,

    /// The longest single pause asked of ours, 100us to 1s
    #[arg(long, value_name = "T", value_parser = parse_duration, default_value = "10ms")]
    pub max_pause: Duration,

    /// How long each guest runs free first, in seconds: 1 to 57
    #[arg(long, value_name = "S", value_parser = parse_seconds, default_value = "1")]
    pub free_seconds: Duration,

    /// How long it runs limited, in seconds: 1 to 3600
    #[arg(long, value_name = "S", value_parser = parse_seconds, default_value = "8")]
    pub seconds: Duration,

    /// How often each case is tried, 1 to 99
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=99))]
    pub rounds: u8,

    /// Whom to compare with [default: qemu where there is one, else stepped, saying so]
    #[arg(long, value_enum, value_name = "PEER")]
    pub peer: Option<PeerKind>,

    /// The QEMU to use [default: qemu-system-x86_64 of the PATH]; with --migrate there may be several
    #[arg(long, value_name = "PATH")]
    pub qemu: Vec<PathBuf>,

    /// Write the result as JSON; `-` is standard output, and nothing else goes there then
    #[arg(long, value_name = "FILE|-")]
    pub json: Option<PathBuf>,

    /// Write a page with pictures into this directory
    #[arg(long, value_name = "DIR", value_parser = named())]
    pub report: Option<PathBuf>,

    /// Migrations in the place of limits.
    #[command(flatten)]
    pub migration: Migration,

    /// Compare nothing: write the ROM that runs the first case's guest under QEMU, and say how to start it
    #[arg(long, value_name = "FILE", value_parser = named())]
    pub write_rom: Option<PathBuf>,
}

/// Whom ours is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PeerKind {
    /// QEMU's dirty limit.
    Qemu,
    /// Ours, with the published algorithm as its policy.
    Stepped,
}

/// The same, ready to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A QEMU: its path and what it calls itself.
    Qemu(PathBuf, String),
    /// The policy.
    Stepped,
}

impl Compare {
    /// The cases that were asked for; never none.
    ///
    /// # Errors
    /// Options that are out of range or ask for what cannot be compared; the message says what is allowed.
    pub fn cases(&self) -> Result<Vec<Case>, String> {
        let second = Duration::from_secs(1);
        within("--free-seconds", self.free_seconds, second, 57 * second)?;
        within("--seconds", self.seconds, second, 3600 * second)?;
        within("--max-pause", self.max_pause, Duration::from_micros(100), second)?;
        if self.qemu.len() > 1 {
            return Err("--qemu: limits are compared with one QEMU at a time".to_owned());
        }
        if self.limit.is_empty() && self.ring.is_empty() && self.workload.is_empty() {
            return Ok(cases::usual());
        }
        cases::asked(&self.limit, &self.ring, &self.workload)
    }

    /// Finds whom to compare with, and says so on stderr where it is not QEMU. Never none.
    ///
    /// # Errors
    /// A QEMU that was asked for and is not there, or one that does not start.
    pub fn find_peers(&self) -> Result<Vec<Peer>> {
        if self.peer == Some(PeerKind::Stepped) {
            return Ok(vec![Peer::Stepped]);
        }
        let found = |path: &PathBuf| match qemu::version(path) {
            Ok(version) => Ok(Peer::Qemu(path.clone(), version)),
            Err(error) if self.peer.is_none() && self.qemu.is_empty() && is_missing(&error) => {
                let instead = if self.migration.migrate { "our own modes alone" } else { "the policy `stepped`" };
                say(format_args!("There is no {QEMU} here ({HOW}): compared with {instead} instead."));
                Ok(Peer::Stepped)
            }
            Err(error) if is_missing(&error) => Err(error.context(HOW)),
            Err(error) => Err(error),
        };
        if self.qemu.is_empty() { Ok(vec![found(&QEMU.into())?]) } else { self.qemu.iter().map(found).collect() }
    }

    /// Compares, and says on stderr what it is at. If the user interrupts it, what there is is told.
    ///
    /// # Errors
    /// A run that fails, or an interruption before there is anything to tell.
    pub fn run(&self, cases: &[Case], peer: &Peer, interrupt: &Interrupt) -> Result<Comparison> {
        let mut tried: Vec<(Vec<Trial>, Vec<Trial>)> = vec![Default::default(); cases.len()];
        // Both.
        let time = 2 * (self.free_seconds + self.seconds);
        let mut left = Left(u32::from(self.rounds) * cases.iter().map(|_| time).sum::<Duration>());
        'rounds: for round in 1..=self.rounds {
            for (number, (case, (theirs, ours))) in cases.iter().zip(&mut tried).enumerate() {
                let (rounds, number, of) = (self.rounds, number + 1, cases.len());
                let (name, left) = (case.name(), left.begin(time));
                say(format_args!("round {round} of {rounds}, case {number} of {of}: {name}, about {left}"));
                let their = self.try_peer(case, peer, interrupt).with_context(|| peer.name())?;
                let our = self.try_ours(case, PolicyKind::Paced, interrupt).context("dirtylimit")?;
                if interrupt.requested() {
                    break 'rounds;
                }
                theirs.push(their);
                ours.push(our);
            }
        }
        let trials = || tried.iter().flat_map(|(_, ours)| ours);
        ensure!(trials().next().is_some(), "interrupted before the first case was done");
        let compared = |(case, (theirs, ours)): (&Case, &(Vec<Trial>, Vec<Trial>))| {
            (!ours.is_empty()).then(|| Compared::of(case, self.peer_command(case, peer), theirs, ours))
        };
        Ok(Comparison {
            peer: peer.name(),
            host: probe::host(true, None),
            rounds: self.rounds,
            free_seconds: self.free_seconds.as_secs_f64(),
            seconds: self.seconds.as_secs_f64(),
            max_pause_ms: 1e3 * self.max_pause.as_secs_f64(),
            interrupted: interrupt.requested(),
            lost_pages: trials().filter_map(|trial| trial.recording.lost_pages).sum(),
            cases: cases.iter().zip(&tried).filter_map(compared).collect(),
        })
    }

    /// The ROM that runs the case's guest, and the command that starts a QEMU with it from `file`.
    ///
    /// # Errors
    /// A guest for which the ROM has no room.
    pub fn rom(&self, case: &Case, file: &Path) -> Result<(Vec<u8>, String)> {
        let (rom, ram) = trial::rom_of(&case.workloads, None)?;
        let program = self.qemu.first().map_or(Path::new(QEMU), PathBuf::as_path);
        Ok((rom, command(program, file, &board(case, ram))))
    }

    fn peer_command(&self, case: &Case, peer: &Peer) -> Option<String> {
        let Peer::Qemu(program, _) = peer else { return None };
        let (_, ram) = trial::rom_of(&case.workloads, None).ok()?;
        Some(command(program, Path::new("ROM"), &board(case, ram)))
    }

    fn plan(&self, case: &Case, policy: PolicyKind) -> crate::plan::Plan {
        case.plan(policy, self.max_pause, self.free_seconds, self.seconds)
    }

    fn try_peer(&self, case: &Case, peer: &Peer, interrupt: &Interrupt) -> Result<Trial> {
        match peer {
            Peer::Qemu(program, _) => trial::qemu(&self.plan(case, PolicyKind::Paced), program, interrupt),
            Peer::Stepped => self.try_ours(case, PolicyKind::Stepped, interrupt),
        }
    }

    fn try_ours(&self, case: &Case, policy: PolicyKind, interrupt: &Interrupt) -> Result<Trial> {
        trial::ours(&self.plan(case, policy), interrupt)
    }
}

fn board(case: &Case, ram: u64) -> Board {
    Board { ring: Some(case.ring), vcpus: case.workloads.len(), ram }
}

fn command(program: &Path, rom: &Path, board: &Board) -> String {
    let arguments = board.arguments(&rom.to_string_lossy());
    let words = std::iter::once(program.to_string_lossy()).chain(arguments.iter().map(|word| word.into()));
    let words: Vec<_> = words.collect();
    shlex::try_join(words.iter().map(AsRef::as_ref)).unwrap_or_else(|_| words.join(" "))
}

fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::NotFound)
}

impl Peer {
    /// What it is called.
    pub fn name(&self) -> String {
        match self {
            Self::Qemu(_, version) => version.clone(),
            Self::Stepped => "stepped".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests;
