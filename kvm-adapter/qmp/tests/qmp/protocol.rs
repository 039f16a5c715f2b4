//! Bytes to messages to replies; what QEMU 10.0.2 answered to the same bytes is what is expected, unless said otherwise.

use dirtylimit_qmp::Session;
use serde_json::{Value, json};

use super::Bench;

/// As docs/QMP.md says.
const MAX_MESSAGE: usize = 64 << 10;
const MAX_DEPTH: usize = 64;

fn class_and_desc(reply: &Value) -> (&str, &str) {
    (reply["error"]["class"].as_str().unwrap_or_default(), reply["error"]["desc"].as_str().unwrap_or_default())
}

#[test]
fn the_greeting_says_what_answers() {
    let greeting: Value = serde_json::from_slice(&Session::greeting()).unwrap();
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    assert_eq!(greeting["QMP"]["version"]["qemu"], json!({ "major": 10, "minor": 0, "micro": 2 }));
    assert!(greeting["QMP"]["version"]["package"].as_str().unwrap().starts_with("dirtylimit "));
    assert_eq!(Bench::new().execute("query-version", json!({})), Ok(greeting["QMP"]["version"].clone()));
}

#[test]
fn commands_wait_for_the_negotiation() {
    let mut bench = Bench::new();
    bench.session = Session::new();
    let early = bench.ask("{'execute': 'query-version', 'id': 1}");
    let expecting = "Expecting capabilities negotiation with 'qmp_capabilities'";
    assert_eq!(class_and_desc(&early), ("CommandNotFound", expecting));
    for (enable, told) in [
        ("['oob']", "Capability oob not available"),
        ("['x']", "Parameter 'null' does not accept value 'x'"),
        ("1", "Invalid parameter type for 'enable', expected: array"),
    ] {
        let refused = bench.ask(format!("{{'execute': 'qmp_capabilities', 'arguments': {{'enable': {enable}}}}}"));
        assert_eq!(class_and_desc(&refused), ("GenericError", told));
        assert_eq!(class_and_desc(&bench.ask("{'execute': 'quit'}")).1, expecting);
    }
    assert_eq!(bench.ask("{'execute': 'qmp_capabilities', 'arguments': {'enable': []}}"), json!({ "return": {} }));
    let again = bench.ask("{'execute': 'qmp_capabilities'}");
    let complete = "Capabilities negotiation is already complete, command ignored";
    assert_eq!(class_and_desc(&again), ("CommandNotFound", complete));
}

#[test]
fn what_is_no_command_is_refused_as_by_qemu() {
    let mut bench = Bench::new();
    for (sent, class, told) in [
        ("[1]", "GenericError", "QMP input must be a JSON object"),
        ("\"abc\"", "GenericError", "QMP input must be a JSON object"),
        ("{}", "GenericError", "QMP input lacks member 'execute'"),
        ("{'id': 7}", "GenericError", "QMP input lacks member 'execute'"),
        ("{'execute': 1}", "GenericError", "QMP input member 'execute' must be a string"),
        ("{'execute': 'query-version', 'foo': 1}", "GenericError", "QMP input member 'foo' is unexpected"),
        ("{'exec-oob': 'query-version'}", "GenericError", "QMP input member 'exec-oob' is unexpected"),
        (
            "{'execute': 'query-version', 'arguments': []}",
            "GenericError",
            "QMP input member 'arguments' must be an object",
        ),
        ("{'execute': 'query-version', 'arguments': {'a': 1}}", "GenericError", "Parameter 'a' is unexpected"),
        ("{'execute': 'nope'}", "CommandNotFound", "The command nope has not been found"),
    ] {
        let reply = bench.ask(sent);
        assert_eq!(class_and_desc(&reply), (class, told), "{sent}");
    }
}

#[test]
fn the_id_comes_back_as_it_was() {
    let mut bench = Bench::new();
    for id in ["null", "1", "18446744073709551615", "\"ü\\n\"", "[1,{\"a\":2.5}]", "{}"] {
        for command in ["query-version", "nope"] {
            let reply = bench.ask(format!("{{\"id\":{id},\"execute\":\"{command}\"}}"));
            assert_eq!(reply["id"], serde_json::from_str::<Value>(id).unwrap());
            assert_eq!(reply.as_object().unwrap().len(), 2);
        }
    }
    assert_eq!(bench.ask("{'execute': 'query-version'}").as_object().unwrap().len(), 1);
}

#[test]
fn messages_need_nothing_between_them_and_may_come_byte_by_byte() {
    let mut bench = Bench::new();
    let two = "{\"execute\":\"query-version\",\"id\":\"}{\\\"\"}{'execute': 'query-version', 'id': 'it\\'s \"2\"'}";
    let whole = bench.say(two);
    assert_eq!((whole.len(), &whole[0]["id"], &whole[1]["id"]), (2, &json!("}{\""), &json!("it's \"2\"")));
    let by_byte: Vec<_> = two.bytes().flat_map(|byte| bench.say([byte])).collect();
    assert_eq!(by_byte, whole);
    let spaced = bench.say(" \r\n\t{\n'execute'\t: 'query-version'\r\n}\n");
    assert_eq!(spaced.len(), 1);
}

#[test]
fn malformed_input_is_one_error_and_the_next_message_is_understood() {
    let mut bench = Bench::new();
    for (sent, told) in [
        (&b"}"[..], "JSON parse error, stray '}'"),
        (b"nul ", "JSON parse error, invalid keyword 'nul'"),
        (b"01\n", "JSON parse error, "),
        (b"\xff", "JSON parse error, stray '\\xff'"),
        (b"\xff\xff\x01", "JSON parse error, stray '\\xff'"),
        // QEMU has a second error, for the brace.
        (b"{\"a\":\x01}\n", "JSON parse error, stray '\\x01'"),
        (b"{\"execute\":\"query-\0version\"}", "JSON parse error, stray '\\x00'"),
        (b"{\"execute\":\"unterminated\n", "JSON parse error, stray '\\n'"),
        (b"{\"execute\": [[", ""),
        (b"\xff", "JSON parse error, stray '\\xff'"),
        (b"{\"a\":}", "JSON parse error, expected value"),
        (b"{\"a\"}", "JSON parse error, expected `:`"),
        (b"{\"a\":1,}", "JSON parse error, trailing comma"),
        (b"{1:2}", "JSON parse error, key must be a string"),
        (b"{]", "JSON parse error, key must be a string"),
        (b"{\"execute\":\"query-version\"]", "JSON parse error, expected `,` or `}`"),
        (b"\"\\x\"", "JSON parse error, invalid escape"),
        (b"[\"\\ud800\"]", "JSON parse error, "),
        (b"{\"a\":\"\xc3\"}", "JSON parse error, invalid unicode code point"),
        (b"{\"a\":1e999}", "JSON parse error, number out of range"),
    ] {
        let replies = bench.say(sent);
        match replies.as_slice() {
            [] => assert_eq!(told, "", "{}", sent.escape_ascii()),
            [reply] => {
                let (class, desc) = class_and_desc(reply);
                assert!(class == "GenericError" && desc.starts_with(told), "{}: {desc}", sent.escape_ascii());
                assert!(bench.ask("{'execute': 'query-version'}")["return"].is_object(), "{}", sent.escape_ascii());
            }
            many => panic!("{}: {many:?}", sent.escape_ascii()),
        }
    }
}

#[test]
fn a_message_of_the_allowed_size_is_taken_and_a_longer_one_is_one_error() {
    let mut bench = Bench::new();
    let padded = |length: usize| {
        let frame = "{\"execute\":\"query-version\",\"id\":\"\"}";
        format!("{}{}\"}}", &frame[..frame.len() - 2], "x".repeat(length - frame.len()))
    };
    let most = bench.ask(padded(MAX_MESSAGE));
    assert_eq!(most["id"].as_str().unwrap().len(), MAX_MESSAGE - 35);
    for length in [MAX_MESSAGE + 1, 1 << 20] {
        let told = format!("JSON message size limit exceeded: {MAX_MESSAGE} bytes are allowed");
        assert_eq!(class_and_desc(&bench.ask(padded(length))), ("GenericError", told.as_str()));
        assert!(bench.ask("{'execute': 'query-version'}")["return"].is_object());
    }
}

#[test]
fn nesting_is_bounded() {
    let mut bench = Bench::new();
    let nested =
        |depth| format!("{{\"execute\":\"query-version\",\"id\":{}{}}}", "[".repeat(depth - 1), "]".repeat(depth - 1));
    assert!(bench.ask(nested(MAX_DEPTH))["return"].is_object());
    for depth in [MAX_DEPTH + 1, 1 << 20] {
        let told = format!("JSON nesting depth limit exceeded: {MAX_DEPTH} levels are allowed");
        assert_eq!(class_and_desc(&bench.ask(nested(depth))), ("GenericError", told.as_str()));
        assert!(bench.ask("{'execute': 'query-version'}")["return"].is_object());
    }
}
