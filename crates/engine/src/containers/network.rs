//! Containers on networks: who is where, connecting and disconnecting, and the endpoints of the container document.

use std::sync::Arc;

use bollard_stubs::models::EndpointSettings;
use serde_json::{Map, Value, json};

use super::{Container, Containers, Live, Record, Status};
use crate::db::Durability;
use crate::networks::{self, Driver};
use crate::{Class, Error, Filters, Result};

/// Checks what is asked of one endpoint.
pub(super) fn check_endpoint(network: &str, settings: &EndpointSettings) -> Result<()> {
    let Some(ipam) = &settings.ipam_config else { return Ok(()) };
    let given = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    if given(&ipam.ipv4_address) && network == "bridge" {
        return Err(Error::invalid(
            "invalid config for network bridge: invalid endpoint settings:\nuser specified IP address is supported on user defined networks only",
        ));
    }
    if given(&ipam.ipv6_address) {
        return Err(Error::not_implemented("IPv6 addresses are not supported yet"));
    }
    if let Some(text) = ipam.ipv4_address.as_deref().filter(|text| !text.is_empty())
        && text.parse::<std::net::Ipv4Addr>().is_err()
    {
        return Err(Error::invalid(format!(
            "invalid config for network {network}: invalid endpoint settings:\ninvalid IPv4 address: {text}"
        )));
    }
    Ok(())
}

impl Containers {
    /// Publishes `connect` or `disconnect` of a network.
    pub(super) fn network_event(&self, container: &Container, action: &str, network: &str, _endpoint: &str) {
        if let Ok(network) = self.networks.find(network) {
            self.networks.publish(
                action,
                &network.id,
                &network.name,
                network.driver.as_str(),
                &[("container", &container.id)],
            );
        }
    }

    /// The endpoints of the container document, by network name.
    pub(super) fn network_endpoints(&self, record: &Record, live: Option<&Live>) -> Map<String, Value> {
        let mut all = Map::new();
        for (name, settings) in &record.endpoints {
            let network = self.networks.find(name).ok();
            let sandbox = live.map(|live| &live.sandbox);
            let interface = sandbox.and_then(|sandbox| {
                let at = sandbox.networks.iter().position(|known| known == name)?;
                sandbox.attachment.as_ref()?.interfaces.get(at)
            });
            let bridge = network.as_ref().and_then(|network| network.bridge.as_ref());
            let user_defined = network.as_ref().is_some_and(|network| !network.is_predefined());
            let dns_names = if user_defined {
                let mut names = vec![record.name.clone()];
                names.extend(settings.aliases.iter().flatten().cloned());
                names.push(crate::ids::short(&record.id).to_owned());
                json!(names)
            } else {
                Value::Null
            };
            let endpoint =
                sandbox.and_then(|sandbox| sandbox.endpoints.get(name)).cloned().unwrap_or_default();
            let up = live.is_some();
            let address = interface.and_then(brigantine_network::Interface::ipv4);
            all.insert(
                name.clone(),
                json!({
                    "IPAMConfig": settings.ipam_config,
                    "Links": settings.links,
                    "Aliases": settings.aliases,
                    "MacAddress": interface.map_or_else(|| settings.mac_address.clone().unwrap_or_default(), |i| i.mac.to_string()),
                    "DriverOpts": settings.driver_opts,
                    "GwPriority": settings.gw_priority.unwrap_or_default(),
                    "NetworkID": if up || user_defined { network.as_ref().map_or("", |network| &network.id) } else { "" },
                    "EndpointID": endpoint,
                    "Gateway": interface.and(bridge).map_or_else(String::new, |bridge| bridge.gateway.to_string()),
                    "IPAddress": address.map_or_else(String::new, |address| address.to_string()),
                    "IPPrefixLen": interface.and(bridge).map_or(0, |bridge| bridge.subnet.prefix_len()),
                    "IPv6Gateway": "",
                    "GlobalIPv6Address": "",
                    "GlobalIPv6PrefixLen": 0,
                    "DNSNames": dns_names,
                }),
            );
        }
        all
    }

    /// Containers that are on a network: all that name it, running or not.
    fn on_network(&self, name: &str) -> Vec<Arc<Container>> {
        self.all()
            .into_iter()
            .filter(|container| container.with(|inner| inner.record.endpoints.contains_key(name)))
            .collect()
    }

    fn network_document(&self, record: &networks::Record, with_containers: bool) -> Value {
        let mut containers = Map::new();
        if with_containers {
            for container in self.on_network(&record.name) {
                let Some(live) = container.live() else { continue };
                let endpoints = container.with(|inner| self.network_endpoints(&inner.record, Some(&live)));
                let Some(endpoint) = endpoints.get(&record.name) else { continue };
                let address = endpoint["IPAddress"].as_str().unwrap_or_default();
                let address = if address.is_empty() {
                    String::new()
                } else {
                    format!("{address}/{}", endpoint["IPPrefixLen"])
                };
                containers.insert(
                    container.id.clone(),
                    json!({
                        "Name": container.name(),
                        "EndpointID": endpoint["EndpointID"],
                        "MacAddress": endpoint["MacAddress"],
                        "IPv4Address": address,
                        "IPv6Address": "",
                    }),
                );
            }
        }
        networks::document(record, Value::Object(containers))
    }

    /// One network with its running containers.
    pub fn inspect_network(&self, reference: &str) -> Result<Value> {
        let record = self.networks.find(reference)?;
        Ok(self.network_document(&record, true))
    }

    /// All networks that pass `filters`.
    pub fn list_networks(&self, filters: &Filters) -> Result<Vec<Value>> {
        let records = self.networks.select(filters, |record| !self.on_network(&record.name).is_empty())?;
        Ok(records.iter().map(|record| self.network_document(record, false)).collect())
    }

    /// Ids of the running containers of a network.
    fn network_users(&self, name: &str) -> Vec<String> {
        self.on_network(name)
            .iter()
            .filter(|container| container.live().is_some())
            .map(|c| c.id.clone())
            .collect()
    }

    pub async fn remove_network(&self, reference: &str) -> Result<()> {
        let record = self.networks.find(reference)?;
        self.networks.remove(&record, &self.network_users(&record.name)).await
    }

    /// Removes user-defined networks that no container is on.
    pub async fn prune_networks(&self, filters: &Filters) -> Result<Value> {
        filters.only(&["label", "label!", "until"])?;
        let until = super::prune::until(filters)?;
        let records = self.networks.select(&Filters::none(), |_| true)?;
        let mut deleted = Vec::new();
        for record in records {
            let label = |name: &str| record.labels.get(name).map(String::as_str);
            if record.is_predefined()
                || !self.on_network(&record.name).is_empty()
                || !filters.labels("label", label)
                || (filters.contains("label!") && filters.labels("label!", label))
                || until.is_some_and(|until| record.created > until)
            {
                continue;
            }
            match self.networks.remove(&record, &[]).await {
                Ok(()) => deleted.push(record.name),
                Err(error) if error.class() == Class::Forbidden => {}
                Err(error) => return Err(error),
            }
        }
        Ok(json!({ "NetworksDeleted": if deleted.is_empty() { Value::Null } else { json!(deleted) } }))
    }

    /// Puts a container on a network. A running one gets its interface at its next start.
    pub async fn connect_network(
        &self,
        network: &str,
        container: &str,
        settings: Option<EndpointSettings>,
    ) -> Result<()> {
        let network = self.networks.find(network)?;
        let container = self.find(container)?;
        let settings = settings.unwrap_or_default();
        check_endpoint(&network.name, &settings)?;
        let _lifecycle = container.lifecycle.lock().await;
        if network.driver == Driver::Host {
            return Err(Error::forbidden(
                "cannot connect container to host network - container must be created with it",
            ));
        }
        if container.live().is_some() {
            return Err(Error::not_implemented(format!(
                "container {} is running: connecting a running container to a network is not supported yet, stop it first",
                container.id
            )));
        }
        container.with(|inner| {
            let record = &mut inner.record;
            if matches!(record.state.status, Status::Removing | Status::Dead) {
                return Err(Error::conflict(format!("container {} is being removed", record.id)));
            }
            if record.network_mode().starts_with("container:") || record.network_mode() == "host" {
                return Err(Error::forbidden("container sharing network namespace with another container or host cannot be connected to any other network"));
            }
            if record.endpoints.contains_key(&network.name) {
                return Err(Error::forbidden(format!(
                    "endpoint with name {} already exists in network {}",
                    record.name, network.name
                )));
            }
            record.endpoints.remove("none");
            if record.endpoints.is_empty() {
                record.host_config.network_mode = Some(network.name.clone());
            }
            record.endpoints.insert(network.name.clone(), settings);
            Ok(())
        })?;
        self.persist(&container, Durability::Synced).await
    }

    /// Takes a container off a network.
    pub async fn disconnect_network(&self, network: &str, container: &str, force: bool) -> Result<()> {
        let network = self.networks.find(network)?;
        let container = match self.find(container) {
            Err(error) if force && error.class() == Class::NotFound => return Ok(()),
            other => other?,
        };
        let _lifecycle = container.lifecycle.lock().await;
        if container.live().is_some() {
            return Err(Error::not_implemented(format!(
                "container {} is running: disconnecting a running container from a network is not supported yet, stop it first",
                container.id
            )));
        }
        container.with(|inner| {
            let record = &mut inner.record;
            if record.network_mode() == "host" {
                return Err(Error::forbidden(
                    "container cannot be disconnected from host network or connected to host network",
                ));
            }
            if record.endpoints.remove(&network.name).is_none() {
                return Err(Error::internal(format!(
                    "container {} is not connected to network {}",
                    record.id, network.name
                )));
            }
            if record.network_mode() == network.name {
                let next = record.endpoints.keys().next().cloned();
                if next.is_none() {
                    record.endpoints.insert("none".to_owned(), EndpointSettings::default());
                }
                record.host_config.network_mode = Some(next.unwrap_or_else(|| "none".to_owned()));
            }
            Ok(())
        })?;
        self.persist(&container, Durability::Synced).await
    }
}
