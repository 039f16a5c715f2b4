//! What the commands do to the limiter, and what they say of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use dirtylimit_kvm::{FakeVm, PageRate};
use dirtylimit_qmp::Monitor;
use serde_json::{Value, json};

use super::Bench;

impl Bench {
    /// The limits in force, in MiB/s.
    fn limits(&self) -> [Option<u64>; 2] {
        let limit = &self.vm.limit;
        [0, 1].map(|id| limit.query(id).unwrap().limit.map(|rate| rate.bytes_per_sec(limit.page_size()) >> 20))
    }
}

#[test]
fn limits_are_set_read_and_cancelled() {
    let mut bench = Bench::new();
    bench.vm.limit.tick();
    let query = |bench: &mut Bench| bench.execute("query-vcpu-dirty-limit", json!({})).unwrap();
    assert_eq!(query(&mut bench), json!([]));
    let info = |index, limit| json!({ "cpu-index": index, "limit-rate": limit, "current-rate": 0 });
    let done = Ok(json!({}));
    assert_eq!(bench.execute("set-vcpu-dirty-limit", json!({ "cpu-index": 1, "dirty-rate": 7 })), done);
    assert_eq!((bench.limits(), query(&mut bench)), ([None, Some(7)], json!([info(1, 7)])));
    assert_eq!(bench.execute("set-vcpu-dirty-limit", json!({ "dirty-rate": 100 })), done);
    assert_eq!((bench.limits(), query(&mut bench)), ([Some(100); 2], json!([info(0, 100), info(1, 100)])));
    // Nothing a second is no limit.
    assert_eq!(bench.execute("set-vcpu-dirty-limit", json!({ "cpu-index": 0, "dirty-rate": 0 })), done);
    assert_eq!(bench.limits(), [None, Some(100)]);
    assert_eq!(bench.execute("cancel-vcpu-dirty-limit", json!({ "cpu-index": 0 })), done);
    assert_eq!(bench.execute("cancel-vcpu-dirty-limit", json!({ "cpu-index": 1 })), done);
    assert_eq!(query(&mut bench), json!([]));
    bench.execute("set-vcpu-dirty-limit", json!({ "dirty-rate": u64::MAX })).unwrap();
    assert_eq!(bench.limits(), [Some(PageRate::MAX.bytes_per_sec(bench.vm.limit.page_size()) >> 20); 2]);
    assert_eq!(bench.execute("set-vcpu-dirty-limit", json!({ "dirty-rate": 0 })), done);
    assert_eq!(bench.limits(), [None, None]);
}

#[test]
fn a_limit_that_is_not_held_says_why_and_one_below_1_is_not_none() {
    let mut bench = Bench::new();
    bench.execute("x-set-vcpu-dirty-limit", json!({ "cpu-index": 1, "dirty-rate": 0.4 })).unwrap();
    let all = |bench: &mut Bench| bench.execute("x-query-dirty-limit", json!({})).unwrap()["vcpus"][1].take();
    let info = json!({ "cpu-index": 1, "limit-rate": 1, "current-rate": 0, "x-unenforced": "lapsed" });
    assert_eq!(bench.execute("query-vcpu-dirty-limit", json!({})), Ok(json!([info])));
    assert_eq!(all(&mut bench)["unenforced"], "lapsed");
    assert_eq!(all(&mut bench)["unenforced-because"], "no tick comes, so that limits have lapsed");
    bench.vm.limit.tick();
    let info = json!({ "cpu-index": 1, "limit-rate": 1, "current-rate": 0 });
    assert_eq!(bench.execute("query-vcpu-dirty-limit", json!({})), Ok(json!([info])));
    let all = all(&mut bench);
    assert_eq!((all.get("unenforced"), all.get("unenforced-because")), (None, None));
}

#[test]
fn bad_arguments_are_refused_as_by_qemu_and_change_nothing() {
    let mut bench = Bench::new();
    bench.execute("set-vcpu-dirty-limit", json!({ "dirty-rate": 5 })).unwrap();
    let index = "incorrect cpu index specified";
    let expects = "Parameter 'dirty-rate' expects uint64";
    let integer = "Invalid parameter type for 'cpu-index', expected: integer";
    for (command, arguments, told) in [
        ("set-vcpu-dirty-limit", json!({}), "Parameter 'dirty-rate' is missing"),
        ("set-vcpu-dirty-limit", json!({ "cpu-index": 9 }), "Parameter 'dirty-rate' is missing"),
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": "1" }), expects),
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": 1.0 }), expects),
        // QEMU takes it for 2^64 - 1.
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": -1 }), expects),
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": 1, "cpu-index": 2 }), index),
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": 1, "cpu-index": -1 }), index),
        // QEMU takes it for 0.
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": 1, "cpu-index": 1u64 << 32 }), index),
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": 1, "cpu-index": "0" }), integer),
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": 1, "cpu-index": null }), integer),
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": 1, "cpu-index": u64::MAX }), integer),
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": 1, "foo": 2 }), "Parameter 'foo' is unexpected"),
        ("cancel-vcpu-dirty-limit", json!({ "cpu-index": 2 }), index),
        ("query-vcpu-dirty-limit", json!({ "a": 1 }), "Parameter 'a' is unexpected"),
        ("x-set-vcpu-dirty-limit", json!({ "dirty-rate": -0.1 }), "dirty-rate is out of range"),
        ("x-set-vm-dirty-limit", json!({}), "Parameter 'dirty-rate' is missing"),
        (
            "x-set-vm-dirty-limit",
            json!({ "dirty-rate": "1" }),
            "Invalid parameter type for 'dirty-rate', expected: number",
        ),
        ("x-set-vcpu-weight", json!({ "weight": 1 }), "Parameter 'cpu-index' is missing"),
        ("x-set-vcpu-weight", json!({ "cpu-index": 0, "weight": 0 }), "weight is out of range [1, 4294967295]."),
        ("x-set-vcpu-weight", json!({ "cpu-index": 2, "weight": 1 }), index),
        ("x-set-dirty-limit-policy", json!({ "policy": "x" }), "Parameter 'policy' does not accept value 'x'"),
        ("x-set-dirty-limit-policy", json!({ "policy": 1 }), "Invalid parameter type for 'policy', expected: string"),
        ("x-set-max-pause", json!({ "max-pause-us": 99 }), "max-pause-us is out of range [100, 1000000]."),
    ] {
        let error = bench.execute(command, arguments.clone()).unwrap_err();
        assert!(error.starts_with(told), "{command} {arguments}: {error}");
        assert_eq!(bench.limits(), [Some(5); 2], "{command} {arguments}");
    }
}

#[test]
fn a_measurement_counts_each_vcpus_pages_in_its_time() {
    let mut bench = Bench::new();
    let query = |bench: &mut Bench, unit| bench.execute("query-dirty-rate", json!({ "calc-time-unit": unit })).unwrap();
    assert_eq!(query(&mut bench, "second")["status"], "unstarted");
    let mib = (1 << 20) / u64::from(bench.vm.limit.page_size());
    bench.vm.write(0, 0, mib); // before it begins
    bench.execute("calc-dirty-rate", json!({ "calc-time": 1, "mode": "dirty-ring" })).unwrap();
    let measuring = query(&mut bench, "millisecond");
    assert_eq!((&measuring["status"], &measuring["calc-time"]), (&json!("measuring"), &json!(1000)));
    assert_eq!((measuring.get("dirty-rate"), measuring.get("vcpu-dirty-rate")), (None, None));
    let again = bench.execute("calc-dirty-rate", json!({ "calc-time": 1, "mode": "dirty-ring" }));
    assert_eq!(again, Err("the dirty rate is already being measured.".to_owned()));

    bench.vm.write(0, 1000, 2 * mib);
    bench.vm.write(1, 5000, mib / 2);
    let due = bench.now + Duration::from_secs(1);
    assert_eq!(bench.monitor.advance(bench.now + Duration::from_millis(999)), Some(due));
    assert_eq!(bench.monitor.advance(due), None);
    bench.vm.write(1, 6000, 2 * mib); // after it ended
    bench.now = due + Duration::from_secs(9);
    let start = measuring["start-time"].clone();
    assert!(start.as_u64() > Some(1_700_000_000));
    for (unit, time) in [("second", 1), ("millisecond", 1000)] {
        let expected = json!({
            "status": "measured", "start-time": start, "calc-time": time, "calc-time-unit": unit, "sample-pages": 0,
            "mode": "dirty-ring", "dirty-rate": 2,
            "vcpu-dirty-rate": [{ "id": 0, "dirty-rate": 2 }, { "id": 1, "dirty-rate": 0 }],
        });
        assert_eq!(query(&mut bench, unit), expected);
    }
}

#[test]
fn a_measurement_that_ends_late_is_over_the_time_that_it_took() {
    let mut bench = Bench::new();
    let arguments = json!({ "calc-time": 50, "calc-time-unit": "millisecond", "mode": "dirty-ring" });
    bench.execute("calc-dirty-rate", arguments).unwrap();
    let mib = (1 << 20) / u64::from(bench.vm.limit.page_size());
    bench.vm.write(0, 0, mib);
    bench.now += Duration::from_millis(100);
    let info = bench.execute("query-dirty-rate", json!({ "calc-time-unit": "millisecond" })).unwrap();
    assert_eq!((&info["calc-time"], &info["dirty-rate"]), (&json!(100), &json!(10)));
}

#[test]
fn measurements_that_cannot_be_made_are_refused_as_by_qemu() {
    let mut bench = Bench::new();
    let range = "Calculation time is out of range [50ms, 60000ms].";
    for (arguments, told) in [
        (json!({}), "Parameter 'calc-time' is missing"),
        (json!({ "calc-time": 0 }), range),
        (json!({ "calc-time": 61, "mode": "dirty-ring" }), range),
        (json!({ "calc-time": 49, "calc-time-unit": "millisecond", "mode": "dirty-ring" }), range),
        (json!({ "calc-time": i64::MAX, "mode": "dirty-ring" }), range),
        (
            json!({ "calc-time": 1, "calc-time-unit": "hour" }),
            "Parameter 'calc-time-unit' does not accept value 'hour'",
        ),
        (json!({ "calc-time": 1, "mode": "x" }), "Parameter 'mode' does not accept value 'x'"),
        (
            json!({ "calc-time": 1, "mode": "dirty-bitmap" }),
            "mode dirty-bitmap is not enabled, use other method instead.",
        ),
        // Sampling is QEMU's default.
        (json!({ "calc-time": 1 }), "mode page-sampling is not enabled, use other method instead."),
        (json!({ "calc-time": 1, "sample-pages": 12 }), "sample-pages is out of range[128, 16384]."),
        (
            json!({ "calc-time": 1, "sample-pages": 512, "mode": "dirty-ring" }),
            "sample-pages is used only in page-sampling mode",
        ),
    ] {
        assert_eq!(bench.execute("calc-dirty-rate", arguments.clone()), Err(told.to_owned()), "{arguments}");
        assert_eq!(bench.execute("query-dirty-rate", json!({})).unwrap()["status"], "unstarted");
    }
}

#[test]
fn what_qemu_has_not_is_set_and_read_too() {
    let mut bench = Bench::new();
    let done = Ok(json!({}));
    assert_eq!(bench.execute("x-set-vcpu-dirty-limit", json!({ "cpu-index": 0, "dirty-rate": 0.5 })), done);
    assert_eq!(bench.execute("x-set-vm-dirty-limit", json!({ "dirty-rate": 0.125 })), done);
    assert_eq!(bench.execute("x-set-vcpu-weight", json!({ "cpu-index": 0, "weight": 2 })), done);
    assert_eq!(bench.execute("x-set-max-pause", json!({ "max-pause-us": 5000 })), done);
    bench.vm.write(0, 0, 300);
    bench.vm.limit.tick();
    let mut all = bench.execute("x-query-dirty-limit", json!({})).unwrap();
    assert_eq!((&all["max-pause-us"], &all["soft-limit"]), (&json!(5000), &json!(960)));
    let [first, second] = [0, 1].map(|index| all["vcpus"][index].take());
    assert_eq!((&first["limit-rate"], &first["effective-rate"]), (&json!(0.5), &json!(0.25)));
    assert_eq!((second.get("limit-rate"), &second["effective-rate"]), (None, &json!(0.125)));
    assert_eq!(
        (&first["net-pages"], &first["gross-pages"], &second["net-pages"]),
        (&json!(300), &json!(300), &json!(0))
    );
    assert_eq!(bench.execute("x-set-vm-dirty-limit", json!({ "dirty-rate": 0 })), done);
    assert_eq!(bench.execute("x-set-vcpu-dirty-limit", json!({ "dirty-rate": 0 })), done);
    let all = bench.execute("x-query-dirty-limit", json!({})).unwrap();
    assert_eq!(all["vcpus"][0].get("effective-rate"), None);
    for policy in ["stepped", "paced"] {
        bench.execute("set-vcpu-dirty-limit", json!({ "dirty-rate": 1 })).unwrap();
        assert_eq!(bench.execute("x-set-dirty-limit-policy", json!({ "policy": policy })), done);
        let penalty = format!("{:?}", bench.vm.limit.query(0).unwrap().penalty);
        assert_eq!(penalty.contains("Pace"), policy == "paced", "{penalty}");
    }
}

#[test]
fn quit_is_there_only_where_the_vmm_allows_it_and_changes_are_told() {
    let mut bench = Bench::new();
    let names = |bench: &mut Bench| -> Vec<String> {
        let commands = bench.execute("query-commands", json!({})).unwrap();
        let names = commands.as_array().unwrap().iter();
        names.map(|command| command["name"].as_str().unwrap().to_owned()).collect()
    };
    let without = names(&mut bench);
    assert!(without.contains(&"qmp_capabilities".to_owned()) && without.contains(&"query-dirty-rate".to_owned()));
    assert_eq!(bench.execute("quit", json!({})), Err("The command quit has not been found".to_owned()));

    let count = || {
        let calls = Arc::new(AtomicU32::new(0));
        let counted = calls.clone();
        (calls, move || counted.store(counted.load(Relaxed) + 1, Relaxed))
    };
    let ((quits, quit), (changes, change)) = (count(), count());
    bench.monitor = Monitor::new(&bench.vm.limit).on_quit(quit).on_change(change);
    assert_eq!(names(&mut bench).len(), without.len() + 1);
    bench.execute("query-vcpu-dirty-limit", Value::Object(Default::default())).unwrap();
    bench.execute("set-vcpu-dirty-limit", json!({ "dirty-rate": 1, "cpu-index": 7 })).unwrap_err();
    assert_eq!((quits.load(Relaxed), changes.load(Relaxed)), (0, 0));
    bench.execute("cancel-vcpu-dirty-limit", json!({})).unwrap();
    bench.execute("x-set-vm-dirty-limit", json!({ "dirty-rate": 1 })).unwrap();
    bench.execute("quit", json!({})).unwrap();
    assert_eq!((quits.load(Relaxed), changes.load(Relaxed)), (1, 2));
}

#[test]
fn a_monitor_does_not_keep_the_vm_alive_and_says_that_it_is_gone() {
    let mut bench = Bench::new();
    bench.execute("calc-dirty-rate", json!({ "calc-time": 1, "mode": "dirty-ring" })).unwrap();
    let vm = bench.vm.limit.downgrade();
    bench.vm = FakeVm::new(&[0, 1]);
    assert!(vm.upgrade().is_none());
    let gone = Err("the VM is gone".to_owned());
    for (command, arguments) in [
        ("set-vcpu-dirty-limit", json!({ "dirty-rate": 1 })),
        ("cancel-vcpu-dirty-limit", json!({ "cpu-index": 0 })),
        ("query-vcpu-dirty-limit", json!({})),
        ("x-set-vm-dirty-limit", json!({ "dirty-rate": 1.5 })),
        ("x-set-max-pause", json!({ "max-pause-us": 1000 })),
        ("x-query-dirty-limit", json!({})),
    ] {
        assert_eq!(bench.execute(command, arguments), gone, "{command}");
    }
    bench.now += Duration::from_secs(1);
    assert_eq!(bench.execute("query-dirty-rate", json!({})).unwrap()["status"], "unstarted");
    let measure = json!({ "calc-time": 1, "mode": "dirty-ring" });
    assert_eq!(bench.execute("calc-dirty-rate", measure), gone);
    assert!(bench.execute("query-version", json!({})).is_ok());
}
