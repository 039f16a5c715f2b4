//! What QEMU 10.0.2 answered to some inputs, and what we answer: the same, or for a reason that is told.

use dirtylimit_qmp::Session;
use serde_json::Value;

use super::Bench;

/// `## case` begins anew, after the negotiation unless it says `, not negotiated`. `>` is sent and `<` is what QEMU answered,
/// any number of lines. Where we answer otherwise `=` is what, or nothing where it stands alone, and `!` says why.
const REPLIES: &str = include_str!("qemu-10.0.2.txt");

#[derive(Default, Debug)]
struct Step<'a> {
    sent: &'a str,
    qemu: Vec<&'a str>,
    ours: Vec<&'a str>,
    why: Option<&'a str>,
}

/// What two replies are compared by: the order of members and the way that text is escaped carry nothing.
fn parsed(replies: &[&str]) -> Vec<Value> {
    let parsed = |reply: &&str| serde_json::from_str(reply).unwrap_or(Value::String((*reply).to_owned()));
    replies.iter().filter(|reply| !reply.is_empty()).map(parsed).collect()
}

#[test]
fn replies_are_qemus_or_differ_for_a_reason() {
    let (mut name, mut bench, mut step): (&str, Option<Bench>, Option<Step<'_>>) = ("", None, None);
    let mut steps = 0;
    for line in REPLIES.lines().chain(["##"]) {
        if matches!(line.as_bytes(), [b'>' | b'#', ..]) {
            if let (Some(Step { sent, qemu, ours, why }), Some(bench)) = (step.take(), &mut bench) {
                steps += 1;
                assert_eq!(why.is_some(), !ours.is_empty(), "{name}: {sent}: a difference has its reason");
                let [qemu, ours] = [parsed(&qemu), parsed(if ours.is_empty() { &qemu } else { &ours })];
                assert_eq!(bench.say(format!("{sent}\n")), ours, "{name}: {sent}");
                assert!(why.is_none() || qemu != ours, "{name}: {sent}: there is no difference");
            }
        }
        match (line.split_once(' ').unwrap_or((line, "")), &mut step) {
            (("##", case), _) => {
                name = case;
                let new = bench.insert(Bench::new());
                new.vm.limit.tick();
                if case.ends_with(", not negotiated") {
                    new.session = Session::new();
                }
            }
            ((">", sent), _) => step = Some(Step { sent, ..Step::default() }),
            (("<", reply), Some(step)) => step.qemu.push(reply),
            (("=", reply), Some(step)) => step.ours.push(reply),
            (("!", why), Some(step)) => step.why = Some(why),
            _ => panic!("what is this: {line}"),
        }
    }
    assert!(steps > 300, "{steps} inputs");
}
