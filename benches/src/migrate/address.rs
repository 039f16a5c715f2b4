//! Where the two halves of a migration meet.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result};

/// An address: `unix:PATH` or `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A host and a port.
    Tcp(String),
    /// The connected socket that is this process' standard input: how one command starts the other half.
    Inherited,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const ALLOWED: &str = "an address is unix:PATH or HOST:PORT, as in unix:/tmp/guest or 127.0.0.1:4444";
        match text.split_once(':') {
            _ if text == "inherited" => Ok(Self::Inherited),
            Some(("unix", "")) => Err(format!("`{text}` lacks its path: {ALLOWED}")),
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            _ => match text.rsplit_once(':') {
                Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(Self::Tcp(text.into())),
                _ => Err(format!("`{text}`: {ALLOWED}")),
            },
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(text) => f.write_str(text),
            Self::Inherited => f.write_str("inherited"),
        }
    }
}

impl Address {
    /// Connects to it.
    ///
    /// # Errors
    /// What the system answers.
    pub fn connect(&self) -> Result<Stream> {
        let connected = match self {
            Self::Unix(path) => UnixStream::connect(path).map(Stream::Unix),
            Self::Tcp(text) => TcpStream::connect(text).map(Stream::Tcp),
            Self::Inherited => inherited(),
        };
        let stream = connected.with_context(|| format!("cannot connect to {self}"))?;
        stream.prepare().with_context(|| format!("cannot use the connection to {self}"))?;
        Ok(stream)
    }

    /// Listens there. A socket that a process left behind, and nobody listens on, is replaced.
    ///
    /// # Errors
    /// What the system answers.
    pub fn listen(&self) -> Result<Listener> {
        let listening = match self {
            Self::Unix(path) => {
                if is_left_behind(path) {
                    let _ = fs::remove_file(path);
                }
                UnixListener::bind(path).map(|socket| Listener::Unix(socket, path.clone()))
            }
            Self::Tcp(text) => TcpListener::bind(text).map(Listener::Tcp),
            Self::Inherited => Err(ErrorKind::Unsupported.into()),
        };
        listening.and_then(Listener::prepared).with_context(|| format!("cannot listen on {self}"))
    }
}

fn inherited() -> io::Result<Stream> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    Ok(Stream::Unix(socket.into()))
}

fn is_left_behind(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

/// Waits for the other half.
#[derive(Debug)]
pub enum Listener {
    /// In the file system, until it is dropped.
    Unix(UnixListener, PathBuf),
    /// At a port.
    Tcp(TcpListener),
}

impl Listener {
    fn prepared(self) -> io::Result<Self> {
        match &self {
            Self::Unix(socket, _) => socket.set_nonblocking(true)?,
            Self::Tcp(socket) => socket.set_nonblocking(true)?,
        }
        Ok(self)
    }

    /// The next one to connect, if there is one already.
    ///
    /// # Errors
    /// What the system answers.
    pub fn accept(&self) -> io::Result<Option<Stream>> {
        let accepted = match self {
            Self::Unix(socket, _) => socket.accept().map(|(stream, _)| Stream::Unix(stream)),
            Self::Tcp(socket) => socket.accept().map(|(stream, _)| Stream::Tcp(stream)),
        };
        match accepted {
            Ok(stream) => stream.prepare().map(|()| Some(stream)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where it listens; a port that was left to the system is known by now.
    pub fn address(&self) -> String {
        match self {
            Self::Unix(_, path) => format!("unix:{}", path.display()),
            Self::Tcp(socket) => socket.local_addr().map_or_else(|_| "?".into(), |address| address.to_string()),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = fs::remove_file(path);
        }
    }
}

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// By a socket of this machine.
    Unix(UnixStream),
    /// By the network.
    Tcp(TcpStream),
}

impl Stream {
    fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_nonblocking(false),
            Self::Tcp(stream) => stream.set_nonblocking(false).and_then(|()| stream.set_nodelay(true)),
        }
    }

    /// One more handle on it.
    ///
    /// # Errors
    /// What the system answers.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
        }
    }

    /// How long a read and a write wait before they give up with nothing done.
    ///
    /// # Errors
    /// What the system answers; a timeout of 0 is an invalid argument.
    pub fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(write)),
            Self::Tcp(stream) => stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(write)),
        }
    }

    /// Ends one direction, or both.
    pub fn shutdown(&self, how: Shutdown) {
        // One that is gone already is as good.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Tcp(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_write_addresses() {
        assert_eq!("unix:/tmp/a:b".parse(), Ok(Address::Unix("/tmp/a:b".into())));
        assert_eq!("[::1]:4444".parse(), Ok(Address::Tcp("[::1]:4444".into())));
        for text in ["", "unix", "unix:", "host", ":1", "host:", "host:65536", "host:http"] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.contains("unix:PATH or HOST:PORT"), "{text}: {error}");
        }
    }

    #[test]
    fn a_socket_that_was_left_behind_is_replaced_and_nothing_else_is() {
        let path = std::env::temp_dir().join(format!("dirtylimit-address-{}", std::process::id()));
        let address = Address::Unix(path.clone());
        drop(UnixListener::bind(&path).unwrap());
        let listener = address.listen().unwrap();
        assert!(address.listen().is_err(), "somebody listens there");
        drop(listener);
        assert!(!path.exists());
        fs::write(&path, "kept").unwrap();
        assert!(address.listen().is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
        fs::remove_file(path).unwrap();
    }
}
