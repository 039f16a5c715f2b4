//! `dirtylimit-bench scenario`: what it offers, what it refuses, and that one of them runs. How well the limiter does is
//! what it measures, and nothing that a test asserts.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use dirtylimit_bench::guest::kvm::kvm_or_skip;
use dirtylimit_bench::scenario::catalogue;
use serde_json::Value;

fn scenario(arguments: &str) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_dirtylimit-bench"));
    program.arg("scenario").args(arguments.split_whitespace()).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn the_list_has_every_name_with_what_it_shows() {
    let output = scenario("--list");
    assert!(output.status.success());
    let lines: Vec<_> = text(&output.stdout).lines().collect();
    let all = catalogue::all();
    assert_eq!(lines.len(), all.len());
    for (line, scenario) in lines.iter().zip(all) {
        assert!(line.starts_with(scenario.name) && line.ends_with(scenario.what) && line.len() <= 80, "{line}");
    }
}

#[test]
fn bad_usage_exits_2_and_says_what_is_allowed() {
    for (arguments, told) in
        [("", "<NAME>"), ("exactly", "exact-5ms"), ("interrupt --rows --json -", "cannot be used with")]
    {
        let output = scenario(arguments);
        let told_all = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "`{arguments}`: {told_all}");
        assert!(told_all.contains(told), "`{arguments}`: {told_all}");
    }
}

#[test]
fn a_report_with_nowhere_to_go_fails_before_the_runs() {
    let output = scenario("interrupt --json /nonexistent/report.json");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot write /nonexistent/report.json"), "{}", text(&output.stderr));
    assert!(!text(&output.stderr).contains("case 1 of"), "it ran first");
}

#[test]
fn a_scenario_runs_and_its_status_is_its_verdict() {
    if !kvm_or_skip() {
        return;
    }
    for name in ["interrupt", "steps"] {
        let output = scenario(&format!("{name} --json -"));
        let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        let scenarios = document["scenarios"].as_array().unwrap();
        assert_eq!((scenarios.len(), &scenarios[0]["scenario"]), (1, &Value::from(name)));
        assert_eq!(scenarios[0]["lost_pages"], 0);
        let figures = scenarios[0]["figures"].as_array().unwrap();
        assert_eq!(figures.len(), 2);
        assert!(figures.iter().all(|figure| figure["late_p999_ms"].is_f64()), "{figures:?}");
        let any = |judged: &str| figures.iter().any(|figure| figure["judged"] == judged);
        let (status, told) = match (any("missed"), any("invalid")) {
            (true, _) => (1, "MISSED"),
            (_, true) => (4, "invalid"),
            _ => (0, "all 2 figures met"),
        };
        assert_eq!(output.status.code(), Some(status), "{figures:?}");
        assert!(text(&output.stderr).contains(told), "{}", text(&output.stderr));
    }
}

#[test]
fn one_that_is_interrupted_tells_of_what_is_done() {
    if !kvm_or_skip() {
        return;
    }
    let mut program = Command::new(env!("CARGO_BIN_EXE_dirtylimit-bench"));
    program.args(["scenario", "exact", "steps", "--json", "-"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = program.spawn().unwrap();
    let mut told = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(told.any(|line| line.starts_with("exact, case 2 of 12: ") && line.ends_with(" s left")));
    assert!(Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().unwrap().success());
    assert!(told.any(|line| line == "dirtylimit-bench: interrupted"));
    let output = child.wait_with_output().unwrap();
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &document["interrupted"]), (Some(1), &Value::from(true)));
    let scenarios = document["scenarios"].as_array().unwrap();
    assert_eq!((scenarios.len(), &scenarios[0]["untried"]), (1, &Value::from(11)));
    assert!(scenarios[0]["figures"].as_array().unwrap().iter().all(|figure| figure["case"] == "2 MiB/s, ring 256"));
}

#[test]
fn rows_go_to_standard_output_alone_whatever_they_say() {
    if !kvm_or_skip() {
        return;
    }
    let output = scenario("steps --rows");
    let lines: Vec<_> = text(&output.stdout).lines().collect();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(lines.len(), 1);
    assert!(
        lines[0].starts_with("steps        none, 30, then 300 MiB/s ") && lines[0].contains("overshoot"),
        "{lines:?}"
    );
}
