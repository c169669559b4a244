//! Graylog's GELF 1.1: one JSON document a line, by UDP (compressed, in chunks when it is long) or TCP (with a zero byte
//! behind it).

use std::io::{self, Write};
use std::time::UNIX_EPOCH;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde_json::{Map, Value, json};

use super::connection::Connection;
use super::{Collector, Piece, WRITE, send_to};
use crate::config::{Endpoint, GelfCompression, GelfConfig};
use crate::log::Source;

/// What of a message is in one datagram: with its header it fits into an Ethernet frame.
const CHUNK: usize = 1420 - HEADER;
/// Magic number, id of the message, number of the chunk, count.
const HEADER: usize = 12;
/// Servers take no more chunks of one message.
const MAX_CHUNKS: usize = 128;
/// Syslog's severities.
const ERROR: u8 = 3;
const INFORMATIONAL: u8 = 6;

pub(super) struct Gelf {
    config: GelfConfig,
    connection: Option<Connection>,
    messages: u64,
}

impl Gelf {
    pub(super) fn new(config: GelfConfig) -> Self {
        Self { config, connection: None, messages: 0 }
    }

    fn message(&self, piece: &Piece) -> Vec<u8> {
        let since = piece.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut message = Map::new();
        for (name, value) in &self.config.fields {
            message.insert(format!("_{name}"), Value::from(value.as_str()));
        }
        message.insert("version".to_owned(), "1.1".into());
        message.insert("host".to_owned(), self.config.host.as_str().into());
        message.insert("short_message".to_owned(), String::from_utf8_lossy(&piece.text).into());
        message.insert("timestamp".to_owned(), json!(since.as_millis() as f64 / 1e3));
        let level = if piece.source == Source::Stderr { ERROR } else { INFORMATIONAL };
        message.insert("level".to_owned(), level.into());
        if piece.partial {
            message.insert("_partial_message".to_owned(), "true".into());
        }
        Value::Object(message).to_string().into_bytes()
    }

    /// Numbers that tell one message's chunks from another's.
    fn next_id(&mut self, piece: &Piece) -> [u8; 8] {
        self.messages += 1;
        let since = piece.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        (since ^ (u64::from(std::process::id()) << 40) ^ (self.messages << 1)).to_be_bytes()
    }
}

fn compress(kind: GelfCompression, level: i32, message: Vec<u8>) -> io::Result<Vec<u8>> {
    let level = u32::try_from(level).map_or_else(|_default| Compression::default(), Compression::new);
    match kind {
        GelfCompression::None => Ok(message),
        GelfCompression::Gzip => {
            let mut encoder = GzEncoder::new(Vec::new(), level);
            encoder.write_all(&message)?;
            encoder.finish()
        }
        GelfCompression::Zlib => {
            let mut encoder = ZlibEncoder::new(Vec::new(), level);
            encoder.write_all(&message)?;
            encoder.finish()
        }
    }
}

/// The datagrams of one message; none if it is too long for the protocol.
fn datagrams(message: &[u8], id: [u8; 8]) -> Vec<Vec<u8>> {
    if message.len() <= CHUNK {
        return vec![message.to_vec()];
    }
    let chunks: Vec<&[u8]> = message.chunks(CHUNK).collect();
    if chunks.len() > MAX_CHUNKS {
        return Vec::new();
    }
    let count = chunks.len() as u8;
    let chunk = |(number, chunk): (usize, &&[u8])| {
        let mut datagram = vec![0x1e, 0x0f];
        datagram.extend_from_slice(&id);
        datagram.extend_from_slice(&[number as u8, count]);
        datagram.extend_from_slice(chunk);
        datagram
    };
    chunks.iter().enumerate().map(chunk).collect()
}

impl Collector for Gelf {
    fn send(&mut self, piece: &Piece) -> io::Result<()> {
        let mut message = self.message(piece);
        let id = self.next_id(piece);
        let endpoint = &self.config.endpoint;
        if let Endpoint::Udp(_) = endpoint {
            let message = compress(self.config.compression, self.config.level, message)?;
            let mut parts = datagrams(&message, id).into_iter();
            return parts.try_for_each(|part| send_to(&mut self.connection, endpoint, WRITE, &part));
        }
        message.push(0);
        send_to(&mut self.connection, endpoint, WRITE, &message)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;

    fn gelf() -> Gelf {
        Gelf::new(GelfConfig {
            endpoint: Endpoint::Udp("127.0.0.1:12201".parse().unwrap()),
            host: "h".to_owned(),
            fields: BTreeMap::from([("tag".to_owned(), "t".to_owned())]),
            compression: GelfCompression::Gzip,
            level: -1,
        })
    }

    fn piece(text: &[u8]) -> Piece {
        let time = UNIX_EPOCH + Duration::from_millis(1_500);
        Piece { source: Source::Stderr, time, text: text.to_vec(), partial: false }
    }

    #[test]
    fn a_message_is_a_document_of_version_1_1() {
        let message: Value = serde_json::from_slice(&gelf().message(&piece(b"say \"hi\""))).unwrap();
        let expected = json!({
            "version": "1.1", "host": "h", "short_message": "say \"hi\"", "timestamp": 1.5, "level": 3, "_tag": "t",
        });
        assert_eq!(message, expected);
    }

    #[test]
    fn long_messages_go_in_chunks() {
        let message: Vec<u8> = (0..3000_u32).map(|n| n as u8).collect();
        let chunks = datagrams(&message, [7; 8]);
        assert_eq!(chunks.len(), 3);
        let joined: Vec<u8> = chunks.iter().flat_map(|chunk| chunk[HEADER..].to_vec()).collect();
        assert_eq!(joined, message);
        assert_eq!(chunks[2][..HEADER], [0x1e, 0x0f, 7, 7, 7, 7, 7, 7, 7, 7, 2, 3]);
        assert_eq!(datagrams(&message[..CHUNK], [7; 8]), [&message[..CHUNK]]);
        assert!(datagrams(&vec![0; CHUNK * MAX_CHUNKS + 1], [7; 8]).is_empty());
    }
}
