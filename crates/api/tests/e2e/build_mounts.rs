//! Cache mounts that go to a registry or a folder and come back, on an engine that has nothing.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use brigantine_testkit::peers::{Registry, skopeo};
use brigantine_testkit::{Engine, Output, eventually, fixtures};
use serde_json::{Value, json};

const ARTIFACT: &str = "application/vnd.brigantine.cache-mount.v1";

/// Fills the mount with one of each.
const WRITE: &str = r"FROM busybox
RUN --mount=type=cache,target=/c mkdir -m 700 /c/d && echo kept > /c/d/f && chown 7:8 /c/d/f && chmod 4711 /c/d/f \
    && ln /c/d/f /c/hard && ln -s /nowhere /c/link && head -c 3000000 /dev/urandom > /c/large && md5sum /c/large > /c/sum
";

const READ: &str = r"FROM busybox
RUN --mount=type=cache,target=/c cd /c && echo ran-$(stat -c %a:%u:%g d/f)-$(stat -c %a d)-$(cat hard)-$(readlink link) \
    && md5sum -c sum && [ $(stat -c %i hard) = $(stat -c %i d/f) ]
";

fn build(engine: &Engine, dockerfile: &str, args: &[&str]) -> Output {
    let dir = engine.dir().join("ctx");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("Dockerfile"), dockerfile).unwrap();
    let dir = dir.to_str().unwrap();
    engine.brig(["build", "--no-cache"].iter().chain(args).copied().chain([dir])).run()
}

#[track_caller]
fn filled(engine: &Engine) {
    let built = build(engine, WRITE, &[]);
    assert_eq!(built.code, 0, "{built}");
}

/// A build sees in the mount what was put there.
#[track_caller]
fn assert_there(engine: &Engine, id: &str, args: &[&str]) {
    let read = build(engine, &READ.replace("type=cache", &format!("type=cache,id={id}")), args);
    assert_eq!(read.code, 0, "{read}");
    assert!(read.stdout.contains("ran-4711:7:8-700-kept-/nowhere"), "{read}");
}

fn cache(engine: &Engine, args: &[&str]) -> Output {
    engine.brig(["builder", "cache"].iter().chain(args).copied()).run()
}

#[track_caller]
fn refused(engine: &Engine, args: &[&str], words: &str) {
    let output = cache(engine, args);
    assert!(output.code != 0 && output.stderr.contains(words), "{args:?}: {words}: {output}");
}

fn listed(engine: &Engine) -> String {
    engine.brig(["builder", "cache", "ls", "--format", "{{.ID}}"]).ok()
}

#[track_caller]
fn copy(engine: &Engine, from: &str, to: &str) {
    let flags = ["copy", "--insecure-policy", "--src-tls-verify=false", "--dest-tls-verify=false"];
    skopeo(engine, &flags.into_iter().chain([from, to]).collect::<Vec<_>>());
}

fn blobs(engine: &Engine) -> usize {
    fs::read_dir(engine.data_root().join("image/blobs/sha256")).map_or(0, Iterator::count)
}

/// What lay in the image store on its way is given back.
#[track_caller]
fn assert_store_has(engine: &Engine, count: usize) {
    eventually("the image store gives back what was carried", || (blobs(engine) == count).then_some(()));
}

#[test]
fn a_registry_keeps_a_cache_mount_for_another_engine() {
    let mut engine = Engine::with_busybox();
    let registry = Registry::start(&engine);
    filled(&engine);
    let stored = blobs(&engine);
    let at = |name: &str| format!("{}/team/cache:{name}", registry.address());
    for compression in ["zstd", "gzip", "uncompressed", "zstd,compression-level=9"] {
        let name = at(&compression.replace([',', '='], "-"));
        let to = format!("type=registry,ref={name},compression={compression}");
        let output = cache(&engine, &["export", "--to", &to, "/c"]);
        assert_eq!(output.code, 0, "{output}");
        assert!(output.stdout.contains("/c: digest: sha256:"), "{output}");
    }
    let plain = cache(&engine, &["export", "--to", &at("plain"), "/c"]);
    assert_eq!(plain.code, 0, "{plain}");
    assert_store_has(&engine, stored);

    // The same files are the same artifact, for everybody, on every platform.
    let inspect = |name: &str| {
        skopeo(&engine, &["inspect", "--raw", "--tls-verify=false", &format!("docker://{name}")])
    };
    assert_eq!(inspect(&at("plain")), inspect(&at("zstd")));
    let manifest: Value = serde_json::from_str(&inspect(&at("plain"))).unwrap();
    assert_eq!(manifest["artifactType"], ARTIFACT);
    assert_eq!(manifest["config"]["mediaType"], "application/vnd.oci.empty.v1+json");
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
    assert_eq!(manifest["layers"][0]["mediaType"], "application/vnd.oci.image.layer.v1.tar+zstd");
    assert_eq!(manifest["annotations"], json!({ "brigantine.cache-mount.id": "/c" }));

    // Unmodified tools copy it: to a folder, to our own registry and back.
    let ours = Registry::start_ours_in(&engine, &engine.dir().join("ours"));
    let folder = engine.dir().join("copied");
    let layout = format!("oci:{}:kept", folder.display());
    copy(&engine, &format!("docker://{}", at("plain")), &layout);
    let second = format!("{}/cache:again", ours.address());
    copy(&engine, &layout, &format!("docker://{second}"));
    assert_eq!(inspect(&second), inspect(&at("plain")));

    engine.make_new();
    for name in [at("plain"), at("gzip"), at("uncompressed"), at("zstd-compression-level-9"), second] {
        let output = cache(&engine, &["import", "--from", &name]);
        assert_eq!(output.code, 0, "{output}");
        assert_eq!(listed(&engine), "/c");
        assert_there(&engine, "/c", &[]);
        engine.brig(["builder", "prune", "-af"]).ok();
        assert_eq!(listed(&engine), "");
    }
    let from = format!("type=local,src={},tag=kept", folder.display());
    let output = cache(&engine, &["import", "--from", &from, "/other"]);
    assert_eq!(output.code, 0, "{output}");
    assert_eq!(listed(&engine), "/other");
    assert_there(&engine, "/other", &[]);
}

#[test]
fn a_folder_keeps_a_cache_mount_and_tools_take_it_from_there() {
    let mut engine = Engine::with_busybox();
    let registry = Registry::start(&engine);
    filled(&engine);
    let built = build(&engine, WRITE, &["--build-arg", "BUILDKIT_CACHE_MOUNT_NS=team"]);
    assert_eq!(built.code, 0, "{built}");
    let folder = engine.dir().join("kept");
    let place = |end: &str, tag: &str| format!("type=local,{end}={},tag={tag}", folder.display());
    let output = cache(&engine, &["export", "--to", &place("dest", "plain"), "/c"]);
    assert_eq!(output.code, 0, "{output}");
    let names = || fs::read_dir(folder.join("blobs/sha256")).unwrap().count();
    let count = names();
    cache(&engine, &["export", "--to", &place("dest", "again"), "/c"]);
    assert_eq!(names(), count, "the same is written once");
    let output = cache(&engine, &["export", "--to", &place("dest", "ns"), "--namespace", "team", "/c"]);
    assert_eq!(output.code, 0, "{output}");
    let index: Value = serde_json::from_slice(&fs::read(folder.join("index.json")).unwrap()).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 3, "{index}");
    let name = format!("{}/cache:x", registry.address());
    copy(&engine, &format!("oci:{}:ns", folder.display()), &format!("docker://{name}"));

    engine.make_new();
    // Its own id, and its own namespace.
    let output = cache(&engine, &["import", "--from", &name]);
    assert_eq!(output.code, 0, "{output}");
    assert_there(&engine, "/c", &["--build-arg", "BUILDKIT_CACHE_MOUNT_NS=team"]);
    assert_ne!(build(&engine, READ, &[]).code, 0, "others do not see it");
    // Those others have one of that id by now: the namespace tells which is which.
    let shown = |format: &str| engine.brig(["builder", "cache", "ls", "--format", format]).ok();
    let mut listed: Vec<String> = shown("{{.ID}} {{.Namespace}}").lines().map(str::to_owned).collect();
    listed.sort();
    assert_eq!(listed, ["/c ", "/c team"]);
    assert!(shown("table").starts_with("CACHE ID   NAMESPACE   SIZE"), "{}", shown("table"));
    assert_eq!(shown("json").matches("\"Namespace\":\"team\"").count(), 1, "{}", shown("json"));
    let api = engine.get("/build/caches").to_string();
    assert_eq!(api.matches("\"Namespace\":\"team\"").count(), 1, "{api}");
    let du = engine.brig(["builder", "du", "--format", "{{.Description}}"]).ok();
    assert!(du.contains("cache mount /c in the namespace team"), "{du}");
    let output = cache(&engine, &["import", "--from", &place("src", "plain")]);
    assert_eq!(output.code, 0, "{output}");
    assert_there(&engine, "/c", &[]);
    let other = ["import", "--namespace", "n", "--from", &place("src", "ns"), "/other"];
    assert_eq!(cache(&engine, &other).code, 0);
    assert_there(&engine, "/other", &["--build-arg", "BUILDKIT_CACHE_MOUNT_NS=n"]);
    refused(&engine, &["import", "--from", &place("src", "none")], "there is no cache \"none\"");
}

/// A layer's whiteouts are files like others where no layer is below.
#[test]
fn files_named_like_whiteouts_come_back() {
    let mut engine = Engine::with_busybox();
    let registry = Registry::start(&engine);
    let fill = "FROM busybox\nRUN --mount=type=cache,target=/c mkdir /c/d && cd /c && \
         for f in a .wh.a .wh.b .wh..wh.x d/.wh..wh..opq d/f d/.wh.f; do echo $f > $f; done\n";
    assert_eq!(build(&engine, fill, &[]).code, 0);
    let name = format!("{}/cache:x", registry.address());
    let folder = engine.dir().join("kept");
    let archive = engine.dir().join("archive.tar");
    let archive = archive.to_str().unwrap();
    let (to, from) =
        (format!("type=local,dest={}", folder.display()), format!("type=local,src={}", folder.display()));
    for export in [
        &["export", "--to", &name, "/c"][..],
        &["export", "--to", &to, "/c"],
        &["export", "-o", archive, "/c"],
    ] {
        let output = cache(&engine, export);
        assert_eq!(output.code, 0, "{output}");
    }
    engine.make_new();
    let read =
        "FROM busybox\nRUN --mount=type=cache,target=/c cd /c && echo found $(find . -type f | sort)\n";
    for import in [&["import", "--from", &name][..], &["import", "--from", &from], &["import", "/c", archive]]
    {
        let output = cache(&engine, import);
        assert_eq!(output.code, 0, "{output}");
        let read = build(&engine, read, &[]);
        let found = "found ./.wh..wh.x ./.wh.a ./.wh.b ./a ./d/.wh..wh..opq ./d/.wh.f ./d/f";
        assert!(read.stdout.contains(found), "{import:?}: {read}");
        engine.brig(["builder", "prune", "-af"]).ok();
    }
}

#[test]
fn a_registry_that_asks_for_a_password_gets_the_users() {
    let engine = Engine::with_busybox();
    let registry = Registry::start_ours_with_password(&engine);
    filled(&engine);
    let name = format!("{}/cache:x", registry.address());
    refused(&engine, &["export", "--to", &name, "/c"], "nauthorized");
    refused(&engine, &["import", "--from", &name], "authentication required");
    engine.brig(["login", "-u", "user", "-p", "secret", &registry.address()]).ok();
    let output = cache(&engine, &["export", "--to", &name, "/c"]);
    assert_eq!(output.code, 0, "{output}");
    engine.brig(["builder", "prune", "-af"]).ok();
    assert_eq!(cache(&engine, &["import", "--from", &name]).code, 0);
    assert_there(&engine, "/c", &[]);
}

#[test]
fn what_is_no_cache_mount_or_not_whole_changes_nothing() {
    let engine = Engine::with_busybox();
    let registry = Registry::start(&engine);
    registry.fill(&engine, &fixtures::busybox(), "plain:1");
    filled(&engine);
    let at = |name: &str| format!("{}/{name}", registry.address());
    let from = |name: &str| ["import".to_owned(), "--from".to_owned(), at(name), "/c".to_owned()];
    let no_import = |name: &str, words: &str| {
        let args = from(name);
        refused(&engine, &args.each_ref().map(String::as_str), words);
    };
    no_import("plain:1", "is an image, no cache mount");
    no_import("none:1", "unknown");
    no_import("plain:none", "unknown");
    let steps = build(
        &engine,
        "FROM busybox\nRUN true > /x\n",
        &["--cache-to", &format!("type=registry,ref={}", at("steps:1"))],
    );
    assert_eq!(steps.code, 0, "{steps}");
    no_import("steps:1", "is a build's cache, no cache mount");
    refused(&engine, &["import", "--from", "127.0.0.1:1/x", "/c"], "127.0.0.1:1");
    refused(&engine, &["import", "--from", "type=registry"], "needs ref=NAME");
    refused(&engine, &["import", "--from", "type=gha"], "not built");
    refused(&engine, &["import", "--from", "type=local"], "src=FOLDER");
    refused(&engine, &["import", "--from", "UPPER"], "lowercase");
    refused(&engine, &["import"], "an ID and a FILE are needed");

    refused(&engine, &["export", "--to", &at("c:1"), "/none"], "there is no cache mount \"/none\"");
    refused(&engine, &["export", "--to", "127.0.0.1:1/x", "/c"], "127.0.0.1:1");
    refused(
        &engine,
        &["export", "--to", &format!("{}@sha256:{}", at("c"), "0".repeat(64)), "/c"],
        "not by a digest",
    );
    refused(
        &engine,
        &["export", "--to", &format!("type=registry,ref={},mode=max", at("c:1")), "/c"],
        "has no mode",
    );
    refused(
        &engine,
        &["export", "--to", &format!("type=registry,ref={},compression=lzma", at("c:1")), "/c"],
        "lzma",
    );
    refused(&engine, &["export", "--to", "type=inline", "/c"], "no part of an image");

    // Bytes that are others than the digest says, then fewer, then none.
    assert_eq!(cache(&engine, &["export", "--to", &at("c:1"), "/c"]).code, 0);
    let store = engine.dir().join("registry/store");
    let blob = largest(&store);
    let whole = fs::read(&blob).unwrap();
    let mut wrong = whole.clone();
    let middle = wrong.len() / 2;
    wrong[middle] ^= 1;
    fs::write(&blob, wrong).unwrap();
    no_import("c:1", "sha256:");
    fs::write(&blob, &whole[..middle]).unwrap();
    no_import("c:1", "sha256:");
    fs::remove_file(&blob).unwrap();
    no_import("c:1", "sha256:");
    assert_there(&engine, "/c", &[]);
    fs::write(&blob, &whole).unwrap();
    assert_eq!(cache(&engine, &["import", "--from", &at("c:1")]).code, 0, "what was wrong was not kept");
    assert_there(&engine, "/c", &[]);
    assert_eq!(listed(&engine), "/c");
    let carried = engine.data_root().join("image/blobs/sha256").join(fixtures::digest(&whole));
    eventually("the image store gives back what was carried", || (!carried.exists()).then_some(()));
}

/// The largest file below a directory.
fn largest(dir: &Path) -> PathBuf {
    let listed = Command::new("find").arg(dir).args(["-type", "f", "-printf", "%s %p\n"]).output().unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    let sized = text.lines().map(|line| line.split_once(' ').unwrap());
    sized.max_by_key(|(size, _)| size.parse::<u64>().unwrap()).unwrap().1.into()
}

#[test]
fn a_hostile_archive_stays_inside_and_a_mount_in_use_stays_as_it_is() {
    let engine = Engine::with_busybox();
    let folder = engine.dir().join("hostile");
    let victim = engine.dir().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let outside = victim.to_str().unwrap();
    let from = format!("type=local,src={}", folder.display());
    for (archive, taken) in [
        (fixtures::Layer::default().file("../../victim", 0o644, b"x").finish(), false),
        (
            fixtures::Layer::default()
                .symlink("l", engine.dir().to_str().unwrap())
                .file("l/victim", 0o644, b"x")
                .finish(),
            false,
        ),
        (fixtures::Layer::default().hardlink("h", outside).finish(), false),
        (fixtures::Layer::default().file(outside, 0o644, b"x").finish(), true),
        (b"no archive".to_vec(), false),
    ] {
        plant(&folder, "/c", &archive);
        let output = cache(&engine, &["import", "--from", &from]);
        assert!(taken || output.code != 0, "{output}");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert_eq!(fs::metadata(&victim).unwrap().nlink(), 1);
    }
    for dir in fs::read_dir(engine.data_root().join("build/caches")).unwrap() {
        assert!(!dir.unwrap().path().join("new").exists());
    }
    plant(&folder, "\u{1b}[2J", &fixtures::Layer::default().file("f", 0o644, b"x").finish());
    refused(&engine, &["import", "--from", &from], "control characters");

    plant(&folder, "/busy", &fixtures::Layer::default().file("f", 0o644, b"from elsewhere").finish());
    let dir = engine.dir().join("ctx");
    fs::create_dir_all(&dir).unwrap();
    let waits = "FROM busybox\nRUN --mount=type=cache,target=/busy touch /busy/begun && while [ ! -e /busy/go ]; do sleep 0.1; done\n";
    fs::write(dir.join("Dockerfile"), waits).unwrap();
    let mut building = engine.brig(["build", dir.to_str().unwrap()]).spawn();
    let caches = engine.data_root().join("build/caches");
    let mount = eventually("the step begins", || {
        let found = fs::read_dir(&caches).ok()?.flatten().map(|entry| entry.path().join("data"));
        found.into_iter().find(|data| data.join("begun").exists())
    });
    refused(&engine, &["import", "--from", &from], "in use by a build");
    refused(
        &engine,
        &["export", "--to", &format!("type=local,dest={}", folder.display()), "/busy"],
        "in use by a build",
    );
    assert!(!mount.join("f").exists());
    fs::write(mount.join("go"), "").unwrap();
    assert!(building.wait().unwrap().success());
    assert_eq!(cache(&engine, &["import", "--from", &from]).code, 0);
    assert!(mount.join("f").exists() && !mount.join("begun").exists());
}

/// Makes the folder one with a cache mount of this id and archive.
fn plant(folder: &Path, id: &str, archive: &[u8]) {
    fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
    let put = |raw: &[u8], kind: &str| {
        let hex = fixtures::digest(raw);
        fs::write(folder.join("blobs/sha256").join(&hex), raw).unwrap();
        json!({ "mediaType": kind, "digest": format!("sha256:{hex}"), "size": raw.len() })
    };
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": manifest_type, "artifactType": ARTIFACT,
        "config": put(b"{}", "application/vnd.oci.empty.v1+json"),
        "layers": [put(archive, "application/vnd.oci.image.layer.v1.tar")],
        "annotations": { "brigantine.cache-mount.id": id } });
    let mut entry = put(manifest.to_string().as_bytes(), manifest_type);
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    fs::write(folder.join("index.json"), json!({ "schemaVersion": 2, "manifests": [entry] }).to_string())
        .unwrap();
}
