//! Uploads of blobs: at once, in chunks, as a stream, or mounted from another repository.
//!
//! Invariant: a blob is the repository's only after its digest was found right.

use std::sync::Arc;

use brigantine_image::{Algorithm, Digest};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, HeaderName, LOCATION, RANGE};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;

use super::auth::Principal;
use super::refusal::Refusal;
use super::reply::{Body, DIGEST, Outcome, blocking, empty, set};
use super::route::{parse_digest, valid_repository};
use super::service::{Shared, Writable, header, query};
use super::uploads::{Held, Take, over_quota, receive, settle};

const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");
const CHUNK_MIN: HeaderName = HeaderName::from_static("oci-chunk-min-length");

/// `POST /v2/<name>/blobs/uploads/`.
pub(super) async fn begin(
    shared: &Arc<Shared>,
    name: String,
    request: Request<Incoming>,
    principal: &Principal,
) -> Outcome {
    let writable = shared.writable()?.clone();
    if let Some(digest) = query(&request, "mount").first() {
        let digest = parse_digest(digest)?;
        let from = query(&request, "from").into_iter().next();
        if mount(&writable, shared.quotas.of(&name), &name, from, &digest, principal).await? {
            return Ok(created(&name, &digest));
        }
    }
    let digest = query(&request, "digest").first().map(|digest| parse_digest(digest)).transpose()?;
    let algorithm = match (&digest, query(&request, "digest-algorithm").first().map(String::as_str)) {
        (Some(digest), _) => digest.algorithm(),
        (None, Some("sha512")) => Algorithm::Sha512,
        (None, Some("sha256") | None) => Algorithm::Sha256,
        (None, Some(other)) => {
            return Err(Refusal::digest_invalid(format!(
                "unsupported digest algorithm {other:?}: sha256 and sha512 are supported"
            )));
        }
    };
    let take = take(shared, &writable, &name, &request, None).await?;
    let id = blocking({
        let (writable, name) = (writable.clone(), name.clone());
        move || Ok(writable.uploads.begin(&name, algorithm)?)
    })
    .await?;
    let Some(digest) = digest else {
        let mut answer = empty(StatusCode::ACCEPTED);
        locate(&mut answer, &name, &id, 0);
        if let Some(chunk) = shared.limits.chunk {
            set(&mut answer, CHUNK_MIN, &chunk.to_string());
        }
        return Ok(answer);
    };
    // All at once: nobody would know how to go on with what fails.
    let upload = writable.uploads.hold(&name, &id, shared.limits.patience).await?;
    match receive(upload, request.into_body(), take).await {
        Ok(upload) => finish(shared, &writable, upload, digest).await,
        Err(refusal) => {
            if let Ok(upload) = writable.uploads.hold(&name, &id, shared.limits.patience).await {
                discard(&writable, upload).await?;
            }
            Err(refusal)
        }
    }
}

/// Gives the repository a blob that another one has. False when that cannot be.
async fn mount(
    writable: &Writable,
    quota: Option<u64>,
    name: &str,
    from: Option<String>,
    digest: &Digest,
    principal: &Principal,
) -> Result<bool, Refusal> {
    match &from {
        Some(from) if !valid_repository(from) => return Err(Refusal::name_invalid(from)),
        Some(from) if !principal.may_pull(from) => return Ok(false),
        // Whoever may not read everything could otherwise take what is not theirs by its digest.
        None if !principal.may_pull_all() => return Ok(false),
        _ => {}
    }
    let (storage, name, digest, quota) =
        (Arc::clone(&writable.storage), name.to_owned(), digest.clone(), quota);
    blocking(move || {
        let size = match &from {
            Some(from) => storage.stat_blob(from, &digest)?,
            None => storage.stat_content(&digest)?,
        };
        let Some(size) = size else { return Ok(false) };
        if let Some(quota) = quota
            && storage.stat_blob(&name, &digest)?.is_none()
            && storage.usage(&name)? + size > quota
        {
            return Err(over_quota());
        }
        Ok(storage.link_blob(&name, &digest)?)
    })
    .await
}

/// `GET /v2/<name>/blobs/uploads/<id>`.
pub(super) async fn status(shared: &Arc<Shared>, name: &str, id: &str) -> Outcome {
    let writable = shared.writable()?;
    let upload = writable.uploads.hold(name, id, shared.limits.patience).await?;
    let mut answer = empty(StatusCode::NO_CONTENT);
    locate(&mut answer, name, id, upload.offset());
    Ok(answer)
}

/// `PATCH /v2/<name>/blobs/uploads/<id>`.
pub(super) async fn patch(shared: &Arc<Shared>, name: &str, id: &str, request: Request<Incoming>) -> Outcome {
    let writable = shared.writable()?.clone();
    let upload = writable.uploads.hold(name, id, shared.limits.patience).await?;
    let take = take(shared, &writable, name, &request, Some(&upload)).await?;
    let before = upload.offset();
    let upload = settle(receive(upload, request.into_body(), take).await?).await?;
    shared.metrics.received.inc_by(upload.offset() - before);
    let mut answer = empty(StatusCode::ACCEPTED);
    locate(&mut answer, name, id, upload.offset());
    Ok(answer)
}

/// `PUT /v2/<name>/blobs/uploads/<id>?digest=<digest>`.
pub(super) async fn put(shared: &Arc<Shared>, name: &str, id: &str, request: Request<Incoming>) -> Outcome {
    let writable = shared.writable()?.clone();
    let digest = query(&request, "digest");
    let digest = digest
        .first()
        .ok_or_else(|| Refusal::digest_invalid("the query lacks digest=, the digest of the whole blob"))?;
    let digest = parse_digest(digest)?;
    let mut upload = writable.uploads.hold(name, id, shared.limits.patience).await?;
    let take = take(shared, &writable, name, &request, Some(&upload)).await?;
    upload.expect(digest.algorithm());
    let before = upload.offset();
    let upload = receive(upload, request.into_body(), take).await?;
    shared.metrics.received.inc_by(upload.offset() - before);
    finish(shared, &writable, upload, digest).await
}

/// `DELETE /v2/<name>/blobs/uploads/<id>`.
pub(super) async fn cancel(shared: &Arc<Shared>, name: &str, id: &str) -> Outcome {
    let writable = shared.writable()?.clone();
    let upload = writable.uploads.hold(name, id, shared.limits.patience).await?;
    discard(&writable, upload).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

async fn discard(writable: &Writable, mut upload: Held) -> Result<(), Refusal> {
    let uploads = Arc::clone(&writable.uploads);
    blocking(move || Ok(uploads.end(&mut upload)?)).await
}

/// Checks what is there against its digest and makes it the repository's.
async fn finish(shared: &Arc<Shared>, writable: &Writable, mut upload: Held, digest: Digest) -> Outcome {
    let writable = writable.clone();
    let quota = shared.quotas.of(&upload.repository);
    blocking(move || {
        let actual = upload.digest(digest.algorithm())?;
        if actual != digest {
            writable.uploads.end(&mut upload)?;
            return Err(Refusal::digest_invalid(format!("the content's digest is {actual}, not {digest}")));
        }
        let storage = &writable.storage;
        if let Some(quota) = quota
            && storage.stat_blob(&upload.repository, &digest)?.is_none()
            && storage.usage(&upload.repository)? + upload.offset() > quota
        {
            writable.uploads.end(&mut upload)?;
            return Err(over_quota());
        }
        let (data, path) = upload.data();
        storage.commit(&upload.repository, &digest, data, &path)?;
        let answer = created(&upload.repository, &digest);
        writable.uploads.end(&mut upload)?;
        Ok(answer)
    })
    .await
}

/// How much of the request's body may be taken, by its headers, the upload's offset and the quota.
async fn take<B>(
    shared: &Arc<Shared>,
    writable: &Writable,
    name: &str,
    request: &Request<B>,
    upload: Option<&Held>,
) -> Result<Take, Refusal> {
    let length = header(request, CONTENT_LENGTH).and_then(|value| value.parse::<u64>().ok());
    let mut exactly = None;
    if let (Some(upload), Some(range)) = (upload, header(request, CONTENT_RANGE)) {
        let (first, last) = parse_chunk(range).ok_or_else(|| {
            Refusal::new(
                StatusCode::BAD_REQUEST,
                "BLOB_UPLOAD_INVALID",
                format!("Content-Range {range:?} is not <first>-<last>"),
            )
        })?;
        let offset = upload.offset();
        if first != offset || last < first {
            let mut refused = Refusal::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "BLOB_UPLOAD_INVALID",
                format!("the chunk starts at byte {first}: the upload goes on at byte {offset}"),
            );
            refused = refused.with(LOCATION, &location(name, &upload.id));
            return Err(refused.with(RANGE, &range_of(offset)).with(UPLOAD_ID, &upload.id));
        }
        let bytes = last - first + 1;
        if length.is_some_and(|length| length != bytes) {
            return Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                "SIZE_INVALID",
                "Content-Length and Content-Range do not agree",
            ));
        }
        exactly = Some(bytes);
    }
    let mut room = None;
    if let Some(quota) = shared.quotas.of(name) {
        let (storage, name) = (Arc::clone(&writable.storage), name.to_owned());
        let used = blocking(move || Ok(storage.usage(&name)?)).await?;
        let pending = upload.map_or(0, |upload| upload.offset());
        let left = quota.saturating_sub(used).saturating_sub(pending);
        if length.is_some_and(|length| length > left) {
            return Err(over_quota());
        }
        room = Some(left);
    }
    Ok(Take { exactly, room, patience: shared.limits.patience })
}

/// `<first>-<last>`; some clients write it as RFC 9110 does, with a unit and a length.
fn parse_chunk(range: &str) -> Option<(u64, u64)> {
    let range = range.trim().strip_prefix("bytes ").unwrap_or(range.trim());
    let range = range.split('/').next()?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

fn range_of(offset: u64) -> String {
    format!("0-{}", offset.saturating_sub(1))
}

fn location(name: &str, id: &str) -> String {
    format!("/v2/{name}/blobs/uploads/{id}")
}

fn locate(answer: &mut Response<Body>, name: &str, id: &str, offset: u64) {
    set(answer, LOCATION, &location(name, id));
    set(answer, RANGE, &range_of(offset));
    set(answer, UPLOAD_ID, id);
}

fn created(name: &str, digest: &Digest) -> Response<Body> {
    let mut answer = empty(StatusCode::CREATED);
    set(&mut answer, LOCATION, &format!("/v2/{name}/blobs/{digest}"));
    set(&mut answer, DIGEST, digest.as_str());
    answer
}
