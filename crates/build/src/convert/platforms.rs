//! One plan for several platforms: the Dockerfile is converted for each, and what they have in common is one vertex.

use std::collections::HashMap;

use brigantine_image::Platform;

use super::{HistoryItem, Options, Plan, Resolver, Step, Variant, convert};
use crate::dockerfile::Dockerfile;
use crate::error::Result;
use crate::graph::{Graph, VertexId};
use crate::pattern::Ignore;

/// Makes the plan of a build for all platforms that are asked for, or for the host's.
pub async fn convert_all(
    file: &Dockerfile,
    name: &str,
    text: &str,
    options: &Options,
    ignore: &Ignore,
    resolver: &dyn Resolver,
) -> Result<Plan> {
    let mut plan = convert(file, name, text, options, ignore, resolver).await?;
    let Some(first) = &options.platform else { return Ok(plan) };
    as_asked(&mut plan.config, first);
    if options.more_platforms.is_empty() {
        return Ok(plan);
    }
    let label =
        |step: Step, platform: &Platform| Step { text: format!("[{platform}] {}", step.text), ..step };
    let mut graph = Graph::default();
    let places = merge(&mut graph, plan.graph);
    let place = |id: VertexId| places.get(&id).copied().unwrap_or(id);
    plan.graph = graph;
    plan.target = place(plan.target);
    for item in &mut plan.history {
        item.vertex = item.vertex.map(place);
    }
    plan.scans.values_mut().for_each(|vertex| *vertex = place(*vertex));
    let moved = |step: Step| Step { vertex: step.vertex.map(place), ..label(step, first) };
    plan.steps = plan.steps.into_iter().map(moved).collect();
    for platform in &options.more_platforms {
        let own = Options { platform: Some(platform.clone()), ..options.clone() };
        let mut other = convert(file, name, text, &own, ignore, resolver).await?;
        as_asked(&mut other.config, platform);
        let places = merge(&mut plan.graph, other.graph);
        let place = |id: VertexId| places.get(&id).copied().unwrap_or(id);
        plan.steps.extend(other.steps.into_iter().map(|step| {
            let step = label(step, platform);
            Step { vertex: step.vertex.map(place), ..step }
        }));
        let moved = |item: HistoryItem| HistoryItem { vertex: item.vertex.map(place), ..item };
        plan.others.push(Variant {
            platform: platform.clone(),
            target: place(other.target),
            config: other.config,
            history: other.history.into_iter().map(moved).collect(),
            scans: other.scans.into_iter().map(|(name, vertex)| (name, place(vertex))).collect(),
        });
        for warning in other.warnings {
            if !plan.warnings.contains(&warning) {
                plan.warnings.push(warning);
            }
        }
        plan.refused |= other.refused;
        plan.unconsumed.retain(|name| other.unconsumed.contains(name));
    }
    Ok(plan)
}

/// An image for a platform says so, whatever its base was for.
fn as_asked(config: &mut brigantine_image::ImageConfig, platform: &Platform) {
    config.os.clone_from(&platform.os);
    config.architecture.clone_from(&platform.architecture);
    config.variant.clone_from(&platform.variant);
}

/// Puts what `other` has and `graph` has not into `graph`; tells where each vertex is there.
fn merge(graph: &mut Graph, other: Graph) -> HashMap<VertexId, VertexId> {
    let mut places = HashMap::new();
    for (number, mut vertex) in other.vertices.into_iter().enumerate() {
        for input in &mut vertex.inputs {
            *input = places.get(input).copied().unwrap_or(*input);
        }
        let same = graph.vertices.iter().position(|known| {
            known.inputs == vertex.inputs && known.no_cache == vertex.no_cache && known.op == vertex.op
        });
        let place = same.map_or_else(|| graph.add(vertex), VertexId);
        places.insert(VertexId(number), place);
    }
    places
}
