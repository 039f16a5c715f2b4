//! `dirtylimit-bench compare`: what it refuses, what it says without QEMU, and that it gets on with a real one and with
//! ones that fail. Where there is no QEMU the tests that need it are skipped, and say so.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use dirtylimit_bench::guest::kvm::kvm_or_skip;
use serde_json::Value;

fn program(arguments: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_dirtylimit-bench"));
    program.arg("compare").args(arguments.split_whitespace());
    program
}

fn compare(arguments: &str) -> Output {
    program(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Whether there is a QEMU; else says on stderr that the test is skipped.
fn qemu_or_skip() -> bool {
    let found = Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        // The raw descriptor: the test runner does not capture it.
        let _ = writeln!(std::io::stderr(), "SKIPPED: no qemu-system-x86_64 for {:?}", std::thread::current().name());
    }
    found
}

/// Command lines of the processes that a `compare` of that id has started: its QEMU names its ROM by it.
fn started_by(id: u32) -> Vec<String> {
    let of_it = format!("-bios\0/proc/{id}/fd/");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| fs::read_to_string(process.path().join("cmdline")).ok());
    lines.filter(|line| line.contains(&of_it)).collect()
}

/// A program that does as a QEMU does, until it is driven. Another process writes it: a file that this one has open for
/// writing while another test forks cannot be executed (ETXTBSY).
fn fake(name: &str, then: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("dirtylimit-fake-{name}-{}", std::process::id()));
    let script = format!("#!/bin/sh\n[ \"$1\" != --version ] || exec echo QEMU emulator version 9.9.9\n{then}\n");
    let write = ["-c", r#"printf %s "$1" >"$2" && chmod 755 "$2""#, "sh", &script];
    assert!(Command::new("sh").args(write).arg(&path).status().unwrap().success());
    path
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn bad_usage_exits_2_and_says_what_is_allowed() {
    for (arguments, told) in [
        ("--ring 512", "1024 to 65536"),
        ("--ring 3000", "power of two"),
        ("--limit none", "a rate is"),
        ("--limit 100", "whole MiB/s"),
        ("--rounds 0", "1..=99"),
        ("--seconds 0", "1s to 3600s"),
        ("--workload random:4MiB", "write, slow, burst, read and idle"),
        ("--peer xen", "[possible values: qemu, stepped]"),
        ("--qemu a --qemu b", "one QEMU at a time"),
        ("--memory 64MiB", "--migrate"),
        ("--migrate --ring 1024", "cannot be used with"),
        ("--migrate --deadline 10ms", "1s to 3600s is allowed"),
        ("--migrate --bandwidth none", "whole MiB/s"),
        ("--migrate --memory 64MiB", "240 to"),
        ("--migrate --limit 100", "whole MiB/s"),
    ] {
        let output = compare(arguments);
        assert_eq!(output.status.code(), Some(2), "`{arguments}`: {output:?}");
        assert!(text(&output.stderr).contains(told), "`{arguments}`: {output:?}");
    }
}

#[test]
fn a_qemu_that_is_named_must_be_there_and_be_one() {
    if !kvm_or_skip() {
        return;
    }
    for (qemu, told) in [("/nonexistent/qemu", "bookworm-backports"), ("/bin/true", "is no QEMU")] {
        let output = compare(&format!("--qemu {qemu}"));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains(told), "{output:?}");
    }
}

#[test]
fn a_qemu_that_ends_or_talks_nonsense_is_told_with_what_it_said() {
    if !kvm_or_skip() {
        return;
    }
    for (name, then, told) in [
        ("ends", "echo the roof is on fire >&2; exit 7", "QEMU ended (exit status: 7): the roof is on fire"),
        ("nonsense", "echo hello; sleep 1000", "QEMU's answer to qmp_capabilities"),
    ] {
        let qemu = fake(name, then);
        let output = compare(&format!("--qemu {}", qemu.display()));
        fs::remove_file(&qemu).unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains(told), "{output:?}");
        assert!(text(&output.stderr).contains("QEMU 9.9.9"), "{output:?}");
    }
}

#[test]
fn without_qemu_the_other_policy_takes_its_place() {
    if !kvm_or_skip() {
        return;
    }
    let output = program("--limit 20MiB/s --workload write:16MiB --rounds 1 --seconds 1 --json -")
        .env("PATH", "/")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stderr).contains("There is no qemu-system-x86_64 here"), "{output:?}");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["peer"], "stepped");
    assert!(document["cases"][0]["peer_command"].is_null());
}

#[test]
fn a_real_qemu_runs_the_same_guest_and_is_limited() {
    if !kvm_or_skip() || !qemu_or_skip() {
        return;
    }
    let folder = std::env::temp_dir().join(format!("dirtylimit-compare-{}", std::process::id()));
    let arguments = "--limit 10MiB/s --workload write:64MiB,idle --rounds 1 --seconds 3 --json -";
    let output = compare(&format!("{arguments} --report {}", folder.display()));
    assert!(output.status.success(), "{output:?}");
    let page = fs::read_to_string(folder.join("index.html")).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    assert!(page.contains("beside QEMU ") && page.contains("dirty-ring-size=4096"));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let case = &document["cases"][0];
    assert_eq!((&document["lost_pages"], &document["interrupted"]), (&Value::from(0), &Value::from(false)));
    assert!(case["peer_command"].as_str().is_some_and(|line| line.contains("-bios ROM")), "{document}");
    for side in ["peer", "ours"] {
        let [writer, idle] = [0, 1].map(|index| &case[side]["vcpus"][index]);
        let number = |name: &str| writer[name].as_f64().unwrap_or_else(|| panic!("{side} has no {name}: {writer}"));
        // How well is not for a test, and how fast a free guest is neither; a QEMU that limits nobody tells no rate of its own.
        assert!(number("settled_mib_s") > 0.0 && number("free_mib_s") > 0.0, "{side}: {writer}");
        assert!(side == "peer" || number("touched_mib_s") < 20.0, "{side}: {writer}");
        assert!(number("stall_max_ms") > 0.0 && number("own_mib_s") >= 0.0, "{side}: {writer}");
        assert!(writer["samples"].as_array().is_some_and(|samples| samples.len() > 100), "{side}");
        assert!(idle["error_pct"].is_null() && idle["limit_mib_s"].is_null(), "{side}: {idle}");
    }
}

#[test]
fn no_qemu_is_left_behind_whatever_ends_the_comparison() {
    if !kvm_or_skip() || !qemu_or_skip() {
        return;
    }
    for signal in ["INT", "KILL"] {
        let mut running: Child = program("--workload write:16MiB --seconds 600")
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let id = running.id();
        wait_until("QEMU does not start", || !started_by(id).is_empty());
        assert!(Command::new("kill").args(["-s", signal, &id.to_string()]).status().unwrap().success());
        let mut told = String::new();
        std::io::Read::read_to_string(&mut running.stderr.take().unwrap(), &mut told).unwrap();
        let status = running.wait().unwrap();
        if signal == "INT" {
            assert_eq!(status.code(), Some(1), "{told}");
            assert!(told.contains("interrupted before the first case was done"), "{told}");
        }
        wait_until("QEMU is left behind", || started_by(id).is_empty());
    }
}

#[test]
fn the_rom_is_written_with_the_command_that_starts_it() {
    let file = std::env::temp_dir().join(format!("dirtylimit-{}.rom", std::process::id()));
    let output = compare(&format!("--workload write:16MiB --write-rom {}", file.display()));
    let rom = fs::read(&file).unwrap();
    fs::remove_file(&file).unwrap();
    assert!(output.status.success() && rom.len() == 65_536, "{output:?}");
    let command = text(&output.stdout);
    assert!(command.starts_with("qemu-system-x86_64 -accel "), "{command}");
    assert!(command.contains(&file.display().to_string()), "{command}");
}

/// A guest that is small, and converges by itself.
const MIGRATED: &str = "--migrate --workload write:16MiB,idle --memory 64MiB --bandwidth 100MiB/s --rounds 1 --deadline 10s \
                        --free-seconds 1 --json -";

fn migrations(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{output:?}");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&document["memory_mib"], &document["downtime_allowed_ms"]), (&64.into(), &300.0.into()));
    document["sides"].as_array().unwrap().clone()
}

#[test]
fn without_qemu_our_modes_are_migrated_alone() {
    if !kvm_or_skip() {
        return;
    }
    let output = program(MIGRATED).env("PATH", "/").output().unwrap();
    assert!(text(&output.stderr).contains("our own modes alone"), "{output:?}");
    let sides = migrations(&output);
    let who: Vec<_> = sides.iter().map(|side| side["who"].as_str().unwrap()).collect();
    assert_eq!(who, ["goal", "half", "ramp", "uniform"].map(|mode| format!("dirtylimit, {mode}")));
    for side in &sides {
        let round = &side["rounds"][0];
        assert!(round["verdict"] == "done" && round["memory_equal"] == true && side["command"].is_null(), "{side}");
    }
}

#[test]
fn a_real_qemu_migrates_the_same_guest() {
    if !kvm_or_skip() || !qemu_or_skip() {
        return;
    }
    let folder = std::env::temp_dir().join(format!("dirtylimit-migrations-{}", std::process::id()));
    let output = program(MIGRATED).args(["--limit", "20MiB/s", "--report"]).arg(&folder).output().unwrap();
    let sides = migrations(&output);
    let page = fs::read_to_string(folder.join("index.html")).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(sides.len(), 7);
    for (side, with) in sides.iter().zip([", none", ", auto-converge", ", dirty-limit 20"]) {
        let (who, command) = (side["who"].as_str().unwrap(), side["command"].as_str().unwrap());
        assert!(who.starts_with("QEMU ") && who.ends_with(with) && page.contains(who), "{who}");
        assert_eq!(command.contains("dirty-ring-size=4096"), with.contains("dirty-limit"), "{command}");
        let round = &side["rounds"][0];
        let number = |name: &str| round[name].as_f64().unwrap_or_else(|| panic!("{who} has no {name}: {round}"));
        // Whether it comes about is for the host to say; if it does, what was written once was sent once.
        assert!(round["verdict"] == "done" || round["verdict"] == "unreachable", "{side}");
        assert!(number("sent_mib") > 16.0, "{side}");
        if round["verdict"] == "done" {
            assert!(number("total_s") > 0.1 && number("total_s") < 12.0, "{side}");
            assert!(number("downtime_ms") > 0.0 && number("downtime_ms") < 1e3 * number("total_s"), "{side}");
            assert!(number("lost_guest_s") <= number("total_s"), "{side}");
        }
        assert!(round["work_kept_pct"][0].as_f64() > Some(0.0) && round["memory_equal"].is_null(), "{side}");
    }
}
