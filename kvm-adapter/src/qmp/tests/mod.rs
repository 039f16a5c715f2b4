//! The control socket on a VM that is no KVM.

mod commands;
mod protocol;
mod socket;

use std::fs::File;
use std::time::Instant;

use serde_json::{Value, json};

use super::{Monitor, Session};
use crate::Vcpu;
use crate::fake::Fake;

/// A monitor of a VM with vCPUs 0 and 1, and one client past the negotiation.
struct Bench {
    fake: Fake,
    monitor: Monitor,
    session: Session,
    now: Instant,
    _vcpus: [(File, Vcpu); 2],
}

impl Bench {
    fn new() -> Self {
        let fake = Fake::new();
        let limit = fake.small();
        let vcpu = |id| {
            let file = fake.vcpu(1024);
            let vcpu = limit.add_vcpu(id, &file).unwrap();
            (file, vcpu)
        };
        let vcpus = [0, 1].map(vcpu);
        let mut bench = Self {
            fake: fake.clone(),
            monitor: Monitor::new(limit.clone()),
            session: Session::new(),
            now: Instant::now(),
            _vcpus: vcpus,
        };
        assert_eq!(bench.say("{'execute': 'qmp_capabilities'}"), [json!({ "return": {} })]);
        bench
    }

    /// What is answered to these bytes.
    fn say(&mut self, bytes: impl AsRef<[u8]>) -> Vec<Value> {
        let mut input = bytes.as_ref();
        let mut replies = vec![];
        while let Some(reply) = self.session.answer(&mut self.monitor, self.now, &mut input) {
            assert!(reply.ends_with(b"\r\n"));
            replies.push(serde_json::from_slice(&reply).unwrap());
        }
        assert!(input.is_empty());
        replies
    }

    /// The one answer to them.
    fn ask(&mut self, bytes: impl AsRef<[u8]>) -> Value {
        let [reply] = <[Value; 1]>::try_from(self.say(bytes)).unwrap();
        reply
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let mut reply = self.ask(json!({ "execute": command, "arguments": arguments }).to_string());
        match reply["error"]["desc"].as_str() {
            Some(desc) => Err(desc.to_owned()),
            None => Ok(reply["return"].take()),
        }
    }
}
