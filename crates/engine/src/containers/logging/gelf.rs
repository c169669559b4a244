//! The driver `gelf`: Graylog's extended log format by UDP or TCP.

use std::collections::HashMap;
use std::time::Duration;

use brigantine_shim::tls::Trust;
use brigantine_shim::{GelfCompression, GelfConfig, Retry, SinkKind};

use super::address::{Address, reach, with_port};
use super::{DEFAULT_TAG, Options, Record, attributes, tag_of};
use crate::{Error, Result};

pub(super) const OPTIONS: &[&str] = &[
    "gelf-address",
    "gelf-compression-type",
    "gelf-compression-level",
    "gelf-tcp-max-reconnect",
    "gelf-tcp-reconnect-delay",
];

/// Graylog's port.
const PORT: u16 = 12201;

/// Checks what belongs together; each option's own value has been looked at.
pub(super) fn check(options: Option<&HashMap<String, String>>) -> Result<()> {
    let get = |name: &str| options.and_then(|options| options.get(name)).map(String::as_str);
    let address = address(get("gelf-address").unwrap_or_default())?;
    let tcp = matches!(address, Address::Tcp(_));
    for (name, of_tcp) in OPTIONS[1..].iter().map(|name| (*name, name.starts_with("gelf-tcp"))) {
        if get(name).is_some() && of_tcp != tcp {
            return Err(Error::invalid(if tcp {
                format!("log option {name}: messages are compressed over UDP only")
            } else {
                format!("log option {name}: there are no connections over UDP")
            }));
        }
    }
    Ok(())
}

/// Whether an option's value is one of those it can have.
pub(super) fn is_valid(name: &str, value: &str) -> bool {
    match name {
        "gelf-address" => address(value).is_ok(),
        "gelf-compression-type" => compression(value).is_some(),
        "gelf-compression-level" => value.parse::<i32>().is_ok_and(|level| (-1..=9).contains(&level)),
        _ => value.parse::<u32>().is_ok(),
    }
}

/// Over TCP.
pub(super) fn retry(options: &Options<'_>) -> Retry {
    let number = |name: &str| options.get(name).and_then(|text| text.parse::<u32>().ok());
    Retry {
        wait: number("gelf-tcp-reconnect-delay")
            .filter(|seconds| *seconds > 0)
            .map(|seconds| Duration::from_secs(seconds.into())),
        attempts: number("gelf-tcp-max-reconnect"),
    }
}

/// What the monitor is told. Blocks: the name is resolved, a server by TCP is tried.
pub(super) fn sink(record: &Record, options: &Options<'_>, host_name: &str) -> Result<SinkKind> {
    let endpoint = address(options.get("gelf-address").unwrap_or_default())?.resolve(Trust::default())?;
    reach(&endpoint)?;
    let mut fields = attributes(record, options)?;
    let command =
        [&record.path].into_iter().chain(&record.args).map(String::as_str).collect::<Vec<_>>().join(" ");
    for (name, value) in [
        ("container_id", record.id.clone()),
        ("container_name", record.name.clone()),
        ("image_id", record.image_id.clone()),
        ("image_name", record.image().to_owned()),
        ("command", command),
        ("tag", tag_of(record, options.get("tag").unwrap_or(DEFAULT_TAG))?),
        ("created", record.created.to_string()),
    ] {
        fields.insert(name.to_owned(), value);
    }
    Ok(SinkKind::Gelf(GelfConfig {
        endpoint,
        host: host_name.to_owned(),
        fields,
        compression: options
            .get("gelf-compression-type")
            .and_then(compression)
            .unwrap_or(GelfCompression::Gzip),
        level: options.get("gelf-compression-level").and_then(|text| text.parse().ok()).unwrap_or(1),
    }))
}

fn compression(text: &str) -> Option<GelfCompression> {
    Some(match text {
        "gzip" => GelfCompression::Gzip,
        "zlib" => GelfCompression::Zlib,
        "none" => GelfCompression::None,
        _ => return None,
    })
}

fn address(text: &str) -> Result<Address> {
    match text.split_once("://") {
        None if text.is_empty() => Err(Error::invalid("gelf-address is a required parameter")),
        Some(("udp", host)) if !host.is_empty() => Ok(Address::Udp(with_port(host, PORT))),
        Some(("tcp", host)) if !host.is_empty() => Ok(Address::Tcp(with_port(host, PORT))),
        _ => Err(Error::invalid(format!(
            "invalid gelf-address {text:?}: expected udp://host:port or tcp://host:port"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check;

    #[test]
    fn options_fit_the_address() {
        let with = |pairs: &[(&str, &str)]| {
            let options = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            check("gelf", Some(&options)).map_err(|error| error.to_string())
        };
        assert!(with(&[("gelf-address", "udp://log"), ("gelf-compression-type", "zlib")]).is_ok());
        assert!(with(&[("gelf-address", "tcp://log:1"), ("gelf-tcp-max-reconnect", "3")]).is_ok());
        assert_eq!(with(&[]).unwrap_err(), "gelf-address is a required parameter");
        assert!(
            with(&[("gelf-address", "tcp://l"), ("gelf-compression-type", "gzip")])
                .unwrap_err()
                .contains("over UDP only")
        );
        assert!(with(&[("gelf-address", "udp://l"), ("gelf-compression-level", "11")]).is_err());
        assert!(with(&[("gelf-address", "http://l")]).is_err());
    }
}
