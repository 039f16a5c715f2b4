//! One tick over all vCPUs: PREPARE → CALCULATE → SET PENALTY, and the control plane that sets limits and asks.

mod enforce;
mod store;

use core::fmt;
use heapless::Vec;

use crate::calculate::{Claim, Policy, level, share};
use crate::prepare::{Counters, Counts, RateEstimator, Sample, Totals};
use crate::rate::{Nanos, PageRate};
use crate::set_penalty::{Penalty, Terms, VmCell};
use crate::sync::{Mutex, array_of, const_fn};
use crate::vcpu_cell::VcpuCell;
pub use enforce::Unenforced;
use enforce::{Facts, Seen, Watch};
pub use store::{Inline, Store};

/// Which of the limiter's vCPUs: its place in the table, free for reuse once unregistered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VcpuIndex(u16);

impl VcpuIndex {
    /// As a number below the limiter's capacity.
    pub const fn get(self) -> usize {
        self.0 as usize
    }
}

/// The limiter has no place for another vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full {
    /// How many it takes.
    pub capacity: usize,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "all {} places for vCPUs are taken", self.capacity)
    }
}

impl core::error::Error for Full {}

/// What is known of one vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Status {
    /// The limit set for it; `None`: unlimited.
    pub limit: Option<PageRate>,
    /// The limit in force: the lesser of its own and its share of the VM's budget.
    pub effective_limit: Option<PageRate>,
    /// Its dirty page rate, smoothed over 100 ms, as of the last tick.
    pub rate: PageRate,
    /// The rate that it would have if it did not pause, between the last two ticks.
    pub demand: PageRate,
    /// The penalty in force.
    pub penalty: Penalty,
    /// Where the limit cannot be held within the longest pause: the pause it would need, in ns, because of the interval of one
    /// page, or because the vCPU dirties too many pages before it can be stopped (PML without a kick).
    pub needs_pause: Option<Nanos>,
    /// Why the limit in force is not held, as far as seen in the last seconds; `None` where it is, or there is none.
    pub unenforced: Option<Unenforced>,
    /// Everything counted since it was registered, up to now.
    pub totals: Totals,
}

/// A row of the table: the controller's own memory of a vCPU.
#[derive(Debug)]
struct Row<S> {
    estimator: RateEstimator,
    limit: Option<PageRate>,
    effective: Option<PageRate>,
    weight: u32,
    /// On the VM's budget, as of its last split.
    claim: Claim,
    penalty: Penalty,
    watch: Watch,
    state: S,
}

impl<S: Default> Row<S> {
    fn new(cell: &VcpuCell, limit: Option<PageRate>) -> Self {
        let estimator = RateEstimator::starting_at(cell.counters.counts());
        let watch = Watch::starting_at(seen(estimator.counts(), &cell.counters));
        let (claim, penalty) = (Claim::default(), Penalty::NONE);
        Self { estimator, limit, effective: None, weight: 1, claim, penalty, watch, state: S::default() }
    }

    fn needs_pause(&self, vm: &VmCell, counters: &Counters) -> Option<Nanos> {
        // Without a penalty, what the vCPU last needed is of no account: it may not have been charged since.
        let needs = |terms: Terms| terms.interval().of(1).max(counters.needed_pause());
        self.penalty.terms().map(needs).filter(|pause| *pause > vm.max_pause())
    }

    /// CALCULATE and SET PENALTY.
    fn calculate<P: Policy<State = S>>(&mut self, policy: &P, sample: &Sample, cell: &VcpuCell) {
        self.penalty = match self.effective {
            Some(limit) => policy.penalty(&mut self.state, sample, limit, self.penalty),
            None => {
                self.state = S::default();
                Penalty::NONE
            }
        };
        cell.penalty.set(self.penalty);
    }

    /// Puts the vCPU's own limit and its share of the budget in force; applies a change at once.
    fn limit_to<P: Policy<State = S>>(&mut self, policy: &P, level: Option<PageRate>, cell: &VcpuCell) {
        let share = level.map(|level| share(level, self.weight).max(PageRate::MIN_LIMIT));
        let effective = [self.limit, share].into_iter().flatten().min();
        if self.effective != effective {
            self.effective = effective;
            self.calculate(policy, &Sample::default(), cell);
        }
    }
}

struct Table<P: Policy, S: Store> {
    policy: P,
    /// A place is `None` while no vCPU has it.
    rows: S::Rows<Option<Row<P::State>>>,
    /// For vCPUs that register later.
    limit: Option<PageRate>,
    budget: Option<PageRate>,
    level: Option<PageRate>,
    ticked: Option<Nanos>,
}

/// The controller of one VM's vCPUs, as many as its [`Store`] has room for.
///
/// The control plane (everything but [`Limiter::cell`] and [`Limiter::vm`]) takes a spin lock, so that calls from any
/// thread take effect one after the other; vCPU threads never touch it. Nothing allocates (but a store that does), reads a
/// clock or panics.
pub struct Limiter<P: Policy, S: Store> {
    vm: VmCell,
    cells: S::Cells,
    table: Mutex<Table<P, S>>,
}

impl<P: Policy, S: Store> fmt::Debug for Limiter<P, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter").field("vm", &self.vm).finish_non_exhaustive()
    }
}

impl<P: Policy, const N: usize> Limiter<P, Inline<N>> {
    const_fn! {
        /// A limiter without vCPUs; usable in a `static`.
        pub fn new(policy: P) -> Self {
            const { assert!(0 < N && N <= 1 << 16, "a limiter has room for 1 to 65,536 vCPUs") };
            Self::over(policy, array_of![VcpuCell::new(); N], Vec::new())
        }
    }
}

impl<P: Policy, S: Store> Limiter<P, S> {
    const_fn! {
        fn over(policy: P, cells: S::Cells, rows: S::Rows<Option<Row<P::State>>>) -> Self {
            let table = Table { policy, rows, limit: None, budget: None, level: None, ticked: None };
            Self { vm: VmCell::new(), cells, table: Mutex::new(table) }
        }
    }

    /// A limiter without vCPUs that keeps them in these cells.
    pub fn with_cells(policy: P, cells: S::Cells) -> Self {
        Self::over(policy, cells, S::Rows::default())
    }

    /// The words that all vCPUs read.
    pub fn vm(&self) -> &VmCell {
        &self.vm
    }

    /// The words of one vCPU.
    pub fn cell(&self, index: VcpuIndex) -> Option<&VcpuCell> {
        S::cell(&self.cells, index.get())
    }

    /// Gives a new vCPU a place, with the limit last set for all.
    ///
    /// # Errors
    /// Where all places are taken.
    pub fn register(&self) -> Result<VcpuIndex, Full> {
        let table = &mut *self.table.lock();
        let rows = table.rows.as_mut();
        let last = rows.len();
        let place = rows.iter().position(Option::is_none).unwrap_or(last);
        let full = Full { capacity: last };
        let index = u16::try_from(place).map_err(|_| full)?;
        let cell = S::make_cell(&self.cells, place).ok_or(full)?;
        if place == last && !S::push(&mut table.rows, None) {
            return Err(full);
        }
        let row = table.rows.as_mut().get_mut(place).ok_or(full)?.insert(Row::new(cell, table.limit));
        row.limit_to(&table.policy, table.level, cell);
        cell.request.grant(); // its last owner's
        Ok(VcpuIndex(index))
    }

    /// Takes a vCPU's place back and its penalty away; the place's next owner inherits nothing.
    pub fn unregister(&self, index: VcpuIndex) {
        let mut table = self.table.lock();
        if let (Some(row), Some(cell)) = (table.rows.as_mut().get_mut(index.get()), self.cell(index)) {
            *row = None;
            cell.penalty.set(Penalty::NONE);
        }
    }

    /// Limits a vCPU (`None` cancels), at once as far as the policy needs no measurement first. Limits below
    /// [`PageRate::MIN_LIMIT`] are raised to it. Does nothing for a place without a vCPU.
    pub fn set_limit(&self, index: VcpuIndex, limit: Option<PageRate>) {
        self.with_row(index, |row, table_policy, level, cell| {
            row.limit = at_least_minimal(limit);
            row.limit_to(table_policy, level, cell);
        });
    }

    /// Limits every vCPU, present and to come (`None` cancels).
    pub fn set_limit_all(&self, limit: Option<PageRate>) {
        let table = &mut *self.table.lock();
        table.limit = at_least_minimal(limit);
        for (row, cell) in vcpus::<S, _>(table.rows.as_mut(), &self.cells) {
            row.limit = table.limit;
            row.limit_to(&table.policy, table.level, cell);
        }
    }

    /// Sets the whole VM's budget (`None`: no budget), split among the vCPUs at once by what is known of their demand, and
    /// again each tick. Each vCPU may use as much as the level allows it, so that one which turns hot between two ticks is
    /// not held at what it did before.
    pub fn set_vm_limit(&self, budget: Option<PageRate>) {
        let mut table = self.table.lock();
        table.budget = at_least_minimal(budget);
        table.split(&self.cells);
    }

    /// The whole VM's budget, if it has one.
    pub fn vm_limit(&self) -> Option<PageRate> {
        self.table.lock().budget
    }

    /// How much a vCPU counts in the split of the VM's budget; 1 by default, 0 counts as 1.
    pub fn set_weight(&self, index: VcpuIndex, weight: u32) {
        self.with_row(index, |row, _, _, _| row.weight = weight.max(1));
    }

    /// Changes the policy of every vCPU.
    pub fn set_policy(&self, policy: P) {
        let table = &mut *self.table.lock();
        table.policy = policy;
        for (row, cell) in vcpus::<S, _>(table.rows.as_mut(), &self.cells) {
            row.state = P::State::default();
            row.calculate(&table.policy, &Sample::default(), cell);
        }
    }

    /// What is known of a vCPU at `now`; `None` where the place has none.
    pub fn query(&self, index: VcpuIndex, now: Nanos) -> Option<Status> {
        let mut table = self.table.lock();
        let row = table.rows.as_mut().get_mut(index.get())?.as_mut()?;
        let counters = &self.cell(index)?.counters;
        row.estimator.fold(counters);
        let needs_pause = row.needs_pause(&self.vm, counters);
        let unenforced = match row.effective {
            Some(_) if !self.vm.is_leased(now) => Some(Unenforced::Lapsed),
            Some(_) => row.watch.verdict().or(needs_pause.map(|_| Unenforced::NeedsPause)),
            None => None,
        };
        Some(Status {
            limit: row.limit,
            effective_limit: row.effective,
            rate: row.estimator.rate(),
            demand: row.estimator.demand(),
            penalty: row.penalty,
            needs_pause,
            unenforced,
            totals: row.estimator.totals(counters),
        })
    }

    /// Adds what every vCPU's counters have counted to its totals: to be called where no ticks come, before a counter can
    /// wrap (2³² pages). A tick does, and a query for its vCPU.
    pub fn fold(&self) {
        for (row, cell) in vcpus::<S, _>(self.table.lock().rows.as_mut(), &self.cells) {
            row.estimator.fold(&cell.counters);
        }
    }

    /// The next vCPU whose [`Status::unenforced`] a tick changed since this last told it, and to what, for a log; `None`
    /// when all is told. A lapsed lease is not among it: that is the VM's, and no tick tells it.
    pub fn news(&self) -> Option<(VcpuIndex, Option<Unenforced>)> {
        let mut table = self.table.lock();
        let mut rows = table.rows.as_mut().iter_mut().enumerate();
        rows.find_map(|(place, row)| Some((VcpuIndex(u16::try_from(place).ok()?), row.as_mut()?.watch.news()?)))
    }

    /// One tick: reads every vCPU's counters, sets every penalty, renews the lease. To be called at least every
    /// [`VmCell::LEASE`], or the penalties lapse; usually every 10 to 100 ms. A time before the last tick's counts as
    /// none passed. Linear in the highest number of vCPUs there were.
    pub fn tick(&self, now: Nanos) {
        let table = &mut *self.table.lock();
        let elapsed = now.saturating_sub(table.ticked.unwrap_or(now));
        table.ticked = Some(now);
        self.vm.renew(now);
        for (row, cell) in vcpus::<S, _>(table.rows.as_mut(), &self.cells) {
            let needs_pause = row.needs_pause(&self.vm, &cell.counters).is_some();
            let facts = Facts { limit: row.effective, needs_pause, taken: self.vm.is_taken(now) };
            let sample = row.estimator.read(&cell.counters, elapsed);
            row.watch.look(elapsed, seen(row.estimator.counts(), &cell.counters), facts);
            row.calculate(&table.policy, &sample, cell);
        }
        if table.budget.is_some() {
            table.split(&self.cells);
        }
    }

    fn with_row(&self, index: VcpuIndex, change: impl FnOnce(&mut Row<P::State>, &P, Option<PageRate>, &VcpuCell)) {
        let table = &mut *self.table.lock();
        if let (Some(Some(row)), Some(cell)) = (table.rows.as_mut().get_mut(index.get()), self.cell(index)) {
            change(row, &table.policy, table.level, cell);
        }
    }
}

impl<P: Policy, S: Store> Table<P, S> {
    /// Splits the budget by the demands of the last tick.
    fn split(&mut self, cells: &S::Cells) {
        self.level = self.budget.map(|budget| {
            let rows = self.rows.as_mut();
            for row in rows.iter_mut().flatten() {
                let demand = row.estimator.demand();
                row.claim = Claim::new(row.limit.map_or(demand, |limit| limit.min(demand)), row.weight);
            }
            // Where every demand is covered, any one vCPU may still grow to the whole.
            level(rows.iter().flatten().map(|row| row.claim), budget).unwrap_or(budget)
        });
        for (row, cell) in vcpus::<S, _>(self.rows.as_mut(), cells) {
            row.limit_to(&self.policy, self.level, cell);
        }
    }
}

/// Each vCPU's row and its words.
fn vcpus<'a, S: Store, R>(
    rows: &'a mut [Option<R>],
    cells: &'a S::Cells,
) -> impl Iterator<Item = (&'a mut R, &'a VcpuCell)> {
    let rows = rows.iter_mut().enumerate();
    rows.filter_map(|(place, row)| Some((row.as_mut()?, S::cell(cells, place)?)))
}

fn seen(counts: Counts, counters: &Counters) -> Seen {
    let Counts { net, gross, .. } = counts;
    Seen { net, gross, charges: counters.charges(), overlong: counters.overlong_pauses() }
}

fn at_least_minimal(limit: Option<PageRate>) -> Option<PageRate> {
    limit.map(|limit| limit.max(PageRate::MIN_LIMIT))
}

#[cfg(test)]
mod tests;
