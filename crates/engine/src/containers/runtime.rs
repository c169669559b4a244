//! Whether a container's OCI runtime can do what is asked of it.

use bollard_stubs::models::HostConfig;

use super::Containers;
use crate::{Error, Result};

impl Containers {
    /// Whether the runtime is one that there is, and can do what is asked for.
    pub(super) fn check_runtime(&self, host: &HostConfig) -> Result<()> {
        if self.runtimes.choose(host.runtime.as_deref())?.is_none() {
            return Ok(());
        }
        let own_only = |what: &str| {
            Err(Error::not_implemented(format!(
                "{what} is built for this engine's own runtime only: ask for it with --runtime {}",
                crate::runtimes::OWN
            )))
        };
        if self.config.userns.is_some() && host.userns_mode.as_deref() != Some("host") {
            return own_only("--userns-remap");
        }
        let shared = |mode: Option<&str>| matches!(mode, Some("shared" | "rshared"));
        let mounts = host.mounts.iter().flatten().filter_map(|mount| mount.bind_options.as_ref());
        let mut modes = mounts.filter_map(|bind| bind.propagation.map(|mode| mode.to_string()));
        let mut binds = host
            .binds
            .iter()
            .flatten()
            .filter_map(|bind| bind.split(':').nth(2))
            .flat_map(|mode| mode.split(','));
        if modes.any(|mode| shared(Some(&mode))) || binds.any(|mode| shared(Some(mode))) {
            return own_only("a mount that is shared with the host");
        }
        Ok(())
    }
}
