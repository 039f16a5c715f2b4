//! The proof that no dirty page is lost: a copy of the guest that is kept, as a migration's destination is, only by the
//! dirty log, and compared with the guest once it stands still.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Result, bail};

use crate::GuestMemory;
use crate::PAGE_SIZE;
use crate::payload::WORKLOAD_ADDRESS;

/// A copy of a guest's memory.
///
/// Pages may be copied while the guest writes them: KVM has armed each one again before it is published, so a write that
/// the copy misses is logged once more.
#[derive(Debug)]
pub struct Shadow {
    guest: Arc<GuestMemory>,
    copy: GuestMemory,
    /// Pages that the host wrote since the last copy; KVM does not log those.
    host_written: Vec<usize>,
}

impl Shadow {
    /// A copy of what the host laid out: page tables, image, parameters. Workload memory is zero on both sides.
    ///
    /// Make it after the vCPUs and before the first of them runs; from then on every page that changes must be logged.
    ///
    /// # Errors
    /// No memory for the copy.
    pub fn new(guest: Arc<GuestMemory>) -> Result<Self> {
        let copy = GuestMemory::new(guest.bytes())?;
        // A thread that finds 2 MiB at once, as it copies, keeps a slow CPU from everybody else for milliseconds.
        copy.populate(0..copy.bytes());
        let shadow = Self { guest, copy, host_written: Vec::new() };
        let laid_out = usize::try_from(WORKLOAD_ADDRESS / u64::from(PAGE_SIZE))?.min(shadow.guest.pages());
        (0..laid_out).filter(|&page| shadow.differs(page)).for_each(|page| shadow.copy_page(page));
        Ok(shadow)
    }

    /// The host wrote this page itself; the next [`copy`](Self::copy) takes it along.
    pub fn host_wrote(&mut self, page: usize) {
        self.host_written.push(page);
    }

    /// Copies the pages whose bits are set, bit 0 of word 0 being page 0, and says how many pages it copied.
    ///
    /// # Errors
    /// A log that names a page which the guest does not have.
    pub fn copy(&mut self, log: &[u64]) -> Result<usize> {
        let mut copied = 0;
        for (index, &word) in log.iter().enumerate() {
            let mut left = word;
            while left != 0 {
                let page = index * 64 + left.trailing_zeros() as usize;
                if page >= self.guest.pages() {
                    bail!("the dirty log names page {page} of a guest that has {}", self.guest.pages());
                }
                self.copy_page(page);
                copied += 1;
                left &= left - 1;
            }
        }
        for page in std::mem::take(&mut self.host_written) {
            self.copy_page(page);
            copied += 1;
        }
        Ok(copied)
    }

    /// The pages that the copy has wrong. Only meaningful while the vCPUs stand still, after a complete sync was copied.
    pub fn lost(&self) -> Vec<usize> {
        (0..self.guest.pages()).filter(|&page| self.differs(page)).collect()
    }

    fn copy_page(&self, page: usize) {
        for (to, from) in self.copy.page(page).iter().zip(self.guest.page(page)) {
            to.store(from.load(Relaxed), Relaxed);
        }
    }

    fn differs(&self, page: usize) -> bool {
        self.copy.page(page).iter().zip(self.guest.page(page)).any(|(a, b)| a.load(Relaxed) != b.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> Arc<GuestMemory> {
        let guest = GuestMemory::new(usize::try_from(WORKLOAD_ADDRESS).unwrap() + (4 << 20)).unwrap();
        guest.write(0x10_0000, &[7, 8, 9]);
        Arc::new(guest)
    }

    #[test]
    fn only_pages_that_were_logged_are_right() {
        let guest = guest();
        let mut shadow = Shadow::new(guest.clone()).unwrap();
        assert!(shadow.lost().is_empty(), "what the host laid out is there from the start");
        guest.write(0x1000, &[1]);
        guest.write(WORKLOAD_ADDRESS + 0x41_000, &[2]);
        guest.write(WORKLOAD_ADDRESS + 0x42_ff8, &[3]);
        assert_eq!(shadow.lost(), [1, 0x1041, 0x1042]);
        let mut log = vec![0; guest.pages() / 64];
        log[0x1041 / 64] |= 1 << (0x1041 % 64);
        assert_eq!(shadow.copy(&log).unwrap(), 1);
        assert_eq!(shadow.lost(), [1, 0x1042]);
        shadow.host_wrote(1);
        assert_eq!(shadow.copy(&[]).unwrap(), 1);
        assert_eq!(shadow.copy(&[]).unwrap(), 0, "a host's write is copied once");
        assert_eq!(shadow.lost(), [0x1042]);
    }

    #[test]
    fn a_log_longer_than_the_guest_may_only_be_padded_with_zeros() {
        let guest = guest();
        let mut shadow = Shadow::new(guest.clone()).unwrap();
        let mut log = vec![0; guest.pages() / 64 + 1];
        assert_eq!(shadow.copy(&log).unwrap(), 0);
        *log.last_mut().unwrap() = 1;
        assert!(shadow.copy(&log).unwrap_err().to_string().contains(&guest.pages().to_string()));
    }
}
