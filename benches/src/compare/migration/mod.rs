//! `compare --migrate`: the same guest migrated by QEMU and by `migrate`, in their modes, by turns on the same machine.
//!
//! | file | what |
//! |---|---|
//! | `qemu` | one migration between two QEMUs |
//! | `result`, `page` | what people and scripts see |

mod page;
mod qemu;
mod result;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use super::{Compare, Peer, cases, trial};
use crate::cli::within;
use crate::migrate::cli::{DEFAULT_RING, Plan};
use crate::migrate::{self, Mode};
use crate::output::say;
use crate::probe;
use crate::report::progress::{Interrupt, Left};
use crate::units::{Limit, PAGE_SIZE, mib_per_sec, parse_duration, parse_limit, parse_size};
use crate::workload::Workload;
pub use page::page;
use qemu::Throttle;
pub use result::Migrations;
use result::{Outcome, Tried};

/// The modes of ours.
const OURS: [Mode; 4] = [Mode::Goal, Mode::Half, Mode::Ramp, Mode::Uniform];

/// The options of `compare --migrate`.
#[derive(Clone, Debug, Args)]
pub struct Migration {
    /// Compare migrations: QEMU's without a throttle, with auto-converge and with dirty-limit (at --limit, in turn; a quarter
    /// of the bandwidth if none is given), and those of `migrate`
    #[arg(long, conflicts_with_all = ["ring", "seconds", "write_rom"])]
    pub migrate: bool,

    /// With --migrate: the guest's memory
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "512MiB", requires = "migrate")]
    pub memory: u64,

    /// With --migrate: what may be sent
    #[arg(long, value_name = "RATE", value_parser = bandwidth, default_value = "200MiB/s", requires = "migrate")]
    pub bandwidth: Limit,

    /// With --migrate: how long the guest may stand still at the switch
    #[arg(long, value_name = "T", value_parser = parse_duration, default_value = "300ms", requires = "migrate")]
    pub downtime: Duration,

    /// With --migrate: when those that have no goal give up, 1s to 1h
    #[arg(long, value_name = "T", value_parser = parse_duration, default_value = "60s", requires = "migrate")]
    pub deadline: Duration,
}

fn bandwidth(text: &str) -> Result<Limit, String> {
    let limit = parse_limit(text)?;
    let whole = |rate| mib_per_sec(rate, PAGE_SIZE).fract() == 0.0;
    match limit.filter(|&rate| whole(rate)) {
        Some(_) => Ok(Limit(limit)),
        None => Err("what may be sent is compared in whole MiB/s, from 1 on".to_owned()),
    }
}

/// Migrations to be compared.
#[derive(Debug)]
pub struct Migrating {
    /// That of `migrate`, whatever its mode.
    plan: Plan,
    /// QEMU's limits, in MiB/s.
    limits: Vec<u32>,
    rounds: u8,
    deadline: Duration,
}

/// Who migrates, and how.
#[derive(Clone, Debug)]
enum Side {
    /// A QEMU, what it calls itself, and what it does.
    Qemu(PathBuf, String, Throttle),
    Ours(Mode),
}

impl Compare {
    /// The migrations that were asked for.
    ///
    /// # Errors
    /// Options that are out of range or ask for what cannot be compared; the message says what is allowed.
    pub fn migrating(&self) -> Result<Migrating, String> {
        let asked = &self.migration;
        within("--deadline", asked.deadline, Duration::from_secs(1), Duration::from_secs(3600))?;
        let mut limits = self.limit.iter().map(|&limit| cases::whole(limit)).collect::<Result<Vec<_>, _>>()?;
        if limits.is_empty() {
            let bandwidth = asked.bandwidth.0.map_or(0.0, |rate| mib_per_sec(rate, PAGE_SIZE));
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole, and saturating")]
            limits.push((bandwidth as u32 / 4).max(1));
        }
        let workloads = if self.workload.is_empty() { vec![cases::SET] } else { self.workload.clone() };
        let plan = Plan {
            workloads: workloads.into_iter().map(Workload::maskable).collect(),
            memory: asked.memory,
            bandwidth: asked.bandwidth.0,
            downtime: asked.downtime,
            deadline: None,
            mode: Mode::Goal,
            carry_on: false,
            retry: 0,
            ring: DEFAULT_RING,
            max_pause: self.max_pause,
            free: self.free_seconds,
            payload: None,
            connect: None,
        };
        plan.check()?;
        trial::rom_of(&plan.workloads, Some(plan.memory)).map_err(|error| format!("--memory: {error:#}"))?;
        Ok(Migrating { plan, limits, rounds: self.rounds, deadline: asked.deadline })
    }
}

impl Migrating {
    /// Migrates by turns, and says on stderr what it is at. If the user interrupts it, what there is is told.
    ///
    /// # Errors
    /// A guest that cannot be started, or an interruption before there is anything to tell. A migration that does not come
    /// about is a result.
    pub fn run(&self, peers: &[Peer], interrupt: &Interrupt) -> Result<Migrations> {
        let sides = self.sides(peers);
        let mut tried: Vec<Vec<Outcome>> = vec![Vec::new(); sides.len()];
        let time = self.plan.free + self.deadline;
        let mut left = Left(u32::from(self.rounds) * sides.iter().map(|_| time).sum::<Duration>());
        'rounds: for round in 1..=self.rounds {
            for (side, outcomes) in sides.iter().zip(&mut tried) {
                let (name, left) = (side.name(), left.begin(time));
                say(format_args!("round {round} of {}: {name}, at most {left}", self.rounds));
                let outcome = self.migrate(side, interrupt)?;
                if interrupt.requested() {
                    break 'rounds;
                }
                outcomes.push(outcome);
            }
        }
        ensure!(!tried[0].is_empty(), "interrupted before the first migration was done");
        let told = |(side, outcomes): (&Side, Vec<Outcome>)| {
            (!outcomes.is_empty()).then(|| Tried::of(side.name(), self.command(side), outcomes))
        };
        Ok(Migrations {
            host: probe::host(true, None),
            workloads: self.plan.workloads.clone(),
            memory_mib: self.plan.memory >> 20,
            bandwidth_mib_s: self.plan.bandwidth.map_or(0.0, |rate| mib_per_sec(rate, PAGE_SIZE)),
            downtime_allowed_ms: 1e3 * self.plan.downtime.as_secs_f64(),
            deadline_s: self.deadline.as_secs_f64(),
            rounds: self.rounds,
            interrupted: interrupt.requested(),
            sides: sides.iter().zip(tried).filter_map(told).collect(),
        })
    }

    fn sides(&self, peers: &[Peer]) -> Vec<Side> {
        let qemus = peers.iter().filter_map(|peer| match peer {
            Peer::Qemu(path, version) => Some((path, version)),
            Peer::Stepped => None,
        });
        let throttles = || {
            let limits = self.limits.iter().map(|&mib_s| Throttle::DirtyLimit { mib_s });
            [Throttle::None, Throttle::AutoConverge].into_iter().chain(limits)
        };
        let theirs = qemus.flat_map(|(path, version)| {
            throttles().map(|throttle| Side::Qemu(path.clone(), version.clone(), throttle))
        });
        theirs.chain(OURS.map(Side::Ours)).collect()
    }

    fn migrate(&self, side: &Side, interrupt: &Interrupt) -> Result<Outcome> {
        match side {
            Side::Qemu(program, _, throttle) => qemu::migrate(program, *throttle, &self.plan, self.deadline, interrupt),
            Side::Ours(mode) => {
                let deadline = (*mode != Mode::Goal).then_some(self.deadline);
                let plan = Plan { mode: *mode, deadline, ..self.plan.clone() };
                migrate::migrate(&plan, interrupt).map(|migrated| Outcome::from(&migrated))
            }
        }
    }

    /// How the source is started, where it is another program.
    fn command(&self, side: &Side) -> Option<String> {
        let Side::Qemu(program, _, throttle) = side else { return None };
        let board = qemu::board(&self.plan, *throttle);
        Some(super::command(program, std::path::Path::new("ROM"), &board))
    }
}

impl Side {
    fn name(&self) -> String {
        match self {
            Self::Qemu(_, version, throttle) => format!("{version}, {throttle}"),
            Self::Ours(mode) => format!("dirtylimit, {mode}"),
        }
    }
}

#[cfg(test)]
mod tests;
