//! The table of commands.

use std::time::Instant;

use serde_json::{Map, Value, json};

use crate::arguments::Arguments;
use crate::error::Error;
use crate::{Monitor, extended, measure, standard};

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
