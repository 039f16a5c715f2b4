//! Runs a model through every execution that loom can tell apart, up to a number of preemptions.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::weaken::{Site, weakened};

/// Preemptions in one execution: two find nearly every fault, and take seconds; `ci/loom.sh` allows one more.
const PREEMPTIONS: usize = if cfg!(dirtylimit_loom) { 3 } else { 2 };

fn count(model: impl Fn() + Send + Sync + 'static) -> (Result<(), String>, usize) {
    let executions = Arc::new(AtomicUsize::new(0));
    let counter = executions.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    // None of these may end a model early: it would pass without having been explored.
    (builder.max_permutations, builder.max_duration, builder.checkpoint_file) = (None, None, None);
    let check = || {
        builder.check(move || {
            // Relaxed: loom runs one execution after the other on this thread.
            counter.fetch_add(1, Ordering::Relaxed);
            model();
        });
    };
    let result = catch_unwind(AssertUnwindSafe(check)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
    });
    (result, executions.load(Ordering::Relaxed))
}

/// Explores `model`, prints the number of its executions and expects at least `minimum`: a model that explores fewer than
/// it did when it was written no longer tests what it did.
///
/// # Panics
/// Where the model does in any execution, or explores too few.
pub fn holds(name: &str, minimum: usize, model: impl Fn() + Send + Sync + 'static) {
    let (result, executions) = count(model);
    println!("{name}: {executions} executions, at most {PREEMPTIONS} preemptions each");
    if let Err(message) = result {
        panic!("{name}: execution {executions}: {message}");
    }
    assert!(executions >= minimum, "{name}: {executions} executions, not the {minimum} expected");
}

/// Explores the twin of a model, with one step wrong, or with the ordering at `site` relaxed; it must fail, saying `why`.
///
/// # Panics
/// Where it holds, or fails for another reason.
pub fn fails(name: &str, site: Option<Site>, why: &str, model: impl Fn() + Send + Sync + 'static) {
    let (result, executions) = weakened(site, || count(model));
    println!("{name}: fails as it must in execution {executions}");
    let message = result.expect_err("the twin holds, so its model proves nothing");
    assert!(message.contains(why), "{name} fails, but not with {why:?}: {message}");
}
