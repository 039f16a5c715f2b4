//! What the adapter's `error` offers, as far as it is needed here.

use std::io;

pub(crate) type Error = io::Error;

pub(crate) fn system(_: &'static str) -> impl FnOnce(io::Error) -> Error {
    |error| error
}

pub(crate) fn kick_is_taken(_: i32) -> Error {
    io::ErrorKind::ResourceBusy.into()
}
