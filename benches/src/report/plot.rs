//! Charts of plain data: what the axes are, what the series are. Drawn by plotters as SVG, at any size.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::chart::DualCoordChartContext;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::ink::{ALLOWED, AREA, GRID, HUES, Ink, TEXT};
use crate::units::significant;

/// plotters counts in whole pixels: drawn so much larger and shown so much smaller, slopes are smooth.
const FINE: u32 = 4;
/// Height of the letters at the axes, in pixels.
const LETTERS: u32 = 12;
/// Share of an axis beyond the outermost values.
const ROOM: f64 = 0.04;

/// A picture of series over two axes.
#[derive(Clone, Debug)]
pub struct Chart {
    /// What it shows; also read out to who cannot see it.
    pub title: String,
    /// From left to right.
    pub x: Axis,
    /// From bottom to top.
    pub y: Axis,
    /// The axis of the [areas](Look::Area), which stands on the right.
    pub right: Option<Axis>,
    /// Later ones are drawn over earlier ones.
    pub series: Vec<Series>,
}

/// An axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it shows, with its unit in parentheses.
    pub title: String,
    /// Logarithmic: values that are not above zero are left out.
    pub log: bool,
    /// From where to where; else what the series need, from zero on if it is not logarithmic. What lies beyond is drawn
    /// along the edge.
    pub range: Option<Range<f64>>,
}

/// Points that belong together.
#[derive(Clone, Debug)]
pub struct Series {
    /// As the legend calls it.
    pub name: String,
    /// How it is drawn.
    pub look: Look,
    /// In order. A line is interrupted where a value is no number.
    pub points: Vec<(f64, f64)>,
}

/// How a series is drawn. Hues are numbered from 0; use the same one for the same thing in all charts of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// A line.
    Line(usize),
    /// A thin line, for what explains another one.
    Thin(usize),
    /// A line with its points marked.
    Marked(usize),
    /// Points alone.
    Dots(usize),
    /// What is allowed: broad, so that what keeps to it is seen on top of it.
    Allowed,
    /// The area below the points, on the scale of [`Chart::right`].
    Area,
}

impl Series {
    /// A series of these points.
    pub fn new(name: impl Into<String>, look: Look, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), look, points }
    }
}

impl Axis {
    /// A linear axis.
    pub fn linear(title: impl Into<String>) -> Self {
        Self { title: title.into(), log: false, range: None }
    }

    /// A logarithmic axis.
    pub fn log(title: impl Into<String>) -> Self {
        Self { log: true, ..Self::linear(title) }
    }

    /// The same from `range.start` to `range.end`.
    #[must_use]
    pub fn over(self, range: Range<f64>) -> Self {
        Self { range: Some(range), ..self }
    }

    /// The axis over `values`, with about `ticks` places labelled and some room beyond the outermost values.
    fn scale(&self, values: impl Iterator<Item = f64>, ticks: usize, room: f64) -> Scale {
        let place = |value: f64| if self.log { value.log10() } else { value };
        let (from, to) = match &self.range {
            Some(range) => (place(range.start), place(range.end)),
            None => {
                let places = values.map(place).filter(|place| place.is_finite());
                let ground = if self.log { (f64::INFINITY, f64::NEG_INFINITY) } else { (0.0, 0.0) };
                let (from, to) = places.fold(ground, |(from, to), place| (from.min(place), to.max(place)));
                let margin = room * (to - from);
                (if from == 0.0 { from } else { from - margin }, to + margin)
            }
        };
        // Also without any point, and with just one, an axis has two ends.
        let places = match to - from {
            length if !length.is_finite() => 0.0..1.0,
            length if length < 1e-9 => from - 0.5..to + 0.5,
            _ => from..to,
        };
        let labelled =
            if self.log { decades(&places, ticks) } else { RangedCoordf64::from(places.clone()).key_points(ticks) };
        Scale { log: self.log, places, labelled }
    }
}

/// An axis that knows its ends. Values become places on a straight line, which are the logarithms if it is logarithmic.
#[derive(Clone, Debug)]
struct Scale {
    log: bool,
    places: Range<f64>,
    labelled: Vec<f64>,
}

impl Scale {
    /// Where a value lies, at the edge if beyond it; not finite where it has no place.
    fn place(&self, value: f64) -> f64 {
        let place = if self.log { value.log10() } else { value };
        if place.is_finite() { place.clamp(self.places.start, self.places.end) } else { place }
    }

    fn label(&self, place: f64) -> String {
        // Ticks are sums of steps: without the last bits that these get wrong.
        significant(if self.log { 10f64.powf(place) } else { (place * 1e9).round() / 1e9 + 0.0 }, 3)
    }
}

impl Ranged for Scale {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, limit: (i32, i32)) -> i32 {
        RangedCoordf64::from(self.places.clone()).map(place, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // None between those that are labelled.
        if hint.weight().allow_light_points() { Vec::new() } else { self.labelled.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.places.clone()
    }
}

impl ValueFormatter<f64> for Scale {
    fn format_ext(&self, place: &f64) -> String {
        self.label(*place)
    }
}

/// Logarithms of 1, 2 and 5 in each power of ten, or of fewer where those are too many.
#[expect(clippy::cast_possible_truncation, reason = "logarithms of finite numbers are small")]
fn decades(places: &Range<f64>, ticks: usize) -> Vec<f64> {
    let steps = |each: i32, of: &[f64]| -> Vec<f64> {
        let decades = (places.start.floor() as i32..=places.end.ceil() as i32).filter(|decade| decade % each == 0);
        let all = decades.flat_map(|decade| of.iter().map(move |step| f64::from(decade) + step.log10()));
        all.filter(|place| (places.start - 1e-9..=places.end + 1e-9).contains(place)).collect()
    };
    let finer = [steps(1, &[1.0, 2.0, 5.0]), steps(1, &[1.0, 3.0])];
    let coarser = (1..).map(|each| steps(each, &[1.0]));
    finer.into_iter().chain(coarser).find(|labelled| labelled.len() <= ticks).unwrap_or_default()
}

impl Look {
    /// The colour of a series.
    pub(crate) fn ink(self) -> Ink {
        match self {
            Self::Line(hue) | Self::Thin(hue) | Self::Marked(hue) | Self::Dots(hue) => HUES[hue % HUES.len()],
            Self::Allowed => ALLOWED,
            Self::Area => AREA,
        }
    }
}

pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A drawing of `width` × `height` pixels.
///
/// # Errors
/// What the drawing library reports is passed on.
pub(crate) fn svg(
    (width, height): (u32, u32),
    title: &str,
    draw: impl FnOnce(&Area<'_>) -> Result<()>,
) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (width * FINE, height * FINE)).into_drawing_area();
    draw(&area)?;
    area.present().map_err(plain)?;
    drop(area);
    // The library's own first line has neither the size that it is shown in nor what it shows.
    let body = svg.split_once(">\n").ok_or_else(|| anyhow!("an empty drawing"))?.1;
    let title = title.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
    let head = format!(
        "<svg width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{title}\" \
         xmlns=\"http://www.w3.org/2000/svg\">\n",
        width * FINE,
        height * FINE
    );
    Ok(head + body)
}

/// Pixels as the drawing counts them.
pub(crate) const fn px(pixels: u32) -> u32 {
    pixels * FINE
}

/// Letters so many pixels high.
pub(crate) fn font(pixels: u32) -> TextStyle<'static> {
    // plotters takes 1.24 of the size for a font's.
    ("system-ui, sans-serif", f64::from(px(pixels)) * 1.24).into_font().color(&TEXT.light)
}

impl Chart {
    /// The chart alone, without its title.
    ///
    /// # Errors
    /// What the drawing library reports is passed on.
    pub fn svg(&self, width: u32, height: u32) -> Result<String> {
        svg((width, height), &self.title, |area| self.draw(area))
    }

    /// Draws the chart, without its title, all over `area`.
    pub(crate) fn draw(&self, area: &Area<'_>) -> Result<()> {
        let (width, height) = area.dim_in_pixel();
        let (columns, rows) = ((width / px(56)).max(2) as usize, (height / px(44)).max(2) as usize);
        let points = |area: bool| {
            let of = self.series.iter().filter(move |series| (series.look == Look::Area) == area);
            of.flat_map(|series| &series.points).copied()
        };
        let all = points(false).chain(points(true));
        let x = self.x.scale(all.map(|(x, _)| x), columns, if self.x.log { ROOM } else { 0.0 });
        let y = self.y.scale(points(false).map(|(_, y)| y), rows, ROOM);
        let other = self.right.as_ref().unwrap_or(&self.y);
        let right = other.scale(points(true).map(|(_, y)| y), rows, ROOM);
        let mut chart = ChartBuilder::on(area)
            .margin(px(6))
            .x_label_area_size(px(40))
            .y_label_area_size(px(58))
            .right_y_label_area_size(px(if self.right.is_some() { 50 } else { 8 }))
            .build_cartesian_2d(x.clone(), y.clone())
            .map_err(plain)?
            .set_secondary_coord(x.clone(), right.clone());
        for series in self.series.iter().filter(|series| series.look == Look::Area) {
            for mut run in runs(series, &x, &right) {
                let (Some(first), Some(last)) = (run.first().copied(), run.last().copied()) else { continue };
                let ground = right.places.start;
                run.extend([(last.0, ground), (first.0, ground)]);
                chart.draw_secondary_series([Polygon::new(run, AREA.light.filled())]).map_err(plain)?;
            }
        }
        self.axes(&mut chart)?;
        for series in self.series.iter().filter(|series| series.look != Look::Area) {
            let ink = series.look.ink().light;
            let width = match series.look {
                Look::Allowed => 5 * FINE,
                Look::Thin(_) => FINE,
                _ => 2 * FINE,
            };
            for run in runs(series, &x, &y) {
                if matches!(series.look, Look::Marked(_) | Look::Dots(_)) {
                    let dots = run.iter().map(|&point| Circle::new(point, 4 * FINE, ink.filled()));
                    chart.draw_series(dots).map_err(plain)?;
                }
                if !matches!(series.look, Look::Dots(_)) {
                    chart.draw_series([PathElement::new(run, ink.stroke_width(width))]).map_err(plain)?;
                }
            }
        }
        Ok(())
    }

    fn axes(&self, chart: &mut Context<'_, '_>) -> Result<()> {
        let mut mesh = chart.configure_mesh();
        if !self.x.log {
            mesh.disable_x_mesh();
        }
        mesh.light_line_style(TRANSPARENT)
            .bold_line_style(GRID.light.stroke_width(FINE))
            .axis_style(TEXT.light.stroke_width(FINE))
            .label_style(font(LETTERS))
            .axis_desc_style(font(LETTERS))
            .x_desc(&self.x.title)
            .y_desc(&self.y.title)
            .set_all_tick_mark_size(px(4))
            .draw()
            .map_err(plain)?;
        let Some(right) = &self.right else { return Ok(()) };
        chart
            .configure_secondary_axes()
            .axis_style(TEXT.light.stroke_width(FINE))
            .label_style(font(LETTERS))
            .axis_desc_style(font(LETTERS))
            .y_desc(&right.title)
            .set_all_tick_mark_size(px(4))
            .draw()
            .map_err(plain)
    }
}

type Places = Cartesian2d<Scale, Scale>;
type Context<'a, 'b> = DualCoordChartContext<'a, SVGBackend<'b>, Places, Places>;

/// The places of a series' points, in unbroken runs.
fn runs(series: &Series, x: &Scale, y: &Scale) -> Vec<Vec<(f64, f64)>> {
    let places: Vec<_> = series.points.iter().map(|&(at, value)| (x.place(at), y.place(value))).collect();
    let runs = places.split(|(at, place)| !(at.is_finite() && place.is_finite()));
    runs.filter(|run| !run.is_empty()).map(<[_]>::to_vec).collect()
}

/// A drawing error without the types of the drawing library, which borrow the drawing.
pub(crate) fn plain(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logarithmic_axis_labels_round_numbers() {
        let labels = |range: Range<f64>, ticks| {
            let scale = Axis::log("").over(range).scale(std::iter::empty(), ticks, 0.0);
            scale.labelled.iter().map(|&place| scale.label(place)).collect::<Vec<_>>()
        };
        assert_eq!(labels(1.0..100.0, 9), ["1", "2", "5", "10", "20", "50", "100"]);
        assert_eq!(labels(1.0..100.0, 5), ["1", "3", "10", "30", "100"]);
        assert_eq!(labels(0.01..1e6, 5), ["0.01", "1", "100", "10000", "1000000"]);
    }

    #[test]
    fn what_is_no_number_breaks_a_line_and_what_is_off_the_scale_lies_at_the_edge() {
        let points = vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 50.0), (3.0, -1.0)];
        let (x, y) = (Axis::linear("").over(0.0..3.0), Axis::linear("").over(0.0..10.0));
        let scale = |axis: Axis| axis.scale(std::iter::empty(), 3, 0.0);
        let runs = runs(&Series::new("", Look::Line(0), points), &scale(x), &scale(y));
        assert_eq!(runs, [vec![(0.0, 1.0)], vec![(2.0, 10.0), (3.0, 0.0)]]);
    }

    #[test]
    fn a_chart_of_nothing_is_drawn() {
        for points in [vec![], vec![(0.0, 0.0)], vec![(f64::NAN, f64::INFINITY)], vec![(5.0, 5.0); 2]] {
            for axis in [Axis::linear("x"), Axis::log("x")] {
                let series = vec![Series::new("", Look::Marked(9), points.clone())];
                let chart = Chart { title: "t".into(), x: axis.clone(), y: axis, right: None, series };
                assert!(chart.svg(300, 200).unwrap().starts_with("<svg width=\"300\""));
            }
        }
    }
}
