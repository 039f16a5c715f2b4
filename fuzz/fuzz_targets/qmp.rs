//! The control socket's protocol, fed bytes and whole commands with any arguments: nothing panics, each reply is a line of
//! JSON of bounded length, a client that sends its bytes one by one is told the same, and the limits are those of the
//! commands that were answered with success.
#![no_main]

#[cfg(not(dirtylimit_planted))]
compile_error!("it needs --cfg dirtylimit_planted: ci/fuzz.sh has it, which cargo-fuzz takes from RUSTFLAGS");

use std::time::{Duration, Instant};

use dirtylimit_kvm::FakeVm;
use dirtylimit_qmp::{Monitor, Session};
use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};
use serde_json::{Map, Value, json};

const VCPUS: usize = 2;
const COMMANDS: [&str; 16] = [
    "qmp_capabilities",
    "query-version",
    "query-commands",
    "set-vcpu-dirty-limit",
    "cancel-vcpu-dirty-limit",
    "query-vcpu-dirty-limit",
    "calc-dirty-rate",
    "query-dirty-rate",
    "quit",
    "x-set-vcpu-dirty-limit",
    "x-set-vm-dirty-limit",
    "x-set-vcpu-weight",
    "x-set-dirty-limit-policy",
    "x-set-max-pause",
    "x-query-dirty-limit",
    "stop",
];
const PARAMETERS: [&str; 10] = [
    "cpu-index",
    "dirty-rate",
    "calc-time",
    "calc-time-unit",
    "sample-pages",
    "mode",
    "weight",
    "policy",
    "max-pause-us",
    "enable",
];
const WORDS: [&str; 8] =
    ["dirty-ring", "page-sampling", "dirty-bitmap", "second", "millisecond", "paced", "stepped", "oob"];

#[derive(Arbitrary, Debug)]
enum Step {
    Bytes(Vec<u8>),
    Command { command: u8, arguments: Vec<(u8, Argument)>, id: Option<String> },
    Wait { ms: u16 },
    Write { vcpu: bool, first: u16, pages: u16 },
}

#[derive(Arbitrary, Debug)]
enum Argument {
    Small(u8),
    Integer(i64),
    Unsigned(u64),
    Float(f64),
    Word(u8),
    Words(Vec<u8>),
    Null,
}

impl Argument {
    fn value(&self) -> Value {
        let word = |index: &u8| WORDS[usize::from(*index) % WORDS.len()];
        match self {
            Self::Small(value) => json!(value),
            Self::Integer(value) => json!(value),
            Self::Unsigned(value) => json!(value),
            Self::Float(value) => json!(value),
            Self::Word(index) => json!(word(index)),
            Self::Words(indices) => json!(indices.iter().map(word).collect::<Vec<_>>()),
            Self::Null => Value::Null,
        }
    }
}

/// Each vCPU's, in MiB/s.
type Limits = [Option<u64>; VCPUS];

/// A VM and a client of it.
struct Bench {
    vm: FakeVm,
    monitor: Monitor,
    session: Session,
}

impl Bench {
    fn new() -> Self {
        let vm = FakeVm::new(&[0, 1]);
        let monitor = Monitor::new(&vm.limit).on_quit(|| ());
        Self { vm, monitor, session: Session::new() }
    }

    fn say(&mut self, now: Instant, mut bytes: &[u8]) -> Vec<Value> {
        let mut replies = vec![];
        loop {
            let before = bytes.len();
            let Some(reply) = self.session.answer(&mut self.monitor, now, &mut bytes) else { break };
            assert!(bytes.len() < before, "each reply takes something");
            assert!(reply.len() < 1 << 20 && reply.ends_with(b"\r\n"));
            let mut reply: Value = serde_json::from_slice(&reply).expect("a reply is JSON");
            assert!(reply["return"].is_null() != reply["error"].is_null());
            if let Some(info) = reply["return"].as_object_mut() {
                info.remove("start-time"); // the one thing that is told by the time of day
            }
            replies.push(reply);
        }
        assert!(bytes.is_empty(), "what is not answered is taken");
        replies
    }

    fn limits(&self) -> Limits {
        let status = |id| self.vm.limit.query(id).expect("it is there");
        [0, 1].map(|id| status(id).limit.map(|rate| rate.bytes_per_sec(self.vm.limit.page_size()) >> 20))
    }
}

/// What the limits are after this command, which was answered with success; `None` where that is another test's business.
fn after(mut limits: Limits, request: &Value) -> Option<Limits> {
    let arguments = &request["arguments"];
    let rate = match request["execute"].as_str() {
        Some("set-vcpu-dirty-limit") => arguments["dirty-rate"].as_u64().filter(|rate| *rate > 0),
        Some("cancel-vcpu-dirty-limit") => None,
        Some("x-set-vcpu-dirty-limit") => return None,
        _ => return Some(limits),
    };
    for (id, limit) in (0..).zip(&mut limits) {
        if arguments["cpu-index"].as_u64().is_none_or(|index| index == id) {
            // 16 TiB/s of 4 KiB pages are the most.
            *limit = rate.map(|rate| rate.min(1 << 24));
        }
    }
    Some(limits)
}

/// Says it to two VMs, to one of them byte by byte.
fn both([whole, by_byte]: &mut [Bench; 2], now: Instant, bytes: &[u8]) -> (Vec<Value>, Limits) {
    let replies = whole.say(now, bytes);
    let again: Vec<_> = bytes.chunks(1).flat_map(|byte| by_byte.say(now, byte)).collect();
    assert_eq!(replies, again);
    assert_eq!(whole.limits(), by_byte.limits());
    (replies, whole.limits())
}

fuzz_target!(|steps: Vec<Step>| {
    let mut benches = [Bench::new(), Bench::new()];
    let mut now = Instant::now();
    both(&mut benches, now, b"{'execute': 'qmp_capabilities'}");
    for step in steps {
        match step {
            Step::Bytes(bytes) => drop(both(&mut benches, now, &bytes)),
            Step::Command { command, arguments, id } => {
                // Out of whatever the bytes have begun.
                let (_, before) = both(&mut benches, now, b"\xff");
                let argument = |(index, value): &(u8, Argument)| {
                    (PARAMETERS[usize::from(*index) % PARAMETERS.len()].to_owned(), value.value())
                };
                let arguments: Map<_, _> = arguments.iter().map(argument).collect();
                let command = COMMANDS[usize::from(command) % COMMANDS.len()];
                let request = json!({ "execute": command, "arguments": arguments, "id": id });
                let (replies, limits) = both(&mut benches, now, request.to_string().as_bytes());
                let [reply] = replies.as_slice() else { panic!("{request}: {replies:?}") };
                assert_eq!(reply["id"], request["id"]);
                let expected = if reply["error"].is_null() { after(before, &request) } else { Some(before) };
                assert!(expected.is_none_or(|expected| expected == limits), "{request}: {reply}: {limits:?}");
            }
            Step::Wait { ms } => now += Duration::from_millis(ms.into()),
            Step::Write { vcpu, first, pages } => {
                for bench in &benches {
                    bench.vm.write(vcpu.into(), first.into(), pages.into());
                }
            }
        }
    }
});
