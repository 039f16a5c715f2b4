//! The limiter's memory of vCPUs, which grows with their number.

use std::array;
use std::sync::OnceLock;

use dirtylimit_core::{Store, VcpuCell};

/// More vCPUs than any KVM allows (x86: 4,096).
const MAX: usize = 8192;
/// Cells that are made at once: 8 KiB.
const CHUNK: usize = 64;

/// Up to 8,192 vCPUs.
#[derive(Debug)]
pub(crate) struct Growing;

/// The cells, which vCPU threads find without a lock while more are made.
#[derive(Debug)]
pub(crate) struct VcpuCells([OnceLock<Box<[VcpuCell; CHUNK]>>; MAX / CHUNK]);

impl VcpuCells {
    /// None yet.
    pub(crate) const fn new() -> Self {
        Self([const { OnceLock::new() }; MAX / CHUNK])
    }
}

impl Store for Growing {
    type Cells = VcpuCells;
    type Rows<R> = Vec<R>;

    fn cell(cells: &VcpuCells, place: usize) -> Option<&VcpuCell> {
        cells.0.get(place / CHUNK)?.get()?.get(place % CHUNK)
    }

    fn make_cell(cells: &VcpuCells, place: usize) -> Option<&VcpuCell> {
        cells.0.get(place / CHUNK)?.get_or_init(|| Box::new(array::from_fn(|_| VcpuCell::new())));
        Self::cell(cells, place)
    }

    fn push<R>(rows: &mut Vec<R>, row: R) -> bool {
        rows.push(row);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::VmLimiter;
    use dirtylimit_core::{Full, Shipped};

    #[test]
    fn a_limiter_takes_8192_vcpus_and_no_more() {
        let limiter = VmLimiter::with_cells(Shipped::default(), VcpuCells::new());
        let indices: Vec<_> = (0..MAX).map(|_| limiter.register().unwrap()).collect();
        let cells: std::collections::BTreeSet<_> =
            indices.iter().map(|index| std::ptr::from_ref(limiter.cell(*index).unwrap())).collect();
        assert_eq!(cells.len(), MAX);
        assert_eq!(limiter.register(), Err(Full { capacity: MAX }));
        limiter.unregister(indices[100]);
        assert_eq!(limiter.register(), Ok(indices[100]));
    }

    #[test]
    fn cells_are_made_as_they_are_needed_and_stay() {
        let cells = VcpuCells::new();
        assert!(Growing::cell(&cells, 0).is_none());
        let first = std::ptr::from_ref(Growing::make_cell(&cells, 0).unwrap());
        assert!(Growing::cell(&cells, CHUNK - 1).is_some() && Growing::cell(&cells, CHUNK).is_none());
        assert!((1..MAX).all(|place| Growing::make_cell(&cells, place).is_some()));
        assert_eq!(Growing::cell(&cells, 0).map(std::ptr::from_ref), Some(first));
        assert!(Growing::make_cell(&cells, MAX).is_none());
    }
}
