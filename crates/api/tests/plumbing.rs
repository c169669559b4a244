//! The protocol on the wire: raw HTTP against an in-process server with routes of the test's own.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use brigantine_api::http::server::Server;
use brigantine_api::http::{ApiVersion, Error, Reply, Request, Router, StreamType};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

#[derive(Clone)]
struct State {
    finished: mpsc::UnboundedSender<&'static str>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    #[serde(rename = "Name")]
    name: Option<String>,
    #[serde(rename = "Labels")]
    labels: Option<HashMap<String, String>>,
}

async fn echo_json(_: State, mut request: Request) -> Result<Reply, Error> {
    Reply::created(&request.json_body::<Document>().await?)
}

async fn optional_json(_: State, mut request: Request) -> Result<Reply, Error> {
    Ok(match request.json_body_opt::<Document>().await? {
        None => Reply::no_content(),
        Some(document) => Reply::json(&document)?,
    })
}

async fn show_name(_: State, request: Request) -> Result<Reply, Error> {
    Reply::json(&(request.param("name"), request.version().to_string()))
}

async fn filtered(_: State, request: Request) -> Result<Reply, Error> {
    Reply::json(&request.filters(&["label", "dangling"])?.into_map())
}

async fn not_modified(_: State, _: Request) -> Result<Reply, Error> {
    Err(Error::not_modified())
}

async fn shout(_: State, request: Request) -> Result<Reply, Error> {
    let announced = StreamType::announced(request.query().flag("tty"), request.version());
    Ok(Reply::hijack(&request, announced, |mut stream| async move {
        stream.write_all(b"ready\n").await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        all.make_ascii_uppercase();
        stream.write_all(&all).await.unwrap();
        stream.shutdown().await.unwrap();
    }))
}

async fn change_slowly(state: State, _: Request) -> Result<Reply, Error> {
    tokio::time::sleep(Duration::from_millis(100)).await;
    state.finished.send("change").unwrap();
    Ok(Reply::no_content())
}

async fn never(_: State, _: Request) -> Result<Reply, Error> {
    Ok(Reply::json_later(std::future::pending::<Result<(), Error>>()))
}

async fn pull(_: State, request: Request) -> Result<Reply, Error> {
    let fail = request.query().text("fail").map(str::to_owned);
    Reply::progress(move |sink| async move {
        if fail.as_deref() == Some("early") {
            return Err(Error::not_found("no such thing"));
        }
        sink.send(&serde_json::json!({"status": "one"})).await;
        sink.send(&serde_json::json!({"status": "two"})).await;
        if fail.is_some() { Err(Error::internal("broke off")) } else { Ok(()) }
    })
    .await
}

struct Fixture {
    server: Arc<Server<State>>,
    finished: mpsc::UnboundedReceiver<&'static str>,
    stop: watch::Sender<bool>,
}

fn fixture() -> Fixture {
    let mut router = Router::new();
    router
        .post("/echo", echo_json)
        .post("/optional", optional_json)
        .get("/images/{name:.*}/json", show_name)
        .get("/filtered", filtered)
        .post("/same", not_modified)
        .post("/attach", shout)
        .post("/change", change_slowly)
        .post("/never", never)
        .post("/pull", pull);
    let (sender, finished) = mpsc::unbounded_channel();
    let server = Server::new(router, State { finished: sender }).with_header_time(Duration::from_millis(300));
    Fixture { server: Arc::new(server), finished, stop: watch::channel(false).0 }
}

impl Fixture {
    fn connect(&self) -> UnixStream {
        let (client, server) = UnixStream::pair().unwrap();
        tokio::spawn(Arc::clone(&self.server).connection(server, Arc::default(), self.stop.subscribe()));
        client
    }

    /// Sends raw bytes with `Connection: close` semantics and reads everything that comes back.
    async fn exchange(&self, request: &str) -> String {
        let mut client = self.connect();
        client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(Duration::from_secs(10), client.read_to_end(&mut answer))
            .await
            .unwrap()
            .unwrap();
        String::from_utf8(answer).unwrap()
    }

    async fn get(&self, path: &str) -> String {
        self.exchange(&format!("GET {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n")).await
    }

    async fn post(&self, path: &str, content_type: &str, body: &str) -> String {
        self.exchange(&format!(
            "POST {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await
    }
}

fn status(answer: &str) -> u16 {
    answer
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or_else(|| panic!("no status: {answer:?}"))
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

fn message(answer: &str) -> String {
    let value: serde_json::Value = serde_json::from_str(body(answer)).unwrap();
    value["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn every_answer_carries_the_common_headers_and_json_ends_with_a_newline() {
    let fixture = fixture();
    let answer = fixture.get("/v1.41/images/a/json").await;
    assert_eq!(status(&answer), 200);
    for header in [
        "Api-Version: 1.53\r\n",
        "Docker-Experimental: false\r\n",
        "Ostype: linux\r\n",
        "Server: Brigantine/",
    ] {
        assert!(answer.contains(header), "{header} in {answer}");
    }
    assert_eq!(body(&answer), "[\"a\",\"1.41\"]\n");
}

#[tokio::test]
async fn names_are_decoded_whole() {
    let fixture = fixture();
    assert_eq!(body(&fixture.get("/images/h:5000%2Fa%2Fb:t/json").await), "[\"h:5000/a/b:t\",\"1.53\"]\n");
    assert_eq!(body(&fixture.get("/images/a//b/json").await), "[\"a//b\",\"1.53\"]\n");
    let broken = fixture.get("/images/%ff/json").await;
    assert_eq!(status(&broken), 400);
}

#[tokio::test]
async fn an_unknown_path_and_a_wrong_method_are_not_found() {
    let fixture = fixture();
    for answer in
        [fixture.get("/nothing").await, fixture.get("/echo").await, fixture.post("/filtered", "", "").await]
    {
        assert_eq!(status(&answer), 404);
        assert_eq!(message(&answer), "page not found");
        assert!(body(&answer).ends_with("}\n"));
    }
}

#[tokio::test]
async fn versions_out_of_range_are_refused() {
    let fixture = fixture();
    let new = fixture.get("/v1.99/images/a/json").await;
    assert_eq!(status(&new), 400);
    assert_eq!(message(&new), "client version 1.99 is too new. Maximum supported API version is 1.53");
    let old = fixture.get("/v1.10/images/a/json").await;
    assert_eq!(status(&old), 400);
    assert!(old.contains("Content-Type: text/plain"));
    assert!(body(&old).starts_with("client version 1.10 is too old. Minimum supported API version is 1.24"));
    assert_eq!(status(&fixture.get("/v1.2.3.4.99999/images/a/json").await), 400);
}

#[tokio::test]
async fn bodies_need_json_and_say_what_is_wrong() {
    let fixture = fixture();
    let good = fixture
        .post("/echo", "application/json; charset=utf-8", r#"{"name":"x","LABELS":{"Name":"y"}}"#)
        .await;
    assert_eq!(status(&good), 201);
    assert_eq!(body(&good), "{\"Name\":\"x\",\"Labels\":{\"Name\":\"y\"}}\n");

    let typed = fixture.post("/echo", "text/plain", "{}").await;
    assert_eq!(status(&typed), 400);
    assert_eq!(message(&typed), "unsupported Content-Type header (text/plain): must be 'application/json'");
    let untyped = fixture
        .exchange("POST /echo HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
        .await;
    assert_eq!(message(&untyped), "unsupported Content-Type header (): must be 'application/json'");

    for (bad, says) in [
        ("{", "invalid JSON: EOF"),
        ("{\"Name\":", "invalid JSON: EOF"),
        ("{}garbage", "invalid JSON: trailing"),
        ("{\"Name\":[]}", "invalid JSON: Name: "),
        ("{\"Labels\":{\"a\":7}}", "invalid JSON: Labels.a: "),
        ("\u{0}\u{1}", "invalid JSON: "),
    ] {
        let answer = fixture.post("/echo", "application/json", bad).await;
        assert_eq!(status(&answer), 400, "{bad}");
        assert!(message(&answer).starts_with(says), "{bad}: {}", message(&answer));
    }
    let none = fixture.post("/echo", "application/json", "").await;
    assert_eq!(message(&none), "invalid JSON: got EOF while reading request body");
    assert_eq!(status(&fixture.post("/optional", "text/plain", "").await), 204);
}

#[tokio::test]
async fn an_oversized_body_is_refused_before_it_is_read() {
    let fixture = fixture();
    let answer = fixture
        .exchange("POST /echo HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n{")
        .await;
    assert_eq!(status(&answer), 400);
    assert!(message(&answer).contains("larger than"), "{answer}");
}

#[tokio::test]
async fn empty_answers_have_no_body() {
    let fixture = fixture();
    let answer = fixture.post("/same", "", "").await;
    assert_eq!(status(&answer), 304);
    assert_eq!(body(&answer), "");
}

#[tokio::test]
async fn both_filter_forms_and_only_known_keys() {
    let fixture = fixture();
    let map = fixture.get("/filtered?filters=%7B%22label%22%3A%7B%22a%3Db%22%3Atrue%7D%7D").await;
    let list = fixture.get("/filtered?filters=%7B%22label%22%3A%5B%22a%3Db%22%5D%7D").await;
    assert_eq!(body(&map), "{\"label\":[\"a=b\"]}\n");
    assert_eq!(body(&list), body(&map));
    let unknown = fixture.get("/filtered?filters=%7B%22colour%22%3A%5B%22x%22%5D%7D").await;
    assert_eq!((status(&unknown), message(&unknown).as_str()), (400, "invalid filter 'colour'"));
    assert_eq!(status(&fixture.get("/filtered?filters=%7B").await), 400);
    assert_eq!(body(&fixture.get("/filtered?filters=").await), "{}\n");
}

#[tokio::test]
async fn half_a_header_is_dropped_and_an_idle_connection_is_not() {
    let fixture = fixture();
    let mut stalled = fixture.connect();
    stalled.write_all(b"GET /filtered HTTP/1.1\r\nHos").await.unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), stalled.read_to_end(&mut rest)).await.unwrap().unwrap();

    let mut idle = fixture.connect();
    for _ in 0..2 {
        idle.write_all(b"GET /filtered HTTP/1.1\r\nHost: d\r\n\r\n").await.unwrap();
        let mut head = [0; 17];
        idle.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 200 OK\r\n");
        tokio::time::sleep(Duration::from_millis(700)).await;
        let mut rest = [0; 1024];
        assert!(idle.read(&mut rest).await.unwrap() > 0);
    }
}

#[tokio::test]
async fn garbage_does_not_hurt_the_next_client() {
    let fixture = fixture();
    for garbage in [
        "\u{16}\u{3}\u{1}\u{2}\r\n\r\n",
        "GET\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
    ] {
        let mut client = fixture.connect();
        client.write_all(garbage.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(Duration::from_secs(5), client.read_to_end(&mut answer)).await.unwrap().unwrap();
    }
    let long = "a".repeat(1 << 20);
    let mut client = fixture.connect();
    // The server may close before all of it is written.
    if client.write_all(format!("GET /{long} HTTP/1.1\r\nX: {long}\r\n\r\n").as_bytes()).await.is_ok() {
        let mut answer = Vec::new();
        if client.read_to_end(&mut answer).await.is_ok() {
            assert!(String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 4"));
        }
    }
    assert_eq!(status(&fixture.get("/filtered").await), 200);
}

#[tokio::test]
async fn an_upgrade_hands_over_the_connection_with_early_bytes_and_half_close() {
    let fixture = fixture();
    let mut client = fixture.connect();
    // Bytes for the stream travel in the same segment as the request.
    client
        .write_all(
            b"POST /v1.43/attach HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nearly ",
        )
        .await
        .unwrap();
    let mut head = [0; 4096];
    let count = client.read(&mut head).await.unwrap();
    let head = std::str::from_utf8(&head[..count]).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"), "{head}");
    assert!(head.contains("Api-Version: 1.53\r\n"));
    assert!(head.ends_with("\r\n\r\n"), "the header arrives alone: {head:?}");
    client.write_all(b"late").await.unwrap();
    client.shutdown().await.unwrap();
    let mut rest = String::new();
    client.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "ready\nEARLY LATE");
}

#[tokio::test]
async fn without_upgrade_the_stream_is_a_plain_200() {
    let fixture = fixture();
    for (path, content_type) in [
        ("/v1.41/attach", "application/vnd.docker.raw-stream"),
        ("/attach?tty=1", "application/vnd.docker.raw-stream"),
        ("/attach", "application/vnd.docker.raw-stream"),
    ] {
        let mut client = fixture.connect();
        client.write_all(format!("POST {path} HTTP/1.1\r\nHost: d\r\n\r\n").as_bytes()).await.unwrap();
        let mut head = [0; 4096];
        let count = client.read(&mut head).await.unwrap();
        let head = std::str::from_utf8(&head[..count]).unwrap();
        assert!(head.starts_with(&format!("HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n")), "{head}");
        assert!(!head.contains("Content-Length") && !head.contains("Transfer-Encoding"));
        client.write_all(b"abc").await.unwrap();
        client.shutdown().await.unwrap();
        let mut rest = String::new();
        client.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "ready\nABC");
    }
}

#[tokio::test]
async fn a_change_runs_to_its_end_when_the_client_leaves() {
    let mut fixture = fixture();
    let mut client = fixture.connect();
    client.write_all(b"POST /change HTTP/1.1\r\nHost: d\r\n\r\n").await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(client);
    let finished = tokio::time::timeout(Duration::from_secs(5), fixture.finished.recv()).await.unwrap();
    assert_eq!(finished, Some("change"));
}

#[tokio::test]
async fn a_late_document_sends_its_header_at_once() {
    let fixture = fixture();
    let mut client = fixture.connect();
    client.write_all(b"POST /never HTTP/1.1\r\nHost: d\r\n\r\n").await.unwrap();
    let mut head = [0; 1024];
    let count = tokio::time::timeout(Duration::from_secs(5), client.read(&mut head)).await.unwrap().unwrap();
    assert!(head[..count].starts_with(b"HTTP/1.1 200 OK\r\n"));
}

#[tokio::test]
async fn progress_fails_with_a_status_before_and_a_message_after_the_first_line() {
    let fixture = fixture();
    let early = fixture.post("/pull?fail=early", "", "").await;
    assert_eq!((status(&early), message(&early).as_str()), (404, "no such thing"));
    let fine = fixture.post("/pull", "", "").await;
    assert!(fine.contains("{\"status\":\"one\"}\r\n") && fine.contains("{\"status\":\"two\"}\r\n"), "{fine}");
    let late = fixture.post("/pull?fail=late", "", "").await;
    assert_eq!(status(&late), 200);
    assert!(
        late.contains("{\"errorDetail\":{\"message\":\"broke off\"},\"error\":\"broke off\"}\r\n"),
        "{late}"
    );
}

#[tokio::test]
async fn a_stopped_server_lets_idle_clients_go() {
    let fixture = fixture();
    let mut idle = fixture.connect();
    tokio::time::sleep(Duration::from_millis(20)).await;
    fixture.stop.send(true).unwrap();
    let mut nothing = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), idle.read_to_end(&mut nothing)).await.unwrap().unwrap();
    assert!(nothing.is_empty());
}

#[test]
fn the_newest_version_is_what_current_clients_send() {
    assert_eq!(ApiVersion::MAX, ApiVersion::v1(53));
}
