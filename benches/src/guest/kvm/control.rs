//! The control socket of a run, and what its clients want.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Context, Result};
use dirtylimit_kvm::DirtyLimit;
use dirtylimit_qmp::{Monitor, QmpServer};

/// The socket, in service until it is dropped.
#[derive(Debug)]
pub(super) struct Control {
    _server: QmpServer,
    quit: Arc<AtomicBool>,
    overrides: Arc<AtomicBool>,
}

impl Control {
    pub(super) fn serve(limit: &DirtyLimit, path: &Path) -> Result<Self> {
        let flag = || {
            let flag = Arc::new(AtomicBool::new(false));
            let raised = flag.clone();
            // Relaxed: the flag publishes nothing but itself; the limiter has locks of its own.
            (flag, move || raised.store(true, Relaxed))
        };
        let ((quit, on_quit), (overrides, on_change)) = (flag(), flag());
        let monitor = Monitor::new(limit).on_quit(on_quit).on_change(on_change);
        let server = monitor.serve(path).context("--qmp: cannot serve the control socket")?;
        Ok(Self { _server: server, quit, overrides })
    }

    /// Whether a client wants the run to end.
    pub(super) fn quits(&self) -> bool {
        // Relaxed: as above.
        self.quit.load(Relaxed)
    }

    /// Whether a client has set or lifted something.
    pub(super) fn overrides(&self) -> bool {
        // Relaxed: as above.
        self.overrides.load(Relaxed)
    }
}
