//! Removing a container: nothing of it remains, and its name is free when the call returns.

use std::sync::Arc;

use super::{Condition, Container, Containers, Status};
use crate::db::{Batch, Durability, Table};
use crate::error::Context;
use crate::sync::lock;
use crate::volumes::remove_tree;
use crate::{Class, Error, Result};

impl Containers {
    /// Removes a container; `force` kills a running one, `volumes` takes its anonymous volumes along.
    pub async fn remove(self: &Arc<Self>, reference: &str, force: bool, volumes: bool) -> Result<()> {
        let container = self.find(reference)?;
        loop {
            self.cancel_restart_if(&container, force);
            let status = container.status();
            let live = container.live();
            if status == Status::Removing {
                return Err(Error::conflict(format!(
                    "removal of container {} is already in progress",
                    container.name()
                )));
            }
            if live.is_some() || status == Status::Restarting {
                if !force {
                    return Err(Error::conflict(format!(
                        "cannot remove container \"/{}\": container is {}: stop the container before removing or force remove",
                        container.name(),
                        status.as_str()
                    )));
                }
                container.with(|inner| inner.stop_requested = true);
                if let Some(live) = live {
                    self.kill_live(&container, &live).await?;
                }
            }
            let _lifecycle = container.lifecycle.lock().await;
            // An auto-removed container may be gone by now, and a policy may have started it again.
            if container.with(|inner| inner.removed) {
                return if force {
                    Ok(())
                } else {
                    Err(Error::not_found(format!("No such container: {reference}")))
                };
            }
            if container.live().is_some() {
                continue;
            }
            return self.remove_locked(&container, volumes).await;
        }
    }

    fn cancel_restart_if(&self, container: &Container, force: bool) {
        if force {
            container.with(|inner| inner.stop_requested = true);
            self.cancel_restart(container);
        }
    }

    /// The same for a caller that holds the lock of a container that does not run.
    pub(super) async fn remove_locked(
        self: &Arc<Self>,
        container: &Arc<Container>,
        volumes: bool,
    ) -> Result<()> {
        let id = container.id.clone();
        let (before, auto_remove, mounts, images) = container.with(|inner| {
            let before = std::mem::replace(&mut inner.record.state.status, Status::Removing);
            drop(inner.restart.cancel.take());
            let mounts = inner.record.mounts.clone();
            let mounted = mounts.iter().map(|mount| &mount.image).filter(|image| !image.is_empty());
            let images: Vec<String> =
                std::iter::once(&inner.record.image_id).chain(mounted).cloned().collect();
            (before, inner.record.auto_remove(), mounts, images)
        });
        let durability = if auto_remove { Durability::Written } else { Durability::Synced };
        let forgotten = self.db.apply(Batch::new().delete(Table::Containers, &id), durability).await;
        if let Err(error) = forgotten.doing(|| format!("remove container {id}")) {
            container.with(|inner| inner.record.state.status = before);
            return Err(error);
        }
        let (dir, run_dir) = (self.dir(&id), self.run_dir(&id));
        let this = Arc::clone(self);
        let record = container.record();
        let files = crate::blocking(move || {
            remove_tree(&run_dir)?;
            let project = this.size_project(&record);
            remove_tree(&dir)?;
            this.quotas.forget(project);
            Ok(())
        })
        .await;
        self.volumes.release(&id, &mounts, volumes).await;
        let name = container.name();
        {
            let mut index = lock(&self.index);
            index.by_id.remove(&id);
            index.names.retain(|_, owner| *owner != id);
        }
        self.collect_layers_of(images).await;
        self.forget_execs(&id);
        self.publish(container, "destroy", &[]);
        container.with(|inner| {
            inner.removed = true;
            inner.attaching.clear();
            inner.wake(&[Condition::NotRunning, Condition::NextExit, Condition::Removed]);
        });
        match files {
            Ok(()) => Ok(()),
            // The record is gone; what is left of the files goes at the next start of the engine.
            Err(error) => {
                Err(Error::of(Class::Internal, format!("unable to remove filesystem of container {name}"))
                    .because(error))
            }
        }
    }
}
