//! The pull-through cache: one fetch for many, upstream down, upstream lying.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use brigantine_image::{Digest, Reference, media};
use brigantine_registry::server::{Collection, Options, Source, Upstream, collect};
use brigantine_registry::{Config, PullOptions};
use support::{Answer, LyingServer, OwnRegistry, Sample, client, http, reply, silent, store};

async fn cache_of(address: &str, root: &Path, fresh: Duration) -> OwnRegistry {
    let config = Config {
        attempts: 2,
        stall: Duration::from_secs(2),
        back_off: Duration::from_millis(10),
        ..Config::default()
    };
    let url = format!("http://{address}");
    let upstream = Box::new(Upstream { url, credentials: None, fresh, keep: None, config });
    OwnRegistry::start(Options::new("127.0.0.1:0", Source::Cache { root: root.to_owned(), upstream })).await
}

async fn pull(registry: &OwnRegistry, name: &str) -> Result<Digest, brigantine_registry::Error> {
    let target = tempfile::tempdir().unwrap();
    let reference = Reference::parse(&format!("{}/{name}", registry.address)).unwrap();
    let pulled = client().pull(&store(target.path()), &reference, PullOptions::default(), silent()).await?;
    Ok(pulled.digest)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_for_once_outlives_upstream() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = OwnRegistry::at(&dir.path().join("upstream")).await;
    let (first, second) = (Sample::new(300_000), Sample::new(200_000));
    first.push_to(&upstream, "team/app", "t").await;
    let cache = cache_of(&upstream.address, &dir.path().join("cache"), Duration::ZERO).await;
    assert_eq!(pull(&cache, "team/app:t").await.unwrap(), Digest::sha256(&first.manifest));
    // A tag that moved is seen.
    second.push_to(&upstream, "team/app", "t").await;
    assert_eq!(pull(&cache, "team/app:t").await.unwrap(), Digest::sha256(&second.manifest));
    // Lists are upstream's.
    first.push_to(&upstream, "team/app", "other").await;
    let tags = http().get(cache.url("team/app/tags/list")).send().await.unwrap().text().await.unwrap();
    assert_eq!(tags, r#"{"name":"team/app","tags":["other","t"]}"#);
    assert!(pull(&cache, "team/none:t").await.is_err());
    let push = http().post(cache.url("team/app/blobs/uploads/")).send().await.unwrap();
    assert_eq!(push.status(), 405);

    upstream.stop().await;
    assert_eq!(pull(&cache, "team/app:t").await.unwrap(), Digest::sha256(&second.manifest));
    let by_digest = format!("team/app@{}", Digest::sha256(&first.manifest));
    assert_eq!(pull(&cache, &by_digest).await.unwrap(), Digest::sha256(&first.manifest));
    let unknown = http().get(cache.url("team/app/manifests/unknown")).send().await.unwrap();
    assert_eq!(unknown.status(), 502);
    let metrics = http().get(format!("http://{}/metrics", cache.address)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(metrics.contains("brigantine_registry_cache_stale_total 1"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_ask_and_upstream_is_asked_once() {
    let sample = Arc::new(Sample::new(400_000));
    let upstream = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, number| {
            sample.honest(head).unwrap_or_else(|| {
                assert!(sample.is_layer(head));
                // The first answer breaks off after half of it.
                let length = sample.layer.len();
                if number == 1 {
                    let mut answer =
                        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes();
                    answer.extend_from_slice(&sample.layer[..length / 2]);
                    return Answer::Raw(answer);
                }
                let rest = &sample.layer[length / 2..];
                let range = format!("Content-Range: bytes {}-{}/{length}\r\n", length / 2, length - 1);
                reply("206 Partial Content", &range, rest)
            })
        }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let cache = cache_of(&upstream.address, dir.path(), Duration::from_mins(1)).await;
    let blob = cache.url(&format!("a/blobs/{}", Digest::sha256(&sample.layer)));
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let blob = blob.clone();
        asking.spawn(async move { http().get(blob).send().await.unwrap().bytes().await.unwrap() });
    }
    while let Some(got) = asking.join_next().await {
        assert!(got.unwrap() == sample.layer);
    }
    let path = format!("GET /v2/a/blobs/{}", Digest::sha256(&sample.layer));
    assert_eq!(upstream.requests(&path).len(), 2);
    pull(&cache, "a:t").await.unwrap();
    pull(&cache, "a:t").await.unwrap();
    assert_eq!(upstream.requests(&path).len(), 2);
    assert_eq!(upstream.requests("GET /v2/a/manifests/").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_upstream_is_not_passed_on() {
    let sample = Arc::new(Sample::new(100_000));
    let upstream = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            if sample.is_layer(head) {
                let mut wrong = sample.layer.clone();
                wrong[50_000] ^= 1;
                return reply("200 OK", "", &wrong);
            }
            if head.contains("/manifests/html") {
                return reply("200 OK", "Content-Type: text/html\r\n", b"<html>log in</html>");
            }
            if head.contains("/manifests/elsewhere") {
                return reply("302 Found", "Location: file:///etc/passwd\r\n", b"");
            }
            if head.contains("/manifests/none") {
                return reply("404 Not Found", "", b"{}");
            }
            sample.honest(head).unwrap()
        }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let cache = cache_of(&upstream.address, dir.path(), Duration::ZERO).await;
    let blob = cache.url(&format!("a/blobs/{}", Digest::sha256(&sample.layer)));
    let answer = http().get(&blob).send().await.unwrap();
    // The head may be out already; the body is never whole.
    assert!(!answer.status().is_success() || answer.bytes().await.is_err());
    let kept = std::fs::read_dir(dir.path().join("blobs/sha256")).unwrap().count();
    assert_eq!(kept, 0);
    assert_eq!(std::fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    for (tag, expected) in [("html", 502), ("elsewhere", 502), ("none", 404)] {
        let answer = http().get(cache.url(&format!("a/manifests/{tag}"))).send().await.unwrap();
        assert_eq!(answer.status(), expected, "{tag}");
    }
    let manifest = http().get(cache.url("a/manifests/t")).send().await.unwrap();
    assert_eq!(manifest.headers()["content-type"], media::OCI_MANIFEST);
}

/// What nobody asked for in the time of `keep` goes with the next collection, and comes again when somebody does; what
/// somebody asks for again stays.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_asks_for_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = OwnRegistry::at(&dir.path().join("upstream")).await;
    let (first, second) = (Sample::new(300_000), Sample::new(200_000));
    first.push_to(&upstream, "team/app", "t").await;
    second.push_to(&upstream, "team/other", "t").await;
    let root = dir.path().join("cache");
    let url = format!("http://{}", upstream.address);
    let keep = Some(Duration::from_hours(1));
    let config = Config { attempts: 1, back_off: Duration::from_millis(10), ..Config::default() };
    let source = Upstream { url, credentials: None, fresh: Duration::ZERO, keep, config };
    let cache = Source::Cache { root: root.clone(), upstream: Box::new(source) };
    let cache = OwnRegistry::start(Options::new("127.0.0.1:0", cache)).await;
    pull(&cache, "team/app:t").await.unwrap();
    pull(&cache, "team/other:t").await.unwrap();
    let collection = Collection {
        interval: None,
        grace: Duration::ZERO,
        untagged: false,
        uploads: Duration::from_hours(1),
    };
    assert_eq!(collect(&root, &collection).await.unwrap().manifests, 0);

    // Two hours go by, and one of the two is asked for again.
    let past = std::time::SystemTime::now() - Duration::from_hours(2);
    let mut waiting = vec![root.clone()];
    while let Some(path) = waiting.pop() {
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else if let Ok(file) = std::fs::File::options().write(true).open(&path) {
                file.set_modified(past).unwrap();
            }
        }
    }
    pull(&cache, "team/other:t").await.unwrap();
    let collected = collect(&root, &collection).await.unwrap();
    assert_eq!((collected.manifests, collected.blobs), (1, 3), "{collected:?}");
    upstream.stop().await;
    assert_eq!(pull(&cache, "team/other:t").await.unwrap(), Digest::sha256(&second.manifest));
    assert!(pull(&cache, "team/app:t").await.is_err());
}
