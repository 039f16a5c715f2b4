//! No ordering of the core or the adapter is stronger than it must be, as far as the models can tell.

use dirtylimit_loom::weaken::sites;

/// The models with, for each function that orders memory, a twin that has it relaxed.
const MODELS: [&str; 4] =
    [include_str!("adapter.rs"), include_str!("machine.rs"), include_str!("penalty.rs"), include_str!("ring.rs")];

#[test]
fn every_ordering_has_a_twin_that_fails_without_it() {
    let sites = sites();
    assert!(!sites.is_empty(), "the core has no ordering stronger than relaxed: has its spelling changed?");
    for site in sites {
        let twin = format!("site(\"{}\", \"{}\")", site.file, site.function);
        assert!(MODELS.iter().any(|model| model.contains(&twin)), "no twin has {twin} of line {} relaxed", site.line);
    }
}
