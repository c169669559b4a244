//! What a step borrows of the client while it runs: secrets, and sockets that lead to its ssh agents.
//!
//! Invariant: what is lent is in memory and below the runtime directory only, and is gone when the step has ended.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use brigantine_session::Session;
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use super::{Job, blocking};
use crate::dockerfile::MountKind;
use crate::error::{Context as _, Error, Result};
use crate::graph::{Run, RunMount};

/// The most users of one agent at once.
const MOST_USERS: usize = 64;

/// What one step has been lent.
#[derive(Debug)]
pub(super) struct Lent {
    pub secrets: Arc<BTreeMap<String, Vec<u8>>>,
    /// By the mount's place among the step's mounts.
    pub sockets: BTreeMap<usize, PathBuf>,
    /// To be kept until the step is started.
    pub files: Files,
    _forwarding: JoinSet<()>,
}

/// The step's files below the runtime directory, removed with this unless the step was started, which removes them
/// itself.
#[derive(Debug, Default)]
pub(super) struct Files(Option<PathBuf>);

impl Files {
    pub fn are_the_steps(mut self) {
        self.0 = None;
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if let Some(dir) = &self.0 {
            crate::snapshot::remove_tree(dir);
        }
    }
}

impl Job {
    /// Asks the client for what a step's mounts name.
    pub(super) async fn borrow(&self, run: &Run, step: &str) -> Result<Lent> {
        let mut secrets = Arc::clone(&self.secrets);
        let mut sockets = BTreeMap::new();
        let mut forwarding = JoinSet::new();
        let mut files = Files::default();
        for (index, mount) in run.mounts.iter().enumerate() {
            match (mount.kind, &self.session) {
                (MountKind::Secret, Some(session)) if !secrets.contains_key(&mount.id) => {
                    if let Some(value) = session.secret(&mount.id).await? {
                        Arc::make_mut(&mut secrets).insert(mount.id.clone(), value);
                    }
                }
                (MountKind::Ssh, session) => {
                    let there = match session {
                        Some(session) => session.has_agent(&mount.id).await?,
                        None => false,
                    };
                    match session {
                        Some(session) if there => {
                            files.0 = Some(self.solver.executor.secrets_dir(step));
                            let (path, listener) = self.agent_socket(step, index, mount).await?;
                            sockets.insert(index, path);
                            forwarding.spawn(serve(listener, Arc::clone(session), mount.id.clone()));
                        }
                        _ if mount.required => {
                            return Err(Error::NotFound(format!(
                                "ssh agent {}: not found: start the build with --ssh {}",
                                mount.id, mount.id
                            )));
                        }
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        Ok(Lent { secrets, sockets, files, _forwarding: forwarding })
    }

    async fn agent_socket(
        &self,
        step: &str,
        index: usize,
        mount: &RunMount,
    ) -> Result<(PathBuf, UnixListener)> {
        let dir = self.solver.executor.secrets_dir(step);
        let (mode, uid, gid) = (mount.mode.unwrap_or(0o600), mount.uid, mount.gid);
        let (path, listener) = blocking(move || {
            crate::run::make_private(&dir)?;
            let name = format!("agent-{index}");
            let what = || format!("make the socket {name} in {}", dir.display());
            let path = dir.join(&name);
            // The directory's path may be too long for a socket's address.
            let root = crate::tree::open_dir(&dir)?;
            let address = format!("/proc/self/fd/{}/{name}", root.as_raw_fd());
            let listener = std::os::unix::net::UnixListener::bind(address).doing(what)?;
            listener.set_nonblocking(true).doing(what)?;
            std::os::unix::fs::chown(&path, Some(uid), Some(gid)).doing(what)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).doing(what)?;
            Ok((path, listener))
        })
        .await?;
        let listener =
            UnixListener::from_std(listener).doing(|| "listen for users of an agent".to_owned())?;
        Ok((path, listener))
    }
}

/// Forwards every connection to the client's agent, until dropped.
async fn serve(listener: UnixListener, session: Arc<Session>, id: String) {
    let mut users = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if users.len() < MOST_USERS => match accepted {
                Ok((socket, _)) => {
                    let (session, id) = (Arc::clone(&session), id.clone());
                    users.spawn(async move {
                        if let Err(error) = session.forward_agent(&id, socket).await {
                            tracing::debug!(agent = id, %error, "forward an ssh agent");
                        }
                    });
                }
                Err(error) => return tracing::debug!(%error, "accept a user of an ssh agent"),
            },
            Some(_) = users.join_next() => {}
        }
    }
}
