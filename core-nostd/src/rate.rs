//! Rates and emission intervals as types: how fast a vCPU may dirty pages, and what one page costs.

/// Nanoseconds of a monotonic clock that the embedder reads; the core never reads one.
///
/// Every call on one limiter must take its times from the same clock. A clock that stops while the host is suspended
/// (`CLOCK_MONOTONIC`) is right: a suspended guest dirties nothing.
pub type Nanos = u64;

/// Nanoseconds in a second.
pub const SECOND: Nanos = 1_000_000_000;

/// A dirty page rate in pages per second, kept in 1/1024 pages per second.
///
/// Pages are the *host's* pages, as KVM's dirty ring counts them. Range: 0 to [`PageRate::MAX`]; conversions saturate.
///
/// ```
/// use dirtylimit_core::PageRate;
/// let limit = PageRate::from_bytes_per_sec(100 << 20, 4096);
/// assert_eq!(limit.pages_per_sec(), 25_600);
/// assert_eq!(limit.bytes_per_sec(4096), 100 << 20);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageRate(u64);

impl PageRate {
    const FRACTION_BITS: u32 = 10;

    /// No page at all. As a limit it is raised to [`PageRate::MIN_LIMIT`].
    pub const ZERO: Self = Self(0);
    /// 2³² pages per second: 16 TiB/s of 4 KiB pages.
    pub const MAX: Self = Self((1 << 32) << Self::FRACTION_BITS);
    /// The smallest limit: one page in 1,024 seconds.
    pub const MIN_LIMIT: Self = Self(1);

    /// `pages` in a second.
    pub const fn from_pages_per_sec(pages: u32) -> Self {
        Self((pages as u64) << Self::FRACTION_BITS)
    }

    /// `bytes` in a second, in pages of `page_size` bytes (0 counts as 1).
    #[expect(clippy::cast_possible_truncation, reason = "compared with MAX first")]
    pub const fn from_bytes_per_sec(bytes: u64, page_size: u32) -> Self {
        let page_size = if page_size == 0 { 1 } else { page_size as u128 };
        let rate = ((bytes as u128) << Self::FRACTION_BITS) / page_size;
        if rate > Self::MAX.0 as u128 { Self::MAX } else { Self(rate as u64) }
    }

    /// `pages` seen in `elapsed`; zero where no time has passed.
    #[expect(clippy::cast_possible_truncation, reason = "compared with MAX first")]
    pub const fn measured(pages: u32, elapsed: Nanos) -> Self {
        if elapsed == 0 {
            return Self::ZERO;
        }
        // 64 bits do for 2^24 pages, and a division of 128 is several times as slow.
        let rate = match ((SECOND << Self::FRACTION_BITS) as u128) * pages as u128 {
            scaled if scaled <= u64::MAX as u128 => (scaled as u64 / elapsed) as u128,
            scaled => scaled / elapsed as u128,
        };
        if rate > Self::MAX.0 as u128 { Self::MAX } else { Self(rate as u64) }
    }

    /// Whole pages per second, rounded down.
    pub const fn pages_per_sec(self) -> u64 {
        self.0 >> Self::FRACTION_BITS
    }

    /// Bytes per second in pages of `page_size` bytes, rounded down.
    pub const fn bytes_per_sec(self, page_size: u32) -> u64 {
        // At most 2^42 * 2^32: the product needs 74 bits, so the fraction goes first where it must.
        let whole = (self.0 >> Self::FRACTION_BITS).saturating_mul(page_size as u64);
        let fraction = (self.0 & ((1 << Self::FRACTION_BITS) - 1)) * page_size as u64;
        whole.saturating_add(fraction >> Self::FRACTION_BITS)
    }

    /// The rate in its own unit, 1/1024 pages per second.
    pub(crate) const fn raw(self) -> u64 {
        self.0
    }

    /// From 1/1024 pages per second, saturating at [`PageRate::MAX`].
    pub(crate) const fn from_raw(raw: u64) -> Self {
        if raw > Self::MAX.0 { Self::MAX } else { Self(raw) }
    }

    /// What one page costs at this rate: 1 s ÷ rate. [`PageRate::ZERO`] is priced as [`PageRate::MIN_LIMIT`].
    pub const fn interval(self) -> EmissionInterval {
        const SECOND_IN_UNITS: u64 = SECOND << (PageRate::FRACTION_BITS + EmissionInterval::UNIT_BITS);
        let rate = if self.0 == 0 { 1 } else { self.0 };
        EmissionInterval::from_units((SECOND_IN_UNITS / rate) as u128)
    }
}

impl core::fmt::Debug for PageRate {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} pages/s", self.pages_per_sec())
    }
}

/// What one page costs, in nanoseconds, in 31 bits: `mantissa × 2^exponent × 2⁻¹⁶ ns`.
///
/// The mantissa has 26 bits, so an interval from a rate is exact to 2⁻¹⁴ at 2³² pages/s and to 2⁻²⁵ below 6 million: one
/// 32-bit word carries every limit from one page in 20 minutes to 16 TiB/s. 0 is free.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct EmissionInterval(u32);

impl EmissionInterval {
    const UNIT_BITS: u32 = 16;
    const MANTISSA_BITS: u32 = 26;
    const MANTISSA: u32 = (1 << Self::MANTISSA_BITS) - 1;
    /// Every bit that an interval may set; the penalty keeps its kind in the one above.
    pub(crate) const BITS: u32 = u32::MAX >> 1;

    /// A page costs nothing.
    pub const FREE: Self = Self(0);
    /// The dearest page: 2⁴¹ ns, about 37 minutes.
    pub const MAX: Self = Self(Self::BITS);

    /// `nanos` a page, saturating at [`EmissionInterval::MAX`].
    pub const fn from_nanos(nanos: u64) -> Self {
        Self::from_units((nanos as u128) << Self::UNIT_BITS)
    }

    /// `total` nanoseconds split over `pages` (0 counts as 1).
    pub const fn split(total: Nanos, pages: u32) -> Self {
        let pages = if pages == 0 { 1 } else { pages as u128 };
        Self::from_units(((total as u128) << Self::UNIT_BITS) / pages)
    }

    #[expect(clippy::cast_possible_truncation, reason = "shifted down to the mantissa's width first")]
    const fn from_units(units: u128) -> Self {
        let exponent = (u128::BITS - units.leading_zeros()).saturating_sub(Self::MANTISSA_BITS);
        if exponent > 31 { Self::MAX } else { Self(exponent << Self::MANTISSA_BITS | (units >> exponent) as u32) }
    }

    #[inline]
    pub(crate) const fn from_bits(bits: u32) -> Self {
        Self(bits & Self::BITS)
    }

    pub(crate) const fn bits(self) -> u32 {
        self.0
    }

    const fn parts(self) -> (u64, u32) {
        ((self.0 & Self::MANTISSA) as u64, self.0 >> Self::MANTISSA_BITS)
    }

    /// What `pages` cost together, in nanoseconds, rounded down; saturating.
    #[expect(clippy::cast_possible_truncation, reason = "at most 2^26 * 2^32 * 2^15 = 2^73 is compared first")]
    pub const fn of(self, pages: u32) -> Nanos {
        let (mantissa, exponent) = self.parts();
        let units = mantissa * pages as u64; // below 2^58
        if exponent <= Self::UNIT_BITS {
            units >> (Self::UNIT_BITS - exponent)
        } else {
            let nanos = (units as u128) << (exponent - Self::UNIT_BITS);
            if nanos > Nanos::MAX as u128 { Nanos::MAX } else { nanos as Nanos }
        }
    }

    /// How many whole pages `time` pays for; [`u32::MAX`] where they are free or more.
    #[expect(clippy::cast_possible_truncation, reason = "compared first")]
    pub const fn pages_for(self, time: Nanos) -> u32 {
        let (mantissa, exponent) = self.parts();
        if mantissa == 0 {
            return u32::MAX;
        }
        // In units of the mantissa; 64 bits do, for no mantissa divides more by so much that it is less than 2^32.
        let time = if exponent >= Self::UNIT_BITS {
            time >> (exponent - Self::UNIT_BITS)
        } else if time.leading_zeros() >= Self::UNIT_BITS - exponent {
            time << (Self::UNIT_BITS - exponent)
        } else {
            return u32::MAX;
        };
        let pages = time / mantissa;
        if pages > u32::MAX as u64 { u32::MAX } else { pages as u32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_limit_from_1_mib_to_40_gib_is_priced_to_a_thousandth() {
        for page_size in [4096u32, 16384, 65536] {
            let mut bytes = 1u64 << 20;
            while bytes <= 40 << 30 {
                let exact = f64::from(page_size) * 1e9 / bytes as f64;
                // A million pages, so that rounding to whole nanoseconds does not count.
                let priced = PageRate::from_bytes_per_sec(bytes, page_size).interval().of(1_000_000) as f64 / 1e6;
                assert!((priced / exact - 1.0).abs() < 1e-3, "{bytes} B/s: {priced} ns, not {exact}");
                bytes += bytes / 97;
            }
        }
    }

    #[test]
    fn the_ends_of_the_range_do_not_overflow() {
        assert_eq!(PageRate::from_bytes_per_sec(u64::MAX, 1), PageRate::MAX);
        assert_eq!(PageRate::measured(u32::MAX, 1), PageRate::MAX);
        assert_eq!(PageRate::measured(1, 0), PageRate::ZERO);
        assert_eq!(PageRate::from_bytes_per_sec(4096, 0), PageRate::from_pages_per_sec(4096));
        assert_eq!(PageRate::ZERO.interval(), PageRate::MIN_LIMIT.interval());
        assert_eq!(PageRate::MIN_LIMIT.interval().of(1), 1024 * SECOND);
        assert_eq!(EmissionInterval::MAX.of(u32::MAX), Nanos::MAX);
        assert_eq!(EmissionInterval::from_nanos(u64::MAX), EmissionInterval::MAX);
        assert_eq!(EmissionInterval::FREE.pages_for(1), u32::MAX);
        assert_eq!(EmissionInterval::MAX.pages_for(1), 0);
        assert_eq!(PageRate::MAX.interval().pages_for(Nanos::MAX), u32::MAX);
    }

    #[test]
    fn prices_and_times_between_the_ends_are_exact() {
        assert_eq!(EmissionInterval::from_nanos(1 << 40).of(1), 1 << 40, "below the dearest");
        assert_eq!(EmissionInterval::from_nanos(1 << 17).pages_for(1 << 40), 1 << 23);
    }

    proptest! {
        #[test]
        fn time_pays_for_what_exact_arithmetic_says(bits in 1..=EmissionInterval::BITS, time: Nanos, small in 0..64) {
            let (interval, time) = (EmissionInterval::from_bits(bits), time >> small);
            let (mantissa, exponent) = interval.parts();
            prop_assume!(mantissa > 0);
            let exact = ((u128::from(time) << EmissionInterval::UNIT_BITS) >> exponent) / u128::from(mantissa);
            prop_assert_eq!(u128::from(interval.pages_for(time)), exact.min(u32::MAX.into()));
        }

        #[test]
        fn a_price_is_monotone_and_inverts(a in 1u64..=PageRate::MAX.0, b in 1u64..=PageRate::MAX.0, pages in 1u32..1 << 20) {
            let (slow, fast) = (PageRate(a.min(b)), PageRate(a.max(b)));
            prop_assert!(slow.interval().of(pages) >= fast.interval().of(pages));
            let time = slow.interval().of(pages);
            let back = slow.interval().pages_for(time);
            prop_assert!(back <= pages, "the time for {pages} pages must not pay for {back}");
            // `of` rounds down, so the inverse may miss what one nanosecond buys, and one page for the mantissa.
            let miss = u64::from(pages - back);
            prop_assert!(miss <= slow.pages_per_sec() / SECOND + 2, "{miss}");
        }
    }
}
