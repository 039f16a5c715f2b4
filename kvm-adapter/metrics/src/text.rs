//! From OpenMetrics to Prometheus' older text format.

use std::collections::HashSet;

/// The two differ little: in the older one a counter's family is called as its samples are, and no comment but HELP and
/// TYPE means anything.
pub(super) fn prometheus(openmetrics: &str) -> String {
    let typed = openmetrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"));
    let counters: HashSet<&str> = typed.collect();
    let mut text = String::with_capacity(openmetrics.len());
    for line in openmetrics.lines() {
        let mut words = line.splitn(4, ' ');
        match [(); 4].map(|()| words.next()) {
            [Some("#"), Some(what @ ("HELP" | "TYPE")), Some(name), Some(rest)] => {
                let total = if counters.contains(name) { "_total" } else { "" };
                text.extend(["# ", what, " ", name, total, " ", rest]);
            }
            [Some("#"), ..] => continue,
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}
