//! Layers in every form that others write, digests of every algorithm, and registries behind a proxy.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Command;

use brigantine_image::{Algorithm, Digest, Document, Image, Reference, Store, media};
use brigantine_registry::{Client, Config, PullOptions};
use serde_json::{Value, json};
use support::{LyingServer, OwnRegistry, Sample, client, http, pushing, reply, silent, store};

/// Pulls into a store of its own below `dir`.
async fn pull(dir: &Path, client: Client, name: &str) -> (Store, Image) {
    let store = store(dir);
    let reference = Reference::parse(name).unwrap();
    let pulled = client.pull(&store, &reference, PullOptions::default(), silent()).await.unwrap();
    (store, pulled.image)
}

/// Whether the image's one file is there.
fn assert_whole(store: &Store, image: &Image, size: u64) {
    let lower = store.layer_files(image).unwrap()[0].open().unwrap();
    assert_eq!(std::fs::metadata(lower.path().join("etc/noise")).unwrap().len(), size);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_skopeo_compresses_is_pulled_as_the_same_image() {
    if Command::new("skopeo").arg("--version").output().is_err() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let here = OwnRegistry::at(&dir.path().join("here")).await;
    let sample = Sample::new(300_000).plain();
    sample.push_to(&here, "plain", "t").await;
    for form in ["gzip", "zstd", "zstd:chunked"] {
        // One that has no such layer in another form: skopeo would take that.
        let there = OwnRegistry::at(&dir.path().join("there").join(form)).await;
        let name = form.replace(':', "-");
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"]);
        skopeo.args(["--dest-compress-format", form]);
        skopeo.arg(format!("docker://{}/plain:t", here.address));
        skopeo.arg(format!("docker://{}/{name}:t", there.address));
        let output = tokio::task::spawn_blocking(move || skopeo.output().unwrap()).await.unwrap();
        assert!(output.status.success(), "{form}: {}", String::from_utf8_lossy(&output.stderr));

        let name = format!("{}/{name}:t", there.address);
        let found = client().resolve(&Reference::parse(&name).unwrap(), None).await.unwrap();
        let Document::Manifest(manifest) = found.document else { panic!("an index") };
        let layer = &manifest.layers[0];
        let expected = if form == "gzip" { media::OCI_LAYER_GZIP } else { media::OCI_LAYER_ZSTD };
        assert_eq!(layer.media_type, expected, "{form}");
        let chunked = layer.annotations.keys().any(|key| key.contains("zstd-chunked"));
        assert_eq!(chunked, form == "zstd:chunked", "{:?}", layer.annotations);

        let (store, image) = pull(&dir.path().join(form), client(), &name).await;
        assert_eq!(image.id, Digest::sha256(&sample.config));
        assert_whole(&store, &image, 300_000);
    }
}

/// A gzip member of its own.
fn member(data: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(data).unwrap();
    gzip.finish().unwrap()
}

/// eStargz: a member for each entry and each chunk of a large one, a table of contents as the last entry, and a member
/// without data whose header says where the table is.
#[tokio::test(flavor = "multi_thread")]
async fn an_estargz_layer_is_an_ordinary_one() {
    let mut plain = Sample::new(300_000).plain();
    let mut archive = tar::Builder::new(Vec::new());
    for mut entry in tar::Archive::new(&plain.layer[..]).entries().unwrap().map(Result::unwrap) {
        let (mut header, path) = (entry.header().clone(), entry.path().unwrap().into_owned());
        let mut data = Vec::new();
        entry.read_to_end(&mut data).unwrap();
        archive.append_data(&mut header, path, &data[..]).unwrap();
    }
    let table = serde_json::to_vec(&json!({ "version": 1, "entries": [] })).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(table.len() as u64);
    header.set_mode(0o444);
    archive.append_data(&mut header, "stargz.index.json", &table[..]).unwrap();
    let archive = archive.into_inner().unwrap();
    let mut layer = Vec::new();
    for part in archive.chunks(64 << 10) {
        layer.extend(member(part));
    }
    // RFC 1952, 2.3.1.1: an extra field "SG" with the table's position.
    layer.extend([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0]);
    layer.extend(b"0000000000000000STARGZ");
    layer.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    plain.diff_id = Digest::sha256(&archive);
    plain.layer = layer;
    let mut config: Value = serde_json::from_slice(&plain.config).unwrap();
    config["rootfs"]["diff_ids"] = json!([plain.diff_id.to_string()]);
    plain.config = serde_json::to_vec(&config).unwrap();
    describe(&mut plain, Algorithm::Sha256, media::OCI_LAYER_GZIP);

    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::at(&dir.path().join("registry")).await;
    plain.push_to(&registry, "lazy", "t").await;
    let (store, image) = pull(dir.path(), client(), &format!("{}/lazy:t", registry.address)).await;
    assert_whole(&store, &image, 300_000);
}

/// Makes the manifest anew, naming the layer by a digest of this algorithm.
fn describe(sample: &mut Sample, algorithm: Algorithm, media_type: &str) {
    sample.manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": media::OCI_MANIFEST,
        "config": {
            "mediaType": media::OCI_CONFIG, "digest": Digest::sha256(&sample.config).to_string(),
            "size": sample.config.len(),
        },
        "layers": [{
            "mediaType": media_type, "digest": Digest::of(algorithm, &sample.layer).to_string(),
            "size": sample.layer.len(),
        }],
    }))
    .unwrap();
}

/// A server of the image whose layer is asked for by any digest.
async fn serve(sample: Sample) -> LyingServer {
    LyingServer::start(move |head, _| {
        sample.honest(head).unwrap_or_else(|| reply("200 OK", "", &sample.layer))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_named_by_sha512_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(300_000);
    let archive = Sample::new(300_000).plain().layer;
    let mut config: Value = serde_json::from_slice(&sample.config).unwrap();
    config["rootfs"]["diff_ids"] = json!([Digest::of(Algorithm::Sha512, &archive).to_string()]);
    sample.config = serde_json::to_vec(&config).unwrap();
    describe(&mut sample, Algorithm::Sha512, media::OCI_LAYER_GZIP);
    let server = serve(sample).await;
    let (right, image) =
        pull(&dir.path().join("right"), client(), &format!("{}/long:t", server.address)).await;
    assert_eq!(image.layers[0].digest.algorithm(), Algorithm::Sha512);
    assert_whole(&right, &image, 300_000);

    // And what has another digest than that is refused.
    let mut sample = Sample::new(300_000);
    describe(&mut sample, Algorithm::Sha512, media::OCI_LAYER_GZIP);
    let last = sample.layer.len() - 1;
    sample.layer[last] ^= 1;
    let server = serve(sample).await;
    let wrong = store(&dir.path().join("wrong"));
    let reference = Reference::parse(&format!("{}/long:t", server.address)).unwrap();
    client().pull(&wrong, &reference, PullOptions::default(), silent()).await.unwrap_err();
    assert!(wrong.list().unwrap().is_empty());
}

/// Manifest, configuration and layer by sha512: put into our registry, pulled by that digest, and pushed to another.
#[tokio::test(flavor = "multi_thread")]
async fn sha512_goes_from_end_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let here = OwnRegistry::at(&dir.path().join("here")).await;
    let there = OwnRegistry::at(&dir.path().join("there")).await;
    let of = |raw: &[u8]| Digest::of(Algorithm::Sha512, raw);
    let sample = Sample::new(100_000);
    for blob in [&sample.layer, &sample.config] {
        let url = here.url(&format!("long/blobs/uploads/?digest={}", of(blob)));
        assert_eq!(http().post(url).body(blob.clone()).send().await.unwrap().status(), 201);
    }
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media::OCI_MANIFEST,
        "config": { "mediaType": media::OCI_CONFIG, "digest": of(&sample.config).to_string(), "size": sample.config.len() },
        "layers": [{
            "mediaType": media::OCI_LAYER_GZIP, "digest": of(&sample.layer).to_string(), "size": sample.layer.len(),
        }],
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let digest = of(&manifest);
    let put =
        http().put(here.url(&format!("long/manifests/{digest}"))).header("content-type", media::OCI_MANIFEST);
    assert_eq!(put.body(manifest.clone()).send().await.unwrap().status(), 201);

    let name = format!("{}/long@{digest}", here.address);
    let (store, image) = pull(&dir.path().join("a"), client(), &name).await;
    assert_eq!((&image.manifest.digest, &image.id), (&digest, &of(&sample.config)));
    assert_eq!(store.resolve(&name).unwrap().id, image.id);
    assert_whole(&store, &image, 100_000);
    let checked = store.check(false, &brigantine_image::InUse::default()).unwrap();
    assert!(checked.problems.is_empty(), "{:?}", checked.problems);

    let target = Reference::parse(&format!("{}/moved:t", there.address)).unwrap();
    let pushed = client().push(&store, &image, &target, pushing(None), silent()).await.unwrap();
    assert_eq!(pushed.digest.algorithm(), Algorithm::Sha512);
    let blob = http().get(there.url(&format!("moved/blobs/{}", of(&sample.layer)))).send().await.unwrap();
    assert!(blob.bytes().await.unwrap() == sample.layer);
    let (_, again) =
        pull(&dir.path().join("b"), client(), &format!("{}/moved@{digest}", there.address)).await;
    assert_eq!(again.id, image.id);
}

/// Containerd's hosts.toml: mirrors of a registry nobody reaches; one that is gone, one that has not everything, one that
/// has.
#[tokio::test(flavor = "multi_thread")]
async fn any_registry_may_have_mirrors() {
    let dir = tempfile::tempdir().unwrap();
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let empty = OwnRegistry::at(&dir.path().join("empty")).await;
    let full = OwnRegistry::at(&dir.path().join("full")).await;
    let sample = Sample::new(20_000);
    sample.push_to(&full, "team/app", "1").await;
    let hosts = dir.path().join("certs.d");
    std::fs::create_dir_all(hosts.join("origin.test")).unwrap();
    let text = format!(
        "server = \"http://{gone}\"\n[host.\"http://{gone}\"]\n  capabilities = [\"pull\", \"resolve\"]\n\
         [host.\"http://{}\"]\n  capabilities = [\"pull\", \"resolve\"]\n\
         [host.\"http://{}\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
        empty.address, full.address
    );
    std::fs::write(hosts.join("origin.test/hosts.toml"), text).unwrap();
    let config = Config {
        hosts: vec![hosts],
        attempts: 1,
        back_off: std::time::Duration::from_millis(10),
        ..Config::default()
    };
    let client = Client::new(config);
    let (store, image) = pull(dir.path(), client.clone(), "origin.test/team/app:1").await;
    assert_eq!(image.tags[0].familiar(), "origin.test/team/app:1");
    assert_whole(&store, &image, 20_000);
    // A push goes to the registry itself alone.
    let target = Reference::parse("origin.test/team/app:2").unwrap();
    client.push(&store, &image, &target, pushing(None), silent()).await.unwrap_err();
    assert_eq!(http().get(full.url("team/app/manifests/2")).send().await.unwrap().status(), 404);
}

/// A proxy sees whole URLs; what is excepted is asked directly.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_asked_unless_it_is_excepted() {
    let dir = tempfile::tempdir().unwrap();
    let sample = std::sync::Arc::new(Sample::new(20_000));
    let of = |sample: &std::sync::Arc<Sample>| {
        let sample = std::sync::Arc::clone(sample);
        move |head: &str, _: usize| {
            if head.starts_with("CONNECT ") {
                return reply("405 Method Not Allowed", "", b"");
            }
            let plain = head.replacen("http://registry.test", "", 1);
            sample.honest(&plain).unwrap_or_else(|| reply("200 OK", "", &sample.layer))
        }
    };
    let proxy = LyingServer::start(of(&sample)).await;
    let direct = LyingServer::start(of(&sample)).await;
    let client = Client::new(Config {
        insecure: vec!["registry.test".to_owned()],
        http_proxy: Some(format!("http://{}", proxy.address)),
        https_proxy: Some(format!("http://{}", proxy.address)),
        no_proxy: Some("127.0.0.1".to_owned()),
        ..Config::default()
    });
    let (store, image) = pull(&dir.path().join("a"), client.clone(), "registry.test/x:t").await;
    assert_whole(&store, &image, 20_000);
    assert!(!proxy.requests("GET http://registry.test/v2/x/blobs/").is_empty());

    let before = proxy.requests("").len();
    let (store, image) = pull(&dir.path().join("b"), client, &format!("{}/x:t", direct.address)).await;
    assert_whole(&store, &image, 20_000);
    assert_eq!(proxy.requests("").len(), before, "the excepted host is asked directly");
}
