//! Syslog over UDP, TCP, TLS and unix sockets, in the forms of RFC 3164 and RFC 5424.

use std::io;

use jiff::Timestamp;

use super::connection::Connection;
use super::{Collector, Piece, WRITE, send_to};
use crate::config::{Endpoint, SyslogConfig, SyslogFormat};
use crate::log::Source;

/// Severities of RFC 5424, section 6.2.1.
const ERROR: u8 = 3;
const INFORMATIONAL: u8 = 6;

pub(super) struct Syslog {
    config: SyslogConfig,
    pid: u32,
    connection: Option<Connection>,
}

impl Syslog {
    pub(super) fn new(config: SyslogConfig) -> Self {
        Self { config, pid: std::process::id(), connection: None }
    }

    fn message(&self, piece: &Piece) -> Vec<u8> {
        let severity = if piece.source == Source::Stderr { ERROR } else { INFORMATIONAL };
        let priority = self.config.facility * 8 + severity;
        let time = Timestamp::try_from(piece.time).unwrap_or_default();
        let (tag, host, pid) = (&self.config.tag, &self.config.hostname, self.pid);
        let header = match self.config.format {
            SyslogFormat::Local => {
                format!("<{priority}>{} {tag}[{pid}]: ", time.strftime("%b %e %H:%M:%S"))
            }
            SyslogFormat::Rfc3164 => {
                format!("<{priority}>{} {host} {tag}[{pid}]: ", time.strftime("%b %e %H:%M:%S"))
            }
            SyslogFormat::Rfc5424 => {
                format!("<{priority}>1 {} {host} {tag} {pid} {tag} - ", time.strftime("%Y-%m-%dT%H:%M:%SZ"))
            }
            SyslogFormat::Rfc5424Micro => {
                format!(
                    "<{priority}>1 {} {host} {tag} {pid} {tag} - ",
                    time.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")
                )
            }
        };
        let mut message = header.into_bytes();
        message.extend_from_slice(&piece.text);
        message.push(b'\n');
        let is_new = matches!(self.config.format, SyslogFormat::Rfc5424 | SyslogFormat::Rfc5424Micro);
        if is_new && matches!(self.config.endpoint, Endpoint::Tls(_)) {
            // RFC 5425, section 4.3: messages inside TLS say how long they are.
            let length = message.len();
            message.splice(..0, format!("{length} ").into_bytes());
        }
        message
    }
}

impl Collector for Syslog {
    fn send(&mut self, piece: &Piece) -> io::Result<()> {
        let message = self.message(piece);
        send_to(&mut self.connection, &self.config.endpoint, WRITE, &message)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn the_forms_of_a_message() {
        let piece = Piece {
            source: Source::Stderr,
            time: UNIX_EPOCH + Duration::from_micros(1_767_323_045_000_006),
            text: b"hello".to_vec(),
            partial: false,
        };
        let form = |format| {
            let config = SyslogConfig {
                endpoint: Endpoint::Udp("127.0.0.1:514".parse().unwrap()),
                facility: 3,
                format,
                tag: "web".to_owned(),
                hostname: "host".to_owned(),
            };
            let mut syslog = Syslog::new(config);
            syslog.pid = 7;
            String::from_utf8(syslog.message(&piece)).unwrap()
        };
        assert_eq!(form(SyslogFormat::Local), "<27>Jan  2 03:04:05 web[7]: hello\n");
        assert_eq!(form(SyslogFormat::Rfc3164), "<27>Jan  2 03:04:05 host web[7]: hello\n");
        assert_eq!(form(SyslogFormat::Rfc5424), "<27>1 2026-01-02T03:04:05Z host web 7 web - hello\n");
        assert_eq!(
            form(SyslogFormat::Rfc5424Micro),
            "<27>1 2026-01-02T03:04:05.000006Z host web 7 web - hello\n"
        );
    }
}
