//! Legacy links (`--link`): names, and variables, of other containers, fixed when the container starts.
//!
//! They are kept as `CONTAINER:ALIAS`; documents show them as docker does, `/CONTAINER:/SELF/ALIAS`.

use std::collections::BTreeSet;

use bollard_stubs::models::HostConfig;

use super::{Containers, Record};
use crate::db::Durability;
use crate::{Error, Result};

/// What a starting container learns of one that it is linked to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Link {
    /// The names that lead to it.
    pub names: Vec<String>,
    pub address: String,
    /// `NAME=value`.
    pub variables: Vec<String>,
}

/// `CONTAINER[:ALIAS]`.
fn split(link: &str) -> Result<(&str, &str)> {
    let wrong = || Error::invalid(format!("bad format for links: {link}"));
    let (name, alias) = link.split_once(':').unwrap_or((link, link));
    let (name, alias) = (name.trim_start_matches('/'), alias.rsplit('/').next().unwrap_or_default());
    if name.is_empty() || alias.is_empty() || alias.contains(':') { Err(wrong()) } else { Ok((name, alias)) }
}

/// A container's links as docker's documents show them.
pub(super) fn shown(record: &Record) -> Option<Vec<String>> {
    let links = record.host_config.links.as_ref().filter(|links| !links.is_empty())?;
    let show = |link: &String| {
        let (name, alias) = link.split_once(':').unwrap_or((link, link));
        format!("/{name}:/{}/{alias}", record.name)
    };
    Some(links.iter().map(show).collect())
}

impl Containers {
    /// The links of a request, checked.
    pub(super) fn links(&self, host: &HostConfig) -> Result<Option<Vec<String>>> {
        let Some(links) = host.links.as_ref().filter(|links| !links.is_empty()) else { return Ok(None) };
        let mode = host.network_mode.as_deref().unwrap_or_default();
        if mode == "host" || mode.starts_with("container:") {
            return Err(Error::invalid("conflicting options: links and the network mode"));
        }
        let mut known = Vec::new();
        for link in links {
            let (name, alias) = split(link)?;
            let other = self.find(name).map_err(|error| {
                Error::invalid(format!("could not get container for {name}")).because(error)
            })?;
            known.push(format!("{}:{alias}", other.name()));
        }
        Ok(Some(known))
    }

    /// What the links of a container that starts lead to.
    pub(super) fn follow_links(&self, record: &Record) -> Result<Vec<Link>> {
        let mut found = Vec::new();
        for link in record.host_config.links.iter().flatten() {
            let (name, alias) = split(link)?;
            found.push(self.follow_link(record, name, alias, record.network_mode())?);
        }
        // Those of networks of one's own are names alone, and need not lead anywhere yet. Where the engine answers names
        // they are no fixed lines of a file: they follow their containers.
        let has_names = self.networks.plumbing().helper().is_some();
        for (network, settings) in record.endpoints.iter().filter(|_| !has_names) {
            for link in settings.links.iter().flatten() {
                let (name, alias) = split(link)?;
                if let Ok(mut link) = self.follow_link(record, name, alias, network) {
                    link.variables.clear();
                    found.push(link);
                }
            }
        }
        Ok(found)
    }

    fn follow_link(&self, record: &Record, name: &str, alias: &str, network: &str) -> Result<Link> {
        let other = self.find(name)?;
        let live = other.live().ok_or_else(|| {
            Error::conflict(format!(
                "Cannot link to a non running container: /{} AS /{}/{alias}",
                other.name(),
                record.name
            ))
        })?;
        let theirs = other.record();
        let sandbox = live.sandbox();
        let at = sandbox.networks.iter().position(|known| known == network);
        let interface =
            at.and_then(|at| sandbox.attachment.as_ref()?.interfaces.get(at)).ok_or_else(|| {
                Error::conflict(format!(
                    "Cannot link to /{}: it does not belong to the network {network}",
                    theirs.name
                ))
            })?;
        let address = interface.ipv4().map(|address| address.to_string()).unwrap_or_default();
        let names = names(alias, &theirs);
        let variables = variables(&record.name, alias, &address, &theirs);
        Ok(Link { names, address, variables })
    }

    /// A container that has started has another address: running ones that link to it on the default bridge learn it.
    pub(super) fn refresh_links(&self, target: &Record, address: std::net::IpAddr) {
        for container in self.all() {
            let links = container.with(|inner| {
                inner.live.as_ref().and_then(|_| inner.record.host_config.links.clone()).unwrap_or_default()
            });
            for link in &links {
                if let Ok((name, alias)) = split(link)
                    && self.find(name).is_ok_and(|other| other.id == target.id)
                {
                    let path = self.dir(&container.id).join("hosts");
                    if let Err(error) = rewrite(&path, &names(alias, target).join(" "), address) {
                        tracing::warn!(container = container.id, %error, "update a link");
                    }
                }
            }
        }
    }

    /// Takes a link away; what a running container has learned by it, it keeps.
    pub async fn remove_link(&self, reference: &str, alias: &str) -> Result<()> {
        let container = self.find(reference)?;
        let _lifecycle = container.lifecycle.lock().await;
        let removed = container.with(|inner| {
            let links = inner.record.host_config.links.get_or_insert_default();
            let before = links.len();
            links.retain(|link| link.rsplit(':').next() != Some(alias));
            links.len() < before
        });
        if !removed {
            return Err(Error::not_found(format!(
                "Cannot get parent /{reference} for name /{reference}/{alias}"
            )));
        }
        self.persist(&container, Durability::Synced).await
    }
}

fn names(alias: &str, target: &Record) -> Vec<String> {
    let mut names = vec![alias.to_owned()];
    for name in [crate::ids::short(&target.id), &target.name] {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}

/// Gives the line of these names another address. In place: the file is mounted.
fn rewrite(hosts: &std::path::Path, names: &str, address: std::net::IpAddr) -> std::io::Result<()> {
    let text = std::fs::read_to_string(hosts)?;
    let line = |line: &str| match line.split_once('\t') {
        Some((_, rest)) if rest.trim_end() == names => format!("{address}\t{names}\n"),
        _ => line.to_owned(),
    };
    let changed: String = text.split_inclusive('\n').map(line).collect();
    if changed == text { Ok(()) } else { std::fs::write(hosts, changed) }
}

/// docker's variables of a link.
fn variables(own: &str, alias: &str, address: &str, other: &Record) -> Vec<String> {
    let upper: String = alias.to_uppercase().replace('-', "_");
    let mut all = vec![format!("{upper}_NAME=/{own}/{alias}")];
    let ports: BTreeSet<(u16, &str)> = other
        .config
        .exposed_ports
        .iter()
        .flatten()
        .filter_map(|port| {
            let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
            Some((number.parse().ok()?, protocol))
        })
        .collect();
    for (at, (number, protocol)) in ports.into_iter().enumerate() {
        let url = format!("{protocol}://{address}:{number}");
        if at == 0 {
            all.push(format!("{upper}_PORT={url}"));
        }
        let name = format!("{upper}_PORT_{number}_{}", protocol.to_uppercase());
        all.push(format!("{name}={url}"));
        all.push(format!("{name}_ADDR={address}"));
        all.push(format!("{name}_PORT={number}"));
        all.push(format!("{name}_PROTO={protocol}"));
    }
    for variable in other.config.env.iter().flatten() {
        if let Some((name, value)) = variable.split_once('=')
            && !matches!(name, "HOME" | "PATH")
        {
            all.push(format!("{upper}_ENV_{name}={value}"));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_have_an_alias() {
        assert_eq!(split("db").unwrap(), ("db", "db"));
        assert_eq!(split("/db:/web/data").unwrap(), ("db", "data"));
        split(":x").unwrap_err();
        split("db:").unwrap_err();
    }
}
