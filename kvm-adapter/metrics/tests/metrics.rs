//! What Prometheus is told, and how.

#[cfg(not(dirtylimit_planted))]
compile_error!(
    "these tests need --cfg dirtylimit_planted: .cargo/config.toml has it, and RUSTFLAGS overrides that file"
);

use std::collections::BTreeMap;
use std::fs::{OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::Duration;

use dirtylimit_kvm::{Error, FakeVm, PageRate};
use dirtylimit_metrics::{Metrics, MetricsServer};

/// Two vCPUs, the first one limited and throttled, under a budget; the second wrote 100 pages.
fn vm() -> FakeVm {
    let mut vm = FakeVm::new(&[7, 70]);
    vm.limit.set_limit(7, PageRate::from_pages_per_sec(25_600)).unwrap();
    vm.limit.set_vm_limit(Some(PageRate::from_pages_per_sec(51_200)));
    vm.limit.tick();
    assert_eq!(vm.write(0, 0, u64::MAX), 960);
    vm.write(1, 5000, 100);
    vm.write_beyond(1); // logged, not counted as net
    _ = vm.vcpus[0].before_run().unwrap();
    vm.limit.meter();
    vm
}

/// The VM's metrics.
fn metrics(vm: &FakeVm) -> Metrics {
    Metrics::new(&vm.limit)
}

/// The samples of an exposition, by name and labels.
fn samples(text: &str) -> BTreeMap<&str, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.rsplit_once(' ').unwrap()).map(|(name, value)| (name, value.parse().unwrap())).collect()
}

#[test]
fn the_counters_are_those_of_query_and_stats() {
    let vm = vm();
    let limit = &vm.limit;
    vm.disturb();
    assert!(matches!(limit.last_round().map(drop), Err(Error::UnknownPages { pages: 1, .. })));
    let text = metrics(&vm).openmetrics();
    let (samples, stats, page_size) = (samples(&text), limit.stats(), limit.page_size());
    let page = f64::from(page_size);
    let of = |name: &str| *samples.get(&*format!("dirtylimit_{name}")).unwrap_or_else(|| panic!("{name}:\n{text}"));
    assert_eq!((of("vcpus"), of("leased"), of("max_pause_seconds")), (2.0, 1.0, 0.01));
    assert_eq!(of("vm_limit_bytes_per_second"), 51_200.0 * page);
    assert_eq!((of("resets_total"), of("reset_entries_total")), (stats.reset_calls as f64, stats.resets as f64));
    assert_eq!((of("suspect_resets_total"), of("suspect_bytes")), (1.0, stats.suspect_pages as f64 * page));
    assert!(stats.suspect_pages > 0);
    assert_eq!((of("failed_resets_total"), of("wedged_total")), (0.0, 0.0));
    assert_eq!((of("held_back_bytes"), of("soft_limit_entries"), of("dropped_entries_total")), (0.0, 960.0, 1.0));
    for id in [7, 70] {
        let (status, of) = (limit.query(id).unwrap(), |name: &str| of(&format!("vcpu_{name}{{vcpu=\"{id}\"}}")));
        assert_eq!(of("net_dirtied_bytes_total"), status.totals.net_pages as f64 * page);
        assert_eq!(of("gross_dirtied_bytes_total"), status.totals.gross_pages as f64 * page);
        assert_eq!(of("full_exits_total"), status.totals.full_exits as f64);
        assert_eq!(of("paused_seconds_total"), status.totals.paused_us as f64 / 1e6);
        assert_eq!(of("rate_bytes_per_second"), status.rate.bytes_per_sec(page_size) as f64);
        assert_eq!(of("demand_bytes_per_second"), status.demand.bytes_per_sec(page_size) as f64);
        assert_eq!(of("needed_pause_seconds"), 0.0);
        let effective = status.effective_limit.unwrap().bytes_per_sec(page_size) as f64;
        assert_eq!(of("effective_limit_bytes_per_second"), effective);
    }
    assert_eq!(of("vcpu_limit_bytes_per_second{vcpu=\"7\"}"), 25_600.0 * page);
    assert!(!samples.contains_key("dirtylimit_vcpu_limit_bytes_per_second{vcpu=\"70\"}"), "it has none");
    assert!(of("vcpu_net_dirtied_bytes_total{vcpu=\"7\"}") > 0.0 && of("vcpu_full_exits_total{vcpu=\"7\"}") == 1.0);
}

#[test]
fn a_limit_that_no_pause_can_hold_and_lapsed_ticks_are_told() {
    let vm = FakeVm::new(&[0]);
    let (limit, metrics) = (&vm.limit, metrics(&vm));
    assert!(metrics.openmetrics().contains("dirtylimit_leased 0.0\n"), "no tick yet");
    limit.set_limit(0, PageRate::from_pages_per_sec(2)).unwrap();
    limit.tick();
    let text = metrics.openmetrics();
    assert!(text.contains("dirtylimit_leased 1.0\n"));
    assert!(!samples(&text).contains_key("dirtylimit_vm_limit_bytes_per_second"), "it has no budget");
    assert!(text.contains("dirtylimit_vcpu_needed_pause_seconds{vcpu=\"0\"} 0.5\n"), "{text}");
}

/// Every family's HELP, TYPE and UNIT come first and once, and samples have the names that their types ask for.
fn well_formed(text: &str, openmetrics: bool) {
    let mut seen = std::collections::HashSet::new();
    let (mut family, mut kind) = (String::new(), String::new());
    for line in text.lines().take_while(|line| *line != "# EOF") {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["#", "HELP", name, ..] => {
                assert!(seen.insert(name.to_owned()), "{name} twice");
                family = name.into();
            }
            ["#", "TYPE", name, is @ ("counter" | "gauge")] => {
                assert_eq!(name, family);
                assert_eq!(name.ends_with("_total"), is == "counter" && !openmetrics, "{name}");
                kind = is.into();
            }
            ["#", "UNIT", name, unit] => {
                assert!(openmetrics && name == family && name.ends_with(&format!("_{unit}")), "{line}");
            }
            [sample, value] => {
                let total = if kind == "counter" && openmetrics { "_total" } else { "" };
                assert_eq!(sample.split('{').next(), Some(&*format!("{family}{total}")));
                assert!(value.parse::<f64>().unwrap() >= 0.0);
            }
            _ => panic!("{line}"),
        }
    }
    assert!(seen.len() >= 20 && text.ends_with('\n'));
    assert_eq!(text.ends_with("\n# EOF\n"), openmetrics);
}

#[test]
fn both_formats_are_well_formed_and_say_the_same() {
    let vm = vm();
    let (new, old) = (metrics(&vm).openmetrics(), metrics(&vm).prometheus());
    well_formed(&new, true);
    well_formed(&old, false);
    assert_eq!(samples(&new), samples(&old));
}

#[test]
fn when_the_vm_is_gone_there_are_none() {
    let vm = vm();
    let metrics = metrics(&vm);
    drop(vm);
    assert_eq!((&*metrics.openmetrics(), &*metrics.prometheus()), ("# EOF\n", ""));
}

#[test]
fn a_file_is_replaced_whole_or_left_alone() {
    let vm = vm();
    let metrics = metrics(&vm);
    let folder = std::env::temp_dir().join(format!("dirtylimit-metrics-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("vm.prom");
    std::fs::write(&file, "old").unwrap();
    metrics.write(&file).unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), metrics.prometheus());
    let names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["vm.prom"]);
    // A folder cannot be replaced by a file.
    let taken = folder.join("taken.prom");
    std::fs::create_dir_all(taken.join("full")).unwrap();
    metrics.write(&taken).unwrap_err();
    metrics.write(&folder.join("none/vm.prom")).unwrap_err();
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2, "nothing is left behind");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn nothing_but_a_regular_file_is_replaced() {
    let vm = vm();
    let metrics = metrics(&vm);
    let folder = std::env::temp_dir().join(format!("dirtylimit-metrics-kinds-{}", std::process::id()));
    let elsewhere = folder.join("elsewhere");
    std::fs::create_dir_all(&elsewhere).unwrap();
    // Links are followed, one to a file that is not there yet among them.
    let (link, file) = (folder.join("link.prom"), elsewhere.join("vm.prom"));
    symlink("again", &link).unwrap();
    symlink("elsewhere/vm.prom", folder.join("again")).unwrap();
    for _ in 0..2 {
        metrics.write(&link).unwrap();
        assert!(link.is_symlink() && folder.join("again").is_symlink());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), metrics.prometheus());
        std::fs::set_permissions(&file, Permissions::from_mode(0o604)).unwrap();
    }
    metrics.write(&file).unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o604, "a new one has the old one's permissions");
    let ring = folder.join("ring.prom");
    symlink(&ring, &ring).unwrap();
    assert_eq!(metrics.write(&ring).unwrap_err().raw_os_error(), Some(libc::ELOOP));

    let pipe = folder.join("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    assert_eq!(metrics.write(&pipe).unwrap_err().raw_os_error(), Some(libc::ENXIO), "nobody reads it, nobody waits");
    let mut reader = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    metrics.write(&pipe).unwrap();
    assert!(std::fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
    let mut text = vec![0; metrics.prometheus().len()];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(text, metrics.prometheus().as_bytes());

    let socket = folder.join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    metrics.write(&socket).unwrap();
    let mut text = String::new();
    listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
    assert_eq!(text, metrics.prometheus());

    let names = std::fs::read_dir(&folder).unwrap().chain(std::fs::read_dir(&elsewhere).unwrap());
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["again", "elsewhere", "link.prom", "pipe", "ring.prom", "socket", "vm.prom"], "nothing is left");
    std::fs::remove_dir_all(&folder).unwrap();
}

const CRATES: [&str; 3] = ["dirtylimit_core", "dirtylimit_kvm", "dirtylimit_metrics"];

/// The names in a document that are meant to be ours.
fn named(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("dirtylimit_"))
}

#[test]
fn the_manual_names_all_of_them_and_no_document_any_other() {
    let manual = include_str!("../../../docs/METRICS.md");
    let dashboard = include_str!("../../../docs/grafana-dashboard.json");
    let alerts = include_str!("../../../docs/prometheus-rules.yml");
    let glossary = include_str!("../../../docs/GLOSSARY.md");
    let vm = vm();
    let limit = &vm.limit;
    // One that is told only of a limit that is not enforced.
    limit.set_limit(70, PageRate::from_pages_per_sec(1)).unwrap();
    let text = metrics(&vm).prometheus();
    let samples = samples(&text);
    assert_eq!(samples["dirtylimit_vcpu_unenforced{vcpu=\"70\",reason=\"needs-pause\"}"], 1.0);
    assert_eq!(samples.keys().filter(|name| name.contains("unenforced")).count(), 1, "vCPU 7's is held");
    let ours: Vec<&str> = samples.keys().map(|name| name.split('{').next().unwrap()).collect();
    for name in &ours {
        assert!(manual.contains(&format!("| `{name}` |")), "METRICS.md has no row for {name}");
    }
    serde_json::from_str::<serde_json::Value>(dashboard).unwrap();
    assert!(named(dashboard).count() > 10);
    let [all, exprs, summaries, remedies] = ["- alert: ", " expr: ", " summary: ", " description: "]
        .map(|key| alerts.lines().filter(|line| line.contains(key)).count());
    assert!(all >= 8 && [exprs, summaries, remedies] == [all; 3], "an alert lacks something");
    for name in [dashboard, alerts, manual, glossary].into_iter().flat_map(named) {
        assert!(ours.contains(&name) || CRATES.contains(&name), "there is no {name}");
    }
}

fn serve(metrics: &Metrics) -> MetricsServer {
    metrics.serve(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap()
}

/// Sends it, closes that side, and returns the status and all that came back.
fn ask(server: &MetricsServer, request: impl AsRef<[u8]>) -> (u32, String) {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.write_all(request.as_ref()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest[..3].parse().ok());
    (status.unwrap_or_else(|| panic!("{answer}")), answer)
}

#[test]
fn a_scraper_gets_the_format_that_it_asks_for() {
    let vm = vm();
    let server = serve(&metrics(&vm));
    let body = |answer: &str| answer.split_once("\r\n\r\n").unwrap().1.to_owned();
    let (status, answer) = ask(&server, "GET /metrics HTTP/1.1\r\nHost: me\r\n\r\n");
    assert_eq!((status, body(&answer)), (200, metrics(&vm).prometheus()));
    assert!(answer.contains("\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{answer}");
    assert!(answer.contains(&format!("\r\nContent-Length: {}\r\n", body(&answer).len())), "{answer}");
    let accept = "aCCept: application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5";
    let (status, answer) = ask(&server, format!("GET /metrics?a=b HTTP/1.1\r\n{accept}\r\n\r\n"));
    assert_eq!((status, body(&answer)), (200, metrics(&vm).openmetrics()));
    assert!(answer.contains("\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"));
}

#[test]
fn everything_else_is_told_what_is_wrong() {
    let vm = vm();
    let server = serve(&metrics(&vm));
    let many = "a: b\r\n".repeat(100);
    for (request, expected) in [
        ("GET / HTTP/1.1\r\n\r\n", 404),
        ("POST /other HTTP/1.1\r\n\r\n", 404),
        ("GET /metrics/ HTTP/1.0\r\n\r\n", 404),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        ("HEAD /metrics HTTP/1.1\r\n\r\n", 405),
        ("GET /metrics", 400),
        ("", 400),
        ("\0\u{1}\u{2}\r\n\r\n", 400),
        (&format!("GET /metrics HTTP/1.1\r\n{many}\r\n"), 431),
        (&format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(9000)), 431),
    ] {
        let (status, answer) = ask(&server, request);
        assert_eq!(status, expected, "{request}: {answer}");
    }
    assert_eq!(ask(&server, "GET /metrics HTTP/1.1\r\n\r\n").0, 200, "it is well");
}

#[test]
fn slow_clients_delay_nobody_for_long_and_the_limiter_not_at_all() {
    let mut vm = vm();
    let server = serve(&metrics(&vm));
    // As many as there are threads, and more; they say nothing, or half of it, and never read.
    let slow: Vec<_> = (0..7).map(|_| TcpStream::connect(server.address()).unwrap()).collect();
    slow.iter().step_by(2).for_each(|mut slow| slow.write_all(b"GET /metr").unwrap());
    for round in 0..20 {
        vm.write(1, round * 100, u64::MAX);
        _ = vm.vcpus[1].before_run().unwrap();
        vm.limit.tick();
    }
    assert_eq!(ask(&server, "GET /metrics HTTP/1.1\r\n\r\n").0, 200);
    drop(server);
    for mut slow in slow {
        let mut nothing = Vec::new();
        assert_eq!(slow.read_to_end(&mut nothing).unwrap_or(0), 0, "half a request has no answer");
    }
}

#[test]
fn a_dropped_server_frees_its_port() {
    let vm = vm();
    let server = serve(&metrics(&vm));
    let address = server.address();
    assert_eq!(ask(&server, "GET /metrics HTTP/1.1\r\n\r\n").0, 200);
    drop(server);
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn only_this_machine_is_served_unless_the_caller_binds() {
    let vm = vm();
    let everybody = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let error = metrics(&vm).serve(everybody).unwrap_err();
    assert_eq!(error.to_string(), "0.0.0.0:0 is no loopback address (127.0.0.1 or ::1)");
    let listener = TcpListener::bind(everybody).unwrap();
    let port = listener.local_addr().unwrap().port();
    let _server = metrics(&vm).serve_on(listener).unwrap();
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    assert_ne!(stream.read(&mut [0; 100]).unwrap(), 0);
}
