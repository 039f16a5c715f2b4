//! The table of commands, and how their arguments are read.

use std::time::Instant;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::error::Error;
use super::{Monitor, extended, measure, standard};

type Done = Result<Value, Error>;

/// A command: its name, what it may be given, and what it does.
#[derive(Debug)]
pub(crate) struct Command {
    name: &'static str,
    parameters: &'static [&'static str],
    run: fn(&mut Monitor, Instant, &mut Arguments) -> Done,
}

macro_rules! commands {
    ($($name:literal ($($parameter:literal),*) $run:path;)*) => {
        &[$(Command { name: $name, parameters: &[$($parameter),*], run: $run }),*]
    };
}

const COMMANDS: &[Command] = commands! {
    "query-version" () standard::query_version;
    "query-commands" () query_commands;
    "set-vcpu-dirty-limit" ("cpu-index", "dirty-rate") standard::set_limit;
    "cancel-vcpu-dirty-limit" ("cpu-index") standard::cancel_limit;
    "query-vcpu-dirty-limit" () standard::query_limit;
    "calc-dirty-rate" ("calc-time", "calc-time-unit", "sample-pages", "mode") measure::calc;
    "query-dirty-rate" ("calc-time-unit") measure::query;
    "quit" () standard::quit;
    "x-set-vcpu-dirty-limit" ("cpu-index", "dirty-rate") extended::set_limit;
    "x-set-vm-dirty-limit" ("dirty-rate") extended::set_vm_limit;
    "x-set-vcpu-weight" ("cpu-index", "weight") extended::set_weight;
    "x-set-dirty-limit-policy" ("policy") extended::set_policy;
    "x-set-max-pause" ("max-pause-us") extended::set_max_pause;
    "x-query-dirty-limit" () extended::query;
};

impl Command {
    fn all(monitor: &Monitor) -> impl Iterator<Item = &'static Self> + use<> {
        let quits = monitor.quits();
        COMMANDS.iter().filter(move |command| quits || command.name != "quit")
    }

    pub(crate) fn find(monitor: &Monitor, name: &str) -> Result<&'static Self, Error> {
        Self::all(monitor)
            .find(|command| command.name == name)
            .ok_or_else(|| Error::no_command(format!("The command {name} has not been found")))
    }

    pub(crate) fn run(&self, monitor: &mut Monitor, now: Instant, arguments: Map<String, Value>) -> Done {
        let mut arguments = Arguments::new(arguments, self.parameters);
        if self.parameters.is_empty() {
            arguments.end()?;
        }
        (self.run)(monitor, now, &mut arguments)
    }
}

fn query_commands(monitor: &mut Monitor, _: Instant, _: &mut Arguments) -> Done {
    let names = Command::all(monitor).map(|command| command.name).chain(["qmp_capabilities"]);
    Ok(names.map(|name| json!({ "name": name })).collect())
}

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
        let choose = |text: String| {
            let wrong = format!("Parameter '{name}' does not accept value '{text}'");
            serde_json::from_value(Value::String(text)).map_err(|_| Error::generic(wrong))
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
