//! Writing what a build knows to caches elsewhere.
//!
//! Invariant: only results of steps, the keys they are found by and the times they were made go out: no secret, no
//! cache mount, no part of a context that a step has not taken. A layer that the place has already is not compressed
//! or sent again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brigantine_image::{Descriptor, Digest, Encoding, Lease, Platform, Store, media};
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::mpsc;

use super::form::{
    CONFIG, CREATED_AT, Config, Layer as ListedLayer, Own, Record, Top, UNCOMPRESSED, VERSION,
};
use super::import::{blobs_of, note};
use super::sink::Sink;
use super::{CachePlace, CacheTo};
use crate::access::Access;
use crate::error::{Context as _, Error, Result, invalid};
use crate::graph::{Graph, Op, VertexId};
use crate::snapshot::Layer;
use crate::solver::{Output, Solver, blocking};
use crate::{Event, Side, send};

/// One step's result.
#[derive(Debug, Clone)]
pub(crate) struct Gathered {
    /// What stands for it in the keys of others.
    identity: String,
    keys: Vec<String>,
    /// All it stands on, bottom first, as far as this build made it.
    chain: Vec<Digest>,
    empty: bool,
    /// Nanoseconds since the epoch.
    created: i64,
}

/// The steps a cache is made of: all there are below the targets, or only those whose file systems the results are.
fn chosen(graph: &Graph, targets: &[VertexId], all: bool) -> Vec<VertexId> {
    let mut seen = HashSet::new();
    let mut waiting = targets.to_vec();
    while let Some(id) = waiting.pop() {
        if !seen.insert(id) {
            continue;
        }
        let vertex = graph.get(id);
        if all {
            waiting.extend(&vertex.inputs);
        } else if matches!(vertex.op, Op::Run(_) | Op::Files(_)) {
            waiting.extend(vertex.inputs.first());
        }
    }
    let mut steps: Vec<VertexId> =
        seen.into_iter().filter(|id| matches!(graph.get(*id).op, Op::Run(_) | Op::Files(_))).collect();
    steps.sort_unstable();
    steps
}

impl Solver {
    /// What is known of a step's result; `None` of one that is in the cache no more. Blocks.
    fn gather(&self, lease: &Lease, output: &Output) -> Result<Option<Gathered>> {
        let Some(record) = self.records.find(&output.key)? else { return Ok(None) };
        let keys = self.records.keys_of(&record.id)?;
        let mut chain = Vec::new();
        for layer in &output.layers {
            if let Layer::Snap(snap) = layer {
                let diff_id = snap.adopt(&self.store, lease)?;
                self.records.adopted(&snap.id, diff_id.as_str())?;
                chain.push(diff_id);
            }
        }
        Ok(Some(Gathered {
            identity: record.identity,
            keys,
            chain,
            empty: output.own.is_none(),
            created: record.created,
        }))
    }
}

impl Gathered {
    fn record(&self, layer: Option<usize>) -> Record {
        let top = |layer: usize| Top {
            layer: i64::try_from(layer).unwrap_or(-1),
            created: crate::export::time(self.created),
        };
        Record {
            digest: format!("sha256:{}", self.identity),
            results: layer.map(top).into_iter().collect(),
            own: Some(Own {
                version: VERSION,
                architecture: Platform::host().architecture,
                keys: self.keys.clone(),
                empty: self.empty,
            }),
        }
    }
}

/// What an image's configuration says of its own layers, each with the key of its step's definition; `None` where no step
/// made any. Other keys depend on what the engine has seen before: the image shall not. Blocks.
pub(crate) fn inline(
    solver: &Solver,
    lease: &Lease,
    steps: &[(&Arc<Output>, &String)],
    diff_ids: &[Digest],
) -> Result<Option<String>> {
    let mut records = Vec::new();
    for (output, definition) in steps {
        let Some(found) = solver.gather(lease, output)? else { continue };
        let (identity, keys) = ((*definition).clone(), vec![(*definition).clone()]);
        let found = Gathered { identity, keys, ..found };
        let top = found.chain.last();
        let place = top.and_then(|top| diff_ids.iter().rposition(|known| known == top));
        if found.empty || place.is_some() {
            records.push(found.record(place));
        }
    }
    if records.is_empty() {
        return Ok(None);
    }
    let raw = serde_json::to_vec(&records)
        .map_err(|error| Error::Executor(format!("describe the cache of an image: {error}")))?;
    Ok(Some(STANDARD.encode(raw)))
}

/// The steps whose layers an image of `target` has.
pub(crate) fn of_image(graph: &Graph, target: VertexId) -> Vec<VertexId> {
    chosen(graph, &[target], false)
}

/// Writes the caches of one build.
pub(crate) struct Exporter<'b> {
    pub solver: Arc<Solver>,
    pub access: &'b Access,
    pub lease: Lease,
    pub graph: &'b Graph,
    pub targets: &'b [VertexId],
    /// The blobs of layers that are here compressed, by diff id.
    pub blobs: HashMap<String, Descriptor>,
    pub events: &'b mpsc::Sender<Event>,
}

impl Exporter<'_> {
    /// Writes one cache. `result` tells what became of a step.
    pub async fn write<F>(&self, to: &CacheTo, result: impl Fn(VertexId) -> F) -> Result<()>
    where
        F: Future<Output = Result<Option<Arc<Output>>>>,
    {
        if to.place == CachePlace::Inline {
            return Ok(());
        }
        let name = format!("exporting cache to {}", to.shown());
        let tell = |news| send(self.events, Event::Side { name: name.clone(), news });
        tell(Side::Began).await;
        let written = self.whole(to, &name, result).await;
        match written {
            Err(error) if to.ignore_error => {
                note(self.events, format!("the cache was not written to {}: {}", to.shown(), error.report()))
                    .await;
                tell(Side::Ended(None)).await;
                Ok(())
            }
            written => {
                tell(Side::Ended(written.as_ref().err().map(Error::report))).await;
                written
            }
        }
    }

    async fn whole<F>(&self, to: &CacheTo, name: &str, result: impl Fn(VertexId) -> F) -> Result<()>
    where
        F: Future<Output = Result<Option<Arc<Output>>>>,
    {
        let mut found = Vec::new();
        for id in chosen(self.graph, self.targets, to.all) {
            // A step that was not needed, and is nowhere to be had.
            let Some(output) = result(id).await? else { continue };
            let (solver, lease) = (Arc::clone(&self.solver), self.lease.clone());
            found.extend(blocking(move || solver.gather(&lease, &output)).await?);
        }
        if found.is_empty() {
            note(self.events, format!("the build has no steps: nothing is written to {}", to.shown())).await;
            return Ok(());
        }
        let sink = Sink::open(&to.place, self.access).await?;
        let there = self.there(&sink, to).await?;
        // A layer stands on what is below it: the same one may be listed twice.
        let mut places: HashMap<(Digest, i64), usize> = HashMap::new();
        let mut listed: Vec<(Digest, i64)> = Vec::new();
        let mut records = Vec::new();
        for one in &found {
            let mut top = None;
            for diff_id in &one.chain {
                let parent = top.map_or(-1, |top: usize| i64::try_from(top).unwrap_or(-1));
                let place = places.entry((diff_id.clone(), parent)).or_insert_with(|| {
                    listed.push((diff_id.clone(), parent));
                    listed.len() - 1
                });
                top = Some(*place);
            }
            records.push(one.record(top));
        }
        let created: HashMap<&Digest, i64> = found
            .iter()
            .filter(|one| !one.empty)
            .filter_map(|one| Some((one.chain.last()?, one.created)))
            .collect();
        let mut distinct: Vec<Digest> = listed.iter().map(|(diff_id, _)| diff_id.clone()).collect();
        distinct.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
        distinct.dedup();
        let sent: HashMap<Digest, Descriptor> = futures_util::stream::iter(distinct)
            .map(|diff_id| async {
                let blob = self.layer(&sink, to, &there, &diff_id, name).await?;
                Ok::<_, Error>((diff_id, blob))
            })
            .buffer_unordered(3)
            .try_collect()
            .await?;
        let blob_of = |diff_id: &Digest| {
            sent.get(diff_id).ok_or_else(|| invalid(format!("layer {diff_id} of the cache was not written")))
        };
        let mut layers = Vec::new();
        let mut descriptors: Vec<Descriptor> = Vec::new();
        for (diff_id, parent) in &listed {
            let mut blob = blob_of(diff_id)?.clone();
            layers.push(ListedLayer { blob: blob.digest.to_string(), parent: *parent });
            if descriptors.iter().all(|known| known.digest != blob.digest) {
                blob.annotations = BTreeMap::from([(UNCOMPRESSED.to_owned(), diff_id.to_string())]);
                if let Some(created) = created.get(diff_id) {
                    blob.annotations.insert(CREATED_AT.to_owned(), crate::export::time(*created));
                }
                descriptors.push(blob);
            }
        }
        let config = serde_json::to_vec(&Config { layers, records })
            .map_err(|error| Error::Executor(format!("describe the cache: {error}")))?;
        let config = sink.document(CONFIG, config).await?;
        self.finish(&sink, to, config, descriptors).await
    }

    /// The layers of the cache that is there now, by diff id, as far as they are in the form that is wanted.
    async fn there(&self, sink: &Sink, to: &CacheTo) -> Result<HashMap<String, Descriptor>> {
        let Sink::Registry(repository) = sink else { return Ok(HashMap::new()) };
        // What cannot be read is written over.
        let Ok(Some(raw)) = repository.current().await else { return Ok(HashMap::new()) };
        let Ok(all) = blobs_of(&raw) else { return Ok(HashMap::new()) };
        let wanted = media_type(to);
        Ok(all
            .into_values()
            .filter(|(descriptor, _)| descriptor.media_type == wanted)
            .map(|(descriptor, diff_id)| (diff_id.to_string(), descriptor))
            .collect())
    }

    /// Sees to it that a layer is there, in the form that is wanted.
    async fn layer(
        &self,
        sink: &Sink,
        to: &CacheTo,
        there: &HashMap<String, Descriptor>,
        diff_id: &Digest,
        name: &str,
    ) -> Result<Descriptor> {
        if let (Some(known), Sink::Registry(repository)) = (there.get(diff_id.as_str()), sink)
            && repository.has(&known.digest).await.unwrap_or(false)
        {
            return Ok(Descriptor { annotations: BTreeMap::new(), ..known.clone() });
        }
        let (store, lease, wanted) = (self.solver.store.clone(), self.lease.clone(), diff_id.clone());
        let known =
            self.blobs.get(diff_id.as_str()).filter(|known| known.media_type == media_type(to)).cloned();
        let (encoding, oci) = (to.encoding, to.oci);
        let blob = blocking(move || compressed(&store, &lease, &wanted, known, encoding, oci)).await?;
        let what = format!("writing layer {}", blob.digest);
        let count = |done| {
            let news = Side::Count { what: what.clone(), current: blob.size, total: Some(blob.size), done };
            send(self.events, Event::Side { name: name.to_owned(), news })
        };
        count(false).await;
        sink.blob(&self.solver.store, &blob, None).await?;
        count(true).await;
        Ok(blob)
    }

    async fn finish(
        &self,
        sink: &Sink,
        to: &CacheTo,
        config: Descriptor,
        layers: Vec<Descriptor>,
    ) -> Result<()> {
        let (media_type, document) = if to.manifest {
            let kind = media::OCI_MANIFEST;
            (
                kind,
                serde_json::json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers }),
            )
        } else {
            let kind = if to.oci { media::OCI_INDEX } else { media::DOCKER_INDEX };
            let all: Vec<&Descriptor> = layers.iter().chain([&config]).collect();
            (kind, serde_json::json!({ "schemaVersion": 2, "mediaType": kind, "manifests": all }))
        };
        let raw = document.to_string().into_bytes();
        let manifest = sink.manifest(media_type, raw, &to.shown()).await?;
        if let Sink::Folder(_, store) = sink {
            let manifest = Box::new(manifest);
            send(self.events, Event::CacheWritten { store: store.clone(), manifest }).await;
        }
        Ok(())
    }
}

fn media_type(to: &CacheTo) -> &'static str {
    let plain = if to.oci { media::OCI_LAYER } else { media::DOCKER_LAYER };
    media::compressed(plain, to.encoding).unwrap_or(plain)
}

/// A layer's blob in the form that is wanted. Blocks.
fn compressed(
    store: &Store,
    lease: &Lease,
    diff_id: &Digest,
    known: Option<Descriptor>,
    encoding: Encoding,
    oci: bool,
) -> Result<Descriptor> {
    let what = || format!("compress layer {diff_id}");
    if let Some(known) = known {
        lease.hold(&known.digest).doing(what)?;
        if store.content().has(&known.digest) {
            return Ok(Descriptor { annotations: BTreeMap::new(), ..known });
        }
    }
    let mut plain = store.ensure_blob(lease, diff_id).doing(what)?;
    if !oci {
        media::DOCKER_LAYER.clone_into(&mut plain.media_type);
    }
    store.compress_layer(lease, &plain, encoding, &mut |_read| {}).doing(what)
}
