//! The program itself: its exit status, and what it says to whom.

use std::process::{Command, Output};

use serde_json::Value;

fn bench(arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dirtylimit-bench")).args(arguments.split_whitespace()).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn help_lists_every_option_of_the_manual() {
    let output = bench("run --help");
    assert!(output.status.success());
    let help = text(&output.stdout);
    for option in
        "guest workload vcpus limit vm-limit policy ring max-pause pass free-seconds seconds steps payload qmp metrics fail-over json csv svg report"
            .split_whitespace()
    {
        assert!(help.contains(&format!("--{option} <")), "--{option} is missing:\n{help}");
    }
    assert!(help.contains("--steal-time") && help.contains("steady:SIZE"), "{help}");
    assert!(help.contains("MB/s is MiB/s here"), "{help}");
    for default in ["write:224MiB", "100MiB/s", "paced", "4096", "10ms", "1s", "8"] {
        assert!(help.contains(&format!("[default: {default}]")), "default {default} is missing:\n{help}");
    }
}

#[test]
fn help_tells_the_exit_statuses() {
    for command in ["run", "scenario", "compare"] {
        let output = bench(&format!("{command} --help"));
        assert!(text(&output.stdout).contains("\nExit status: 0 "), "{command}");
    }
}

#[test]
fn bad_usage_exits_2_and_says_what_is_allowed() {
    for (arguments, told) in [
        ("", "Usage"),
        ("walk", "unrecognized subcommand"),
        ("run --speed 3", "unexpected argument"),
        ("run --limit fast", "KiB/s, MiB/s, GiB/s"),
        ("run --workload wirte:1MiB", "write:SIZE"),
        ("run --ring 3000", "power of two"),
        ("run --vcpus 0", "1 to 1024"),
        ("run --limit 1MiB/s --limit 2MiB/s", "once for all, or once per vCPU"),
        ("run --steps 1MiB/s@9s", "before the end"),
        ("run --seconds 1e9", "seconds"),
        ("lab", "Usage"),
        ("lab xen -- probe", "unrecognized subcommand"),
        ("lab setup", "<MACHINE>"),
        ("lab setup xen", "[possible values: svm, vmx, arm64]"),
        ("lab svm", "as in lab svm -- probe"),
        ("lab svm --kernel 5.10 -- probe", "[possible values: 6.1, 6.12, newest]"),
        ("lab svm --cpus 0 -- probe", "1 to 16"),
        ("lab vmx --cpus 2 -- probe", "1 to 1"),
        ("lab svm --memory 1MiB -- probe", "256MiB to 32GiB"),
        ("lab svm --silence soon -- probe", "duration"),
        ("lab svm probe", "unexpected argument"),
    ] {
        let output = bench(arguments);
        let told_all = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "`{arguments}`: {told_all}");
        assert!(told_all.contains(told), "`{arguments}`: {told_all}");
        assert!(output.stdout.is_empty(), "`{arguments}` wrote to stdout");
    }
}

#[test]
fn a_report_with_nowhere_to_go_fails_before_the_run() {
    let output = bench("run --guest sim --json /nonexistent/report.json");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot write /nonexistent/report.json"), "{}", text(&output.stderr));
    assert!(!text(&output.stderr).contains("running free"), "it ran first");
}

#[test]
fn a_page_with_nowhere_to_go_fails_before_the_run() {
    for (directory, told) in [("Cargo.toml", "Cargo.toml/index.html"), ("/proc/report", "/proc/report/index.html")] {
        for command in ["run --guest sim", "scenario interrupt"] {
            let output = bench(&format!("{command} --report {directory}"));
            assert_eq!(output.status.code(), Some(1), "{command}");
            let told_all = text(&output.stderr);
            assert!(told_all.contains(&format!("--report: cannot write {told}")), "{told_all}");
            assert!(!told_all.contains("running free") && !told_all.contains("run 1"), "it ran first: {told_all}");
        }
    }
}

#[test]
fn json_on_stdout_is_one_document_and_nothing_else() {
    let output = bench("run --guest sim --seconds 2 --limit 50MiB/s --json -");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["guest"], "sim");
    assert_eq!(document["vcpus"][0]["limit_mib_s"], 50.0);
    assert!(text(&output.stderr).contains("verdict: "), "the table goes to stderr then");
}

#[test]
fn csv_on_stdout_is_the_series_and_nothing_else() {
    let output = bench("run --guest sim --free-seconds 0.2 --seconds 0.5 --vcpus 2 --csv -");
    let lines: Vec<_> = text(&output.stdout).lines().map(|line| line.split(',').count()).collect();
    assert_eq!(lines, [6; 1 + 2 * 69], "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("verdict: "), "the table goes to stderr then");
}

#[test]
fn an_error_above_what_is_allowed_is_a_status() {
    // Pauses of 10 ms are too short for 25 pages a second.
    let run = |options: &str| bench(&format!("run --guest sim --free-seconds 0.2 --seconds 2 {options}"));
    let failed = run("--limit 0.1MiB/s --fail-over 5");
    assert_eq!(failed.status.code(), Some(4), "{}", text(&failed.stderr));
    assert!(text(&failed.stderr).contains(" % is above 5 %") && text(&failed.stdout).contains("verdict: "));
    for kept in ["--limit 0.1MiB/s", "--limit 100MiB/s --fail-over 5", "--workload write:16MiB --fail-over 5"] {
        assert!(run(kept).status.success(), "{kept}");
    }
}

#[test]
fn a_limit_in_pages_is_pointed_out_on_stderr() {
    let output = bench("run --guest sim --free-seconds 0.2 --seconds 0.5 --limit 256 --json -");
    assert!(output.status.success());
    assert!(
        text(&output.stderr).contains("--limit 256: that is pages per second, 1 MiB/s"),
        "{}",
        text(&output.stderr)
    );
    serde_json::from_slice::<Value>(&output.stdout).unwrap();
    let output = bench("run --guest sim --free-seconds 0.2 --seconds 0.5 --limit 1Gbit/s");
    assert!(text(&output.stdout).contains(" 119.2 ") && !text(&output.stderr).contains("pages per second"));
}

#[test]
fn what_a_probe_found_is_a_document_and_its_status() {
    let output = bench("probe --json -");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let usable = document["usable"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(i32::from(!usable)));
    let findings = document["findings"].as_array().unwrap();
    assert_eq!(findings[0]["name"], "kernel");
    assert_eq!(usable, findings.iter().all(|finding| finding["verdict"] != "bad"));
    assert_eq!(bench("probe").status.code(), output.status.code());
}

#[test]
fn completions_and_manual_pages_are_of_all_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = bench(&format!("completions {shell}"));
        assert!(output.status.success() && text(&output.stdout).contains("max-pause"), "{shell}");
    }
    let page = |line: &str| text(&bench(line).stdout).to_owned();
    assert!(page("man").contains(".TH dirtylimit") && page("man").contains("migrate"));
    let run = page("man run");
    assert!(run.contains("\\-\\-max\\-pause") && run.contains("Exit status: 0 done"), "{run}");
    let wrong = bench("man sleep");
    assert!(wrong.status.code() == Some(2) && text(&wrong.stderr).contains("there is no command sleep"));
}

#[test]
fn what_the_simulated_guest_has_not_measured_is_null() {
    let output = bench("run --guest sim --free-seconds 0.2 --seconds 0.5 --workload steady:64MiB --json -");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&document["suspect_pages"], &document["suspect_resets"]), (&Value::from(0), &Value::from(0)));
    assert_eq!((&document["steal_time"], &document["host"]["sleep_late_p999_ms"]), (&Value::from(false), &Value::Null));
    let vcpu = &document["vcpus"][0];
    assert_eq!(vcpu["workload"], "steady:64MiB");
    assert!(vcpu["held_back_pages"].is_u64() && vcpu["free_gross_mib_s"].is_f64(), "{vcpu}");
}

#[test]
fn the_table_goes_to_stdout_and_reports_to_their_files() {
    let folder = std::env::temp_dir().join(format!("dirtylimit-cli-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (json, svg) = (folder.join("report.json"), folder.join("report.svg"));
    let output = bench(&format!("run --guest sim --seconds 1 --json {} --svg {}", json.display(), svg.display()));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("verdict: "));
    let document: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(document["policy"], "paced");
    assert!(std::fs::read_to_string(&svg).unwrap().starts_with("<svg"));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn the_simulated_guest_runs_no_payload() {
    let output = bench("run --guest sim --payload Cargo.toml");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("--payload needs the KVM guest"), "{}", text(&output.stderr));
}

#[test]
fn the_lab_lists_what_there_is_and_says_what_it_cannot_run() {
    let cache = std::env::temp_dir().join(format!("dirtylimit-cli-lab-{}", std::process::id()));
    let lab = |arguments: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dirtylimit-bench"));
        // Neither a cache nor an apt: nothing is fetched in a test.
        command.env("XDG_CACHE_HOME", &cache).env("PATH", "/nonexistent").arg("lab");
        command.args(arguments.split_whitespace()).output().unwrap()
    };
    let listed = lab("--list");
    assert!(listed.status.success() && listed.stderr.is_empty());
    for told in ["svm ", "vmx ", "arm64 ", "6.1, 6.12, newest", cache.to_str().unwrap()] {
        assert!(text(&listed.stdout).contains(told), "{told} is missing:\n{}", text(&listed.stdout));
    }
    for (arguments, told) in [
        ("svm --program /etc/passwd -- x", "/etc/passwd cannot run in the lab"),
        ("arm64 --program /proc/self/exe -- x", "is not a program for arm64"),
        ("setup svm", "takes apt-get and dpkg-deb"),
        ("svm -- probe", "takes apt-get and dpkg-deb"),
    ] {
        let output = lab(arguments);
        assert_eq!(output.status.code(), Some(1), "`{arguments}`: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(told), "`{arguments}`: {}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "`{arguments}` wrote to stdout");
    }
    let _ = std::fs::remove_dir_all(cache);
}
