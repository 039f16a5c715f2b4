//! Sizes, rates, durations and workloads as people write them, and as nobody does: nothing panics, what is accepted is what
//! decimal arithmetic says and in range, what is refused says so with the text, and what is printed reads back.
#![no_main]

use std::time::Duration;

use dirtylimit_core::PageRate;
use libfuzzer_sys::fuzz_target;

#[path = "../../benches/src/units.rs"]
#[expect(unreachable_pub, reason = "the harness's own file")]
mod units;
#[path = "../../benches/src/workload.rs"]
#[expect(dead_code, unreachable_pub, reason = "as above")]
mod workload;

use units::{
    Limit, PAGE_SIZE, Rate, Size, Time, is_plain_rate, parse_duration, parse_limit, parse_percent, parse_rate,
    parse_seconds, parse_size,
};
use workload::Workload;

/// A number and its unit, as exact as a fraction: so many 10^-places. `None` for those too long to tell.
fn decimal(text: &str) -> Option<(u128, u32, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let places = u32::try_from(fraction.len()).ok().filter(|places| *places <= 15)?;
    Some((format!("{whole}{fraction}").parse().ok().filter(|digits| *digits < 1 << 53)?, places, unit.trim_start()))
}

/// `found` is `digits` × 10^-places × `scale`, to what a double and a rounding lose.
fn assert_exact(text: &str, found: f64, scale: f64) {
    if let Some((digits, places, _)) = decimal(text) {
        let exact = digits as f64 * scale / 10f64.powi(places as i32);
        assert!((found - exact).abs() <= exact * 1e-12 + 1.0, "{text:?} is {exact}, not {found}");
    }
}

fn scale_of(text: &str) -> f64 {
    let unit = decimal(text).map_or("", |(.., unit)| unit);
    match unit.trim_end_matches("/s").trim_end() {
        "KiB" => 1024.0,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "Mbit" => 1e6 / 8.0,
        "Gbit" => 1e9 / 8.0,
        _ => f64::from(PAGE_SIZE),
    }
}

fn assert_told(text: &str, error: &str) {
    assert!(!error.is_empty() && error.len() < text.len() + 240, "{text:?}: {error}");
}

fn check_rate(text: &str, rate: PageRate) {
    assert!((PageRate::MIN_LIMIT..=PageRate::MAX).contains(&rate), "{text:?} is {rate:?}");
    // 1/1024 page a second is 4 bytes a second.
    assert_exact(text, rate.bytes_per_sec(PAGE_SIZE) as f64 / 4.0, scale_of(text) / 4.0);
    let back = parse_rate(&Rate(rate).to_string()).expect("what is printed reads back");
    let (was, is) = (rate.bytes_per_sec(PAGE_SIZE), back.bytes_per_sec(PAGE_SIZE));
    assert!(was.abs_diff(is) <= was / 2000 + 4, "{rate:?} came back as {back:?}");
}

fn check_time(text: &str, time: Duration) {
    assert!(time <= Duration::from_secs(86_400), "{text:?} is {time:?}");
    let time = Duration::from_micros(time.as_micros() as u64);
    assert_eq!(parse_duration(&Time(time).to_string()), Ok(time), "{text:?}");
}

fuzz_target!(|text: &str| {
    match parse_size(text) {
        Ok(bytes) => {
            assert!(bytes > 0 && bytes <= 1 << 44 && bytes % u64::from(PAGE_SIZE) == 0);
            assert_exact(text, bytes as f64, scale_of(text));
            assert_eq!(parse_size(&Size(bytes).to_string()), Ok(bytes));
        }
        Err(error) => assert_told(text, &error),
    }
    match parse_rate(text) {
        Ok(rate) => {
            check_rate(text, rate);
            let plain =
                text.trim_end().trim_end_matches("/s").trim_end().ends_with(|c: char| c.is_ascii_digit() || c == '.');
            assert_eq!(is_plain_rate(text), plain, "{text:?}");
        }
        Err(error) => assert_told(text, &error),
    }
    match parse_limit(text) {
        Ok(Some(rate)) => assert_eq!(Ok(rate), parse_rate(text)),
        Ok(None) => assert_eq!(text, Limit(None).to_string()),
        Err(error) => assert_eq!(Err(error), parse_rate(text)),
    }
    for (parsed, units) in [(parse_duration(text), true), (parse_seconds(text), false)] {
        match parsed {
            Ok(time) => check_time(text, time),
            Err(error) => assert_told(text, &error),
        }
        assert!(!units || !text.trim().ends_with(|c: char| c.is_ascii_digit()) || parse_duration(text).is_err());
    }
    match parse_percent(text) {
        Ok(percent) => assert!(percent.is_finite() && percent >= 0.0, "{text:?} is {percent}"),
        Err(error) => assert_told(text, &error),
    }
    match text.parse::<Workload>() {
        Ok(workload) => {
            assert_eq!(workload.to_string().parse(), Ok(workload));
            let maskable = workload.maskable();
            assert!(maskable.bytes() <= workload.bytes() && (maskable.bytes() > 0) == (workload.bytes() > 0));
        }
        Err(error) => assert_told(text, &error),
    }
});
