//! Removing what is not needed any more.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Containers, Status};
use crate::own::Own;
use crate::{Class, Error, Filters, Result};

/// The `until` filter: a moment, or how long ago (`24h`, `10m`).
pub(super) fn until(filters: &Filters) -> Result<Option<Timestamp>> {
    let Some(text) = filters.single("until")? else { return Ok(None) };
    let wrong = || Error::invalid(format!("invalid until filter: {text}"));
    if let Some(ago) = duration(text) {
        return Timestamp::now().checked_sub(ago).map(Some).map_err(|_out_of_range| wrong());
    }
    crate::clock::parse_moment(text).map_err(|_bad| wrong())
}

/// Go's `1h30m`.
fn duration(text: &str) -> Option<jiff::SignedDuration> {
    let mut total = 0_f64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total += number
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    (!text.is_empty()).then(|| jiff::SignedDuration::try_from_secs_f64(total).ok())?
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_in_gos_notation() {
        assert_eq!(duration("1h30m").unwrap().as_secs(), 5400);
        assert_eq!(duration("1.5s").unwrap().as_millis(), 1500);
        for bad in ["", "1", "h", "1d", "2026-01-01"] {
            assert!(duration(bad).is_none(), "{bad:?}");
        }
    }
}
