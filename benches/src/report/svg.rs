//! The rate against the limit over time, one panel per vCPU, with the share of the time that it was paused behind it.

use std::fmt::Write as _;

use anyhow::Result;
use plotters::prelude::*;

use super::charts;
use super::ink::{self, PAPER};
use super::plot::{self, Area, Axis, Chart, Look, Series, font, plain, px};
use crate::measure::Measures;
use crate::record::{Recording, VcpuRecording};
use crate::units::significant;

/// Beyond these the panels would be too many to look at.
const MAX_PANELS: usize = 16;
const WIDTH: u32 = 960;
const HEADER: u32 = 64;
const PANEL: u32 = 290;
const CAPTION: u32 = 28;

/// The drawing of a recording.
///
/// # Errors
/// None that a recording could cause; what the drawing library reports is passed on.
pub fn draw(recording: &Recording) -> Result<String> {
    let shown = &recording.vcpus[..recording.vcpus.len().min(MAX_PANELS)];
    let height = HEADER + PANEL * u32::try_from(shown.len())?;
    let hidden = recording.vcpus.len() - shown.len();
    let hidden = if hidden == 0 { String::new() } else { format!(", {hidden} more vCPUs not drawn") };
    let title = format!("Dirty page rate against its limit{hidden}");
    let charts: Vec<_> = shown.iter().map(|vcpu| chart(recording, vcpu)).collect();
    let svg = plot::svg((WIDTH, height), &title, |area| {
        area.fill(&PAPER.light).map_err(plain)?;
        let (header, panels) = area.split_vertically(px(HEADER));
        header.draw_text(&title, &font(17), at(16, 10)).map_err(plain)?;
        if let Some(chart) = charts.first() {
            legend(&header, 41, chart)?;
        }
        for (chart, panel) in charts.iter().zip(panels.split_evenly((charts.len().max(1), 1))) {
            panel.draw_text(&chart.title, &font(13), at(16, 8)).map_err(plain)?;
            chart.draw(&panel.margin(px(CAPTION), 0, 0, 0))?;
        }
        Ok(())
    })?;
    Ok(themed(&svg))
}

/// A drawing in the colours that the viewer prefers, where it knows of such preferences.
pub(crate) fn themed(svg: &str) -> String {
    let (head, body) = svg.split_once('\n').unwrap_or((svg, ""));
    format!("{head}\n<style>{}</style>\n{body}", ink::style())
}

#[expect(clippy::cast_possible_wrap, reason = "places in a drawing")]
pub(crate) fn at(x: u32, y: u32) -> (i32, i32) {
    (px(x) as i32, px(y) as i32)
}

/// What the lines are, side by side, with their names at height `y`.
pub(crate) fn legend(area: &Area<'_>, y: u32, chart: &Chart) -> Result<()> {
    let mut x = 16;
    for series in &chart.series {
        let swatch = Rectangle::new([at(x, y + 2), at(x + 18, y + 10)], series.look.ink().light.filled());
        area.draw(&swatch).map_err(plain)?;
        area.draw_text(&series.name, &font(12), at(x + 24, y)).map_err(plain)?;
        x += 56 + 7 * u32::try_from(series.name.len())?;
    }
    Ok(())
}

/// A vCPU's rate and limit, and the share of the time that it was paused behind them.
fn chart(recording: &Recording, vcpu: &VcpuRecording) -> Chart {
    let series = vec![
        Series::new("share of time paused", Look::Area, charts::paused(recording, vcpu)),
        Series::new("limit", Look::Allowed, charts::limits(recording, &vcpu.limits)),
        Series::new("gross rate", Look::Thin(3), charts::gross_rate(recording, vcpu)),
        Series::new("net rate (100 ms mean)", Look::Line(0), charts::net_rate(recording, vcpu)),
    ];
    let mut chart = charts::rate_chart(String::new(), series);
    chart.title = caption(recording, vcpu, chart.y.range.as_ref().map_or(f64::INFINITY, |range| range.end));
    chart.right = Some(Axis::linear("time paused (%)").over(0.0..100.0));
    chart
}

fn caption(recording: &Recording, vcpu: &VcpuRecording, top: f64) -> String {
    let measures = Measures::of(recording, vcpu);
    let last = measures.last();
    let mut text = format!("vCPU {}, {}: ", vcpu.index, vcpu.workload);
    let limit =
        last.limit_mib_s.map_or("no limit".to_owned(), |limit| format!("limit {} MiB/s", significant(limit, 4)));
    text += &limit;
    if let Some(settled) = last.settled_mib_s {
        let what = if last.settled_ms().is_some() { "settled at" } else { "mean" };
        let _ = write!(text, ", {what} {settled:.1} MiB/s");
    }
    if let Some((free, gross)) = measures.free_mib_s.zip(measures.free_gross_mib_s) {
        let off = if free.max(gross) > top { ", off the scale" } else { "" };
        let _ = write!(text, ", free {free:.0} MiB/s (gross {gross:.0}{off})");
    }
    if let Some(stall) = measures.stall_max_ms {
        let _ = write!(text, ", longest stall {stall:.1} ms");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::report::example;

    #[test]
    fn every_vcpu_has_a_panel_with_units() {
        let svg = draw(&example::recording()).unwrap();
        assert!(svg.contains("vCPU 0, write:224MiB: limit 100 MiB/s"), "{svg}");
        assert!(svg.contains("vCPU 1, read:32MiB"), "{svg}");
        for label in ["dirty page rate (MiB/s)", "time since the limit was set (s)", "time paused (%)"] {
            assert_eq!(svg.matches(label).count(), 2, "{label}");
        }
    }

    #[test]
    fn every_colour_follows_the_viewers_preference() {
        let svg = draw(&example::stepped()).unwrap();
        let (style, body) = svg.split_once("</style>").unwrap();
        for attribute in ["fill=\"#", "stroke=\"#"] {
            for colour in body.split(attribute).skip(1).map(|rest| &rest[..6]) {
                assert!(
                    style.contains(&format!("[{attribute}{colour}\"]{{")),
                    "{attribute}{colour} is the same on dark pages"
                );
            }
        }
    }

    #[test]
    fn a_recording_without_samples_is_drawn_all_the_same() {
        let mut recording = example::recording();
        recording.vcpus[0].samples.clear();
        recording.vcpus[1].limits.clear();
        recording.limited_at = Duration::ZERO;
        recording.end = Duration::ZERO;
        assert!(draw(&recording).unwrap().contains("vCPU 0"));
        recording.vcpus.clear();
        assert!(draw(&recording).unwrap().starts_with("<svg"));
        let many = (0..1024).map(|_| example::stepped().vcpus.remove(0)).collect();
        let many = draw(&Recording { vcpus: many, ..example::recording() }).unwrap();
        assert!(many.contains("1008 more vCPUs not drawn"));
    }
}
