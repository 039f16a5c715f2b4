//! A migration over time: what was left, and what was sent and dirtied in each tenth of a second, with the budget.

use std::fmt::Write as _;

use anyhow::Result;

use super::result::{Migrated, Sample};
use crate::report::ink::PAPER;
use crate::report::plot::{self, Axis, Chart, Look, Series, font, plain, px};
use crate::report::svg::{at, legend, themed};
use crate::units::significant;

const WIDTH: u32 = 960;
const HEADER: u32 = 40;
const PANEL: u32 = 290;
const CAPTION: u32 = 46;
/// Length of the windows that rates are taken over, in seconds.
const WINDOW: f64 = 0.1;
const MIB: f64 = (1 << 20) as f64;
const PAGES_PER_MIB: f64 = 256.0;

/// The drawing of a migration.
///
/// # Errors
/// None that a migration could cause; what the drawing library reports is passed on.
pub fn draw(migrated: &Migrated) -> Result<String> {
    let title = title(migrated);
    let charts = [left(migrated), rates(migrated)];
    let svg = plot::svg((WIDTH, HEADER + 2 * PANEL), &title, |area| {
        area.fill(&PAPER.light).map_err(plain)?;
        let (header, panels) = area.split_vertically(px(HEADER));
        header.draw_text(&title, &font(17), at(16, 10)).map_err(plain)?;
        for (chart, panel) in charts.iter().zip(panels.split_evenly((2, 1))) {
            panel.draw_text(&chart.title, &font(13), at(16, 8)).map_err(plain)?;
            legend(&panel, 27, chart)?;
            chart.draw(&panel.margin(px(CAPTION), 0, 0, 0))?;
        }
        Ok(())
    })?;
    Ok(themed(&svg))
}

fn title(migrated: &Migrated) -> String {
    let mut title = format!("Migration, mode {}: ", migrated.mode);
    let verdict = format!("{:?}", migrated.verdict).to_lowercase();
    let _ = write!(title, "{verdict} after {:.2} s", migrated.total_s.as_secs_f64());
    if let Some(downtime) = migrated.downtime_ms {
        let _ = write!(title, ", downtime {:.0} ms", 1e3 * downtime.as_secs_f64());
    }
    let _ = write!(title, ", sent {} MiB", significant(migrated.sent_mib, 3));
    title
}

const SINCE: &str = "time since the first page (s)";

fn left(migrated: &Migrated) -> Chart {
    let points =
        |value: fn(&Sample) -> f64| migrated.samples.iter().map(|s| (s.at_s.as_secs_f64(), value(s))).collect();
    let series = vec![
        Series::new("left", Look::Line(0), points(|sample| sample.left_pages as f64 / PAGES_PER_MIB)),
        Series::new("sent so far", Look::Thin(2), points(|sample| sample.sent_bytes as f64 / MIB)),
    ];
    let title = "What is left to send".to_owned();
    Chart { title, x: axis(migrated), y: Axis::linear("memory (MiB)"), right: None, series }
}

fn rates(migrated: &Migrated) -> Chart {
    let samples = &migrated.samples;
    let rate = |value: fn(&Sample) -> f64| -> Vec<(f64, f64)> {
        let mut points = Vec::new();
        let mut from = Sample::default();
        for sample in samples {
            let time = sample.at_s.saturating_sub(from.at_s).as_secs_f64();
            if time >= WINDOW {
                points.push((sample.at_s.as_secs_f64(), (value(sample) - value(&from)) / time));
                from = *sample;
            }
        }
        points
    };
    let budget = |sample: &Sample| (sample.at_s.as_secs_f64(), sample.budget_mib_s.unwrap_or(f64::NAN));
    let dirtied = rate(|sample| sample.dirtied_pages as f64 / PAGES_PER_MIB);
    // The free guest is far off this scale; what matters is how it compares with the wire.
    let wire = migrated.bandwidth_mib_s.unwrap_or(0.0);
    let sent = rate(|sample| sample.sent_bytes as f64 / MIB);
    let top = 2.0 * sent.iter().map(|&(_, rate)| rate).fold(wire, f64::max);
    let beyond = top > 0.0 && dirtied.iter().any(|&(_, rate)| rate > top);
    let series = vec![
        Series::new("budget", Look::Allowed, samples.iter().map(budget).collect()),
        Series::new("dirtied", Look::Line(1), dirtied),
        Series::new("sent", Look::Line(2), sent),
    ];
    let y = Axis::linear("rate (MiB/s)");
    let y = if top > 0.0 { y.over(0.0..top) } else { y };
    let beyond = if beyond { "; what a free guest dirties is beyond the scale" } else { "" };
    Chart { title: format!("Sent and dirtied, and the budget{beyond}"), x: axis(migrated), y, right: None, series }
}

fn axis(migrated: &Migrated) -> Axis {
    let end = migrated.total_s.as_secs_f64();
    let axis = Axis::linear(SINCE);
    if end > 0.0 { axis.over(0.0..end) } else { axis }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::migrate::result::Verdict;

    fn migrated(samples: Vec<Sample>) -> Migrated {
        Migrated {
            mode: super::super::Mode::Goal,
            verdict: Verdict::Done,
            total_s: Duration::from_millis(1700),
            downtime_ms: Some(Duration::from_millis(290)),
            sent_mib: 320.0,
            rounds: Vec::new(),
            lost_guest_s: Some(1.0),
            longest_stall_ms: Duration::ZERO,
            memory_equal: Some(true),
            vcpus: Vec::new(),
            reason: String::new(),
            memory_mib: 512,
            bandwidth_mib_s: Some(200.0),
            downtime_allowed_ms: Duration::from_millis(300),
            guest_downtime_ms: None,
            check_ms: None,
            unequal_pages: Some(0),
            counters_go_on: Some(true),
            source_resumed_ms: None,
            source_work_pct: None,
            source_paused_ms: None,
            attempt: 1,
            ring: 1024,
            samples,
        }
    }

    #[test]
    fn what_was_left_sent_and_dirtied_is_drawn_with_the_budget() {
        let sample = |tenths: u64| Sample {
            at_s: Duration::from_millis(100 * tenths),
            left_pages: 57_344 - 3000 * tenths,
            sent_bytes: tenths * (20 << 20),
            dirtied_pages: 1280 * tenths,
            budget_mib_s: (tenths > 3).then_some(50.0),
        };
        let svg = draw(&migrated((0..17).map(sample).collect())).unwrap();
        for text in
            ["mode goal: done after 1.70 s, downtime 290 ms", "left", "budget", "dirtied", "rate (MiB/s)", SINCE]
        {
            assert!(svg.contains(text), "{text}");
        }
    }

    #[test]
    fn a_migration_that_never_began_is_drawn_all_the_same() {
        let nothing = Migrated { total_s: Duration::ZERO, bandwidth_mib_s: None, ..migrated(Vec::new()) };
        assert!(draw(&nothing).unwrap().starts_with("<svg"));
    }
}
