//! The socket: one thread, which polls. It holds a bounded number of clients, and of each no more than a begun message, a
//! chunk of input, and a chunk of replies or one that is longer.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dirtylimit_kvm::spawn_without_signals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use rustix::process::geteuid;

use crate::error::Error;
use crate::{Monitor, Session};

/// As many clients at once; the next one is told so and sent away.
pub const MAX_CLIENTS: usize = 16;
/// Read at once from a client, before the next one's turn.
const CHUNK: usize = 4096;
/// A client that does not take its reply for so long is dropped.
const PATIENCE: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 16;

/// A control socket in service, until it is dropped.
#[derive(Debug)]
pub struct QmpServer {
    path: PathBuf,
    /// Device and inode of the socket.
    file: (u64, u64),
    /// The thread ends when this closes.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Serves clients of the same user, and root, on a socket at `path` with mode 0600, from a thread of its own. What a
    /// dead server left at `path` is replaced, nothing else.
    ///
    /// # Errors
    /// A path that is too long, in use, no socket, or not ours to write; a thread that cannot be started. All name the path.
    pub fn serve(self, path: impl Into<PathBuf>) -> io::Result<QmpServer> {
        let path = path.into();
        let name = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let listener = bind(&path).map_err(name)?;
        let file = identity(&path).map_err(name)?;
        let mut server = QmpServer { path, file, stop: None, thread: None };
        let (stop, stopped) = UnixStream::pair()?;
        let run = move || Serving { monitor: self, listener, stopped, clients: Vec::new() }.run();
        // Signals, SIGPIPE too, are the VMM's.
        server.thread = Some(spawn_without_signals("dirtylimit-qmp", run)?);
        server.stop = Some(stop);
        Ok(server)
    }
}

impl QmpServer {
    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for QmpServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
        // Somebody may have put something else there.
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

fn socket() -> io::Result<rustix::fd::OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket()?;
    // Before there is a file: it is created with the socket's mode, so nobody finds it open for a moment.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path, &address)?;
            net::bind(&socket, &address)?;
        }
        bound => bound?,
    }
    net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "there is a file that is no socket: it is left alone"));
    }
    match net::connect(socket()?, address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path),
        _ => Err(io::Error::new(ErrorKind::AddrInUse, "another server listens on this socket")),
    }
}

#[derive(Debug)]
struct Serving {
    monitor: Monitor,
    listener: UnixListener,
    stopped: UnixStream,
    clients: Vec<Client>,
}

impl Serving {
    fn run(mut self) {
        loop {
            let now = Instant::now();
            let due = self.monitor.advance(now);
            self.clients.retain(|client| client.deadline().is_none_or(|deadline| now < deadline));
            let next = self.clients.iter().filter_map(Client::deadline).chain(due).min();
            let Some((stop, knock, mut ready)) = self.wait(next.map(|next| next.saturating_duration_since(now))) else {
                continue;
            };
            if stop {
                return;
            }
            let (monitor, now) = (&mut self.monitor, Instant::now());
            self.clients.retain_mut(|client| !ready.next().unwrap_or(false) || client.serve(monitor, now).is_ok());
            if knock {
                self.accept();
            }
        }
    }

    /// Waits until something can be done: whether the server is to stop, whether somebody connects, and for each client
    /// whether it has sent or taken something. `None` when interrupted.
    fn wait(&self, timeout: Option<Duration>) -> Option<(bool, bool, std::vec::IntoIter<bool>)> {
        let mut fds = vec![PollFd::new(&self.stopped, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        fds.extend(self.clients.iter().map(|client| PollFd::new(&client.stream, client.waits_for())));
        // A nanosecond too late rather than a turn too early.
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout + Duration::from_nanos(1)).ok());
        poll(&mut fds, timeout.as_ref()).ok()?;
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let (stop, knock) = (ready[0], ready[1]);
        let mut clients = ready.into_iter();
        clients.nth(1);
        Some((stop, knock, clients))
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok((stream, _)) => match self.admit(&stream) {
                Ok(()) => self.clients.push(Client::new(stream)),
                // It fits into the socket's empty buffer; who has gone needs no word.
                Err(refusal) => drop((&stream).write(&refusal.line())),
            },
            // Out of descriptors, most likely: poll would return at once, again and again.
            Err(error) if error.kind() != ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(10)),
            Err(_) => {}
        }
    }

    fn admit(&self, stream: &UnixStream) -> Result<(), Error> {
        let peer = sockopt::socket_peercred(stream).map_err(Error::generic)?;
        stream.set_nonblocking(true).map_err(Error::generic)?;
        if peer.uid != geteuid() && !peer.uid.is_root() {
            return Err(Error::generic("this socket is for its own user and root"));
        }
        if self.clients.len() >= MAX_CLIENTS {
            return Err(Error::generic(format!("this socket has {MAX_CLIENTS} clients already, the most at once")));
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    session: Session,
    /// Read and not yet looked at.
    input: Vec<u8>,
    /// Not yet sent.
    reply: Vec<u8>,
    /// When some of the reply was last taken.
    moved: Instant,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        Self { stream, session: Session::new(), input: vec![], reply: Session::greeting(), moved: Instant::now() }
    }

    /// One that does not take its replies is not listened to.
    fn waits_for(&self) -> PollFlags {
        if self.reply.is_empty() { PollFlags::IN } else { PollFlags::OUT }
    }

    fn deadline(&self) -> Option<Instant> {
        (!self.reply.is_empty()).then(|| self.moved + PATIENCE)
    }

    /// Sends, answers and reads as much as goes without waiting, in this order; an error when the client is done with.
    fn serve(&mut self, monitor: &mut Monitor, now: Instant) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        let mut may_read = true;
        loop {
            while !self.reply.is_empty() {
                match self.stream.write(&self.reply) {
                    Ok(sent) => drop(self.reply.drain(..sent)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                    Err(error) => return Err(error),
                }
                self.moved = now;
            }
            let mut left = self.input.as_slice();
            while self.reply.len() < CHUNK {
                let Some(reply) = self.session.answer(monitor, now, &mut left) else { break };
                self.reply.extend(reply);
            }
            self.input.drain(..self.input.len() - left.len());
            if !self.reply.is_empty() {
                self.moved = now;
            } else if may_read {
                may_read = false;
                match self.stream.read(&mut chunk) {
                    Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                    Ok(read) => self.input.extend(&chunk[..read]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                    Err(error) => return Err(error),
                }
            } else {
                return Ok(());
            }
        }
    }
}
