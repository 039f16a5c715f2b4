//! Sizes, rates and durations as people write them.

/// Bytes of a page: the guest is x86-64 and KVM's dirty ring counts its host's 4 KiB pages.
pub const PAGE_SIZE: u32 = 4096;
