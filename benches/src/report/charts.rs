//! The charts that runs are shown by, and what is drawn in them.

use std::time::Duration;

use dirtylimit_core::PageRate;

use super::plot::{Axis, Chart, Look, Series};
use crate::measure::{self, WINDOW};
use crate::record::{Recording, Stalls, VcpuRecording};
use crate::units::mib_per_sec;

/// How many points a line may have: more than there are pixels say nothing.
const POINTS: u32 = 900;
/// Time as all charts of a run show it.
const SINCE: &str = "time since the limit was set (s)";
const RATE: &str = "dirty page rate (MiB/s)";

/// Rates (MiB/s) over the time since the limit was set (s).
pub fn rate_chart(title: impl Into<String>, series: Vec<Series>) -> Chart {
    // Room above the largest limit, so that a deviation shows, even where the free rate is off the scale.
    let limits = series.iter().filter(|series| series.look == Look::Allowed).flat_map(|series| &series.points);
    let limit = limits.map(|&(_, limit)| limit).fold(0.0, f64::max);
    let y = Axis::linear(RATE);
    let y = if limit > 0.0 { y.over(0.0..2.0 * limit) } else { y };
    Chart { title: title.into(), x: Axis::linear(SINCE), y, right: None, series }
}

/// How often the guest stood still for longer than so long: [`survival`] of some guests, and the pause asked for.
pub fn stall_chart(title: impl Into<String>, mut series: Vec<Series>, max_pause: Duration) -> Chart {
    let ends = series.iter().flat_map(|series| &series.points).map(|&(_, rate)| rate).filter(|&rate| rate > 0.0);
    let (least, most) =
        ends.fold((f64::INFINITY, 0.0), |(least, most): (f64, f64), rate| (least.min(rate), most.max(rate)));
    let pause = 1e3 * max_pause.as_secs_f64();
    series.insert(0, Series::new("longest pause asked for", Look::Allowed, vec![(pause, least), (pause, most)]));
    Chart {
        title: title.into(),
        x: Axis::log("length of the stall (ms)"),
        y: Axis::log("longer stalls per second (1/s)"),
        right: None,
        series,
    }
}

/// The net rate of a vCPU (MiB/s), as means over windows of 100 ms, over the time since the limit was set (s).
pub fn net_rate(recording: &Recording, vcpu: &VcpuRecording) -> Vec<(f64, f64)> {
    sampled(recording, vcpu, |samples, from, to| samples.mean_mib_s(from, to))
}

/// The same of its ring entries.
pub fn gross_rate(recording: &Recording, vcpu: &VcpuRecording) -> Vec<(f64, f64)> {
    sampled(recording, vcpu, |samples, from, to| samples.gross_mib_s(from, to))
}

/// The share of the time that it was paused (%), over the same windows.
pub fn paused(recording: &Recording, vcpu: &VcpuRecording) -> Vec<(f64, f64)> {
    sampled(recording, vcpu, |samples, from, to| samples.paused_pct(from, to))
}

/// The limits of a vCPU (MiB/s) in steps; not a number while it has none.
pub fn limits(recording: &Recording, limits: &[(Duration, Option<PageRate>)]) -> Vec<(f64, f64)> {
    let since = |at: Duration| at.as_secs_f64() - recording.limited_at.as_secs_f64();
    let ends = limits.iter().skip(1).map(|&(at, _)| at).chain([recording.end]);
    let steps = limits.iter().zip(ends).flat_map(|(&(from, limit), to)| {
        let limit = limit.map_or(f64::NAN, |limit| mib_per_sec(limit, recording.page_size));
        [(since(from), limit), (since(to), limit)]
    });
    steps.collect()
}

/// `(length in ms, stalls that were longer per second)`, from the guest's own histogram of `seconds`.
pub fn survival(stalls: &Stalls, seconds: f64) -> Vec<(f64, f64)> {
    stalls.at_least().into_iter().map(|(ms, count)| (ms, count as f64 / seconds.max(1e-3))).collect()
}

/// Points at as many instants as can be seen.
fn sampled(
    recording: &Recording,
    vcpu: &VcpuRecording,
    value: impl Fn(&measure::Series<'_>, Duration, Duration) -> Option<f64>,
) -> Vec<(f64, f64)> {
    let samples = measure::Series::of(recording, vcpu);
    let end = vcpu.samples.last().map_or(recording.end, |last| last.at.max(recording.end));
    let step = (end / POINTS).max(Duration::from_millis(10));
    let instants = std::iter::successors(Some(Duration::ZERO), |&at| Some(at + step)).take_while(|&at| at <= end);
    let point = |at: Duration| {
        // The first window is that of the second instant: one of no length has no mean.
        let value = value(&samples, at.saturating_sub(WINDOW), at.max(step))?;
        Some((at.as_secs_f64() - recording.limited_at.as_secs_f64(), value))
    };
    instants.filter_map(point).collect()
}
