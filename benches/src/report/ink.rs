//! The colours of all drawings and pages: each one for light paper and one for dark, told apart by the colour-blind too.

use std::fmt::Write as _;

use plotters::style::RGBColor;

/// A colour: what it is called in a style sheet, on light paper, and on dark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ink {
    pub(crate) name: &'static str,
    pub(crate) light: RGBColor,
    dark: &'static str,
}

const fn ink(name: &'static str, light: (u8, u8, u8), dark: &'static str) -> Ink {
    Ink { name, light: RGBColor(light.0, light.1, light.2), dark }
}

pub(crate) const PAPER: Ink = ink("paper", (255, 255, 255), "#0D1117");
pub(crate) const TEXT: Ink = ink("text", (31, 35, 40), "#E6EDF3");
pub(crate) const FAINT: Ink = ink("faint", (89, 99, 110), "#9AA5B1");
pub(crate) const GRID: Ink = ink("grid", (216, 222, 228), "#343B44");
pub(crate) const AREA: Ink = ink("area", (228, 233, 238), "#262D36");
/// What is allowed: limits, bounds, the longest pause asked for. Nothing else has this colour.
pub(crate) const ALLOWED: Ink = ink("allowed", (219, 161, 38), "#BB8009");
/// What should not be. Nothing else has this colour.
const BAD: Ink = ink("bad", (207, 34, 46), "#F85149");
/// What was measured, by number.
pub(crate) const HUES: [Ink; 5] = [
    ink("hue0", (0, 104, 181), "#58A6FF"),
    ink("hue1", (194, 77, 0), "#FF8A4C"),
    ink("hue2", (0, 133, 96), "#3FD0A0"),
    ink("hue3", (163, 71, 142), "#E08CCB"),
    ink("hue4", (87, 96, 106), "#B1BAC4"),
];

fn all() -> impl Iterator<Item = Ink> {
    [PAPER, TEXT, FAINT, GRID, AREA, ALLOWED, BAD].into_iter().chain(HUES)
}

impl Ink {
    /// As plotters writes it.
    pub(crate) fn hex(self) -> String {
        let RGBColor(r, g, b) = self.light;
        format!("#{r:02X}{g:02X}{b:02X}")
    }
}

/// The style sheet that gives drawings and pages the colours that the reader prefers. A viewer that does not know such
/// sheets shows the light ones, which stand in the drawings themselves.
pub(crate) fn style() -> String {
    let list =
        |hex: fn(Ink) -> String| all().fold(String::new(), |list, ink| list + &format!("--{}:{};", ink.name, hex(ink)));
    let (light, dark) = (list(Ink::hex), list(|ink| ink.dark.to_owned()));
    let mut style =
        format!(":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n");
    for ink in all() {
        let (name, hex) = (ink.name, ink.hex());
        let _ = writeln!(style, "[fill=\"{hex}\"]{{fill:var(--{name})}}[stroke=\"{hex}\"]{{stroke:var(--{name})}}");
    }
    style
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative luminance, as WCAG 2 defines it.
    fn luminance(hex: &str) -> f64 {
        let channel = |at: usize| {
            let value = f64::from(u8::from_str_radix(&hex[at..at + 2], 16).unwrap()) / 255.0;
            if value <= 0.040_45 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5)
    }

    fn contrast(one: &str, other: &str) -> f64 {
        let (one, other) = (luminance(one), luminance(other));
        (one.max(other) + 0.05) / (one.min(other) + 0.05)
    }

    #[test]
    fn text_and_lines_stand_out_on_either_paper() {
        for (ink, least) in [(TEXT, 7.0), (FAINT, 4.5)].into_iter().chain(HUES.map(|hue| (hue, 4.5))) {
            let (light, dark) = (contrast(&ink.hex(), &PAPER.hex()), contrast(ink.dark, PAPER.dark));
            assert!(light >= least && dark >= least, "{}: {light:.1} on light, {dark:.1} on dark", ink.name);
        }
    }

    #[test]
    fn no_two_inks_are_one() {
        let hexes: std::collections::BTreeSet<_> = all().map(Ink::hex).collect();
        assert_eq!(hexes.len(), all().count());
    }
}
