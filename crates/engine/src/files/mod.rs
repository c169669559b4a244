//! Copying files into and out of containers, their changes, their export, and images made of them.
//!
//! Whatever a container does to its own files meanwhile, nothing outside of it is read or written: see [`path`] and
//! [`view`]. A stopped container cannot be started while something is copied into it.

mod changes;
mod path;
mod unpack;
mod view;

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigantine_image::archive::{self, Commit};
use brigantine_image::layer;
use brigantine_image::{ContainerConfig as ImageHints, Image, Reference};
use jiff::Timestamp;
use rustix::fs::{AtFlags, FileType, OFlags, Stat};
use rustix::io::Errno;
use serde::Serialize;

pub use changes::{ChangeKind, Changed};
use path::{Split, split};
use unpack::{Rules, unpack};
use view::{Bound, Stopped, View, with_few_rights, with_few_rights_as};

use crate::containers::{Container, Containers, Record, mount_sources};
use crate::error::Context;
use crate::own::Own;
use crate::rootfs::LayerRoot;
use crate::volumes::MountKind;
use crate::{Error, Result, users};

/// What docker's clients are told of a path before its archive.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PathStat {
    pub name: String,
    pub size: i64,
    /// Go's `os.FileMode`.
    pub mode: u32,
    pub mtime: String,
    /// Where a link leads, from the container's root.
    pub link_target: String,
}

/// A path that was found, to be archived.
#[derive(Debug)]
pub struct Archived {
    pub stat: PathStat,
    parent: OwnedFd,
    split: Split,
    view: View,
}

/// How `PUT /containers/{id}/archive` is to be done.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExtractOptions {
    pub no_overwrite_dir_non_dir: bool,
    /// What is made belongs to the container's user, if it has one.
    pub copy_uid_gid: bool,
}

/// What `POST /commit` asks for.
#[derive(Debug, Clone, Default)]
pub struct CommitRequest {
    pub reference: Option<Reference>,
    pub author: String,
    pub comment: String,
    /// Dockerfile instructions.
    pub changes: Vec<String>,
    pub pause: bool,
    /// Replaces the container's own configuration.
    pub config: Option<bollard_stubs::models::ContainerConfig>,
}

impl Archived {
    /// Writes the archive. Blocks.
    pub fn write(self, output: impl Write + Send + 'static) -> Result<()> {
        with_few_rights(move || {
            let Self { parent, split, view, .. } = self;
            let name = if split.name == "/" { "" } else { &split.name };
            let owners =
                view.ids.clone().map(|ids| -> layer::Owners { Box::new(move |u, g| ids.inside(u, g)) });
            layer::pack_as(parent, split.base.as_bytes(), name.as_bytes(), output, owners)
                .map(drop)
                .doing(|| format!("archive {}", split.whole))
        })
    }
}

impl Containers {
    /// Finds a path in a container. Links are followed up to its last part, and through that with a trailing slash.
    pub async fn find_path(self: &Arc<Self>, reference: &str, path: &str) -> Result<Archived> {
        let container = self.find(reference)?;
        if path.is_empty() {
            return Err(Error::invalid("bad parameter: path cannot be empty"));
        }
        let view = self.view(&container).await?;
        let (split, reference) = (split(path), reference.to_owned());
        crate::blocking(move || {
            with_few_rights(move || {
                let missing = |error: Errno| absent(error, &split.whole, &reference);
                let parent =
                    path::open(&view, &split.dir, OFlags::PATH | OFlags::DIRECTORY).map_err(missing)?;
                let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
                let stat = rustix::fs::statat(&parent, split.base.as_str(), flags).map_err(missing)?;
                let link = if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                    path::target_of(&view, &split.whole)
                        .doing(|| format!("follow {}", split.whole))?
                        .ok_or_else(|| absent(Errno::LOOP, &split.whole, &reference))?
                } else {
                    String::new()
                };
                let stat = path_stat(&split, &stat, link);
                Ok(Archived { stat, parent, split, view })
            })
        })
        .await
    }

    /// The same, to be sent to a client: an event tells of it.
    pub async fn archive_path(self: &Arc<Self>, reference: &str, path: &str) -> Result<Archived> {
        let archived = self.find_path(reference, path).await?;
        self.publish(&*self.find(reference)?, "archive-path", &[]);
        Ok(archived)
    }

    /// Unpacks an archive into a directory of a container. What was copied before a failure stays.
    pub async fn extract(
        self: &Arc<Self>,
        reference: &str,
        path: &str,
        options: ExtractOptions,
        archive: impl Read + Send + 'static,
    ) -> Result<()> {
        let container = self.find(reference)?;
        if path.is_empty() {
            return Err(Error::invalid("bad parameter: path cannot be empty"));
        }
        let (view, _lifecycle) = if let Some(view) = self.live_view(&container).await? {
            (view, None)
        } else {
            let lifecycle = container.lifecycle.lock().await;
            match self.live_view(&container).await? {
                Some(view) => (view, None),
                None => (self.stopped_view(&container, true).await?, Some(lifecycle)),
            }
        };
        let record = container.record();
        let (whole, reference) = (split(path).whole, reference.to_owned());
        crate::blocking(move || {
            with_few_rights_as(view.ids.clone(), move || {
                let missing = |error: Errno| absent(error, &whole, &reference);
                let target =
                    path::target_of(&view, &whole).map_err(missing)?.ok_or_else(|| missing(Errno::LOOP))?;
                let found = path::open(&view, &target, OFlags::PATH).map_err(missing)?;
                let stat =
                    rustix::fs::statat(&found, "", AtFlags::EMPTY_PATH).doing(|| format!("stat {whole}"))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                    return Err(Error::invalid("extraction point is not a directory").because(whole));
                }
                may_write(&record, &target)?;
                let mut rules = Rules {
                    no_overwrite_dir_non_dir: options.no_overwrite_dir_non_dir,
                    ids: view.ids.clone(),
                    ..Rules::default()
                };
                let user = record.config.user.as_deref().unwrap_or_default();
                if options.copy_uid_gid && !user.is_empty() {
                    let root =
                        view.as_fd().try_clone_to_owned().doing(|| "look into the container".to_owned())?;
                    let user = users::resolve(user, &[], &LayerRoot::of(root))?;
                    rules.owner = Some((user.uid, user.gid));
                }
                unpack(view.as_fd(), &target, archive, rules)
            })
        })
        .await?;
        self.publish(&container, "extract-to-dir", &[]);
        Ok(())
    }

    /// What the container has changed in its image's files, by path.
    pub async fn changes(&self, reference: &str) -> Result<Vec<Changed>> {
        let container = self.find(reference)?;
        let found = self.read_changes(&container).await?;
        Ok(found.changed.into_iter().map(|(path, kind)| Changed { path, kind }).collect())
    }

    async fn read_changes(&self, container: &Container) -> Result<changes::Changes> {
        let (record, images) = (container.record(), Arc::clone(&self.images));
        let dir = self.dir(&record.id);
        crate::blocking(move || {
            let layers = images.layers(&record.image_id, &record.layers)?;
            if let Some(replica) = Own::find(&dir, &layers, images.copies()).replica().cloned() {
                return with_few_rights(move || changes::of_copy(&replica));
            }
            let (upper, lower) = (dir.join("upper"), LayerRoot::open(&layers)?);
            with_few_rights(move || changes::changes(&upper, lower.as_fd()))
        })
        .await
    }

    /// What writes the container's whole file system, without its volumes, as an archive. Blocks when called.
    pub async fn export(
        &self,
        reference: &str,
    ) -> Result<impl FnOnce(Box<dyn Write + Send>) -> Result<()> + Send + 'static> {
        let container = self.find(reference)?;
        let (record, images) = (container.record(), Arc::clone(&self.images));
        let dir = self.dir(&record.id);
        let root = crate::blocking(move || {
            let layers = images.layers(&record.image_id, &record.layers)?;
            Own::find(&dir, &layers, images.copies()).mount(false)
        })
        .await?;
        self.publish(&container, "export", &[]);
        Ok(move |output: Box<dyn Write + Send>| {
            with_few_rights(move || {
                let path = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
                layer::pack(&path, output).map(drop).doing(|| "export the container's files".to_owned())
            })
        })
    }

    /// Makes an image of a container: its image with what it has changed, and its configuration.
    pub async fn commit(self: &Arc<Self>, reference: &str, request: CommitRequest) -> Result<Image> {
        let container = self.find(reference)?;
        let record = container.record();
        let live = container.live();
        let mut pause =
            request.pause && container.status() == crate::containers::Status::Running && live.is_some();
        if let Some(live) = live.as_ref().filter(|_| pause) {
            match live.ask(brigantine_shim::Client::pause).await {
                Ok(()) => {}
                // It has just ended: nothing of it changes any more.
                Err(error) if error.is_gone() => pause = false,
                Err(error) => {
                    return Err(Error::internal(format!("pause container {} for the commit", record.id))
                        .because(error));
                }
            }
        }
        let made = self.make_image(&container, &record, request).await;
        if let Some(live) = live.filter(|_| pause) {
            let resumed = live.ask(brigantine_shim::Client::resume).await;
            if let Err(error) = resumed
                && !error.is_gone()
            {
                return Err(Error::internal(format!("resume container {} after the commit", record.id))
                    .because(error));
            }
        }
        let image = made?;
        let mut more = vec![("imageID", image.id.to_string()), ("comment", String::new())];
        if let Some(name) = image.tags.first() {
            more.push(("imageRef", name.to_string()));
        }
        self.publish(&container, "commit", &more);
        Ok(image)
    }

    async fn make_image(
        &self,
        container: &Container,
        record: &Record,
        request: CommitRequest,
    ) -> Result<Image> {
        let changes = self.read_changes(container).await?;
        let without =
            changes.engines.iter().map(|path| path.trim_start_matches('/').as_bytes().to_vec()).collect();
        let own = serde_json::to_value(request.config.as_ref().unwrap_or(&record.config))
            .doing(|| "read the container's configuration".to_owned())?;
        let config: ImageHints =
            serde_json::from_value(own).doing(|| "read the container's configuration".to_owned())?;
        let (dir, images) = (self.dir(&record.id), Arc::clone(&self.images));
        let (image_id, layers) = (record.image_id.clone(), record.layers.clone());
        let own = crate::blocking(move || {
            let layers = images.layers(&image_id, &layers)?;
            Ok(Own::find(&dir, &layers, images.copies()))
        })
        .await?;
        let commit = Commit {
            parent: Some(record.image_id.parse().doing(|| format!("read the image id {}", record.image_id))?),
            upper: Some(self.dir(&record.id).join("upper")),
            replica: own.replica().cloned(),
            without,
            config,
            changes: request.changes,
            reference: request.reference,
            author: Some(request.author),
            message: Some(request.comment),
            created_by: std::iter::once(record.path.as_str())
                .chain(record.args.iter().map(String::as_str))
                .collect::<Vec<_>>()
                .join(" "),
        };
        self.images.with(move |store| archive::commit(store, &commit)).await
    }

    /// The container's files to read.
    async fn view(self: &Arc<Self>, container: &Arc<Container>) -> Result<View> {
        if let Some(view) = self.live_view(container).await? {
            return Ok(view);
        }
        let stopped = self.stopped(container).await?;
        let look = {
            let stopped = stopped.clone();
            move || View::of_stopped(&stopped, false)
        };
        if let Some(view) = crate::blocking(look.clone()).await? {
            return Ok(view);
        }
        // A mount point is missing: it is made as a start would, with nobody else about.
        {
            let _lifecycle = container.lifecycle.lock().await;
            if let Some(view) = self.live_view(container).await? {
                return Ok(view);
            }
            drop(self.stopped_view(container, true).await?);
        }
        crate::blocking(look)
            .await?
            .ok_or_else(|| Error::conflict(format!("container {} changes while it is read", container.id)))
    }

    /// A running container's files.
    async fn live_view(&self, container: &Container) -> Result<Option<View>> {
        let Some(live) = container.live() else { return Ok(None) };
        let view = View::of_process(live.pid, container.record().remap(&self.config).cloned());
        // Its process id may have gone to another process before it was looked at, but not if it still runs after.
        match live.ask(brigantine_shim::Client::state).await {
            Ok(state) if state.exit.is_none() && state.status != brigantine_shim::Status::Stopped => {
                view.map(Some)
            }
            Ok(_) => Ok(None),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => {
                Err(Error::internal(format!("ask how container {} is", container.id)).because(error))
            }
        }
    }

    async fn stopped_view(&self, container: &Arc<Container>, writable: bool) -> Result<View> {
        let mut stopped = self.stopped(container).await?;
        crate::blocking(move || {
            if writable {
                stopped.own = stopped.own.ready()?;
            }
            View::of_stopped(&stopped, writable)
        })
        .await?
        .ok_or_else(|| Error::internal("a mount point could not be made"))
    }

    async fn stopped(&self, container: &Arc<Container>) -> Result<Stopped> {
        if container.with(|inner| inner.removed) {
            return Err(Error::not_found(format!("No such container: {}", container.id)));
        }
        let (record, dir) = (container.record(), self.dir(&container.id));
        let (images, volumes) = (Arc::clone(&self.images), Arc::clone(&self.volumes));
        crate::blocking(move || {
            let layers = images.layers(&record.image_id, &record.layers)?;
            let own = Own::find(&dir, &layers, images.copies());
            let sources = mount_sources(&record, &volumes, |_image| Ok(PathBuf::new()))?;
            let mut mounts: Vec<Bound> = record
                .mounts
                .iter()
                .zip(sources)
                .filter(|(mount, source)| mount.kind != MountKind::Tmpfs && !source.as_os_str().is_empty())
                .map(|(mount, source)| Bound {
                    source,
                    destination: mount.destination.clone(),
                    writable: mount.rw,
                    recursive: !mount.non_recursive,
                })
                .collect();
            for name in ["hosts", "hostname", "resolv.conf"] {
                let source = dir.join(name);
                let destination = format!("/etc/{name}");
                if source.exists() && !mounts.iter().any(|mount| mount.destination == destination) {
                    mounts.push(Bound { source, destination, writable: true, recursive: false });
                }
            }
            Ok(Stopped { dir, own, mounts })
        })
        .await
    }
}

/// Docker's rule: into a volume that is writable, or a root that is.
fn may_write(record: &Record, target: &str) -> Result<()> {
    let target = Path::new(target);
    let mount = record
        .mounts
        .iter()
        .filter(|mount| target.starts_with(&mount.destination))
        .max_by_key(|mount| mount.destination.len());
    match mount {
        Some(mount) if !mount.rw => Err(Error::forbidden("mounted volume is marked read-only")
            .because(format!("{} at {}", mount.name, mount.destination))),
        None if record.host_config.readonly_rootfs == Some(true) => {
            Err(Error::forbidden("container rootfs is marked read-only"))
        }
        _ => Ok(()),
    }
}

fn absent(error: Errno, path: &str, container: &str) -> Error {
    match error {
        Errno::NOENT => Error::not_found(format!("Could not find the file {path} in container {container}")),
        Errno::NOTDIR => {
            Error::invalid(format!("{path} in container {container}")).because(std::io::Error::from(error))
        }
        Errno::LOOP => Error::invalid(format!("too many links in {path} in container {container}")),
        error => Error::internal(format!("open {path} in container {container}"))
            .because(std::io::Error::from(error)),
    }
}

fn path_stat(split: &Split, stat: &Stat, link_target: String) -> PathStat {
    let nanos = i32::try_from(stat.st_mtime_nsec).unwrap_or_default();
    let mtime = Timestamp::new(stat.st_mtime, nanos).unwrap_or_default();
    PathStat {
        name: split.name.clone(),
        size: stat.st_size,
        mode: go_mode(stat.st_mode),
        mtime: crate::rfc3339_nano(mtime),
        link_target,
    }
}

/// Go's `os.FileMode` of a `st_mode`.
fn go_mode(mode: u32) -> u32 {
    let kind = match FileType::from_raw_mode(mode) {
        FileType::Directory => 1 << 31,
        FileType::Symlink => 1 << 27,
        FileType::BlockDevice => 1 << 26,
        FileType::CharacterDevice => 1 << 26 | 1 << 21,
        FileType::Fifo => 1 << 25,
        FileType::Socket => 1 << 24,
        _ => 0,
    };
    let bit = |of: u32, go: u32| if mode & of == 0 { 0 } else { 1 << go };
    kind | bit(0o4000, 23) | bit(0o2000, 22) | bit(0o1000, 20) | mode & 0o777
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_as_go_counts_them() {
        assert_eq!(go_mode(0o040_755), 2_147_484_141);
        assert_eq!(go_mode(0o100_644), 420);
        assert_eq!(go_mode(0o120_777), 134_218_239);
        assert_eq!(go_mode(0o010_644), 33_554_852);
        assert_eq!(go_mode(0o041_777), 1 << 31 | 1 << 20 | 0o777);
    }
}
