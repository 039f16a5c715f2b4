//! A page of sections: text, facts, tables, pictures, commands. One file that needs nothing else: no network, no script.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::ink;
use super::plot::{Chart, Look};
use crate::output::{Output, say};
use crate::record::Host;

/// The page's file, in the directory that the user names.
const FILE: &str = "index.html";
/// The sizes of a chart on a screen and on a telephone, and of one among several.
const WIDE: (u32, u32) = (928, 330);
const NARROW: (u32, u32) = (340, 270);
/// A table with more rows than these is folded away.
const MAX_ROWS: usize = 16;

/// Makes sure, before a long run, that its page can be written into `directory`, which is made where it is missing.
///
/// # Errors
/// `directory` cannot be made, is no directory, or nothing can be written there.
pub fn prepare(directory: &Path) -> Result<Output> {
    let file = directory.join(FILE);
    fs::create_dir_all(directory)
        .with_context(|| format!("--report: cannot write {}: no such directory can be made", file.display()))?;
    Output::prepare("--report", &file)
}

/// A page.
#[derive(Clone, Debug)]
pub struct Page {
    title: String,
    lede: String,
    sections: Vec<Section>,
}

/// A section of a page.
#[derive(Clone, Debug)]
pub struct Section {
    title: String,
    body: Vec<Markup>,
}

/// A table: its columns, and rows of as many cells.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// What it shows.
    pub caption: String,
    /// Names, with units in parentheses. A column whose cells are all numbers is aligned to the right.
    pub columns: Vec<String>,
    /// From top to bottom; the first cell names the row.
    pub rows: Vec<Vec<Cell>>,
}

/// A cell of a table.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    /// What stands in it.
    pub text: String,
    /// How it is coloured. The text must say the same.
    pub tone: Tone,
}

/// How a cell is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Tone {
    /// Not at all.
    #[default]
    Plain,
    /// The more of what is allowed, the deeper: 0 to 1.
    Heat(f64),
    /// As it should not be.
    Bad,
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: text.into(), tone: Tone::Plain }
    }
}

impl Cell {
    /// The same in another tone.
    #[must_use]
    pub fn toned(self, tone: Tone) -> Self {
        Self { tone, ..self }
    }

    fn is_number(&self) -> bool {
        // What a table writes where there is no number counts as one.
        let digits = self.text.trim_start_matches(['+', '-', '−', '<', '>', '±']);
        digits.is_empty() || self.text == "none" || digits.starts_with(|c: char| c.is_ascii_digit())
    }
}

impl Table {
    fn markup(&self) -> Markup {
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column));
        // The first column names the rows.
        let class = |column: usize| (column > 0 && cells(column).all(Cell::is_number)).then_some("n");
        html! {
            table {
                thead { tr {
                    @for (column, name) in self.columns.iter().enumerate() {
                        th scope="col" class=[class(column)] { (name) }
                    }
                } }
                tbody { @for row in &self.rows { tr {
                    @for (column, cell) in row.iter().enumerate() {
                        @if column == 0 {
                            th scope="row" { (cell.text) }
                        } @else {
                            td class=[class(column)] style=[cell.tone.style()] { (cell.text) }
                        }
                    }
                } } }
            }
        }
    }
}

impl Tone {
    fn style(self) -> Option<String> {
        // Never so deep that the text on it is hard to read.
        let mix =
            |ink: &str, percent: f64| format!("background:color-mix(in srgb,var(--{ink}) {percent:.0}%,transparent)");
        match self {
            Self::Plain => None,
            Self::Heat(share) => Some(mix("hue1", 25.0 * share.clamp(0.0, 1.0))),
            Self::Bad => Some(mix("bad", 35.0) + ";font-weight:600"),
        }
    }
}

impl Page {
    /// A page without sections; `lede` says in a sentence or two what it shows.
    pub fn new(title: impl Into<String>, lede: impl Into<String>) -> Self {
        Self { title: title.into(), lede: lede.into(), sections: Vec::new() }
    }

    /// A new section at the page's end. One without a title goes on with what is before it.
    pub fn section(&mut self, title: impl Into<String>) -> &mut Section {
        self.sections.push(Section { title: title.into(), body: Vec::new() });
        self.sections.last_mut().expect("just added")
    }

    /// The page's whole text.
    pub fn html(&self) -> String {
        let style = ink::style() + include_str!("page.css");
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    // Else a browser asks for one.
                    link rel="icon" href="data:,";
                    title { (self.title) }
                    style { (PreEscaped(style)) }
                }
                body {
                    h1 { (self.title) }
                    p.lede { (self.lede) }
                    @for section in &self.sections {
                        section {
                            @if !section.title.is_empty() { h2 { (section.title) } }
                            @for part in &section.body { (part) }
                        }
                    }
                }
            }
        }
        .into_string()
    }

    /// Writes the page and says where it is.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, output: &mut Output) -> Result<()> {
        output.write(self.html())?;
        say(format_args!("The report is {}.", output.path().display()));
        Ok(())
    }
}

impl Section {
    fn add(&mut self, part: Markup) -> &mut Self {
        self.body.push(part);
        self
    }

    /// A paragraph.
    pub fn text(&mut self, text: impl Into<String>) -> &mut Self {
        self.add(html! { p { (text.into()) } })
    }

    /// Figures to be seen first: name, value, unit.
    pub fn tiles<'a, N: Into<String>, V: Into<Cell>>(
        &mut self,
        tiles: impl IntoIterator<Item = (N, V, &'a str)>,
    ) -> &mut Self {
        let tiles = tiles.into_iter().map(|(name, value, unit)| (name.into(), value.into(), unit));
        self.add(html! {
            dl.tiles {
                @for (name, value, unit) in tiles {
                    div style=[value.tone.style()] {
                        dt { (name) }
                        dd { (value.text) @if value.text != "-" { " " small { (unit) } } }
                    }
                }
            }
        })
    }

    /// Names and what they stand for.
    pub fn facts<'a>(&mut self, facts: impl IntoIterator<Item = (&'a str, String)>) -> &mut Self {
        self.add(html! {
            dl.facts { @for (name, fact) in facts { dt { (name) } dd { (fact) } } }
        })
    }

    /// The machine, its kernel, what its KVM offers; and this program.
    pub fn host(&mut self, host: &Host) -> &mut Self {
        let mut facts = vec![
            ("CPU", format!("{}, {} of its CPUs may be used", host.cpu, host.cpus)),
            ("Kernel", host.kernel.clone()),
        ];
        facts.extend(host.soft_limit.map(|entries| ("Soft limit", format!("a ring is full at {entries} entries"))));
        facts.push(("Program", format!("dirtylimit-bench {}", env!("CARGO_PKG_VERSION"))));
        facts.push(("Made", humantime::format_rfc3339_seconds(SystemTime::now()).to_string()));
        self.facts(facts);
        if host.capabilities.is_empty() {
            return self;
        }
        let rows = host.capabilities.iter();
        self.table(&Table {
            caption: "What KVM_CHECK_EXTENSION answers".into(),
            columns: vec!["capability".into(), "answer".into()],
            rows: rows.map(|(name, answer)| vec![name.as_str().into(), answered(name, *answer).into()]).collect(),
        })
    }

    /// The command line of this process.
    pub fn command(&mut self) -> &mut Self {
        let words: Vec<_> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        let words = words.iter().map(String::as_str);
        self.commands([shlex::try_join(words).expect("an argument of a process holds no NUL")])
    }

    /// Command lines, to be copied.
    pub fn commands(&mut self, lines: impl IntoIterator<Item = String>) -> &mut Self {
        // Broken between words alone.
        let word = |word: &str| html! { span { (word) } };
        let line = |line: String| html! { @for part in line.split(' ') { (word(part)) " " } "\n" };
        self.add(html! { pre { code { @for text in lines { (line(text)) } } } })
    }

    /// A table; a long one is folded away.
    pub fn table(&mut self, table: &Table) -> &mut Self {
        // A table that is wider than the screen can be scrolled, by keyboard too.
        let scrolled = html! {
            div.scroll tabindex="0" role="region" aria-label=(table.caption) { (table.markup()) }
        };
        self.add(if table.rows.len() > MAX_ROWS {
            html! { details { summary.caption { (table.rows.len()) " rows: " (table.caption) } (scrolled) } }
        } else {
            html! { p.caption { (table.caption) } (scrolled) }
        })
    }

    /// One chart over the page's width, or several small ones side by side, with one legend for all.
    ///
    /// # Errors
    /// What the drawing library reports is passed on.
    pub fn picture(&mut self, caption: impl Into<String>, charts: &[Chart]) -> Result<&mut Self> {
        let narrow = charts.iter().map(|chart| chart.svg(NARROW.0, NARROW.1)).collect::<Result<Vec<_>>>()?;
        let figures = match charts {
            [chart] => html! {
                h3 { (chart.title) }
                (legend(charts))
                div.wide { (PreEscaped(chart.svg(WIDE.0, WIDE.1)?)) }
                div.narrow { (PreEscaped(&narrow[0])) }
            },
            _ => html! {
                (legend(charts))
                div.many {
                    @for (chart, svg) in charts.iter().zip(&narrow) { div { h3 { (chart.title) } (PreEscaped(svg)) } }
                }
            },
        };
        Ok(self.add(html! { figure { (figures) figcaption { (caption.into()) } } }))
    }
}

/// What KVM answers, with its unit where it has one.
fn answered(capability: &str, answer: i64) -> String {
    match capability {
        "KVM_CAP_DIRTY_LOG_RING" | "KVM_CAP_DIRTY_LOG_RING_ACQ_REL" => format!("{answer} bytes"),
        _ => answer.to_string(),
    }
}

/// What the lines of some charts are, each once.
fn legend(charts: &[Chart]) -> Markup {
    let mut keys: Vec<(&str, Look)> = Vec::new();
    for series in charts.iter().flat_map(|chart| &chart.series) {
        if !keys.contains(&(&series.name, series.look)) {
            keys.push((&series.name, series.look));
        }
    }
    let class = |look| match look {
        Look::Line(_) | Look::Marked(_) => "line",
        Look::Thin(_) => "thin",
        Look::Dots(_) => "dot",
        Look::Allowed => "broad",
        Look::Area => "area",
    };
    html! {
        ul.legend {
            @for (name, look) in keys {
                li { i class=(class(look)) style=(format!("--c:var(--{})", look.ink().name)) {} (name) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::plot::{Axis, Series};
    use super::*;

    #[test]
    fn what_stands_on_a_page_is_text() {
        let evil = "\"><script>&amp;</script>";
        let chart = Chart {
            title: evil.into(),
            x: Axis::linear(evil),
            y: Axis::log(evil),
            right: None,
            series: vec![Series::new(evil, Look::Dots(7), vec![(1.0, 1.0)])],
        };
        let mut page = Page::new(evil, evil);
        let table = Table { caption: evil.into(), columns: vec![evil.into()], rows: vec![vec![evil.into()]] };
        let section = page.section(evil).text(evil).tiles([(evil, evil.to_owned(), evil)]).table(&table);
        section.facts([(evil, evil.to_owned())]).commands([evil.to_owned()]).picture(evil, &[chart]).unwrap();
        let html = page.html();
        assert!(!html.contains("<script") && html.matches("&lt;script&gt;").count() >= 16, "{html}");
    }

    #[test]
    fn numbers_are_aligned_and_long_tables_folded() {
        let row = |text: &str| vec!["1".into(), text.into(), Cell::from("-0.1").toned(Tone::Bad)];
        let columns = vec!["case".into(), "what".into(), "error (%)".into()];
        let mut table = Table { caption: String::new(), columns, rows: vec![row("none"), row("a writer")] };
        let html = |table: &Table| Page::new("", "").section("").table(table).body[0].0.clone();
        assert!(html(&table).contains("<th scope=\"col\">what</th><th scope=\"col\" class=\"n\">error (%)</th>"));
        assert!(!html(&table).contains("<details>"));
        table.rows = vec![row("none"); MAX_ROWS + 1];
        assert!(html(&table).contains("<details>"));
    }
}
