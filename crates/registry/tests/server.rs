//! The registry server beyond what the distribution suite asks: restarts, broken clients, limits, garbage, caching.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use brigantine_image::{Algorithm, Digest, Reference, media};
use brigantine_registry::PullOptions;
use brigantine_registry::server::{self, Collection, Options, Quotas, Source};
use reqwest::StatusCode;
use serde_json::{Value, json};
use support::{OwnRegistry, Sample, client, http, own_options, silent, store};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn noise(size: usize) -> Vec<u8> {
    Sample::new(size).layer
}

/// Starts an upload and returns its URL.
async fn begin(registry: &OwnRegistry, repository: &str) -> String {
    let answer = http().post(registry.url(&format!("{repository}/blobs/uploads/"))).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    format!("http://{}{}", registry.address, answer.headers()["location"].to_str().unwrap())
}

async fn offset(upload: &str) -> u64 {
    let answer = http().get(upload).send().await.unwrap();
    assert_eq!(answer.status(), 204);
    let range = answer.headers()["range"].to_str().unwrap().to_owned();
    let last: u64 = range.strip_prefix("0-").unwrap().parse().unwrap();
    if last == 0 { 0 } else { last + 1 }
}

async fn patch(upload: &str, start: usize, bytes: &[u8]) -> StatusCode {
    http()
        .patch(upload)
        .header("content-range", format!("{start}-{}", start + bytes.len() - 1))
        .body(bytes.to_vec())
        .send()
        .await
        .unwrap()
        .status()
}

async fn finish(upload: &str, digest: &Digest) -> reqwest::Response {
    http().put(format!("{upload}?digest={digest}")).send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(dir.path()).await;
    let blob = noise(300_000);
    let digest = Digest::of(Algorithm::Sha512, &blob);
    let upload = begin(&registry, "a/b").await;
    assert_eq!(patch(&upload, 0, &blob[..100_000]).await, 202);
    assert_eq!(patch(&upload, 50_000, &blob[50_000..60_000]).await, 416);
    let path = upload.split(&registry.address).nth(1).unwrap().to_owned();
    registry.stop().await;

    let registry = OwnRegistry::at(dir.path()).await;
    let upload = format!("http://{}{path}", registry.address);
    assert_eq!(offset(&upload).await, 100_000);
    assert_eq!(patch(&upload, 100_000, &blob[100_000..]).await, 202);
    assert_eq!(finish(&upload, &digest).await.status(), 201);
    let answer = http().get(registry.url(&format!("a/b/blobs/{digest}"))).send().await.unwrap();
    assert_eq!(answer.bytes().await.unwrap(), blob);
    // The upload is over.
    assert_eq!(http().get(&upload).send().await.unwrap().status(), 404);
    assert_eq!(std::fs::read_dir(dir.path().join("uploads")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_before_a_connection_broke_stays() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(dir.path()).await;
    let blob = noise(200_000);
    let upload = begin(&registry, "a").await;
    let path = upload.split(&registry.address).nth(1).unwrap();
    let mut io = tokio::net::TcpStream::connect(&registry.address).await.unwrap();
    let head = format!("PATCH {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", blob.len());
    io.write_all(head.as_bytes()).await.unwrap();
    io.write_all(&blob[..70_000]).await.unwrap();
    drop(io);
    // Reading the state waits until the broken request let the upload go.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while offset(&upload).await != 70_000 {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(patch(&upload, 70_000, &blob[70_000..]).await, 202);
    assert_eq!(finish(&upload, &Digest::sha256(&blob)).await.status(), 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_content_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(dir.path()).await;
    let upload = begin(&registry, "a").await;
    assert_eq!(patch(&upload, 0, b"hello").await, 202);
    let answer = finish(&upload, &Digest::sha256(b"other")).await;
    assert_eq!(answer.status(), 400);
    let document: Value = answer.json().await.unwrap();
    assert_eq!(document["errors"][0]["code"], "DIGEST_INVALID");
    assert_eq!(std::fs::read_dir(dir.path().join("uploads")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(dir.path().join("blobs/sha256")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_and_endless_clients_are_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = own_options(dir.path());
    options.limits.patience = Duration::from_millis(300);
    options.limits.manifest = 10_000;
    let registry = OwnRegistry::start(options).await;
    let upload = begin(&registry, "a").await;
    let path = upload.split(&registry.address).nth(1).unwrap();
    let mut io = tokio::net::TcpStream::connect(&registry.address).await.unwrap();
    let head = format!("PATCH {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc");
    io.write_all(head.as_bytes()).await.unwrap();
    let mut said = Vec::new();
    tokio::time::timeout(Duration::from_secs(30), io.read_to_end(&mut said)).await.unwrap().unwrap();
    assert!(said.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&said));
    assert_eq!(offset(&upload).await, 3);

    let large = http().put(registry.url("a/manifests/x")).body(vec![b' '; 10_001]).send().await.unwrap();
    assert_eq!(large.status(), 413);
    let mut io = tokio::net::TcpStream::connect(&registry.address).await.unwrap();
    io.write_all(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n").await.unwrap();
    let line = format!("X-Long: {}\r\n", "a".repeat(1000));
    // It may close before all of it is sent.
    for _ in 0..1000 {
        if io.write_all(line.as_bytes()).await.is_err() {
            break;
        }
    }
    let mut said = Vec::new();
    drop(tokio::time::timeout(Duration::from_secs(30), io.read_to_end(&mut said)).await.unwrap());
    assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 431 "), "{}", String::from_utf8_lossy(&said));
}

#[tokio::test(flavor = "multi_thread")]
async fn content_is_asked_for_conditionally_and_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(dir.path()).await;
    let sample = Sample::new(50_000);
    sample.push_to(&registry, "a", "t").await;
    let digest = Digest::sha256(&sample.layer);
    let blob = registry.url(&format!("a/blobs/{digest}"));
    let get = |url: &str, name: &'static str, value: String| http().get(url).header(name, value).send();
    let part = get(&blob, "range", "bytes=10-19".into()).await.unwrap();
    assert_eq!(part.status(), 206);
    assert_eq!(part.headers()["content-range"], format!("bytes 10-19/{}", sample.layer.len()).as_str());
    assert_eq!(part.bytes().await.unwrap(), &sample.layer[10..20]);
    let same = get(&blob, "if-none-match", format!("\"{digest}\"")).await.unwrap();
    assert_eq!(same.status(), 304);
    let changed = http()
        .get(&blob)
        .header("range", "bytes=10-19")
        .header("if-range", "\"sha256:other\"")
        .send()
        .await
        .unwrap();
    assert_eq!(changed.status(), 200);
    let manifest = registry.url("a/manifests/t");
    let tag = http().head(&manifest).send().await.unwrap().headers()["etag"].to_str().unwrap().to_owned();
    assert_eq!(get(&manifest, "if-none-match", tag).await.unwrap().status(), 304);
    for (method, path) in [("POST", "a/manifests/t"), ("PUT", "_catalog"), ("PATCH", "a/tags/list")] {
        let answer = http().request(method.parse().unwrap(), registry.url(path)).send().await.unwrap();
        assert_eq!(answer.status(), 405, "{path}");
        let document: Value = answer.json().await.unwrap();
        assert_eq!(document["errors"][0]["code"], "UNSUPPORTED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(dir.path()).await;
    let sample = Sample::new(100);
    for repository in ["a", "a/b", "c"] {
        sample.push_to(&registry, repository, "t0").await;
    }
    for n in 1..7 {
        sample.push_to(&registry, "a", &format!("t{n}")).await;
    }
    let (mut url, mut seen) = (registry.url("a/tags/list?n=3"), Vec::new());
    loop {
        let answer = http().get(&url).send().await.unwrap();
        let link = answer.headers().get("link").map(|link| link.to_str().unwrap().to_owned());
        let document: Value = answer.json().await.unwrap();
        let tags = document["tags"].as_array().unwrap().clone();
        assert!(tags.len() <= 3);
        seen.extend(tags.into_iter().map(|tag| tag.as_str().unwrap().to_owned()));
        let Some(link) = link else { break };
        let path = link.strip_prefix('<').unwrap().split('>').next().unwrap();
        url = format!("http://{}{path}", registry.address);
    }
    assert_eq!(seen, (0..7).map(|n| format!("t{n}")).collect::<Vec<_>>());
    let answer = http().get(registry.url("_catalog?n=2&last=a")).send().await.unwrap();
    assert_eq!(answer.json::<Value>().await.unwrap(), json!({"repositories": ["a/b", "c"]}));
    assert_eq!(http().get(registry.url("a/tags/list?n=-1")).send().await.unwrap().status(), 400);
    assert_eq!(http().get(registry.url("none/tags/list")).send().await.unwrap().status(), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_is_what_it_says_and_names_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(dir.path()).await;
    let sample = Sample::new(100);
    let put = |body: Vec<u8>, kind: &'static str| {
        http().put(registry.url("a/manifests/t")).header("content-type", kind).body(body).send()
    };
    let code = |answer: reqwest::Response| async move {
        let status = answer.status().as_u16();
        let document: Value = answer.json().await.unwrap();
        (status, document["errors"][0]["code"].as_str().unwrap().to_owned())
    };
    let missing = put(sample.manifest.clone(), media::OCI_MANIFEST).await.unwrap();
    assert_eq!(code(missing).await, (404, "MANIFEST_BLOB_UNKNOWN".into()));
    sample.push_to(&registry, "a", "t").await;
    let invalid = |what: &'static str| (400_u16, what.to_owned());
    let wrong_type = put(sample.manifest.clone(), media::OCI_INDEX).await.unwrap();
    assert_eq!(code(wrong_type).await, invalid("MANIFEST_INVALID"));
    for bad in [&b"<html>"[..], b"{}", br#"{"schemaVersion":1,"fsLayers":[]}"#, b""] {
        assert_eq!(code(put(bad.to_vec(), "").await.unwrap()).await, invalid("MANIFEST_INVALID"));
    }
    let mut lies: Value = serde_json::from_slice(&sample.manifest).unwrap();
    lies["layers"][0]["size"] = json!(7);
    let lies = serde_json::to_vec(&lies).unwrap();
    assert_eq!(code(put(lies, media::OCI_MANIFEST).await.unwrap()).await, invalid("MANIFEST_INVALID"));
    // A manifest that says it is its own child cannot be: its digest would have to be known before.
    let own = Digest::sha256(b"self");
    let itself = json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests":
        [{"mediaType": media::OCI_INDEX, "digest": own.to_string(), "size": 4}]});
    let itself = put(serde_json::to_vec(&itself).unwrap(), media::OCI_INDEX).await.unwrap();
    assert_eq!(code(itself).await, (404, "MANIFEST_BLOB_UNKNOWN".into()));
    // The tag is as it was.
    let kept = http().get(registry.url("a/manifests/t")).send().await.unwrap();
    assert_eq!(kept.bytes().await.unwrap(), sample.manifest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_registry_refuses_changes() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(dir.path()).await;
    let sample = Sample::new(100);
    sample.push_to(&registry, "a", "t").await;
    registry.stop().await;
    let registry = OwnRegistry::start(Options { read_only: true, ..own_options(dir.path()) }).await;
    let digest = Digest::sha256(&sample.layer);
    for (method, path) in [
        ("POST", "a/blobs/uploads/".to_owned()),
        ("PUT", "a/manifests/t".to_owned()),
        ("DELETE", "a/manifests/t".to_owned()),
        ("DELETE", format!("a/blobs/{digest}")),
    ] {
        let answer = http().request(method.parse().unwrap(), registry.url(&path)).send().await.unwrap();
        assert_eq!(answer.status(), 405, "{method} {path}");
    }
    assert_eq!(http().get(registry.url("a/manifests/t")).send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_hold() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = own_options(dir.path());
    options.quotas = Quotas { default: Some(100_000), named: vec![("big/*".into(), 10_000_000)] };
    let registry = OwnRegistry::start(options).await;
    let blob = noise(150_000);
    let post = |repository: &str, body: reqwest::Body| {
        let url = registry.url(&format!("{repository}/blobs/uploads/?digest={}", Digest::sha256(&blob)));
        http().post(url).body(body).send()
    };
    let refused = post("small", blob.clone().into()).await.unwrap();
    assert_eq!(refused.status(), 403);
    let document: Value = refused.json().await.unwrap();
    assert_eq!(document["errors"][0]["code"], "DENIED");
    assert!(document["errors"][0]["message"].as_str().unwrap().contains("quota"));
    // Without a length the body is taken until it is too much.
    let pieces: Vec<Result<Vec<u8>, std::io::Error>> = blob.chunks(10_000).map(|c| Ok(c.to_vec())).collect();
    let streamed = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    assert_eq!(post("small", streamed).await.unwrap().status(), 403);
    assert_eq!(std::fs::read_dir(dir.path().join("uploads")).unwrap().count(), 0);
    assert_eq!(post("big/one", blob.clone().into()).await.unwrap().status(), 201);
    // A mount counts as well.
    let digest = Digest::sha256(&blob);
    let mount = registry.url(&format!("small/blobs/uploads/?mount={digest}&from=big/one"));
    assert_eq!(http().post(mount).send().await.unwrap().status(), 403);
    // Giving back makes room again.
    let first = noise(80_000);
    let url = registry.url(&format!("small/blobs/uploads/?digest={}", Digest::sha256(&first)));
    assert_eq!(http().post(&url).body(first.clone()).send().await.unwrap().status(), 201);
    let second = noise(40_000);
    let other = registry.url(&format!("small/blobs/uploads/?digest={}", Digest::sha256(&second)));
    assert_eq!(http().post(&other).body(second.clone()).send().await.unwrap().status(), 403);
    let remove = registry.url(&format!("small/blobs/{}", Digest::sha256(&first)));
    assert_eq!(http().delete(remove).send().await.unwrap().status(), 202);
    assert_eq!(http().post(&other).body(second).send().await.unwrap().status(), 201);
}

fn at_once() -> Collection {
    Collection { interval: None, grace: Duration::ZERO, untagged: false, uploads: Duration::from_hours(1) }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_goes_and_the_rest_stays() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(dir.path()).await;
    let (kept, gone, untagged) = (Sample::new(60_000), Sample::new(70_000), Sample::new(80_000));
    kept.push_to(&registry, "a/kept", "t").await;
    gone.push_to(&registry, "gone", "t").await;
    untagged.push_to(&registry, "a/kept", "old").await;
    let stray = noise(90_000);
    let url = registry.url(&format!("a/kept/blobs/uploads/?digest={}", Digest::sha256(&stray)));
    assert_eq!(http().post(url).body(stray.clone()).send().await.unwrap().status(), 201);

    // Within the grace period nothing is garbage.
    let patient = Collection { grace: Duration::from_hours(1), ..at_once() };
    assert_eq!(server::collect(dir.path(), &patient).await.unwrap().blobs, 0);

    // A reader that is at it is served to the end.
    let reading =
        http().get(registry.url(&format!("a/kept/blobs/{}", Digest::sha256(&stray)))).send().await.unwrap();
    let manifest = Digest::sha256(&gone.manifest);
    for path in [format!("gone/manifests/{manifest}"), "a/kept/manifests/old".to_owned()] {
        assert_eq!(http().delete(registry.url(&path)).send().await.unwrap().status(), 202);
    }
    let collected = server::collect(dir.path(), &at_once()).await.unwrap();
    assert_eq!(reading.bytes().await.unwrap(), stray);
    // Of `gone`: layer, configuration, manifest; and the stray blob. All samples share no content.
    assert_eq!((collected.blobs, collected.repositories, collected.manifests), (4, 1, 0));
    let expected = gone.layer.len() + gone.config.len() + gone.manifest.len() + stray.len();
    assert_eq!(collected.bytes, expected as u64);
    let catalog: Value = http().get(registry.url("_catalog")).send().await.unwrap().json().await.unwrap();
    assert_eq!(catalog["repositories"], json!(["a/kept"]));
    let untagged_manifest = registry.url(&format!("a/kept/manifests/{}", Digest::sha256(&untagged.manifest)));
    assert_eq!(http().get(&untagged_manifest).send().await.unwrap().status(), 200);

    let collected = server::collect(dir.path(), &Collection { untagged: true, ..at_once() }).await.unwrap();
    assert_eq!((collected.manifests, collected.blobs), (1, 3));
    assert_eq!(http().get(&untagged_manifest).send().await.unwrap().status(), 404);
    let target = tempfile::tempdir().unwrap();
    let reference = Reference::parse(&format!("{}/a/kept:t", registry.address)).unwrap();
    client().pull(&store(target.path()), &reference, PullOptions::default(), silent()).await.unwrap();
    let leaves = std::fs::read_dir(dir.path().join("blobs/sha256")).unwrap().count();
    assert_eq!(leaves, 3);
    // The same while no registry runs.
    registry.stop().await;
    assert_eq!(server::collect(dir.path(), &at_once()).await.unwrap().blobs, 0);
    assert!(server::collect(target.path(), &at_once()).await.is_err());
}

/// Pushes, pulls and removals go on while garbage is collected without a pause; what was acknowledged is there.
#[tokio::test(flavor = "multi_thread")]
async fn collecting_takes_nothing_from_pushes_that_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Arc::new(OwnRegistry::at(dir.path()).await);
    let base = Sample::new(20_000);
    base.push_to(&registry, "base", "t").await;
    let collecting = tokio::spawn({
        let root = dir.path().to_owned();
        // Longer than a push takes here, shorter than the test.
        let collection = Collection { grace: Duration::from_secs(3), ..at_once() };
        async move {
            loop {
                server::collect(&root, &collection).await.unwrap();
            }
        }
    });
    let mut pushes = tokio::task::JoinSet::new();
    for worker in 0..3 {
        let (registry, layer) = (Arc::clone(&registry), base.layer.clone());
        pushes.spawn(async move {
            for round in 0..3 {
                let mut sample = Sample::new(1000 + worker * 100 + round);
                // The base's layer is mounted, as a client does that was told it is there.
                let digest = Digest::sha256(&layer);
                let repository = format!("w{worker}/r{round}");
                let url = registry.url(&format!("{repository}/blobs/uploads/?mount={digest}&from=base"));
                assert_eq!(http().post(url).send().await.unwrap().status(), 201);
                let mut manifest: Value = serde_json::from_slice(&sample.manifest).unwrap();
                let more = json!({"mediaType": media::OCI_LAYER_GZIP, "digest": digest.to_string(), "size": layer.len()});
                manifest["layers"].as_array_mut().unwrap().push(more);
                sample.manifest = serde_json::to_vec(&manifest).unwrap();
                sample.push_to(&registry, &repository, "t").await;
                if round % 2 == 0 {
                    let own = registry.url(&format!("{repository}/manifests/{}", Digest::sha256(&sample.manifest)));
                    assert_eq!(http().delete(own).send().await.unwrap().status(), 202);
                    sample.push_to(&registry, &repository, "again").await;
                }
                let own = registry.url(&format!("{repository}/blobs/{}", Digest::sha256(&sample.layer)));
                assert_eq!(http().get(own).send().await.unwrap().bytes().await.unwrap(), sample.layer);
                let mounted = registry.url(&format!("{repository}/blobs/{digest}"));
                assert_eq!(http().get(mounted).send().await.unwrap().bytes().await.unwrap(), layer);
            }
        });
    }
    while let Some(done) = pushes.join_next().await {
        done.unwrap();
    }
    assert!(!collecting.is_finished());
    collecting.abort();
}

/// Blobs that nobody named for days are asked for, mounted and named at the very moments in which they are collected:
/// what a client was told is there is there afterwards. (The collector's list of garbage is old by the time it removes
/// the last of it; without the storage's note of it this fails in the first round.)
#[tokio::test(flavor = "multi_thread")]
async fn old_blobs_that_come_into_use_while_they_are_collected_stay() {
    const BLOBS: usize = 64;
    const CLIENTS: usize = 4;
    let dir = tempfile::tempdir().unwrap();
    let registry = Arc::new(OwnRegistry::at(dir.path()).await);
    let (mut told, mut gone, mut collected) = (0, 0, 0);
    // Twice, and more often when one of the two was through before the other began.
    for round in 0..20 {
        if round >= 2 && told > 0 && collected > 0 {
            break;
        }
        let repository = format!("old/r{round}");
        let mut digests = Vec::new();
        for n in 0..BLOBS {
            let content = format!("round {round}, blob {n}");
            let digest = Digest::sha256(content.as_bytes());
            let url = registry.url(&format!("{repository}/blobs/uploads/?digest={digest}"));
            assert_eq!(http().post(url).body(content.clone()).send().await.unwrap().status(), 201);
            let link = format!("repositories/{repository}/_blobs/sha256-{}", digest.hex());
            for path in [link, format!("blobs/sha256/{}", digest.hex())] {
                let days_ago = std::time::SystemTime::now() - Duration::from_hours(48);
                let file = std::fs::File::options().write(true).open(dir.path().join(path)).unwrap();
                file.set_modified(days_ago).unwrap();
            }
            digests.push((digest, content));
        }
        // In the collector's order, as the directory has them, and from its end: it comes towards the clients.
        let order: Vec<String> =
            std::fs::read_dir(dir.path().join(format!("repositories/{repository}/_blobs")))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap().replace('-', ":"))
                .collect();
        digests.sort_by_key(|(digest, _)| order.iter().position(|name| name == digest.as_str()));
        let waiting = Arc::new(std::sync::Mutex::new(digests));
        let collecting = tokio::spawn({
            let root = dir.path().to_owned();
            let collection = Collection { grace: Duration::from_hours(1), ..at_once() };
            async move { server::collect(&root, &collection).await.unwrap() }
        });
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..CLIENTS {
            let (registry, repository, waiting) =
                (Arc::clone(&registry), repository.clone(), Arc::clone(&waiting));
            clients.spawn(async move {
                let (mut used, mut gone) = (Vec::new(), 0);
                loop {
                    let Some((digest, content)) = waiting.lock().unwrap().pop() else { break };
                    let blob = registry.url(&format!("{repository}/blobs/{digest}"));
                    if http().head(&blob).send().await.unwrap().status() != 200 {
                        gone += 1;
                        continue;
                    }
                    // Told that it is there: it may be mounted and named.
                    let sister = format!("{repository}/sister");
                    let mount = registry
                        .url(&format!("{sister}/blobs/uploads/?mount={digest}&from={repository}"));
                    assert_eq!(http().post(mount).send().await.unwrap().status(), 201, "{digest}");
                    for repository in [repository.clone(), sister] {
                        let named = json!({
                            "mediaType": "application/octet-stream", "digest": digest.to_string(),
                            "size": content.len(),
                        });
                        let manifest = json!({
                            "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "config": named, "layers": [named],
                        });
                        let url = registry.url(&format!("{repository}/manifests/{}", digest.hex()));
                        let put = http().put(url).header("content-type", media::OCI_MANIFEST);
                        assert_eq!(put.body(manifest.to_string()).send().await.unwrap().status(), 201, "{digest}");
                        used.push((registry.url(&format!("{repository}/blobs/{digest}")), content.clone()));
                    }
                }
                (used, gone)
            });
        }
        let mut all = Vec::new();
        while let Some(done) = clients.join_next().await {
            let (used, missed) = done.unwrap();
            gone += missed;
            all.extend(used);
        }
        collected += collecting.await.unwrap().unnamed;
        told += all.len();
        for (url, content) in all {
            let answer = http().get(&url).send().await.unwrap();
            assert_eq!(answer.status(), 200, "{url}: collected although it is in use");
            assert_eq!(answer.text().await.unwrap(), content);
        }
    }
    assert!(
        told > 0 && collected > 0,
        "used: {told}, gone: {gone}, collected: {collected}: they did not meet"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_uses_a_storage() {
    let dir = tempfile::tempdir().unwrap();
    let _registry = OwnRegistry::at(dir.path()).await;
    let second = server::Server::bind(own_options(dir.path())).await.err().unwrap();
    assert!(second.to_string().contains("in use"), "{second}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_lets_an_answer_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = OwnRegistry::at(dir.path()).await;
    // More than what fits into sockets' buffers.
    let blob = noise(24 << 20);
    let digest = Digest::sha256(&blob);
    let url = registry.url(&format!("a/blobs/uploads/?digest={digest}"));
    assert_eq!(http().post(url).body(blob.clone()).send().await.unwrap().status(), 201);
    let mut answer = http().get(registry.url(&format!("a/blobs/{digest}"))).send().await.unwrap();
    let mut got = answer.chunk().await.unwrap().unwrap().to_vec();
    registry.tell_to_stop();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while tokio::net::TcpStream::connect(&registry.address).await.is_ok() {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    while let Some(piece) = answer.chunk().await.unwrap() {
        got.extend_from_slice(&piece);
    }
    assert!(got == blob);
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_what_happened() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::start(Options {
        metrics: Some("127.0.0.1:0".parse().unwrap()),
        ..own_options(dir.path())
    })
    .await;
    Sample::new(1000).push_to(&registry, "a", "t").await;
    let beside = http().get(format!("http://{}/metrics", registry.address)).send().await.unwrap();
    assert_eq!(beside.status(), 404);
    let answer =
        http().get(format!("http://{}/metrics", registry.metrics.as_ref().unwrap())).send().await.unwrap();
    assert!(answer.headers()["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let text = answer.text().await.unwrap();
    assert!(
        text.contains(r#"brigantine_registry_requests_total{method="PUT",route="manifest",code="201"} 1"#),
        "{text}"
    );
    assert!(text.ends_with("# EOF\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engines_store_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let sample = Sample::new(20_000);
    let engine = store(dir.path());
    sample.store_in(&engine, "quay.io/team/app:1");
    let source = Source::Engine(dir.path().to_owned());
    let registry = OwnRegistry::start(Options::new("127.0.0.1:0", source)).await;
    let target = tempfile::tempdir().unwrap();
    for name in ["team/app:1", "quay.io/team/app:1"] {
        let reference = Reference::parse(&format!("{}/{name}", registry.address)).unwrap();
        let pulled =
            client().pull(&store(target.path()), &reference, PullOptions::default(), silent()).await.unwrap();
        assert_eq!(pulled.digest, Digest::sha256(&sample.manifest));
    }
    assert_eq!(http().post(registry.url("team/app/blobs/uploads/")).send().await.unwrap().status(), 405);
    // What is added later is seen.
    Sample::new(500).store_in(&engine, "quay.io/team/app:2");
    let tags: Value =
        http().get(registry.url("team/app/tags/list")).send().await.unwrap().json().await.unwrap();
    assert_eq!(tags["tags"], json!(["1", "2"]));
    // Another repository's content is not this one's.
    let foreign = registry.url(&format!("team/other/blobs/{}", Digest::sha256(&sample.layer)));
    assert_eq!(http().get(foreign).send().await.unwrap().status(), 404);
}
