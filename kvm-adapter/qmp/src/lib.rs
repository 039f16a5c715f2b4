//! A control socket for a VM under [`dirtylimit_kvm`]: the part of QEMU's Machine Protocol (QMP) that is about dirty page
//! rates, for existing clients. `docs/QMP.md` has the commands, and what differs from QEMU.
//!
//! [`Monitor::serve`] is all that a VMM needs:
//! ```no_run
//! # fn serve(limit: &dirtylimit_kvm::DirtyLimit) -> std::io::Result<()> {
//! let server = dirtylimit_qmp::Monitor::new(limit).serve("/run/vm0/qmp")?; // until it is dropped
//! # drop(server); Ok(()) }
//! ```
//! One with an event loop or sockets of its own drives a [`Session`] for each client instead: bytes in, replies out.
//! Neither keeps the VM alive: once it is gone, commands on it are answered by an error.

#![forbid(unsafe_code)]

mod arguments;
mod command;
mod error;
mod extended;
mod measure;
mod server;
mod session;
mod standard;
mod stream;

use std::fmt;

use dirtylimit_kvm::{DirtyLimit, PageRate, WeakDirtyLimit};
use serde_json::{Value, json};

use self::arguments::Arguments;
use self::error::Error;
use self::measure::Measurement;
pub use self::server::{MAX_CLIENTS, QmpServer};
pub use self::session::Session;

/// What all clients of a VM's control socket share: the limiter, the measurement, and what the VMM lets them do.
pub struct Monitor {
    limit: WeakDirtyLimit,
    measurement: Measurement,
    on_quit: Option<Callback>,
    on_change: Option<Callback>,
}

type Callback = Box<dyn FnMut() + Send>;

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit, measurement, .. } = self;
        f.debug_struct("Monitor").field("limit", limit).field("measurement", measurement).finish_non_exhaustive()
    }
}

impl Monitor {
    /// A monitor of `limit`'s VM, which it does not keep alive; without `quit`.
    pub fn new(limit: &DirtyLimit) -> Self {
        Self { limit: limit.downgrade(), measurement: Measurement::unstarted(), on_quit: None, on_change: None }
    }

    /// Allows `quit`, which calls this. It runs on the thread that serves the clients and must not wait for its end.
    #[must_use]
    pub fn on_quit(self, quit: impl FnMut() + Send + 'static) -> Self {
        Self { on_quit: Some(Box::new(quit)), ..self }
    }

    /// Calls this after each command that set or lifted something; as [`Monitor::on_quit`].
    #[must_use]
    pub fn on_change(self, change: impl FnMut() + Send + 'static) -> Self {
        Self { on_change: Some(Box::new(change)), ..self }
    }

    /// The limiter, while there is a VM.
    fn limit(&self) -> Result<DirtyLimit, Error> {
        self.limit.upgrade().ok_or_else(|| Error::generic("the VM is gone"))
    }

    fn quits(&self) -> bool {
        self.on_quit.is_some()
    }

    fn quit(&mut self) {
        self.on_quit.iter_mut().for_each(|quit| quit());
    }

    /// The reply to a command that set something.
    fn changed(&mut self) -> Result<Value, Error> {
        self.on_change.iter_mut().for_each(|change| change());
        Ok(json!({}))
    }

    /// Sets a vCPU's limit, or all of them.
    fn set_limit(&mut self, vcpu: Option<u32>, limit: Option<PageRate>) -> Result<Value, Error> {
        let limiter = self.limit()?;
        match (vcpu, limit) {
            (Some(vcpu), Some(limit)) => limiter.set_limit(vcpu, limit).map_err(Error::generic)?,
            (Some(vcpu), None) => limiter.cancel(vcpu).map_err(Error::generic)?,
            (None, Some(limit)) => limiter.set_limit_all(limit),
            (None, None) => limiter.cancel_all(),
        }
        self.changed()
    }

    /// The vCPU that `cpu-index` names, `None` where it is not given. An index that no vCPU has is the inner error: QEMU
    /// looks at it after all other arguments.
    fn vcpu(&self, arguments: &mut Arguments) -> Result<Result<Option<u32>, Error>, Error> {
        let (index, limit) = (arguments.integer("cpu-index")?, self.limit()?);
        let exists = |index| u32::try_from(index).ok().filter(|&id| limit.query(id).is_ok());
        let wrong = || Error::generic("incorrect cpu index specified");
        Ok(index.map(|index| exists(index).ok_or_else(wrong)).transpose())
    }
}
