//! Fluentd's forward protocol (its specification, version 1): `[tag, time, record]` in MessagePack, one after the other.

use std::io::{self, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::UNIX_EPOCH;

use super::{Collector, Piece, WRITE};
use crate::config::{Endpoint, FluentdConfig};

pub(super) struct Fluentd {
    config: FluentdConfig,
    connection: Option<Box<dyn Write + Send>>,
}

impl Fluentd {
    pub(super) fn new(config: FluentdConfig) -> Self {
        Self { config, connection: None }
    }

    fn message(&self, piece: &Piece) -> Vec<u8> {
        let mut out = vec![0x93];
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
        out
    }

    fn connect(&mut self) -> io::Result<&mut Box<dyn Write + Send>> {
        if self.connection.is_none() {
            self.connection = Some(match &self.config.endpoint {
                Endpoint::Tcp(address) | Endpoint::Udp(address) => {
                    let stream = TcpStream::connect_timeout(address, WRITE)?;
                    stream.set_write_timeout(Some(WRITE))?;
                    Box::new(stream)
                }
                Endpoint::Stream(path) | Endpoint::Datagram(path) => {
                    let stream = UnixStream::connect(path)?;
                    stream.set_write_timeout(Some(WRITE))?;
                    Box::new(stream)
                }
            });
        }
        self.connection.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
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
        let message = self.message(piece);
        let sent = self.connect()?.write_all(&message);
        if sent.is_err() {
            self.connection = None;
        }
        sent
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::log::Source;

    #[test]
    fn a_message_is_tag_time_and_record() {
        let config = FluentdConfig {
            endpoint: Endpoint::Tcp("127.0.0.1:24224".parse().unwrap()),
            tag: "t".to_owned(),
            fields: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
            sub_second: false,
        };
        let piece = Piece {
            source: Source::Stdout,
            time: UNIX_EPOCH + Duration::from_secs(1),
            text: b"hi".to_vec(),
            partial: false,
        };
        let expected = b"\x93\xa1t\xce\0\0\0\x01\xde\0\x03\xa1a\xa1b\xa6source\xa6stdout\xa3log\xa2hi";
        assert_eq!(Fluentd::new(config).message(&piece), expected);
    }
}
