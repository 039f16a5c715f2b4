//! Metrics of a VM under [`dirtylimit_kvm`] for Prometheus: as a collector in the VMM's own registry, as text, in a file, or
//! over HTTP.
//!
//! ```no_run
//! # fn serve(limit: &dirtylimit_kvm::DirtyLimit) -> Result<(), Box<dyn std::error::Error>> {
//! let metrics = dirtylimit_metrics::Metrics::new(limit);
//! let server = metrics.serve("127.0.0.1:9100".parse()?)?; // GET /metrics, until it is dropped
//! # drop(server); Ok(()) }
//! ```
//! Everything is read when somebody asks, from what the limiter keeps anyway; what is told is as of the last tick or
//! [`DirtyLimit::meter`]. `docs/METRICS.md` lists all names.

#![forbid(unsafe_code)]

mod families;
pub mod file;
mod http;
mod text;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use dirtylimit_kvm::{DirtyLimit, WeakDirtyLimit};
use file::Target;
pub use http::MetricsServer;
use prometheus_client::registry::Registry;

/// A VM's counters. Holds the VM weakly: when the VM is gone there are none.
///
/// It is a [`Collector`](prometheus_client::collector::Collector), so that it can stand beside a VMM's own metrics:
/// `registry.register_collector(Box::new(Metrics::new(&limit)))`.
#[derive(Clone, Debug)]
pub struct Metrics(WeakDirtyLimit);

impl Metrics {
    /// The counters of `limit`'s VM.
    pub fn new(limit: &DirtyLimit) -> Self {
        Self(limit.downgrade())
    }

    /// The counters now, in the OpenMetrics 1.0 text format.
    pub fn openmetrics(&self) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self.clone()));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("a string takes everything");
        text
    }

    /// The counters now, in Prometheus' own text format (0.0.4), the one that node_exporter reads from files.
    pub fn prometheus(&self) -> String {
        text::prometheus(&self.openmetrics())
    }

    /// Writes [`Metrics::prometheus`] to a file, for node_exporter's textfile collector (which wants names that end in
    /// `.prom`): a reader sees the old file or the new one, whole.
    ///
    /// Only a regular file is replaced, and a symbolic link is followed. A device, pipe or socket is opened and written.
    ///
    /// # Errors
    /// What creating, writing or renaming a file beside it may answer, and the file is as it was then; a directory; a
    /// device, pipe or socket that does not take it. A pipe that nobody reads is not waited for.
    pub fn write(&self, file: &Path) -> io::Result<()> {
        Target::of(file)?.write(self.prometheus().as_bytes())
    }

    /// Serves `GET /metrics` to this machine, say on `127.0.0.1:9100`, from threads of its own, until the server
    /// that it returns is dropped. Port 0 is any free one.
    ///
    /// # Errors
    /// An address that is not a loopback one, since there is neither encryption nor a password ([`Metrics::serve_on`] takes a
    /// listener that the VMM has bound to another); and what binding it, or starting a thread, may answer.
    pub fn serve(&self, address: SocketAddr) -> io::Result<MetricsServer> {
        if !address.ip().is_loopback() {
            let why = format!("{address} is no loopback address (127.0.0.1 or ::1)");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        self.serve_on(TcpListener::bind(address)?)
    }

    /// As [`Metrics::serve`], on a listener of the caller's, on any address.
    ///
    /// # Errors
    /// What starting a thread may answer.
    pub fn serve_on(&self, listener: TcpListener) -> io::Result<MetricsServer> {
        MetricsServer::start(listener, self.clone())
    }
}
