//! What is told: one row a family.

use std::fmt;
use std::time::Duration;

use dirtylimit_kvm::{PageRate, Snapshot, Status};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::Metrics;

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}
use Kind::{Counter, Gauge};

/// How to get a value, and what it is; Prometheus is told in base units.
enum Value<T> {
    /// Of anything.
    Count(fn(&T) -> u64),
    Pages(fn(&T) -> u64),
    Time(fn(&T) -> Duration),
    /// Absent where there is none.
    Rate(fn(&T) -> Option<PageRate>),
}
use Value::{Count, Pages, Rate, Time};

/// A family of metrics: its name without prefix and unit, its kind, what HELP says, and its value.
struct Family<T>(&'static str, Kind, &'static str, Value<T>);

const VM: &[Family<Snapshot>] = &[
    Family("vcpus", Gauge, "vCPUs that the limiter knows", Count(|vm| vm.vcpus.len() as u64)),
    Family("vm_limit", Gauge, "Budget of the whole VM; absent without one", Rate(|vm| vm.vm_limit)),
    Family("max_pause", Gauge, "The longest single pause of a vCPU", Time(|vm| vm.max_pause)),
    Family("leased", Gauge, "1 while ticks come; 0 where limits lapsed for want of them", Count(|vm| vm.leased.into())),
    Family("resets", Counter, "KVM_RESET_DIRTY_RINGS calls", Count(|vm| vm.stats.reset_calls)),
    Family("reset_entries", Counter, "Ring entries given back by resets", Count(|vm| vm.stats.resets)),
    Family("suspect_resets", Counter, "Resets that were short or disturbed", Count(|vm| vm.stats.suspect_resets)),
    Family("suspect", Gauge, "Pages dirty in every take since such a reset", Pages(|vm| vm.stats.suspect_pages)),
    Family("failed_resets", Counter, "Resets that failed: collected pages wait", Count(|vm| vm.stats.failed_resets)),
    Family("wedged", Counter, "Full exits that found a ring wedged", Count(|vm| vm.stats.wedged)),
    Family("held_back", Gauge, "Pages that wait in the rings: dirty, not yet published", Pages(|vm| vm.held_back)),
    Family("dropped_entries", Counter, "Ring entries that named no page of a known slot", Count(|vm| vm.stats.dropped)),
    Family("soft_limit_entries", Gauge, "Occupancy at which a ring is full", Count(|vm| vm.stats.soft_limit.into())),
];

const VCPU: &[Family<Status>] = &[
    Family(
        "vcpu_net_dirtied",
        Counter,
        "Pages newly dirty since their last publish",
        Pages(|vcpu| vcpu.totals.net_pages),
    ),
    Family("vcpu_gross_dirtied", Counter, "Pages logged, dirty or not", Pages(|vcpu| vcpu.totals.gross_pages)),
    Family("vcpu_full_exits", Counter, "Exits with a full ring: used-up slices", Count(|vcpu| vcpu.totals.full_exits)),
    Family(
        "vcpu_paused",
        Counter,
        "Time paused for its limit",
        Time(|vcpu| Duration::from_micros(vcpu.totals.paused_us)),
    ),
    Family("vcpu_rate", Gauge, "Net dirty page rate, smoothed over 100 ms", Rate(|vcpu| Some(vcpu.rate))),
    Family("vcpu_demand", Gauge, "The rate it would have without pauses", Rate(|vcpu| Some(vcpu.demand))),
    Family("vcpu_limit", Gauge, "The limit set for it; absent without one", Rate(|vcpu| vcpu.limit)),
    Family(
        "vcpu_effective_limit",
        Gauge,
        "That, or its share of the budget if less",
        Rate(|vcpu| vcpu.effective_limit),
    ),
    Family(
        "vcpu_needed_pause",
        Gauge,
        "The pause that holds its limit, if above max_pause; else 0",
        Time(needed_pause),
    ),
];

fn needed_pause(vcpu: &Status) -> Duration {
    Duration::from_nanos(vcpu.needs_pause.unwrap_or(0))
}

impl<T> Value<T> {
    fn unit(&self) -> Option<Unit> {
        match self {
            Count(_) => None,
            Pages(_) => Some(Unit::Bytes),
            Time(_) => Some(Unit::Seconds),
            Rate(_) => Some(Unit::Other("bytes_per_second".into())),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "every value of Prometheus is a double")]
    fn of(&self, all: &T, page_size: u32) -> Option<f64> {
        Some(match self {
            Count(count) => count(all) as f64,
            Pages(pages) => pages(all) as f64 * f64::from(page_size),
            Time(time) => time(all).as_secs_f64(),
            Rate(rate) => rate(all)?.bytes_per_sec(page_size) as f64,
        })
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(limit) = self.0.upgrade() else { return Ok(()) };
        let (now, page_size) = (limit.snapshot(), limit.page_size());
        for family in VM {
            family.encode(&mut encoder, &[(None, &now)], page_size)?;
        }
        let ids: Vec<String> = now.vcpus.keys().map(u32::to_string).collect();
        let labels = ids.iter().map(|id| Some([("vcpu", id.as_str())]));
        let vcpus: Vec<_> = labels.zip(now.vcpus.values()).collect();
        VCPU.iter().try_for_each(|family| family.encode(&mut encoder, &vcpus, page_size))?;
        let help = "1, with the reason, while its limit is not enforced";
        let name = "dirtylimit_vcpu_unenforced";
        let mut unenforced = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (id, status) in ids.iter().zip(now.vcpus.values()) {
            if let Some(why) = status.unenforced {
                let labels = [("vcpu", id.as_str()), ("reason", why.name())];
                ConstGauge::new(1.0).encode(unenforced.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// Whose sample: the VM's, or a vCPU's.
type Label<'a> = Option<[(&'static str, &'a str); 1]>;

impl<T> Family<T> {
    /// The family with a sample of each of `all` that has a value, by its label; one without a label is the only one.
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>, all: &[(Label<'_>, &T)], page_size: u32) -> fmt::Result {
        let Self(name, kind, help, value) = self;
        let (name, unit) = (format!("dirtylimit_{name}"), value.unit());
        let metric = |value: f64| -> Box<dyn EncodeMetric> {
            match kind {
                Counter => Box::new(ConstCounter::new(value)),
                Gauge => Box::new(ConstGauge::new(value)),
            }
        };
        let mut descriptor = encoder.encode_descriptor(&name, help, unit.as_ref(), metric(0.0).metric_type())?;
        for (labels, of) in all {
            match (value.of(of, page_size).map(metric), labels) {
                (Some(metric), Some(labels)) => metric.encode(descriptor.encode_family(labels)?)?,
                (Some(metric), None) => return metric.encode(descriptor),
                (None, _) => {}
            }
        }
        Ok(())
    }
}
