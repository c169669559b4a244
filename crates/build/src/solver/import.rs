//! Steps that a cache from elsewhere has.

use std::sync::Arc;

use super::known::{Made, Step};
use super::shared::Keys;
use super::{Job, Output, blocking};
use crate::cache::{Imports, note};
use crate::error::Result;
use crate::snapshot::Layer;

impl Job {
    /// A step's result out of a cache from elsewhere, from then on one of ours: under the keys that were worked out
    /// here, whatever else the cache says it is. What cannot be had is a miss.
    pub(super) async fn imported(
        &self,
        name: &str,
        keys: &Keys,
        below: &[Layer],
    ) -> Result<Option<Arc<Output>>> {
        let Some(known) = self.imports.find(&keys.all) else { return Ok(None) };
        let layer = match self.imports.bring(&known, &self.solver.store, &self.lease).await {
            Ok(layer) => layer,
            Err(error) => {
                self.imports.forget(&keys.all);
                let text = format!(
                    "{name} runs, for the cache {} does not have it any more: {}",
                    known.place(),
                    error.report()
                );
                note(&self.events, text).await;
                return Ok(None);
            }
        };
        let (solver, below) = (Arc::clone(&self.solver), below.to_vec());
        let (name, identity) = (name.to_owned(), keys.identity.clone());
        let mut all = keys.all.clone();
        all.extend((!keys.definition.is_empty()).then(|| keys.definition.clone()));
        blocking(move || {
            // Another build may have been quicker.
            for key in &all {
                if let Some(output) = solver.known(key, &below)? {
                    return Ok(Some(Arc::new(output)));
                }
            }
            let keys: Vec<&str> = all.iter().map(String::as_str).collect();
            let made = Made::Layer(layer);
            let step = Step {
                id: crate::ids::new(),
                identity: &identity,
                name: &name,
                below: &below,
                keys: &keys,
                created: known.created,
            };
            let mut output = solver.record(made, step)?;
            output.cached = true;
            Ok(Some(Arc::new(output)))
        })
        .await
    }

    pub(crate) fn imports(&self) -> &Imports {
        &self.imports
    }
}
