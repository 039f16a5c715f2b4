//! QEMU's commands, but for measuring. Rates are whole MiB/s there, which QEMU calls MB/s.

use std::time::Instant;

use dirtylimit_kvm::{PageRate, Unenforced};
use serde::Serialize;
use serde_json::{Value, json};

use crate::Monitor;
use crate::arguments::{Arguments, missing};
use crate::error::Error;

/// QEMU's `DirtyLimitInfo`.
#[derive(Serialize, Debug)]
#[serde(rename_all = "kebab-case")]
struct DirtyLimitInfo {
    cpu_index: u32,
    limit_rate: u64,
    current_rate: u64,
    /// Ours: QEMU's protocol has clients ignore members that they do not know.
    #[serde(skip_serializing_if = "Option::is_none")]
    x_unenforced: Option<&'static str>,
}

pub(crate) fn query_version(_: &mut Monitor, _: Instant, _: &mut Arguments) -> Result<Value, Error> {
    Ok(version())
}

pub(crate) fn set_limit(monitor: &mut Monitor, _: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let vcpu = monitor.vcpu(arguments)?;
    let rate = arguments.unsigned("dirty-rate")?.ok_or_else(missing("dirty-rate"))?;
    arguments.end()?;
    let limit = PageRate::from_bytes_per_sec(rate.saturating_mul(1 << 20), monitor.limit()?.page_size());
    monitor.set_limit(vcpu?, (rate > 0).then_some(limit))
}

pub(crate) fn cancel_limit(monitor: &mut Monitor, _: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let vcpu = monitor.vcpu(arguments)?;
    arguments.end()?;
    monitor.set_limit(vcpu?, None)
}

/// Those that have a limit; without any, an empty list. One below 1 MiB/s, which QEMU does not know, is told as 1: 0 would
/// be none.
pub(crate) fn query_limit(monitor: &mut Monitor, _: Instant, _: &mut Arguments) -> Result<Value, Error> {
    let limit = monitor.limit()?;
    let whole = |rate: PageRate| (rate.bytes_per_sec(limit.page_size()) + (1 << 19)) >> 20;
    let infos = limit.snapshot().vcpus.into_iter().filter_map(|(cpu_index, status)| {
        Some(DirtyLimitInfo {
            cpu_index,
            limit_rate: whole(status.limit?).max(1),
            current_rate: whole(status.rate),
            x_unenforced: status.unenforced.map(Unenforced::name),
        })
    });
    Ok(json!(infos.collect::<Vec<_>>()))
}

pub(crate) fn quit(monitor: &mut Monitor, _: Instant, _: &mut Arguments) -> Result<Value, Error> {
    monitor.quit();
    Ok(json!({}))
}

/// `qemu` is the version whose commands, arguments and messages these are; `package` says who really answers.
pub(crate) fn version() -> Value {
    let package = concat!("dirtylimit ", env!("CARGO_PKG_VERSION"));
    json!({ "qemu": { "major": 10, "minor": 0, "micro": 2 }, "package": package })
}
