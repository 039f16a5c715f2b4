//! The source: rounds of the dirty log while the guest runs, then the switch.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use dirtylimit_core::migrate::Round;

use super::guest::{Guest, Work};
use super::link::{End, Link, out_of_turn};
use super::modes::{Next, Steering, mib_s, nanos};
use super::pages::{self, Batch, Bitmap, Sweep};
use super::result::{RoundRecord, Sample};
use super::wire::{Hello, MAX_DATA, Message, Report};
use crate::units::PAGE_SIZE;

/// How long the destination may take nothing while the guest runs, and while it stands still.
pub(super) const SILENCE: Duration = Duration::from_secs(5);
const SILENCE_AT_SWITCH: Duration = Duration::from_secs(1);
/// The switch may take this multiple of the downtime allowed, and at least this long, before the guest goes on at the source.
const SWITCH_PATIENCE: u32 = 10;
const SWITCH_PATIENCE_LEAST: Duration = Duration::from_secs(2);
/// How long the destination may take to make room for the guest.
const WELCOME: Duration = Duration::from_secs(60);
/// Distance between two looks at the counters and the log within a round.
const LOOK: Duration = Duration::from_millis(20);
/// Distance between two rates that the steering is told of.
const WATCH: Duration = Duration::from_millis(250);
/// When a guest that no longer dirties new pages has all of them protected again, for the first time; then whenever the round is
/// twice as long. Each time costs it a fault for each page, and without it nothing tells a guest that rests from one whose pages
/// are all dirty.
const PROTECT: Duration = Duration::from_millis(500);

/// What the switch brought.
#[derive(Debug)]
pub(super) struct Switched {
    /// By the source's clock.
    pub(super) downtime: Duration,
    /// By the guest's clock; `None` where no vCPU looked at it.
    pub(super) by_guest: Option<Duration>,
    pub(super) check: Duration,
    /// When the guest ran at the destination.
    pub(super) at: Instant,
    pub(super) report: Report,
}

/// What a source tells of while it works.
pub(super) trait Watcher {
    /// Where it is, every 20 ms or so.
    fn sample(&mut self, round: usize, sample: Sample, next: &Next);
    /// A round has ended.
    fn round(&mut self, number: usize, record: &RoundRecord, next: &Next);
}

/// How fast a free guest dirties pages.
#[derive(Debug)]
struct Watch {
    /// From when on entries are counted.
    since: Instant,
    /// Ring entries until then.
    gross: u64,
    /// All its pages were protected then.
    fresh: bool,
    /// The most entries of a time that was watched.
    most: u64,
    /// How long into the round its pages are protected again.
    again: Duration,
}

impl Watch {
    /// From the beginning of a round on.
    fn begin(since: Instant, gross: u64) -> Self {
        Self { since, gross, fresh: true, most: 0, again: PROTECT }
    }
}

/// A migration under way.
pub(super) struct Source<'a> {
    guest: &'a Guest,
    link: Link,
    steering: Steering,
    downtime: Duration,
    /// Percent of the time that all vCPUs are kept out of the guest, for the thread that does so.
    held_percent: &'a AtomicU32,
    watcher: &'a mut dyn Watcher,
    /// Taken, and to be sent in the next round.
    dirty: Bitmap,
    /// Dirty again in the round that goes on, and still in the log.
    again: Bitmap,
    next: Next,
    pub(super) begun: Instant,
    /// When the log was last taken for a round.
    taken: Instant,
    looked: Instant,
    watch: Watch,
    first: Work,
    pub(super) rounds: Vec<RoundRecord>,
    pub(super) samples: Vec<Sample>,
    /// The destination was told that the guest is its own.
    pub(super) handed_over: bool,
    /// Whether the memory was equal, and how many pages were not.
    pub(super) unequal: Option<u64>,
}

impl<'a> Source<'a> {
    pub(super) fn new(
        guest: &'a Guest,
        link: Link,
        steering: Steering,
        downtime: Duration,
        held_percent: &'a AtomicU32,
        watcher: &'a mut dyn Watcher,
    ) -> Self {
        let now = Instant::now();
        Self {
            guest,
            link,
            steering,
            downtime,
            held_percent,
            watcher,
            dirty: pages::all(guest.memory().pages()),
            again: Bitmap::new(),
            next: Next::default(),
            begun: now,
            taken: now,
            looked: now,
            watch: Watch::begin(now, 0),
            first: Work::default(),
            rounds: Vec::new(),
            samples: Vec::new(),
            handed_over: false,
            unequal: None,
        }
    }

    /// Bytes sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.link.sent
    }

    /// Accesses of each vCPU when it began.
    pub(super) fn accesses_before(&self) -> &[u64] {
        &self.first.accesses
    }

    /// Everything up to the guest at the destination. `first` is in force in the first round.
    pub(super) fn run(&mut self, first: Next) -> Result<Switched, End> {
        self.greet()?;
        self.guest.measure_gaps();
        self.first = self.guest.work();
        self.begun = Instant::now();
        self.guest.log(true)?;
        // What passed meanwhile, which may be seconds, is of no round.
        let now = Instant::now();
        (self.taken, self.looked) = (now, now);
        self.watch = Watch::begin(now, self.guest.work().gross);
        self.apply(first)?;
        loop {
            self.round()?;
            if self.next.switch {
                return self.switch();
            }
            if let Some(end) = self.next.give_up.take() {
                return Err(end);
            }
        }
    }

    fn greet(&mut self) -> Result<(), End> {
        let guest = self.guest;
        let vcpus = u32::try_from(guest.vcpus()).context("more vCPUs than there can be")?;
        self.link.send(
            &Message::Hello(Hello {
                memory: guest.memory().bytes() as u64,
                page_size: guest.page_size(),
                vcpus,
                tsc_hz: guest.tsc_hz(),
                arch: std::env::consts::ARCH.to_owned(),
            }),
            &[],
        )?;
        match self.link.reply("it waits for the guest", WELCOME)? {
            Message::Welcome => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }

    fn apply(&mut self, next: Next) -> Result<(), End> {
        self.guest.set_budget(next.budget);
        self.guest.set_draining(next.drain)?;
        // Relaxed: a number by itself.
        self.held_percent.store(next.held_percent, Relaxed);
        self.next = next;
        Ok(())
    }

    /// Sends what is dirty, looks what is dirty then, and puts in force what follows.
    fn round(&mut self) -> Result<(), End> {
        let mut record = RoundRecord::default();
        let mut sweep = self.sweep();
        let sent_before = self.link.sent;
        self.send(&mut sweep, &mut record)?;
        record.send_s = self.link.sending(self.link.sent - sent_before, record.send_s);
        self.guest.check()?;
        let held_back = self.guest.round(&mut self.dirty)?;
        let (now, before) = (Instant::now(), self.taken);
        self.taken = now;
        self.watch = Watch::begin(now, self.guest.work().gross);
        let left = pages::count(&self.dirty) + held_back;
        let round = Round {
            sent: self.link.sent - sent_before,
            sending: nanos(record.send_s),
            length: nanos(now - before),
            left,
            redirtied: left,
            held_back,
            throttle: self.next.budget,
            ..Round::default()
        };
        let next = self.steering.finish_round(&round);
        record.length_s = now - before;
        (record.left_pages, record.held_back_pages) = (left, held_back);
        (record.budget_mib_s, record.held_percent) = (mib_s(next.budget), next.held_percent);
        (record.verdict, record.reason) = (next.verdict.clone(), next.reason.clone());
        if next.switch {
            // What holds the guest stays in force until it stands still.
            self.next = next;
        } else {
            self.apply(next)?;
        }
        self.watcher.round(self.rounds.len() + 1, &record, &self.next);
        self.rounds.push(record);
        Ok(())
    }

    /// What is dirty, to be sent; nothing is dirty again yet.
    fn sweep(&mut self) -> Sweep {
        let none = vec![0; self.dirty.len()];
        self.again.clone_from(&none);
        Sweep::new(std::mem::replace(&mut self.dirty, none))
    }

    /// Sends the pages of `sweep`, but those that are known to be dirty again.
    fn send(&mut self, sweep: &mut Sweep, record: &mut RoundRecord) -> Result<(), End> {
        let mut batch = Batch::default();
        let memory = self.guest.memory();
        self.link.resume();
        loop {
            let start = Instant::now();
            if !sweep.next(memory, &self.again, &mut batch) {
                return Ok(());
            }
            record.sent_pages += batch.pages;
            record.skipped_pages += batch.skipped;
            if batch.bytes().is_empty() {
                // Looking for zeros is no sending: the bandwidth would look lower than it is.
                self.link.resume();
                if batch.pages > 0 {
                    self.link.send(&Message::Pages(std::mem::take(&mut batch.runs)), &[])?;
                }
            } else {
                // Of the time for looking, what the pages that go over took.
                let going = batch.bytes().len() / PAGE_SIZE as usize;
                let looked_at = batch.pages + batch.skipped;
                let looking = start.elapsed().mul_f64(going as f64 / looked_at.max(1) as f64);
                let start = Instant::now();
                self.link.send(&Message::Pages(std::mem::take(&mut batch.runs)), batch.bytes())?;
                record.send_s += looking + start.elapsed();
            }
            if self.looked.elapsed() >= LOOK {
                self.look(sweep)?;
                self.link.resume();
            }
        }
    }

    /// Looks at the counters within a round, and at what is dirty again.
    fn look(&mut self, sweep: &Sweep) -> Result<(), End> {
        let work = self.guest.work();
        let now = Instant::now();
        self.looked = now;
        self.guest.peek(&mut self.again)?;
        if self.next.budget.is_none() {
            self.steering.sample(now - self.taken, pages::count(&self.again));
            self.watch(now, work.gross)?;
        }
        let sample = Sample {
            at_s: now - self.begun,
            left_pages: pages::count_either(&sweep.pending, &self.again),
            sent_bytes: self.link.sent,
            dirtied_pages: work.net.saturating_sub(self.first.net),
            budget_mib_s: mib_s(self.next.budget),
        };
        self.samples.push(sample);
        self.watcher.sample(self.rounds.len() + 1, sample, &self.next);
        Ok(())
    }

    /// Tells how fast a guest without a throttle dirties pages, as long as that can be seen.
    fn watch(&mut self, now: Instant, gross: u64) -> Result<(), End> {
        let watch = &mut self.watch;
        let time = now - watch.since;
        if time < WATCH {
            return Ok(());
        }
        let entries = gross.saturating_sub(watch.gross);
        let is_seen = watch.fresh || entries > watch.most / 8;
        if is_seen {
            self.steering.watch(time, entries);
        }
        (watch.since, watch.gross, watch.fresh) = (now, gross, false);
        watch.most = watch.most.max(entries);
        if !is_seen && self.steering.wants_rests() && now - self.taken >= watch.again {
            self.guest.round(&mut self.dirty)?;
            watch.again = 2 * (now - self.taken);
            (watch.since, watch.gross, watch.fresh) = (Instant::now(), self.guest.work().gross, true);
        }
        Ok(())
    }

    /// Stops the guest, sends the rest, compares the memory, and hands the guest over.
    fn switch(&mut self) -> Result<Switched, End> {
        let stop = Instant::now();
        let patience = (SWITCH_PATIENCE * self.downtime).max(SWITCH_PATIENCE_LEAST);
        (self.link.silence, self.link.deadline) = (SILENCE_AT_SWITCH, Some(stop + patience));
        // Relaxed: as in `apply`.
        self.held_percent.store(0, Relaxed);
        self.guest.stop()?;
        let mut record =
            RoundRecord { verdict: "switched".into(), reason: "the last round".into(), ..RoundRecord::default() };
        self.guest.last_round(&mut self.dirty)?;
        let mut sweep = self.sweep();
        // There is no guest to look at.
        self.looked = Instant::now() + patience;
        self.send(&mut sweep, &mut record)?;
        // The clocks run on while the vCPUs stand still: what passes from here on is not in the state.
        let saved = Instant::now();
        for (index, state) in (0..).zip(self.guest.save().context("cannot save the vCPUs")?) {
            let state = postcard::to_stdvec(&state).context("cannot encode a vCPU's state")?;
            self.link.send(&Message::Vcpu(index), &state)?;
        }
        self.link.send(&Message::Switched, &[])?;
        match self.link.reply("it has all of the guest", patience)? {
            Message::Ready => {}
            other => return Err(out_of_turn(&other)),
        }
        let ready = Instant::now();
        let sent = self.link.sent;
        self.compare()?;
        self.link.sent = sent;
        let compared = Instant::now();
        // From here on it may run there.
        self.handed_over = true;
        self.link.cancellable = false;
        let passed = nanos(saved.elapsed());
        self.link.send(&Message::Go { passed }, &[]).map_err(handed_over)?;
        let running = self.link.reply("the guest runs", SILENCE).map_err(handed_over)?;
        if running != Message::Running {
            return Err(handed_over(out_of_turn(&running)));
        }
        let at = Instant::now();
        let check = compared - ready;
        record.length_s = at - stop - check;
        self.rounds.push(record);
        let report = match self.link.reply("how the guest does", SILENCE).map_err(handed_over)? {
            Message::Report(report) => report,
            other => return Err(handed_over(out_of_turn(&other))),
        };
        let by_guest = (report.gap > 0).then(|| Duration::from_nanos(report.gap).saturating_sub(check));
        Ok(Switched { downtime: at - stop - check, by_guest, check, at, report })
    }

    /// Has the destination compare the hashes of all pages with its own.
    fn compare(&mut self) -> Result<(), End> {
        self.link.uncap();
        self.link.deadline = None;
        let memory = self.guest.memory();
        let (mut hashes, mut buffer) = (Vec::with_capacity(MAX_DATA), Vec::new());
        let mut first = 0;
        while first < memory.pages() {
            hashes.clear();
            let end = memory.pages().min(first + MAX_DATA / 8);
            for page in first..end {
                hashes.extend(pages::hash(memory, page, &mut buffer).to_le_bytes());
            }
            self.link.send(&Message::Hashes { first: first as u64 }, &hashes)?;
            first = end;
        }
        let unequal = match self.link.reply("it has compared the memory", WELCOME)? {
            Message::Compared { unequal } => unequal,
            other => return Err(out_of_turn(&other)),
        };
        self.unequal = Some(unequal);
        if unequal > 0 { Err(End::Unequal(unequal)) } else { Ok(()) }
    }
}

/// An end after the destination was told that the guest is its own.
fn handed_over(end: End) -> End {
    let why: Error = match end {
        End::Failed(error) => error,
        other => anyhow!("{other}"),
    };
    End::Failed(why.context(
        "the guest was handed over, and then the connection failed: it stands still here, for it may run there",
    ))
}
