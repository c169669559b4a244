//! Removing what is not needed any more.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Containers, Status};
use crate::clock::go_duration;
use crate::own::Own;
use crate::{Class, Error, Filters, Result};

/// The `until` filter: a moment, or how long ago (`24h`, `10m`).
pub(super) fn until(filters: &Filters) -> Result<Option<Timestamp>> {
    let Some(text) = filters.single("until")? else { return Ok(None) };
    let wrong = || Error::invalid(format!("invalid until filter: {text}"));
    if let Some(ago) = go_duration(text) {
        return Timestamp::now().checked_sub(ago).map(Some).map_err(|_out_of_range| wrong());
    }
    crate::clock::parse_moment(text).map_err(|_bad| wrong())
}

impl Containers {
    /// Removes all stopped containers, or a project's, that pass `filters`.
    pub async fn prune(self: &Arc<Self>, filters: &Filters, project: Option<&str>) -> Result<Value> {
        filters.only(&["label", "label!", "until"])?;
        let until = until(filters)?;
        let mut deleted = Vec::new();
        let mut reclaimed = 0;
        for container in self.all() {
            if project.is_some() && container.project.as_deref() != project {
                continue;
            }
            let wanted = container.with(|inner| {
                let record = &inner.record;
                inner.live.is_none()
                    && matches!(record.state.status, Status::Created | Status::Exited | Status::Dead)
                    && until.is_none_or(|until| record.created <= until)
                    && filters.labels("label", |name| record.label(name))
                    && !(filters.contains("label!") && filters.labels("label!", |name| record.label(name)))
            });
            if !wanted {
                continue;
            }
            let dir = self.dir(&container.id);
            let size = crate::blocking(move || Ok(Own::usage(&dir))).await?;
            match self.remove(&container.id, false, false).await {
                Ok(()) => {
                    reclaimed += size;
                    deleted.push(container.id.clone());
                }
                Err(error) if matches!(error.class(), Class::Conflict | Class::NotFound) => {}
                Err(error) => return Err(error),
            }
        }
        let deleted = if deleted.is_empty() { Value::Null } else { json!(deleted) };
        Ok(json!({ "ContainersDeleted": deleted, "SpaceReclaimed": reclaimed }))
    }
}
