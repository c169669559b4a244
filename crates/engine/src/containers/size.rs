//! `--storage-opt size=`: how much a container may write into its own files.

use std::path::Path;

use bollard_stubs::models::HostConfig;

use super::{Containers, Record};
use crate::quota::size_option;
use crate::{Error, Result};

const OPTION: &str = "--storage-opt size";

impl Containers {
    /// The size asked for, if it can be enforced here.
    pub(super) async fn checked_size(&self, host: &HostConfig) -> Result<Option<u64>> {
        let Some(bytes) = size_option(host.storage_opt.iter().flatten())? else { return Ok(None) };
        if self.images.copies() {
            return Err(Error::invalid(format!(
                "{OPTION} needs overlay: here containers get plain copies of their images (--storage=copy)"
            )));
        }
        let quotas = self.quotas.clone();
        crate::blocking(move || quotas.check(OPTION)).await?;
        Ok(Some(bytes))
    }

    /// Limits a new container's own files. Overlay moves files between the two directories: one project has both.
    pub(super) async fn limit_size(&self, dir: &Path, bytes: u64) -> Result<()> {
        let (quotas, upper, work) = (self.quotas.clone(), dir.join("upper"), dir.join("work"));
        crate::blocking(move || quotas.limit(&[&upper, &work], bytes)).await
    }

    /// What the limit of a container's files goes by. Blocks.
    pub(super) fn size_project(&self, record: &Record) -> Option<u32> {
        record.host_config.storage_opt.as_ref().filter(|options| !options.is_empty())?;
        crate::quota::project_of(&self.dir(&record.id).join("upper"))
    }
}
