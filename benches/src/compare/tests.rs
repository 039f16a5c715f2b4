use std::time::Duration;

use clap::Parser;
use serde_json::Value;

use super::cases::{self, Case};
use super::result::{Compared, Comparison};
use super::trial::Trial;
use super::*;
use crate::cli::{Cli, Command};
use crate::record::Host;
use crate::report::example;

pub(super) fn asked(line: &str) -> Compare {
    let line = ["dirtylimit-bench", "compare"].into_iter().chain(line.split_whitespace());
    match Cli::try_parse_from(line).unwrap().command {
        Command::Compare(asked) => *asked,
        _ => unreachable!("`compare` was given"),
    }
}

/// The example's writer and reader; the peer writes `factor` times as much while limited.
fn comparison(factor: u64) -> Comparison {
    let example = example::recording();
    let case =
        Case { limit_mib_s: 100, ring: 4096, workloads: example.vcpus.iter().map(|vcpu| vcpu.workload).collect() };
    let ours = Trial { recording: example, cpu_share: 0.2, own_mib_s: vec![Some(100.0), None] };
    let mut theirs = ours.clone();
    let limited_at = theirs.recording.limited_at;
    let samples = &mut theirs.recording.vcpus[0].samples;
    let base = samples.iter().find(|sample| sample.at >= limited_at).unwrap().net;
    for sample in samples.iter_mut().filter(|sample| sample.at > limited_at) {
        sample.net = base + factor * (sample.net - base);
    }
    let cases =
        vec![Compared::of(&case, Some("qemu-system-x86_64 -bios ROM".into()), &[theirs.clone(), theirs], &[ours])];
    Comparison {
        peer: "QEMU 10.0.2".into(),
        host: Host::default(),
        rounds: 1,
        free_seconds: 1.0,
        seconds: 8.0,
        max_pause_ms: 10.0,
        interrupted: false,
        lost_pages: 0,
        cases,
    }
}

#[test]
fn without_a_choice_the_usual_cases_are_compared() {
    assert_eq!(asked("").cases().unwrap(), cases::usual());
    let two = asked("--limit 20MiB/s,512 --ring 65536 --workload write:4MiB,idle").cases().unwrap();
    assert_eq!(two.iter().map(Case::name).collect::<Vec<_>>(), ["20 MiB/s, ring 65536", "2 MiB/s, ring 65536"]);
    for (line, told) in [
        ("--seconds 0.5", "--seconds 500ms: 1s to 3600s"),
        ("--free-seconds 58", "1s to 57s"),
        ("--max-pause 2s", "100us to 1s"),
        ("--limit 100", "whole MiB/s"),
        ("--workload random:4MiB", "write, slow, burst, read and idle"),
    ] {
        let error = asked(line).cases().unwrap_err();
        assert!(error.contains(told), "{line}: {error}");
    }
}

#[test]
fn both_sides_are_measured_alike() {
    let comparison = comparison(2);
    let (theirs, ours) = (&comparison.cases[0].peer.vcpus, &comparison.cases[0].ours.vcpus);
    assert_eq!(ours[0].median.settled_mib_s, Some(100.0));
    assert_eq!(theirs[0].median.settled_mib_s, Some(200.0));
    assert_eq!(theirs[0].median.error_pct, Some(100.0));
    assert_eq!((ours[0].median.settle_ms, theirs[0].median.settle_ms), (Some(50.0), None));
    assert_eq!((ours[1].limit_mib_s, ours[1].median.error_pct), (None, None));
    assert_eq!(theirs[0].rounds.len(), 2);
    assert_eq!(ours[0].median.stall_max_ms, Some(11.0));
}

#[test]
fn nobody_dirties_more_than_its_memory_between_two_collections() {
    let comparison = comparison(10);
    let theirs = &comparison.cases[0].peer.vcpus[0].median;
    assert_eq!((theirs.touched_mib_s, theirs.settled_mib_s), (Some(1000.0), Some(224.0)));
    assert_eq!(theirs.error_pct, Some(124.0));
}

#[test]
fn the_table_fits_eighty_columns_and_the_page_has_every_picture() {
    for factor in [1, 2, 1_000_000] {
        let mut comparison = comparison(factor);
        comparison.interrupted = factor == 2;
        comparison.lost_pages = factor;
        comparison.cases[0].peer.cpu_pct = Some(1e9);
        let text = comparison.to_string();
        let widest = text.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(80), "{widest:?} columns:\n{text}");
        assert!(text.contains("LOST PAGES of ours: ") && text.contains("vCPU 1, read:32MiB, not limited"), "{text}");
    }
    let comparison = comparison(2);
    let text = comparison.to_string();
    let row =
        |name: &str| text.lines().find(|line| line.contains(name)).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(row("settled rate")[3..], ["200.0", "100.0"]);
    assert_eq!(row("longest stall")[3..], ["11.0", "11.0", "1.0"]);
    assert_eq!(row("CPU time")[6..], ["20.0", "20.0", "1.0"]);
    let html = page::page(&comparison).unwrap().html();
    assert!(html.matches("<svg").count() >= 3 && html.contains("ROM</span>") && !html.contains("NaN"));
    assert!(html.contains(&format!("Longest stall, {}", comparison.peer)), "tiles name whom they are about");
}

/// The document has every name of the manual's part `number`.
pub(super) fn assert_documented(document: &Value, part: usize) {
    let manual = include_str!("../../../docs/COMPARE.md").split("\n# ").nth(part).unwrap();
    // Fences are no quotes.
    let manual = manual.replace("```", "");
    let mut names = manual.split('`').skip(1).step_by(2).filter_map(|name| name.strip_prefix('.')).peekable();
    assert!(names.peek().is_some());
    for name in names {
        let found = name.split('.').try_fold(document, |value, name| match value {
            Value::Array(values) => values[0].get(name),
            _ => value.get(name),
        });
        assert!(found.is_some(), "{name}");
    }
}

#[test]
fn the_document_has_every_name_of_the_manual() {
    let document: Value = serde_json::to_value(comparison(1)).unwrap();
    assert_documented(&document, 0);
    assert_eq!(document["cases"][0]["ours"]["vcpus"][0]["workload"], "write:224MiB");
}

#[test]
fn a_qemu_command_can_be_pasted() {
    let compare = asked("--qemu /opt/my\\qemu --ring 1024 --workload write:16MiB,write:16MiB");
    let (rom, command) = compare.rom(&compare.cases().unwrap()[0], Path::new("a rom")).unwrap();
    assert_eq!(rom.len(), 65_536);
    let words = shlex::split(&command).unwrap();
    assert_eq!(words[..3], ["/opt/my\\qemu", "-accel", "kvm,dirty-ring-size=1024"]);
    assert_eq!(words[words.len() - 2..], ["-bios", "a rom"]);
    assert!(command.contains("-m 48M "), "{command}");
    assert!(compare.max_pause == Duration::from_millis(10) && compare.rounds == 3);
}
