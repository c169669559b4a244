//! Changing a container: its limits, its restart policy, its name.

use std::sync::Arc;

use bollard_stubs::models::{ContainerUpdateBody, HostConfig};

use super::{Containers, Status, validate};
use crate::db::Durability;
use crate::error::Context;
use crate::{Error, Result, names, spec};

impl Containers {
    /// Changes limits and restart policy, of a running container at once. Returns warnings.
    pub async fn update(self: &Arc<Self>, reference: &str, body: ContainerUpdateBody) -> Result<Vec<String>> {
        let container = self.find(reference)?;
        let _lifecycle = container.lifecycle.lock().await;
        let record = container.record();
        if matches!(record.state.status, Status::Removing | Status::Dead) {
            return Err(Error::conflict(format!(
                "Cannot update container {}: container is marked for removal and cannot be \"update\"",
                record.id
            )));
        }
        let mut host = record.host_config.clone();
        apply(&mut host, body);
        validate::limits(&host)?;
        if let Some(live) = container.live() {
            let limits = spec::resources::limits(&host)?;
            live.ask(move |client| client.update(&limits))
                .await
                .doing(|| format!("Cannot update container {}", record.id))?;
        }
        container.with(|inner| inner.record.host_config = host);
        self.persist(&container, Durability::Synced).await?;
        self.publish(&container, "update", &[]);
        Ok(Vec::new())
    }

    /// Gives a container another name.
    pub async fn rename(self: &Arc<Self>, reference: &str, name: &str) -> Result<()> {
        let container = self.find(reference)?;
        let new = name.strip_prefix('/').unwrap_or(name);
        if new.is_empty() {
            return Err(Error::invalid("Neither old nor new names may be empty"));
        }
        if !names::is_valid(new) {
            return Err(Error::invalid(format!(
                "Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
            )));
        }
        let _lifecycle = container.lifecycle.lock().await;
        let old = container.name();
        if old == new {
            return Err(Error::invalid("Renaming a container with the same name as its current name"));
        }
        self.take_name(new, &container.id)?;
        container.with(|inner| new.clone_into(&mut inner.record.name));
        if let Err(error) = self.persist(&container, Durability::Synced).await {
            container.with(|inner| inner.record.name.clone_from(&old));
            self.give_name_back(new, &container.id);
            return Err(error);
        }
        self.give_name_back(&old, &container.id);
        self.rename_resident(&container).await?;
        self.publish(&container, "rename", &[("oldName", format!("/{old}"))]);
        Ok(())
    }
}

/// What the update names replaces what was there; zero and nothing leave it.
fn apply(host: &mut HostConfig, body: ContainerUpdateBody) {
    fn number<T: Default + PartialEq>(field: &mut Option<T>, new: Option<T>) {
        if new.as_ref().is_some_and(|new| *new != T::default()) {
            *field = new;
        }
    }
    number(&mut host.cpu_shares, body.cpu_shares);
    number(&mut host.memory, body.memory);
    number(&mut host.memory_swap, body.memory_swap);
    number(&mut host.memory_reservation, body.memory_reservation);
    number(&mut host.blkio_weight, body.blkio_weight);
    number(&mut host.cpuset_cpus, body.cpuset_cpus);
    number(&mut host.cpuset_mems, body.cpuset_mems);
    number(&mut host.pids_limit, body.pids_limit);
    number(&mut host.cpu_realtime_period, body.cpu_realtime_period);
    number(&mut host.cpu_realtime_runtime, body.cpu_realtime_runtime);
    if body.nano_cpus.is_some_and(|nano| nano != 0) {
        host.nano_cpus = body.nano_cpus;
        host.cpu_period = None;
        host.cpu_quota = None;
    }
    if body.cpu_period.is_some_and(|period| period != 0) || body.cpu_quota.is_some_and(|quota| quota != 0) {
        number(&mut host.cpu_period, body.cpu_period);
        number(&mut host.cpu_quota, body.cpu_quota);
        host.nano_cpus = None;
    }
    if let Some(policy) = body.restart_policy.filter(|policy| {
        !matches!(policy.name, None | Some(bollard_stubs::models::RestartPolicyNameEnum::EMPTY))
    }) {
        host.restart_policy = Some(policy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_leaves_things_as_they_are() {
        let mut host = HostConfig { memory: Some(1 << 30), nano_cpus: Some(5), ..Default::default() };
        apply(
            &mut host,
            ContainerUpdateBody { memory: Some(0), cpu_quota: Some(50_000), ..Default::default() },
        );
        assert_eq!((host.memory, host.cpu_quota, host.nano_cpus), (Some(1 << 30), Some(50_000), None));
    }
}
