//! Manifests: read, pushed, removed.
//!
//! Invariants: a manifest is kept byte for byte; what it names was there when it was taken (but for its subject, and
//! layers that registries do not distribute), unless the registry takes sparse ones.

use std::sync::Arc;
use std::time::Duration;

use brigantine_image::model::{Descriptor, Document};
use brigantine_image::{Digest, media, valid_tag};
use bytes::BytesMut;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderName, LOCATION};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Deserialize;

use super::blobs::not_modified;
use super::library::StoredManifest;
use super::refusal::Refusal;
use super::reply::{DIGEST, Outcome, blocking, empty, full, set};
use super::route::Pointer;
use super::service::{Shared, header, query};
use super::storage::{ManifestRecord, NewManifest, Storage};
use super::uploads::over_quota;

const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
const TAG: HeaderName = HeaderName::from_static("oci-tag");
/// Tags that one push may set beside.
const MOST_TAGS: usize = 100;

/// `GET` and `HEAD /v2/<name>/manifests/<tag or digest>`.
pub(super) async fn get<B>(
    shared: &Arc<Shared>,
    name: String,
    pointer: Pointer,
    request: &Request<B>,
) -> Outcome {
    let found = match &shared.cache {
        Some(cache) => cache.manifest(shared, &name, &pointer).await?,
        None => {
            blocking({
                let (shared, name, pointer) = (Arc::clone(shared), name.clone(), pointer.clone());
                move || Ok(shared.library.manifest(&name, &pointer)?)
            })
            .await?
        }
    };
    let manifest = found.ok_or_else(|| Refusal::manifest_unknown(&pointer, &name))?;
    Ok(answer(manifest, request))
}

fn answer<B>(manifest: StoredManifest, request: &Request<B>) -> Response<super::reply::Body> {
    let mut answer = if not_modified(request, &manifest.digest) {
        empty(StatusCode::NOT_MODIFIED)
    } else {
        let mut answer = Response::new(full(manifest.raw.into()));
        set(&mut answer, CONTENT_TYPE, &manifest.media_type);
        answer
    };
    set(&mut answer, DIGEST, manifest.digest.as_str());
    set(&mut answer, ETAG, &format!("\"{}\"", manifest.digest));
    answer
}

/// `PUT /v2/<name>/manifests/<tag or digest>`.
pub(super) async fn put(
    shared: &Arc<Shared>,
    name: String,
    pointer: Pointer,
    request: Request<Incoming>,
) -> Outcome {
    let storage = Arc::clone(&shared.writable()?.storage);
    let mut tags = query(&request, "tag");
    if let Some(tag) = tags.iter().find(|tag| !valid_tag(tag)) {
        return Err(Refusal::manifest_invalid(format!("{tag:?} is not a tag")));
    }
    if tags.len() > MOST_TAGS {
        return Err(Refusal::new(
            StatusCode::URI_TOO_LONG,
            "UNSUPPORTED",
            format!("{} tags at once: {MOST_TAGS} are the most", tags.len()),
        ));
    }
    let declared = header(&request, CONTENT_TYPE)
        .map(|value| value.split(';').next().unwrap_or_default().trim().to_owned());
    let raw = read(request, shared.limits.manifest, shared.limits.patience).await?;
    let digest = match &pointer {
        Pointer::Tag(tag) => {
            let extra = std::mem::take(&mut tags);
            tags = vec![tag.clone()];
            tags.extend(extra);
            Digest::sha256(&raw)
        }
        Pointer::Digest(expected) => {
            let actual = Digest::of(expected.algorithm(), &raw);
            if actual != *expected {
                return Err(Refusal::digest_invalid(format!(
                    "the manifest's digest is {actual}, not {expected}"
                )));
            }
            actual
        }
    };
    let described = Described::read(&raw, declared.as_deref())?;
    let extra_tags = matches!(pointer, Pointer::Digest(_)).then(|| tags.clone()).unwrap_or_default();
    let subject = described.subject.clone();
    blocking({
        let (name, digest) = (name.clone(), digest.clone());
        let (sparse, quota) = (shared.sparse, shared.quotas.of(&name));
        move || keep(&storage, &name, &digest, &raw, described, &tags, sparse, quota)
    })
    .await?;
    let mut answer = empty(StatusCode::CREATED);
    set(&mut answer, LOCATION, &format!("/v2/{name}/manifests/{digest}"));
    set(&mut answer, DIGEST, digest.as_str());
    if let Some(subject) = subject {
        set(&mut answer, SUBJECT, subject.as_str());
    }
    for tag in extra_tags {
        set(&mut answer, TAG, &tag);
    }
    Ok(answer)
}

#[expect(clippy::too_many_arguments, reason = "one push, all of it")]
fn keep(
    storage: &Storage,
    name: &str,
    digest: &Digest,
    raw: &[u8],
    described: Described,
    tags: &[String],
    sparse: bool,
    quota: Option<u64>,
) -> Result<(), Refusal> {
    // From the look at what it names until it names it, nothing of that is collected.
    let _entering = storage.entering();
    for named in &described.blobs {
        storage.expect(&named.digest);
        let there = storage.stat_blob(name, &named.digest)?;
        check_named(name, "blob", named, there, sparse)?;
    }
    for named in &described.manifests {
        storage.expect(&named.digest);
        let there = storage.record(name, &named.digest)?.map(|record| record.size);
        check_named(name, "manifest", named, there, sparse)?;
    }
    let size = raw.len() as u64;
    if let Some(quota) = quota
        && !storage.has_manifest(name, digest)
        && storage.usage(name)? + size > quota
    {
        return Err(over_quota());
    }
    let referrer = described.subject.is_some().then(|| described.as_referrer(digest, size));
    let record = ManifestRecord { media_type: described.media_type, size, subject: described.subject };
    storage.put_manifest(name, &NewManifest { digest, raw, record, referrer, tags })?;
    Ok(())
}

fn check_named(
    name: &str,
    what: &str,
    named: &Descriptor,
    there: Option<u64>,
    sparse: bool,
) -> Result<(), Refusal> {
    match there {
        Some(size) if size != named.size => Err(Refusal::manifest_invalid(format!(
            "{what} {} has {size} bytes, not {} as the manifest says",
            named.digest, named.size
        ))),
        None if !sparse => Err(Refusal::new(
            StatusCode::NOT_FOUND,
            "MANIFEST_BLOB_UNKNOWN",
            format!("the manifest names {what} {}, which repository {name} does not have", named.digest),
        )),
        _ => Ok(()),
    }
}

/// Reads a manifest's body.
async fn read(request: Request<Incoming>, limit: usize, patience: Duration) -> Result<Vec<u8>, Refusal> {
    let too_large = || {
        Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "SIZE_INVALID",
            format!("the manifest is larger than {limit} bytes"),
        )
    };
    let length = header(&request, CONTENT_LENGTH).and_then(|value| value.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let mut body = request.into_body();
    let mut raw = BytesMut::new();
    loop {
        let frame = tokio::time::timeout(patience, body.frame()).await.map_err(|_elapsed| {
            Refusal::new(StatusCode::REQUEST_TIMEOUT, "MANIFEST_INVALID", "the manifest did not come")
        })?;
        let Some(frame) = frame else { break };
        let frame =
            frame.map_err(|error| Refusal::manifest_invalid(format!("the manifest broke off: {error}")))?;
        if let Ok(data) = frame.into_data() {
            if raw.len() + data.len() > limit {
                return Err(too_large());
            }
            raw.extend_from_slice(&data);
        }
    }
    Ok(raw.into())
}

/// What the registry has to know about a manifest.
pub(super) struct Described {
    pub media_type: String,
    pub subject: Option<Digest>,
    artifact_type: Option<String>,
    annotations: std::collections::BTreeMap<String, String>,
    /// Blobs that have to be there.
    pub blobs: Vec<Descriptor>,
    /// Manifests that have to be there.
    pub manifests: Vec<Descriptor>,
}

impl Described {
    /// Reads a manifest by what it contains, and checks that it is what it says it is.
    pub fn read(raw: &[u8], declared: Option<&str>) -> Result<Self, Refusal> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Probe {
            schema_version: Option<u32>,
            media_type: Option<String>,
        }
        let invalid = |error: &dyn std::error::Error| {
            let cause = error.source().map_or_else(String::new, |cause| format!(": {cause}"));
            Refusal::manifest_invalid(format!("{error}{cause}"))
        };
        let probe: Probe = serde_json::from_slice(raw)
            .map_err(|error| Refusal::manifest_invalid(format!("the manifest is no JSON object: {error}")))?;
        let document = Document::parse(raw).map_err(|error| invalid(&error))?;
        if probe.schema_version != Some(2) {
            return Err(Refusal::manifest_invalid("schemaVersion is not 2"));
        }
        let fallback = match &document {
            Document::Manifest(_) => media::OCI_MANIFEST,
            Document::Index(_) => media::OCI_INDEX,
        };
        let generic = ["", "application/json", "application/octet-stream", "text/plain"];
        let declared = declared.filter(|declared| !generic.contains(declared));
        let inner = probe.media_type.as_deref().filter(|inner| !inner.is_empty());
        let media_type = match (declared, inner) {
            (Some(declared), Some(inner)) if declared != inner => {
                return Err(Refusal::manifest_invalid(format!(
                    "the manifest's mediaType is {inner:?}, its Content-Type {declared:?}"
                )));
            }
            (declared, inner) => declared.or(inner).unwrap_or(fallback),
        };
        let right = match &document {
            Document::Manifest(_) => !media::is_index(media_type),
            Document::Index(_) => !media::is_manifest(media_type),
        };
        if !right {
            return Err(Refusal::manifest_invalid(format!(
                "the manifest is said to be {media_type}, which it is not"
            )));
        }
        let media_type = media_type.to_owned();
        Ok(match document {
            Document::Manifest(manifest) => {
                let kind = manifest.artifact_type.filter(|kind| !kind.is_empty());
                let mut blobs = vec![manifest.config.clone()];
                blobs.extend(
                    manifest.layers.into_iter().filter(|layer| !media::is_foreign(&layer.media_type)),
                );
                Self {
                    media_type,
                    subject: manifest.subject.map(|subject| subject.digest),
                    artifact_type: kind.or(Some(manifest.config.media_type)),
                    annotations: manifest.annotations,
                    blobs,
                    manifests: Vec::new(),
                }
            }
            Document::Index(index) => {
                let (manifests, blobs) = index.manifests.into_iter().partition(|named| {
                    media::is_manifest(&named.media_type)
                        || media::is_index(&named.media_type)
                        || named.media_type.is_empty()
                });
                Self {
                    media_type,
                    subject: index.subject.map(|subject| subject.digest),
                    artifact_type: index.artifact_type.filter(|kind| !kind.is_empty()),
                    annotations: index.annotations,
                    blobs,
                    manifests,
                }
            }
        })
    }

    /// The manifest as its subject's referrers show it.
    pub fn as_referrer(&self, digest: &Digest, size: u64) -> Descriptor {
        let mut descriptor = Descriptor::new(&self.media_type, digest.clone(), size);
        descriptor.artifact_type.clone_from(&self.artifact_type);
        descriptor.annotations.clone_from(&self.annotations);
        descriptor
    }
}

/// `DELETE /v2/<name>/manifests/<tag or digest>`.
pub(super) async fn delete(shared: &Arc<Shared>, name: String, pointer: Pointer) -> Outcome {
    let storage = Arc::clone(&shared.writable()?.storage);
    blocking(move || {
        let removed = match &pointer {
            Pointer::Tag(tag) => storage.remove_tag(&name, tag)?,
            Pointer::Digest(digest) => storage.remove_manifest(&name, digest)?,
        };
        if removed {
            Ok(empty(StatusCode::ACCEPTED))
        } else {
            Err(Refusal::manifest_unknown(&pointer, &name))
        }
    })
    .await
}
