//! One client's conversation: bytes in, replies out, no I/O.

use std::time::Instant;

use serde_json::{Map, Value, json};

use crate::Monitor;
use crate::arguments::Arguments;
use crate::command::Command;
use crate::error::{Error, line};
use crate::standard::version;
use crate::stream::Splitter;

/// The protocol's state for one client: greeted, then negotiating, then commanding.
#[derive(Debug, Default)]
pub struct Session {
    splitter: Splitter,
    negotiated: bool,
}

impl Session {
    /// The state of a client that has just connected.
    pub fn new() -> Self {
        Self::default()
    }

    /// What it is to be sent first. Lines end with CR LF, as the protocol has it.
    pub fn greeting() -> Vec<u8> {
        line(&json!({ "QMP": { "version": version(), "capabilities": [] } }))
    }

    /// Takes bytes off `input` up to the end of the next message, and answers it. `None` when all are taken and none
    /// ended: nothing more than the begun message (64 KiB at most) is kept.
    ///
    /// A caller that sends each reply before it asks for the next holds one reply at a time, whatever the client sends.
    pub fn answer(&mut self, monitor: &mut Monitor, now: Instant, input: &mut &[u8]) -> Option<Vec<u8>> {
        while let Some((&byte, rest)) = input.split_first() {
            *input = rest;
            match self.splitter.push(byte) {
                None => {}
                Some(Ok(text)) => return Some(self.reply(monitor, now, &text)),
                Some(Err(malformed)) => return Some(Error::generic(malformed).line()),
            }
        }
        None
    }

    fn reply(&mut self, monitor: &mut Monitor, now: Instant, text: &[u8]) -> Vec<u8> {
        let mut request = match serde_json::from_slice(text) {
            Ok(Value::Object(request)) => request,
            Ok(_) => return Error::generic("QMP input must be a JSON object").line(),
            Err(_) if text.iter().all(u8::is_ascii_alphabetic) => {
                let word = String::from_utf8_lossy(text);
                return Error::generic(format!("JSON parse error, invalid keyword '{word}'")).line();
            }
            Err(error) => return Error::generic(format!("JSON parse error, {error}")).line(),
        };
        let id = request.remove("id");
        let mut reply = match self.execute(monitor, now, request) {
            Ok(value) => json!({ "return": value }),
            Err(error) => json!({ "error": error }),
        };
        if let Some(mut id) = id {
            without_fractions(&mut id);
            reply["id"] = id;
        }
        line(&reply)
    }

    fn execute(&mut self, monitor: &mut Monitor, now: Instant, request: Map<String, Value>) -> Result<Value, Error> {
        let (mut name, mut arguments) = (None, Map::new());
        for (member, value) in request {
            match (member.as_str(), value) {
                ("execute", Value::String(command)) => name = Some(command),
                ("execute", _) => return Err(Error::generic("QMP input member 'execute' must be a string")),
                ("arguments", Value::Object(given)) => arguments = given,
                ("arguments", _) => return Err(Error::generic("QMP input member 'arguments' must be an object")),
                _ => return Err(Error::generic(format!("QMP input member '{member}' is unexpected"))),
            }
        }
        let name = name.ok_or_else(|| Error::generic("QMP input lacks member 'execute'"))?;
        match (name.as_str(), self.negotiated) {
            ("qmp_capabilities", false) => self.negotiate(arguments),
            ("qmp_capabilities", true) => {
                Err(Error::no_command("Capabilities negotiation is already complete, command ignored"))
            }
            (_, false) => Err(Error::no_command("Expecting capabilities negotiation with 'qmp_capabilities'")),
            (_, true) => Command::find(monitor, &name)?.run(monitor, now, arguments),
        }
    }

    fn negotiate(&mut self, arguments: Map<String, Value>) -> Result<Value, Error> {
        let mut arguments = Arguments::new(arguments, &["enable"]);
        let capabilities = arguments.strings("enable")?;
        if let Some(other) = capabilities.iter().find(|capability| *capability != "oob") {
            // To QEMU an element of a list has no name.
            return Err(Error::generic(format!("Parameter 'null' does not accept value '{other}'")));
        }
        arguments.end()?;
        if !capabilities.is_empty() {
            return Err(Error::generic("Capability oob not available"));
        }
        self.negotiated = true;
        Ok(json!({}))
    }
}

/// Numbers without a fraction come back without one, however they were written.
fn without_fractions(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(without_fractions),
        Value::Object(members) => members.values_mut().for_each(without_fractions),
        // Below 10^17 QEMU writes all digits. -0 has no other form.
        Value::Number(number) if number.is_f64() => match number.as_f64() {
            #[expect(clippy::cast_possible_truncation, reason = "below 10^17 and whole")]
            Some(float) if float.fract() == 0.0 && float.abs() < 1e17 && (float != 0.0 || float.is_sign_positive()) => {
                *number = (float as i64).into();
            }
            _ => {}
        },
        _ => {}
    }
}
