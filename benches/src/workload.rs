//! What a vCPU of the guest does.

/// What a vCPU of the guest does; sizes are bytes, in whole pages of [`units::PAGE_SIZE`](crate::units::PAGE_SIZE).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Writes one word in each page, over and over.
    Write(u64),
    /// Writes pages in random order; the size is a power of two, because the guest masks its page index.
    Random(u64),
    /// Reads one word in each page, over and over.
    Read(u64),
    /// Writes like [`Workload::Write`], with work between the writes.
    Slow(u64),
    /// Writes for 100 ms, rests for 100 ms.
    Burst(u64),
    /// Touches no memory.
    Idle,
}

impl Workload {
    /// Bytes of memory that it works on; 0 when idle.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Write(size) | Self::Random(size) | Self::Read(size) | Self::Slow(size) | Self::Burst(size) => size,
            Self::Idle => 0,
        }
    }

    /// Whether it writes memory, so that a limit can concern it.
    pub const fn writes(self) -> bool {
        !matches!(self, Self::Read(_) | Self::Idle)
    }
}
