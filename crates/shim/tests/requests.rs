//! What is not a proper request: half-sent, malformed, oversized. The monitor answers or hangs up, and lives on.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use brigantine_shim::Status;
use common::{Fixture, Running};

fn raw(fixture: &Fixture) -> UnixStream {
    let stream = UnixStream::connect(fixture.config.dir.join("shim.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn message(body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

fn answer(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(bytes.get(4..).unwrap_or_default()).into_owned()
}

fn assert_alive(running: &Running) {
    assert_eq!(running.client.state().unwrap().status, Status::Running);
}

#[test]
fn malformed_requests_are_refused() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    for body in [
        &b"{"[..],
        b"",
        b"null",
        b"\xff\xfe",
        b"\"nonsense\"",
        br#"{"kill":{"signal":"nine"}}"#,
        br#"{"exec":{"config":{}}}"#,
        b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    ] {
        let mut stream = raw(&fixture);
        stream.write_all(&message(body)).unwrap();
        let answer = answer(&mut stream);
        assert!(answer.contains("malformed request"), "{answer}");
    }
    let mut stream = raw(&fixture);
    stream.write_all(&u32::MAX.to_be_bytes()).unwrap();
    assert!(answer(&mut stream).contains("limit"));
    let mut stream = raw(&fixture);
    stream.write_all(&message(br#"{"kill":{"signal":999,"all":false}}"#)).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(answer(&mut stream).contains("signal 999"));
    for id in ["", "../../etc/x", "a/b", &"x".repeat(200)] {
        assert!(running.client.exec(&fixture.exec(id, &["true"])).is_err(), "{id}");
    }
    assert_alive(&running);
}

#[test]
fn half_sent_requests_end() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    let mut silent = raw(&fixture);
    let mut half = raw(&fixture);
    half.write_all(&[0, 0, 0, 200, b'{']).unwrap();
    let since = Instant::now();
    assert_eq!(answer(&mut half), "");
    assert_eq!(answer(&mut silent), "");
    assert!(since.elapsed() < Duration::from_secs(15));
    assert_alive(&running);
}

#[test]
fn a_crowd_of_idle_connections_does_not_keep_others_out() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    let crowd: Vec<_> = (0..300).map(|_| raw(&fixture)).collect();
    assert_alive(&running);
    drop(crowd);
    assert_alive(&running);
}
