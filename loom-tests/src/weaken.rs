//! Takes one memory ordering of the core's or the adapter's source away, for as long as a twin runs.

use std::cell::Cell;
use std::panic::Location;
use std::sync::atomic::Ordering;

/// A place in the core or the adapter that is stronger than relaxed: the first such line of a function, counted from its `fn`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Site {
    /// File of `core-nostd/src` or `kvm-adapter/src`.
    pub file: &'static str,
    /// The line that names the ordering.
    pub line: u32,
    /// The function around it.
    pub function: &'static str,
}

thread_local! {
    /// loom runs the threads of a model as coroutines on one real thread, so this reaches all of one model and no other.
    static WEAKENED: Cell<Option<Site>> = const { Cell::new(None) };
}

const SOURCES: [(&str, &str); 14] = [
    ("accept_penalty/machine.rs", include_str!("../../core-nostd/src/accept_penalty/machine.rs")),
    ("accept_penalty/pacer.rs", include_str!("../../core-nostd/src/accept_penalty/pacer.rs")),
    ("accept_penalty/vcpu_ring.rs", include_str!("../../core-nostd/src/accept_penalty/vcpu_ring.rs")),
    ("calculate/mod.rs", include_str!("../../core-nostd/src/calculate/mod.rs")),
    ("calculate/share.rs", include_str!("../../core-nostd/src/calculate/share.rs")),
    ("controller/mod.rs", include_str!("../../core-nostd/src/controller/mod.rs")),
    ("prepare.rs", include_str!("../../core-nostd/src/prepare.rs")),
    ("rate.rs", include_str!("../../core-nostd/src/rate.rs")),
    ("ring/consumer.rs", include_str!("../../core-nostd/src/ring/consumer.rs")),
    ("set_penalty.rs", include_str!("../../core-nostd/src/set_penalty.rs")),
    ("vcpu_cell.rs", include_str!("../../core-nostd/src/vcpu_cell.rs")),
    ("kick.rs", include_str!("../../kvm-adapter/src/kick.rs")),
    ("shared.rs", include_str!("../../kvm-adapter/src/shared.rs")),
    ("throttle.rs", include_str!("../../kvm-adapter/src/throttle.rs")),
];

/// Every line of them, outside their tests, with an ordering stronger than relaxed.
pub fn sites() -> Vec<Site> {
    let mut sites = vec![];
    for (file, source) in SOURCES {
        let mut function = "";
        for (line, text) in (1..).zip(source.lines()) {
            if text == "#[cfg(test)]" {
                break;
            }
            let code = text.split("//").next().unwrap_or("");
            if let Some((_, rest)) = code.split_once("fn ") {
                function = rest.split(['(', '<']).next().unwrap_or("");
            }
            if ["Acquire", "Release", "AcqRel", "SeqCst"]
                .iter()
                .any(|order| code.contains(&format!("Ordering::{order}")))
            {
                sites.push(Site { file, line, function });
            }
        }
    }
    sites
}

/// The site in `function` of `file`.
///
/// # Panics
/// Where there is none, or more than one.
pub fn site(file: &str, function: &str) -> Site {
    let found: Vec<_> = sites().into_iter().filter(|site| (site.file, site.function) == (file, function)).collect();
    assert_eq!(found.len(), 1, "{file}, fn {function}: {found:?}");
    found[0]
}

/// Calls `run` with `site` relaxed.
pub(crate) fn weakened<R>(site: Option<Site>, run: impl FnOnce() -> R) -> R {
    WEAKENED.set(site);
    let result = run();
    WEAKENED.set(None);
    result
}

/// The ordering in force at `caller`.
pub(crate) fn order(order: Ordering, caller: &Location<'_>) -> Ordering {
    match WEAKENED.get() {
        Some(site) if site.line == caller.line() && caller.file().ends_with(site.file) => Ordering::Relaxed,
        _ => order,
    }
}
