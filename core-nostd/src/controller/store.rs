//! Where a limiter keeps its vCPUs: in itself, or in memory of the embedder's that grows with their number.

use heapless::Vec;

use crate::vcpu_cell::VcpuCell;

/// Where a limiter keeps its vCPUs' words and its own rows of them: [`Inline`], or what an embedder that allocates brings.
pub trait Store {
    /// The words of all vCPUs.
    type Cells;
    /// The rows of the limiter's table, which its lock guards.
    type Rows<R>: AsMut<[R]> + Default;

    /// The words of the vCPU at a place; `None` where none were made. From any thread, and by each vCPU's often: to be
    /// wait-free. They stay where they are while the limiter lives.
    fn cell(cells: &Self::Cells, place: usize) -> Option<&VcpuCell>;

    /// The same, made where they are not there: places come one after the other. `None` where there is no room for them.
    /// Under the limiter's lock.
    fn make_cell(cells: &Self::Cells, place: usize) -> Option<&VcpuCell> {
        Self::cell(cells, place)
    }

    /// Puts a row after the last one; whether there was room. Under the limiter's lock.
    fn push<R>(rows: &mut Self::Rows<R>, row: R) -> bool;
}

/// Room for `N` vCPUs (at most 65,536) in the limiter itself, which may be a `static`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inline<const N: usize>;

impl<const N: usize> Store for Inline<N> {
    type Cells = [VcpuCell; N];
    type Rows<R> = Vec<R, N>;

    fn cell(cells: &Self::Cells, place: usize) -> Option<&VcpuCell> {
        cells.get(place)
    }

    fn push<R>(rows: &mut Self::Rows<R>, row: R) -> bool {
        rows.push(row).is_ok()
    }
}
