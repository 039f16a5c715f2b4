//! The options of `migrate`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use dirtylimit_core::PageRate;
use dirtylimit_test_vm::layout::Layout;

use super::address::Address;
use super::modes::Mode;
use crate::cli::{Limit, MIN_RING, limit, named, ring, vcpus, within};
use crate::guest::kvm::{Load, MAX_VCPUS};
use crate::units::{parse_duration, parse_seconds, parse_size};
use crate::workload::Workload;

/// Entries of each vCPU's ring, unless told: a free guest that does not fill it has a fault for each page and round, and no more.
pub(crate) const DEFAULT_RING: u32 = 65_536;

/// The options of `migrate`.
#[derive(Clone, Debug, Args)]
pub struct Migrate {
    /// What a vCPU does, once for all or one per vCPU, as for `run`
    #[arg(long, value_name = "W", value_delimiter = ',', default_value = "write:224MiB")]
    pub workload: Vec<Workload>,

    /// Number of vCPUs, 1 to 64 [default: number of workloads]
    #[arg(long, value_name = "N", value_parser = vcpus::<MAX_VCPUS>)]
    pub vcpus: Option<usize>,

    /// The guest's memory, in steps of 2MiB; 16MiB of it are not for workloads
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "512MiB")]
    pub memory: u64,

    /// What may be sent; `none` is as much as the connection takes
    #[arg(long, value_name = "RATE", value_parser = limit, default_value = "200MiB/s")]
    pub bandwidth: Limit,

    /// How long the guest may stand still at the switch, 20ms to 60s (but for the mode ramp, which has its own)
    #[arg(long, value_name = "T", value_parser = parse_duration, default_value = "300ms")]
    pub downtime: Duration,

    /// When it must be over; without it only modes other than goal give up, after 60s
    #[arg(long, value_name = "T", value_parser = parse_duration)]
    pub deadline: Option<Duration>,

    /// What holds the guest: none, uniform (all vCPUs alike, as QEMU's auto-converge), fixed=RATE, ramp (nothing, but the
    /// downtime grows from 150 to 1050ms), half (of the bandwidth), goal (as much as the downtime needs)
    #[arg(long, value_name = "MODE", default_value = "goal")]
    pub mode: Mode,

    /// Go on where the goal is out of reach, or the migration is stalled
    #[arg(long)]
    pub carry_on: bool,

    /// The number of further attempts where one fails; the guest runs on meanwhile
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub retry: u32,

    /// Entries of each vCPU's dirty ring: a power of two, 256 to 65536
    #[arg(long, value_name = "N", value_parser = ring::<MIN_RING>, default_value_t = DEFAULT_RING)]
    pub ring: u32,

    /// The longest single pause, 100us to 1s
    #[arg(long, value_name = "T", value_parser = parse_duration, default_value = "10ms")]
    pub max_pause: Duration,

    /// How long the guest runs without a dirty log first, in seconds
    #[arg(long, value_name = "S", value_parser = parse_seconds, default_value = "1")]
    pub free_seconds: Duration,

    /// A guest image that keeps the guest ABI (flat binary) [default: built in]
    #[arg(long, value_name = "FILE")]
    pub payload: Option<PathBuf>,

    /// Be the destination, at this address: unix:PATH or HOST:PORT. Waits until a guest has come; --quiet stands before
    /// `migrate` then
    #[arg(long, value_name = "ADDR", exclusive = true)]
    pub listen: Option<Address>,

    /// Be the source, of a destination at this address [default: one that is started here]
    #[arg(long, value_name = "ADDR")]
    pub connect: Option<Address>,

    /// Write the report as JSON; `-` is standard output, and nothing else goes there then
    #[arg(long, value_name = "FILE|-")]
    pub json: Option<PathBuf>,

    /// Draw what was left, sent and dirtied over time, with the budget
    #[arg(long, value_name = "FILE", value_parser = named())]
    pub svg: Option<PathBuf>,
}

/// A migration that was asked for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// One per vCPU; a random writer's size is a power of two.
    pub workloads: Vec<Workload>,
    /// Bytes.
    pub memory: u64,
    /// `None`: as much as the connection takes.
    pub bandwidth: Option<PageRate>,
    /// How long the guest may stand still.
    pub downtime: Duration,
    /// When it must be over.
    pub deadline: Option<Duration>,
    /// What steers it.
    pub mode: Mode,
    /// Go on where the goal is out of reach.
    pub carry_on: bool,
    /// Attempts beyond the first.
    pub retry: u32,
    /// Entries of each ring.
    pub ring: u32,
    /// The longest pause.
    pub max_pause: Duration,
    /// How long the guest runs free.
    pub free: Duration,
    /// A guest image in place of the built-in one.
    pub payload: Option<PathBuf>,
    /// Where the destination is; `None`: one is started.
    pub connect: Option<Address>,
}

impl Migrate {
    /// The migration that was asked for.
    ///
    /// # Errors
    /// Options that contradict each other or are out of range; the message names the option and what is allowed.
    pub fn plan(&self) -> Result<Plan, String> {
        let count = self.vcpus.unwrap_or(self.workload.len());
        if !(1..=MAX_VCPUS).contains(&count) {
            return Err(format!("--vcpus {count}: 1 to {MAX_VCPUS} vCPUs are possible"));
        }
        let workloads = crate::cli::per_vcpu("--workload", &self.workload, count)?;
        let workloads: Vec<_> = workloads.into_iter().map(Workload::maskable).collect();
        if self.connect == Some(Address::Inherited) {
            return Err("--connect: an address is unix:PATH or HOST:PORT".to_owned());
        }
        let plan = Plan {
            workloads,
            memory: self.memory,
            bandwidth: self.bandwidth.0,
            downtime: self.downtime,
            deadline: self.deadline,
            mode: self.mode,
            carry_on: self.carry_on,
            retry: self.retry,
            ring: self.ring,
            max_pause: self.max_pause,
            free: self.free_seconds,
            payload: self.payload.clone(),
            connect: self.connect.clone(),
        };
        plan.check().map(|()| plan)
    }
}

impl Plan {
    /// Whether the figures are in range.
    ///
    /// # Errors
    /// One that is not; the message names its option and what is allowed.
    pub(crate) fn check(&self) -> Result<(), String> {
        let loads: Vec<Load> = self.workloads.iter().map(|&workload| workload.into()).collect();
        Layout::new(&loads)
            .and_then(|layout| layout.with_ram(self.memory))
            .map_err(|error| format!("--memory: {error:#}"))?;
        let (us, ms, s) = (Duration::from_micros, Duration::from_millis, Duration::from_secs);
        within("--max-pause", self.max_pause, us(100), s(1))?;
        within("--downtime", self.downtime, ms(20), s(60))?;
        within("--free-seconds", self.free, ms(0), s(3600))?;
        if let Some(deadline) = self.deadline {
            within("--deadline", deadline, ms(100), s(86_400))?;
        }
        Ok(())
    }
}
