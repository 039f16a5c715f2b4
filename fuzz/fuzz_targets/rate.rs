//! Rates and emission intervals against exact arithmetic: no input overflows or panics, and every result is as exact as documented.
#![no_main]

use dirtylimit_core::{EmissionInterval, PageRate, SECOND};
use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};

/// A rate is kept in 1/1024 pages per second.
const RATE_UNITS: u128 = 1024;
/// `PageRate::MAX` in those units.
const MAX_RATE: u128 = (1 << 32) * RATE_UNITS;

#[derive(Arbitrary, Debug)]
struct Input {
    bytes: u64,
    page_size: u32,
    pages: u32,
    nanos: u64,
}

/// The rate in its own units, read back through the public interface alone.
fn units(rate: PageRate) -> u128 {
    // 1,024-byte pages turn the fraction into whole bytes.
    u128::from(rate.bytes_per_sec(1024))
}

/// `found` is `exact`, rounded to at least `bits` significant bits and then down to whole numbers.
fn assert_close(found: u64, exact: u128, bits: u32, what: &str) {
    let found = u128::from(found);
    let slack = (exact >> bits) + 1;
    assert!(found <= exact + slack && found + slack >= exact, "{what}: {found}, exactly {exact}, may miss {slack}");
}

fn check_price(interval: EmissionInterval, pages: u32, nanos: u64) {
    // What the time buys never costs more than the time, and one page more would, to the mantissa's last bit.
    let bought = interval.pages_for(nanos);
    assert!(interval.of(bought) <= nanos || bought == u32::MAX, "{bought} pages cost more than {nanos} ns");
    if bought < u32::MAX {
        let more = u128::from(interval.of(bought + 1));
        let slack = u128::from(interval.of(1)) + 1;
        assert!(more + slack >= u128::from(nanos), "{nanos} ns buy more than {bought} pages");
    }
    // The time for some pages pays for no more of them, unless they cost less than a nanosecond each.
    assert!(interval.of(pages) <= interval.of(pages.saturating_add(1)), "more pages cost less");
}

fuzz_target!(|input: Input| {
    let Input { bytes, page_size, pages, nanos } = input;

    let rate = PageRate::from_bytes_per_sec(bytes, page_size);
    let size = u128::from(page_size.max(1));
    let exact = u128::from(bytes) * RATE_UNITS / size;
    assert_eq!(units(rate), exact.min(MAX_RATE));
    assert_eq!(u128::from(rate.pages_per_sec()), exact.min(MAX_RATE) / RATE_UNITS);
    let back = exact.min(MAX_RATE) * size / RATE_UNITS;
    assert_eq!(u128::from(rate.bytes_per_sec(page_size.max(1))), back.min(u128::from(u64::MAX)));

    let whole = PageRate::from_pages_per_sec(pages);
    assert_eq!(whole.pages_per_sec(), u64::from(pages));

    let measured = PageRate::measured(pages, nanos);
    let exact = (u128::from(pages) * u128::from(SECOND) * RATE_UNITS).checked_div(u128::from(nanos)).unwrap_or(0);
    assert_eq!(units(measured), exact.min(MAX_RATE));

    for rate in [rate, whole, measured] {
        let interval = rate.interval();
        // One page's interval in 2⁻¹⁶ ns first, which loses up to 2⁻¹⁴ at the highest rates; then 26 bits of it.
        let exact = u128::from(pages) * u128::from(SECOND) * RATE_UNITS / units(rate).max(1);
        assert_close(interval.of(pages), exact.min(u128::from(u64::MAX)), 13, "the interval of pages at a rate");
        check_price(interval, pages, nanos);
    }

    for (interval, exact) in [
        (EmissionInterval::from_nanos(bytes), u128::from(bytes)),
        (EmissionInterval::split(bytes, pages), u128::from(bytes) / u128::from(pages.max(1))),
    ] {
        const DEAREST: u128 = 1 << 41;
        if exact < DEAREST {
            assert_close(interval.of(1), exact, 25, "an interval from nanoseconds");
        } else {
            assert_eq!(interval, EmissionInterval::MAX);
        }
        check_price(interval, page_size, nanos);
    }
    assert!(rate.interval().of(pages) >= PageRate::MAX.interval().of(pages), "no rate is cheaper than the highest");
});
