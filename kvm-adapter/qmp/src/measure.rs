//! `calc-dirty-rate` and `query-dirty-rate`: how many pages each vCPU dirtied between two looks at the rings.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dirtylimit_kvm::DirtyLimit;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Monitor;
use crate::arguments::{Arguments, missing};
use crate::error::Error;

/// QEMU's bounds of a measurement, in ms, and of its sampling, which is not done here.
const CALC_TIME: std::ops::RangeInclusive<i64> = 50..=60_000;
const SAMPLE_PAGES: std::ops::RangeInclusive<i64> = 128..=16_384;
/// What QEMU says while it does not sample.
const DEFAULT_SAMPLE_PAGES: u64 = 512;

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    PageSampling,
    DirtyRing,
    DirtyBitmap,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, Debug)]
#[serde(rename_all = "lowercase")]
enum TimeUnit {
    #[default]
    Second,
    Millisecond,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "lowercase")]
enum Status {
    Unstarted,
    Measuring,
    Measured,
}

/// QEMU's `DirtyRateInfo`.
#[derive(Serialize, Debug)]
#[serde(rename_all = "kebab-case")]
struct DirtyRateInfo<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    dirty_rate: Option<u64>,
    status: Status,
    start_time: u64,
    calc_time: u64,
    calc_time_unit: TimeUnit,
    sample_pages: u64,
    mode: Mode,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu_dirty_rate: Option<&'a [VcpuRate]>,
}

/// QEMU's `DirtyRateVcpu`, in MiB/s.
#[derive(Serialize, Debug)]
#[serde(rename_all = "kebab-case")]
struct VcpuRate {
    id: u32,
    dirty_rate: u64,
}

/// The last measurement.
#[derive(Debug)]
pub(crate) struct Measurement {
    status: Status,
    /// Seconds since 1970.
    start_time: u64,
    began: Instant,
    /// As asked for; once measured, as it was.
    calc_time: Duration,
    /// Each vCPU's net pages when it began.
    before: BTreeMap<u32, u64>,
    rates: Vec<VcpuRate>,
}

impl Measurement {
    pub(crate) fn unstarted() -> Self {
        Self {
            status: Status::Unstarted,
            start_time: 0,
            began: Instant::now(),
            calc_time: Duration::ZERO,
            before: BTreeMap::new(),
            rates: Vec::new(),
        }
    }
}

impl Monitor {
    /// Ends a measurement whose time is over; returns when to call again for the one that goes on.
    pub fn advance(&mut self, now: Instant) -> Option<Instant> {
        if self.measurement.status != Status::Measuring {
            return None;
        }
        let due = self.measurement.began + self.measurement.calc_time;
        if now < due {
            return Some(due);
        }
        let Ok(limit) = self.limit() else {
            self.measurement = Measurement::unstarted();
            return None;
        };
        let (after, page_size) = (net_pages(&limit), limit.page_size());
        let Measurement { status, began, calc_time, before, rates, .. } = &mut self.measurement;
        (*status, *calc_time) = (Status::Measured, now - *began);
        let ms = calc_time.as_millis().max(1);
        // A vCPU that came meanwhile began with none.
        *rates = after
            .into_iter()
            .map(|(id, pages)| {
                let pages = pages.saturating_sub(before.get(&id).copied().unwrap_or(0));
                let mib = u128::from(pages) * u128::from(page_size) * 1000 / (ms << 20);
                VcpuRate { id, dirty_rate: u64::try_from(mib).unwrap_or(u64::MAX) }
            })
            .collect();
        None
    }
}

/// Each vCPU's up to now.
fn net_pages(limit: &DirtyLimit) -> BTreeMap<u32, u64> {
    limit.meter();
    limit.snapshot().vcpus.into_iter().map(|(id, status)| (id, status.totals.net_pages)).collect()
}

pub(crate) fn calc(monitor: &mut Monitor, now: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let time = arguments.integer("calc-time")?.ok_or_else(missing("calc-time"))?;
    let unit: TimeUnit = arguments.choice("calc-time-unit")?.unwrap_or_default();
    let sample_pages = arguments.integer("sample-pages")?;
    let mode = arguments.choice("mode")?.unwrap_or(Mode::PageSampling);
    arguments.end()?;
    monitor.advance(now);
    if monitor.measurement.status == Status::Measuring {
        return Err(Error::generic("the dirty rate is already being measured."));
    }
    let ms = time.saturating_mul(if unit == TimeUnit::Second { 1000 } else { 1 });
    let calc_time = u64::try_from(ms).ok().filter(|_| CALC_TIME.contains(&ms)).map(Duration::from_millis);
    let (least, most) = CALC_TIME.into_inner();
    let calc_time =
        calc_time.ok_or_else(|| Error::generic(format!("Calculation time is out of range [{least}ms, {most}ms].")))?;
    match sample_pages {
        Some(_) if mode != Mode::PageSampling => {
            return Err(Error::generic("sample-pages is used only in page-sampling mode"));
        }
        Some(pages) if !SAMPLE_PAGES.contains(&pages) => {
            let (least, most) = SAMPLE_PAGES.into_inner();
            return Err(Error::generic(format!("sample-pages is out of range[{least}, {most}].")));
        }
        _ => {}
    }
    if mode != Mode::DirtyRing {
        let mode = json!(mode);
        let mode = mode.as_str().unwrap_or_default();
        return Err(Error::generic(format!("mode {mode} is not enabled, use other method instead.")));
    }
    monitor.measurement = Measurement {
        status: Status::Measuring,
        start_time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        began: now,
        calc_time,
        before: net_pages(&monitor.limit()?),
        rates: Vec::new(),
    };
    Ok(json!({}))
}

pub(crate) fn query(monitor: &mut Monitor, now: Instant, arguments: &mut Arguments) -> Result<Value, Error> {
    let calc_time_unit = arguments.choice("calc-time-unit")?.unwrap_or_default();
    arguments.end()?;
    monitor.advance(now);
    let Measurement { status, start_time, calc_time, rates, .. } = &monitor.measurement;
    let measured = *status == Status::Measured;
    let ms = u64::try_from(calc_time.as_millis()).unwrap_or(u64::MAX);
    Ok(json!(DirtyRateInfo {
        dirty_rate: measured.then(|| rates.iter().fold(0u64, |sum, rate| sum.saturating_add(rate.dirty_rate))),
        status: *status,
        start_time: *start_time,
        calc_time: if calc_time_unit == TimeUnit::Second { ms / 1000 } else { ms },
        calc_time_unit,
        sample_pages: if *status == Status::Measuring { DEFAULT_SAMPLE_PAGES } else { 0 },
        mode: Mode::DirtyRing,
        vcpu_dirty_rate: measured.then_some(rates),
    }))
}
