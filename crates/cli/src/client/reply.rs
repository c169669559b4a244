//! An answer of the engine: a document, a stream of lines, or a connection taken over.

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::Response;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;

use super::{Body, Client, Wire};
use crate::fault::{Fault, Outcome};
use crate::value::Value;

pub struct Reply<'a> {
    client: &'a Client,
    sender: SendRequest<Body>,
    response: Response<Incoming>,
}

impl<'a> Reply<'a> {
    pub fn new(client: &'a Client, sender: SendRequest<Body>, response: Response<Incoming>) -> Self {
        Self { client, sender, response }
    }

    pub fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name).and_then(|value| value.to_str().ok())
    }

    /// The fault an error status stands for, in the engine's words.
    pub async fn accepted(self) -> Outcome<Self> {
        let status = self.status();
        if status < 400 {
            return Ok(self);
        }
        let reason = self.response.status().to_string();
        let bytes = self.bytes().await?;
        let message = Value::parse(&bytes)
            .ok()
            .map(|value| value.at("message").text().to_owned())
            .filter(|message| !message.is_empty())
            .unwrap_or_else(|| {
                let text = String::from_utf8_lossy(&bytes).trim().to_owned();
                if text.is_empty() { reason } else { text }
            });
        Err(Fault::Api { status, message })
    }

    pub async fn bytes(self) -> Outcome<Bytes> {
        let collected = self.response.into_body().collect().await.map_err(broken)?;
        self.client.keep(self.sender);
        Ok(collected.to_bytes())
    }

    pub async fn drain(self) -> Outcome {
        self.bytes().await.map(drop)
    }

    pub async fn value(self) -> Outcome<Value> {
        let bytes = self.bytes().await?;
        Value::parse(&bytes)
            .map_err(|error| Fault::said(format!("the engine's answer does not parse: {error}")))
    }

    /// The body as it comes.
    pub fn into_stream(self) -> Incoming {
        self.response.into_body()
    }

    pub fn into_lines(self) -> Lines {
        Lines { body: self.response.into_body(), buffer: BytesMut::new() }
    }

    pub async fn into_wire(self) -> Outcome<(Wire, Bytes)> {
        let upgraded = hyper::upgrade::on(self.response)
            .await
            .map_err(|error| Fault::said(format!("unable to upgrade to tcp: {error}")))?;
        let parts = upgraded
            .downcast::<TokioIo<Wire>>()
            .map_err(|_upgraded| Fault::said("unable to upgrade to tcp: not this client's connection"))?;
        Ok((parts.io.into_inner(), parts.read_buf))
    }
}

pub fn broken(error: hyper::Error) -> Fault {
    Fault::said(format!("the engine's answer broke off: {error}"))
}

/// JSON values of a stream, one after the other.
pub struct Lines {
    body: Incoming,
    buffer: BytesMut,
}

impl Lines {
    pub async fn next(&mut self) -> Outcome<Option<Value>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                if let Some(value) = parse_line(&line)? {
                    return Ok(Some(value));
                }
                continue;
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(mut data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data.copy_to_bytes(data.remaining()));
                        // An engine may send an object without ending its line, and then wait.
                        if !self.buffer.contains(&b'\n')
                            && let Ok(value) = Value::parse(&self.buffer)
                        {
                            self.buffer.clear();
                            return Ok(Some(value));
                        }
                    }
                }
                Some(Err(error)) => return Err(broken(error)),
                None => {
                    let rest = self.buffer.split();
                    return parse_line(&rest);
                }
            }
        }
    }
}

fn parse_line(line: &[u8]) -> Outcome<Option<Value>> {
    let line = line.trim_ascii();
    if line.is_empty() {
        return Ok(None);
    }
    Value::parse(line).map(Some).map_err(|error| {
        Fault::said(format!("the engine's answer does not parse: {error}: {}", String::from_utf8_lossy(line)))
    })
}
