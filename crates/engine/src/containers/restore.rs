//! Taking up the containers again when the engine opens: those that run are found by their shims' directories, those
//! that ended meanwhile by their exit records, and what was left half-made is removed.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use bollard_stubs::models::RestartPolicyNameEnum;
use brigantine_shim::{Client, ExitRecord, Found};
use jiff::Timestamp;

use super::start::SANDBOX_FILE;
use super::{Container, Containers, Live, Record, Sandbox, Status};
use crate::db::{Snapshot, Table};
use crate::networks::Wanted;
use crate::sync::lock;
use crate::volumes::remove_tree;
use crate::{Error, Result};

/// What has become of a container that may have been running.
enum Fate {
    Alive {
        live: Live,
        events: std::os::unix::net::UnixStream,
        paused: bool,
        execs: Vec<brigantine_shim::ExecState>,
    },
    Ended(ExitRecord),
    /// No trace of a run.
    Unknown,
}

impl Containers {
    pub(crate) async fn restore(self: &Arc<Self>, snapshot: &mut Snapshot) -> Result<()> {
        let mut ids = HashSet::new();
        for record in snapshot.take::<Record>(Table::Containers) {
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    if let crate::db::DbError::Corrupt { key, .. } = &error {
                        ids.insert(key.clone());
                    }
                    tracing::error!(error = Error::internal("a container is lost").because(error).report());
                    continue;
                }
            };
            ids.insert(record.id.clone());
            self.volumes.acquire(&record.id, &record.mounts);
            lock(&self.index).names.insert(record.name.clone(), record.id.clone());
            self.insert(Container::new(record));
        }
        let shims = list_dir(&self.config.exec_root.join("c"));
        let mut seen: Vec<Arc<Container>> = Vec::new();
        for container in self.all() {
            if shims.contains(&container.id) || container.status().is_up() {
                seen.push(container);
            }
        }
        let mut fates = Vec::new();
        let workers: Vec<_> = seen
            .into_iter()
            .map(|container| {
                let (run_dir, exit_path) = (self.run_dir(&container.id), self.exit_path(&container.id));
                tokio::task::spawn_blocking(move || (container, fate(&run_dir, &exit_path)))
            })
            .collect();
        for worker in workers {
            match worker.await {
                Ok(found) => fates.push(found),
                Err(error) => tracing::error!(%error, "look for a running container"),
            }
        }
        let mut attachments = Vec::new();
        for (_, fate) in &fates {
            if let Ok(Fate::Alive { live, .. }) = fate
                && let Some(attachment) = &live.sandbox().attachment
            {
                attachments.push(attachment.clone());
                self.take_addresses_again(live);
            }
        }
        let (plumbing, carriers) = (self.networks.plumbing(), self.networks.carriers());
        crate::blocking(move || {
            plumbing.reconcile(&carriers, attachments);
            Ok(())
        })
        .await?;
        let mut ended = Vec::new();
        for (container, fate) in fates {
            let was_up = container.with(|inner| inner.record.state.status.is_up());
            self.take_up(&container, fate);
            if was_up && container.live().is_none() {
                ended.push(container);
            }
        }
        let volumes = Arc::clone(&self.volumes);
        crate::blocking(move || {
            for container in ended {
                volumes.mounted_for(&container.id, &container.record().mounts);
                volumes.unmount_for(&container.id);
            }
            volumes.unmount_unused();
            Ok(())
        })
        .await?;
        let containers = Arc::clone(self);
        crate::blocking(move || {
            containers.meet_helper();
            Ok(())
        })
        .await?;
        self.keep_helper();
        self.networks.plumbing().keep_firewall();
        self.sweep(ids, &shims).await?;
        self.after_restore();
        Ok(())
    }

    fn take_up(self: &Arc<Self>, container: &Arc<Container>, fate: Result<Fate>) {
        match fate {
            Ok(Fate::Alive { live, events, paused, execs }) => {
                let live = Arc::new(live);
                container.with(|inner| {
                    let state = &mut inner.record.state;
                    state.status = if paused { Status::Paused } else { Status::Running };
                    state.pid = live.pid;
                    state.started_at = Some(live.started_at);
                    inner.live = Some(Arc::clone(&live));
                });
                self.restore_execs(container, &execs);
                self.volumes.mounted_for(&container.id, &container.record().mounts);
                self.watch(Arc::clone(container), Arc::clone(&live), events);
                self.begin_health_checks(container);
            }
            Ok(Fate::Ended(exit)) => {
                let finished = exit.finished_at.as_str().parse().ok();
                let news = container.with(|inner| {
                    let state = &mut inner.record.state;
                    let started: Option<Timestamp> = exit.started_at.as_str().parse().ok();
                    // The record of an earlier run says nothing about a run that a reboot has ended.
                    let of_this_run =
                        state.started_at.is_none_or(|of| started.is_some_and(|started| started >= of));
                    if state.finished_at.is_some() && state.finished_at == finished {
                        return false;
                    }
                    state.status = Status::Exited;
                    state.pid = 0;
                    state.exit_code = if of_this_run { exit.exit_code } else { 255 };
                    state.oom_killed = of_this_run && exit.oom_killed;
                    state.finished_at = if of_this_run { finished } else { Some(Timestamp::now()) };
                    true
                });
                if news {
                    let exit_code = container.with(|inner| inner.record.state.exit_code);
                    self.note(container);
                    self.publish(container, "die", &[("exitCode", exit_code.to_string())]);
                }
            }
            Ok(Fate::Unknown) => {
                let was_up = container.with(|inner| {
                    let state = &mut inner.record.state;
                    let was_up = state.status.is_up();
                    if was_up {
                        state.status = Status::Exited;
                        state.exit_code = 255;
                        state.pid = 0;
                        state.finished_at = Some(Timestamp::now());
                    }
                    was_up
                });
                if was_up {
                    self.note(container);
                }
            }
            Err(error) => {
                tracing::error!(
                    container = container.id,
                    error = error.report(),
                    "take a container up again"
                );
            }
        }
    }

    fn take_addresses_again(&self, live: &Live) {
        let sandbox = live.sandbox();
        let Some(attachment) = &sandbox.attachment else { return };
        for (network, interface) in sandbox.networks.iter().zip(&attachment.interfaces) {
            let Ok(network) = self.networks.find(network) else { continue };
            if network.foreign.is_some() {
                continue;
            }
            let wanted = Wanted { ipv4: interface.ipv4(), ipv6: interface.ipv6() };
            if let Err(error) = self.networks.take_addresses(&network.id, &wanted) {
                tracing::warn!(
                    network = network.name,
                    addresses = ?interface.addresses,
                    error = error.report(),
                    "take addresses up again"
                );
            }
        }
    }

    /// Removes directories that belong to no container: a creation or removal was cut short.
    async fn sweep(&self, known: HashSet<String>, shims: &HashSet<String>) -> Result<()> {
        let (containers, runs) = (self.config.data_root.join("containers"), self.config.exec_root.join("c"));
        let orphans: Vec<String> = shims.iter().filter(|id| !known.contains(*id)).cloned().collect();
        crate::blocking(move || {
            for id in orphans {
                let dir = runs.join(&id);
                match brigantine_shim::find(&dir, &containers.join(&id).join("exit.json")) {
                    Ok(Found::Monitored(client)) => {
                        if let Err(error) = client.kill(9, true).and_then(|()| client.release()) {
                            tracing::warn!(container = id, %error, "end a container that has no record");
                        }
                    }
                    Ok(Found::Exited(_) | Found::Nothing) => {}
                    Err(error) => {
                        tracing::warn!(container = id, %error, "clean up a container that has no record");
                    }
                }
                if let Err(error) = remove_tree(&dir) {
                    tracing::warn!(
                        container = id,
                        error = error.report(),
                        "clean up a container that has no record"
                    );
                }
            }
            for id in list_dir(&containers) {
                if !known.contains(&id)
                    && let Err(error) = remove_tree(&containers.join(&id))
                {
                    tracing::warn!(
                        container = id,
                        error = error.report(),
                        "remove what a container has left"
                    );
                }
            }
            Ok(())
        })
        .await
    }

    /// Restart policies, and the removal of auto-removed containers that ended meanwhile.
    fn after_restore(self: &Arc<Self>) {
        for container in self.all() {
            let (restart, remove) = container.with(|inner| {
                let record = &inner.record;
                if inner.live.is_some() {
                    return (false, false);
                }
                let ran = record.state.started_at.is_some();
                let policy = record.host_config.restart_policy.as_ref().and_then(|policy| policy.name);
                let restart = ran
                    && match policy {
                        Some(RestartPolicyNameEnum::ALWAYS) => true,
                        Some(RestartPolicyNameEnum::UNLESS_STOPPED) => !record.stopped_by_request,
                        Some(RestartPolicyNameEnum::ON_FAILURE) => {
                            record.state.status == Status::Restarting
                                || (record.state.exit_code != 0 && !record.stopped_by_request)
                        }
                        _ => false,
                    };
                let ended = matches!(record.state.status, Status::Exited | Status::Removing | Status::Dead);
                (restart, ended && record.auto_remove())
            });
            if container.status() == Status::Restarting || container.status() == Status::Removing {
                container.with(|inner| inner.record.state.status = Status::Exited);
            }
            if !restart && !remove {
                continue;
            }
            let containers = Arc::clone(self);
            tokio::spawn(async move {
                let outcome = if remove {
                    let _lifecycle = container.lifecycle.lock().await;
                    containers.remove_locked(&container, true).await
                } else {
                    containers.start(&container.id).await
                };
                if let Err(error) = outcome {
                    tracing::warn!(
                        container = container.id,
                        error = error.report(),
                        "carry on after a restart"
                    );
                }
            });
        }
    }
}

fn fate(run_dir: &Path, exit_path: &Path) -> Result<Fate> {
    let unreadable =
        |error| Error::internal(format!("find the container of {}", run_dir.display())).because(error);
    match brigantine_shim::find(run_dir, exit_path).map_err(unreadable)? {
        Found::Monitored(client) => alive(client, run_dir),
        Found::Exited(exit) => {
            super::borrowed::unmount_all(run_dir);
            remove_tree(run_dir)?;
            Ok(Fate::Ended(exit))
        }
        Found::Nothing => {
            super::borrowed::unmount_all(run_dir);
            remove_tree(run_dir)?;
            Ok(Fate::Unknown)
        }
    }
}

fn alive(client: Client, run_dir: &Path) -> Result<Fate> {
    let what = || format!("ask the monitor in {}", run_dir.display());
    let asked = client.events().and_then(|events| Ok((events, client.state()?)));
    let (events, state) = asked.map_err(|error| Error::internal(what()).because(error))?;
    let note = run_dir.join(SANDBOX_FILE);
    let sandbox: Sandbox = match std::fs::read(&note) {
        Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!(path = %note.display(), %error, "a container's network note is damaged");
            Sandbox::default()
        }),
        Err(error) => {
            tracing::warn!(path = %note.display(), %error, "a container's network note is missing");
            Sandbox::default()
        }
    };
    let started_at = state.started_at.as_str().parse().unwrap_or_else(|_unreadable| Timestamp::now());
    let live = Live::new(client, state.container_pid, started_at, sandbox);
    let paused = state.status == brigantine_shim::Status::Paused;
    Ok(Fate::Alive { live, events, paused, execs: state.execs })
}

fn list_dir(dir: &Path) -> HashSet<String> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}
