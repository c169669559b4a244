//! The three files about names that a container gets: `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf`.

use std::net::IpAddr;

use brigantine_network::Attachment;
use brigantine_network::names::{
    DnsChoice, hostname_file, hosts_file, own_entry, resolv_conf, resolv_conf_of_names, resolv_conf_on_host,
};

use super::names;
use super::start::Plan;
use super::wires::Wires;
use crate::error::Context;
use crate::spec::Namespace;
use crate::{Error, Result};

/// `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf` of a container that has its own.
pub(super) fn write(plan: &Plan, wires: &Wires, host_name: &str) -> Result<()> {
    if plan.names_dir != plan.dir {
        return Ok(());
    }
    let record = &plan.record;
    let host = &record.host_config;
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let gateway =
        plan.config.host_gateway.or_else(|| plan.networks.find("bridge").ok()?.layout()?.gateways().next());
    let mut extra = host
        .extra_hosts
        .iter()
        .flatten()
        .filter_map(|line| extra_host(line, gateway).transpose())
        .collect::<Result<Vec<_>>>()?;
    extra.extend(plan.links.iter().map(|link| (link.names.join(" "), link.address.clone())));
    let hostname = record.config.hostname.as_deref().filter(|name| !name.is_empty()).unwrap_or(host_name);
    let choice = names::choice(record, &plan.config);
    let resolv = read("/etc/resolv.conf");
    let (hosts, resolv) = if plan.network == Namespace::Host {
        let mut hosts = read("/etc/hosts");
        for (name, address) in &extra {
            hosts.extend([address.as_str(), "\t", name.as_str(), "\n"]);
        }
        (hosts, resolv_conf_on_host(&resolv, &choice))
    } else {
        let domain = record.config.domainname.as_deref().unwrap_or_default();
        let resolv = if wires.has_names {
            resolv_conf_of_names(&resolv, &choice)
        } else {
            let has_ipv6 = wires.addresses().iter().any(IpAddr::is_ipv6);
            resolv_conf_of_host(&resolv, &choice, has_ipv6)
        };
        (hosts_file(&extra, &wires.addresses(), hostname, domain), resolv)
    };
    for (name, text) in [("hosts", hosts), ("hostname", hostname_file(hostname)), ("resolv.conf", resolv)] {
        let path = plan.dir.join(name);
        // In place: a running exec or a former mount may hold the file.
        std::fs::write(&path, text).doing(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Enters the addresses that CNI plugins have chosen, which nobody knew when the files were written.
pub(super) fn add_own(plan: &Plan, attachment: &Attachment) -> Result<()> {
    let theirs = attachment.interfaces.iter().filter(|interface| interface.by_plugins);
    let addresses: Vec<IpAddr> =
        theirs.flat_map(|one| one.addresses.iter().map(ipnet::IpNet::addr)).collect();
    if addresses.is_empty() || plan.names_dir != plan.dir {
        return Ok(());
    }
    let config = &plan.record.config;
    let host_name = host_name();
    let hostname = config.hostname.as_deref().filter(|name| !name.is_empty()).unwrap_or(&host_name);
    let domain = config.domainname.as_deref().unwrap_or_default();
    let path = plan.dir.join("hosts");
    let lines: String = addresses.iter().map(|address| own_entry(*address, hostname, domain)).collect();
    let append = || {
        use std::io::Write as _;
        std::fs::OpenOptions::new().append(true).open(&path)?.write_all(lines.as_bytes())
    };
    append().doing(|| format!("write {}", path.display()))
}

/// `name:address` or `name=address`; `host-gateway` stands for `gateway`.
pub(crate) fn extra_host(line: &str, gateway: Option<IpAddr>) -> Result<Option<(String, String)>> {
    let wrong = || Error::invalid(format!("bad format for add-host: \"{line}\""));
    let (name, address) = line.split_once('=').or_else(|| line.split_once(':')).ok_or_else(wrong)?;
    if name.is_empty() || name.contains(|c: char| c.is_whitespace()) {
        return Err(wrong());
    }
    if address == "host-gateway" {
        return Ok(gateway.map(|gateway| (name.to_owned(), gateway.to_string())));
    }
    let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    bare.parse::<IpAddr>()
        .map_err(|_bad| Error::invalid(format!("invalid IP address in add-host: \"{address}\"")))?;
    Ok(Some((name.to_owned(), bare.to_owned())))
}

/// `/etc/resolv.conf` of a container that asks the host's servers itself.
pub(super) fn resolv_conf_of_host(host: &str, choice: &DnsChoice, ipv6: bool) -> String {
    let upstream = std::fs::read_to_string(brigantine_network::names::RESOLVED_UPSTREAM).ok();
    resolv_conf(host, upstream.as_deref(), choice, ipv6)
}

/// The host's own name.
pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_hosts_in_both_spellings() {
        let gateway = Some("172.30.0.1".parse().unwrap());
        assert_eq!(extra_host("db:10.0.0.1", gateway).unwrap().unwrap(), ("db".into(), "10.0.0.1".into()));
        assert_eq!(extra_host("db=[::1]", gateway).unwrap().unwrap(), ("db".into(), "::1".into()));
        assert_eq!(extra_host("h:host-gateway", gateway).unwrap().unwrap().1, "172.30.0.1");
        assert_eq!(extra_host("h:host-gateway", None).unwrap(), None);
        assert!(extra_host("nothing", gateway).is_err());
        assert!(extra_host("db:nowhere", gateway).is_err());
    }
}
