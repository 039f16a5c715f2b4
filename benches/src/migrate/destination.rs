//! The destination: takes a guest in, and lets it run.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dirtylimit_test_vm::layout::HUGE_PAGE;
use dirtylimit_test_vm::payload::WORKLOAD_ADDRESS;

use super::address::Stream;
use super::guest::Guest;
use super::pages;
use super::state::CpuState;
use super::wire::{self, Frames, Hello, Message, Report};
use crate::guest::kvm::MAX_VCPUS;
use crate::report::progress::Interrupt;
use crate::units::PAGE_SIZE;

/// A source that says nothing for this long is gone; and one from which no page has come yet, for its kernel begins the dirty
/// log after a grace period, which on a busy host takes seconds (docs/KVM.md).
const SILENCE: Duration = Duration::from_secs(10);
const SILENCE_AT_BEGIN: Duration = Duration::from_secs(60);
/// How often a waiting read looks whether the user wants an end.
const LOOK: Duration = Duration::from_millis(50);
/// How long the guest runs here, so that it is seen that it does.
const RUN: Duration = Duration::from_millis(500);
/// How long it may take until it is seen to do something: before the source is told that it runs, and after that.
const FIRST_WORK: Duration = Duration::from_millis(10);
const LATE_WORK: Duration = Duration::from_millis(200);
/// How long a source that was refused has to read why.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Takes one guest in over `stream` and lets it run a while.
///
/// # Errors
/// Whatever keeps the guest from being taken in; the source was told.
pub(super) fn take_in(stream: Stream, interrupt: &Interrupt) -> Result<Report> {
    let mut to = stream.try_clone().context("cannot share the connection")?;
    stream.set_timeouts(Some(LOOK), Some(SILENCE)).context("cannot set the connection's timeouts")?;
    let taken = to.write_all(&wire::preamble()).context("cannot send to the source").and_then(|()| {
        let from = Patient { stream, interrupt: interrupt.clone(), silence: SILENCE_AT_BEGIN };
        Destination::greet(Frames::new(from)?, &mut to)?.run()
    });
    if let Err(error) = &taken {
        refuse(&mut to, &format!("{error:#}"));
    }
    taken
}

/// Tells a source that it is not taken in, and why.
pub(super) fn refuse(to: &mut Stream, why: &str) {
    let frame = wire::frame(&Message::Refused(why.chars().take(1000).collect()), &[]);
    if to.write_all(&frame).is_err() {
        return;
    }
    to.shutdown(Shutdown::Write);
    // A connection that is closed with something unread is reset, and what was said last is lost with it.
    let (deadline, mut unread) = (Instant::now() + LAST_WORDS, [0; 4096]);
    let _ = to.set_timeouts(Some(LOOK), None);
    while Instant::now() < deadline {
        match to.read(&mut unread) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}

/// Reads that wait, but not for ever, and not when the user wants an end.
struct Patient {
    stream: Stream,
    interrupt: Interrupt,
    /// How long the source may say nothing.
    silence: Duration,
}

impl Read for Patient {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let deadline = Instant::now() + self.silence;
        loop {
            match self.stream.read(bytes) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                result => return result,
            }
            if self.interrupt.requested() {
                return Err(std::io::Error::other("the destination was told to end"));
            }
            if Instant::now() > deadline {
                return Err(std::io::Error::other(format!("the source said nothing for {:?}", self.silence)));
            }
        }
    }
}

struct Destination<'a> {
    frames: Frames<Patient>,
    to: &'a mut Stream,
    guest: Guest,
    /// Pages that may be other than zero.
    written: pages::Bitmap,
    states: Vec<Option<CpuState>>,
}

impl<'a> Destination<'a> {
    fn greet(mut frames: Frames<Patient>, to: &'a mut Stream) -> Result<Self> {
        let (Message::Hello(hello), _) = frames.read()? else { bail!("the source did not say what guest is to come") };
        check(&hello)?;
        let vcpus = usize::try_from(hello.vcpus)?;
        let guest = Guest::blank(vcpus, hello.memory).context("cannot make room for the guest")?;
        ensure!(
            guest.tsc_hz().abs_diff(hello.tsc_hz) <= hello.tsc_hz / 1000,
            "the guest's clock has {} ticks a second, and {} here",
            hello.tsc_hz,
            guest.tsc_hz()
        );
        let mut written = vec![0; guest.memory().pages().div_ceil(64)];
        // What making the machine wrote: tables, image, parameters.
        let laid_out = usize::try_from(WORKLOAD_ADDRESS / u64::from(PAGE_SIZE))? / 64;
        written.iter_mut().take(laid_out).for_each(|word| *word = u64::MAX);
        let mut destination = Self { frames, to, guest, written, states: (0..vcpus).map(|_| None).collect() };
        destination.say(&Message::Welcome)?;
        Ok(destination)
    }

    fn say(&mut self, message: &Message) -> Result<()> {
        self.to.write_all(&wire::frame(message, &[])).context("cannot answer the source")
    }

    fn run(mut self) -> Result<Report> {
        self.receive()?;
        self.say(&Message::Ready)?;
        let unequal = self.compare()?;
        self.say(&Message::Compared { unequal })?;
        ensure!(unequal == 0, "{unequal} pages are not the source's");
        let (Message::Go { passed }, _) = self.frames.read()? else { bail!("the source did not hand the guest over") };
        self.go(Duration::from_nanos(passed))
    }

    /// Takes in memory and vCPUs.
    fn receive(&mut self) -> Result<()> {
        loop {
            let (message, data) = self.frames.read()?;
            match message {
                Message::Pages(runs) => pages::write(self.guest.memory(), &mut self.written, &runs, data)?,
                Message::Vcpu(index) => {
                    let index = usize::try_from(index)?;
                    let state: CpuState =
                        postcard::from_bytes(data).with_context(|| format!("the state of vCPU {index}"))?;
                    self.guest.restore(index, &state)?;
                    *self.states.get_mut(index).with_context(|| format!("there is no vCPU {index}"))? = Some(state);
                }
                Message::Switched => {
                    let missing = self.states.iter().position(Option::is_none);
                    return missing.map_or(Ok(()), |index| bail!("the state of vCPU {index} did not come"));
                }
                other => bail!("the source said {other:?} out of turn"),
            }
            self.frames.reader().silence = SILENCE;
        }
    }

    /// How many pages are not the source's, by their hashes.
    fn compare(&mut self) -> Result<u64> {
        let memory = self.guest.memory();
        let (mut next, mut unequal, mut buffer) = (0, 0, Vec::new());
        while next < memory.pages() {
            let (Message::Hashes { first }, data) = self.frames.read()? else { bail!("hashes of all pages must come") };
            let count = data.len() / 8;
            let fits = first == next as u64 && data.len() % 8 == 0 && (1..=memory.pages() - next).contains(&count);
            ensure!(fits, "{} bytes of hashes from page {first} on, instead of {next}", data.len());
            for (page, told) in (next..).zip(data.chunks_exact(8)) {
                let told = u64::from_le_bytes(told.try_into()?);
                unequal += u64::from(pages::hash(memory, page, &mut buffer) != told);
            }
            next += count;
        }
        Ok(unequal)
    }

    /// The guest is ours: lets it run, and watches its counters.
    fn go(mut self, passed: Duration) -> Result<Report> {
        let came = (self.guest.accesses(), self.guest.clocks());
        self.guest.measure_gaps();
        for (index, state) in self.states.iter().flatten().enumerate() {
            self.guest.restore_clock(index, state, passed)?;
        }
        self.guest.start()?;
        self.guest.wait_for_work(&came.0, false, FIRST_WORK);
        // From now on the guest is here, whether the source still listens or not.
        let _ = self.say(&Message::Running);
        let works = self.guest.wait_for_work(&came.0, true, LATE_WORK);
        let gap = if works { u64::try_from(self.guest.longest_gap().as_nanos())? } else { 0 };
        self.guest.measure_gaps();
        let (mut last, mut steps_back) = (came.clone(), 0);
        let end = Instant::now() + RUN;
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
            self.guest.check()?;
            let now = (self.guest.accesses(), self.guest.clocks());
            steps_back += back(&last.0, &now.0) + back(&last.1, &now.1);
            last = now;
        }
        let longest = u64::try_from(self.guest.longest_gap().as_nanos())?;
        self.guest.stop()?;
        let accesses = std::iter::zip(came.0, self.guest.accesses()).collect();
        let report = Report { accesses, steps_back, gap, longest };
        let _ = self.say(&Message::Report(report.clone()));
        Ok(report)
    }
}

/// How many counters have stepped back.
fn back(before: &[u64], now: &[u64]) -> u64 {
    before.iter().zip(now).filter(|(before, now)| now < before).count() as u64
}

fn check(hello: &Hello) -> Result<()> {
    let Hello { memory, page_size, vcpus, arch, .. } = hello;
    ensure!(arch == std::env::consts::ARCH, "a guest for {arch}, and this is {}", std::env::consts::ARCH);
    ensure!(*page_size == PAGE_SIZE, "pages of {page_size} bytes: here they have {PAGE_SIZE}");
    ensure!((1..=MAX_VCPUS as u64).contains(&u64::from(*vcpus)), "{vcpus} vCPUs: a guest here has 1 to {MAX_VCPUS}");
    ensure!(
        memory % HUGE_PAGE == 0 && *memory >= WORKLOAD_ADDRESS,
        "{memory} bytes of memory: a guest here has at least 16 MiB, in steps of 2 MiB"
    );
    Ok(())
}
