//! `migrate`: a guest goes from one process to another, and whatever goes wrong, it runs on one of its two sides.

mod peers;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use dirtylimit_bench::guest::kvm::kvm_or_skip;
use dirtylimit_bench::migrate::wire::{self, Message};
use peers::{Listening, destination, greet, pass, say, socket};
use serde_json::Value;

/// A guest that is small, and a downtime that a busy host can keep.
const SMALL: &str = "--workload write:16MiB --memory 64MiB --bandwidth 100MiB/s --downtime 150ms --free-seconds 0.2";
/// The same, which never comes to an end by itself.
const ENDLESS: &str = "--workload write:48MiB --memory 64MiB --bandwidth 20MiB/s --mode none --free-seconds 0.2";

/// The program with these options, each with its value; the last one of a name counts.
fn bench(arguments: &str) -> Command {
    let words: Vec<_> = arguments.split_whitespace().collect();
    let options = words.chunks(2).enumerate();
    let last = options.filter(|(at, option)| words.iter().rposition(|word| word == &option[0]) == Some(2 * at));
    let mut program = Command::new(env!("CARGO_BIN_EXE_dirtylimit-bench"));
    program.arg("migrate").args(last.flat_map(|(_, option)| option)).stdin(Stdio::null());
    program
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Its exit status, its document, and what it told.
fn result(output: &Output) -> (i32, Value, String) {
    let told = text(&output.stderr).to_owned();
    let document = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {told}"));
    (output.status.code().unwrap(), document, told)
}

fn migrate(arguments: &str) -> (i32, Value, String) {
    result(&bench(&format!("{arguments} --json -")).output().unwrap())
}

/// The guest runs on at the source, unthrottled; how many ms after the end. That says how busy the host is, too: one of
/// several is to be within [`SOON`].
fn assert_runs_on(document: &Value, told: &str) -> f64 {
    let resumed = document["source_resumed_ms"].as_f64();
    assert!(resumed.is_some(), "{told}");
    // Nearly all of the half second, where a budget is still in force. How fast it is says how busy the host is, too.
    let (work, paused) = (document["source_work_pct"].as_f64(), document["source_paused_ms"].as_f64());
    // There is no speed to compare with where the host let the free guest do nothing.
    let works = work.is_none_or(|percent| percent > 0.0);
    assert!(works && paused.is_some_and(|ms| ms < 100.0), "{work:?}, {paused:?}: {told}");
    resumed.unwrap_or(f64::INFINITY)
}

/// How soon a guest is to run on, in ms.
const SOON: f64 = 100.0;

#[test]
fn one_command_migrates_a_guest_and_all_of_it_arrives() {
    if !kvm_or_skip() {
        return;
    }
    let svg = socket("svg");
    let (status, document, told) =
        migrate(&format!("{SMALL} --workload write:16MiB,read:4MiB --svg {}", svg.display()));
    assert_eq!((status, &document["verdict"]), (0, &"done".into()), "{document}: {told}");
    assert_eq!((&document["memory_equal"], &document["unequal_pages"]), (&true.into(), &0.into()));
    assert_eq!(document["counters_go_on"], true);
    let rounds = document["rounds"].as_array().unwrap();
    let sent: u64 = rounds.iter().map(|round| round["sent_pages"].as_u64().unwrap()).sum();
    let skipped: u64 = rounds.iter().map(|round| round["skipped_pages"].as_u64().unwrap()).sum();
    assert!(rounds.len() >= 2 && sent + skipped >= 64 * 256, "{document}");
    assert!(document["sent_mib"].as_f64().unwrap() > 16.0 && document["total_s"].as_f64().unwrap() > 0.1);
    let downtime = document["downtime_ms"].as_f64().unwrap();
    assert!(downtime > 1.0 && downtime < 1000.0 && document["guest_downtime_ms"].as_f64().unwrap() <= downtime);
    assert!(told.contains("round 1: sent") && told.contains("memory: equal"), "{told}");
    assert!(fs::read_to_string(&svg).unwrap().starts_with("<svg"));
    fs::remove_file(svg).unwrap();
}

#[test]
fn each_mode_migrates_a_guest_that_rests() {
    if !kvm_or_skip() {
        return;
    }
    for mode in ["none", "uniform", "fixed=50MiB/s", "ramp", "half"] {
        let (status, document, told) = migrate(&format!("{SMALL} --workload burst:8MiB,idle --mode {mode}"));
        assert_eq!((status, &document["mode"]), (0, &mode.into()), "{document}: {told}");
        assert_eq!((&document["memory_equal"], &document["counters_go_on"]), (&true.into(), &true.into()), "{mode}");
    }
}

#[test]
fn two_halves_meet_by_tcp_and_a_second_source_is_refused() {
    if !kvm_or_skip() {
        return;
    }
    let listening = Listening::at("127.0.0.1:0");
    let connect = format!("--connect {}", listening.address);
    // As slow as it has to be to be still there when the second one comes.
    let slow = format!("{SMALL} {connect} --bandwidth 20MiB/s --json -");
    let first = bench(&slow).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    thread::sleep(Duration::from_millis(800));
    let (status, document, told) = migrate(&format!("{SMALL} {connect}"));
    assert_eq!(status, 1, "{document}: {told}");
    assert!(document["reason"].as_str().unwrap().contains("another migration goes on here"), "{document}");
    assert_runs_on(&document, &told);
    let (status, document, told) = result(&first.wait_with_output().unwrap());
    assert_eq!((status, &document["memory_equal"]), (0, &true.into()), "{document}: {told}");
    let (status, told) = listening.end();
    assert!(status == Some(0) && told.contains("is refused") && told.contains("The guest came"), "{status:?}: {told}");
}

#[test]
fn a_destination_that_refuses_or_is_another_is_told_and_the_guest_runs_on() {
    if !kvm_or_skip() {
        return;
    }
    let mut soonest = f64::INFINITY;
    let nobody = format!("unix:{}", socket("nobody").display());
    let (status, document, _) = migrate(&format!("{SMALL} --connect {nobody}"));
    assert!(status == 1 && document["reason"].as_str().unwrap().contains("cannot connect"), "{document}");
    let mut other = wire::preamble();
    other[8] = 7;
    let refused = [&wire::preamble()[..], &wire::frame(&Message::Refused("no room".into()), &[])].concat();
    let out_of_turn = [&wire::preamble()[..], &wire::frame(&Message::Ready, &[])].concat();
    for (says, reason) in [
        (other.to_vec(), "version 7"),
        (b"HTTP/1.1 400 Bad Request".to_vec(), "does not speak this protocol"),
        (refused, "no room"),
        (out_of_turn, "out of turn"),
        (wire::preamble().to_vec(), "closed the connection"),
    ] {
        let (address, thread) = destination("refuses", 1, move |_, mut stream| {
            stream.write_all(&says).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let (status, document, told) = migrate(&format!("{SMALL} --connect {address}"));
        assert!(status == 1 && document["verdict"] == "failed", "{document}: {told}");
        assert!(document["reason"].as_str().unwrap().contains(reason), "{reason}: {document}");
        soonest = soonest.min(assert_runs_on(&document, &told));
        thread.join().unwrap();
    }
    assert!(soonest < SOON, "{soonest} ms");
}

#[test]
fn a_destination_that_dies_or_falls_silent_does_not_take_the_guest_along() {
    if !kvm_or_skip() {
        return;
    }
    let mut soonest = f64::INFINITY;
    // Dies in mid-flight; says a moment before that it cannot; dies with the guest stopped; never answers then.
    for (case, reason) in ["closed", "the disk is full", "closed", "did not say"].into_iter().enumerate() {
        let (address, thread) = destination("dies", 1, move |_, mut stream| {
            let mut frames = greet(&mut stream);
            let mut data = 0;
            while case >= 2 || data < 4 << 20 {
                match frames.read() {
                    Ok((Message::Switched, _)) => break,
                    Ok((_, more)) => data += more.len(),
                    Err(error) => panic!("{error}"),
                }
            }
            if case == 1 {
                say(&mut stream, &Message::Refused("the disk is full".into()));
            } else if case == 3 {
                let _ = stream.read_to_end(&mut Vec::new());
            }
        });
        let (status, document, told) = migrate(&format!("{SMALL} --mode fixed=1MiB/s --connect {address}"));
        assert!(status == 1 && document["verdict"] == "failed", "{case}: {document}: {told}");
        let told_reason = document["reason"].as_str().unwrap();
        assert!(told_reason.contains(reason) || told_reason.contains("failed"), "{case}: {document}");
        soonest = soonest.min(assert_runs_on(&document, &told));
        thread.join().unwrap();
    }
    assert!(soonest < SOON, "{soonest} ms");
}

#[test]
fn a_destination_that_reads_nothing_is_waited_for_and_then_left() {
    if !kvm_or_skip() {
        return;
    }
    let (end, ended) = mpsc::channel::<()>();
    let (address, thread) = destination("reads-nothing", 1, move |_, mut stream| {
        let frames = greet(&mut stream);
        let _ = ended.recv();
        drop(frames);
    });
    let (status, document, told) = migrate(&format!("{SMALL} --connect {address}"));
    drop(end);
    assert!(status == 1 && document["reason"].as_str().unwrap().contains("took nothing for 5s"), "{document}: {told}");
    assert_runs_on(&document, &told);
    thread.join().unwrap();
}

/// The kernel may take that long to begin the dirty log.
#[test]
fn a_source_without_a_page_is_waited_for() {
    if !kvm_or_skip() {
        return;
    }
    let listening = Listening::at(&format!("unix:{}", socket("late-listening").display()));
    let to = listening.address.clone();
    let (address, thread) = destination("late", 1, move |_, mut source| {
        let mut late = Some(Duration::from_secs(11));
        pass(&mut source, &to, |message, _, _| {
            if matches!(message, Message::Pages(_)) {
                thread::sleep(late.take().unwrap_or_default());
            }
        });
    });
    // The source waits ten times the downtime for the end; what it sends until then fits into the socket.
    let (status, document, told) =
        migrate(&format!("--workload idle --memory 16MiB --free-seconds 0.1 --downtime 2s --connect {address}"));
    assert_eq!((status, &document["verdict"]), (0, &"done".into()), "{document}: {told}");
    thread.join().unwrap();
    let (status, told) = listening.end();
    assert_eq!(status, Some(0), "{told}");
}

#[test]
fn a_corrupt_frame_ends_an_attempt_and_the_second_one_works() {
    if !kvm_or_skip() {
        return;
    }
    let path = socket("corrupt-listening");
    let listening = Listening::at(&format!("unix:{}", path.display()));
    let to = listening.address.clone();
    let (address, thread) = destination("corrupts", 2, move |time, mut source| {
        let mut bytes = 0;
        pass(&mut source, &to, |_, _, data| {
            bytes += data.len();
            if time == 0 && bytes > 4 << 20 {
                data[17] ^= 4;
                bytes = 0;
            }
        });
    });
    let (status, document, told) = migrate(&format!("{SMALL} --connect {address} --retry 1"));
    assert!(told.contains("attempt 1 failed: the destination gave up: a frame is corrupt"), "{told}");
    assert_eq!((status, &document["attempt"]), (0, &2.into()), "{document}: {told}");
    assert_eq!((&document["memory_equal"], &document["counters_go_on"]), (&true.into(), &true.into()));
    thread.join().unwrap();
    let (status, told) = listening.end();
    assert!(status == Some(0) && told.contains("No guest came: a frame is corrupt"), "{status:?}: {told}");
}

#[test]
fn memory_that_is_not_equal_is_found_and_the_guest_stays() {
    if !kvm_or_skip() {
        return;
    }
    let path = socket("unequal-listening");
    let mut listening = Listening::at(&format!("unix:{}", path.display()));
    let to = listening.address.clone();
    let (address, thread) = destination("alters", 1, move |_, mut source| {
        let mut altered = false;
        // A page of the image, which nobody writes and no later round sends again.
        pass(&mut source, &to, |message, frame, data| {
            let is_image = |run: &wire::Run| run.first == 0x100 && !run.zero;
            if let Message::Pages(runs) = message {
                if !altered && runs.iter().any(is_image) {
                    let before = runs.iter().take_while(|run| !is_image(run)).filter(|run| !run.zero);
                    let at: usize = before.map(|run| run.pages as usize * 4096).sum();
                    data[at + 4000] ^= 1;
                    *frame = wire::frame(message, data);
                    altered = true;
                }
            }
        });
        assert!(altered);
    });
    let (status, document, told) = migrate(&format!("{SMALL} --connect {address}"));
    assert_eq!((status, &document["verdict"]), (3, &"failed".into()), "{document}: {told}");
    assert_eq!((&document["memory_equal"], &document["unequal_pages"]), (&false.into(), &1.into()));
    assert_runs_on(&document, &told);
    thread.join().unwrap();
    let _ = listening.process.kill();
    assert!(listening.end().1.contains("1 pages are not the source's"));
    let _ = fs::remove_file(path);
}

#[test]
fn a_user_who_wants_an_end_gets_it_and_the_guest_runs_on() {
    if !kvm_or_skip() {
        return;
    }
    let mut process =
        bench(&format!("{ENDLESS} --json -")).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(process.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("round") {
        line.clear();
        assert!(told.read_line(&mut line).unwrap() > 0, "it never came so far");
    }
    let rest = thread::spawn(move || told.read_to_string(&mut String::new()));
    assert!(Command::new("kill").args(["-s", "INT", &process.id().to_string()]).status().unwrap().success());
    let output = process.wait_with_output().unwrap();
    rest.join().unwrap().unwrap();
    let (status, document, told) = result(&output);
    assert_eq!((status, &document["verdict"]), (6, &"cancelled".into()), "{document}");
    assert_runs_on(&document, &told);
}

#[test]
fn a_goal_that_is_out_of_reach_is_said_and_so_is_a_guest_that_never_rests() {
    if !kvm_or_skip() {
        return;
    }
    let (status, document, told) = migrate(&format!("{SMALL} --deadline 300ms --bandwidth 20MiB/s"));
    assert_eq!((status, &document["verdict"]), (4, &"unreachable".into()), "{document}: {told}");
    assert!(document["reason"].as_str().unwrap().contains("would do"), "{document}");
    assert_runs_on(&document, &told);
    let (status, document, told) = migrate(&format!("{ENDLESS} --deadline 1s"));
    assert_eq!((status, &document["verdict"]), (4, &"unreachable".into()), "{document}: {told}");
    assert!(document["reason"].as_str().unwrap().contains("the mode `none` gives up"), "{document}");
    assert_runs_on(&document, &told);
}

#[test]
fn a_guest_arrives_although_the_wire_becomes_half_as_fast() {
    if !kvm_or_skip() {
        return;
    }
    let path = socket("halves-listening");
    let listening = Listening::at(&format!("unix:{}", path.display()));
    let to = listening.address.clone();
    // The wire: 60 MiB/s for the first 16 MiB, 30 after that.
    let (address, thread) = destination("halves", 1, move |_, mut source| {
        let (mut free_at, mut passed) = (Instant::now(), 0);
        pass(&mut source, &to, |_, _, data| {
            passed += data.len();
            let rate = if passed < 16 << 20 { 60 } else { 30 };
            free_at = free_at.max(Instant::now()) + Duration::from_secs_f64(data.len() as f64 / f64::from(rate << 20));
            thread::sleep(free_at.saturating_duration_since(Instant::now()));
        });
    });
    let (status, document, told) =
        migrate(&format!("{SMALL} --workload write:48MiB --memory 96MiB --downtime 70ms --connect {address}"));
    assert_eq!((status, &document["memory_equal"]), (0, &true.into()), "{document}: {told}");
    assert_eq!(document["counters_go_on"], true);
    let round = &document["rounds"][1];
    let rate = round["sent_pages"].as_f64().unwrap() / 256.0 / round["send_s"].as_f64().unwrap();
    assert!(rate < 45.0, "it never became slower: {told}");
    thread.join().unwrap();
    assert_eq!(listening.end().0, Some(0));
}

#[test]
fn a_report_that_cannot_be_written_is_an_error_and_the_guest_is_there_all_the_same() {
    if !kvm_or_skip() {
        return;
    }
    let path = socket("full-listening");
    let listening = Listening::at(&format!("unix:{}", path.display()));
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = bench(&format!("{SMALL} --connect {} --json -", listening.address)).stdout(full).output().unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("cannot write to standard output") && told.contains("verdict: done"), "{told}");
    assert_eq!(listening.end().0, Some(0));
}

#[test]
fn bad_usage_exits_2_and_says_what_is_allowed() {
    for (arguments, told) in [
        ("--mode auto", "none, uniform, fixed=RATE"),
        ("--mode fixed", "lacks its rate"),
        ("--memory 64MiB", "240 to"),
        ("--memory 511KiB", "pages"),
        ("--downtime 1ms", "20ms to 60s is allowed"),
        ("--bandwidth fast", "a rate is"),
        ("--connect nowhere", "unix:PATH or HOST:PORT"),
        ("--connect inherited", "unix:PATH or HOST:PORT"),
        ("--listen unix:", "lacks its path"),
        ("--listen unix:/tmp/a --memory 64MiB", "cannot be used with"),
        ("--ring 1000", "power of two"),
        ("--vcpus 65", "1 to 64"),
    ] {
        let output = bench(arguments).output().unwrap();
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {error}");
        assert!(error.contains(told), "{arguments}: {error}");
    }
    let help = bench("--help").output().unwrap();
    assert!(text(&help.stdout).contains("\nExit status: 0 done"));
}
