//! Everything that is known of a VM at one moment: for monitors, such as `dirtylimit-qmp` and `dirtylimit-metrics`.

use std::collections::BTreeMap;
use std::time::Duration;

use dirtylimit_core::{PageRate, Status};

use crate::harvest::Stats;
use crate::limit::DirtyLimit;
use crate::sys;

/// Everything that is known of a VM and its vCPUs at one moment.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct Snapshot {
    /// The budget of the whole VM; `None` where there is none.
    pub vm_limit: Option<PageRate>,
    /// The longest single pause of a vCPU: [`DirtyLimit::max_pause`].
    pub max_pause: Duration,
    /// Whether ticks come. Where none has come for 5 s, no limit is in force.
    pub leased: bool,
    /// Pages whose entries wait in the rings: dirty, and not in the log yet.
    pub held_back: u64,
    /// What was harvested so far.
    pub stats: Stats,
    /// What is known of each vCPU, by its id.
    pub vcpus: BTreeMap<u32, Status>,
}

impl DirtyLimit {
    /// What [`DirtyLimit::query`], [`DirtyLimit::held_back`] and [`DirtyLimit::stats`] answer for the whole VM, under one
    /// lock: as of the last [`DirtyLimit::meter`] or tick. From any thread; time and memory grow with the number of vCPUs.
    pub fn snapshot(&self) -> Snapshot {
        let (harvest, limiter, now) = (self.0.lock(), &self.0.limiter, sys::now());
        let places = &harvest.places;
        let vcpus = places.iter().filter_map(|(id, place)| Some((*id, limiter.query(place.seat.index, now)?)));
        Snapshot {
            vm_limit: limiter.vm_limit(),
            max_pause: self.max_pause(),
            leased: limiter.vm().is_leased(now),
            held_back: places.values().map(|place| u64::from(place.ring().held_back())).sum(),
            stats: harvest.stats(),
            vcpus: vcpus.collect(),
        }
    }
}
