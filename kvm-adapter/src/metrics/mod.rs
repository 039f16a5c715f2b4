//! Counters for Prometheus: as a collector in the VMM's own registry, as text, in a file, or over HTTP.
//!
//! Everything is read when somebody asks, from what the limiter keeps anyway; what is told is as of the last tick or
//! [`DirtyLimit::meter`]. `docs/METRICS.md` lists all names.

mod families;
#[doc(hidden)]
pub mod file;
mod http;
mod text;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Weak};

use prometheus_client::registry::Registry;

use file::Target;
pub use http::MetricsServer;

use crate::vm::Vm;
use crate::{DirtyLimit, Error};

/// A VM's counters. Holds the VM weakly: when the VM is gone there are none.
///
/// It is a [`Collector`](prometheus_client::collector::Collector), so that it can stand beside a VMM's own metrics:
/// `registry.register_collector(Box::new(limit.metrics()))`.
#[derive(Clone, Debug)]
pub struct Metrics(Weak<Vm>);

impl DirtyLimit {
    /// This VM's counters.
    pub fn metrics(&self) -> Metrics {
        Metrics(Arc::downgrade(self.vm()))
    }
}

impl Metrics {
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
    /// An address that is not a loopback one, since there is neither encryption nor a password (who means it binds a
    /// listener, for [`Metrics::serve_on`]); and what binding it, or starting a thread, may answer.
    pub fn serve(&self, address: SocketAddr) -> Result<MetricsServer, Error> {
        if !address.ip().is_loopback() {
            let why = format!("{address} is no loopback address (127.0.0.1 or ::1)");
            return Err(cannot_serve(io::Error::new(io::ErrorKind::InvalidInput, why)));
        }
        self.serve_on(TcpListener::bind(address).map_err(cannot_serve)?)
    }

    /// As [`Metrics::serve`], on a listener of the caller's, whoever can reach it.
    ///
    /// # Errors
    /// What starting a thread may answer.
    pub fn serve_on(&self, listener: TcpListener) -> Result<MetricsServer, Error> {
        MetricsServer::start(listener, self.clone()).map_err(cannot_serve)
    }
}

fn cannot_serve(source: io::Error) -> Error {
    Error::System { call: "serving metrics", source }
}
