//! One run: the emulator is watched until the program has ended, the machine hangs, or somebody wants an end.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::emulator::Ports;
use super::initramfs::{ENDED, STARTS};
use crate::output::{say, tell};
use crate::report::progress::Interrupt;

/// How often the ports are read.
const EVERY: Duration = Duration::from_millis(50);
/// Lines of the console that a failure shows.
const SHOWN: usize = 40;
/// Behind the program's output come [`ENDED`], a number of up to three digits and a zero byte.
const TRAILER: usize = ENDED.len() + 4;

/// How a run is watched.
#[derive(Debug)]
pub(crate) struct Watch<'a> {
    /// The user's wish to end it.
    pub(crate) interrupt: &'a Interrupt,
    /// A machine that says nothing for this long hangs.
    pub(crate) silence: Duration,
    /// Whether all of the console is shown, and not the program's part alone.
    pub(crate) console: bool,
}

/// Runs `emulator`; the program's standard output goes to `stdout`, its standard error and the machine's progress to ours.
///
/// # Errors
/// The machine ends without the program's exit status, hangs, or was interrupted.
pub(crate) fn run(
    mut emulator: Command,
    ports: &Ports,
    watch: &Watch<'_>,
    stdout: &mut impl Write,
) -> Result<ExitCode> {
    let mut emulator = Running(emulator.spawn().context("cannot start the emulator")?);
    let started = Instant::now();
    let (mut console, mut result) = (Console::open(&ports.console, watch.console)?, Port::open(&ports.result)?);
    let mut output = Output::default();
    let mut heard = Instant::now();
    say("lab: the machine boots");
    loop {
        let ended = emulator.0.try_wait()?;
        // After that, so that nothing written before the end is missed.
        let (said, written) = (console.port.read()?, result.read()?);
        if !(said.is_empty() && written.is_empty()) {
            heard = Instant::now();
        }
        console.take(&said, started);
        stdout
            .write_all(output.take(&written))
            .and_then(|()| stdout.flush())
            .context("cannot write to standard output")?;
        if watch.interrupt.requested() {
            bail!("interrupted: the machine was ended");
        }
        if let Some(status) = output.status() {
            say(format_args!(
                "lab: the program ended with status {status} after {:.1} s",
                started.elapsed().as_secs_f64()
            ));
            // It is of no use any more, and need not shut down.
            return Ok(ExitCode::from(status));
        }
        let reason = if let Some(status) = ended {
            format!("the machine ended ({status}) before the program")
        } else if console.panicked {
            "the machine's kernel panicked".to_owned()
        } else if heard.elapsed() > watch.silence {
            format!("the machine said nothing for {:?} (--silence), so it was ended", watch.silence)
        } else {
            std::thread::sleep(EVERY);
            continue;
        };
        stdout.write_all(&output.held).context("cannot write to standard output")?;
        let complaints = std::fs::read_to_string(&ports.complaints).unwrap_or_default();
        bail!("{reason}; its console ends so:\n{}\nthe emulator said: {}", console.end(), last_lines(&complaints));
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN)..].join("\n")
}

/// An emulator, which does not outlive this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A serial port, as the file that the emulator appends to.
struct Port(File);

impl Port {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self(File::open(path).with_context(|| format!("cannot read {}", path.display()))?))
    }

    /// What is new.
    fn read(&mut self) -> Result<Vec<u8>> {
        let mut new = Vec::new();
        self.0.read_to_end(&mut new)?;
        Ok(new)
    }
}

/// The program's output: what may be the trailer is held back.
#[derive(Debug, Default)]
struct Output {
    held: Vec<u8>,
    passed: Vec<u8>,
}

impl Output {
    /// Takes what the port has, returns what is the program's for sure.
    fn take(&mut self, new: &[u8]) -> &[u8] {
        self.held.extend_from_slice(new);
        let end = match trailer(&self.held) {
            Some((at, _)) => at,
            None => self.held.len().saturating_sub(TRAILER),
        };
        self.passed = self.held.drain(..end).collect();
        &self.passed
    }

    /// The exit status, once it is there.
    fn status(&self) -> Option<u8> {
        trailer(&self.held).map(|(_, status)| status)
    }
}

/// Where `bytes` end with a trailer, and the exit status in it.
fn trailer(bytes: &[u8]) -> Option<(usize, u8)> {
    let at = bytes.windows(ENDED.len()).rposition(|window| window == ENDED)?;
    let number = bytes[at + ENDED.len()..].strip_suffix(b"\0")?;
    Some((at, std::str::from_utf8(number).ok()?.parse().ok()?))
}

/// The console: lines of the kernel, then the program's standard error.
struct Console {
    port: Port,
    all: bool,
    line: Vec<u8>,
    last: VecDeque<String>,
    program: bool,
    panicked: bool,
}

impl Console {
    fn open(path: &Path, all: bool) -> Result<Self> {
        let port = Port::open(path)?;
        Ok(Self { port, all, line: Vec::new(), last: VecDeque::new(), program: false, panicked: false })
    }

    fn take(&mut self, said: &[u8], started: Instant) {
        for &byte in said {
            match byte {
                b'\n' => self.finish_line(started),
                b'\r' => {}
                _ => self.line.push(byte),
            }
        }
    }

    fn finish_line(&mut self, started: Instant) {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        self.panicked |= line.contains("Kernel panic - not syncing");
        if line.ends_with(STARTS) {
            self.program = true;
            say(format_args!("{STARTS}, {:.1} s", started.elapsed().as_secs_f64()));
        } else if self.program || self.all {
            tell(&line);
        }
        self.last.push_back(line);
        if self.last.len() > SHOWN {
            self.last.pop_front();
        }
    }

    fn end(&self) -> String {
        let unfinished = String::from_utf8_lossy(&self.line);
        let mut lines: Vec<_> = self.last.iter().map(|line| format!("  {line}")).collect();
        lines.extend((!unfinished.is_empty()).then(|| format!("  {unfinished}")));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests;
