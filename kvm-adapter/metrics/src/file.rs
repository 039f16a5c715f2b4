//! Where a file goes that is written as a whole, and how.
//!
//! Only a regular file is ever replaced, by a new one that is written beside it and renamed: a reader sees the old one or
//! the new one, and what cannot be finished leaves the old one as it is. Symbolic links are followed and stay. A device, a
//! pipe or a socket is opened and written; so is whatever `/proc` has, such as the process' own descriptors behind
//! `/dev/stdout`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, fchown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// As many symbolic links as Linux itself follows.
const MAX_LINKS: u32 = 40;
/// Names to try for the new file, in case a process that was killed has left one behind.
const NAMES: u32 = 100;

/// What a path leads to, to be written.
#[derive(Debug)]
pub enum Target {
    /// A regular file, or the place for a new one, behind all links.
    File(PathBuf),
    /// Anything else that takes writes, open.
    Stream(File),
}

impl Target {
    /// What `path` leads to. Nothing is written yet.
    ///
    /// # Errors
    /// A directory, a folder that is not there, links without an end; what opening a device, pipe or socket answers: a
    /// pipe that nobody reads is `ENXIO`.
    pub fn of(path: &Path) -> io::Result<Self> {
        let mut at = path.to_owned();
        for _ in 0..MAX_LINKS {
            if at.as_os_str().as_bytes().ends_with(b"/") {
                return Err(ErrorKind::IsADirectory.into());
            }
            let name = at.file_name().ok_or(ErrorKind::IsADirectory)?;
            let folder = at.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let folder = folder.canonicalize()?;
            at = folder.join(name);
            let kind = match fs::symlink_metadata(&at) {
                Ok(found) => found.file_type(),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::File(at)),
                Err(error) => return Err(error),
            };
            if kind.is_dir() {
                return Err(ErrorKind::IsADirectory.into());
            } else if kind.is_socket() {
                return UnixStream::connect(&at).map(|socket| Self::Stream(OwnedFd::from(socket).into()));
            } else if at.starts_with("/proc") || !(kind.is_file() || kind.is_symlink()) {
                return open(&at).map(Self::Stream);
            } else if kind.is_file() {
                return Ok(Self::File(at));
            }
            at = folder.join(fs::read_link(&at)?);
        }
        Err(io::Error::from_raw_os_error(libc::ELOOP))
    }

    /// Whether a file can be replaced here; nothing of it stays. A stream is open, which says as much.
    ///
    /// # Errors
    /// A file that may not be written, or a folder in which no other can stand beside it.
    pub fn check(&self) -> io::Result<()> {
        match self {
            Self::File(at) => create(at).and_then(|new| fs::remove_file(&new.path)),
            Self::Stream(_) => Ok(()),
        }
    }

    /// Replaces the file, which keeps its permissions and, where the system lets us, its owner; or writes to the stream.
    ///
    /// # Errors
    /// What the system answers. A file is as it was then.
    pub fn write(&mut self, content: &[u8]) -> io::Result<()> {
        match self {
            Self::File(at) => {
                let mut new = create(at)?;
                let written = new.file.write_all(content).and_then(|()| fs::rename(&new.path, &at));
                written.inspect_err(|_| drop(fs::remove_file(&new.path)))
            }
            Self::Stream(stream) => stream.write_all(content),
        }
    }
}

/// Opens what is no file, and waits for nobody: a pipe without a reader is an error. Once open, writes wait.
fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let stream = OpenOptions::new().append(true).custom_flags(flags).open(path)?;
    fcntl_setfl(&stream, fcntl_getfl(&stream)? - OFlags::NONBLOCK)?;
    Ok(stream)
}

struct New {
    path: PathBuf,
    file: File,
}

/// An empty file beside `at`, of the owner and with the permissions of what is there.
fn create(at: &Path) -> io::Result<New> {
    // What may not be written may not be replaced either, though the folder would allow it.
    let old = match OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(at) {
        Ok(old) => Some(old.metadata()?),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if old.as_ref().is_some_and(|old| !old.is_file()) {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "it is no regular file any more"));
    }
    let mut last = ErrorKind::AlreadyExists.into();
    for number in 0..NAMES {
        let path = at.with_file_name(format!(".dirtylimit-{}-{number}.new", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => {
                let new = New { path, file };
                let kept = old.map_or(Ok(()), |old| new.keep(&old));
                return kept.inspect_err(|_| drop(fs::remove_file(&new.path))).map(|()| new);
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

impl New {
    fn keep(&self, old: &fs::Metadata) -> io::Result<()> {
        let mine = self.file.metadata()?;
        if (mine.uid(), mine.gid()) != (old.uid(), old.gid()) {
            // Only root may give files away.
            let _ = fchown(&self.file, Some(old.uid()), Some(old.gid()));
        }
        self.file.set_permissions(old.permissions())
    }
}
