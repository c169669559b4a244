//! More registries that lie: about sizes, about themselves, about where things are; and one that breaks uploads off.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use brigantine_image::{Digest, Reference, Store, media};
use brigantine_registry::{Class, Error, PullOptions, Pulled};
use serde_json::{Value, json};
use support::{
    Answer, LyingServer, OwnRegistry, Sample, client, http, password, pushing, reply, silent, store,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

async fn pull(server: &LyingServer) -> Result<Pulled, Error> {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let reference = Reference::parse(&format!("{}/x:t", server.address)).unwrap();
    let options = PullOptions { credentials: password("ann", "hunter2"), ..PullOptions::default() };
    let client = client();
    let pulling = client.pull(&store, &reference, options, silent());
    let result = tokio::time::timeout(Duration::from_secs(30), pulling).await.expect("the pull ends");
    if let Err(error) = &result {
        assert!(store.list().unwrap().is_empty(), "nothing half-made is visible");
        let shown = format!("{error:?} {}", error.report());
        assert!(!shown.contains("hunter2") && !shown.contains("YW5uOmh1bnRlcjI"), "{shown}");
    }
    result
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_layers_are_refused() {
    let mut sample = Sample::new(100);
    let mut manifest: Value = serde_json::from_slice(&sample.manifest).unwrap();
    let layer = manifest["layers"][0].clone();
    manifest["layers"] = Value::Array(vec![layer; 10_000]);
    sample.manifest = serde_json::to_vec(&manifest).unwrap();
    let sample = Arc::new(sample);
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| sample.honest(head).unwrap_or_else(|| reply("200 OK", "", &sample.layer))
    })
    .await;
    let error = pull(&server).await.unwrap_err().report();
    assert!(error.contains("10000 layers"), "{error}");
    assert!(!server.heads.lock().unwrap().iter().any(|head| head.contains("/blobs/")));
}

/// Its blob is that of one layer, its diff id that of another.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_not_taken_for_another() {
    let (one, other) = (Sample::new(3000), Sample::new(5000));
    let mut mixed = Sample::new(3000);
    mixed.config = other.config.clone();
    let mut manifest: Value = serde_json::from_slice(&mixed.manifest).unwrap();
    manifest["config"] = serde_json::from_slice::<Value>(&other.manifest).unwrap()["config"].clone();
    mixed.manifest = serde_json::to_vec(&manifest).unwrap();
    let server = LyingServer::start(move |head, _| {
        let sample = match head.split('/').nth(2) {
            Some("one") => &one,
            Some("other") => &other,
            _ => &mixed,
        };
        sample.honest(head).unwrap_or_else(|| reply("200 OK", "", &sample.layer))
    })
    .await;
    // The blob comes while the layer is there; both are there, seen in this process or by the one before.
    for (before, opened_again) in
        [(vec!["other"], false), (vec!["one", "other"], false), (vec!["one", "other"], true)]
    {
        let dir = tempfile::tempdir().unwrap();
        let pull = async |store: &Store, name: &str| {
            let reference = Reference::parse(&format!("{}/{name}:t", server.address)).unwrap();
            client().pull(store, &reference, PullOptions::default(), silent()).await
        };
        let mut there = store(dir.path());
        for name in &before {
            pull(&there, name).await.unwrap();
        }
        if opened_again {
            drop(there);
            there = store(dir.path());
        }
        for name in &before {
            pull(&there, name).await.unwrap();
        }
        let error = pull(&there, "mixed").await.unwrap_err().report();
        assert!(error.contains("not the diff id its image states"), "{error}");
        assert_eq!(there.list().unwrap().len(), before.len(), "nothing half-made is visible");
    }
}

/// A digest cannot be known before the document, but a registry may answer anything with the same index.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_names_itself_ends() {
    let own = Digest::sha256(b"whatever");
    let index = json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": [
        {"mediaType": media::OCI_INDEX, "digest": own.to_string(), "size": 1}]});
    let index = serde_json::to_vec(&index).unwrap();
    let server = LyingServer::start(move |head, _| {
        if head.contains("/manifests/") {
            let kind = format!("Content-Type: {}\r\nDocker-Content-Digest: {own}\r\n", media::OCI_INDEX);
            let kind = if head.contains("sha256:") {
                kind
            } else {
                format!("Content-Type: {}\r\n", media::OCI_INDEX)
            };
            return reply("200 OK", &kind, &index);
        }
        reply("200 OK", "", b"{}")
    })
    .await;
    let error = pull(&server).await.unwrap_err().report();
    assert!(error.contains("as promised"), "{error}");
    assert!(server.requests("GET /v2/x/manifests/").len() <= 2);
}

/// Honest indexes, each within the next one.
#[tokio::test(flavor = "multi_thread")]
async fn indexes_do_not_go_down_for_ever() {
    let mut documents = std::collections::HashMap::new();
    let mut child: Option<(Digest, usize)> = None;
    for _ in 0..50 {
        let manifests = match &child {
            None => json!([]),
            Some((digest, size)) => {
                json!([{"mediaType": media::OCI_INDEX, "digest": digest.to_string(), "size": size}])
            }
        };
        let raw = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": manifests})).unwrap();
        child = Some((Digest::sha256(&raw), raw.len()));
        documents.insert(Digest::sha256(&raw).to_string(), raw);
    }
    let top = child.unwrap().0.to_string();
    let server = LyingServer::start(move |head, _| {
        let path = head.split(' ').nth(1).unwrap();
        let Some((_, name)) = path.split_once("/manifests/") else { return reply("200 OK", "", b"{}") };
        let raw = &documents[if name == "t" { top.as_str() } else { name }];
        reply("200 OK", &format!("Content-Type: {}\r\n", media::OCI_INDEX), raw)
    })
    .await;
    let error = pull(&server).await.unwrap_err().report();
    assert!(error.contains("deep"), "{error}");
    assert!(server.requests("GET /v2/x/manifests/").len() < 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_stay_within_http_and_end() {
    for (location, says) in [
        ("file:///etc/passwd", "not allowed"),
        ("ftp://127.0.0.1/x", "not allowed"),
        ("/v2/x/manifests/t", "redirects more than"),
        ("http://[", "without a usable Location"),
    ] {
        let server = LyingServer::start(move |head, _| {
            if head.contains("/manifests/") {
                return reply("307 Temporary Redirect", &format!("Location: {location}\r\n"), b"");
            }
            reply("200 OK", "", b"{}")
        })
        .await;
        let error = pull(&server).await.unwrap_err().report();
        assert!(error.contains(says), "{location}: {error}");
        assert!(server.heads.lock().unwrap().len() < 30);
    }
}

/// The registry sends a layer's reader elsewhere, and asks for a password there as well.
#[tokio::test(flavor = "multi_thread")]
async fn another_host_gets_no_secret_however_it_asks() {
    let sample = Arc::new(Sample::new(5000));
    let elsewhere = LyingServer::start(|_, _| {
        reply("401 Unauthorized", "WWW-Authenticate: Basic realm=\"give me\"\r\n", b"")
    })
    .await;
    let location = format!("Location: http://{}/layer?signature=s3cret\r\n", elsewhere.address);
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            if !head.to_ascii_lowercase().contains("authorization: basic") {
                return reply("401 Unauthorized", "WWW-Authenticate: Basic realm=\"x\"\r\n", b"");
            }
            sample.honest(head).unwrap_or_else(|| reply("307 Temporary Redirect", &location, b""))
        }
    })
    .await;
    let error = pull(&server).await.unwrap_err().report();
    let asked = elsewhere.heads.lock().unwrap().join("\n").to_ascii_lowercase();
    assert!(asked.contains("get /layer") && !asked.contains("authorization"), "{asked}");
    assert!(!error.contains("s3cret"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_length_that_is_not_kept_is_no_layer() {
    let sample = Arc::new(Sample::new(50_000));
    // More was announced than comes, each time; and less is announced than there is.
    for (announced, sent) in [(60_000, 30_000), (10_000, 10_000)] {
        let server = LyingServer::start({
            let sample = Arc::clone(&sample);
            move |head, _| {
                sample.honest(head).unwrap_or_else(|| {
                    let mut answer =
                        format!("HTTP/1.1 200 OK\r\nContent-Length: {announced}\r\n\r\n").into_bytes();
                    answer.extend_from_slice(&sample.layer[..sent]);
                    Answer::Raw(answer)
                })
            }
        })
        .await;
        let error = pull(&server).await.unwrap_err();
        assert_eq!(error.class(), Class::Internal, "{error}");
        assert!(server.heads.lock().unwrap().len() < 20);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_layer_comes_from_its_own_place() {
    let mut sample = Sample::new(20_000);
    let layer = sample.layer.clone();
    let elsewhere = LyingServer::start(move |_, _| reply("200 OK", "", &layer)).await;
    let mut manifest: Value = serde_json::from_slice(&sample.manifest).unwrap();
    manifest["layers"][0]["mediaType"] = json!(media::DOCKER_FOREIGN_LAYER);
    manifest["layers"][0]["urls"] =
        json!(["file:///etc/passwd", format!("http://{}/layer", elsewhere.address)]);
    sample.manifest = serde_json::to_vec(&manifest).unwrap();
    let server = LyingServer::start({
        move |head, _| {
            if !head.to_ascii_lowercase().contains("authorization: basic") {
                return reply("401 Unauthorized", "WWW-Authenticate: Basic realm=\"x\"\r\n", b"");
            }
            sample.honest(head).unwrap_or_else(|| reply("404 Not Found", "", b"{}"))
        }
    })
    .await;
    pull(&server).await.unwrap();
    let asked = elsewhere.heads.lock().unwrap().join("\n").to_ascii_lowercase();
    assert!(asked.contains("get /layer") && !asked.contains("authorization"), "{asked}");
}

/// Such a layer is not sent either: the manifest names it, and our registry takes it without.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_layer_is_not_distributed() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(&dir.path().join("registry")).await;
    let store = store(dir.path());
    let mut sample = Sample::new(20_000);
    let mut manifest: Value = serde_json::from_slice(&sample.manifest).unwrap();
    manifest["layers"][0]["mediaType"] =
        json!("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip");
    manifest["layers"][0]["urls"] = json!(["https://registry.test/layer"]);
    sample.manifest = serde_json::to_vec(&manifest).unwrap();
    let name = format!("{}/app:1", registry.address);
    let image = sample.store_in(&store, &name);
    let reference = Reference::parse(&name).unwrap();
    client().push(&store, &image, &reference, pushing(None), silent()).await.unwrap();
    let blob = registry.url(&format!("app/blobs/{}", Digest::sha256(&sample.layer)));
    assert_eq!(http().get(blob).send().await.unwrap().status(), 404);
    let there = http().get(registry.url("app/manifests/1")).send().await.unwrap();
    assert_eq!(there.bytes().await.unwrap(), sample.manifest);
}

/// Passes connections on to a registry, and cuts the first upload after some bytes.
async fn cutting_proxy(target: String, after: usize) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let cut = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&cut);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (target, cut) = (target.clone(), Arc::clone(&cut));
            tokio::spawn(async move {
                let registry = TcpStream::connect(target).await.unwrap();
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_registry, mut to_registry) = registry.into_split();
                let back = tokio::spawn(async move {
                    tokio::io::copy(&mut from_registry, &mut to_client).await.ok();
                });
                let (mut buffer, mut uploading, mut sent) = (vec![0; 16 << 10], false, 0);
                while let Ok(n) = from_client.read(&mut buffer).await {
                    if n == 0 {
                        break;
                    }
                    if buffer[..n].starts_with(b"PATCH ") {
                        (uploading, sent) = (true, 0);
                    }
                    if to_registry.write_all(&buffer[..n]).await.is_err() {
                        break;
                    }
                    sent += n;
                    if uploading && sent > after && cut.load(Ordering::SeqCst) < 2 {
                        cut.fetch_add(1, Ordering::SeqCst);
                        break;
                    }
                }
                back.abort();
            });
        }
    });
    (address, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_where_it_broke_off() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(&dir.path().join("registry")).await;
    let (address, cut) = cutting_proxy(registry.address.clone(), 1 << 20).await;
    let store = store(dir.path());
    let sample = Sample::new(4 << 20);
    let name = format!("{address}/app:1");
    let image = sample.store_in(&store, &name);
    let reference = Reference::parse(&name).unwrap();
    let pushed = client().push(&store, &image, &reference, pushing(None), silent()).await.unwrap();
    assert_eq!(cut.load(Ordering::SeqCst), 2);
    assert_eq!(pushed.digest, Digest::sha256(&sample.manifest));
    let blob = registry.url(&format!("app/blobs/{}", Digest::sha256(&sample.layer)));
    assert!(http().get(blob).send().await.unwrap().bytes().await.unwrap() == sample.layer);
    let metrics = http().get(format!("http://{}/metrics", registry.address)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    // One upload of the layer and one of the configuration: nothing was begun anew.
    assert!(metrics.contains(r#"requests_total{method="POST",route="upload",code="202"} 2"#), "{metrics}");
}
