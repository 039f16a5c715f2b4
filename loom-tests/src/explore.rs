//! Runs a model through every execution that loom can tell apart.
//!
//! A bound on preemptions makes large models possible, but together with loom's partial-order reduction it leaves out
//! executions that need fewer (with two, `entries_are_handed_over` never logged over a reset entry, which takes one). So
//! models are small and unbounded where they can be, and each bounded one has a twin that fails within the same bound.
//!
//! loom remembers the last access to an atomic alone, so a thread that loads and then stores one (as `Counters::add_pages`
//! does) hides its store from others that had loaded before. Such a thread is the model's first, whose stores the others'
//! loads are then tried against.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::weaken::{Site, weakened};

/// Whether models are to be as large as minutes allow (`ci/loom.sh`), not seconds (`cargo test`).
pub const FULL: bool = cfg!(dirtylimit_loom);

/// No bound on preemptions.
pub const ALL: Option<usize> = None;

fn count(preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) -> (Result<(), String>, usize) {
    let executions = Arc::new(AtomicUsize::new(0));
    let counter = executions.clone();
    let mut builder = loom::model::Builder::new();
    // None of these may end a model early: it would pass without having been explored.
    (builder.max_permutations, builder.max_duration, builder.checkpoint_file) = (None, None, None);
    builder.preemption_bound = preemptions;
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

/// Explores `model`, with at most `preemptions` in one execution, prints the number of its executions and expects at least `minimum`: a model that explores fewer than
/// it did when it was written no longer tests what it did.
///
/// # Panics
/// Where the model does in any execution, or explores too few.
pub fn holds(name: &str, preemptions: Option<usize>, minimum: usize, model: impl Fn() + Send + Sync + 'static) {
    let (result, executions) = count(preemptions, model);
    let bound = preemptions.map_or("all".into(), |bound| format!("up to {bound} preemptions each"));
    println!("{name}: {executions} executions, {bound}");
    if let Err(message) = result {
        panic!("{name}: execution {executions}: {message}");
    }
    assert!(executions >= minimum, "{name}: {executions} executions, not the {minimum} expected");
}

/// Explores the twin of a model, with one step wrong, or with the ordering at `site` relaxed; it must fail, saying `why`.
///
/// # Panics
/// Where it holds, or fails for another reason.
pub fn fails(
    name: &str,
    preemptions: Option<usize>,
    site: Option<Site>,
    why: &str,
    model: impl Fn() + Send + Sync + 'static,
) {
    let (result, executions) = weakened(site, || count(preemptions, model));
    let Err(message) = result else {
        panic!("{name}: holds in all of {executions} executions: its model proves nothing")
    };
    assert!(message.contains(why), "{name}: fails, but not with {why:?}: {message}");
    println!("{name}: fails as it must, in execution {executions}");
}
