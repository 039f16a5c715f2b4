//! The series of a run as CSV, for spreadsheets and plots.

use std::fmt::Write as _;

use super::json::{ms, round};
use crate::measure::Series;
use crate::record::Recording;
use crate::units::mib_per_sec;

/// A header, then a line for each interval between two samples of each vCPU, as of its end. Pauses count when they end.
pub fn csv(recording: &Recording) -> String {
    let mut text = "time_ms,vcpu,net_mib_s,gross_mib_s,limit_mib_s,paused_pct\n".to_owned();
    for vcpu in &recording.vcpus {
        let series = Series::of(recording, vcpu);
        for (from, to) in vcpu.samples.windows(2).map(|pair| (pair[0].at, pair[1].at)) {
            let set = vcpu.limits.iter().rfind(|&&(since, _)| since < to);
            let limit = set.and_then(|&(_, limit)| Some(mib_per_sec(limit?, recording.page_size)));
            let figures =
                [series.mean_mib_s(from, to), series.gross_mib_s(from, to), limit, series.paused_pct(from, to)];
            let figures = figures.map(|figure| figure.map_or(String::new(), |figure| round(figure).to_string()));
            let _ = writeln!(text, "{},{},{}", ms(to), vcpu.index, figures.join(","));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    #[test]
    fn each_interval_of_each_vcpu_has_a_line() {
        let text = csv(&example::recording());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[..2], ["time_ms,vcpu,net_mib_s,gross_mib_s,limit_mib_s,paused_pct", "10,0,1500,1500,,0"]);
        assert!(lines.contains(&"1010,0,400,400,100,93.75") && lines.contains(&"9000,1,0,0,100,0"), "{text}");
        assert_eq!(lines.len(), 1 + 2 * 900);
    }
}
