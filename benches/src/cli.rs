//! The command line. What clap cannot check one by one is checked by [`Run::plan`].

use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Arg, ArgMatches, Args, CommandFactory, Parser, Subcommand};
use dirtylimit_core::PageRate;

use crate::compare::Compare;
use crate::lab::Lab;
use crate::migrate::cli::Migrate;
use crate::plan::{KickKind, MetricsTo, Plan, PolicyKind, Step, VcpuPlan};
use crate::record::GuestKind;
use crate::scenario::Scenarios;
use crate::units::{Rate, Time, is_plain_rate, parse_duration, parse_limit, parse_percent, parse_rate, parse_seconds};
use crate::workload::Workload;

/// The most vCPUs that the limiter takes.
const MAX_VCPUS: usize = 1024;
/// The smallest ring that leaves room above the entries that KVM reserves.
pub(crate) const MIN_RING: u32 = 256;
/// The largest that KVM offers.
const MAX_RING: u32 = 65_536;

/// Runs guests under a dirty page rate limit and measures what became of them
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// Say nothing on stderr but errors
    #[arg(long, global = true)]
    pub quiet: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a guest, let it run free, limit it, report
    ///
    /// Sizes and rates take KiB, MiB, GiB, TiB; plain numbers are pages (per second). Rates also take MB/s (10^6 bytes) and Gbit/s
    /// (10^9 bits); what QEMU and libvirt call MB/s is MiB/s here. Ctrl-C ends the run and reports what there is.
    ///
    /// Exit status: 0 done, 1 the run failed or a report could not be written, 2 bad usage, 3 pages were lost, 4 an error was
    /// above --fail-over.
    #[command(verbatim_doc_comment)]
    Run(Box<Run>),
    /// Print what this host's KVM offers
    ///
    /// Exit status: 0 a KVM guest can be limited here, 1 it cannot, 2 bad usage.
    #[command(verbatim_doc_comment)]
    Probe {
        /// Write what was found as JSON instead; `-` is standard output.
        #[arg(long, value_name = "FILE|-")]
        json: Option<PathBuf>,
    },
    /// Measure the figures that the limiter must reach, on this host, under KVM
    ///
    /// Each case runs once and is judged against its bounds alone. A thread that only sleeps is beside it: where p99.9 of its
    /// sleeps ended more than 0.5 ms late, the host cannot show what a case is about, and the case is invalid. The lab judges
    /// them all (docs/LAB.md).
    ///
    /// Ctrl-C ends it and tells of the cases that are done.
    ///
    /// Exit status: 0 all figures met, 1 a figure missed, a run failed or it was interrupted, 2 bad usage, 3 pages were lost, 4 cases were invalid
    /// and no figure missed.
    #[command(verbatim_doc_comment)]
    Scenario(Scenarios),
    /// Run the same guest under QEMU's dirty limit and under this one, by turns
    ///
    /// Without --limit, --ring and --workload the usual cases are compared; else each limit by each ring, for one guest. Every
    /// vCPU that writes has the limit. Where there is no QEMU, the policy `stepped` takes its place.
    ///
    /// Exit status: 0 done, 1 a run failed, 2 bad usage, 3 pages were lost.
    #[command(verbatim_doc_comment)]
    Compare(Box<Compare>),
    /// Migrate a running guest to another process, with as much throttle as the downtime needs
    ///
    /// Starts source and destination here; --listen and --connect are the two halves. At the switch the hashes of all pages
    /// are compared, which is no part of the downtime told. Where a migration does not come about the guest goes on at the
    /// source, unthrottled. Ctrl-C ends it so.
    ///
    /// Exit status: 0 done (the destination: a guest came), 1 it failed or a report could not be written, 2 bad usage, 3 the
    /// memory was not equal or a counter of the guest stepped back, 4 the goal is out of reach, 5 stalled: no throttle would
    /// help, 6 cancelled.
    #[command(verbatim_doc_comment)]
    Migrate(Box<Migrate>),
    /// Run a command of this program in an emulated machine with a KVM of its own, in virtual time
    Lab(Lab),
    /// Print what a shell needs to complete this program's options
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print this program's manual page, or that of one of its commands
    Man {
        /// The command.
        command: Option<String>,
    },
}

/// The options of `run`.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// Where the workload runs: under KVM, or simulated in virtual time [default: kvm where usable, else sim]
    #[arg(long, value_enum, value_name = "GUEST")]
    pub guest: Option<GuestKind>,

    /// What a vCPU does, once for all or one per vCPU: write:SIZE, random:SIZE, read:SIZE, slow:SIZE (a writer with work
    /// between writes: 0.1 million pages a second), steady:SIZE (with less of it: a million pages on a CPU of 500 million
    /// instructions a second), burst:SIZE (100 ms on, 100 ms off) or idle
    #[arg(long, value_name = "W", value_delimiter = ',', default_value = "write:224MiB")]
    pub workload: Vec<Workload>,

    /// Number of vCPUs, 1 to 1024 [default: number of workloads]
    #[arg(long, value_name = "N", value_parser = vcpus::<MAX_VCPUS>)]
    pub vcpus: Option<usize>,

    /// Limit, once for all vCPUs or one per vCPU; `none` is no limit
    #[arg(long, value_name = "RATE", value_delimiter = ',', value_parser = limit, default_value = "100MiB/s")]
    pub limit: Vec<Limit>,

    /// Budget of the whole VM
    #[arg(long, value_name = "RATE", value_parser = limit, default_value = "none")]
    pub vm_limit: Limit,

    /// How a rate and a limit become a penalty
    #[arg(long, value_enum, default_value_t = PolicyKind::Paced)]
    pub policy: PolicyKind,

    /// Entries of each vCPU's dirty ring: a power of two, 256 to 65536
    #[arg(long, value_name = "N", value_parser = ring::<MIN_RING>, default_value_t = 4096)]
    pub ring: u32,

    /// The longest single pause, 100us to 1s
    #[arg(long, value_name = "T", value_parser = parse_duration, default_value = "10ms")]
    pub max_pause: Duration,

    /// Interval between two collections of the dirty log, as a migration's passes would; 10ms to 60s
    #[arg(long, value_name = "T", value_parser = parse_duration, default_value = "1s")]
    pub pass: Duration,

    /// How long the guest runs free first, in seconds
    #[arg(long, value_name = "S", value_parser = parse_seconds, default_value = "1")]
    pub free_seconds: Duration,

    /// How long it runs limited, in seconds
    #[arg(long, value_name = "S", value_parser = parse_seconds, default_value = "8")]
    pub seconds: Duration,

    /// Change every vCPU's limit while it runs, each T counted from the first limit: 30MiB/s@2s,300MiB/s@5s
    #[arg(long, value_name = "RATE@T", value_delimiter = ',', value_parser = step)]
    pub steps: Vec<Step>,

    /// A guest image that keeps the guest ABI (flat binary) [default: built in]
    #[arg(long, value_name = "FILE")]
    pub payload: Option<PathBuf>,

    /// Serve a control socket that speaks QEMU's protocol; what it sets overrides the options from then on, and its `quit`
    /// ends the run
    #[arg(long, value_name = "PATH")]
    pub qmp: Option<PathBuf>,

    /// Serve counters for Prometheus at this loopback address (IP:PORT, or a port of 127.0.0.1), or write them to this file
    /// once a second
    #[arg(long, value_name = "ADDR|FILE", value_parser = metrics_to)]
    pub metrics: Option<MetricsTo>,

    /// Who ends the slices that the ring does not; the library's own default is auto
    #[arg(long, value_enum, default_value = "signal")]
    pub kick: KickKind,

    /// Have KVM tell each vCPU the time that was stolen from it, as every Linux guest asks for: it writes a page of the
    /// guest at nearly every entry, and logs it
    #[arg(long)]
    pub steal_time: bool,

    /// Exit with status 4 where the error of a limited vCPU, or that of the VM if it has a budget, is above PCT percent, with
    /// either sign; a vCPU that writes less than its limit allows has no error
    #[arg(long, value_name = "PCT", value_parser = parse_percent)]
    pub fail_over: Option<f64>,

    /// Write the report as JSON; `-` is standard output, and nothing else goes there then
    #[arg(long, value_name = "FILE|-")]
    pub json: Option<PathBuf>,

    /// Write the series as CSV: time_ms, vcpu, net_mib_s, gross_mib_s, limit_mib_s (empty where there is none) and paused_pct, a
    /// line for each vCPU and interval of about 10 ms, at its end; `-` is standard output
    #[arg(long, value_name = "FILE|-")]
    pub csv: Option<PathBuf>,

    /// Draw the rate against the limit over time
    #[arg(long, value_name = "FILE", value_parser = named())]
    pub svg: Option<PathBuf>,

    /// Write a page with pictures, DIR/index.html; it needs no network
    #[arg(long, value_name = "DIR", value_parser = named())]
    pub report: Option<PathBuf>,
}

/// The definition of the command line. A number with a minus is a value, so that the message says what is allowed.
pub fn command() -> clap::Command {
    let numbers = |arg: Arg| {
        let number =
            |names: &[clap::builder::Str]| ["RATE", "RATE@T", "T", "S", "N", "PCT"].contains(&names[0].as_str());
        if arg.get_value_names().is_some_and(number) { arg.allow_hyphen_values(true) } else { arg }
    };
    Cli::command().mut_subcommands(|command| command.mut_args(numbers))
}

/// An optional rate. A type of its own, because clap gives `Option` a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(pub Option<PageRate>);

pub(crate) fn limit(text: &str) -> Result<Limit, String> {
    parse_limit(text).map(Limit)
}

fn step(text: &str) -> Result<Step, String> {
    let (limit, after) =
        text.split_once('@').ok_or_else(|| format!("`{text}` lacks its time: a step is RATE@T, as in 30MiB/s@2s"))?;
    Ok(Step { limit: parse_limit(limit)?, after: parse_duration(after)? })
}

/// How many vCPUs: text that is no number; [`Run::plan`] knows how many there are without it.
pub(crate) fn vcpus<const MOST: usize>(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("1 to {MOST} vCPUs are possible"))
}

pub(crate) fn ring<const LEAST: u32>(text: &str) -> Result<u32, String> {
    let entries = text.parse().ok().filter(|entries: &u32| entries.is_power_of_two());
    entries
        .filter(|entries| (LEAST..=MAX_RING).contains(entries))
        .ok_or_else(|| format!("a ring has a power of two of entries, {LEAST} to {MAX_RING}"))
}

/// Where to write what does not go to standard output.
pub(crate) fn named() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new()
        .try_map(|path| if path.as_os_str() == "-" { Err("it needs a name; `./-` is one") } else { Ok(path) })
}

fn metrics_to(text: &str) -> Result<MetricsTo, String> {
    let address = text.parse().or_else(|_| text.parse().map(|port: u16| ([127, 0, 0, 1], port).into()));
    match address {
        Ok(address) => Ok(MetricsTo::Address(address)),
        // Not a file that anybody means.
        Err(_)
            if !text.contains('/') && (text.contains(':') || text.chars().all(|c| c == '-' || c.is_ascii_digit())) =>
        {
            Err(format!("`{text}` is no address, as 127.0.0.1:9100 is; as a file it needs a `/`: ./{text}"))
        }
        Err(_) => Ok(MetricsTo::File(text.into())),
    }
}

impl Run {
    /// The run that was asked for.
    ///
    /// # Errors
    /// Options that contradict each other or are out of range; the message names the option and what is allowed.
    pub fn plan(&self) -> Result<Plan, String> {
        if self.qmp.is_some() && self.guest == Some(GuestKind::Sim) {
            return Err("--qmp needs the KVM guest: the simulated one runs in virtual time".to_owned());
        }
        if self.metrics.is_some() && self.guest == Some(GuestKind::Sim) {
            return Err("--metrics needs the KVM guest: the simulated one runs in virtual time".to_owned());
        }
        if self.steal_time && self.guest == Some(GuestKind::Sim) {
            return Err("--steal-time needs the KVM guest: it is not simulated".to_owned());
        }
        let count = self.vcpus.unwrap_or(self.workload.len());
        if !(1..=MAX_VCPUS).contains(&count) {
            return Err(format!("--vcpus {count}: 1 to {MAX_VCPUS} vCPUs are possible"));
        }
        let workloads = per_vcpu("--workload", &self.workload, count)?;
        let limits = per_vcpu("--limit", &self.limit, count)?;
        let (us, ms, s) = (Duration::from_micros, Duration::from_millis, Duration::from_secs);
        within("--max-pause", self.max_pause, us(100), s(1))?;
        within("--pass", self.pass, ms(10), s(60))?;
        within("--free-seconds", self.free_seconds, s(0), s(3600))?;
        within("--seconds", self.seconds, ms(200), s(3600))?;
        let mut last = Duration::ZERO;
        for step in &self.steps {
            if step.after <= last || step.after >= self.seconds {
                return Err(format!(
                    "--steps: a step at {} must come after {} and before the end at {} (--seconds)",
                    Time(step.after),
                    Time(last),
                    Time(self.seconds)
                ));
            }
            last = step.after;
        }
        Ok(Plan {
            vcpus: workloads
                .into_iter()
                .zip(limits)
                .map(|(workload, limit)| VcpuPlan { workload: workload.maskable(), limit: limit.0 })
                .collect(),
            vm_limit: self.vm_limit.0,
            policy: self.policy,
            ring: self.ring,
            max_pause: self.max_pause,
            pass: self.pass,
            free: self.free_seconds,
            limited: self.seconds,
            steps: self.steps.clone(),
            payload: self.payload.clone(),
            qmp: self.qmp.clone(),
            metrics: self.metrics.clone(),
            kick: self.kick,
            steal_time: self.steal_time,
        })
    }
}

/// A warning for each option whose rate is a plain number: it counts pages, and most people mean MiB.
pub fn plain_rates(matches: &ArgMatches) -> Vec<String> {
    let Some((_, matches)) = matches.subcommand() else { return Vec::new() };
    let warning = |option: &str| {
        let given = matches.try_get_raw(option).ok()??.filter_map(OsStr::to_str);
        // A step has its time behind its rate.
        let plain = given.map(|text| text.split('@').next().unwrap_or(text)).find(|rate| is_plain_rate(rate))?;
        let (option, rate) = (option.replace('_', "-"), parse_rate(plain).ok()?);
        Some(format!("--{option} {plain}: that is pages per second, {}; {plain}MiB/s is another rate.", Rate(rate)))
    };
    ["limit", "vm_limit", "steps", "bandwidth"].into_iter().filter_map(warning).collect()
}

/// `values` as one per vCPU: as many as there are vCPUs, or one for all.
pub(crate) fn per_vcpu<T: Copy>(option: &str, values: &[T], vcpus: usize) -> Result<Vec<T>, String> {
    match values {
        [one] => Ok(vec![*one; vcpus]),
        _ if values.len() == vcpus => Ok(values.to_vec()),
        _ => Err(format!(
            "{option} is given {} times for {vcpus} vCPU{}: give it once for all, or once per vCPU (--vcpus N)",
            values.len(),
            if vcpus == 1 { "" } else { "s" },
        )),
    }
}

pub(crate) fn within(option: &str, value: Duration, least: Duration, most: Duration) -> Result<(), String> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        let [value, least, most] = [value, least, most].map(Time);
        Err(format!("{option} {value}: {least} to {most} is allowed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::FromArgMatches;

    fn plan(line: &str) -> Result<Plan, String> {
        let line = ["dirtylimit-bench", "run"].into_iter().chain(line.split_whitespace());
        let matches = command().try_get_matches_from(line).map_err(|error| error.to_string())?;
        match Cli::from_arg_matches(&matches).unwrap().command {
            Command::Run(run) => run.plan(),
            _ => unreachable!("`run` was given"),
        }
    }

    #[test]
    fn clap_finds_no_fault_with_the_definition() {
        command().debug_assert();
    }

    #[test]
    fn the_defaults_are_those_of_the_manual() {
        let plan = plan("").unwrap();
        assert_eq!(plan.vcpus.len(), 1);
        assert_eq!(plan.vcpus[0].workload, Workload::Write(224 << 20));
        assert_eq!(plan.vcpus[0].limit, Some(PageRate::from_pages_per_sec(25_600)));
        assert_eq!((plan.vm_limit, plan.policy, plan.ring), (None, PolicyKind::Paced, 4096));
        assert_eq!((plan.max_pause, plan.pass), (Duration::from_millis(10), Duration::from_secs(1)));
        assert_eq!((plan.free, plan.limited), (Duration::from_secs(1), Duration::from_secs(8)));
        assert!(plan.steps.is_empty() && plan.payload.is_none());
    }

    #[test]
    fn workloads_and_limits_are_given_once_or_per_vcpu() {
        let two = plan("--workload write:4MiB --workload read:8MiB --limit none --limit 256").unwrap();
        assert_eq!(two.vcpus[1].workload, Workload::Read(8 << 20));
        assert_eq!(two.vcpus[0].limit, None);
        assert_eq!(two.vcpus[1].limit, Some(PageRate::from_pages_per_sec(256)));
        assert_eq!(plan("--workload idle,idle --limit 1MiB/s").unwrap().vcpus.len(), 2);
        assert_eq!(plan("--workload random:3").unwrap().vcpus[0].workload, Workload::Random(2 * 4096));
        assert_eq!(plan("--vcpus 1024").unwrap().vcpus.len(), 1024);
        let three = plan("--vcpus 3 --limit 1,2,3").unwrap();
        assert_eq!(three.vcpus[2].limit, Some(PageRate::from_pages_per_sec(3)));
        let steps = plan("--steps 30MiB/s@2s,none@5s").unwrap().steps;
        assert_eq!(steps[1], Step { after: Duration::from_secs(5), limit: None });
    }

    #[test]
    fn metrics_go_to_an_address_or_to_a_file() {
        let to = |text: &str| plan(&format!("--metrics {text}")).unwrap().metrics.unwrap();
        assert_eq!(to("127.0.0.1:9100"), MetricsTo::Address(([127, 0, 0, 1], 9100).into()));
        assert!(matches!(to("[::1]:0"), MetricsTo::Address(address) if address.port() == 0));
        assert_eq!(to("./a:b.prom"), MetricsTo::File("./a:b.prom".into()));
        assert_eq!(to("9477"), MetricsTo::Address(([127, 0, 0, 1], 9477).into()));
        assert_eq!((to("./9477"), to("vm")), (MetricsTo::File("./9477".into()), MetricsTo::File("vm".into())));
    }

    #[test]
    fn a_rate_in_pages_is_pointed_out() {
        let warned = |line: &str| {
            let line = ["dirtylimit-bench"].into_iter().chain(line.split_whitespace());
            plain_rates(&Cli::command().try_get_matches_from(line).unwrap())
        };
        let one = warned("run --limit 1MiB/s,256,9");
        assert_eq!(one, ["--limit 256: that is pages per second, 1 MiB/s; 256MiB/s is another rate."]);
        assert_eq!(warned("run --limit 256 --vm-limit 7 --steps none@1s,9@2s").len(), 3);
        assert_eq!(warned("compare --limit 25600").len(), 1);
        for silent in ["run", "run --limit none,1Gbit/s --steps 1MiB/s@1s --vcpus 2", "probe", "scenario exact"] {
            assert!(warned(silent).is_empty(), "{silent}");
        }
    }

    #[test]
    fn bad_usage_names_the_option_and_what_is_allowed() {
        for (line, told) in [
            ("--vcpus 0", "1 to 1024"),
            ("--vcpus 1025", "1 to 1024"),
            ("--limit 1 --limit 2", "given 2 times for 1 vCPU:"),
            ("--vcpus 3 --workload idle,idle", "--workload is given 2 times for 3 vCPUs"),
            ("--ring 0", "power of two"),
            ("--ring 3000", "power of two"),
            ("--ring 128", "256 to 65536"),
            ("--ring 131072", "256 to 65536"),
            ("--max-pause 0ms", "100us to 1s"),
            ("--max-pause 2s", "100us to 1s"),
            ("--pass 1ms", "10ms to 60s"),
            ("--seconds 0", "200ms to 3600s"),
            ("--free-seconds 3601", "0s to 3600s"),
            ("--steps 1@0s", "after 0s"),
            ("--steps 1@8s", "before the end at 8s"),
            ("--steps 1@3s,2@2s", "after 3s"),
            ("--steps 1MiB/s", "lacks its time"),
            ("--steps 1XiB/s@1s", "KiB/s, MiB/s, GiB/s"),
            ("--limit 1e400MiB/s", "unknown unit"),
            ("--limit 0", "`none`"),
            ("--limit -1", "a rate is pages per second"),
            ("--vm-limit -1MiB/s,2", "a rate is pages per second"),
            ("--steps -1@1s", "a rate is pages per second"),
            ("--vcpus 1,a", "1 to 1024 vCPUs are possible"),
            ("--vcpus -1", "1 to 1024 vCPUs are possible"),
            ("--ring 4k", "256 to 65536"),
            ("--max-pause -1ms", "a number with `us`, `ms` or `s`"),
            ("--max-pause 0ns", "a number with `us`, `ms` or `s`"),
            ("--fail-over -1", "a number of percent"),
            ("--report -", "it needs a name"),
            ("--svg -", "it needs a name"),
            ("--metrics -", "as a file it needs a `/`"),
            ("--metrics 94777", "as a file it needs a `/`"),
            ("--workload wirte:1MiB", "write:SIZE"),
            ("--guest sim --qmp x", "--qmp needs the KVM guest"),
            ("--guest sim --metrics x", "--metrics needs the KVM guest"),
            ("--guest sim --steal-time", "--steal-time needs the KVM guest"),
            ("--metrics localhost:9100", "127.0.0.1:9100 is"),
            ("--guest xen", "[possible values: kvm, sim]"),
            ("--policy fast", "[possible values: paced, stepped]"),
        ] {
            let error = plan(line).unwrap_err();
            assert!(error.contains(told), "{line}: {error}");
        }
    }
}
