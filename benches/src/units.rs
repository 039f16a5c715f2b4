//! Sizes, rates and durations as people write them.
//!
//! A number is decimal digits with at most one point; what follows is its unit, after any spaces. Every error says what
//! was wrong with which text, and what is allowed.

use std::fmt;
use std::time::Duration;

use dirtylimit_core::PageRate;
pub use dirtylimit_test_vm::PAGE_SIZE;

const MIB: f64 = (1u64 << 20) as f64;
/// The largest size: 16 TiB, more than any host has.
const MAX_SIZE: f64 = (1u64 << 44) as f64;
/// The longest duration: a day.
const MAX_SECONDS: f64 = 86_400.0;
/// The unit of [`PageRate`], 1/1024 pages per second, in bytes per second.
const RATE_QUANTUM: f64 = PAGE_SIZE as f64 / 1024.0;

/// Bytes per second as MiB/s.
pub fn mib_per_sec(rate: PageRate, page_size: u32) -> f64 {
    rate.bytes_per_sec(page_size) as f64 / MIB
}

/// A size in bytes: whole pages, at least one, at most 16 TiB. A number without a unit counts pages.
///
/// # Errors
/// Not a number, an unknown unit, no whole pages, out of range.
#[expect(clippy::cast_possible_truncation, reason = "in range and whole, checked first")]
pub fn parse_size(text: &str) -> Result<u64, String> {
    let allowed = "a size is pages (57344) or KiB, MiB, GiB, TiB (224MiB)";
    let (number, unit) = split(text).ok_or_else(|| format!("`{text}` does not start with a number: {allowed}"))?;
    let bytes = number * scale(unit).ok_or_else(|| format!("unknown unit `{unit}`: {allowed}"))?;
    if bytes > MAX_SIZE {
        return Err(format!("`{text}` is too large: at most 16TiB"));
    }
    if bytes < f64::from(PAGE_SIZE) || bytes % f64::from(PAGE_SIZE) != 0.0 {
        return Err(format!("`{text}` is not a whole number of pages of 4 KiB, at least one"));
    }
    Ok(bytes as u64)
}

/// A size in the largest unit that shows it exactly; [`parse_size`] reads it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(bytes) = *self;
        match bytes.trailing_zeros() {
            30.. if bytes != 0 => write!(f, "{}GiB", bytes >> 30),
            20..30 => write!(f, "{}MiB", bytes >> 20),
            _ => write!(f, "{}KiB", bytes >> 10),
        }
    }
}

/// A rate above zero, at most 16 TiB/s. `/s` may be left out; a number without a unit counts pages. Network units are decimal:
/// `MB/s` is 10^6 bytes, `Gbit/s` 10^9 bits; what QEMU and libvirt call MB/s is MiB/s here.
///
/// # Errors
/// Not a number, an unknown unit, out of range.
#[expect(clippy::cast_possible_truncation, reason = "in range, checked first")]
pub fn parse_rate(text: &str) -> Result<PageRate, String> {
    let allowed = "a rate is pages per second (25600), KiB/s, MiB/s, GiB/s, TiB/s (100MiB/s), or in powers of ten kB/s, \
                   MB/s, GB/s, Mbit/s, Gbit/s (QEMU's MB/s are MiB/s)";
    let (number, unit) = split(text).ok_or_else(|| format!("`{text}` does not start with a number: {allowed}"))?;
    let plain = unit.strip_suffix("/s").unwrap_or(unit).trim_end();
    let scale = scale(plain).or_else(|| decimal(plain));
    let bytes = number * scale.ok_or_else(|| format!("unknown unit `{unit}`: {allowed}"))?;
    if bytes > mib_per_sec(PageRate::MAX, PAGE_SIZE) * MIB {
        return Err(format!("`{text}` is too fast: at most 16TiB/s"));
    }
    if bytes < RATE_QUANTUM {
        return Err(format!("`{text}` is too slow: at least one page in 1024 s (0.001); `none` is no limit"));
    }
    Ok(PageRate::from_bytes_per_sec(bytes.round() as u64, PAGE_SIZE))
}

/// Whether a rate is a plain number, which counts pages.
pub fn is_plain_rate(text: &str) -> bool {
    split(text).is_some_and(|(_, unit)| matches!(unit, "" | "/s"))
}

/// A rate, or `none` for no limit.
///
/// # Errors
/// As [`parse_rate`].
pub fn parse_limit(text: &str) -> Result<Option<PageRate>, String> {
    if text == "none" { Ok(None) } else { parse_rate(text).map(Some) }
}

/// A rate in MiB/s with four significant digits; [`parse_rate`] reads it back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate(pub PageRate);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB/s", significant(mib_per_sec(self.0, PAGE_SIZE), 4))
    }
}

/// A limit: a [`Rate`] or `none`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit(pub Option<PageRate>);

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(rate) => Rate(rate).fmt(f),
            None => f.write_str("none"),
        }
    }
}

/// A duration with its unit: `us`, `ms` or `s`; at most a day.
///
/// # Errors
/// Not a number, no unit or an unknown one, too long.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let allowed = "a duration is a number with `us`, `ms` or `s` (10ms, 2.5s)";
    let (number, unit) = split(text).ok_or_else(|| format!("`{text}` does not start with a number: {allowed}"))?;
    let scale = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "" => return Err(format!("`{text}` lacks its unit: {allowed}")),
        _ => return Err(format!("unknown unit `{unit}`: {allowed}")),
    };
    seconds(text, number * scale)
}

/// A duration that [`parse_duration`] reads back, if it is in whole microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time(pub Duration);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(time) = self;
        if time.is_zero() { f.write_str("0s") } else { f.write_str(&format!("{time:?}").replace('µ', "u")) }
    }
}

/// A number of seconds, at most a day; a trailing `s` may be given.
///
/// # Errors
/// Not a number, another unit, too long.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    match split(text) {
        Some((number, "" | "s")) => seconds(text, number),
        _ => Err(format!("`{text}` is not a number of seconds (8, 2.5)")),
    }
}

/// A number of percent; a trailing `%` may be given.
///
/// # Errors
/// Not a number, another unit.
pub fn parse_percent(text: &str) -> Result<f64, String> {
    match split(text) {
        Some((number, "" | "%")) => Ok(number),
        _ => Err(format!("`{text}` is not a number of percent (5, 2.5)")),
    }
}

fn seconds(text: &str, number: f64) -> Result<Duration, String> {
    if number > MAX_SECONDS {
        return Err(format!("`{text}` is too long: at most a day"));
    }
    Duration::try_from_secs_f64(number).map_err(|error| format!("`{text}`: {error}"))
}

/// The leading number and its unit. Never an exponent, a sign, infinity or NaN: those are no digits.
fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    number.parse::<f64>().ok().filter(|number| number.is_finite()).map(|number| (number, unit.trim_start()))
}

/// Bytes in one unit.
fn scale(unit: &str) -> Option<f64> {
    match unit {
        "" => Some(f64::from(PAGE_SIZE)),
        "KiB" => Some(1024.0),
        "MiB" => Some(MIB),
        "GiB" => Some(1024.0 * MIB),
        "TiB" => Some(1024.0 * 1024.0 * MIB),
        _ => None,
    }
}

/// Bytes in one unit that counts in powers of ten.
fn decimal(unit: &str) -> Option<f64> {
    match unit {
        "kB" => Some(1e3),
        "MB" => Some(1e6),
        "GB" => Some(1e9),
        "Mbit" => Some(1e6 / 8.0),
        "Gbit" => Some(1e9 / 8.0),
        _ => None,
    }
}

/// `value` with at least `digits` significant digits and no trailing zeros after the point.
pub fn significant(value: f64, digits: usize) -> String {
    // Digits before the point, negative for zeros after it; far out of range only for values that nobody has.
    let before = if value == 0.0 { 1.0 } else { value.abs().log10().floor() + 1.0 };
    #[expect(clippy::cast_possible_truncation, reason = "clamped to 0..=20")]
    let decimals = (digits as f64 - before).clamp(0.0, 20.0) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn people_write_sizes() {
        assert_eq!(parse_size("224MiB"), Ok(224 << 20));
        assert_eq!(parse_size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(parse_size("4KiB"), Ok(4096));
        assert_eq!(parse_size("7"), Ok(7 * 4096));
        assert_eq!((parse_size("16384GiB"), parse_size("16TiB")), (Ok(1 << 44), Ok(1 << 44)));
        assert_eq!(Size(224 << 20).to_string(), "224MiB");
        assert_eq!(Size(3 << 30).to_string(), "3GiB");
        assert_eq!(Size(7 << 12).to_string(), "28KiB");
    }

    #[test]
    fn people_write_rates() {
        assert_eq!(parse_rate("100MiB/s"), Ok(PageRate::from_pages_per_sec(25_600)));
        assert_eq!(parse_rate("100MiB"), Ok(PageRate::from_pages_per_sec(25_600)));
        assert_eq!(parse_rate("25600"), Ok(PageRate::from_pages_per_sec(25_600)));
        assert_eq!(parse_rate("25600/s"), Ok(PageRate::from_pages_per_sec(25_600)));
        assert_eq!((parse_rate("16384GiB/s"), parse_rate("16TiB/s")), (Ok(PageRate::MAX), Ok(PageRate::MAX)));
        assert_eq!(parse_rate("0.001"), Ok(PageRate::MIN_LIMIT));
        // By the powers of ten that they stand for, not by QEMU's habit.
        let bytes = |bytes| Ok(PageRate::from_bytes_per_sec(bytes, PAGE_SIZE));
        assert_eq!(parse_rate("100MB/s"), bytes(100_000_000));
        assert_eq!(parse_rate("1 Gbit/s"), bytes(125_000_000));
        assert_eq!(parse_rate("100Mbit"), bytes(12_500_000));
        assert_eq!((parse_rate("500kB/s"), parse_rate("2GB/s")), (bytes(500_000), bytes(2_000_000_000)));
        assert!(["100", "100/s", " 2.5 "].into_iter().all(is_plain_rate));
        assert!(!["100MiB/s", "1Gbit/s", "none", "", "fast"].into_iter().any(is_plain_rate));
        assert_eq!(parse_limit("none"), Ok(None));
        assert_eq!(Rate(PageRate::from_pages_per_sec(25_600)).to_string(), "100 MiB/s");
        assert_eq!(Rate(PageRate::from_pages_per_sec(387_652)).to_string(), "1514 MiB/s");
        assert_eq!(Limit(None).to_string(), "none");
    }

    #[test]
    fn people_write_durations() {
        assert_eq!(parse_duration("10ms"), Ok(Duration::from_millis(10)));
        assert_eq!(parse_duration("2.5s"), Ok(Duration::from_millis(2500)));
        assert_eq!(parse_duration("250us"), Ok(Duration::from_micros(250)));
        assert_eq!(parse_duration("86400s"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse_seconds("8"), Ok(Duration::from_secs(8)));
        assert_eq!(parse_seconds("0.25s"), Ok(Duration::from_millis(250)));
    }

    #[test]
    fn absurd_input_is_refused_with_what_is_allowed() {
        let nothing = ["", " ", ".", "..", "1.2.3MiB", "-1", "+1MiB/s", "٣MiB", "inf", "NaN", "MiB", "none"];
        for text in nothing {
            let error = parse_size(text).unwrap_err();
            assert!(error.contains(text.trim()) && error.contains("KiB, MiB, GiB"), "{error}");
            let error = parse_rate(text).unwrap_err();
            assert!(error.contains(text.trim()) && error.contains("MiB/s"), "{error}");
            assert!(parse_duration(text).unwrap_err().contains("`ms`"), "{text}");
            assert!(parse_seconds(text).unwrap_err().contains("seconds"), "{text}");
        }
        for text in ["1e400MiB/s", "1Mb/s", "1mb/s", "1mib/s", "1MiB/m", "1MiB /s/s", "0x10", "1\0"] {
            assert!(parse_rate(text).unwrap_err().contains("unknown unit"), "{text}");
        }
        assert!(parse_size("1MB").unwrap_err().contains("unknown unit `MB`"), "memory comes in powers of two");
        assert!(parse_rate("1mb/s").unwrap_err().contains("QEMU's MB/s are MiB/s"));
        let huge = "9".repeat(400);
        for text in ["18446744073709551616", "18446744073709551616GiB", "16385GiB", huge.as_str()] {
            assert!(parse_size(text).is_err() && parse_rate(text).is_err(), "{text}");
            assert!(parse_seconds(text).is_err() && parse_duration(&format!("{text}s")).is_err(), "{text}");
        }
        for text in ["0", "0.5", "1KiB", "4097KiB", "0.3MiB"] {
            assert!(parse_size(text).unwrap_err().contains("whole number of pages"), "{text}");
        }
        assert!(parse_rate("0").unwrap_err().contains("`none`"));
        assert!(parse_duration("10").unwrap_err().contains("lacks its unit"));
        assert!(parse_duration("10m").unwrap_err().contains("unknown unit `m`"));
        assert!(parse_duration("86401s").unwrap_err().contains("at most a day"));
        assert!(parse_seconds("10ms").unwrap_err().contains("seconds"));
        assert_eq!((parse_percent("5"), parse_percent("2.5 %")), (Ok(5.0), Ok(2.5)));
        assert!(
            ["-5", "5ms", "", "inf", "1e3"].iter().all(|text| parse_percent(text).unwrap_err().contains("(5, 2.5)"))
        );
    }

    #[test]
    fn four_digits_say_enough() {
        assert_eq!(significant(0.0, 4), "0");
        assert_eq!(significant(100.0, 4), "100");
        assert_eq!(significant(99.944, 4), "99.94");
        assert_eq!(significant(-0.012_345, 3), "-0.0123");
        assert_eq!(significant(123_456.7, 4), "123457");
    }

    proptest! {
        #[test]
        fn a_rate_reads_back(bytes in 4u64..=1 << 44) {
            let rate = PageRate::from_bytes_per_sec(bytes, PAGE_SIZE);
            let back = parse_rate(&Rate(rate).to_string()).unwrap();
            let (was, is) = (mib_per_sec(rate, PAGE_SIZE), mib_per_sec(back, PAGE_SIZE));
            prop_assert!((was - is).abs() <= was * 5e-4 + RATE_QUANTUM / MIB, "{was} came back as {is}");
        }

        #[test]
        fn a_slow_rate_reads_back(bytes in 4u64..=1 << 20) {
            let rate = PageRate::from_bytes_per_sec(bytes, PAGE_SIZE);
            let back = parse_rate(&Rate(rate).to_string()).unwrap();
            let (was, is) = (mib_per_sec(rate, PAGE_SIZE), mib_per_sec(back, PAGE_SIZE));
            prop_assert!((was - is).abs() <= was * 5e-4 + RATE_QUANTUM / MIB, "{was} came back as {is}");
        }

        #[test]
        fn a_size_reads_back_exactly(pages in 1u64..=1 << 32) {
            let bytes = pages * u64::from(PAGE_SIZE);
            prop_assert_eq!(parse_size(&Size(bytes).to_string()), Ok(bytes));
        }

        #[test]
        fn a_duration_reads_back(us in 0u64..=86_400_000_000, halved in 0..37) {
            let time = Duration::from_micros(us >> halved);
            prop_assert_eq!(parse_duration(&Time(time).to_string()), Ok(time));
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = (parse_size(&text), parse_rate(&text), parse_duration(&text), parse_seconds(&text));
        }

        #[test]
        fn no_number_panics(text in "[0-9.]{0,400}(KiB|MiB|GiB|MB|Gbit|/s|us|ms|s|)?(/s)?") {
            let _ = (parse_size(&text), parse_rate(&text), parse_duration(&text), parse_seconds(&text));
        }
    }
}
