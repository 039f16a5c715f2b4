//! A VM that is no KVM, for what is tested from outside this crate.

use std::fs::File;

use dirtylimit_core::Page;

use crate::fake::{Fake, Goes, PAGES, SLOT};
use crate::{DirtyLimit, Vcpu};

/// The VM, with one slot of 10,000 pages and rings of 1,024 entries.
#[derive(Debug)]
pub struct FakeVm {
    fake: Fake,
    /// The limiter.
    pub limit: DirtyLimit,
    /// The vCPUs' handles, in the order of their ids.
    pub vcpus: Vec<Vcpu>,
    _files: Vec<File>,
}

impl FakeVm {
    /// With vCPUs of these ids.
    pub fn new(ids: &[u32]) -> Self {
        let fake = Fake::new();
        let limit = fake.small();
        let _files: Vec<_> = ids.iter().map(|_| fake.vcpu(1024)).collect();
        let vcpus = ids.iter().zip(&_files).map(|(id, file)| limit.add_vcpu(*id, file).unwrap()).collect();
        Self { fake, limit, vcpus, _files }
    }

    /// The guest writes the pages from `first` on, up to a full exit; how many it wrote. `vcpu` counts from 0.
    pub fn write(&self, vcpu: usize, first: u64, pages: u64) -> u32 {
        self.fake.write_all(vcpu, first..first.saturating_add(pages).min(PAGES))
    }

    /// The guest writes a page that the slot does not have.
    pub fn write_beyond(&self, vcpu: usize) {
        self.fake.write(vcpu, Page { slot: SLOT, offset: PAGES });
    }

    /// The next reset is disturbed.
    pub fn disturb(&self) {
        self.fake.script([Goes::Disturbed]);
    }
}
