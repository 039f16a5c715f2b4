//! How the arguments of a command are read.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::Error;

/// The arguments of one command, each to be taken once, and then the end.
#[derive(Debug)]
pub(crate) struct Arguments {
    given: Map<String, Value>,
    /// One that the command does not know.
    unknown: Option<String>,
}

impl Arguments {
    pub(crate) fn new(given: Map<String, Value>, known: &[&str]) -> Self {
        let unknown = given.keys().find(|name| !known.contains(&name.as_str())).cloned();
        Self { given, unknown }
    }

    /// Refuses what the command does not know: as QEMU does, after what is wrong with the rest, and before anything is
    /// done.
    pub(crate) fn end(&self) -> Result<(), Error> {
        match &self.unknown {
            Some(name) => Err(Error::generic(format!("Parameter '{name}' is unexpected"))),
            None => Ok(()),
        }
    }

    fn take<T>(&mut self, name: &str, expected: &str, read: fn(&Value) -> Option<T>) -> Result<Option<T>, Error> {
        let wrong = || Error::generic(format!("Invalid parameter type for '{name}', expected: {expected}"));
        self.given.remove(name).map(|value| read(&value).ok_or_else(wrong)).transpose()
    }

    pub(crate) fn integer(&mut self, name: &str) -> Result<Option<i64>, Error> {
        self.take(name, "integer", Value::as_i64)
    }

    /// QEMU's message for these is another.
    pub(crate) fn unsigned(&mut self, name: &str) -> Result<Option<u64>, Error> {
        let wrong = || Error::generic(format!("Parameter '{name}' expects uint64"));
        self.given.remove(name).map(|value| value.as_u64().ok_or_else(wrong)).transpose()
    }

    pub(crate) fn number(&mut self, name: &str) -> Result<Option<f64>, Error> {
        self.take(name, "number", Value::as_f64)
    }

    /// One of an enumeration's names.
    pub(crate) fn choice<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, Error> {
        self.named(name, |text| serde_json::from_value(text.into()).ok())
    }

    /// One of those that `find` knows by their names.
    pub(crate) fn named<T>(&mut self, name: &str, find: impl FnOnce(&str) -> Option<T>) -> Result<Option<T>, Error> {
        let choose = |text: String| {
            let wrong = || Error::generic(format!("Parameter '{name}' does not accept value '{text}'"));
            find(&text).ok_or_else(wrong)
        };
        self.take(name, "string", |value| value.as_str().map(str::to_owned))?.map(choose).transpose()
    }

    pub(crate) fn strings(&mut self, name: &str) -> Result<Vec<String>, Error> {
        let values = self.take(name, "array", |value| value.as_array().cloned())?.unwrap_or_default();
        let strings = values.into_iter().enumerate().map(|(index, value)| match value {
            Value::String(text) => Ok(text),
            _ => Err(Error::generic(format!("Invalid parameter type for '{name}[{index}]', expected: string"))),
        });
        strings.collect()
    }
}

/// The error for an argument that must be given.
pub(crate) fn missing(name: &str) -> impl FnOnce() -> Error {
    move || Error::generic(format!("Parameter '{name}' is missing"))
}
