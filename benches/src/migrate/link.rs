//! The source's end of the connection: frames go out at the bandwidth that is allowed, and what comes back is read beside.

use std::fmt;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use dirtylimit_core::PageRate;

use super::address::Stream;
use super::wire::{self, Frames, Message, WireError};
use crate::report::progress::Interrupt;
use crate::units::PAGE_SIZE;

/// How long a write waits before it is seen whether the migration is to end.
const LOOK: Duration = Duration::from_millis(20);
/// Time that a sender which was late may make up for.
const BURST: Duration = Duration::from_millis(20);
/// What takes less time says nothing of the bandwidth: some of it went in a burst, and some of its time is the host's.
const TELLING: Duration = Duration::from_millis(50);
/// How long the other side has, after it closed its connection, to have said why.
const LAST_WORDS: Duration = Duration::from_millis(40);

/// Why a migration ended without the guest at the destination.
#[derive(Debug)]
pub(super) enum End {
    /// The user wants it.
    Cancelled,
    /// The goal is out of reach.
    Unreachable(String),
    /// Neither throttle nor downtime helps.
    Stalled(String),
    /// The destination's memory was not the source's.
    Unequal(u64),
    /// Anything else.
    Failed(Error),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cancelled => f.write_str("it was cancelled"),
            Self::Unreachable(why) | Self::Stalled(why) => f.write_str(why),
            Self::Unequal(pages) => write!(f, "{pages} pages of the destination are not the source's"),
            Self::Failed(error) => write!(f, "{error:#}"),
        }
    }
}

/// A token bucket: what a wire of that bandwidth takes.
#[derive(Debug)]
struct Bucket {
    /// Bytes per second; `None`: as fast as they are taken.
    rate: Option<f64>,
    /// Bytes that may go at once; negative for those that are on their way.
    credit: f64,
    since: Instant,
}

impl Bucket {
    fn new(rate: Option<PageRate>) -> Self {
        let rate = rate.map(|rate| rate.bytes_per_sec(PAGE_SIZE).max(1) as f64);
        Self { rate, credit: 0.0, since: Instant::now() }
    }

    /// The time since the last call was there for sending.
    fn earn(&mut self, now: Instant) {
        let rate = self.rate.unwrap_or(0.0);
        let earned = now.saturating_duration_since(self.since).as_secs_f64() * rate;
        self.credit = (self.credit + earned).min(BURST.as_secs_f64() * rate);
        self.since = now;
    }

    /// The time from now that it takes until `bytes` are through.
    fn take(&mut self, bytes: usize, now: Instant) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        self.earn(now);
        self.credit -= bytes as f64;
        Duration::from_secs_f64((-self.credit / rate).max(0.0))
    }
}

/// The connection.
#[derive(Debug)]
pub(super) struct Link {
    stream: Stream,
    replies: Receiver<Result<Message, WireError>>,
    /// A reply that came while its question was still being sent.
    early: Option<Message>,
    bucket: Bucket,
    interrupt: Interrupt,
    /// Whether the user's wish to end ends what waits.
    pub(super) cancellable: bool,
    /// How long the other side may take nothing.
    pub(super) silence: Duration,
    /// When all must be through, whatever was taken.
    pub(super) deadline: Option<Instant>,
    /// Bytes that were sent.
    pub(super) sent: u64,
}

impl Link {
    /// Takes a connection up.
    ///
    /// # Errors
    /// What the system answers.
    pub(super) fn new(
        mut stream: Stream,
        bandwidth: Option<PageRate>,
        silence: Duration,
        interrupt: Interrupt,
    ) -> Result<Self, End> {
        stream.set_timeouts(None, Some(LOOK)).context("cannot set the connection's timeouts")?;
        let (tell, replies) = mpsc::channel();
        let reader = stream.try_clone().context("cannot share the connection")?;
        thread::Builder::new()
            .name("replies".into())
            .spawn(move || {
                let mut frames = match Frames::new(reader) {
                    Ok(frames) => frames,
                    Err(error) => return drop(tell.send(Err(error))),
                };
                loop {
                    let reply = frames.read().map(|(message, _)| message);
                    let last = reply.is_err();
                    if tell.send(reply).is_err() || last {
                        return;
                    }
                }
            })
            .context("cannot start the thread that reads replies")?;
        // Twelve bytes always find room in a new connection.
        stream.write_all(&wire::preamble()).context("cannot send to the destination")?;
        let bucket = Bucket::new(bandwidth);
        Ok(Self {
            stream,
            replies,
            early: None,
            bucket,
            interrupt,
            cancellable: true,
            silence,
            deadline: None,
            sent: 0,
        })
    }

    /// What comes now counts from now: the time since the last frame went was spent otherwise.
    pub(super) fn resume(&mut self) {
        self.bucket.since = Instant::now();
    }

    /// How long a wire is busy with `bytes` whose sending took `measured`: at least what the bandwidth allows, and exactly that
    /// where they are too few to tell.
    pub(super) fn sending(&self, bytes: u64, measured: Duration) -> Duration {
        let Some(rate) = self.bucket.rate else { return measured };
        let allowed = Duration::from_secs_f64(bytes as f64 / rate);
        if allowed < TELLING { allowed } else { measured.max(allowed) }
    }

    /// From now on as fast as it goes.
    pub(super) fn uncap(&mut self) {
        self.bucket.rate = None;
    }

    /// Sends a frame, at the bandwidth that is allowed.
    ///
    /// # Errors
    /// The connection failed, the destination gave up or takes nothing, or the user wants an end.
    pub(super) fn send(&mut self, message: &Message, data: &[u8]) -> Result<(), End> {
        let frame = wire::frame(message, data);
        let bytes = frame.len() + data.len();
        let now = Instant::now();
        let through = now + self.bucket.take(bytes, now);
        self.look()?;
        while let Some(wait) = through.checked_duration_since(Instant::now()).filter(|wait| !wait.is_zero()) {
            thread::sleep(wait.min(LOOK));
            self.look()?;
        }
        self.write(&frame)?;
        self.write(data)?;
        self.bucket.earn(Instant::now());
        self.sent += bytes as u64;
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), End> {
        let mut last = Instant::now();
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(self.lost(ErrorKind::WriteZero.into())),
                Ok(written) => {
                    bytes = &bytes[written..];
                    last = Instant::now();
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                }
                Err(error) => return Err(self.lost(error)),
            }
            self.look()?;
            if last.elapsed() > self.silence {
                return Err(anyhow!("the destination took nothing for {:?}", self.silence).into());
            }
            if self.deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return Err(anyhow!("the destination takes too long: the guest must not stand still any longer").into());
            }
        }
        Ok(())
    }

    /// An error if the migration is to end: the user wants it, or the destination does.
    fn look(&mut self) -> Result<(), End> {
        if self.cancellable && self.interrupt.requested() {
            return Err(End::Cancelled);
        }
        // What came after an early reply, an end too, waits until that was seen.
        if self.early.is_some() {
            return Ok(());
        }
        match self.replies.try_recv() {
            Ok(Ok(reply)) if !matches!(reply, Message::Refused(_)) => {
                self.early = Some(reply);
                Ok(())
            }
            Ok(reply) => Err(unasked(reply)),
            Err(TryRecvError::Empty) => Ok(()),
            Err(TryRecvError::Disconnected) => Err(anyhow!("the connection is gone").into()),
        }
    }

    /// The connection failed at a write; what the destination said last is the better reason.
    fn lost(&mut self, error: std::io::Error) -> End {
        match self.replies.recv_timeout(LAST_WORDS) {
            Ok(reply) => unasked(reply),
            Err(_) => Error::new(error).context("the connection to the destination failed").into(),
        }
    }

    /// Waits for the destination's next message, at most `patience`.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub(super) fn reply(&mut self, what: &str, patience: Duration) -> Result<Message, End> {
        if let Some(reply) = self.early.take() {
            return Ok(reply);
        }
        let deadline = Instant::now() + patience;
        loop {
            if self.cancellable && self.interrupt.requested() {
                return Err(End::Cancelled);
            }
            match self.replies.recv_timeout(LOOK) {
                Ok(Ok(message @ Message::Refused(_))) => return Err(unasked(Ok(message))),
                Ok(Ok(message)) => return Ok(message),
                Ok(Err(error)) => return Err(unasked(Err(error))),
                Err(RecvTimeoutError::Disconnected) => return Err(anyhow!("the connection is gone").into()),
                Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                    return Err(anyhow!("the destination did not say within {patience:?} that {what}").into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The thread that reads ends with it.
        self.stream.shutdown(Shutdown::Both);
    }
}

/// What a message means that nobody asked for, but for the end of the migration.
fn unasked(reply: Result<Message, WireError>) -> End {
    End::Failed(match reply {
        Ok(Message::Refused(why)) => anyhow!("the destination gave up: {why}"),
        Ok(other) => anyhow!("the destination said {other:?} out of turn"),
        Err(WireError::Closed) => anyhow!("the destination closed the connection"),
        Err(error) => Error::new(error).context("the destination cannot be understood"),
    })
}

/// What a message that is not the expected one means.
pub(super) fn out_of_turn(message: &Message) -> End {
    unasked(Ok(message.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_through_what_the_wire_would() {
        let mut bucket = Bucket::new(Some(PageRate::from_bytes_per_sec(1 << 20, PAGE_SIZE)));
        let begin = bucket.since;
        let second = Duration::from_secs(1);
        assert_eq!(bucket.take(1 << 20, begin), second);
        // On time: the next second's worth takes a second.
        assert_eq!(bucket.take(1 << 20, begin + second), second);
        // Late by 10 ms: made up for. Late by a second: by as much as a burst.
        let late = Duration::from_millis(10);
        assert_eq!(bucket.take(1 << 20, begin + 2 * second + late).as_micros().div_ceil(1000), 990);
        assert_eq!(bucket.take(1 << 20, begin + 4 * second).as_micros().div_ceil(1000), 980);
    }

    #[test]
    fn what_was_spent_otherwise_earns_nothing_and_costs_nothing() {
        let mut bucket = Bucket::new(Some(PageRate::from_bytes_per_sec(1 << 20, PAGE_SIZE)));
        let (mut now, second) = (bucket.since, Duration::from_secs(1));
        for _ in 0..5 {
            assert_eq!(bucket.take(1 << 20, now), second);
            now += second;
            bucket.earn(now);
            now += 5 * second;
            bucket.since = now;
        }
        assert_eq!(Bucket::new(None).take(1 << 30, now), Duration::ZERO);
    }
}
