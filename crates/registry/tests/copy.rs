//! Copies between registries, layouts and archives: digests stay, peers can read what is written.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::process::Command;

use brigantine_image::{Algorithm, Digest, Reference, media};
use brigantine_registry::copy::{CopyOptions, Location};
use brigantine_registry::{Client, Error};
use serde_json::{Value, json};
use support::{OwnRegistry, RealRegistry, Sample, http, patient, silent};

fn registry(address: &str, name: &str) -> Location {
    Location::Registry(Reference::parse(&format!("{address}/{name}")).unwrap())
}

fn place(text: String) -> Location {
    text.parse().unwrap()
}

async fn copy(from: &Location, to: &Location) -> Result<Digest, Error> {
    copy_with(&patient(), from, to, CopyOptions::default()).await
}

async fn copy_with(
    client: &Client,
    from: &Location,
    to: &Location,
    options: CopyOptions,
) -> Result<Digest, Error> {
    Ok(client.copy(from, to, options, silent()).await?.digest)
}

async fn put(registry: &OwnRegistry, name: &str, kind: &str, raw: &[u8]) -> Digest {
    let digest = Digest::sha256(raw);
    let url = registry.url(&format!("{name}/manifests/{digest}"));
    let answer = http().put(url).header("content-type", kind).body(raw.to_vec()).send().await.unwrap();
    assert_eq!(answer.status(), 201, "{}", answer.text().await.unwrap());
    digest
}

/// An index of two platforms, one of them within another index, an artifact that refers to it, and one more blob.
async fn rich(registry: &OwnRegistry, nested: bool) -> (Digest, Digest) {
    let (first, second) = (Sample::new(40_000), Sample::new(50_000));
    first.push_to(registry, "rich", "a").await;
    second.push_to(registry, "rich", "b").await;
    let named = |sample: &Sample, architecture: &str| {
        json!({"mediaType": media::OCI_MANIFEST, "digest": Digest::sha256(&sample.manifest).to_string(),
            "size": sample.manifest.len(), "platform": {"os": "linux", "architecture": architecture}})
    };
    let inner =
        json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": [named(&second, "s390x")]});
    let inner = serde_json::to_vec(&inner).unwrap();
    let inner_digest = put(registry, "rich", media::OCI_INDEX, &inner).await;
    let other = json!({"mediaType": media::OCI_INDEX, "digest": inner_digest.to_string(), "size": inner.len(),
        "platform": {"os": "linux", "architecture": "s390x"}});
    let other = if nested { other } else { named(&second, "s390x") };
    let index = json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "x-unknown": [1, 2],
        "manifests": [named(&first, "amd64"), other]});
    let index = serde_json::to_vec(&index).unwrap();
    let digest = put(registry, "rich", media::OCI_INDEX, &index).await;
    let tag = http()
        .put(registry.url("rich/manifests/t"))
        .header("content-type", media::OCI_INDEX)
        .body(index.clone());
    assert_eq!(tag.send().await.unwrap().status(), 201);
    let empty = Digest::sha256(b"{}");
    let blob = http().post(registry.url(&format!("rich/blobs/uploads/?digest={empty}"))).body("{}");
    assert_eq!(blob.send().await.unwrap().status(), 201);
    let note = json!({"schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "artifactType": "application/x.note",
        "config": {"mediaType": media::OCI_EMPTY, "digest": empty.to_string(), "size": 2},
        "layers": [{"mediaType": "application/x.strange", "digest": empty.to_string(), "size": 2}],
        "subject": {"mediaType": media::OCI_INDEX, "digest": digest.to_string(), "size": index.len()}});
    let note = put(registry, "rich", media::OCI_MANIFEST, &serde_json::to_vec(&note).unwrap()).await;
    (digest, note)
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_survives_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let here = OwnRegistry::at(&dir.path().join("here")).await;
    let there = OwnRegistry::at(&dir.path().join("there")).await;
    let (digest, note) = rich(&here, true).await;
    let everything = || CopyOptions { referrers: true, ..CopyOptions::default() };
    let path = |name: &str| dir.path().join(name).display().to_string();
    let steps = [
        registry(&here.address, "rich:t"),
        place(format!("oci:{}:v1", path("layout"))),
        place(format!("oci-archive:{}:v1", path("layout.tar"))),
        registry(&there.address, "moved:t"),
        registry(&there.address, "again/moved:t"),
    ];
    for pair in steps.windows(2) {
        let copied = copy_with(&patient(), &pair[0], &pair[1], everything()).await.unwrap();
        assert_eq!(copied, digest, "{} to {}", pair[0], pair[1]);
    }
    let referrers = there.url(&format!("again/moved/referrers/{digest}?artifactType=application/x.note"));
    let referrers: Value = http().get(referrers).send().await.unwrap().json().await.unwrap();
    assert_eq!(referrers["manifests"][0]["digest"], note.to_string());
    // Without being told to, referrers stay behind; `dir:` keeps the digest as well.
    let flat = place(format!("dir:{}", path("flat")));
    assert_eq!(copy(&steps[4], &flat).await.unwrap(), digest);
    assert_eq!(copy(&flat, &registry(&there.address, "third:t")).await.unwrap(), digest);
    let none = there.url(&format!("third/referrers/{digest}"));
    let none: Value = http().get(none).send().await.unwrap().json().await.unwrap();
    assert_eq!(none["manifests"], json!([]));

    // One platform, out of the inner index.
    let options = CopyOptions { platform: Some("linux/s390x".parse().unwrap()), ..CopyOptions::default() };
    let one = copy_with(&patient(), &steps[0], &registry(&there.address, "one:t"), options).await.unwrap();
    assert_eq!(one, Digest::sha256(&Sample::new(50_000).manifest));
    let options = CopyOptions { platform: Some("linux/riscv64".parse().unwrap()), ..CopyOptions::default() };
    let missing = copy_with(&patient(), &steps[0], &registry(&there.address, "two:t"), options).await;
    assert!(missing.unwrap_err().to_string().contains("linux/riscv64"));
    // A layout takes several images; the same name is replaced.
    let layout = place(format!("oci:{}:v2", path("layout")));
    copy(&registry(&there.address, "one:t"), &layout).await.unwrap();
    copy(&registry(&there.address, "one:t"), &layout).await.unwrap();
    assert_eq!(copy(&layout, &registry(&there.address, "fourth:t")).await.unwrap(), one);
    let ambiguous = copy(&place(format!("oci:{}", path("layout"))), &flat).await.unwrap_err().to_string();
    assert!(ambiguous.contains("v1") && ambiguous.contains("v2"), "{ambiguous}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_docker_archive_keeps_the_images_id() {
    let dir = tempfile::tempdir().unwrap();
    let here = OwnRegistry::at(&dir.path().join("here")).await;
    let sample = Sample::new(60_000);
    sample.push_to(&here, "app", "t").await;
    let archive = place(format!("docker-archive:{}:team/app:1", dir.path().join("app.tar").display()));
    copy(&registry(&here.address, "app:t"), &archive).await.unwrap();
    assert!(copy(&registry(&here.address, "app:t"), &archive).await.is_err(), "it is there already");
    copy(&archive, &registry(&here.address, "back:t")).await.unwrap();
    let manifest: Value =
        http().get(here.url("back/manifests/t")).send().await.unwrap().json().await.unwrap();
    assert_eq!(manifest["config"]["digest"], Digest::sha256(&sample.config).to_string());
    assert_eq!(manifest["layers"][0]["digest"], sample.diff_id.to_string());
    let unknown = place(format!("docker-archive:{}:other", dir.path().join("app.tar").display()));
    assert!(
        copy(&unknown, &registry(&here.address, "x:t")).await.unwrap_err().to_string().contains("team/app:1")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sha512_is_carried() {
    let dir = tempfile::tempdir().unwrap();
    let here = OwnRegistry::at(&dir.path().join("here")).await;
    let mut sample = Sample::new(30_000);
    let long = Digest::of(Algorithm::Sha512, &sample.layer);
    let mut manifest: Value = serde_json::from_slice(&sample.manifest).unwrap();
    manifest["layers"][0]["digest"] = json!(long.to_string());
    sample.manifest = serde_json::to_vec(&manifest).unwrap();
    let url = here.url(&format!("long/blobs/uploads/?digest={long}"));
    assert_eq!(http().post(url).body(sample.layer.clone()).send().await.unwrap().status(), 201);
    sample.push_to(&here, "long", "t").await;
    let layout = place(format!("oci:{}", dir.path().join("layout").display()));
    copy(&registry(&here.address, "long:t"), &layout).await.unwrap();
    assert!(dir.path().join("layout/blobs/sha512").join(long.hex()).exists());
    copy(&layout, &registry(&here.address, "other:t")).await.unwrap();
    let blob = http().get(here.url(&format!("other/blobs/{long}"))).send().await.unwrap();
    assert_eq!(blob.bytes().await.unwrap(), sample.layer);
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_content_leaves_no_archive() {
    let dir = tempfile::tempdir().unwrap();
    let here = OwnRegistry::at(&dir.path().join("here")).await;
    let sample = Sample::new(60_000);
    sample.push_to(&here, "app", "t").await;
    let layout = dir.path().join("layout");
    let from = place(format!("oci:{}", layout.display()));
    copy(&registry(&here.address, "app:t"), &from).await.unwrap();
    let blob = layout.join("blobs/sha256").join(Digest::sha256(&sample.layer).hex());
    let mut wrong = sample.layer.clone();
    wrong[30_000] ^= 1;
    for damaged in [wrong, sample.layer[..50_000].to_vec(), [&sample.layer[..], b"x"].concat()] {
        std::fs::write(&blob, damaged).unwrap();
        for (kind, name) in [("oci-archive", "a.tar"), ("docker-archive", "b.tar")] {
            let target = dir.path().join(name);
            let to = place(format!("{kind}:{}", target.display()));
            let error = copy(&from, &to).await.unwrap_err().report();
            assert!(error.contains(Digest::sha256(&sample.layer).hex()), "{error}");
            assert!(!target.exists());
        }
        assert!(copy(&from, &registry(&here.address, "bad:t")).await.is_err());
        assert_eq!(http().get(here.url("bad/manifests/t")).send().await.unwrap().status(), 404);
    }
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

fn skopeo(arguments: &[&str]) -> Option<std::process::Output> {
    Command::new("skopeo").args(arguments).output().ok()
}

fn must(output: std::process::Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// skopeo pushes to ours and pulls from ours; what we wrote, skopeo reads, and what it wrote, we read.
#[tokio::test(flavor = "multi_thread")]
async fn skopeo_and_we_understand_each_other() {
    if skopeo(&["--version"]).is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let here = OwnRegistry::at(&dir.path().join("here")).await;
    let (digest, _) = rich(&here, false).await;
    let run = |arguments: Vec<String>| async move {
        let all = tokio::task::spawn_blocking(move || {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            must(skopeo(&arguments).unwrap())
        });
        all.await.unwrap()
    };
    let skopeo_copy = |from: String, to: String| {
        let flags = [
            "--insecure-policy",
            "copy",
            "--all",
            "--preserve-digests",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
        ];
        let mut arguments: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        arguments.extend([from, to]);
        run(arguments)
    };
    let path = |name: &str| dir.path().join(name).display().to_string();
    skopeo_copy(format!("docker://{}/rich:t", here.address), format!("oci-archive:{}:x", path("theirs.tar")))
        .await;
    assert_eq!(
        copy(&place(format!("oci-archive:{}:x", path("theirs.tar"))), &registry(&here.address, "back:t"))
            .await
            .unwrap(),
        digest
    );
    copy(&registry(&here.address, "rich:t"), &place(format!("oci-archive:{}:y", path("ours.tar"))))
        .await
        .unwrap();
    skopeo_copy(format!("oci-archive:{}:y", path("ours.tar")), format!("docker://{}/theirs:t", here.address))
        .await;
    let head = http().head(here.url("theirs/manifests/t")).send().await.unwrap();
    assert_eq!(head.headers()["docker-content-digest"], digest.as_str());
    copy(&registry(&here.address, "rich:a"), &place(format!("docker-archive:{}:n:1", path("d.tar"))))
        .await
        .unwrap();
    let inspected = run(vec![
        "inspect".into(),
        "--config".into(),
        "--raw".into(),
        format!("docker-archive:{}", path("d.tar")),
    ])
    .await;
    assert_eq!(inspected.as_bytes(), Sample::new(40_000).config);
    let tags =
        run(vec!["list-tags".into(), "--tls-verify=false".into(), format!("docker://{}/rich", here.address)])
            .await;
    assert_eq!(serde_json::from_str::<Value>(&tags).unwrap()["Tags"], json!(["a", "b", "t"]));
    run(vec!["delete".into(), "--tls-verify=false".into(), format!("docker://{}/rich:b", here.address)])
        .await;
    assert_eq!(http().head(here.url("rich/manifests/b")).send().await.unwrap().status(), 404);
}

/// Debian's registry in between.
#[tokio::test(flavor = "multi_thread")]
async fn debians_registry_takes_and_gives() {
    let Some(real) = RealRegistry::start(None) else { return };
    let dir = tempfile::tempdir().unwrap();
    let here = OwnRegistry::at(&dir.path().join("here")).await;
    let (digest, _) = rich(&here, true).await;
    let there = registry(&real.address, "rich:t");
    assert_eq!(copy(&registry(&here.address, "rich:t"), &there).await.unwrap(), digest);
    assert_eq!(copy(&there, &registry(&real.address, "second:t")).await.unwrap(), digest);
    assert_eq!(copy(&there, &registry(&here.address, "back:t")).await.unwrap(), digest);
    let tags =
        patient().tags(&Reference::parse(&format!("{}/rich", real.address)).unwrap(), None).await.unwrap();
    assert_eq!(tags, ["t"]);
    let found = patient().search(&real.address, "sec", 10, None).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name, format!("{}/second", real.address));
    let found = patient().search(&here.address, "a", 10, None).await.unwrap();
    assert_eq!(
        found.iter().map(|found| found.name.as_str()).collect::<Vec<_>>(),
        [format!("{}/back", here.address)]
    );
}
