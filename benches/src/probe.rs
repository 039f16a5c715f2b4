//! What this host's KVM offers, each with a verdict in plain words.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, KVM_CAP_IMMEDIATE_EXIT,
    kvm_dirty_gfn,
};
use kvm_ioctls::Kvm;
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

use crate::guest::kvm::raw_ring::{self, RawRing};
use crate::guest::kvm::{self, Exit, Load, Machine, affinity};
use crate::record::Host;
use crate::units::PAGE_SIZE;
use dirtylimit_test_vm::payload::{self, Mode};

/// Entries of the ring that the probe's guest fills; the size that a run has by default.
const RING: u32 = 4096;
/// Entries that KVM keeps free in every ring, and as many again for a CPU that logs pages itself (PML).
const RESERVED: u32 = 64;
const PML: u32 = 512;
/// The guest's memory: four rings of pages, so that the ring fills before a page is written twice.
const MEMORY: u64 = 4 * RING as u64 * PAGE_SIZE as u64;
/// A guest that has not filled its ring by then does not run as it should.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the guest's speed is measured.
const MEASURED: Duration = Duration::from_millis(300);

/// How a finding bears on a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Works, with a drawback.
    Fair,
    /// Runs with a KVM guest are not possible.
    Bad,
    /// Only for information.
    Note,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// What was found.
    pub value: String,
    /// Whether that is good.
    pub verdict: Verdict,
    /// What it means, in plain words.
    pub meaning: String,
}

/// All that was found; its [`Display`](fmt::Display) is what `probe` prints.
#[derive(Clone, Debug)]
pub struct Report {
    /// In the order in which they were looked at.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether a KVM guest can run here under a limit.
    pub fn usable(&self) -> bool {
        self.findings.iter().all(|finding| finding.verdict != Verdict::Bad)
    }

    fn add(&mut self, name: &'static str, value: impl fmt::Display, verdict: Verdict, meaning: impl Into<String>) {
        self.findings.push(Finding { name, value: value.to_string(), verdict, meaning: meaning.into() });
    }
}

/// `usable`, and the findings.
impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut document = serializer.serialize_struct("Report", 2)?;
        document.serialize_field("usable", &self.usable())?;
        document.serialize_field("findings", &self.findings)?;
        document.end()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: fn(&Finding) -> usize| self.findings.iter().map(column).max().unwrap_or(0);
        let (names, values) = (width(|finding| finding.name.len()), width(|finding| finding.value.len()));
        for Finding { name, value, verdict, meaning } in &self.findings {
            let verdict = match verdict {
                Verdict::Good => "good",
                Verdict::Fair => "fair",
                Verdict::Bad => "BAD ",
                Verdict::Note => "    ",
            };
            writeln!(f, "{}", format!("{verdict}  {name:names$}  {value:values$}  {meaning}").trim_end())?;
        }
        writeln!(f)?;
        if self.usable() {
            write!(f, "KVM guests run here: dirtylimit-bench run --guest kvm")
        } else {
            write!(f, "No KVM guest can be limited here; the simulated one can: dirtylimit-bench run --guest sim")
        }
    }
}

/// The machine, for a run's record; `kvm` says whether to list capabilities.
pub fn host(kvm: bool, soft_limit: Option<u32>) -> Host {
    let capabilities = match kvm.then(kvm::open) {
        Some(Ok(kvm)) => capabilities(&kvm),
        _ => BTreeMap::new(),
    };
    Host { kernel: kernel(), cpu: cpu_model(), cpus: cpus(), capabilities, soft_limit, sleep_late_p999_ms: None }
}

/// Looks at this host; it takes about half a second, and never fails: what is amiss is among the findings.
pub fn probe() -> Report {
    let mut report = Report { findings: Vec::new() };
    report.add("kernel", kernel(), Verdict::Note, "");
    report.add("CPU", cpu_model(), Verdict::Note, "");
    match cpus() {
        1 => report.add("CPUs", 1, Verdict::Fair, "the guest and whoever limits it share it: expect noise"),
        many => report.add("CPUs", many, Verdict::Good, "that this process may use"),
    }
    match kvm::open() {
        Ok(kvm) => look_at_kvm(&kvm, &mut report),
        Err(error) => report.add("/dev/kvm", "no", Verdict::Bad, format!("{error:#}")),
    }
    report
}

fn look_at_kvm(kvm: &Kvm, report: &mut Report) {
    report.add("/dev/kvm", format!("API {}", kvm.get_api_version()), Verdict::Good, "opens");
    report.add(
        "vCPUs",
        kvm.get_max_vcpus(),
        Verdict::Note,
        format!("the most in one VM; {} advised", kvm.get_nr_vcpus()),
    );
    let answer = |capability: u32| kvm.check_extension_raw(u64::from(capability));
    if answer(KVM_CAP_IMMEDIATE_EXIT) > 0 {
        report.add("immediate exit", "yes", Verdict::Good, "a kick just before KVM_RUN is not lost");
    } else {
        report.add("immediate exit", "no", Verdict::Bad, "a vCPU cannot be stopped for certain: needs Linux 4.12");
    }
    let (acq_rel, plain) = (answer(KVM_CAP_DIRTY_LOG_RING_ACQ_REL), answer(KVM_CAP_DIRTY_LOG_RING));
    let entries = |bytes: i32| bytes / i32::try_from(size_of::<kvm_dirty_gfn>()).unwrap_or(i32::MAX);
    match (acq_rel, plain) {
        (1.., _) => {
            let value = format!("{} entries", entries(acq_rel));
            report.add(
                "dirty ring",
                value,
                Verdict::Good,
                "capability 223, with acquire and release; the most entries",
            );
        }
        (_, 1..) => {
            let value = format!("{} entries", entries(plain));
            report.add(
                "dirty ring",
                value,
                Verdict::Good,
                "capability 192, for strongly ordered CPUs; the most entries",
            );
        }
        _ => {
            let meaning = "neither capability 223 nor 192: needs Linux 5.11 on x86, 6.2 on Arm";
            report.add("dirty ring", "no", Verdict::Bad, meaning);
            return;
        }
    }
    if answer(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) > 0 {
        report.add(
            "backup bitmap",
            "yes",
            Verdict::Good,
            "capability 225: pages dirtied outside a vCPU go to a bitmap",
        );
    } else {
        report.add("backup bitmap", "no", Verdict::Note, "capability 225: only Arm needs it");
    }
    match run_guest() {
        Ok(seen) => report_guest(&seen, report),
        Err(error) => report.add(dirtylimit_test_vm::LEVEL, "no", Verdict::Bad, format!("{error:#}")),
    }
}

fn report_guest(seen: &Seen, report: &mut Report) {
    let mib = seen.accesses as f64 * f64::from(PAGE_SIZE) / seen.time.as_secs_f64() / f64::from(1 << 20);
    report.add(
        dirtylimit_test_vm::LEVEL,
        format!("{mib:.0} MiB/s"),
        Verdict::Good,
        "of page touches by one writer, tracked, unlimited",
    );
    let reserved = RING - seen.soft_limit;
    let (verdict, meaning) = match reserved {
        RESERVED => (Verdict::Good, "64 kept back: no PML, so a full exit comes exactly at the page wanted".to_owned()),
        _ if reserved == RESERVED + PML => {
            (Verdict::Fair, "64 + 512 kept back: Intel PML, so a full exit is exact to 512 pages".to_owned())
        }
        _ => {
            (Verdict::Fair, format!("{reserved} kept back: neither 64 nor 576, so exits may be off by the difference"))
        }
    };
    report.add("soft limit", format!("{} of {RING}", seen.soft_limit), verdict, meaning);
}

/// What a small guest showed.
#[derive(Debug)]
struct Seen {
    /// Entries in the ring at the first full exit.
    soft_limit: u32,
    accesses: u64,
    time: Duration,
}

/// Runs a writer until its ring is full, then for a while with its ring served; on a thread that a kick gets back.
fn run_guest() -> Result<Seen> {
    let machine = Machine::new(&[Load::new(Mode::Write, MEMORY)], payload::image())?;
    raw_ring::enable(machine.vm(), RING)?;
    machine.plug_memory(true)?;
    machine.memory().populate(0..machine.memory().bytes());
    let mut cpu = machine.vcpu(0)?;
    let mut ring = RawRing::map(cpu.fd(), RING)?;
    let kicker = cpu.kicker();
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            cpu.bind_to_this_thread();
            if cpu.run()? != Exit::RingFull {
                bail!("it ran for {PATIENCE:?} and did not fill its ring: {} accesses", machine.stats(0).accesses());
            }
            let soft_limit = u32::try_from(ring.dirty())?;
            let (start, before) = (Instant::now(), machine.stats(0).accesses());
            while start.elapsed() < MEASURED {
                ring.collect(|_, _| {});
                raw_ring::reset(machine.vm()).context("cannot reset the dirty ring")?;
                if cpu.run()? != Exit::RingFull {
                    break;
                }
            }
            Ok(Seen { soft_limit, accesses: machine.stats(0).accesses() - before, time: start.elapsed() })
        });
        let deadline = Instant::now() + PATIENCE;
        while !guest.is_finished() {
            std::thread::sleep(Duration::from_millis(5));
            if Instant::now() > deadline {
                kicker.kick();
            }
        }
        guest.join().map_err(|_| anyhow::anyhow!("the vCPU's thread panicked"))?
    })
}

fn capabilities(kvm: &Kvm) -> BTreeMap<String, i64> {
    [
        ("KVM_CAP_DIRTY_LOG_RING", KVM_CAP_DIRTY_LOG_RING),
        ("KVM_CAP_DIRTY_LOG_RING_ACQ_REL", KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
        ("KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP", KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP),
        ("KVM_CAP_IMMEDIATE_EXIT", KVM_CAP_IMMEDIATE_EXIT),
    ]
    .into_iter()
    .map(|(name, capability)| (name.to_owned(), i64::from(kvm.check_extension_raw(u64::from(capability)))))
    .collect()
}

fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name| text.lines().find_map(|line| Some(line.strip_prefix(name)?.split_once(':')?.1.trim()));
    match (field("model name"), field("CPU implementer"), field("CPU part")) {
        (Some(name), ..) => name.to_owned(),
        // Arm has numbers.
        (_, Some(implementer), Some(part)) => format!("implementer {implementer}, part {part}"),
        _ => "unknown".to_owned(),
    }
}

fn cpus() -> usize {
    affinity::allowed_cpus().map_or(1, |cpus| cpus.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_learns_the_soft_limit_of_a_real_ring() {
        if !kvm::kvm_or_skip() {
            return;
        }
        let seen = run_guest().unwrap();
        assert!(seen.soft_limit < RING && seen.soft_limit >= RING - RESERVED - PML, "{seen:?}");
        assert!(seen.accesses > 0);
        let report = probe();
        assert!(report.usable(), "{report}");
        assert!(!host(true, None).capabilities.is_empty());
    }

    #[test]
    fn a_host_without_kvm_is_told_to_simulate() {
        let mut report = Report { findings: Vec::new() };
        report.add("/dev/kvm", "no", Verdict::Bad, "this machine has no usable /dev/kvm");
        let text = report.to_string();
        assert!(!report.usable() && text.contains("BAD") && text.contains("--guest sim"), "{text}");
        assert!(host(false, None).capabilities.is_empty());
    }
}
