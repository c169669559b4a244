//! HTTP/1.1 over a unix socket, bare enough to say wrong things on purpose.

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
};

use serde_json::Value;

/// An answer, read to its end.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        match serde_json::from_slice(&self.body) {
            Ok(value) => value,
            Err(e) => panic!("not JSON ({e}): {} {:?}", self.status, self.text()),
        }
    }

    /// `message` of an error body.
    #[track_caller]
    pub fn message(&self) -> String {
        self.json()["message"]
            .as_str()
            .unwrap_or_else(|| panic!("no message in {:?}", self.text()))
            .to_owned()
    }

    /// Panics unless the status is this one.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert!(self.status == status, "expected {status}, got {} {:?}", self.status, self.text());
        self
    }
}

/// Sends one request and reads the whole answer.
#[track_caller]
pub fn exchange(stream: UnixStream, method: &str, path: &str, body: Option<(&str, &[u8])>) -> Response {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
    if let Some((kind, bytes)) = body {
        write!(head, "Content-Type: {kind}\r\nContent-Length: {}\r\n", bytes.len()).expect("to a string");
    }
    head.push_str("\r\n");
    (&stream).write_all(head.as_bytes()).expect("sending a request");
    if let Some((_, bytes)) = body {
        // The answer may come before all of a refused body is sent.
        (&stream).write_all(bytes).ok();
    }
    read_response(&mut BufReader::new(stream), method == "HEAD")
}

/// Reads status line and headers; the stream then stands at the body.
#[track_caller]
pub fn read_head(stream: &mut BufReader<UnixStream>) -> Response {
    let mut line = String::new();
    stream.read_line(&mut line).expect("reading a status line");
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no HTTP status line: {line:?}"));
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).expect("reading a header");
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    Response { status, headers, body: Vec::new() }
}

/// Reads one whole response.
#[track_caller]
pub fn read_response(stream: &mut BufReader<UnixStream>, headless: bool) -> Response {
    let mut response = read_head(stream);
    if headless || response.status == 204 || response.status == 304 {
        return response;
    }
    if response.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
        loop {
            let mut size = String::new();
            stream.read_line(&mut size).expect("reading a chunk's size");
            let Ok(n) = u64::from_str_radix(size.trim().split(';').next().unwrap_or(""), 16) else { break };
            stream.take(n).read_to_end(&mut response.body).expect("reading a chunk");
            stream.read_line(&mut String::new()).expect("reading a chunk's end");
            if n == 0 {
                break;
            }
        }
    } else if let Some(n) = response.header("content-length").and_then(|v| v.parse().ok()) {
        stream.take(n).read_to_end(&mut response.body).expect("reading a body");
    } else {
        stream.read_to_end(&mut response.body).expect("reading a body");
    }
    response
}

/// Sends the head of a hijacking request and returns the answer's head with the stream behind it.
#[track_caller]
pub fn hijack(
    stream: UnixStream,
    path: &str,
    body: &str,
    upgrade: bool,
) -> (Response, BufReader<UnixStream>) {
    let upgrade = if upgrade { "Connection: Upgrade\r\nUpgrade: tcp\r\n" } else { "" };
    let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: test\r\n{upgrade}{kind}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    (&stream).write_all(head.as_bytes()).expect("sending a request");
    let mut reader = BufReader::new(stream);
    let response = read_head(&mut reader);
    (response, reader)
}

/// Splits a multiplexed stream into (stdout, stderr).
#[track_caller]
pub fn demultiplex(mut raw: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while !raw.is_empty() {
        assert!(raw.len() >= 8, "a frame's header is cut short: {raw:?}");
        let n = u32::from_be_bytes([raw[4], raw[5], raw[6], raw[7]]) as usize;
        assert!(raw.len() >= 8 + n, "a frame is cut short");
        match raw[0] {
            1 => out.extend_from_slice(&raw[8..8 + n]),
            2 => err.extend_from_slice(&raw[8..8 + n]),
            other => panic!("a frame of stream {other}"),
        }
        raw = &raw[8 + n..];
    }
    (out, err)
}

/// `text` as part of a path or query.
pub fn escape(text: &str) -> String {
    let mut out = String::new();
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) {
            out.push(b as char);
        } else {
            write!(out, "%{b:02X}").expect("to a string");
        }
    }
    out
}
