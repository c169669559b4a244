//! The result as an image of the store: layers, configuration and history as BuildKit writes them; for several
//! platforms, or with attestations, an index of such images.
//!
//! Invariant: a step that was cached keeps its layer and its time, so that the same build gives the same image. What
//! an index names is final: its layers are compressed here, and a push changes nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use brigantine_image::{
    Descriptor, Digest, Encoding, History, Image, ImageConfig, Index, Lease, NewImage, Platform, Reference,
    media, open_union,
};
use brigantine_sbom::Subject;

use crate::attest::{self, Known, Predicate};
use crate::convert::{HistoryItem, Plan};
use crate::error::{Context, Result, invalid};
use crate::graph::VertexId;
use crate::snapshot::{Layer, hold};
use crate::solver::{Output, Solver};
use crate::wanted::{Export, Level};

/// What an image is made of.
pub(crate) struct Exporting<'b> {
    pub solver: &'b Solver,
    pub lease: &'b Lease,
    pub plan: &'b Plan,
    /// Results of all vertices that an image or its history needs.
    pub results: &'b BTreeMap<VertexId, Arc<Output>>,
    pub definitions: &'b BTreeMap<VertexId, String>,
    /// The blobs of base images' layers, by diff id.
    pub bases: &'b HashMap<String, Descriptor>,
    pub epoch: Option<i64>,
    pub tags: Vec<Reference>,
    pub wanted: &'b Export,
    pub known: Known<'b>,
}

/// The image of one platform, not written yet.
struct Made {
    platform: Platform,
    config: ImageConfig,
    layers: Vec<Descriptor>,
    /// What the file system consists of.
    files: Vec<Layer>,
}

impl Exporting<'_> {
    /// Makes the image of a target, or the index of its platforms' images. Blocks.
    pub fn run(self) -> Result<(Image, Vec<Digest>)> {
        let what = || "make the image".to_owned();
        let mut replaced: Vec<Digest> =
            self.tags.iter().filter_map(|tag| self.solver.store.resolve_id(&tag.to_string()).ok()).collect();
        if self.wanted.rewrite_timestamps && self.epoch.is_none() {
            return Err(invalid(
                "rewrite-timestamp needs the time to be given: --build-arg SOURCE_DATE_EPOCH=SECONDS",
            ));
        }
        let plan = self.plan;
        let mut all = vec![self.made(plan.config.platform(), plan.target, &plan.config, &plan.history)?];
        for other in &plan.others {
            all.push(self.made(other.platform.clone(), other.target, &other.config, &other.history)?);
        }
        let new = if all.len() > 1 || self.wanted.needs_index() || self.always_index() {
            self.index(all)?
        } else {
            self.single(all)?
        };
        let image = self.solver.store.add_image(self.lease, new).doing(what)?;
        replaced.retain(|id| *id != image.id);
        Ok((image, replaced))
    }

    /// Whether one platform alone is to have an index, too.
    fn always_index(&self) -> bool {
        let asked = self.known.options.build_args.get("BUILDKIT_MULTI_PLATFORM").and_then(Option::as_deref);
        matches!(asked, Some("1" | "true"))
    }

    fn single(&self, mut all: Vec<Made>) -> Result<NewImage> {
        let elsewhere = |level| !self.wanted.annotations(level, None).is_empty();
        if elsewhere(Level::Index) || elsewhere(Level::IndexDescriptor) {
            return Err(invalid(
                "index annotations need an index: an image of one platform without attestations has none",
            ));
        }
        let made = all.remove(0);
        let annotations = self.wanted.annotations(Level::Manifest, Some(&made.platform));
        let store = &self.solver.store;
        let manifest = store
            .put_manifest(self.lease, &made.config, &made.layers, &annotations)
            .doing(|| "make the image".to_owned())?;
        Ok(NewImage { manifest, names: self.tags.clone(), parent: None, index: None })
    }

    fn index(&self, all: Vec<Made>) -> Result<NewImage> {
        let what = || "make the index".to_owned();
        let store = &self.solver.store;
        let (mut images, mut attestations) = (Vec::new(), Vec::new());
        for made in &all {
            let mut layers = Vec::new();
            for layer in &made.layers {
                let packed = store.compress_layer(self.lease, layer, Encoding::GZIP, &mut |_read| {});
                layers.push(packed.doing(|| "compress a layer".to_owned())?);
            }
            let annotations = self.wanted.annotations(Level::Manifest, Some(&made.platform));
            let mut manifest =
                store.put_manifest(self.lease, &made.config, &layers, &annotations).doing(what)?;
            attestations.extend(self.attestation(made, &manifest)?);
            manifest.annotations = self.wanted.annotations(Level::ManifestDescriptor, Some(&made.platform));
            manifest.platform = Some(made.platform.clone());
            images.push(manifest);
        }
        let host = Platform::host();
        let main = images.iter().find(|image| image.platform.as_ref().is_some_and(|p| host.accepts(p)));
        let manifest =
            main.or(images.first()).cloned().ok_or_else(|| invalid("there is no image to make"))?;
        images.extend(attestations);
        let index = Index {
            schema_version: 2,
            media_type: Some(media::OCI_INDEX.to_owned()),
            artifact_type: None,
            manifests: images,
            subject: None,
            annotations: self.wanted.annotations(Level::Index, None),
        };
        let mut index = store.put_index(self.lease, &index).doing(what)?;
        index.annotations = self.wanted.annotations(Level::IndexDescriptor, None);
        Ok(NewImage {
            manifest: Descriptor { platform: None, ..manifest },
            names: self.tags.clone(),
            parent: None,
            index: Some(index),
        })
    }

    /// What is to be said of a platform's files.
    fn predicates(&self, platform: &Platform, files: &[Layer]) -> Result<Vec<Predicate>> {
        let mut predicates = Vec::new();
        if self.wanted.sbom {
            predicates.push(attest::sbom(None, self.sbom(self.result_subject(platform), files)?));
            for (name, vertex) in self.plan.scans_of(platform) {
                let Some(output) = self.results.get(vertex) else { continue };
                let subject = self.subject(format!("sbom-{name}"), String::new());
                predicates.push(attest::sbom(Some(name), self.sbom(subject, &output.layers)?));
            }
        }
        if let Some(mode) = self.wanted.provenance {
            predicates.push(self.known.provenance(mode));
        }
        Ok(predicates)
    }

    /// Attestations as files beside a platform's own, with their names: in-toto statements about `subjects`.
    pub fn attestation_files(
        &self,
        platform: &Platform,
        files: &[Layer],
        subjects: &[serde_json::Value],
    ) -> Result<Vec<(String, Vec<u8>)>> {
        let mut all = Vec::new();
        for predicate in self.predicates(platform, files)? {
            let name = format!("{}{}", self.wanted.attestation_prefix, predicate.file_name());
            let statement = format!("{:#}\n", predicate.statement(subjects));
            all.push((name, statement.into_bytes()));
        }
        Ok(all)
    }

    fn attestation(&self, made: &Made, manifest: &Descriptor) -> Result<Option<Descriptor>> {
        let predicates = self.predicates(&made.platform, &made.files)?;
        if predicates.is_empty() {
            return Ok(None);
        }
        let store = &self.solver.store;
        attest::write(store, self.lease, manifest, &made.platform, &self.tags, predicates).map(Some)
    }

    fn sbom(&self, subject: Subject, files: &[Layer]) -> Result<serde_json::Value> {
        let what = || format!("look through {} for packages", subject.name);
        let held = hold(&self.solver.store, &self.solver.mounts, self.lease, files)?;
        let root = open_union(&held.lowers).doing(what)?;
        let found = brigantine_sbom::scan(&root).doing(what)?;
        Ok(brigantine_sbom::spdx(&subject, &found))
    }

    fn result_subject(&self, platform: &Platform) -> Subject {
        let name = self.tags.first();
        let purl = name.map(|name| attest::purl(name, platform)).unwrap_or_default();
        self.subject(name.map_or_else(|| "image".to_owned(), Reference::familiar), purl)
    }

    fn subject(&self, name: String, purl: String) -> Subject {
        let seconds = self.epoch.unwrap_or(self.known.ended / 1_000_000_000);
        Subject {
            name,
            purl,
            created: time(seconds.saturating_mul(1_000_000_000)),
            tool: format!("brigantine-{}", env!("CARGO_PKG_VERSION")),
        }
    }

    /// One platform's layers, configuration and history.
    fn made(
        &self,
        platform: Platform,
        target: VertexId,
        config: &ImageConfig,
        history: &[HistoryItem],
    ) -> Result<Made> {
        let target_id = target;
        let target = self.results.get(&target).ok_or_else(|| invalid("the target was not made"))?;
        let (layers, diff_ids) = self.layers(target)?;
        let mut config = config.clone();
        // A base's is not its own.
        config.inline_cache = None;
        if self.wanted.inline_cache {
            let steps = crate::cache::of_image(&self.plan.graph, target_id);
            let known = |step| Some((self.results.get(step)?, self.definitions.get(step)?));
            let steps: Vec<_> = steps.iter().filter_map(known).collect();
            config.inline_cache = crate::cache::inline(self.solver, self.lease, &steps, &diff_ids)?;
        }
        config.rootfs.diff_ids = diff_ids;
        let epoch = self.epoch.map(|seconds| seconds.saturating_mul(1_000_000_000));
        if let Some(epoch) = epoch {
            // What the base brings is no younger, either.
            for line in &mut config.history {
                if line
                    .created
                    .as_deref()
                    .is_none_or(|text| nanos(text).is_none_or(|at| at > i128::from(epoch)))
                {
                    line.created = Some(time(epoch));
                }
            }
        }
        let mut last = config.created.clone();
        for item in history {
            let step = item.vertex.and_then(|vertex| self.results.get(&vertex));
            let empty_layer = step.is_none_or(|output| output.own.is_none());
            if let Some(epoch) = epoch {
                last = Some(time(epoch));
            } else if let Some(output) = step.filter(|output| output.created > 0)
                && last.as_deref().and_then(nanos).is_none_or(|at| at <= i128::from(output.created))
            {
                last = Some(time(output.created));
            }
            config.history.push(History {
                created: last.clone(),
                author: item.author.clone(),
                created_by: Some(item.created_by.clone()),
                comment: Some(item.comment.clone()),
                empty_layer,
            });
        }
        config.created = epoch.map(time).or(last);
        Ok(Made { platform, config, layers, files: target.layers.clone() })
    }

    fn layers(&self, target: &Output) -> Result<(Vec<Descriptor>, Vec<Digest>)> {
        let what = || "make the image".to_owned();
        let (solver, lease) = (self.solver, self.lease);
        let (mut descriptors, mut diff_ids) = (Vec::new(), Vec::new());
        for layer in &target.layers {
            let (diff_id, descriptor) = match layer {
                Layer::Image(diff_id) => match self.bases.get(diff_id.as_str()) {
                    Some(descriptor) => (diff_id.clone(), descriptor.clone()),
                    None => (diff_id.clone(), solver.store.ensure_blob(lease, diff_id).doing(what)?),
                },
                Layer::Snap(snap) => {
                    let diff_id = snap.adopt(&solver.store, lease)?;
                    solver.records.adopted(&snap.id, diff_id.as_str())?;
                    let descriptor = solver.store.ensure_blob(lease, &diff_id).doing(what)?;
                    match self.epoch.filter(|_| self.wanted.rewrite_timestamps) {
                        None => (diff_id, descriptor),
                        Some(epoch) => {
                            let clamped = solver.store.clamp_layer(lease, &descriptor, epoch);
                            let clamped = clamped.doing(|| "set the times of a layer's files".to_owned())?;
                            (clamped.digest.clone(), clamped)
                        }
                    }
                }
            };
            descriptors.push(descriptor);
            diff_ids.push(diff_id);
        }
        Ok((descriptors, diff_ids))
    }
}

fn nanos(text: &str) -> Option<i128> {
    text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_nanosecond)
}

/// RFC 3339 of nanoseconds since the epoch.
pub(crate) fn time(nanos: i64) -> String {
    jiff::Timestamp::from_nanosecond(i128::from(nanos))
        .map_or_else(|_| String::new(), |time| time.to_string())
}
