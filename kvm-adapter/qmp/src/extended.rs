//! What QEMU has no command for. Rates are MiB/s and may have fractions, pauses are µs.

use std::time::{Duration, Instant};

use dirtylimit_kvm::{PageRate, Shipped, Status, Unenforced};
use serde::Serialize;
use serde_json::{Value, json};

use crate::Monitor;
use crate::arguments::{Arguments, missing};
use crate::error::Error;

/// All of a vCPU's [`Status`].
#[derive(Serialize, Debug)]
#[serde(rename_all = "kebab-case")]
struct VcpuInfo {
    cpu_index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit_rate: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    effective_rate: Option<f64>,
    current_rate: f64,
    demand_rate: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    needs_pause_us: Option<u64>,
    /// Why the limit is not held: for programs, and for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    unenforced: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unenforced_because: Option<String>,
    net_pages: u64,
    gross_pages: u64,
    full_exits: u64,
    paused_us: u64,
}

impl VcpuInfo {
    fn of(cpu_index: u32, status: Status, page_size: u32) -> Self {
        let mib = |rate: PageRate| rate.bytes_per_sec(page_size) as f64 / f64::from(1 << 20);
        let Status { limit, effective_limit, rate, demand, needs_pause, unenforced, totals, .. } = status;
        Self {
            cpu_index,
            limit_rate: limit.map(mib),
            effective_rate: effective_limit.map(mib),
            current_rate: mib(rate),
            demand_rate: mib(demand),
            needs_pause_us: needs_pause.map(|pause| pause / 1000),
            unenforced: unenforced.map(Unenforced::name),
            unenforced_because: unenforced.as_ref().map(Unenforced::to_string),
            net_pages: totals.net_pages,
            gross_pages: totals.gross_pages,
            full_exits: totals.full_exits,
            paused_us: totals.paused_us,
        }
    }
}

/// As `set-vcpu-dirty-limit`, with fractions.
pub(crate) fn set_limit(monitor: &mut Monitor, _: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let vcpu = monitor.vcpu(arguments)?;
    let limit = rate(monitor, arguments)?;
    arguments.end()?;
    monitor.set_limit(vcpu?, limit)
}

pub(crate) fn set_vm_limit(monitor: &mut Monitor, _: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let budget = rate(monitor, arguments)?;
    arguments.end()?;
    monitor.limit()?.set_vm_limit(budget);
    monitor.changed()
}

pub(crate) fn set_weight(monitor: &mut Monitor, _: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let vcpu = monitor.vcpu(arguments)?;
    let weight = arguments.unsigned("weight")?.ok_or_else(missing("weight"))?;
    arguments.end()?;
    let weight = u32::try_from(weight).ok().filter(|weight| *weight > 0);
    let weight = weight.ok_or_else(|| Error::generic("weight is out of range [1, 4294967295]."))?;
    let vcpu = vcpu?.ok_or_else(missing("cpu-index"))?;
    monitor.limit()?.set_weight(vcpu, weight).map_err(Error::generic)?;
    monitor.changed()
}

pub(crate) fn set_policy(monitor: &mut Monitor, _: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let policy = arguments.named("policy", Shipped::named)?.ok_or_else(missing("policy"))?;
    arguments.end()?;
    monitor.limit()?.set_policy(policy);
    monitor.changed()
}

pub(crate) fn set_max_pause(monitor: &mut Monitor, _: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let pause = arguments.unsigned("max-pause-us")?.ok_or_else(missing("max-pause-us"))?;
    arguments.end()?;
    if !(100..=1_000_000).contains(&pause) {
        return Err(Error::generic("max-pause-us is out of range [100, 1000000]."));
    }
    monitor.limit()?.set_max_pause(Duration::from_micros(pause));
    monitor.changed()
}

pub(crate) fn query(monitor: &mut Monitor, _: Instant, _: &mut Arguments) -> Result<Value, Error> {
    let limit = monitor.limit()?;
    let (page_size, now) = (limit.page_size(), limit.snapshot());
    let vcpus: Vec<_> = now.vcpus.iter().map(|(id, status)| VcpuInfo::of(*id, *status, page_size)).collect();
    let stats = now.stats;
    Ok(json!({
        "page-size": page_size,
        "max-pause-us": u64::try_from(now.max_pause.as_micros()).unwrap_or(u64::MAX),
        "resets": stats.resets,
        "reset-calls": stats.reset_calls,
        "suspect-resets": stats.suspect_resets,
        "suspect-pages": stats.suspect_pages,
        "failed-resets": stats.failed_resets,
        "wedged": stats.wedged,
        "dropped": stats.dropped,
        "soft-limit": stats.soft_limit,
        "vcpus": vcpus,
    }))
}

/// The rate that was given; `None` for 0, which is no limit.
fn rate(monitor: &Monitor, arguments: &mut Arguments) -> Result<Option<PageRate>, Error> {
    let mib = arguments.number("dirty-rate")?.ok_or_else(missing("dirty-rate"))?;
    if mib < 0.0 {
        return Err(Error::generic("dirty-rate is out of range: 0 (no limit) and up, in MiB/s"));
    }
    let page_size = monitor.limit()?.page_size();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, as the rate does")]
    let bytes = (mib * f64::from(1 << 20)) as u64;
    Ok((mib > 0.0).then(|| PageRate::from_bytes_per_sec(bytes, page_size)))
}
