//! `--network`, in its short and its long form, and the flags that belong to the first network.

use std::collections::HashMap;

use bollard_stubs::models::{EndpointIpamConfig, EndpointSettings, NetworkingConfig};

use super::comma_separated;
use crate::args::Matches;
use crate::fault::{Fault, Outcome};

#[derive(Debug, Default, Clone)]
struct Attachment {
    target: String,
    settings: EndpointSettings,
}

/// `bridge`, or `name=net1,alias=a,ip=172.20.0.9,driver-opt=k=v,gw-priority=1`.
fn attachment(spec: &str) -> Result<Attachment, String> {
    if !spec.contains('=') {
        return Ok(Attachment { target: spec.to_owned(), ..Attachment::default() });
    }
    let mut found = Attachment::default();
    for field in comma_separated(spec)? {
        let (key, value) = field.split_once('=').ok_or_else(|| format!("invalid field {field}"))?;
        let (key, value) = (key.trim().to_ascii_lowercase(), value.trim().to_owned());
        match key.as_str() {
            "name" => found.target = value,
            "alias" => found.settings.aliases.get_or_insert_default().push(value),
            "ip" => ipam(&mut found.settings).ipv4_address = Some(value),
            "ip6" => ipam(&mut found.settings).ipv6_address = Some(value),
            "link-local-ip" => ipam(&mut found.settings).link_local_ips.get_or_insert_default().push(value),
            "mac-address" => found.settings.mac_address = Some(mac(&value)?),
            "driver-opt" => {
                let (name, text) = value
                    .split_once('=')
                    .ok_or_else(|| "invalid key value pair format in driver options".to_owned())?;
                found.settings.driver_opts.get_or_insert_default().insert(name.to_owned(), text.to_owned());
            }
            "gw-priority" => {
                let number = value
                    .parse()
                    .ok()
                    .ok_or_else(|| format!("invalid gw-priority ({value}): invalid syntax"))?;
                found.settings.gw_priority = Some(number);
            }
            _ => return Err(format!("invalid field key {key}")),
        }
    }
    if found.target.is_empty() {
        return Err("network name/id is not specified".to_owned());
    }
    Ok(found)
}

fn ipam(settings: &mut EndpointSettings) -> &mut EndpointIpamConfig {
    settings.ipam_config.get_or_insert_default()
}

pub fn mac(text: &str) -> Result<String, String> {
    let octets: Vec<&str> = text.split([':', '-']).collect();
    let right =
        octets.len() == 6 && octets.iter().all(|o| o.len() == 2 && o.bytes().all(|b| b.is_ascii_hexdigit()));
    if right { Ok(text.to_owned()) } else { Err(format!("{text} is not a valid mac address")) }
}

/// The network mode, and the settings of each network when there are any to send.
pub fn from_flags(matches: &Matches) -> Outcome<(String, Option<NetworkingConfig>)> {
    let mut all = Vec::new();
    for spec in matches.list("network") {
        all.push(attachment(spec).map_err(|why| matches.invalid("network", spec, &why))?);
    }
    if all.is_empty() {
        all.push(Attachment { target: "default".to_owned(), ..Attachment::default() });
    }
    let first = &mut all[0].settings;
    if let Some(aliases) = matches.some_list("network-alias") {
        first.aliases.get_or_insert_default().extend(aliases);
    }
    if let Some(address) = matches.optional("ip") {
        ipam(first).ipv4_address = Some(address.to_owned());
    }
    if let Some(address) = matches.optional("ip6") {
        ipam(first).ipv6_address = Some(address.to_owned());
    }
    if let Some(addresses) = matches.some_list("link-local-ip") {
        ipam(first).link_local_ips = Some(addresses);
    }
    if let Some(address) = matches.optional("mac-address") {
        first.mac_address = Some(mac(address).map_err(Fault::Said)?);
    }
    let user_defined = !["default", "bridge", "host", "none"].contains(&all[0].target.as_str())
        && !all[0].target.starts_with("container:");
    if user_defined {
        let links = matches.owned_list("link");
        if !links.is_empty() {
            all[0].settings.links = Some(links);
        }
    }
    let mode = all[0].target.clone();
    if all.len() > 1 && !user_defined && mode != "bridge" && mode != "default" {
        return Err(Fault::said(
            "conflicting options: cannot attach both user-defined and non-user-defined network-modes",
        ));
    }
    let mut endpoints = HashMap::new();
    for attachment in all {
        if attachment.target.is_empty() || endpoints.contains_key(&attachment.target) {
            return Err(Fault::said(format!("network {:?} is specified multiple times", attachment.target)));
        }
        endpoints.insert(attachment.target, attachment.settings);
    }
    let plain =
        endpoints.len() == 1 && endpoints.values().all(|settings| *settings == EndpointSettings::default());
    Ok((mode, (!plain).then_some(NetworkingConfig { endpoints_config: Some(endpoints) })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_form_parses() {
        let found = attachment("name=n,alias=a,alias=b,ip=10.0.0.2,driver-opt=k=v").unwrap();
        assert_eq!(found.target, "n");
        assert_eq!(found.settings.aliases.unwrap(), ["a", "b"]);
        assert_eq!(attachment("name=x,foo=y").unwrap_err(), "invalid field key foo");
        assert_eq!(mac("foo").unwrap_err(), "foo is not a valid mac address");
    }
}
