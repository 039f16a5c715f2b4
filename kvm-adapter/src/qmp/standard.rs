//! QEMU's commands, but for measuring. Rates are whole MiB/s there, which QEMU calls MB/s.

use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};

use super::command::{Arguments, missing};
use super::error::Error;
use super::{Monitor, session};
use crate::PageRate;

/// QEMU's `DirtyLimitInfo`.
#[derive(Serialize, Debug)]
#[serde(rename_all = "kebab-case")]
struct DirtyLimitInfo {
    cpu_index: u32,
    limit_rate: u64,
    current_rate: u64,
}

pub(crate) fn query_version(_: &mut Monitor, _: Instant, _: &mut Arguments) -> Result<Value, Error> {
    Ok(session::version())
}

pub(crate) fn set_limit(monitor: &mut Monitor, _: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let vcpu = monitor.vcpu(arguments)?;
    let rate = arguments.unsigned("dirty-rate")?.ok_or_else(missing("dirty-rate"))?;
    let limit = PageRate::from_bytes_per_sec(rate.saturating_mul(1 << 20), monitor.limit.page_size());
    monitor.set_limit(vcpu?, (rate > 0).then_some(limit))
}

pub(crate) fn cancel_limit(monitor: &mut Monitor, _: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let vcpu = monitor.vcpu(arguments)??;
    monitor.set_limit(vcpu, None)
}

/// Those that have a limit; without any, an empty list.
pub(crate) fn query_limit(monitor: &mut Monitor, _: Instant, _: &mut Arguments) -> Result<Value, Error> {
    let whole = |rate: PageRate| (rate.bytes_per_sec(monitor.limit.page_size()) + (1 << 19)) >> 20;
    let infos = monitor.statuses().filter_map(|(cpu_index, status)| {
        Some(DirtyLimitInfo { cpu_index, limit_rate: whole(status.limit?), current_rate: whole(status.rate) })
    });
    Ok(json!(infos.collect::<Vec<_>>()))
}

pub(crate) fn quit(monitor: &mut Monitor, _: Instant, _: &mut Arguments) -> Result<Value, Error> {
    monitor.quit();
    Ok(json!({}))
}
