//! `GET /metrics`, and nothing else, for whoever scrapes.
//!
//! On the standard library and `httparse`: the HTTP crate small enough for this (`tiny_http`) bounds neither the number
//! of its threads nor how long a client may hold one, and the others bring an async runtime into the VMM.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dirtylimit_kvm::spawn_without_signals;

use crate::Metrics;

/// Connections served at once, by a thread each; the next ones wait in the kernel's queue.
const THREADS: usize = 4;
/// A connection lives no longer, whatever its client does.
const DEADLINE: Duration = Duration::from_secs(1);
/// The longest head of a request, and the most headers in it.
const HEAD: usize = 8 << 10;
const HEADERS: usize = 64;

/// Serves until it is dropped, which takes a second if a client is slow just then. All signals are blocked in its four
/// threads.
#[derive(Debug)]
pub struct MetricsServer {
    address: SocketAddr,
    /// The listener, as what has a `shutdown`.
    stop: TcpStream,
    threads: Vec<JoinHandle<()>>,
}

impl MetricsServer {
    pub(super) fn start(listener: TcpListener, metrics: Metrics) -> io::Result<Self> {
        listener.set_nonblocking(false)?;
        let (address, stop) = (listener.local_addr()?, TcpStream::from(OwnedFd::from(listener.try_clone()?)));
        let mut server = Self { address, stop, threads: Vec::new() };
        let listener = Arc::new(listener);
        for _ in 0..THREADS {
            let (listener, metrics) = (listener.clone(), metrics.clone());
            server.threads.push(spawn_without_signals("dirtylimit-http", move || serve(&listener, &metrics))?);
        }
        Ok(server)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        // On Linux it makes every `accept` fail with EINVAL, those under way and those to come.
        let _ = self.stop.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, metrics: &Metrics) {
    loop {
        match listener.accept() {
            // A client that is gone, or late, is its own problem.
            Ok((stream, _)) => drop(Client { stream, until: Instant::now() + DEADLINE }.serve(metrics)),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            // No descriptor is free, say: not to be tried at full speed.
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// A connection, with one deadline for all that it reads and writes.
struct Client {
    stream: TcpStream,
    until: Instant,
}

impl Client {
    fn serve(mut self, metrics: &Metrics) -> io::Result<()> {
        let answer = answer(&self.head()?, metrics);
        self.write_all(answer.as_bytes())?;
        self.stream.shutdown(Shutdown::Write)?;
        // What is unread when a socket is closed takes the answer back from a client that has not read it.
        io::copy(&mut self, &mut io::sink()).map(drop)
    }

    /// Everything up to the empty line that ends a head, or as much as one may have.
    fn head(&mut self) -> io::Result<Vec<u8>> {
        let (mut head, mut chunk) = (Vec::new(), [0; 1024]);
        while head.len() < HEAD && !head.windows(4).any(|end| end == b"\r\n\r\n") {
            match self.read(&mut chunk)? {
                0 => break,
                read => head.extend_from_slice(&chunk[..read]),
            }
        }
        Ok(head)
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        match self.until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

impl Read for Client {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer)
    }
}

impl Write for Client {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What to answer to a request's head.
fn answer(head: &[u8], metrics: &Metrics) -> String {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let (status, kind, body) = match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => route(&request, metrics),
        Ok(httparse::Status::Partial) if head.len() < HEAD => {
            ("400 Bad Request", "text/plain", "half a request\n".into())
        }
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            let most = format!("a request's head may have {HEAD} bytes and {HEADERS} headers\n");
            ("431 Request Header Fields Too Large", "text/plain", most)
        }
        Err(error) => ("400 Bad Request", "text/plain", format!("{error}\n")),
    };
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

/// The answer's status, the kind of its body, and the body.
fn route(request: &httparse::Request<'_, '_>, metrics: &Metrics) -> (&'static str, &'static str, String) {
    const OPENMETRICS: &[u8] = b"application/openmetrics-text";
    let accepts = |header: &httparse::Header<'_>| {
        header.name.eq_ignore_ascii_case("accept")
            && header.value.windows(OPENMETRICS.len()).any(|part| part == OPENMETRICS)
    };
    match (request.method, request.path.and_then(|path| path.split('?').next())) {
        (Some("GET"), Some("/metrics")) if request.headers.iter().any(accepts) => {
            ("200 OK", "application/openmetrics-text; version=1.0.0", metrics.openmetrics())
        }
        (Some("GET"), Some("/metrics")) => ("200 OK", "text/plain; version=0.0.4", metrics.prometheus()),
        (_, Some("/metrics")) => ("405 Method Not Allowed\r\nAllow: GET", "text/plain", "only GET is allowed\n".into()),
        _ => ("404 Not Found", "text/plain", "the metrics are at /metrics\n".into()),
    }
}
