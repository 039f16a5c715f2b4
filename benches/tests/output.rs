//! What the program writes, and where: nothing that it cannot write makes it panic, and nothing that it was not told to
//! replace is replaced.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use dirtylimit_bench::guest::kvm::kvm_or_skip;
use serde_json::Value;

/// A run of a moment, in virtual time.
const RUN: &str = "run --guest sim --free-seconds 0.2 --seconds 0.5";

fn bench(arguments: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_dirtylimit-bench"));
    program.args(arguments.split_whitespace()).stdin(Stdio::null());
    program
}

fn output(arguments: impl AsRef<str>) -> Output {
    bench(arguments.as_ref()).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// A pipe that nobody reads.
fn closed_pipe() -> Stdio {
    let (_, writer) = UnixStream::pair().unwrap();
    OwnedFd::from(writer).into()
}

fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

/// A folder of a test's own, empty.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("dirtylimit-output-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Every command, with what it exits with where all is well; those of KVM only where there is one.
fn commands(folder: &Folder) -> Vec<(String, &'static [i32])> {
    let mut commands: Vec<(String, &[i32])> = vec![
        (RUN.into(), &[0]),
        (format!("{RUN} --limit 100 --json -"), &[0]),
        // Without KVM it says so by its status.
        ("probe".into(), &[0, 1]),
        ("scenario --list".into(), &[0]),
        ("run --help".into(), &[0]),
        (format!("compare --write-rom {}", folder.0.join("rom").display()), &[0]),
    ];
    if kvm_or_skip() {
        // How well it did is its status too.
        commands.push(("scenario interrupt".into(), &[0, 1, 4]));
        commands.push(("compare --peer stepped --rounds 1 --seconds 1 --limit 100MiB/s --json -".into(), &[0]));
    }
    commands
}

#[test]
fn whether_anybody_reads_stderr_changes_nothing() {
    let folder = Folder::new("stderr");
    for (command, expected) in commands(&folder) {
        for stderr in [closed_pipe(), full()] {
            let output = bench(&command).stderr(stderr).output().unwrap();
            assert!(output.status.code().is_some_and(|code| expected.contains(&code)), "{command}: {output:?}");
            assert!(!output.stdout.is_empty(), "{command}");
        }
    }
    // Nor does an error that nobody reads.
    let failing = bench("run --guest sim --workload write:65GiB").stderr(full()).status().unwrap();
    assert_eq!(failing.code(), Some(1));
}

#[test]
fn the_quiet_say_nothing_but_errors() {
    let folder = Folder::new("quiet");
    for (command, expected) in commands(&folder) {
        let output = output(format!("{command} --quiet"));
        assert!(output.status.code().is_some_and(|code| expected.contains(&code)), "{command}: {output:?}");
        assert!(output.stderr.is_empty() && !output.stdout.is_empty(), "{command}: {output:?}");
    }
    let failing = output("--quiet run --guest sim --workload write:65GiB");
    assert!(text(&failing.stderr).contains("are simulated"), "{}", text(&failing.stderr));
}

#[test]
fn a_reader_of_stdout_that_is_gone_is_no_error_and_a_full_disk_is_one() {
    let folder = Folder::new("stdout");
    for (command, expected) in commands(&folder) {
        let gone = bench(&command).stdout(closed_pipe()).output().unwrap();
        let told = text(&gone.stderr);
        assert!(gone.status.code().is_some_and(|code| expected.contains(&code)), "{command}: {told}");
        assert!(!told.contains("panicked") && !told.contains("cannot write"), "{command}: {told}");
        let full_disk = bench(&command).stdout(full()).output().unwrap();
        let told = text(&full_disk.stderr);
        assert_eq!(full_disk.status.code(), Some(1), "{command}: {told}");
        assert!(told.contains("dirtylimit-bench: cannot write to standard output"), "{command}: {told}");
        let nobody = bench(&command).stdout(full()).stderr(closed_pipe()).status().unwrap();
        assert_eq!(nobody.code(), Some(1), "{command}");
    }
}

#[test]
fn what_cannot_be_written_keeps_nothing_else_from_being_written() {
    let folder = Folder::new("others");
    let svg = folder.0.join("run.svg");
    let output = bench(&format!("{RUN} --json - --svg {}", svg.display())).stdout(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(fs::read_to_string(svg).unwrap().starts_with("<svg"));
}

#[test]
fn links_are_followed_and_stay() {
    let folder = Folder::new("links");
    let in_folder = |name: &str| folder.0.join(name);
    fs::create_dir(in_folder("real")).unwrap();
    fs::write(in_folder("real/old.json"), "old").unwrap();
    fs::set_permissions(in_folder("real/old.json"), Permissions::from_mode(0o640)).unwrap();
    symlink("real/old.json", in_folder("json")).unwrap();
    symlink("real/new.svg", in_folder("svg")).unwrap();
    symlink(in_folder("real"), in_folder("page")).unwrap();
    let path = |name: &str| in_folder(name).display().to_string();
    let output = output(format!("{RUN} --json {} --svg {} --report {}", path("json"), path("svg"), path("page")));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(["json", "svg", "page"].iter().all(|link| in_folder(link).is_symlink()));
    serde_json::from_slice::<Value>(&fs::read(in_folder("real/old.json")).unwrap()).unwrap();
    assert_eq!(fs::metadata(in_folder("real/old.json")).unwrap().permissions().mode() & 0o777, 0o640);
    assert!(fs::read_to_string(in_folder("real/new.svg")).unwrap().starts_with("<svg"));
    assert!(fs::read_to_string(in_folder("real/index.html")).unwrap().starts_with("<!DOCTYPE"));
    assert_eq!(fs::read_dir(in_folder("real")).unwrap().count(), 3, "nothing is left beside them");
    // What a link of /proc leads to is a descriptor of the process, and no name to replace.
    let log = in_folder("log");
    fs::write(&log, "before\n").unwrap();
    // A link of our own: one that replaced the system's /dev/stdout would do so for everybody.
    symlink("/proc/self/fd/1", in_folder("stdout")).unwrap();
    let append = OpenOptions::new().append(true).open(&log).unwrap();
    assert!(bench(&format!("{RUN} --json {}", path("stdout"))).stdout(append).status().unwrap().success());
    let log = fs::read_to_string(log).unwrap();
    assert!(log.starts_with("before\n") && log.contains("verdict: ") && log.contains("\n{\"guest\":\"sim\""), "{log}");
}

#[test]
fn a_device_is_written_and_never_replaced() {
    let folder = Folder::new("devices");
    // The system's own devices are no toys: a program that replaced one would do so for everybody.
    let (null, full) = (folder.0.join("null"), folder.0.join("full"));
    let made = |node: &Path, minor: &str| {
        Command::new("mknod")
            .arg(node)
            .args(["c", "1", minor])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success() && OpenOptions::new().write(true).open(node).is_ok())
    };
    if !made(&null, "3") || !made(&full, "7") {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: NO DEVICE WAS WRITTEN: only root makes device nodes, and not everywhere"
        );
        return;
    }
    let (to_null, to_full) = (null.display(), full.display());
    let mut runs = vec![
        (format!("{RUN} --json {to_null} --svg {to_null}"), 0),
        (format!("{RUN} --json {to_full}"), 1),
        (format!("{RUN} --svg {to_full}"), 1),
        (format!("compare --write-rom {to_full}"), 1),
    ];
    if kvm_or_skip() {
        let run = "run --guest kvm --workload write:4MiB --free-seconds 0.2 --seconds 0.5";
        runs.push((format!("{run} --metrics {to_null}"), 0));
        runs.push((format!("{run} --metrics {to_full}"), 1));
    }
    for (command, status) in runs {
        let output = output(&command);
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{command}: {told}");
        assert_eq!(told.contains(&format!("cannot write {to_full}: No space left")), status == 1, "{command}: {told}");
        for node in [&null, &full] {
            assert!(fs::symlink_metadata(node).unwrap().file_type().is_char_device(), "{command}");
        }
        assert_eq!(folder.names(), ["full", "null"], "{command}");
    }
}

#[test]
fn a_pipe_is_written_and_one_that_nobody_reads_is_told_before_the_run() {
    let folder = Folder::new("pipes");
    let pipe = folder.0.join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let command = format!("{RUN} --json {}", pipe.display());
    let unread = output(&command);
    assert_eq!(unread.status.code(), Some(1));
    assert!(text(&unread.stderr).contains(&format!("cannot write {}: ", pipe.display())));
    assert!(!text(&unread.stderr).contains("running free"), "it ran first");
    // Open for both, so that neither side waits for the other; the document is smaller than a pipe.
    let flags = libc::O_NONBLOCK;
    let mut reader = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&pipe).unwrap();
    assert!(output(&command).status.success());
    assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
    let mut document = Vec::new();
    while !document.ends_with(b"\n") {
        let mut some = [0; 4096];
        let read = reader.read(&mut some).unwrap();
        document.extend_from_slice(&some[..read]);
    }
    serde_json::from_slice::<Value>(&document).unwrap();
}

#[test]
fn what_cannot_be_replaced_is_told_before_the_run_and_kept() {
    let folder = Folder::new("refused");
    let path = |name: &str| folder.0.join(name).display().to_string();
    fs::create_dir(path("locked")).unwrap();
    fs::create_dir(path("open")).unwrap();
    fs::write(path("open/kept"), "old").unwrap();
    fs::set_permissions(path("open/kept"), Permissions::from_mode(0o444)).unwrap();
    fs::set_permissions(path("locked"), Permissions::from_mode(0o555)).unwrap();
    fs::set_permissions(path("open"), Permissions::from_mode(0o777)).unwrap();
    symlink("loop", path("loop")).unwrap();
    let root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    for option in ["--json", "--csv", "--svg"] {
        for name in ["locked/new", "locked", "open/kept", "open/new/", "open/kept/new", "loop", "nowhere/new"] {
            let mut program = bench(&format!("{RUN} {option} {}", path(name)));
            if root {
                // Root may write everything: another user may not.
                program.uid(65_534);
            }
            let output = program.output().unwrap();
            let told = text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{option} {name}: {told}");
            assert!(told.contains(&format!("{option}: cannot write {}", path(name))), "{told}");
            assert!(told.contains("device, pipe or socket") && !told.contains("running free"), "{told}");
        }
    }
    assert_eq!(fs::read_to_string(path("open/kept")).unwrap(), "old");
    assert_eq!(fs::read_dir(path("open")).unwrap().count() + fs::read_dir(path("locked")).unwrap().count(), 1);
}

#[test]
fn a_run_that_fails_leaves_what_was_there() {
    let folder = Folder::new("failing");
    let path = |name: &str| folder.0.join(name).display().to_string();
    fs::write(path("old.json"), "old").unwrap();
    let outputs = format!("--json {} --svg {} --csv {}", path("old.json"), path("new.svg"), path("new.csv"));
    let output = output(format!("run --guest sim --workload write:65GiB {outputs}"));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("are simulated"), "{}", text(&output.stderr));
    assert_eq!(
        (folder.names(), fs::read_to_string(path("old.json")).unwrap()),
        (vec!["old.json".into()], "old".into())
    );
}

#[test]
fn two_options_do_not_replace_one_file() {
    let folder = Folder::new("same");
    let path = |name: &str| folder.0.join(name).display().to_string();
    symlink("one", path("other")).unwrap();
    for (options, told) in [
        (format!("--json {0} --svg {0}", path("one")), "--json and --svg name the same file"),
        (format!("--svg {} --json {}", path("one"), path("other")), "--json and --svg"),
        (format!("--svg {} --report {}", path("index.html"), path("")), "--svg and --report"),
        ("--json - --csv -".into(), "--json and --csv name the same"),
        (format!("--csv {} --json {}", path("one"), path("other")), "--json and --csv"),
    ] {
        let output = output(format!("{RUN} {options}"));
        assert_eq!(output.status.code(), Some(1), "{options}");
        assert!(text(&output.stderr).contains(told), "{options}: {}", text(&output.stderr));
    }
    assert_eq!(folder.names(), ["other"]);
}

/// A run that goes on for minutes unless it is ended, limited by now.
fn long_run(json: &str) -> Child {
    let command = format!("run --guest sim --free-seconds 0.2 --seconds 3600 --json {json}");
    let mut child = bench(&command).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    // Reading stops here: what it has to say after that has no reader.
    assert!(lines.map_while(Result::ok).any(|line| line.contains("limited")), "it never came so far");
    child
}

fn send(signal: &str, child: &Child) {
    assert!(Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn a_run_that_is_ended_reports_what_there_is_and_one_that_is_killed_leaves_nothing() {
    let folder = Folder::new("ended");
    let json = folder.0.join("old.json");
    fs::write(&json, "old").unwrap();
    let mut killed = long_run(&json.display().to_string());
    send("KILL", &killed);
    killed.wait().unwrap();
    assert_eq!((folder.names(), fs::read_to_string(&json).unwrap()), (vec!["old.json".into()], "old".into()));
    let mut ended = long_run(&json.display().to_string());
    send("INT", &ended);
    assert_eq!(ended.wait().unwrap().code(), Some(0));
    let document: Value = serde_json::from_reader(File::open(&json).unwrap()).unwrap();
    assert_eq!(document["interrupted"], true);
    assert_eq!(folder.names(), ["old.json"]);
}
