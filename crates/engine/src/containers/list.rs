//! The list of containers: docker's filters, order and summaries.

use std::collections::BTreeMap;
use std::sync::Arc;

use brigantine_network::PublishedPort;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Containers, Inner, Status};
use crate::{Error, Filters, Result};

/// What to list.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    pub all: bool,
    /// The newest so many, running or not; 0 and less mean no limit.
    pub limit: i64,
    pub size: bool,
    pub filters: Filters,
    /// Only this project's.
    pub project: Option<String>,
}

const KNOWN: &[&str] = &[
    "ancestor",
    "before",
    "expose",
    "exited",
    "health",
    "id",
    "isolation",
    "label",
    "name",
    "status",
    "since",
    "volume",
    "network",
    "is-task",
    "publish",
];

impl Containers {
    /// Summaries of the containers that match, newest first.
    pub async fn list(self: &Arc<Self>, options: &ListOptions) -> Result<Vec<Value>> {
        let filters = &options.filters;
        filters.only(KNOWN)?;
        for status in filters.values("status") {
            const STATES: [&str; 7] =
                ["created", "running", "paused", "restarting", "removing", "exited", "dead"];
            if !STATES.contains(&status.as_str()) {
                return Err(Error::invalid(format!("invalid filter 'status={status}'")));
            }
        }
        for health in filters.values("health") {
            if !["none", "starting", "healthy", "unhealthy"].contains(&health.as_str()) {
                return Err(Error::invalid(format!("invalid filter 'health={health}'")));
            }
        }
        let exited = filters
            .values("exited")
            .iter()
            .map(|code| {
                code.parse::<i32>().map_err(|_nan| Error::invalid(format!("invalid filter 'exited={code}'")))
            })
            .collect::<Result<Vec<_>>>()?;
        let is_task = filters.boolean("is-task")?;
        let mark = |key: &str| -> Result<Option<Timestamp>> {
            let of = |name| self.find_within(name, options.project.as_deref());
            filters.single(key)?.map(|name| Ok(of(name)?.with(|inner| inner.record.created))).transpose()
        };
        let (before, since) = (mark("before")?, mark("since")?);
        let mut ancestors = Vec::new();
        for name in filters.values("ancestor") {
            ancestors
                .push((name.clone(), self.images.resolve(name).await.ok().map(|image| image.id.to_string())));
        }
        let networks: Vec<String> = filters
            .values("network")
            .iter()
            .map(|wanted| {
                self.networks.find(wanted).map_or_else(|_unknown| wanted.clone(), |network| network.name)
            })
            .collect();
        let everything =
            options.all || options.limit > 0 || filters.contains("status") || filters.contains("exited");

        let mut containers = self.all();
        containers.retain(|container| options.project.is_none() || container.project == options.project);
        containers.sort_by_cached_key(|container| {
            std::cmp::Reverse(container.with(|inner| (inner.record.created, container.id.clone())))
        });
        let mut found = Vec::new();
        for container in containers {
            if options.limit > 0 && found.len() as i64 >= options.limit {
                break;
            }
            let summary = container.with(|inner| {
                let record = &inner.record;
                let status = record.state.status;
                let wanted = (everything || status.is_up() || status == Status::Restarting)
                    && (!filters.contains("id")
                        || filters.values("id").iter().any(|id| record.id.starts_with(id.as_str())))
                    && (filters.matches("name", &record.name)
                        || filters.matches("name", &format!("/{}", record.name)))
                    && filters.labels("label", |name| record.label(name))
                    && filters.exact("status", status.as_str())
                    && (exited.is_empty()
                        || (status == Status::Exited && exited.contains(&record.state.exit_code)))
                    && before.is_none_or(|before| record.created < before)
                    && since.is_none_or(|since| record.created > since)
                    && (ancestors.is_empty()
                        || ancestors.iter().any(|(name, id)| {
                            id.as_deref() == Some(record.image_id.as_str()) || record.image() == name
                        }))
                    && (networks.is_empty()
                        || networks.iter().any(|network| record.endpoints.contains_key(network)))
                    && filters.exact("health", inner.health_status())
                    && is_task != Some(true)
                    && (!filters.contains("volume")
                        || filters.values("volume").iter().any(|wanted| {
                            record
                                .mounts
                                .iter()
                                .any(|mount| mount.name == *wanted || mount.destination == *wanted)
                        }))
                    && ports_match(
                        filters,
                        "expose",
                        record.config.exposed_ports.as_deref().unwrap_or_default(),
                    )
                    && (!filters.contains("publish") || ports_match(filters, "publish", &published(inner)));
                wanted.then(|| self.summary(inner))
            });
            if let Some(summary) = summary {
                found.push((container, summary));
            }
        }
        // A container is also known by the names that legacy links give it.
        let mut linked: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for container in self.all() {
            container.with(|inner| {
                for link in inner.record.host_config.links.iter().flatten() {
                    let (target, alias) = link.split_once(':').unwrap_or((link, link));
                    let name = format!("/{}/{alias}", inner.record.name);
                    linked.entry(target.to_owned()).or_default().push(name);
                }
            });
        }
        let mut list = Vec::with_capacity(found.len());
        for (container, mut summary) in found {
            if let Some(names) = linked.get(&container.name())
                && let Some(all) = summary["Names"].as_array_mut()
            {
                all.extend(names.iter().map(|name| json!(name)));
            }
            if options.size {
                let (rw, root) = self.sizes(&container).await?;
                summary["SizeRw"] = rw.into();
                summary["SizeRootFs"] = root.into();
            }
            list.push(summary);
        }
        Ok(list)
    }

    fn summary(&self, inner: &Inner) -> Value {
        let record = &inner.record;
        let mut command = shell_like(&record.path);
        for argument in &record.args {
            command.push(' ');
            command.push_str(&shell_like(argument));
        }
        let live = inner.live.as_deref();
        json!({
            "Id": record.id,
            "Names": [format!("/{}", record.name)],
            "Image": record.image(),
            "ImageID": record.image_id,
            "Command": command,
            "Created": record.created.as_second(),
            "Ports": ports(inner),
            "Labels": record.config.labels.clone().unwrap_or_default().into_iter().collect::<BTreeMap<_, _>>(),
            "State": record.state.status.as_str(),
            "Status": status_text(inner, Timestamp::now()),
            "HostConfig": { "NetworkMode": record.network_mode() },
            "NetworkSettings": { "Networks": self.network_endpoints(record, live) },
            "Mounts": self.mount_points(record),
        })
    }
}

/// A word as docker shows it in COMMAND: quoted when it holds a space.
fn shell_like(word: &str) -> String {
    if word.contains(' ') { format!("'{word}'") } else { word.to_owned() }
}

fn published(inner: &Inner) -> Vec<String> {
    live_ports(inner).map(|port| format!("{}/{}", port.container_port, port.protocol)).collect()
}

fn live_ports(inner: &Inner) -> impl Iterator<Item = PublishedPort> {
    let sandbox = inner.live.as_ref().map(|live| live.sandbox());
    sandbox.and_then(|sandbox| sandbox.attachment.as_ref().map(|one| one.ports.clone())).into_iter().flatten()
}

/// Whether any of `ports` (`80/tcp`) is within what `key` names (`80`, `80-90/tcp`).
fn ports_match(filters: &Filters, key: &str, ports: &[String]) -> bool {
    let split = |text: &str| -> (String, String) {
        let (numbers, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        (numbers.to_owned(), protocol.to_owned())
    };
    !filters.contains(key)
        || filters.values(key).iter().any(|wanted| {
            let (numbers, protocol) = split(wanted);
            let (first, last) = numbers.split_once('-').unwrap_or((&numbers, &numbers));
            let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) else { return false };
            ports.iter().any(|port| {
                let (number, of) = split(port);
                of == protocol && number.parse::<u16>().is_ok_and(|number| (first..=last).contains(&number))
            })
        })
}

fn ports(inner: &Inner) -> Vec<Value> {
    let mut list: Vec<Value> = live_ports(inner)
        .map(|port| {
            json!({
                "IP": port.host_ip.to_string(), "PrivatePort": port.container_port, "PublicPort": port.host_port,
                "Type": port.protocol.to_string(),
            })
        })
        .collect();
    if inner.live.is_some() {
        let published = published(inner);
        let mut exposed: Vec<&String> = inner.record.config.exposed_ports.iter().flatten().collect();
        exposed.sort();
        for port in exposed.into_iter().filter(|port| !published.contains(port)) {
            if let Some((number, protocol)) = port.split_once('/')
                && let Ok(number) = number.parse::<u16>()
            {
                list.push(json!({ "PrivatePort": number, "Type": protocol }));
            }
        }
    }
    list
}

/// `Up 5 minutes (healthy)`, `Exited (0) 2 hours ago` …
fn status_text(inner: &Inner, now: Timestamp) -> String {
    let state = &inner.record.state;
    let since = |time: Option<Timestamp>| time.map_or(0, |time| now.as_second() - time.as_second());
    match state.status {
        Status::Created => "Created".to_owned(),
        Status::Running => {
            let up = format!("Up {}", human(since(state.started_at)));
            match inner.health_status() {
                "none" => up,
                "starting" => format!("{up} (health: starting)"),
                health => format!("{up} ({health})"),
            }
        }
        Status::Paused => format!("Up {} (Paused)", human(since(state.started_at))),
        Status::Restarting => {
            format!("Restarting ({}) {} ago", state.exit_code, human(since(state.finished_at)))
        }
        Status::Removing => "Removal In Progress".to_owned(),
        Status::Dead => "Dead".to_owned(),
        Status::Exited => match state.finished_at {
            None => String::new(),
            finished => format!("Exited ({}) {} ago", state.exit_code, human(since(finished))),
        },
    }
}

/// Docker's words for a length of time.
fn human(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    match seconds {
        ..1 => "Less than a second".to_owned(),
        1 => "1 second".to_owned(),
        2..60 => format!("{seconds} seconds"),
        _ if minutes == 1 => "About a minute".to_owned(),
        _ if minutes < 60 => format!("{minutes} minutes"),
        _ if hours == 1 => "About an hour".to_owned(),
        _ if hours < 48 => format!("{hours} hours"),
        _ if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        _ if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        _ if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", hours / 24 / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_dockers_words() {
        for (seconds, text) in [
            (0, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (600, "10 minutes"),
            (3600, "About an hour"),
            (3 * 3600, "3 hours"),
            (3 * 86400, "3 days"),
        ] {
            assert_eq!(human(seconds), text);
        }
    }

    #[test]
    fn port_filters_know_ranges() {
        let filters = |value: &str| Filters([("publish".to_owned(), vec![value.to_owned()])].into());
        let ports = ["80/tcp".to_owned(), "53/udp".to_owned()];
        assert!(ports_match(&filters("80"), "publish", &ports));
        assert!(ports_match(&filters("50-60/udp"), "publish", &ports));
        assert!(!ports_match(&filters("53"), "publish", &ports));
        assert!(ports_match(&Filters::none(), "publish", &ports));
    }
}
