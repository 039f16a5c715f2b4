//! What a vCPU of the guest does.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::units::{Size, parse_size};

/// What a vCPU of the guest does; sizes are bytes, in whole pages of [`units::PAGE_SIZE`](crate::units::PAGE_SIZE).
///
/// Its text is `write:224MiB`, or `idle`; [`FromStr`] and [`Display`](fmt::Display) are each other's inverse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Writes one word in each page, over and over.
    Write(u64),
    /// Writes pages in random order; a guest needs a power of two, see [`Workload::maskable`].
    Random(u64),
    /// Reads one word in each page, over and over.
    Read(u64),
    /// Writes like [`Workload::Write`], with work between the writes.
    Slow(u64),
    /// The same with less of it, as a realistic guest's: about a million pages a second on a CPU of 500 million instructions.
    Steady(u64),
    /// Writes for 100 ms, rests for 100 ms.
    Burst(u64),
    /// Touches no memory.
    Idle,
}

impl Workload {
    /// Bytes of memory that it works on; 0 when idle.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Write(size)
            | Self::Random(size)
            | Self::Read(size)
            | Self::Slow(size)
            | Self::Steady(size)
            | Self::Burst(size) => size,
            Self::Idle => 0,
        }
    }

    /// Whether it writes memory, so that a limit can concern it.
    pub const fn writes(self) -> bool {
        !matches!(self, Self::Read(_) | Self::Idle)
    }

    /// The same, but a random writer's size rounded down to a power of two: the guest ABI has it mask its page index.
    pub const fn maskable(self) -> Self {
        match self {
            Self::Random(size) if size != 0 => Self::Random(1 << size.ilog2()),
            other => other,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Write(_) => "write",
            Self::Random(_) => "random",
            Self::Read(_) => "read",
            Self::Slow(_) => "slow",
            Self::Steady(_) => "steady",
            Self::Burst(_) => "burst",
            Self::Idle => "idle",
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle => f.write_str(self.name()),
            _ => write!(f, "{}:{}", self.name(), Size(self.bytes())),
        }
    }
}

impl Serialize for Workload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const ALLOWED: &str =
            "write:SIZE, random:SIZE, read:SIZE, slow:SIZE, steady:SIZE, burst:SIZE or idle (as in write:224MiB)";
        let (name, size) = match text.split_once(':') {
            Some((name, size)) => (name, Some(size)),
            None => (text, None),
        };
        let workload: fn(u64) -> Self = match name {
            "write" => Self::Write,
            "random" => Self::Random,
            "read" => Self::Read,
            "slow" => Self::Slow,
            "steady" => Self::Steady,
            "burst" => Self::Burst,
            "idle" if size.is_none() => return Ok(Self::Idle),
            "idle" => return Err(format!("`{text}`: idle takes no size")),
            _ => return Err(format!("unknown workload `{name}`: {ALLOWED}")),
        };
        let size = size.ok_or_else(|| format!("`{name}` lacks its size: {ALLOWED}"))?;
        parse_size(size).map(workload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_reads_back() {
        for text in ["write:224MiB", "random:256MiB", "read:32MiB", "slow:1GiB", "steady:8MiB", "burst:28KiB", "idle"] {
            assert_eq!(text.parse::<Workload>().unwrap().to_string(), text);
        }
        assert_eq!("random:224MiB".parse(), Ok(Workload::Random(224 << 20)));
        assert_eq!(Workload::Random(224 << 20).maskable(), Workload::Random(128 << 20));
        assert_eq!(Workload::Random(256 << 20).maskable(), Workload::Random(256 << 20));
        assert_eq!(Workload::Write(224 << 20).maskable(), Workload::Write(224 << 20));
        assert_eq!("write:1".parse(), Ok(Workload::Write(4096)));
    }

    #[test]
    fn a_wrong_workload_is_told_what_is_allowed() {
        for (text, told) in [
            ("", "write:SIZE"),
            ("wirte:1MiB", "unknown workload `wirte`"),
            ("write", "lacks its size"),
            ("write:", "does not start with a number"),
            ("write:0", "whole number of pages"),
            ("random:0", "whole number of pages"),
            ("idle:1MiB", "no size"),
            ("write:1MiB:2", "unknown unit"),
        ] {
            let error = text.parse::<Workload>().unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
