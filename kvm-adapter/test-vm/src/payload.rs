//! What runs inside the guest: the built-in image, and the words that host and guest exchange with it.
//!
//! The image is position independent code for CPL 3 of x86-64 or EL1 of 64-bit Arm, assembled with the harness itself, so
//! that nothing but Rust and a linker is needed. It keeps the guest ABI of the harness, as any flat binary in its place must:
//! loaded at [`IMAGE_ADDRESS`], entered at its first byte by every vCPU with rdi (Arm: x0) = its stats page, rbp (x1) = its
//! parameter block, rsp (sp) = the top of its own stack, all other registers 0.
//!
//! *TSC* means the counter that the guest reads: that of x86-64, and CNTVCT_EL0 of Arm.
//!
//! The loop of every mode is: access a page, read the TSC, count the access and the gap since the last read, turn `delay`
//! empty loops. It uses no stack, so the only memory it writes besides its pages is its stats page. That is dirtied too,
//! and limited: what it waits for that page is a gap of its own, or a low limit's two pauses would look like one.

#[cfg(target_arch = "aarch64")]
#[path = "payload/aarch64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "payload/x86_64.rs"]
mod arch;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Guest-physical address of the image.
pub const IMAGE_ADDRESS: u64 = 0x10_0000;
/// The largest image, in bytes.
pub const IMAGE_MAX: usize = 0x10_0000;
/// Guest-physical address of the first byte of workload memory.
pub const WORKLOAD_ADDRESS: u64 = 0x100_0000;
/// Words of the parameter block; the ABI fixes the first seven, the harness uses two more.
pub const PARAMETER_WORDS: usize = 9;

/// What a vCPU does with its memory: word 4 of the parameter block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Mode {
    /// Increments one word in each page, in order, over and over.
    Write = 0,
    /// Reads one word in each page, in order, over and over.
    Read = 1,
    /// Increments one word in a page drawn at random, over and over.
    Random = 2,
    /// Touches nothing; rings the doorbell for ever.
    Idle = 3,
    /// [`Mode::Write`] for a half period, then the doorbell for a half period; time in which the vCPU was paused counts.
    Burst = 4,
}

/// The parameter block: what the host tells a vCPU before it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Guest-physical start of the vCPU's memory.
    pub start: u64,
    /// Its end, exclusive.
    pub end: u64,
    /// Bytes from one access to the next; for [`Mode::Random`] the mask of the page index.
    pub stride: u64,
    /// Empty loop turns after each access.
    pub delay: u64,
    /// What to do.
    pub mode: Mode,
    /// Gaps of more TSC ticks than this are counted as stalls.
    pub stall_ticks: u64,
    /// The vCPU's index.
    pub index: u64,
    /// [`Mode::Burst`]: TSC ticks of half a period.
    pub half_period: u64,
    /// Guest-physical address where a store means "nothing to do for now"; 0 makes the guest spin instead.
    pub doorbell: u64,
}

impl Parameters {
    /// The block as the guest reads it.
    pub const fn words(&self) -> [u64; PARAMETER_WORDS] {
        [
            self.start,
            self.end,
            self.stride,
            self.delay,
            self.mode as u64,
            self.stall_ticks,
            self.index,
            self.half_period,
            self.doorbell,
        ]
    }
}

/// Where the guest keeps what it counts: indices of u64 words in its stats page.
pub mod stats {
    /// Accesses since the start; only the guest writes it.
    pub const ACCESSES: usize = 0;
    /// The longest gap between two TSC reads; the host may zero it.
    pub const LONGEST: usize = 1;
    /// Gaps over the threshold; the host may zero it.
    pub const GAPS: usize = 2;
    /// The TSC at the start.
    pub const START_TSC: usize = 3;
    /// Sum of the gaps over the threshold; the host may zero it.
    pub const GAPS_SUM: usize = 4;
    /// The last TSC read.
    pub const LAST_TSC: usize = 5;
    /// `HISTOGRAM + b`: gaps over the threshold whose highest set bit is `b`; the host may zero them.
    pub const HISTOGRAM: usize = 32;
    /// Words of the histogram.
    pub const HISTOGRAM_WORDS: usize = 64;
    /// `FINE + n`: the same gaps by `gap >> fine_shift`, the last word for all beyond; the host may zero them. The
    /// built-in image keeps it; another need not.
    pub const FINE: usize = 128;
    /// Words of the fine histogram: to the end of the page.
    pub const FINE_WORDS: usize = 384;

    /// Ticks that a word of it stands for, as a power of two, where the TSC has `hz` ticks a second: 50 to 100 µs as a rule.
    pub const fn fine_shift(hz: u64) -> u32 {
        super::arch::fine_shift(hz)
    }
}

unsafe extern "C" {
    static dirtylimit_payload_start: u8;
    static dirtylimit_payload_end: u8;
}

/// The built-in image.
pub fn image() -> &'static [u8] {
    let (start, end) = (&raw const dirtylimit_payload_start, &raw const dirtylimit_payload_end);
    // SAFETY: both labels stand in one section of this binary, the end after the start, and the bytes between them are
    // read-only data for the life of the process.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Reads an image that stands in for the built-in one.
///
/// # Errors
/// A file that cannot be read, is empty, or is larger than [`IMAGE_MAX`].
pub fn load(path: &Path) -> Result<Vec<u8>> {
    let name = path.display();
    let file = File::open(path).with_context(|| format!("cannot open the payload {name}"))?;
    let mut image = Vec::new();
    // One byte more than fits tells a file that is too large from one that just fits, without reading all of it.
    file.take(IMAGE_MAX as u64 + 1)
        .read_to_end(&mut image)
        .with_context(|| format!("cannot read the payload {name}"))?;
    check(&image).with_context(|| format!("the payload {name} cannot be loaded"))?;
    Ok(image)
}

/// Whether an image can be loaded.
///
/// # Errors
/// An empty image, one larger than [`IMAGE_MAX`], or a file that is no flat binary.
pub fn check(image: &[u8]) -> Result<()> {
    ensure!(!image.is_empty(), "the image is empty");
    ensure!(
        !image.starts_with(b"\x7fELF"),
        "it is an ELF file: a payload is a flat binary, as objcopy -O binary makes it"
    );
    ensure!(image.len() <= IMAGE_MAX, "the image is larger than {IMAGE_MAX} bytes, the most that fits");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_begins_with_its_entry_and_fits() {
        check(image()).unwrap();
        // Nothing was laid before the entry, which is the first byte by the ABI.
        assert_eq!(image()[..4], arch::FIRST);
    }

    #[test]
    fn an_image_that_does_not_fit_is_refused() {
        assert!(check(&[]).is_err());
        assert!(check(&vec![0x90; IMAGE_MAX]).is_ok());
        assert!(check(&vec![0x90; IMAGE_MAX + 1]).is_err());
        assert!(load(&std::env::current_exe().unwrap()).is_err());
        assert!(check(b"\x7fELF\x02").unwrap_err().to_string().contains("flat binary"));
        assert!(load(Path::new("/nowhere/payload")).unwrap_err().to_string().contains("/nowhere/payload"));
        // A file without an end is refused too, rather than read for ever.
        assert!(load(Path::new("/dev/zero")).is_err());
    }
}
