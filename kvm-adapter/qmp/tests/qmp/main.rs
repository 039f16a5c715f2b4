//! The control socket on a VM that is no KVM.

#[cfg(not(dirtylimit_planted))]
compile_error!(
    "these tests need --cfg dirtylimit_planted: .cargo/config.toml has it, and RUSTFLAGS overrides that file"
);

mod commands;
mod protocol;
mod qemu;
mod socket;

use std::time::Instant;

use dirtylimit_kvm::FakeVm;
use dirtylimit_qmp::{Monitor, Session};
use serde_json::{Value, json};

/// A monitor of a VM with vCPUs 0 and 1, and one client past the negotiation.
struct Bench {
    vm: FakeVm,
    monitor: Monitor,
    session: Session,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        let vm = FakeVm::new(&[0, 1]);
        let monitor = Monitor::new(&vm.limit);
        let mut bench = Self { vm, monitor, session: Session::new(), now: Instant::now() };
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
