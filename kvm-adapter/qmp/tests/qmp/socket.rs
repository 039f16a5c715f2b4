//! The socket, and clients that do what they should not.

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use dirtylimit_kvm::FakeVm;
use dirtylimit_qmp::{MAX_CLIENTS, Monitor, QmpServer};
use serde_json::{Value, json};

/// A directory that is removed when the test ends.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dirtylimit-qmp-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A server whose VM is gone: nothing here is about it.
fn serve(path: &Path) -> io::Result<QmpServer> {
    Monitor::new(&FakeVm::new(&[]).limit).serve(path)
}

/// A client that has been greeted, or was refused; what it was told first.
fn connect(path: &Path) -> (BufReader<UnixStream>, Value) {
    let stream = UnixStream::connect(path).unwrap();
    // Only a server that hangs is so slow.
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut client = BufReader::new(stream);
    let told = receive(&mut client);
    (client, told)
}

fn receive(client: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    client.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or(Value::Null)
}

fn ask(client: &mut BufReader<UnixStream>, message: &str) -> Value {
    client.get_mut().write_all(message.as_bytes()).unwrap();
    receive(client)
}

/// A new client gets its answers.
fn serves(path: &Path) {
    let (mut client, greeting) = connect(path);
    assert!(greeting["QMP"].is_object(), "{greeting}");
    assert_eq!(ask(&mut client, "{'execute': 'qmp_capabilities'}"), json!({ "return": {} }));
    assert!(ask(&mut client, "{'execute': 'query-version'}")["return"].is_object());
}

/// Until the server has noticed that somebody left.
fn serves_again(path: &Path) {
    while connect(path).1["QMP"].is_null() {
        thread::yield_now();
    }
    serves(path);
}

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_the_server() {
    let directory = Directory::new("mode");
    let path = directory.socket();
    let server = serve(&path).unwrap();
    assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
    assert_eq!(server.path(), path);
    serves(&path);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn only_a_dead_servers_socket_is_replaced() {
    let directory = Directory::new("stale");
    let path = directory.socket();
    drop(UnixListener::bind(&path).unwrap()); // leaves its file
    let server = serve(&path).unwrap();
    serves(&path);
    let error = serve(&path).unwrap_err();
    assert!(error.kind() == ErrorKind::AddrInUse && error.to_string().contains("another server"), "{error}");
    assert!(error.to_string().contains(path.to_str().unwrap()));
    serves(&path);
    drop(server);

    fs::write(&path, "precious").unwrap();
    let link = directory.0.join("link");
    symlink(&path, &link).unwrap();
    for path in [&path, &link] {
        let error = serve(path).unwrap_err();
        assert!(error.to_string().contains("no socket"), "{error}");
    }
    assert_eq!(fs::read_to_string(&link).unwrap(), "precious");
    fs::remove_file(&path).unwrap();
    assert!(serve(&link).is_err() && link.is_symlink(), "a link to nothing is no socket either");

    let server = serve(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "another's").unwrap();
    drop(server);
    assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
}

#[test]
fn paths_that_cannot_be_are_refused_by_name() {
    let directory = Directory::new("paths");
    for path in [directory.0.join("x".repeat(200)), directory.0.join("missing/socket"), directory.0.clone()] {
        let error = serve(&path).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn of_a_hundred_clients_sixteen_are_served_and_the_others_told() {
    let directory = Directory::new("hundred");
    let path = directory.socket();
    let _server = serve(&path).unwrap();
    let mut clients: Vec<_> = thread::scope(|scope| {
        let connecting: Vec<_> = (0..100).map(|_| scope.spawn(|| connect(&path))).collect();
        connecting.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let (served, refused): (Vec<_>, Vec<_>) = clients.iter_mut().partition(|(_, told)| told["QMP"].is_object());
    assert_eq!((served.len(), refused.len()), (MAX_CLIENTS, 100 - MAX_CLIENTS));
    for (client, told) in refused {
        assert!(told["error"]["desc"].as_str().unwrap().contains("16 clients already"), "{told}");
        assert_eq!(client.read(&mut [0]).unwrap(), 0, "it is hung up on");
    }
    for (client, _) in served {
        assert_eq!(ask(client, "{'execute': 'qmp_capabilities'}"), json!({ "return": {} }));
    }
    drop(clients);
    serves_again(&path);
}

#[test]
fn a_client_that_has_shut_its_side_gets_all_its_answers() {
    let directory = Directory::new("half");
    let path = directory.socket();
    let _server = serve(&path).unwrap();
    let (mut client, _) = connect(&path);
    let questions = "{'execute': 'qmp_capabilities'}".to_owned() + &"{'execute': 'query-version'}".repeat(1000);
    client.get_mut().write_all(questions.as_bytes()).unwrap();
    client.get_mut().write_all(b"{'execute': 'cut").unwrap();
    client.get_ref().shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.lines().map(Result::unwrap).count(), 1001);
}

#[test]
fn who_asks_and_does_not_listen_holds_nobody_up() {
    let directory = Directory::new("deaf");
    let path = directory.socket();
    let _server = serve(&path).unwrap();
    let (mut deaf, _) = connect(&path);
    // Until its own buffers and the server's patience with them are full.
    deaf.get_ref().set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let questions = "{'execute': 'query-commands'}".repeat(1000);
    let mut sent = 0;
    let full = loop {
        match deaf.get_mut().write(questions.as_bytes()) {
            Ok(count) => sent += count,
            Err(error) => break error,
        }
        assert!(sent < 64 << 20, "the server goes on taking what it cannot answer");
    };
    assert!(matches!(full.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{full}");
    let (mut slow, _) = connect(&path);
    for byte in "{'execute': 'qmp_capabilities'}".bytes() {
        slow.get_mut().write_all(&[byte]).unwrap();
        serves(&path);
    }
    assert_eq!(receive(&mut slow), json!({ "return": {} }));
}

#[test]
fn garbage_is_answered_and_everybody_else_served() {
    let directory = Directory::new("garbage");
    let path = directory.socket();
    let _server = serve(&path).unwrap();
    for garbage in
        [vec![b'['; 1 << 20], vec![b'"'; 1 << 20], vec![0; 1 << 20], vec![0xff; 1 << 20], b"}{".repeat(1 << 12)]
    {
        let (mut client, _) = connect(&path);
        let mut writer = client.get_ref().try_clone().unwrap();
        let send = thread::spawn(move || {
            writer.write_all(&garbage).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut replies = String::new();
        client.read_to_string(&mut replies).unwrap();
        send.join().unwrap();
        for reply in replies.lines() {
            let reply: Value = serde_json::from_str(reply).unwrap();
            assert_eq!(reply["error"]["class"], "GenericError", "{reply}");
        }
        assert!(!replies.is_empty());
        serves(&path);
    }
}

#[test]
fn another_user_is_refused_even_where_the_file_lets_it_in() {
    let root = rustix::process::geteuid().is_root();
    if !root {
        let _ = writeln!(io::stderr(), "SKIPPED: only root can become another user");
        return;
    }
    let directory = Directory::new("user");
    let path = directory.socket();
    let _server = serve(&path).unwrap();
    fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let told = thread::scope(|scope| {
        let nobody = || {
            // Of this thread alone: that is what the peer's credentials are taken from.
            let uid = rustix::process::Uid::from_raw(65_534);
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            connect(&path).1
        };
        scope.spawn(nobody).join().unwrap()
    });
    assert!(told["error"]["desc"].as_str().unwrap().contains("for its own user and root"), "{told}");
    serves(&path);
}
