//! The driver `syslog`.

use brigantine_shim::tls::Trust;
use brigantine_shim::{SinkKind, SyslogConfig, SyslogFormat};

use super::address::{Address, reach, with_port};
use super::{DEFAULT_TAG, Options, Record, boolean, tag_of};
use crate::{Error, Result};

pub(super) const OPTIONS: &[&str] = &[
    "syslog-address",
    "syslog-facility",
    "syslog-format",
    "syslog-tls-ca-cert",
    "syslog-tls-cert",
    "syslog-tls-key",
    "syslog-tls-skip-verify",
];

const LOCAL: &str = "/dev/log";
const PORT: u16 = 514;

const FACILITIES: &[&str] = &[
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp", "",
    "", "", "", "local0", "local1", "local2", "local3", "local4", "local5", "local6", "local7",
];

/// Whether an option's value is one of those it can have.
pub(super) fn is_valid(name: &str, value: &str) -> Result<bool> {
    Ok(match name {
        "syslog-address" => {
            address(value)?;
            true
        }
        "syslog-facility" => facility(value).is_some(),
        "syslog-format" => format(value).is_some(),
        "syslog-tls-skip-verify" => value.is_empty() || boolean(value).is_some(),
        _ => true,
    })
}

/// What the monitor is told. Blocks: the name is resolved, the server is tried.
pub(super) fn sink(record: &Record, options: &Options<'_>, host_name: &str) -> Result<SinkKind> {
    let path = |name: &str| options.get(name).map(Into::into);
    let identity = match (path("syslog-tls-cert"), path("syslog-tls-key")) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => {
            return Err(Error::invalid("syslog-tls-cert and syslog-tls-key belong together: give both"));
        }
    };
    let trust = Trust {
        authorities: path("syslog-tls-ca-cert").into_iter().collect(),
        identity,
        skip_verify: options.flag("syslog-tls-skip-verify"),
    };
    let endpoint = address(options.get("syslog-address").unwrap_or_default())?.resolve(trust)?;
    reach(&endpoint)?;
    Ok(SinkKind::Syslog(SyslogConfig {
        endpoint,
        facility: options.get("syslog-facility").and_then(facility).unwrap_or(3),
        format: options.get("syslog-format").and_then(format).unwrap_or(SyslogFormat::Local),
        tag: tag_of(record, options.get("tag").unwrap_or(DEFAULT_TAG))?,
        hostname: host_name.to_owned(),
    }))
}

fn address(text: &str) -> Result<Address> {
    let wrong = || {
        Error::invalid(format!(
            "invalid syslog-address {text:?}: expected udp://, tcp://, tcp+tls://, unix:// or unixgram://"
        ))
    };
    if text.is_empty() {
        return Ok(Address::Datagram(LOCAL.into()));
    }
    let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
    match scheme {
        _ if rest.is_empty() => Err(wrong()),
        "udp" => Ok(Address::Udp(with_port(rest, PORT))),
        "tcp" => Ok(Address::Tcp(with_port(rest, PORT))),
        "tcp+tls" => Ok(Address::Tls(with_port(rest, PORT))),
        "unix" => Ok(Address::Stream(rest.into())),
        "unixgram" => Ok(Address::Datagram(rest.into())),
        _ => Err(wrong()),
    }
}

fn facility(text: &str) -> Option<u8> {
    if let Ok(number) = text.parse::<u8>() {
        return (number < 24).then_some(number);
    }
    let at = FACILITIES.iter().position(|name| !name.is_empty() && *name == text)?;
    u8::try_from(at).ok()
}

fn format(text: &str) -> Option<SyslogFormat> {
    Some(match text {
        "" => SyslogFormat::Local,
        "rfc3164" => SyslogFormat::Rfc3164,
        "rfc5424" => SyslogFormat::Rfc5424,
        "rfc5424micro" => SyslogFormat::Rfc5424Micro,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_default_ports() {
        assert_eq!(address("udp://log").unwrap(), Address::Udp("log:514".to_owned()));
        assert_eq!(address("tcp://[::1]:99").unwrap(), Address::Tcp("[::1]:99".to_owned()));
        assert_eq!(address("tcp+tls://log").unwrap(), Address::Tls("log:514".to_owned()));
        assert_eq!(address("unix:///s").unwrap(), Address::Stream("/s".into()));
        assert_eq!(facility("local0"), Some(16));
        assert_eq!(facility("99"), None);
    }
}
