//! `--publish` and `--expose`.

use std::net::IpAddr;

use bollard_stubs::models::{PortBinding, PortMap};

/// A range of ports, ends included.
type Range = (u16, u16);

fn range(text: &str) -> Option<Range> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let (low, high) = (low.parse().ok()?, high.parse().ok()?);
    (low <= high).then_some((low, high))
}

/// Adds what one `-p` publishes: `[ip:][host]:container[/proto]`, each side a port or a range; or docker's long form.
pub fn publish(spec: &str, into: &mut PortMap) -> Result<(), String> {
    let spec = long_form(spec)?;
    let (rest, proto) = spec.rsplit_once('/').unwrap_or((&spec, "tcp"));
    let proto = proto.to_ascii_lowercase();
    if !["tcp", "udp", "sctp"].contains(&proto.as_str()) {
        return Err(format!("invalid proto: {proto}"));
    }
    let (host, container) = match rest.rsplit_once(':') {
        Some((host, container)) => (Some(host), container),
        None => (None, rest),
    };
    let (address, host) = match host.and_then(|h| h.rsplit_once(':')) {
        Some((address, port)) => (address, port),
        None => ("", host.unwrap_or("")),
    };
    let address = address.trim_start_matches('[').trim_end_matches(']');
    if container.is_empty() {
        return Err(format!("no port specified: {spec}<empty>"));
    }
    if !address.is_empty() && address.parse::<IpAddr>().is_err() {
        return Err(format!("invalid IP address: {address}"));
    }
    let inside = range(container).ok_or_else(|| format!("invalid containerPort: {container}"))?;
    let outside = match host {
        "" => None,
        host => Some(range(host).ok_or_else(|| format!("invalid hostPort: {host}"))?),
    };
    let count = inside.1 - inside.0;
    if let Some(outside) = outside {
        // A range outside for one port inside means: any free one of these.
        if outside.1 - outside.0 != count && count != 0 {
            return Err(format!(
                "invalid ranges specified for container and host Ports: {container} and {host}"
            ));
        }
    }
    for offset in 0..=count {
        let host_port = match outside {
            None => String::new(),
            Some((low, high)) if count == 0 && low != high => format!("{low}-{high}"),
            Some((low, _)) => (low + offset).to_string(),
        };
        into.entry(format!("{}/{proto}", inside.0 + offset))
            .or_insert_with(|| Some(Vec::new()))
            .get_or_insert_default()
            .push(PortBinding { host_ip: Some(address.to_owned()), host_port: Some(host_port) });
    }
    Ok(())
}

/// `published=8080,target=80,protocol=tcp` as the short form.
fn long_form(spec: &str) -> Result<String, String> {
    if !spec.contains('=') {
        return Ok(spec.to_owned());
    }
    let (mut target, mut published, mut protocol) = ("", "", "tcp");
    for field in spec.split(',') {
        match field.split_once('=') {
            Some(("target", value)) => target = value,
            Some(("published", value)) => published = value,
            Some(("protocol", value)) => protocol = value,
            Some(("mode", "host" | "ingress")) => {}
            Some((key, _)) => return Err(format!("invalid field key {key}")),
            None => return Err(format!("invalid field {field}")),
        }
    }
    if target.is_empty() {
        return Err(format!("missing mandatory field '--target' in {spec}"));
    }
    Ok(if published.is_empty() {
        format!("{target}/{protocol}")
    } else {
        format!("{published}:{target}/{protocol}")
    })
}

/// The ports one `--expose` names.
pub fn expose(spec: &str) -> Result<Vec<String>, String> {
    if spec.contains(':') {
        return Err(format!("invalid port format for --expose: {spec}"));
    }
    let (ports, proto) = spec.split_once('/').unwrap_or((spec, "tcp"));
    let number = |text: &str| {
        text.parse::<u16>().map_err(|error| {
            let why = match error.kind() {
                std::num::IntErrorKind::PosOverflow => "value out of range",
                _ => "invalid syntax",
            };
            format!(
                "invalid range format for --expose: {spec}, error: strconv.ParseUint: parsing \"{text}\": {why}"
            )
        })
    };
    let (low, high) = ports.split_once('-').unwrap_or((ports, ports));
    let (low, high) = (number(low)?, number(high)?);
    if high < low {
        return Err(format!(
            "invalid range format for --expose: {spec}, error: invalid range specified for the Port: {ports}"
        ));
    }
    Ok((low..=high).map(|port| format!("{port}/{proto}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(spec: &str) -> Result<Vec<String>, String> {
        let mut map = PortMap::new();
        publish(spec, &mut map)?;
        let mut all: Vec<String> = map
            .into_iter()
            .flat_map(|(port, bindings)| {
                bindings
                    .unwrap()
                    .into_iter()
                    .map(move |b| format!("{}:{}->{port}", b.host_ip.unwrap(), b.host_port.unwrap()))
            })
            .collect();
        all.sort();
        Ok(all)
    }

    #[test]
    fn specs_expand() {
        assert_eq!(published("80").unwrap(), [":->80/tcp"]);
        assert_eq!(published("8080:80/udp").unwrap(), [":8080->80/udp"]);
        assert_eq!(
            published("127.0.0.1:8080-8081:80-81").unwrap(),
            ["127.0.0.1:8080->80/tcp", "127.0.0.1:8081->81/tcp"]
        );
        assert_eq!(published("8000-9000:80").unwrap(), [":8000-9000->80/tcp"]);
        assert_eq!(published("127.0.0.1::80").unwrap(), ["127.0.0.1:->80/tcp"]);
        assert_eq!(published("[::1]:80:80").unwrap(), ["::1:80->80/tcp"]);
        assert_eq!(published("published=8080,target=80").unwrap(), [":8080->80/tcp"]);
        assert_eq!(expose("80-81/udp").unwrap(), ["80/udp", "81/udp"]);
    }

    #[test]
    fn refusals_are_dockers() {
        for (spec, text) in [
            ("abc", "invalid containerPort: abc"),
            ("abc:80", "invalid hostPort: abc"),
            ("80/foo", "invalid proto: foo"),
            ("1.2.3:80:80", "invalid IP address: 1.2.3"),
            ("80-82:90-91", "invalid ranges specified for container and host Ports: 90-91 and 80-82"),
            ("70000", "invalid containerPort: 70000"),
        ] {
            assert_eq!(published(spec).unwrap_err(), text);
        }
        assert!(expose("foo").unwrap_err().ends_with("parsing \"foo\": invalid syntax"));
    }
}
