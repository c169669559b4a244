//! Fluentd's forward protocol (its specification, version 1): `[tag, time, record]` in MessagePack, one after the other;
//! with `{"chunk": id}` behind it when the server is to acknowledge it, which it does with `{"ack": id}`.

use std::io;
use std::time::{Instant, UNIX_EPOCH};

use super::connection::Connection;
use super::{Collector, Piece, WRITE, send_to};
use crate::config::FluentdConfig;

pub(super) struct Fluentd {
    config: FluentdConfig,
    connection: Option<Connection>,
    opened: Option<Instant>,
    records: u64,
}

impl Fluentd {
    pub(super) fn new(config: FluentdConfig) -> Self {
        Self { config, connection: None, opened: None, records: 0 }
    }

    fn message(&self, piece: &Piece, id: Option<&str>) -> Vec<u8> {
        let mut out = vec![0x93 + u8::from(id.is_some())];
        text(&mut out, self.config.tag.as_bytes());
        let since = piece.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.config.sub_second {
            // EventTime: extension type 0 of eight bytes.
            out.extend_from_slice(&[0xd7, 0]);
            out.extend_from_slice(&(since.as_secs() as u32).to_be_bytes());
            out.extend_from_slice(&since.subsec_nanos().to_be_bytes());
        } else {
            out.push(0xce);
            out.extend_from_slice(&(since.as_secs() as u32).to_be_bytes());
        }
        let count = self.config.fields.len() + 2 + usize::from(piece.partial);
        out.push(0xde);
        out.extend_from_slice(&(count as u16).to_be_bytes());
        for (name, value) in &self.config.fields {
            text(&mut out, name.as_bytes());
            text(&mut out, value.as_bytes());
        }
        text(&mut out, b"source");
        text(&mut out, piece.source.as_str().as_bytes());
        text(&mut out, b"log");
        text(&mut out, &piece.text);
        if piece.partial {
            text(&mut out, b"partial_message");
            text(&mut out, b"true");
        }
        if let Some(id) = id {
            out.push(0x81);
            text(&mut out, b"chunk");
            text(&mut out, id.as_bytes());
        }
        out
    }

    /// An id for the next record, if they have any.
    fn next_id(&mut self, piece: &Piece) -> Option<String> {
        self.records += 1;
        let since = piece.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let id = || format!("{since:016x}{:08x}", self.records as u32);
        self.config.request_ack.then(id)
    }
}

/// A string: what is no UTF-8 goes as it is, and the collector decides.
fn text(out: &mut Vec<u8>, bytes: &[u8]) {
    match bytes.len() {
        short @ 0..=31 => out.push(0xa0 | short as u8),
        long @ 32..=255 => out.extend_from_slice(&[0xd9, long as u8]),
        long => {
            out.push(0xda);
            out.extend_from_slice(&(long.min(0xffff) as u16).to_be_bytes());
        }
    }
    out.extend_from_slice(&bytes[..bytes.len().min(0xffff)]);
}

impl Collector for Fluentd {
    fn send(&mut self, piece: &Piece) -> io::Result<()> {
        let id = self.next_id(piece);
        let message = self.message(piece, id.as_deref());
        let is_stale = |opened: Instant| self.config.reconnect.is_some_and(|after| opened.elapsed() >= after);
        if self.opened.is_some_and(is_stale) {
            self.connection = None;
        }
        if self.connection.is_none() {
            self.opened = Some(Instant::now());
        }
        let limit = self.config.write_timeout.unwrap_or(WRITE);
        send_to(&mut self.connection, &self.config.endpoint, limit, &message)?;
        if let (Some(id), Some(connection)) = (id, &mut self.connection)
            && let Err(error) = acknowledged(connection, &id)
        {
            self.connection = None;
            return Err(error);
        }
        Ok(())
    }
}

/// Waits for the answer that names the record.
fn acknowledged(connection: &mut Connection, id: &str) -> io::Result<()> {
    let mut expected = vec![0x81];
    text(&mut expected, b"ack");
    text(&mut expected, id.as_bytes());
    let mut answer = vec![0; expected.len()];
    connection.receive(&mut answer)?;
    if answer == expected {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the server acknowledges something else than it was sent"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::config::Endpoint;
    use crate::log::Source;

    #[test]
    fn a_message_is_tag_time_and_record() {
        let config = FluentdConfig {
            endpoint: Endpoint::Tcp("127.0.0.1:24224".parse().unwrap()),
            tag: "t".to_owned(),
            fields: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
            sub_second: false,
            request_ack: true,
            write_timeout: None,
            reconnect: None,
        };
        let piece = Piece {
            source: Source::Stdout,
            time: UNIX_EPOCH + Duration::from_secs(1),
            text: b"hi".to_vec(),
            partial: false,
        };
        let expected = b"\x93\xa1t\xce\0\0\0\x01\xde\0\x03\xa1a\xa1b\xa6source\xa6stdout\xa3log\xa2hi";
        let mut fluentd = Fluentd::new(config);
        assert_eq!(fluentd.message(&piece, None), expected);
        let id = fluentd.next_id(&piece).unwrap();
        assert_eq!(id, "000000003b9aca0000000001");
        let mut with_id = expected.to_vec();
        with_id[0] = 0x94;
        with_id.extend_from_slice(b"\x81\xa5chunk\xb8");
        with_id.extend_from_slice(id.as_bytes());
        assert_eq!(fluentd.message(&piece, Some(&id)), with_id);
    }
}
