//! What an interrupted reset may have left unprotected.
//!
//! KVM empties an entry first and protects its page later: it gathers pages of one slot that lie in one window of 64 (a word
//! of bits) for as long as the next entry belongs to them, and protects them all at once. Since Linux 6.17 it looks for a
//! pending signal before each entry, and returns with what it has gathered forgotten (`kvm_dirty_ring_reset`,
//! virt/kvm/dirty_ring.c). So the pages at risk are one *run*: they end with the last entry given back of the ring at
//! which it stopped. User space sees which entries were given back, and so knows the run.

use dirtylimit_core::Page;

/// Pages in a window: the bits of the kernel's `unsigned long`. (A 32-bit kernel's windows lie inside of these.)
const WINDOW: u64 = 64;

/// The longest run that a reset can have had gathered when it stopped, found backwards from the entry given back last.
/// Wherever the kernel began to gather, its run is a part of this one: entries in a row, of one slot, in one window.
#[derive(Debug, Default)]
pub(crate) struct LastRun {
    /// Slot, lowest and highest page.
    so_far: Option<(u32, u64, u64)>,
}

impl LastRun {
    /// Whether the page of the entry before belongs to the run too; after the first that does not, the run is known.
    pub(crate) fn reaches(&mut self, page: Page) -> bool {
        let (slot, low, high) = self.so_far.unwrap_or((page.slot, page.offset, page.offset));
        let (low, high) = (low.min(page.offset), high.max(page.offset));
        let reaches = slot == page.slot && high - low < WINDOW;
        if reaches {
            self.so_far = Some((slot, low, high));
        }
        reaches
    }
}

#[cfg(all(test, dirtylimit_planted))]
mod tests {
    use super::*;
    use crate::fake::Gathered;

    /// What the kernel has gathered after these entries, and what is said of it.
    fn both(pages: &[Page]) -> (Vec<Page>, Vec<Page>) {
        let mut gathered = Gathered::default();
        for page in pages {
            gathered.add(*page);
        }
        let mut run = LastRun::default();
        let mut said: Vec<_> = pages.iter().rev().copied().take_while(|page| run.reaches(*page)).collect();
        said.sort_unstable();
        said.dedup();
        (gathered.pages(), said)
    }

    fn of_slot(slot: u32, offsets: &[u64]) -> Vec<Page> {
        offsets.iter().map(|offset| Page { slot, offset: *offset }).collect()
    }

    #[test]
    fn the_run_is_the_kernels() {
        let last = u64::MAX;
        for (offsets, run) in [
            (&[5][..], &[5][..]),
            (&[0, 63], &[0, 63]),
            (&[0, 64], &[64]),
            (&[63, 0], &[0, 63]),
            (&[64, 0], &[0]),
            (&[100, 3, 2, 1], &[1, 2, 3]),
            (&[7, 7, 7], &[7]),
            (&[last - 63, last], &[last - 63, last]),
            (&[last - 64, last], &[last]),
        ] {
            let (kernel, said) = both(&of_slot(3, offsets));
            assert_eq!((&kernel, said), (&of_slot(3, run), of_slot(3, run)), "{offsets:?}");
        }
        // Another slot, or another address space, ends it.
        let mut pages = of_slot(3, &[1, 2]);
        pages.extend(of_slot(0x1_0003, &[3]));
        assert_eq!(both(&pages), (of_slot(0x1_0003, &[3]), of_slot(0x1_0003, &[3])));
    }

    #[test]
    fn what_the_kernel_has_gathered_is_never_outside_the_run() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut exact = 0;
        for _ in 0..20_000 {
            let span = random.choice([8, 70, 150, 1000]).unwrap();
            let length = random.usize(1..100);
            let mut at = random.u64(0..1000);
            let pages: Vec<_> = (0..length)
                .map(|_| {
                    at = if random.u8(0..4) > 0 { at.wrapping_add(1) } else { random.u64(0..span) };
                    Page { slot: u32::from(random.u8(0..20) == 0), offset: at }
                })
                .collect();
            let (kernel, said) = both(&pages);
            assert!(kernel.iter().all(|page| said.contains(page)), "{pages:?}: {kernel:?}, {said:?}");
            assert!(said.len() <= 64 && said[said.len() - 1].offset - said[0].offset < 64);
            exact += u32::from(kernel == said);
        }
        assert!(exact > 5000, "{exact}");
    }
}
