//! Containers on networks: who is where, connecting and disconnecting, and the endpoints of the container document.

use std::sync::Arc;

use bollard_stubs::models::EndpointSettings;
use serde_json::{Map, Value, json};

use super::{Container, Containers, Live, Record, Status, endpoint};
use crate::db::Durability;
use crate::networks::{self, Driver};
use crate::{Class, Error, Filters, Result};

impl Containers {
    /// Publishes `connect` or `disconnect` of a network.
    pub(super) fn network_event(&self, container: &Container, action: &str, network: &str, _endpoint: &str) {
        if let Ok(network) = self.networks.find(network) {
            self.networks.publish(action, &network, &[("container", &container.id)]);
        }
    }

    /// The endpoints of the container document, by network name.
    pub(super) fn network_endpoints(&self, record: &Record, live: Option<&Live>) -> Map<String, Value> {
        let mut all = Map::new();
        for (name, settings) in &record.endpoints {
            let network = self.networks.find(name).ok();
            let sandbox = live.map(Live::sandbox);
            let interface = sandbox.as_ref().and_then(|sandbox| {
                let at = sandbox.networks.iter().position(|known| known == name)?;
                sandbox.attachment.as_ref()?.interfaces.get(at)
            });
            let user_defined = network.as_ref().is_some_and(|network| !network.is_predefined());
            let dns_names = if user_defined {
                let names = super::names::of_endpoint(record, name);
                json!(names)
            } else {
                Value::Null
            };
            let endpoint =
                sandbox.as_ref().and_then(|sandbox| sandbox.endpoints.get(name)).cloned().unwrap_or_default();
            let up = live.is_some();
            let mut document = json!({
                    "IPAMConfig": settings.ipam_config,
                    "Links": settings.links,
                    "Aliases": settings.aliases,
                    "MacAddress": interface.map_or_else(|| settings.mac_address.clone().unwrap_or_default(), |i| i.mac.to_string()),
                    "DriverOpts": settings.driver_opts,
                    "GwPriority": settings.gw_priority.unwrap_or_default(),
                    "NetworkID": if up || user_defined { network.as_ref().map_or("", |network| &network.id) } else { "" },
                    "EndpointID": endpoint,
                    "Gateway": "",
                    "IPAddress": "",
                    "IPPrefixLen": 0,
                    "IPv6Gateway": "",
                    "GlobalIPv6Address": "",
                    "GlobalIPv6PrefixLen": 0,
                    "DNSNames": dns_names,
            });
            if let (Some(network), Some(interface)) = (&network, interface) {
                for (name, value) in endpoint::addresses(network, interface) {
                    document[name] = value;
                }
            }
            all.insert(name.clone(), document);
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
                let net = |address: &str, length: &str| match endpoint[address].as_str() {
                    None | Some("") => String::new(),
                    Some(address) => format!("{address}/{}", endpoint[length]),
                };
                containers.insert(
                    container.id.clone(),
                    json!({
                        "Name": container.name(),
                        "EndpointID": endpoint["EndpointID"],
                        "MacAddress": endpoint["MacAddress"],
                        "IPv4Address": net("IPAddress", "IPPrefixLen"),
                        "IPv6Address": net("GlobalIPv6Address", "GlobalIPv6PrefixLen"),
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

    /// Puts a container on a network, running or not.
    pub async fn connect_network(
        self: &Arc<Self>,
        network: &str,
        container: &str,
        settings: Option<EndpointSettings>,
    ) -> Result<()> {
        let network = self.networks.find(network)?;
        let container = self.find(container)?;
        let settings = settings.unwrap_or_default();
        endpoint::check(&network.name, &settings)?;
        endpoint::refuse_template(&network)?;
        let _lifecycle = container.lifecycle.lock().await;
        if network.driver == Driver::Host {
            return Err(Error::forbidden(
                "cannot connect container to host network - container must be created with it",
            ));
        }
        let live = container.live();
        container.with(|inner| {
            let record = &inner.record;
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
            if live.is_some() && network.driver == Driver::Null {
                return Err(Error::forbidden(
                    "container cannot be connected to multiple networks with one of the networks in private (none) mode",
                ));
            }
            Ok(())
        })?;
        if let Some(live) = &live {
            self.plug(&container, live, &network, &settings).await?;
        }
        container.with(|inner| {
            let record = &mut inner.record;
            record.endpoints.remove("none");
            if record.endpoints.is_empty() {
                record.host_config.network_mode = Some(network.name.clone());
            }
            record.endpoints.insert(network.name.clone(), settings);
        });
        if live.is_some() {
            self.network_event(&container, "connect", &network.name, "");
        }
        self.persist(&container, Durability::Synced).await
    }

    /// Takes a container off a network, running or not.
    pub async fn disconnect_network(
        self: &Arc<Self>,
        network: &str,
        container: &str,
        force: bool,
    ) -> Result<()> {
        let network = self.networks.find(network)?;
        let container = match self.find(container) {
            Err(error) if force && error.class() == Class::NotFound => return Ok(()),
            other => other?,
        };
        let _lifecycle = container.lifecycle.lock().await;
        container.with(|inner| {
            let record = &inner.record;
            if record.network_mode() == "host" {
                return Err(Error::forbidden(
                    "container cannot be disconnected from host network or connected to host network",
                ));
            }
            if !record.endpoints.contains_key(&network.name) {
                return Err(Error::internal(format!(
                    "container {} is not connected to network {}",
                    record.id, network.name
                )));
            }
            Ok(())
        })?;
        let live = container.live();
        if let Some(live) = &live {
            self.unplug(&container, live, &network).await?;
        }
        container.with(|inner| {
            let record = &mut inner.record;
            record.endpoints.remove(&network.name);
            if record.network_mode() == network.name {
                let next = record.endpoints.keys().next().cloned();
                if next.is_none() {
                    record.endpoints.insert("none".to_owned(), EndpointSettings::default());
                }
                record.host_config.network_mode = Some(next.unwrap_or_else(|| "none".to_owned()));
            }
        });
        if live.is_some() {
            self.network_event(&container, "disconnect", &network.name, "");
        }
        self.persist(&container, Durability::Synced).await
    }
}
