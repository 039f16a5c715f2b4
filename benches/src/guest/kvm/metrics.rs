//! A run's counters for Prometheus, over HTTP or in a file.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dirtylimit_kvm::DirtyLimit;
use dirtylimit_metrics::{Metrics, MetricsServer};

use crate::output::{Output, say};
use crate::plan::MetricsTo;

/// Distance between two writes of the file.
const WRITE: Duration = Duration::from_secs(1);

/// Serves until it is dropped, or writes when told.
#[derive(Debug)]
pub(super) struct Exporter {
    _server: Option<MetricsServer>,
    file: Option<Output>,
    metrics: Metrics,
    /// When the file is next due.
    next: Instant,
}

impl Exporter {
    pub(super) fn start(limit: &DirtyLimit, to: &MetricsTo) -> Result<Self> {
        let mut exporter = Self { _server: None, file: None, metrics: Metrics::new(limit), next: Instant::now() };
        match to {
            MetricsTo::Address(address) => {
                let server = exporter.metrics.serve(*address).with_context(|| format!("--metrics {address}"))?;
                say(format_args!("Metrics are at http://{}/metrics.", server.address()));
                exporter._server = Some(server);
            }
            MetricsTo::File(file) => exporter.file = Some(Output::prepare("--metrics", file)?),
        }
        exporter.write()?;
        Ok(exporter)
    }

    /// Writes the file, if there is one, unless it was written within the last second.
    pub(super) fn write_if_due(&mut self) -> Result<()> {
        if Instant::now() < self.next { Ok(()) } else { self.write() }
    }

    /// Writes the file, if there is one.
    pub(super) fn write(&mut self) -> Result<()> {
        self.next = Instant::now() + WRITE;
        let Some(file) = &mut self.file else { return Ok(()) };
        file.write(self.metrics.prometheus())
    }
}
