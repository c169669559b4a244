//! The result as an image of the store: layers, configuration and history as BuildKit writes them.
//!
//! Invariant: a step that was cached keeps its layer and its time, so that the same build gives the same image.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use brigantine_image::{Descriptor, Digest, History, Lease, Reference};

use crate::Built;
use crate::convert::Plan;
use crate::error::{Context, Result};
use crate::graph::VertexId;
use crate::snapshot::Layer;
use crate::solver::{Output, Solver};

/// Makes the image of a target. Blocks.
#[expect(clippy::too_many_arguments, reason = "everything an image is made of")]
pub(crate) fn image(
    solver: &Solver,
    lease: &Lease,
    plan: &Plan,
    target: &Output,
    steps: &BTreeMap<VertexId, Arc<Output>>,
    bases: &HashMap<String, Descriptor>,
    epoch: Option<i64>,
    tags: Vec<Reference>,
) -> Result<Built> {
    let what = || "make the image".to_owned();
    let mut descriptors = Vec::new();
    let mut diff_ids: Vec<Digest> = Vec::new();
    for layer in &target.layers {
        let (diff_id, descriptor) = match layer {
            Layer::Image(diff_id) => match bases.get(diff_id.as_str()) {
                Some(descriptor) => (diff_id.clone(), descriptor.clone()),
                None => (diff_id.clone(), solver.store.ensure_blob(lease, diff_id).doing(what)?),
            },
            Layer::Snap(snap) => {
                let diff_id = snap.adopt(&solver.store, lease)?;
                solver.records.adopted(&snap.id, diff_id.as_str())?;
                (diff_id.clone(), solver.store.ensure_blob(lease, &diff_id).doing(what)?)
            }
        };
        descriptors.push(descriptor);
        diff_ids.push(diff_id);
    }
    let mut config = plan.config.clone();
    config.rootfs.diff_ids = diff_ids;
    let mut last = config.created.clone();
    for item in &plan.history {
        let step = item.vertex.and_then(|vertex| steps.get(&vertex));
        let empty_layer = step.is_none_or(|output| output.own.is_none());
        if let Some(seconds) = epoch {
            last = Some(time(seconds.saturating_mul(1_000_000_000)));
        } else if let Some(output) = step.filter(|output| output.created > 0) {
            let made = time(output.created);
            if last
                .as_deref()
                .and_then(|text| text.parse::<jiff::Timestamp>().ok())
                .is_none_or(|at| at.as_nanosecond() <= i128::from(output.created))
            {
                last = Some(made);
            }
        }
        config.history.push(History {
            created: last.clone(),
            author: item.author.clone(),
            created_by: Some(item.created_by.clone()),
            comment: Some(item.comment.clone()),
            empty_layer,
        });
    }
    config.created = last;
    let mut replaced = Vec::new();
    for tag in &tags {
        if let Ok(id) = solver.store.resolve_id(&tag.to_string()) {
            replaced.push(id);
        }
    }
    let image = solver.store.add_built(lease, &config, &descriptors, tags).doing(what)?;
    replaced.retain(|id| *id != image.id);
    Ok(Built { image: Some(image), replaced })
}

/// RFC 3339 of nanoseconds since the epoch.
fn time(nanos: i64) -> String {
    jiff::Timestamp::from_nanosecond(i128::from(nanos))
        .map_or_else(|_| String::new(), |time| time.to_string())
}
