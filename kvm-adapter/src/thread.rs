//! Threads that take no signal.

use std::io;
use std::thread::{Builder, JoinHandle};

use crate::sys::SignalsBlocked;

/// Starts a thread that takes none of the VMM's signals, from its first instruction on: for helpers beside the limiter, such
/// as the servers of `dirtylimit-qmp` and `dirtylimit-metrics`. Only the signals that the C library keeps for itself stay
/// open (`setresuid` reaches every thread by one).
///
/// # Errors
/// What starting a thread may answer.
///
/// # Panics
/// Where `name` has a null byte.
pub fn spawn_without_signals(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    // The thread inherits the mask.
    let _blocked = SignalsBlocked::for_a_new_thread();
    Builder::new().name(name.into()).spawn(run)
}
