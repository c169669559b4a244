//! Blobs: read, whole or in part, and removed.

use std::fs::File;
use std::sync::Arc;

use brigantine_image::Digest;
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH, IF_RANGE, RANGE,
};
use http::{Request, Response, StatusCode};

use super::refusal::Refusal;
use super::reply::{Body, DIGEST, Outcome, blocking, empty, file, set, set_length};
use super::service::{Shared, header};

/// `GET` and `HEAD /v2/<name>/blobs/<digest>`.
pub(super) async fn get<B>(
    shared: &Arc<Shared>,
    name: String,
    digest: Digest,
    request: &Request<B>,
) -> Outcome {
    let found = blocking({
        let (shared, name, digest) = (Arc::clone(shared), name.clone(), digest.clone());
        move || Ok(shared.library.blob(&name, &digest)?)
    })
    .await?;
    let head = request.method() == http::Method::HEAD;
    let Some((content, size)) = found else {
        if let Some(cache) = &shared.cache {
            return cache.blob(shared, &name, &digest, request).await;
        }
        return Err(Refusal::blob_unknown(&digest, &name));
    };
    if shared.cache.is_some() {
        shared.metrics.cache_hits.inc();
    }
    answer(content, size, &digest, request, head).await
}

/// Content whose size is known, as far as it was asked for.
pub(super) async fn answer<B>(
    content: File,
    size: u64,
    digest: &Digest,
    request: &Request<B>,
    head: bool,
) -> Outcome {
    if not_modified(request, digest) {
        let mut answer = empty(StatusCode::NOT_MODIFIED);
        describe(&mut answer, digest);
        return Ok(answer);
    }
    let (start, length, status) = match asked_range(request, digest, size) {
        Asked::All => (0, size, StatusCode::OK),
        Asked::Part(start, length) => (start, length, StatusCode::PARTIAL_CONTENT),
        Asked::Impossible => {
            return Err(Refusal::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "SIZE_INVALID",
                format!("blob {digest} has {size} bytes: the range is not within them"),
            )
            .with(CONTENT_RANGE, &format!("bytes */{size}")));
        }
    };
    let mut answer = empty(status);
    if !head {
        *answer.body_mut() = file(content, start, length).await?;
    }
    describe(&mut answer, digest);
    set_length(&mut answer, length);
    if status == StatusCode::PARTIAL_CONTENT {
        set(&mut answer, CONTENT_RANGE, &format!("bytes {start}-{}/{size}", start + length - 1));
    }
    Ok(answer)
}

/// Headers of content that never changes.
pub(super) fn describe(answer: &mut Response<Body>, digest: &Digest) {
    set(answer, DIGEST, digest.as_str());
    set(answer, ETAG, &format!("\"{digest}\""));
    set(answer, CACHE_CONTROL, "max-age=31536000");
    set(answer, ACCEPT_RANGES, "bytes");
    if answer.status() != StatusCode::NOT_MODIFIED {
        set(answer, CONTENT_TYPE, "application/octet-stream");
    }
}

/// Whether the client has this content already.
pub(super) fn not_modified<B>(request: &Request<B>, digest: &Digest) -> bool {
    request.headers().get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok()).any(|value| {
        value.split(',').map(str::trim).any(|tag| {
            let tag = tag.strip_prefix("W/").unwrap_or(tag);
            tag == "*" || tag.trim_matches('"') == digest.as_str()
        })
    })
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    All,
    /// Start and length.
    Part(u64, u64),
    Impossible,
}

fn asked_range<B>(request: &Request<B>, digest: &Digest, size: u64) -> Asked {
    let Some(range) = header(request, RANGE) else { return Asked::All };
    if header(request, IF_RANGE).is_some_and(|tag| tag.trim_matches('"') != digest.as_str()) {
        return Asked::All;
    }
    parse_range(range, size)
}

/// One range of RFC 9110, section 14. What is malformed or several ranges is answered as a whole, as it allows.
fn parse_range(range: &str, size: u64) -> Asked {
    let Some(spec) = range.trim().strip_prefix("bytes=") else { return Asked::All };
    let Some((first, last)) = spec.split_once('-') else { return Asked::All };
    let (first, last) = (first.trim(), last.trim());
    if first.is_empty() {
        let Ok(suffix) = last.parse::<u64>() else { return Asked::All };
        let length = suffix.min(size);
        return if length == 0 { Asked::Impossible } else { Asked::Part(size - length, length) };
    }
    let Ok(first) = first.parse::<u64>() else { return Asked::All };
    let last = match last {
        "" => u64::MAX,
        last => match last.parse::<u64>() {
            Ok(last) => last,
            Err(_several_or_malformed) => return Asked::All,
        },
    };
    if first >= size || last < first {
        return Asked::Impossible;
    }
    Asked::Part(first, last.min(size - 1) - first + 1)
}

/// `DELETE /v2/<name>/blobs/<digest>`.
pub(super) async fn delete(shared: &Arc<Shared>, name: String, digest: Digest) -> Outcome {
    let storage = Arc::clone(&shared.writable()?.storage);
    blocking(move || {
        if storage.unlink_blob(&name, &digest)? {
            Ok(empty(StatusCode::ACCEPTED))
        } else {
            Err(Refusal::blob_unknown(&digest, &name))
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (range, expected) in [
            ("bytes=0-9", Asked::Part(0, 10)),
            ("bytes=5-", Asked::Part(5, 95)),
            ("bytes=-7", Asked::Part(93, 7)),
            ("bytes=-700", Asked::Part(0, 100)),
            ("bytes=90-1000", Asked::Part(90, 10)),
            ("bytes=100-", Asked::Impossible),
            ("bytes=9-3", Asked::Impossible),
            ("bytes=-0", Asked::Impossible),
            ("bytes=0-1,5-6", Asked::All),
            ("bytes=x-y", Asked::All),
            ("lines=0-1", Asked::All),
            ("bytes=99999999999999999999-", Asked::All),
        ] {
            assert_eq!(parse_range(range, 100), expected, "{range}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Asked::Impossible);
    }
}
