use std::fs;
use std::path::PathBuf;

use super::*;

/// Runs a shell script as if it were an emulator; it writes to $console and $result.
fn watched(script: &str, silence: Duration) -> (Result<ExitCode>, String) {
    static RUNS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = RUNS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let directory = std::env::temp_dir().join(format!("dirtylimit-lab-run-{}-{number}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let file = |name: &str| -> PathBuf { directory.join(name) };
    let ports = Ports { console: file("console"), result: file("result"), complaints: file("emulator") };
    for path in [&ports.console, &ports.result] {
        fs::write(path, "").unwrap();
    }
    let mut command = Command::new("sh");
    command.args(["-c", script]).env("console", &ports.console).env("result", &ports.result);
    let mut stdout = Vec::new();
    let watch = Watch { interrupt: &Interrupt::never(), silence, console: false };
    let code = run(command, &ports, &watch, &mut stdout);
    fs::remove_dir_all(&directory).unwrap();
    (code, String::from_utf8(stdout).unwrap())
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn the_programs_output_and_status_come_through_and_nothing_else() {
    let (code, stdout) =
        watched("echo boot >$console; printf '{\"a\": 1}\\n' >>$result; printf '\\0lab-status 3\\0' >>$result", LONG);
    assert_eq!(format!("{:?}", code.unwrap()), format!("{:?}", ExitCode::from(3)));
    assert_eq!(stdout, "{\"a\": 1}\n");
}

#[test]
fn a_status_ends_the_run_though_the_machine_goes_on() {
    let begun = Instant::now();
    let (code, _) = watched("printf '\\0lab-status 0\\0' >>$result; exec sleep 300", LONG);
    assert!(code.is_ok() && begun.elapsed() < LONG);
}

#[test]
fn a_machine_that_ends_panics_or_falls_silent_shows_its_console() {
    let panic = "echo 'Kernel panic - not syncing: no init' >>$console; exec sleep 300";
    for (script, told, silence) in [
        ("echo last words >>$console; printf partial >>$result; exit 7", "exit status: 7", LONG),
        (panic, "kernel panicked", LONG),
        ("echo last words >>$console; exec sleep 300", "said nothing for", Duration::from_millis(300)),
    ] {
        let (code, stdout) = watched(script, silence);
        let error = format!("{:#}", code.unwrap_err());
        assert!(error.contains(told), "{error}");
        assert!(error.contains("last words") || error.contains("no init"), "{error}");
        assert_eq!(stdout, if script.contains("partial") { "partial" } else { "" });
    }
}

#[test]
fn output_is_passed_on_however_it_is_cut_and_though_it_looks_like_a_trailer() {
    let all = b"one\0lab-status 9\0two\0lab-status x\0\0lab-status 12\0";
    for size in 1..all.len() {
        let mut output = Output::default();
        let mut passed = Vec::new();
        for piece in all.chunks(size) {
            passed.extend_from_slice(output.take(piece));
        }
        if size > 4 {
            assert_eq!(output.status(), Some(12), "in pieces of {size}");
            assert_eq!(passed, b"one\0lab-status 9\0two\0lab-status x\0", "in pieces of {size}");
        }
    }
}
