//! Registries that break off, stall, lie, and try to get at secrets.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use brigantine_image::{Digest, Platform, Reference, media};
use brigantine_registry::{Class, Client, Config, Error, PullOptions, Pulled};
use serde_json::json;
use support::{Answer, LyingServer, Sample, client, password, reply, silent, store};

async fn pull_from(server: &LyingServer, client: Client, options: PullOptions) -> Result<Pulled, Error> {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let reference = Reference::parse(&format!("{}/x:t", server.address)).unwrap();
    let result =
        tokio::time::timeout(Duration::from_secs(30), client.pull(&store, &reference, options, silent()))
            .await
            .expect("the pull ends");
    if result.is_err() {
        assert!(store.list().unwrap().is_empty(), "nothing half-made is visible");
    }
    result
}

async fn pull(server: &LyingServer) -> Result<Pulled, Error> {
    pull_from(server, client(), PullOptions::default()).await
}

fn range_start(head: &str) -> Option<usize> {
    head.lines().find_map(|line| {
        line.to_ascii_lowercase().strip_prefix("range: bytes=")?.strip_suffix('-')?.parse().ok()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_download_goes_on_where_it_stopped() {
    let sample = Arc::new(Sample::new(400_000));
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            sample.honest(head).unwrap_or_else(|| {
                let start = range_start(head).unwrap_or(0);
                let rest = &sample.layer[start..];
                let mut answer = if start == 0 {
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", rest.len())
                } else {
                    format!(
                        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\n\r\n",
                        rest.len(),
                        sample.layer.len() - 1,
                        sample.layer.len()
                    )
                }
                .into_bytes();
                // Never more than 150,000 bytes at a time.
                answer.extend_from_slice(&rest[..rest.len().min(150_000)]);
                Answer::Raw(answer)
            })
        }
    })
    .await;
    pull(&server).await.unwrap();
    let layer = format!("GET /v2/x/blobs/{}", Digest::sha256(&sample.layer));
    let starts: Vec<usize> = server.requests(&layer).iter().filter_map(|head| range_start(head)).collect();
    assert!(starts.len() >= 2 && starts.windows(2).all(|pair| pair[0] < pair[1]), "{starts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_ranges_still_completes() {
    let sample = Arc::new(Sample::new(200_000));
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, number| {
            sample.honest(head).unwrap_or_else(|| {
                let mut answer =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", sample.layer.len()).into_bytes();
                let whole = if number == 1 { 90_000 } else { sample.layer.len() };
                answer.extend_from_slice(&sample.layer[..whole]);
                Answer::Raw(answer)
            })
        }
    })
    .await;
    pull(&server).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn stalls_end_and_are_tried_again() {
    let sample = Arc::new(Sample::new(200_000));
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            sample.honest(head).unwrap_or_else(|| {
                let start = range_start(head).unwrap_or(0);
                if start > 0 {
                    let range = format!(
                        "Content-Range: bytes {start}-{}/{}\r\n",
                        sample.layer.len() - 1,
                        sample.layer.len()
                    );
                    return reply("206 Partial Content", &range, &sample.layer[start..]);
                }
                let mut answer =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", sample.layer.len()).into_bytes();
                answer.extend_from_slice(&sample.layer[..50_000]);
                Answer::Stall(answer)
            })
        }
    })
    .await;
    pull(&server).await.unwrap();

    let silent = LyingServer::start(|_, _| Answer::Stall(Vec::new())).await;
    let error = pull(&silent).await.unwrap_err();
    assert!(error.to_string().contains("/v2/"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_content_is_refused_by_digest() {
    let sample = Arc::new(Sample::new(5000));
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            sample.honest(head).unwrap_or_else(|| {
                let mut wrong = sample.layer.clone();
                *wrong.last_mut().unwrap() ^= 1;
                reply("200 OK", "", &wrong)
            })
        }
    })
    .await;
    let error = pull(&server).await.unwrap_err();
    assert!(error.report().contains(Digest::sha256(&sample.layer).as_str()), "{}", error.report());
    assert!(error.report().contains("has digest"), "{}", error.report());

    let too_long = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            sample
                .honest(head)
                .unwrap_or_else(|| reply("200 OK", "", &[sample.layer.clone(), vec![0; 100]].concat()))
        }
    })
    .await;
    let error = pull(&too_long).await.unwrap_err();
    assert!(error.to_string().contains("is longer than the"), "{error}");

    let other_manifest = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            if head.contains("/manifests/") {
                let claimed = format!("Docker-Content-Digest: {}\r\n", Digest::sha256(b"other"));
                return reply("200 OK", &claimed, &sample.manifest);
            }
            reply("200 OK", "", b"{}")
        }
    })
    .await;
    assert!(pull(&other_manifest).await.unwrap_err().to_string().contains("as promised"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_registry_is_said_to_be_none() {
    for (headers, body, says) in [
        ("Content-Type: text/html\r\n", "<html>".as_bytes(), "HTML page"),
        ("", b"{".as_slice(), "not valid JSON"),
        ("", br#"{"schemaVersion":1,"fsLayers":[]}"#.as_slice(), "version 1 is not supported"),
        ("", br#"{"schemaVersion":2}"#.as_slice(), "neither a manifest nor an index"),
    ] {
        let server = LyingServer::start(move |head, _| {
            if head.contains("/manifests/") {
                reply("200 OK", headers, body)
            } else {
                reply("200 OK", "", b"{}")
            }
        })
        .await;
        let error = pull(&server).await.unwrap_err();
        assert!(error.report().contains(says), "{says}: {}", error.report());
    }
    let endless = LyingServer::start(|head, _| {
        if head.contains("/manifests/") {
            return Answer::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{".to_vec());
        }
        reply("200 OK", "", b"{}")
    })
    .await;
    assert!(pull(&endless).await.unwrap_err().to_string().contains("larger than"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_said_in_dockers_words() {
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    let server = LyingServer { address: format!("127.0.0.1:{port}"), heads: Arc::default() };
    let error = pull(&server).await.unwrap_err();
    assert_eq!(error.class(), Class::Internal);
    assert_eq!(
        error.to_string(),
        format!(
            "Get \"http://127.0.0.1:{port}/v2/\": dial tcp 127.0.0.1:{port}: connect: connection refused"
        )
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_do_not_follow_redirects() {
    let sample = Arc::new(Sample::new(5000));
    let elsewhere = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |_, _| reply("200 OK", "", &sample.layer)
    })
    .await;
    let away = format!("Location: http://{}/stolen\r\n", elsewhere.address);
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            if !head.to_ascii_lowercase().contains("authorization: basic") {
                return reply("401 Unauthorized", "WWW-Authenticate: Basic realm=\"x\"\r\n", b"{}");
            }
            sample.honest(head).unwrap_or_else(|| reply("307 Temporary Redirect", &away, b""))
        }
    })
    .await;
    let options = PullOptions { credentials: password("user", "hunter2"), ..PullOptions::default() };
    pull_from(&server, client(), options).await.unwrap();
    let stolen = elsewhere.requests("GET /stolen");
    assert_eq!(stolen.len(), 1);
    assert!(!stolen[0].to_ascii_lowercase().contains("authorization"), "{stolen:?}");

    for target in ["file:///etc/passwd", "gopher://127.0.0.1/"] {
        let location = format!("Location: {target}\r\n");
        let server = LyingServer::start({
            let sample = Arc::clone(&sample);
            move |head, _| sample.honest(head).unwrap_or_else(|| reply("302 Found", &location, b""))
        })
        .await;
        assert!(pull(&server).await.unwrap_err().to_string().contains("not allowed from here"));
    }
    let round = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| sample.honest(head).unwrap_or_else(|| reply("302 Found", "Location: /round\r\n", b""))
    })
    .await;
    assert!(pull(&round).await.unwrap_err().to_string().contains("redirects more than"));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_fetched_from_the_realm() {
    let sample = Arc::new(Sample::new(5000));
    let realm = LyingServer::start(|_, _| reply("200 OK", "", br#"{"token":"t0ken"}"#)).await;
    let challenge =
        format!("WWW-Authenticate: Bearer realm=\"http://{}/token\",service=\"reg\"\r\n", realm.address);
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            if !head.contains("Bearer t0ken") {
                return reply("401 Unauthorized", &challenge, b"{}");
            }
            sample.honest(head).unwrap_or_else(|| reply("200 OK", "", &sample.layer))
        }
    })
    .await;
    pull(&server).await.unwrap();
    let asked = realm.requests("GET /token");
    assert_eq!(asked.len(), 1);
    assert!(asked[0].contains("service=reg&scope=repository%3Ax%3Apull "), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_requests_are_put_off() {
    let sample = Arc::new(Sample::new(5000));
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, number| {
            if head.contains("/manifests/") && number == 1 {
                return reply("429 Too Many Requests", "Retry-After: 1\r\n", b"{}");
            }
            sample.honest(head).unwrap_or_else(|| reply("200 OK", "", &sample.layer))
        }
    })
    .await;
    let began = std::time::Instant::now();
    pull(&server).await.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1));
    let never = LyingServer::start(|head, _| {
        if head.contains("/manifests/") {
            let body = br#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}"#;
            return reply("429 Too Many Requests", "", body);
        }
        reply("200 OK", "", b"{}")
    })
    .await;
    let error = pull(&never).await.unwrap_err();
    assert!(
        error.to_string().starts_with("toomanyrequests: ") && error.to_string().contains("slow down"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_platforms_manifest_is_chosen_from_an_index() {
    let sample = Arc::new(Sample::new(5000));
    let host = Platform::host();
    let entry = |architecture: &str, raw: &[u8]| {
        json!({"mediaType": media::OCI_MANIFEST, "digest": Digest::sha256(raw).to_string(), "size": raw.len(),
               "platform": {"os": "linux", "architecture": architecture}})
    };
    let index = serde_json::to_vec(&json!({
        "schemaVersion": 2, "mediaType": media::OCI_INDEX,
        "manifests": [entry("s390x", b"{}"), entry(&host.architecture, &sample.manifest)],
    }))
    .unwrap();
    let server = LyingServer::start({
        let (sample, index) = (Arc::clone(&sample), index.clone());
        move |head, _| {
            if head.contains("/manifests/t") {
                return reply("200 OK", &format!("Content-Type: {}\r\n", media::OCI_INDEX), &index);
            }
            sample.honest(head).unwrap_or_else(|| reply("200 OK", "", &sample.layer))
        }
    })
    .await;
    let pulled = pull(&server).await.unwrap();
    assert_eq!(pulled.digest, Digest::sha256(&index));
    assert_eq!(pulled.image.manifest.digest, Digest::sha256(&sample.manifest));
    let options = PullOptions { platform: Some("linux/ppc64le".parse().unwrap()), ..PullOptions::default() };
    let error = pull_from(&server, client(), options).await.unwrap_err();
    assert_eq!(error.class(), Class::NotFound);
    assert!(error.to_string().contains("no matching manifest for linux/ppc64le"), "{error}");
}

/// Indexes that say nothing of platforms are looked into, in their order, when nothing else fits.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_within_an_index_is_looked_into() {
    let sample = Arc::new(Sample::new(5000));
    let mut documents = std::collections::HashMap::new();
    let mut index = |entries: &[serde_json::Value]| {
        let raw = serde_json::to_vec(
            &json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": entries}),
        )
        .unwrap();
        let digest = Digest::sha256(&raw);
        let entry = json!({"mediaType": media::OCI_INDEX, "digest": digest.to_string(), "size": raw.len()});
        documents.insert(digest.to_string(), raw);
        entry
    };
    let manifest = |architecture: &str, raw: &[u8]| {
        json!({"mediaType": media::OCI_MANIFEST, "digest": Digest::sha256(raw).to_string(), "size": raw.len(),
               "platform": {"os": "linux", "architecture": architecture}})
    };
    let own = index(&[manifest("s390x", b"{}"), manifest(&Platform::host().architecture, &sample.manifest)]);
    let other = index(&[manifest("ppc64le", b"{}")]);
    let middle = index(&[own, manifest("riscv64", b"{}")]);
    let top = index(&[manifest("mips64le", b"{}"), other, middle])["digest"].as_str().unwrap().to_owned();
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            let name = head.split(' ').nth(1).unwrap().split_once("/manifests/").map_or("", |(_, name)| name);
            if let Some(raw) = documents.get(if name == "t" { top.as_str() } else { name }) {
                return reply("200 OK", &format!("Content-Type: {}\r\n", media::OCI_INDEX), raw);
            }
            sample.honest(head).unwrap_or_else(|| reply("200 OK", "", &sample.layer))
        }
    })
    .await;
    let pulled = pull(&server).await.unwrap();
    assert_eq!(pulled.image.manifest.digest, Digest::sha256(&sample.manifest));
    let options = PullOptions { platform: Some("linux/arm/v5".parse().unwrap()), ..PullOptions::default() };
    let error = pull_from(&server, client(), options).await.unwrap_err();
    assert_eq!(error.class(), Class::NotFound, "{error}");
}

/// A partial download is not synced: after a power cut it may hold anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_torn_partial_download_is_given_up() {
    let sample = Arc::new(Sample::new(200_000));
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| {
            sample.honest(head).unwrap_or_else(|| {
                let start = range_start(head).unwrap_or(0);
                let (status, range) = match start {
                    0 => ("200 OK", String::new()),
                    _ => (
                        "206 Partial Content",
                        format!("Content-Range: bytes {start}-{}/*\r\n", sample.layer.len() - 1),
                    ),
                };
                reply(status, &range, &sample.layer[start..])
            })
        }
    })
    .await;
    let digest = Digest::sha256(&sample.layer);
    let whole = sample.layer.len();
    let torn = |kept: usize, zeros: usize| [&sample.layer[..kept], &vec![0; zeros]].concat();
    // Zeros where data was, from the middle on and from the beginning; all of it; and what is good goes on.
    for (left, starts) in [
        (torn(50_000, 30_000), vec![Some(80_000), None]),
        (torn(0, 1000), vec![Some(1000), None]),
        (torn(0, whole), vec![None]),
        (torn(90_000, 0), vec![Some(90_000)]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let partial = dir.path().join("image/tmp").join(format!("partial-sha256-{}", digest.hex()));
        std::fs::write(&partial, left).unwrap();
        let asked = server.requests(&format!("GET /v2/x/blobs/{digest}")).len();
        let reference = Reference::parse(&format!("{}/x:t", server.address)).unwrap();
        let pulled = client().pull(&store, &reference, PullOptions::default(), silent()).await.unwrap();
        assert_eq!(pulled.image.layers[0].digest, digest);
        let asked: Vec<Option<usize>> = server.requests(&format!("GET /v2/x/blobs/{digest}"))[asked..]
            .iter()
            .map(|head| range_start(head))
            .collect();
        assert_eq!(asked, starts);
        assert!(!partial.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pulls_at_once_fetch_a_layer_once() {
    let sample = Arc::new(Sample::new(300_000));
    let fetched = Arc::new(AtomicUsize::new(0));
    let server = LyingServer::start({
        let (sample, fetched) = (Arc::clone(&sample), Arc::clone(&fetched));
        move |head, _| {
            sample.honest(head).unwrap_or_else(|| {
                fetched.fetch_add(1, Ordering::SeqCst);
                reply("200 OK", "", &sample.layer)
            })
        }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let client = client();
    let reference = |tag: &str| Reference::parse(&format!("{}/x:{tag}", server.address)).unwrap();
    let (a, b) = (reference("a"), reference("b"));
    let (first, second) = tokio::join!(
        client.pull(&store, &a, PullOptions::default(), silent()),
        client.pull(&store, &b, PullOptions::default(), silent()),
    );
    assert_eq!(first.unwrap().image.id, second.unwrap().image.id);
    assert_eq!(fetched.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_serves_docker_io_and_gets_no_secrets() {
    let sample = Arc::new(Sample::new(5000));
    let server = LyingServer::start({
        let sample = Arc::clone(&sample);
        move |head, _| sample.honest(head).unwrap_or_else(|| reply("200 OK", "", &sample.layer))
    })
    .await;
    let client =
        Client::new(Config { mirrors: vec![format!("http://{}", server.address)], ..Config::default() });
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let reference = Reference::parse("thing").unwrap();
    let options = PullOptions { credentials: password("user", "hunter2"), ..PullOptions::default() };
    client.pull(&store, &reference, options, silent()).await.unwrap();
    assert_eq!(store.resolve("thing:latest").unwrap().tags[0].familiar(), "thing:latest");
    assert!(
        server.heads.lock().unwrap().iter().all(|head| !head.to_ascii_lowercase().contains("authorization"))
    );
}
