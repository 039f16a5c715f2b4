//! The rate against the limit over time, one panel per vCPU, with the share of the time that it was paused behind it.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::measure::{Measures, Series, WINDOW};
use crate::record::{Recording, VcpuRecording};
use crate::units::{mib_per_sec, significant};

/// Beyond these the panels would be too many to look at.
const MAX_PANELS: usize = 16;
const WIDTH: u32 = 960;
const HEADER: u32 = 64;
const PANEL: u32 = 260;
/// How many points a line may have: more than there are pixels say nothing.
const POINTS: u32 = 900;

/// A colour on white, and the one that takes its place where the viewer asks for a dark page.
struct Ink {
    light: RGBColor,
    dark: &'static str,
}

const PAPER: Ink = Ink { light: RGBColor(255, 255, 255), dark: "#0D1117" };
const TEXT: Ink = Ink { light: RGBColor(31, 35, 40), dark: "#E6EDF3" };
const GRID: Ink = Ink { light: RGBColor(216, 222, 228), dark: "#444C56" };
const RATE: Ink = Ink { light: RGBColor(9, 105, 218), dark: "#58A6FF" };
const GROSS: Ink = Ink { light: RGBColor(130, 100, 190), dark: "#A48BD8" };
const LIMIT: Ink = Ink { light: RGBColor(188, 76, 0), dark: "#F0883E" };
const PAUSE: Ink = Ink { light: RGBColor(224, 229, 234), dark: "#303844" };
const INKS: [Ink; 7] = [PAPER, TEXT, GRID, RATE, GROSS, LIMIT, PAUSE];

/// Writes the drawing of a recording to `path`.
///
/// # Errors
/// The file cannot be written.
pub fn write(recording: &Recording, path: &Path) -> Result<()> {
    fs::write(path, draw(recording)?).with_context(|| format!("cannot write the drawing to {}", path.display()))
}

/// The drawing of a recording.
///
/// # Errors
/// None that a recording could cause; what the drawing library reports is passed on.
pub fn draw(recording: &Recording) -> Result<String> {
    let shown = &recording.vcpus[..recording.vcpus.len().min(MAX_PANELS)];
    let height = HEADER + PANEL * u32::try_from(shown.len())?;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&PAPER.light).map_err(plain)?;
        let (header, panels) = area.split_vertically(HEADER);
        title(&header, recording, shown.len())?;
        for (vcpu, panel) in shown.iter().zip(panels.split_evenly((shown.len().max(1), 1))) {
            draw_vcpu(&panel, recording, vcpu)?;
        }
        area.present().map_err(plain)?;
    }
    Ok(themed(svg))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn title(area: &Area<'_>, recording: &Recording, shown: usize) -> Result<()> {
    let hidden = recording.vcpus.len() - shown;
    let hidden = if hidden == 0 { String::new() } else { format!(", {hidden} more vCPUs not drawn") };
    let text = format!("Dirty page rate against its limit{hidden}");
    area.draw_text(&text, &font(18), (16, 10)).map_err(plain)?;
    // The legend: a line and its name, side by side.
    let names = [
        (RATE, "net rate (100 ms mean)", 170),
        (GROSS, "gross rate", 90),
        (LIMIT, "limit", 80),
        (PAUSE, "share of time paused", 0),
    ];
    let mut x = 16;
    for (ink, name, advance) in names {
        area.draw(&Rectangle::new([(x, 43), (x + 18, 51)], ink.light.filled())).map_err(plain)?;
        area.draw_text(name, &font(13), (x + 24, 39)).map_err(plain)?;
        x += 30 + advance;
    }
    Ok(())
}

fn draw_vcpu(area: &Area<'_>, recording: &Recording, vcpu: &VcpuRecording) -> Result<()> {
    let series = Series { samples: &vcpu.samples, page_size: recording.page_size };
    let start = recording.limited_at.as_secs_f64();
    let end = vcpu.samples.last().map_or(recording.end, |last| last.at.max(recording.end));
    let xs = -start..(end.as_secs_f64() - start).max(0.001);
    let rates = sampled(end, |from, to| series.mean_mib_s(from, to));
    let top = top(recording, vcpu, &rates);

    let caption = caption(recording, vcpu, top);
    area.draw_text(&caption, &font(14), (16, 4)).map_err(plain)?;
    let mut chart = ChartBuilder::on(area)
        .margin_top(26)
        .margin_right(8)
        .margin_left(8)
        .margin_bottom(8)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .right_y_label_area_size(56)
        .build_cartesian_2d(xs.clone(), 0.0..top)
        .map_err(plain)?
        .set_secondary_coord(xs.clone(), 0.0..100.0);
    let pauses = sampled(end, |from, to| series.paused_pct(from, to));
    let bars = pauses.windows(2).filter_map(|pair| {
        let [(from, _), (to, share)] = pair else { return None };
        Some(Rectangle::new([(from - start, 0.0), (to - start, share.clamp(0.0, 100.0))], PAUSE.light.filled()))
    });
    chart.draw_secondary_series(bars).map_err(plain)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.light)
        .axis_style(TEXT.light)
        .label_style(font(12))
        .axis_desc_style(font(12))
        .x_desc("time since the limit was set (s)")
        .y_desc("dirty page rate (MiB/s)")
        .x_labels(12)
        .y_labels(5)
        .x_label_formatter(&|x| significant(tidy(*x), 3))
        .y_label_formatter(&|y| significant(tidy(*y), 3))
        .draw()
        .map_err(plain)?;
    chart
        .configure_secondary_axes()
        .axis_style(TEXT.light)
        .label_style(font(12))
        .axis_desc_style(font(12))
        .y_desc("time paused (%)")
        .y_labels(5)
        .y_label_formatter(&|y| significant(tidy(*y), 3))
        .draw()
        .map_err(plain)?;
    // Broad and below the rate, so that both are seen where they are one.
    let ends = vcpu.limits.iter().skip(1).map(|&(at, _)| at).chain([end]);
    for (&(from, limit), to) in vcpu.limits.iter().zip(ends) {
        let Some(limit) = limit.map(|limit| mib_per_sec(limit, recording.page_size)) else { continue };
        let ends = [(from.as_secs_f64() - start, limit.min(top)), (to.as_secs_f64() - start, limit.min(top))];
        chart.draw_series(LineSeries::new(ends, LIMIT.light.stroke_width(5))).map_err(plain)?;
    }
    // Off the scale is drawn along the upper edge: the caption tells the free rate.
    let gross = sampled(end, |from, to| series.gross_mib_s(from, to));
    for (rates, ink, width) in [(gross, GROSS, 1), (rates, RATE, 2)] {
        let line = rates.iter().map(|&(at, rate)| (at - start, rate.min(top)));
        chart.draw_series(LineSeries::new(line, ink.light.stroke_width(width))).map_err(plain)?;
    }
    Ok(())
}

fn caption(recording: &Recording, vcpu: &VcpuRecording, top: f64) -> String {
    let measures = Measures::of(recording, vcpu);
    let last = measures.last();
    let mut text = format!("vCPU {}, {}: ", vcpu.index, vcpu.workload);
    let limit =
        last.limit_mib_s.map_or("no limit".to_owned(), |limit| format!("limit {} MiB/s", significant(limit, 4)));
    text += &limit;
    if let Some(settled) = last.settled_mib_s {
        let _ = write!(text, ", settled at {settled:.1} MiB/s");
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

/// The upper end of the rate's axis: room above the largest limit, so that a deviation shows, or all where there is none.
fn top(recording: &Recording, vcpu: &VcpuRecording, rates: &[(f64, f64)]) -> f64 {
    let limits = vcpu.limits.iter().filter_map(|&(_, limit)| limit);
    let limit = limits.map(|limit| mib_per_sec(limit, recording.page_size)).fold(0.0, f64::max);
    let rate = rates.iter().map(|&(_, rate)| rate).fold(0.0, f64::max);
    let top = if limit > 0.0 && vcpu.workload.writes() { 2.0 * limit } else { 1.1 * rate.max(limit) };
    if top > 0.0 { top } else { 1.0 }
}

/// `(time in s, value)` of the window that ends then, at as many instants as can be seen.
fn sampled(end: Duration, value: impl Fn(Duration, Duration) -> Option<f64>) -> Vec<(f64, f64)> {
    let step = (end / POINTS).max(Duration::from_millis(10));
    let mut points = Vec::new();
    let mut to = step;
    while to <= end {
        if let Some(value) = value(to.saturating_sub(WINDOW), to) {
            points.push((to.as_secs_f64(), value));
        }
        to += step;
    }
    points
}

fn font(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&TEXT.light)
}

/// Tick marks are sums of steps: without the last bits that these get wrong.
fn tidy(value: f64) -> f64 {
    (value * 1e9).round() / 1e9 + 0.0
}

/// Adds the colours of a dark page, for the viewers that know the difference; the others show the light one.
fn themed(svg: String) -> String {
    let mut style = String::from("<style>@media (prefers-color-scheme: dark) {\n");
    for Ink { light: RGBColor(r, g, b), dark } in INKS {
        let hex = format!("#{r:02X}{g:02X}{b:02X}");
        let _ = writeln!(style, "[fill=\"{hex}\"] {{ fill: {dark} }} [stroke=\"{hex}\"] {{ stroke: {dark} }}");
    }
    style.push_str("}</style>\n");
    match svg.find(">\n").map(|end| end + 2) {
        Some(body) => format!("{}{style}{}", &svg[..body], &svg[body..]),
        None => svg,
    }
}

/// A drawing error without the types of the drawing library, which borrow the drawing.
fn plain(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

#[cfg(test)]
mod tests {
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
    fn every_colour_has_one_for_dark_pages() {
        let svg = draw(&example::stepped()).unwrap();
        let body = &svg[svg.find("</style>").unwrap()..];
        for attribute in ["fill=\"#", "stroke=\"#"] {
            for colour in body.split(attribute).skip(1).map(|rest| &rest[..6]) {
                let known = |ink: &Ink| format!("{:02X}{:02X}{:02X}", ink.light.0, ink.light.1, ink.light.2) == colour;
                assert!(INKS.iter().any(known), "{attribute}{colour} has no colour for dark pages");
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
