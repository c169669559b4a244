//! Containers as a project's socket sees them: those of the project and no others.

use std::sync::Arc;

use brigantine_image::Image;

use super::{Container, Containers, Record};
use crate::project::Confinement;
use crate::{Error, Result};

impl Containers {
    /// As [`Containers::find`], among the containers of a project if one is given.
    pub(super) fn find_within(&self, reference: &str, project: Option<&str>) -> Result<Arc<Container>> {
        self.find_among(reference, |one| project.is_none() || one.project.as_deref() == project)
    }

    /// The id behind a name, id or prefix, among the containers of a project.
    pub fn resolve_within(&self, reference: &str, project: &str) -> Result<String> {
        Ok(self.find_within(reference, Some(project))?.id.clone())
    }

    /// How many containers of a project are running, paused and stopped.
    pub fn counts_within(&self, project: &str) -> (usize, usize, usize) {
        self.count(|container| container.project.as_deref() == Some(project))
    }

    /// An image that a request names, if it may be used there.
    pub(super) async fn image_within(&self, name: &str, within: Option<&Confinement>) -> Result<Image> {
        let Some(within) = within else { return self.images.resolve(name).await };
        self.images.resolve_within(name, &within.images).await
    }

    /// Of a container made through a project's socket: its networks are the project's, or the default one, or none.
    /// Asked again at each start, because networks are named by name.
    pub(super) fn check_confined(&self, record: &Record) -> Result<()> {
        if !record.confined || record.network_mode().starts_with("container:") {
            return Ok(());
        }
        let project = record.project.as_deref().unwrap_or_default();
        for name in record.endpoints.keys().filter(|name| !matches!(name.as_str(), "bridge" | "none")) {
            if self.networks.find(name).ok().and_then(|network| network.project()).as_deref() != Some(project)
            {
                return Err(Error::not_found(format!("network {name} not found")));
            }
        }
        Ok(())
    }
}
