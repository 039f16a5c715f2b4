//! The control socket of a run on real KVM: the `qapi` crate's client is served, whatever others do meanwhile.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use dirtylimit_bench::cli::{Cli, Command};
use dirtylimit_bench::guest::kvm::{kvm_or_skip, run};
use dirtylimit_bench::guest::{Phase, Progress, VcpuNow};
use dirtylimit_kvm::PageRate;
use qapi::qmp::{self, DirtyRateMeasureMode, DirtyRateStatus};
use qapi::{ExecuteError, Qmp};

/// Watches the run end by itself.
struct Nobody;

impl Progress for Nobody {
    fn sample(&mut self, _: Duration, _: Phase, _: &[VcpuNow]) {}

    fn interrupted(&self) -> bool {
        false
    }
}

fn connect(path: &Path) -> UnixStream {
    let patience = Instant::now() + Duration::from_secs(60);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) if Instant::now() > patience => panic!("{}: {error}", path.display()),
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Sends what is no QMP, and leaves when the server has had enough of it or has answered it all.
fn annoy(path: &Path, index: u8) {
    let stream = connect(path);
    stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let garbage = [b'[', b'{', b'"', 0xff, b'x'][usize::from(index) % 5];
    // Some are refused, and hang up on in the middle of it.
    let _ = (&stream).write_all(&[garbage; 1 << 16]);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = (&stream).read_to_end(&mut Vec::new());
}

#[test]
fn a_run_is_driven_by_a_client_while_a_hundred_others_misbehave() {
    if !kvm_or_skip() {
        return;
    }
    let path = std::env::temp_dir().join(format!("dirtylimit-run-{}", std::process::id()));
    let line = "dirtylimit-bench run --guest kvm --workload write:64MiB --limit none --seconds 60 --qmp";
    let cli = Cli::try_parse_from(line.split(' ').chain([path.to_str().unwrap()])).unwrap();
    let Command::Run(asked) = cli.command else { unreachable!("`run` was given") };
    let plan = asked.plan().unwrap();

    let recording = thread::scope(|scope| {
        let running = scope.spawn(|| run(&plan, &mut Nobody));
        let stream = connect(&path);
        let mut client = Qmp::from_stream(&stream);
        assert!(client.handshake().unwrap().version.package.starts_with("dirtylimit "));

        client.execute(&qmp::set_vcpu_dirty_limit { cpu_index: Some(0), dirty_rate: 20 }).unwrap();
        match client.execute(&qmp::set_vcpu_dirty_limit { cpu_index: Some(1), dirty_rate: 20 }) {
            Err(ExecuteError::Qapi(error)) => assert_eq!(error.desc, "incorrect cpu index specified"),
            other => panic!("{other:?}"),
        }
        let limits = client.execute(&qmp::query_vcpu_dirty_limit {}).unwrap();
        assert_eq!((limits.len(), limits[0].cpu_index, limits[0].limit_rate), (1, 0, 20));

        let annoying: Vec<_> = (0..100)
            .map(|index| {
                scope.spawn({
                    let path = &path;
                    move || annoy(path, index)
                })
            })
            .collect();
        thread::sleep(Duration::from_secs(1)); // what the ring held is paid for
        let measure = qmp::calc_dirty_rate {
            calc_time: 2,
            calc_time_unit: None,
            sample_pages: None,
            mode: Some(DirtyRateMeasureMode::dirty_ring),
        };
        client.execute(&measure).unwrap();
        let measured = loop {
            let info = client.execute(&qmp::query_dirty_rate { calc_time_unit: None }).unwrap();
            match info.status {
                DirtyRateStatus::measured => break info,
                _ => thread::sleep(Duration::from_millis(50)),
            }
        };
        let rate = measured.vcpu_dirty_rate.unwrap()[0].dirty_rate;
        assert!(rate <= 30, "{rate} MiB/s under a limit of 20");
        annoying.into_iter().for_each(|annoying| annoying.join().unwrap());

        client.execute(&qmp::quit {}).unwrap();
        running.join().unwrap().unwrap()
    });
    assert_eq!((recording.lost_pages, recording.interrupted), (Some(0), true));
    let limits = &recording.vcpus[0].limits;
    assert_eq!(limits.last().unwrap().1, Some(PageRate::from_bytes_per_sec(20 << 20, recording.page_size)));
    assert!(!path.exists());
}
