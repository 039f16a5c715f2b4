//! Sources' and destinations' other halves, made for a test.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dirtylimit_bench::migrate::wire::{self, Frames, Message};

use super::bench;

pub(crate) fn socket(test: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("dirtylimit-migrate-{test}-{}", std::process::id()));
    let _ = fs::remove_file(&path);
    path
}

/// A destination of a test's own: does `serve` for each connection, in turn.
pub(crate) fn destination(
    test: &str,
    times: usize,
    mut serve: impl FnMut(usize, UnixStream) + Send + 'static,
) -> (String, JoinHandle<()>) {
    let path = socket(test);
    let listener = UnixListener::bind(&path).unwrap();
    let address = format!("unix:{}", path.display());
    let thread = thread::spawn(move || {
        for time in 0..times {
            serve(time, listener.accept().unwrap().0);
        }
        fs::remove_file(path).unwrap();
    });
    (address, thread)
}

pub(crate) fn say(to: &mut UnixStream, message: &Message) {
    to.write_all(&wire::frame(message, &[])).unwrap();
}

/// Greets a source as a destination does.
pub(crate) fn greet(stream: &mut UnixStream) -> Frames<UnixStream> {
    stream.write_all(&wire::preamble()).unwrap();
    let mut frames = Frames::new(stream.try_clone().unwrap()).unwrap();
    assert!(matches!(frames.read().unwrap().0, Message::Hello(_)));
    say(stream, &Message::Welcome);
    frames
}

/// A process that waits for a guest, where it does, and what it tells after that.
pub(crate) struct Listening {
    pub(crate) process: Child,
    pub(crate) address: String,
    told: Option<JoinHandle<String>>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        // A test that fails leaves nobody behind.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Listening {
    pub(crate) fn at(address: &str) -> Self {
        let mut program = bench(&format!("--listen {address}"));
        let mut process = program.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap());
        let mut first = String::new();
        lines.read_line(&mut first).unwrap();
        let address = first.trim().trim_end_matches('.').rsplit(' ').next().unwrap().to_owned();
        let told = Some(thread::spawn(move || {
            let mut rest = String::new();
            lines.read_to_string(&mut rest).unwrap();
            rest
        }));
        Self { process, address, told }
    }

    pub(crate) fn end(mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline && self.process.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.process.kill();
        (self.process.wait().unwrap().code(), self.told.take().unwrap().join().unwrap())
    }
}

/// Passes frames on to `to`, after `change` has seen them, until one side closes.
pub(crate) fn pass(source: &mut UnixStream, to: &str, mut change: impl FnMut(&Message, &mut Vec<u8>, &mut Vec<u8>)) {
    let mut destination = UnixStream::connect(to.trim_start_matches("unix:")).unwrap();
    let (mut replies, mut back) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
    let returning = thread::spawn(move || {
        let _ = std::io::copy(&mut replies, &mut back);
        back.shutdown(Shutdown::Both)
    });
    destination.write_all(&wire::preamble()).unwrap();
    let mut frames = Frames::new(source.try_clone().unwrap()).unwrap();
    while let Ok((message, data)) = frames.read() {
        let mut data = data.to_vec();
        let mut frame = wire::frame(&message, &data);
        change(&message, &mut frame, &mut data);
        if destination.write_all(&frame).and_then(|()| destination.write_all(&data)).is_err() {
            break;
        }
    }
    let _ = destination.shutdown(Shutdown::Write);
    let _ = returning.join();
}
