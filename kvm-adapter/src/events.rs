//! What a log is told, with the feature `log`: changes of state. Without it nothing here is compiled into anything.
//!
//! Only the control plane's threads tell: a vCPU's may sit in a signal handler, where a logger's lock must not be taken.
//! What happens there is kept under the harvest's lock, and told by the next tick or sweep.

use std::mem::replace;
use std::{fmt, iter};

use dirtylimit_core::{Nanos, PageRate, Unenforced};

use crate::harvest::Row;
use crate::sys;
use crate::told::State;
use crate::vm::{Locked, Vm};

#[cfg(feature = "log")]
pub(crate) use log::{error, info, warn};

/// Checks the message's types, and does nothing.
#[cfg(not(feature = "log"))]
macro_rules! nothing {
    ($($message:tt)*) => { if false { let _ = format_args!($($message)*); } };
}
#[cfg(not(feature = "log"))]
pub(crate) use {nothing as error, nothing as info, nothing as warn};

/// Tells what has changed since it was last told.
pub(crate) fn tell(vm: &Vm, now: Nanos) {
    if cfg!(feature = "log") {
        if let Some(harvest) = vm.try_lock() {
            tell_changes(vm, harvest, now);
        }
    }
}

fn tell_changes(vm: &Vm, mut harvest: Locked<'_>, now: Nanos) {
    let is_lapsed = |row: &Row| {
        let status = vm.limiter.query(row.shared.index, now);
        status.is_some_and(|status| status.unenforced == Some(Unenforced::Lapsed))
    };
    let lapsed = !vm.limiter.vm().is_leased(now) && harvest.rows.values().any(is_lapsed);
    let mut unserved = None;
    for (id, row) in &mut harvest.rows {
        if row.life.is_unserved(&row.shared.cell(&vm.limiter).counters, row.shared.is_full(), now) {
            unserved = unserved.or(Some(*id));
        }
    }
    let is = State { lapsed, unserved, ..harvest.state() };
    let was = replace(&mut harvest.told, is);
    let verdicts: Vec<_> = iter::from_fn(|| vm.limiter.news())
        .filter_map(|(index, why)| Some((harvest.rows.values().find(|row| row.shared.index == index)?.shared.id, why)))
        .collect();
    drop(harvest);
    match (was.lapsed, is.lapsed) {
        (false, true) => warn!("no tick has come for over 5 s: limits have lapsed"),
        (true, false) => info!("limits hold again"),
        _ => {}
    }
    if let (true, Some(id)) = (was.unserved != is.unserved, is.unserved) {
        warn!(
            "vCPU {id} left KVM_RUN with a full ring over a second ago, and its thread has not called before_run since: it \
             is stopped, or the VMM forgets to"
        );
    }
    for (id, why) in verdicts {
        match why {
            Some(why) => warn!("the limit of vCPU {id} is not enforced: {why}"),
            None => info!("the limit of vCPU {id} is enforced again, or lifted"),
        }
    }
    if was.soft_limit != is.soft_limit && was.soft_limit > 0 && is.soft_limit > 0 {
        info!("a ring is full at {} entries, not {}", is.soft_limit, was.soft_limit);
    }
    if was.suspect_resets < is.suspect_resets {
        let more = is.suspect_resets - was.suspect_resets;
        warn!("{more} resets were short or disturbed: their pages are dirty in every take until they are armed again");
    }
    match (was.reset_error, is.reset_error) {
        (was, Some(errno)) if was != is.reset_error => {
            error!("KVM_RESET_DIRTY_RINGS fails, errno {errno}: what was collected waits for a later one");
        }
        (Some(_), None) => info!("KVM_RESET_DIRTY_RINGS works again"),
        _ => {}
    }
    if let (true, Some(id)) = (was.wedged != is.wedged, is.wedged) {
        error!("the dirty ring of vCPU {id} is wedged: its dirty pages are unknown");
    }
}

/// To be called before a tick: tells if it comes too late.
pub(crate) fn tell_lapse(vm: &Vm, now: Nanos) {
    let lease = vm.limiter.vm();
    // Before the first tick it is as if renewed when the clock began.
    if cfg!(feature = "log") && !lease.is_leased(now) && !lease.is_leased(0) {
        tell_changes(vm, vm.lock(), now);
    }
}

/// Tells when it is dropped.
pub(crate) struct ThrottleThreadEnds;

impl Drop for ThrottleThreadEnds {
    fn drop(&mut self) {
        info!("the throttle thread ends");
    }
}

/// A limit, for people.
pub(crate) struct Limit(pub(crate) Option<PageRate>);

impl fmt::Display for Limit {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(rate) => write!(f, "{:.1} MiB/s", rate.bytes_per_sec(sys::page_size()) as f64 / f64::from(1 << 20)),
            None => f.write_str("none"),
        }
    }
}
