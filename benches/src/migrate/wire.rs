//! The wire format, version 1.
//!
//! Each side first sends twelve bytes: [`MAGIC`] and [`VERSION`]. Frames follow. A frame is a head of three u32 (bytes of the
//! message, bytes of the data, CRC-32 of these two lengths and of all that follows), the [`Message`] in postcard's encoding,
//! and the data, which are memory, hashes or a vCPU's state. All integers of the head are little-endian.
//!
//! | source | destination |
//! |---|---|
//! | `Hello` | `Welcome` or `Refused` |
//! | `Pages` as often as needed; with the guest stopped the last of them, `Vcpu` for each vCPU, `Switched` | `Ready` |
//! | `Hashes` of all pages | `Compared` |
//! | `Go`: the guest is the destination's | `Running`, and a moment later `Report` |
//!
//! `Refused` may come at any time before `Go`; the connection ends with it.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What a connection begins with.
pub const MAGIC: [u8; 8] = *b"dlimitMG";
/// The format's version; only the same one is understood.
pub const VERSION: u32 = 1;
/// Bytes of [`MAGIC`] and [`VERSION`].
pub const PREAMBLE: usize = 12;
/// The most data that a frame has, in bytes.
pub const MAX_DATA: usize = 256 << 10;
/// The longest message, in bytes.
const MAX_MESSAGE: usize = 64 << 10;
/// Bytes of a frame's head.
const HEAD: usize = 12;

/// What a frame says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The guest that is to come.
    Hello(Hello),
    /// Pages, in the order of their runs; data: those of the runs that are not zero.
    Pages(Vec<Run>),
    /// Data: the state of the vCPU with this index.
    Vcpu(u32),
    /// The guest stands still, and all of it was sent.
    Switched,
    /// Data: a u64 for each page from `first` on, its hash.
    Hashes {
        /// A page's number.
        first: u64,
    },
    /// The guest is the destination's.
    Go {
        /// How long ago the vCPUs' state was read, in ns: their clocks run while they stand still.
        passed: u64,
    },
    /// The destination waits for the guest.
    Welcome,
    /// The destination does not take the guest: why.
    Refused(String),
    /// All of the guest is there, and its vCPUs have their state.
    Ready,
    /// All hashes were compared.
    Compared {
        /// Pages that differ.
        unequal: u64,
    },
    /// The guest runs at the destination.
    Running,
    /// What the guest did at the destination.
    Report(Report),
}

/// The guest that is to come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of a page.
    pub page_size: u32,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// Ticks of its counter in a second.
    pub tsc_hz: u64,
    /// The architecture, as Rust names it.
    pub arch: String,
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first page's number.
    pub first: u64,
    /// How many they are.
    pub pages: u32,
    /// Nothing but zeros, which are not in the data.
    pub zero: bool,
}

/// What the guest did at the destination.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Each vCPU's accesses: when it came, and at the end.
    pub accesses: Vec<(u64, u64)>,
    /// Times that one of the guest's counters or its clock was seen to step back.
    pub steps_back: u64,
    /// The gap that the guest's own clock had at the switch, in ns; 0 where no vCPU looked at it soon.
    pub gap: u64,
    /// The longest gap that it had after that, in ns.
    pub longest: u64,
}

/// What is wrong with what came.
#[derive(Debug, Error)]
pub enum WireError {
    /// The other side has ended the connection between two frames.
    #[error("the other side closed the connection")]
    Closed,
    /// Whatever it is, it is not this program.
    #[error("the other side does not speak this protocol: it began with {:?}", String::from_utf8_lossy(.0))]
    Foreign([u8; 8]),
    /// Another version of the format.
    #[error("the other side speaks version {0} of the wire format, and this program version {VERSION}")]
    Version(u32),
    /// Lengths that no frame has.
    #[error(
        "a frame with {message} bytes of message and {data} of data: at most {MAX_MESSAGE} and {MAX_DATA} are allowed"
    )]
    Length {
        /// Bytes of its message.
        message: u32,
        /// Bytes of its data.
        data: u32,
    },
    /// It is not what was sent.
    #[error("a frame is corrupt: its checksum is {found:#010x} instead of {told:#010x}")]
    Checksum {
        /// What the head says.
        told: u32,
        /// What it is.
        found: u32,
    },
    /// Its checksum is right, and its message makes no sense.
    #[error("a frame's message cannot be decoded")]
    Message(#[source] postcard::Error),
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
}

/// What a connection begins with.
pub fn preamble() -> [u8; PREAMBLE] {
    let mut bytes = [0; PREAMBLE];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

/// A frame without its data: what is to be sent before them.
///
/// # Panics
/// More than [`MAX_DATA`] bytes of data, or a longer message than the format has: a bug of the sender.
pub fn frame(message: &Message, data: &[u8]) -> Vec<u8> {
    let frame = postcard::to_extend(message, vec![0; HEAD]).expect("a message of ours can be encoded");
    let length = frame.len() - HEAD;
    assert!(length <= MAX_MESSAGE && data.len() <= MAX_DATA, "{length} bytes of message, {} of data", data.len());
    sealed(frame, length, data)
}

#[expect(clippy::cast_possible_truncation, reason = "both lengths are bounded")]
fn sealed(mut frame: Vec<u8>, message: usize, data: &[u8]) -> Vec<u8> {
    frame[..4].copy_from_slice(&(message as u32).to_le_bytes());
    frame[4..8].copy_from_slice(&(data.len() as u32).to_le_bytes());
    let checksum = checksum(&frame[..8], &frame[HEAD..], data);
    frame[8..HEAD].copy_from_slice(&checksum.to_le_bytes());
    frame
}

fn checksum(lengths: &[u8], message: &[u8], data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    [lengths, message, data].into_iter().for_each(|part| hasher.update(part));
    hasher.finalize()
}

/// What the other side sends, frame by frame.
#[derive(Debug)]
pub struct Frames<R> {
    from: R,
    /// Message and data of the last frame.
    body: Vec<u8>,
}

impl<R: Read> Frames<R> {
    /// Reads what the connection begins with.
    ///
    /// # Errors
    /// Another protocol, or another version of this one; what reading may answer.
    pub fn new(mut from: R) -> Result<Self, WireError> {
        let mut bytes = [0; PREAMBLE];
        fill(&mut from, &mut bytes)?;
        let (magic, version) = bytes.split_at(8);
        if magic != MAGIC {
            return Err(WireError::Foreign(magic.try_into().unwrap_or_default()));
        }
        match u32::from_le_bytes(version.try_into().unwrap_or_default()) {
            VERSION => Ok(Self { from, body: Vec::new() }),
            other => Err(WireError::Version(other)),
        }
    }

    /// What they are read from.
    pub const fn reader(&mut self) -> &mut R {
        &mut self.from
    }

    /// The next frame: its message and its data.
    ///
    /// # Errors
    /// A frame that is not as it was sent, or never was one; what reading may answer. Nothing that follows is a frame then.
    pub fn read(&mut self) -> Result<(Message, &[u8]), WireError> {
        let mut head = [0; HEAD];
        fill(&mut self.from, &mut head)?;
        let [message, data, told] =
            [0, 4, 8].map(|at| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
        let (length, all) = (message as usize, message as usize + data as usize);
        if length > MAX_MESSAGE || data as usize > MAX_DATA {
            return Err(WireError::Length { message, data });
        }
        self.body.resize(all, 0);
        match self.from.read_exact(&mut self.body) {
            Ok(()) => {}
            Err(error) => return Err(WireError::Io(error)),
        }
        let (text, data) = self.body.split_at(length);
        let found = checksum(&head[..8], text, data);
        if found != told {
            return Err(WireError::Checksum { told, found });
        }
        match postcard::take_from_bytes(text).map_err(WireError::Message)? {
            (message, []) => Ok((message, data)),
            _ => Err(WireError::Message(postcard::Error::SerializeBufferFull)),
        }
    }
}

/// Reads all of `bytes`; [`WireError::Closed`] if there is not even the first.
fn fill(from: &mut impl Read, bytes: &mut [u8]) -> Result<(), WireError> {
    let mut first = 0;
    while first == 0 {
        first = match from.read(bytes) {
            Ok(0) => return Err(WireError::Closed),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(WireError::Io(error)),
        };
    }
    from.read_exact(&mut bytes[first..]).map_err(WireError::Io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream(frames: &[(Message, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = preamble().to_vec();
        for (message, data) in frames {
            bytes.extend(frame(message, data));
            bytes.extend(data);
        }
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vec<(Message, Vec<u8>)>, WireError> {
        let mut frames = Frames::new(bytes)?;
        let mut read = Vec::new();
        loop {
            match frames.read() {
                Ok((message, data)) => read.push((message, data.to_vec())),
                Err(WireError::Closed) => return Ok(read),
                Err(error) => return Err(error),
            }
        }
    }

    fn some() -> Vec<(Message, Vec<u8>)> {
        let hello =
            Hello { memory: 512 << 20, page_size: 4096, vcpus: 2, tsc_hz: 2_000_000_000, arch: "x86_64".into() };
        let runs = vec![Run { first: 7, pages: 2, zero: false }, Run { first: 1 << 40, pages: u32::MAX, zero: true }];
        vec![
            (Message::Hello(hello), vec![]),
            (Message::Pages(runs), vec![3; 2 * 4096]),
            (Message::Vcpu(1), vec![1, 2, 3]),
            (Message::Go { passed: u64::MAX }, vec![]),
            (Message::Refused("no room".into()), vec![]),
            (Message::Report(Report { accesses: vec![(1, 2)], steps_back: 0, gap: 3, longest: 9 }), vec![]),
        ]
    }

    #[test]
    fn frames_come_as_they_were_sent() {
        assert_eq!(read(&stream(&some())).unwrap(), some());
    }

    #[test]
    fn every_bit_that_flips_is_noticed() {
        let whole = stream(&some());
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bytes).is_err(), "bit {bit} of {}", bytes.len() * 8);
        }
    }

    #[test]
    fn a_stream_that_ends_within_a_frame_is_an_error_and_between_two_is_none() {
        let (whole, frames) = (stream(&some()), some().len());
        let ends: Vec<_> = (PREAMBLE..=whole.len()).filter(|&end| read(&whole[..end]).is_ok()).collect();
        assert_eq!(ends.len(), frames + 1, "{ends:?}");
    }

    #[test]
    fn others_are_told_apart() {
        assert!(matches!(Frames::new(&b"SSH-2.0-OpenSSH_9"[..]), Err(WireError::Foreign(_))));
        let mut bytes = preamble();
        bytes[8] = 2;
        let error = Frames::new(&bytes[..]).unwrap_err().to_string();
        assert!(error.contains("version 2") && error.contains("version 1"), "{error}");
        assert!(matches!(Frames::new(&b""[..]), Err(WireError::Closed)));
    }

    #[test]
    fn a_frame_that_claims_gigabytes_is_refused_before_they_are_waited_for() {
        let mut bytes = preamble().to_vec();
        bytes.extend([0xff; HEAD]);
        assert!(matches!(read(&bytes), Err(WireError::Length { .. })));
    }

    #[test]
    fn what_follows_a_message_in_its_frame_is_refused() {
        let mut told = postcard::to_extend(&Message::Ready, vec![0; HEAD]).unwrap();
        told.push(0);
        let length = told.len() - HEAD;
        let mut bytes = preamble().to_vec();
        bytes.extend(sealed(told, length, &[]));
        assert!(matches!(read(&bytes), Err(WireError::Message(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), sealed_too in any::<bool>()) {
            let mut stream = preamble().to_vec();
            if sealed_too {
                let mut told = vec![0; HEAD];
                told.extend(&bytes);
                stream.extend(sealed(told, bytes.len(), &[]));
            } else {
                stream.extend(&bytes);
            }
            let _ = read(&stream);
        }
    }
}
