//! The driver `fluentd`: its forward protocol.

use std::time::Duration;

use brigantine_shim::tls::Trust;
use brigantine_shim::{FluentdConfig, Retry, SinkKind};

use super::address::{Address, reach, with_port};
use super::{DEFAULT_TAG, Options, Record, attributes, boolean, size, tag_of};
use crate::clock::go_duration;
use crate::{Error, Result};

pub(super) const OPTIONS: &[&str] = &[
    "fluentd-address",
    "fluentd-async",
    "fluentd-async-connect",
    "fluentd-async-reconnect-interval",
    "fluentd-buffer-limit",
    "fluentd-max-retries",
    "fluentd-request-ack",
    "fluentd-retry-wait",
    "fluentd-sub-second-precision",
    "fluentd-write-timeout",
];

const PORT: u16 = 24224;
const LOCAL: &str = "127.0.0.1:24224";
/// How often a connection may be made anew; 0 is never.
const RECONNECT: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(10);

/// Whether an option's value is one of those it can have.
pub(super) fn is_valid(name: &str, value: &str) -> Result<bool> {
    Ok(match name {
        "fluentd-address" => {
            address(value)?;
            true
        }
        "fluentd-async"
        | "fluentd-async-connect"
        | "fluentd-request-ack"
        | "fluentd-sub-second-precision" => boolean(value).is_some(),
        "fluentd-async-reconnect-interval" => {
            go_duration(value).is_some_and(|interval| interval.is_zero() || RECONNECT.contains(&interval))
        }
        "fluentd-buffer-limit" => size(value).is_some(),
        "fluentd-max-retries" => value.parse::<u32>().is_ok(),
        "fluentd-retry-wait" | "fluentd-write-timeout" => go_duration(value).is_some(),
        _ => true,
    })
}

/// Whether the container starts, and runs, without its collector.
pub(super) fn is_asynchronous(options: &Options<'_>) -> bool {
    options.flag("fluentd-async") || options.flag("fluentd-async-connect")
}

pub(super) fn retry(options: &Options<'_>) -> Retry {
    Retry {
        wait: time(options, "fluentd-retry-wait"),
        attempts: options.get("fluentd-max-retries").and_then(|text| text.parse().ok()),
    }
}

/// What the monitor is told. Blocks: the name is resolved, the server is tried.
pub(super) fn sink(record: &Record, options: &Options<'_>) -> Result<SinkKind> {
    let endpoint = address(options.get("fluentd-address").unwrap_or_default())?.resolve(Trust::default())?;
    if !is_asynchronous(options) {
        reach(&endpoint)?;
    }
    let mut fields = attributes(record, options)?;
    fields.insert("container_id".to_owned(), record.id.clone());
    fields.insert("container_name".to_owned(), format!("/{}", record.name));
    Ok(SinkKind::Fluentd(FluentdConfig {
        endpoint,
        tag: tag_of(record, options.get("tag").unwrap_or(DEFAULT_TAG))?,
        fields,
        sub_second: options.flag("fluentd-sub-second-precision"),
        request_ack: options.flag("fluentd-request-ack"),
        write_timeout: time(options, "fluentd-write-timeout"),
        reconnect: time(options, "fluentd-async-reconnect-interval"),
    }))
}

/// A length of time that is one.
fn time(options: &Options<'_>, name: &str) -> Option<Duration> {
    options.get(name).and_then(go_duration).filter(|time| !time.is_zero())
}

fn address(text: &str) -> Result<Address> {
    if text.is_empty() {
        return Ok(Address::Tcp(LOCAL.to_owned()));
    }
    match text.split_once("://") {
        None => Ok(Address::Tcp(with_port(text, PORT))),
        Some(("tcp", rest)) if !rest.is_empty() => Ok(Address::Tcp(with_port(rest, PORT))),
        Some(("tls", rest)) if !rest.is_empty() => Ok(Address::Tls(with_port(rest, PORT))),
        Some(("unix", rest)) if !rest.is_empty() => Ok(Address::Stream(rest.into())),
        Some(_) => Err(Error::invalid(format!(
            "invalid fluentd-address {text:?}: expected host:port, tcp://, tls:// or unix://"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_times_are_checked() {
        assert_eq!(address("").unwrap(), Address::Tcp("127.0.0.1:24224".to_owned()));
        assert_eq!(address("tls://log").unwrap(), Address::Tls("log:24224".to_owned()));
        assert_eq!(address("unix:///s").unwrap(), Address::Stream("/s".into()));
        address("udp://log").unwrap_err();
        for (name, value, fine) in [
            ("fluentd-async-reconnect-interval", "500ms", true),
            ("fluentd-async-reconnect-interval", "1h", false),
            ("fluentd-retry-wait", "2", false),
            ("fluentd-max-retries", "-1", false),
        ] {
            assert_eq!(is_valid(name, value).unwrap(), fine, "{name}={value}");
        }
    }
}
