use std::time::Duration;

use serde_json::Value;

use super::result::{Measured, Migrations, Outcome, Tried};
use super::{Side, Throttle};
use crate::compare::Peer;
use crate::compare::tests::{asked, assert_documented};
use crate::migrate::Mode;
use crate::migrate::result::Verdict;
use crate::record::Host;

fn outcome(total: f64, done: bool) -> Outcome {
    let measured = Measured {
        total_s: Some(total),
        downtime_ms: done.then_some(250.0 + total),
        sent_mib: Some(2e3 * total),
        lost_guest_s: Some(total / 3.0),
        longest_stall_ms: Some(1e5 / 3.0),
        ..Measured::default()
    };
    let verdict = if done { Verdict::Done } else { Verdict::Unreachable };
    Outcome::new(verdict, "it was not over after 60s".into(), measured, vec![Some(100.0), None, Some(40.0)])
}

fn migrations() -> Migrations {
    let qemu = "QEMU 10.0.2, auto-converge";
    let command = Some("qemu-system-x86_64 -bios ROM".to_owned());
    Migrations {
        host: Host::default(),
        workloads: vec!["write:224MiB".parse().unwrap(), "idle".parse().unwrap(), "read:32MiB".parse().unwrap()],
        memory_mib: 512,
        bandwidth_mib_s: 200.0,
        downtime_allowed_ms: 300.0,
        deadline_s: 60.0,
        rounds: 3,
        interrupted: false,
        sides: vec![
            Tried::of(qemu.into(), command, [60.0, 60.5, 6.0].map(|total| outcome(total, total < 60.0)).into()),
            Tried::of("dirtylimit, goal".into(), None, [1.5, 1.25, 1.6].map(|total| outcome(total, true)).into()),
        ],
    }
}

#[test]
fn medians_are_of_all_rounds_and_one_that_did_not_come_about_is_worse_than_any() {
    let [theirs, ours] = &migrations().sides[..] else { unreachable!("two sides") };
    assert_eq!((theirs.done, theirs.median.total_s, theirs.median.downtime_ms), (1, Some(60.0), None));
    assert_eq!((ours.done, ours.median.total_s, ours.median.downtime_ms), (3, Some(1.5), Some(251.5)));
    assert_eq!((ours.median.least_work_kept_pct, ours.rounds[0].measured.lost_guest_s), (Some(40.0), Some(0.5)));
}

#[test]
fn the_table_fits_eighty_columns_and_says_why_not() {
    let text = migrations().to_string();
    let widest = text.lines().map(|line| line.chars().count()).max();
    assert!(widest <= Some(80), "{widest:?} columns:\n{text}");
    assert!(text.contains("QEMU 10.0.2, auto-converge: it was not over after 60s\n"), "{text}");
    let row = text.lines().find(|line| line.starts_with("dirtylimit, goal")).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>()[2..6], ["3/3", "1.5", "252", "3000"]);
}

#[test]
fn the_document_has_every_name_of_the_manual() {
    let document: Value = serde_json::to_value(migrations()).unwrap();
    assert_documented(&document, 1);
    assert_eq!(document["sides"][0]["rounds"][0]["verdict"], "unreachable");
}

#[test]
fn the_page_has_a_dot_for_each_migration_that_came_about() {
    let html = super::page(&migrations()).unwrap().html();
    assert!(html.contains("<svg") && html.contains("ROM</span>") && html.contains("1 of 3") && !html.contains("NaN"));
    let mut none = migrations();
    none.sides.remove(1);
    none.sides[0].rounds.iter_mut().for_each(|round| round.measured.downtime_ms = None);
    assert!(super::page(&none).unwrap().html().contains("downtime allowed"));
}

#[test]
fn a_lost_page_is_seen() {
    let mut migrations = migrations();
    assert!(!migrations.lost());
    migrations.sides[1].rounds[2].memory_equal = Some(false);
    assert!(migrations.lost());
}

#[test]
fn each_qemu_has_its_modes_and_a_limit_is_a_quarter_of_the_bandwidth() {
    let migrating = asked("--migrate --bandwidth 10MiB/s --rounds 5").migrating().unwrap();
    assert_eq!((&migrating.limits[..], migrating.rounds, migrating.deadline), (&[2][..], 5, Duration::from_secs(60)));
    let qemu = |version: &str| Peer::Qemu("qemu".into(), version.into());
    let names = |sides: Vec<Side>| sides.iter().map(Side::name).collect::<Vec<_>>();
    let sides = migrating.sides(&[qemu("QEMU 9"), qemu("QEMU 10")]);
    assert!(matches!(sides[2], Side::Qemu(_, _, Throttle::DirtyLimit { mib_s: 2 })));
    assert!(matches!(sides[6], Side::Ours(Mode::Goal)));
    let ours = ["dirtylimit, goal", "dirtylimit, half", "dirtylimit, ramp", "dirtylimit, uniform"];
    assert_eq!(
        names(sides)[3..],
        [&["QEMU 10, none", "QEMU 10, auto-converge", "QEMU 10, dirty-limit 2"], &ours[..]].concat()
    );
    assert_eq!(names(migrating.sides(&[Peer::Stepped])), ours);
    let several = asked("--migrate --limit 20MiB/s,50MiB/s").migrating().unwrap();
    assert_eq!((several.limits.len(), several.sides(&[qemu("QEMU")]).len()), (2, 8));
    for (line, told) in [
        ("--deadline 10ms", "--deadline 10ms: 1s to 3600s"),
        ("--downtime 1ms", "--downtime 1ms: 20ms to"),
        ("--memory 4096MiB", "--memory: "),
        ("--limit 100", "whole MiB/s"),
    ] {
        let error = asked(&format!("--migrate {line}")).migrating().unwrap_err();
        assert!(error.contains(told), "{line}: {error}");
    }
}
