//! The pages that KVM itself logs.
//!
//! KVM pushes ring entries without a guest instruction: the steal-time page at nearly every entry and exit, asynchronous
//! page faults, the clock page, nested state. They are to be sent as any dirty page, but the guest did not write them, so
//! they must not use up its slice.

use crate::ring::Page;

/// Pages remembered for each vCPU. Today's kernels have four kinds of their own, of one page each.
const OWN_PAGES: usize = 8;

/// The few pages of one vCPU that KVM logs itself, as far as recognised; where there are more, the oldest is forgotten.
///
/// A page is unprotected from the moment it is logged until its entry is reset, so the guest's writes log it once. Who logs
/// it *again* meanwhile is KVM, which does so unconditionally. The first entry of such a page counts as the guest's. A page
/// that two vCPUs, or two mappings of the guest, write at the same moment can be misjudged: its entries then use up no
/// slice, but whenever it becomes dirty it is charged like any other.
#[derive(Debug)]
pub(crate) struct OwnPages {
    pages: [Option<Page>; OWN_PAGES],
    oldest: usize,
}

impl OwnPages {
    /// None known.
    pub(crate) const fn new() -> Self {
        Self { pages: [None; OWN_PAGES], oldest: 0 }
    }

    /// Whether an entry of `page` is KVM's own. `again`: an entry of the same page was in a ring already, not reset. For
    /// the ring's owner; at most [`OWN_PAGES`] comparisons.
    #[inline]
    pub(crate) fn is_own(&mut self, page: Page, again: bool) -> bool {
        // Filled from the front: most vCPUs have none, or one.
        for known in &self.pages {
            match known {
                Some(known) if *known == page => return true,
                Some(_) => {}
                None => break,
            }
        }
        if again {
            self.claim(page);
        }
        again
    }

    #[cold]
    fn claim(&mut self, page: Page) {
        if let Some(oldest) = self.pages.get_mut(self.oldest) {
            *oldest = Some(page);
        }
        self.oldest = (self.oldest + 1) % OWN_PAGES;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(offset: u64) -> Page {
        Page { slot: 1, offset }
    }

    #[test]
    fn who_logs_a_page_again_before_its_reset_owns_it_from_then_on() {
        let mut own = OwnPages::new();
        assert!(!own.is_own(page(7), false), "the first looks like the guest's");
        assert!(own.is_own(page(7), true));
        assert!(own.is_own(page(7), false), "after a reset too");
        assert!(!own.is_own(page(8), false) && !own.is_own(Page { slot: 2, offset: 7 }, false));
    }

    #[test]
    fn a_few_are_remembered_and_the_oldest_goes() {
        let mut own = OwnPages::new();
        for offset in 0..9 {
            assert!(own.is_own(page(offset), true));
        }
        assert!(!own.is_own(page(0), false));
        assert!((1..9).all(|offset| own.is_own(page(offset), false)));
        for offset in 100..200 {
            own.is_own(page(offset), true);
        }
        assert_eq!((0..200).filter(|&offset| own.is_own(page(offset), false)).count(), OWN_PAGES);
    }
}
