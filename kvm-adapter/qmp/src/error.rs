//! What a client is told when a command is not done.

use serde::Serialize;
use serde_json::{Value, json};

/// QMP's error object.
#[derive(Clone, PartialEq, Eq, Serialize, Debug)]
pub(crate) struct Error {
    class: Class,
    desc: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
enum Class {
    GenericError,
    CommandNotFound,
}

impl Error {
    pub(crate) fn generic(desc: impl ToString) -> Self {
        Self { class: Class::GenericError, desc: desc.to_string() }
    }

    pub(crate) fn no_command(desc: impl ToString) -> Self {
        Self { class: Class::CommandNotFound, desc: desc.to_string() }
    }

    /// As a reply, in a line of its own.
    pub(crate) fn line(&self) -> Vec<u8> {
        line(&json!({ "error": self }))
    }
}

/// A JSON text and its line end.
pub(crate) fn line(value: &Value) -> Vec<u8> {
    format!("{value}\r\n").into_bytes()
}
