//! Caches kept elsewhere: one engine builds and writes, another that has nothing finds it all there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use brigantine_testkit::{Engine, Output, fixtures, peers::Registry};
use serde_json::{Value, json};

const STAGES: &str = r"FROM busybox AS tool
COPY tool.txt /t
RUN cat /t > /out && echo ran-tool
FROM busybox
WORKDIR /w
COPY a.txt /w/
RUN --mount=type=secret,id=s tr a-z A-Z < a.txt > b && cat /run/secrets/s > /dev/null && echo ran-a
RUN echo ran-empty
COPY --from=tool /out /out
RUN --mount=type=cache,target=/c cat b /out > c && echo mounted > /c/f && echo ran-last
";

fn context(engine: &Engine, files: &[(&str, &str)]) -> PathBuf {
    let dir = engine.dir().join("ctx");
    fs::create_dir_all(&dir).unwrap();
    for (path, text) in files {
        fs::write(dir.join(path), text).unwrap();
    }
    fs::write(engine.dir().join("secret"), "whispered").unwrap();
    dir
}

fn stages(engine: &Engine) -> PathBuf {
    context(engine, &[("Dockerfile", STAGES), ("a.txt", "marker\n"), ("tool.txt", "tool\n")])
}

fn build(engine: &Engine, args: &[&str]) -> Output {
    let secret = format!("id=s,src={}", engine.dir().join("secret").display());
    let dir = engine.dir().join("ctx").to_str().unwrap().to_owned();
    let args = ["build", "--secret", &secret].into_iter().chain(args.iter().copied()).chain([&*dir]);
    engine.brig(args).run()
}

/// What the steps that ran printed.
#[track_caller]
fn ran(output: &Output) -> Vec<&str> {
    assert_eq!(output.code, 0, "{output}");
    output.stdout.lines().filter(|line| line.starts_with("ran-")).collect()
}

fn id(engine: &Engine, name: &str) -> String {
    engine.brig(["inspect", "-f", "{{.Id}}", name]).ok()
}

/// The files below `dir` in which this text is, compressed or not.
fn with_text(dir: &Path, text: &str) -> Vec<PathBuf> {
    let script = "find \"$1\" -type f | while read -r f; do gzip -dcf < \"$f\" 2>/dev/null | grep -aq \"$2\" && echo \"$f\"; done; true";
    let found = Command::new("sh").args(["-c", script, "sh"]).arg(dir).arg(text).output().unwrap();
    String::from_utf8(found.stdout).unwrap().lines().map(PathBuf::from).collect()
}

#[test]
fn a_fresh_engine_runs_nothing_that_debians_registry_has() {
    let mut engine = Engine::with_busybox();
    let registry = Registry::start(&engine);
    in_a_registry(&mut engine, &registry);

    // A layer that is gone is a miss of its step alone.
    engine.make_new();
    stages(&engine);
    let store = engine.dir().join("registry/store");
    let lost: Vec<PathBuf> =
        with_text(&store, "MARKER").into_iter().filter(|path| path.ends_with("data")).collect();
    assert!(!lost.is_empty());
    for path in &lost {
        fs::remove_file(path).unwrap();
    }
    let from = format!("type=registry,ref={}/cache:max", registry.address());
    let again = build(&engine, &["-t", "x", "--cache-from", &from]);
    assert!(ran(&again).contains(&"ran-a"), "{again}");
    assert!(!ran(&again).contains(&"ran-tool"), "{again}");
    assert!(again.stdout.contains("does not have it any more"), "{again}");
    assert_eq!(engine.brig(["run", "--rm", "x", "cat", "/w/c"]).ok(), "MARKER\ntool");
}

#[test]
fn a_fresh_engine_runs_nothing_that_our_registry_has() {
    let mut engine = Engine::with_busybox();
    let registry = Registry::start_ours(&engine);
    in_a_registry(&mut engine, &registry);

    // BuildKit's older forms, and another compression.
    for attributes in
        ["image-manifest=false", "oci-mediatypes=false", "compression=zstd", "compression=uncompressed"]
    {
        let name = format!("{}/cache:{}", registry.address(), attributes.replace('=', "-"));
        let to = format!("type=registry,ref={name},mode=max,{attributes}");
        build(&engine, &["-t", "x", "--cache-to", &to]);
        let before = id(&engine, "x");
        engine.make_new();
        let output = build(&engine, &["-t", "x", "--cache-from", &name]);
        assert_eq!(ran(&output), [""; 0], "{attributes}: {output}");
        assert_eq!(id(&engine, "x"), before, "{attributes}");
    }
}

fn in_a_registry(engine: &mut Engine, registry: &Registry) {
    stages(engine);
    let at = |name: &str| format!("type=registry,ref={}/cache:{name}", registry.address());
    let (max, min) = (format!("{},mode=max", at("max")), at("min"));
    let first = build(engine, &["-t", "x", "--cache-to", &max, "--cache-to", &min]);
    assert_eq!(ran(&first).len(), 4, "{first}");
    let before = id(engine, "x");
    let store = engine.dir().join("registry/store");
    assert!(!with_text(&store, "MARKER").is_empty());
    for kept_back in ["whispered", "mounted"] {
        assert!(with_text(&store, kept_back).is_empty(), "{kept_back}");
    }

    engine.make_new();
    let all = build(engine, &["-t", "x", "--cache-from", &at("max")]);
    assert_eq!(ran(&all), [""; 0], "{all}");
    assert_eq!(id(engine, "x"), before, "the times are those of the steps, wherever they ran");
    assert_eq!(engine.brig(["run", "--rm", "x", "cat", "/w/c"]).ok(), "MARKER\ntool");
    // What came is the engine's own from then on; it can be pushed, and pulled back.
    let again = build(engine, &["-t", "x"]);
    assert_eq!(ran(&again), [""; 0], "{again}");
    let name = format!("{}/result:1", registry.address());
    engine.brig(["tag", "x", &name]).ok();
    engine.brig(["push", "-q", &name]).ok();
    engine.brig(["rmi", "-f", "x", &name]).ok();
    assert_eq!(ran(&build(engine, &["-t", "x"])), [""; 0]);
    engine.brig(["pull", "-q", &name]).ok();
    assert_eq!((id(engine, &name), id(engine, "x")), (before.clone(), before.clone()));

    // A changed file: what it does not reach is not run.
    engine.make_new();
    fs::write(engine.dir().join("ctx/a.txt"), "other\n").unwrap();
    let changed = build(engine, &["-t", "x", "--cache-from", &at("max")]);
    let mut all = ran(&changed);
    all.sort_unstable();
    assert_eq!(all, ["ran-a", "ran-empty", "ran-last"], "{changed}");

    // The lesser cache has the result's own steps only: the others are not needed. A cache is not used where none is to
    // be.
    engine.make_new();
    stages(engine);
    let less = build(engine, &["-t", "x", "--cache-from", &at("min")]);
    assert_eq!(ran(&less), [""; 0], "{less}");
    assert!(less.stdout.contains("RUN cat /t > /out"), "steps that were not needed are told: {less}");
    assert_eq!(id(engine, "x"), before);
    engine.make_new();
    assert_eq!(ran(&build(engine, &["--no-cache", "--cache-from", &at("max")])).len(), 4);
}

#[test]
fn what_a_result_was_made_of_is_made_only_when_it_is_needed() {
    let mut engine = Engine::with_busybox();
    stages(&engine);
    let folder = |engine: &Engine, name: &str| engine.dir().join(name).display().to_string();
    let to = |dest: &str, mode: &str| format!("type=local,dest={dest},mode={mode}");
    let (min, max) = (folder(&engine, "min"), folder(&engine, "max"));
    build(&engine, &["-t", "x", "--cache-to", &to(&min, "min")]);
    let before = id(&engine, "x");
    // All of it is written, though nothing of it was looked at again.
    let same = build(&engine, &["-t", "x", "--cache-to", &to(&max, "max")]);
    assert_eq!(ran(&same), [""; 0], "{same}");

    // What was not made cannot be written, and the rest is.
    engine.make_new();
    let (from, again) = (format!("type=local,src={min}"), folder(&engine, "again"));
    let less = build(&engine, &["-t", "x", "--cache-from", &from, "--cache-to", &to(&again, "max")]);
    assert_eq!(ran(&less), [""; 0], "{less}");
    engine.make_new();
    let from = format!("type=local,src={again}");
    assert_eq!(ran(&build(&engine, &["-t", "x", "--cache-from", &from])), [""; 0]);
    assert_eq!(id(&engine, "x"), before);

    // A stage that is to be made anew is made.
    let anew = build(&engine, &["-t", "x", "--no-cache-filter", "tool"]);
    assert!(ran(&anew).contains(&"ran-tool"), "{anew}");

    // What is lost is made, and what it is made of before it; the rest is not.
    engine.make_new();
    for path in with_text(&Path::new(&min).join("blobs"), "tool") {
        fs::remove_file(path).unwrap();
    }
    let lost = build(&engine, &["-t", "x", "--cache-from", &format!("type=local,src={min}")]);
    let mut all = ran(&lost);
    all.sort_unstable();
    assert_eq!(all, ["ran-last", "ran-tool"], "{lost}");
    assert_eq!(engine.brig(["run", "--rm", "x", "cat", "/w/c"]).ok(), "MARKER\ntool");

    // Another result of the same stages: theirs are there.
    engine.make_new();
    fs::write(engine.dir().join("ctx/a.txt"), "other\n").unwrap();
    let changed = build(&engine, &["-t", "x", "--cache-from", &format!("type=local,src={max}")]);
    let mut all = ran(&changed);
    all.sort_unstable();
    assert_eq!(all, ["ran-a", "ran-empty", "ran-last"], "{changed}");
}

#[test]
fn an_image_has_its_cache_with_it_for_every_client() {
    let mut engine = Engine::with_busybox();
    let registry = Registry::start(&engine);
    let plain = "FROM busybox\nCOPY a.txt /a\nRUN cat /a > /b && echo ran-b\nRUN echo ran-empty\n";
    let dir = context(&engine, &[("Dockerfile", plain), ("a.txt", "1")]).to_str().unwrap().to_owned();
    let name = format!("{}/x:1", registry.address());
    let first = build(&engine, &["-t", &name, "--cache-to", "type=inline", "--push"]);
    assert_eq!(ran(&first).len(), 2, "{first}");
    let before = id(&engine, &name);

    engine.make_new();
    let second = build(&engine, &["-t", "y", "--cache-to", "type=inline", "--cache-from", &name]);
    assert_eq!(ran(&second), [""; 0], "{second}");
    assert_eq!(id(&engine, "y"), before, "what is in an image does not depend on where its steps ran");
    let layers = |name: &str| engine.brig(["inspect", "-f", "{{.RootFS.Layers}} {{.Created}}", name]).ok();
    // Without its cache the image is another, of the same layers.
    build(&engine, &["-t", "z"]);
    assert_ne!(id(&engine, "z"), before);
    assert_eq!(layers("z"), layers("y"));

    // The classic client: only what was pulled.
    let classic = |args: &[&str]| {
        let args: Vec<&str> = ["build"].iter().chain(args).copied().chain([&*dir]).collect();
        engine.docker(args).env("DOCKER_BUILDKIT", "0").run()
    };

    let argument = ["--build-arg", "BUILDKIT_INLINE_CACHE=1", "-t", "c"];
    let same = classic(&argument);
    assert_eq!(same.code, 0, "{same}");
    assert_eq!(id(&engine, "c"), id(&engine, "y"));
    engine.make_new();
    engine.docker(["pull", "-q", &name]).ok();
    let args = ["build", "--cache-from", &name, "-t", "c", &dir];
    let pulled = engine.docker(args).env("DOCKER_BUILDKIT", "0").run();
    assert_eq!(ran(&pulled), [""; 0], "{pulled}");

    // Docker's BuildKit client, which asks the registry.
    engine.make_new();
    let asked =
        engine.buildkit(["build", "--progress", "plain", "--cache-from", &name, "-t", "d", &dir]).run();
    assert_eq!(asked.code, 0, "{asked}");
    assert_eq!(asked.stderr.matches(" CACHED").count(), 3, "{asked}");
    assert!(asked.stderr.contains(&format!("importing cache manifest from {name}")), "{asked}");
}

#[test]
fn a_folder_of_the_clients_is_a_cache() {
    let mut engine = Engine::with_busybox();
    stages(&engine);
    let folder = engine.dir().join("kept");
    let (to, from) = (
        format!("type=local,dest={},mode=max", folder.display()),
        format!("type=local,src={}", folder.display()),
    );
    // It need not be there yet.
    let first = build(&engine, &["-t", "x", "--cache-from", &from, "--cache-to", &to]);
    assert_eq!(ran(&first).len(), 4, "{first}");
    assert!(first.stderr.contains("there is no cache"), "{first}");
    let before = id(&engine, "x");
    let index: Value = serde_json::from_slice(&fs::read(folder.join("index.json")).unwrap()).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1, "{index}");
    let names = || fs::read_dir(folder.join("blobs/sha256")).unwrap().count();
    let count = names();
    build(&engine, &["-t", "x", "--cache-to", &to]);
    assert_eq!(names(), count, "the same is written once");

    engine.make_new();
    let second = build(&engine, &["-t", "x", "--cache-from", &from]);
    assert_eq!(ran(&second), [""; 0], "{second}");
    assert_eq!(id(&engine, "x"), before);

    // Blobs that are not what they are called, and lists that are too long: the build goes on without them.
    engine.make_new();
    for path in with_text(&folder.join("blobs"), "MARKER") {
        let length = fs::metadata(&path).unwrap().len();
        fs::write(&path, vec![b'x'; usize::try_from(length).unwrap()]).unwrap();
    }
    let damaged = build(&engine, &["-t", "x", "--cache-from", &from]);
    assert!(ran(&damaged).contains(&"ran-a") && !ran(&damaged).contains(&"ran-tool"), "{damaged}");
    assert!(damaged.stdout.contains("does not have it any more"), "{damaged}");
    let many = format!("{{\"records\":[{}]}}", vec!["{}"; 1_000_000].join(","));
    let deep = format!("{{\"records\":[{{\"inputs\":{}{}}}]}}", "[".repeat(300_000), "]".repeat(300_000));
    let record = |key: &str, layer: i64| {
        json!({ "layers": [{ "layer": layer }], "inputs": [[{ "link": 0 }]],
            "brigantine": { "version": 1, "architecture": "amd64", "keys": [key] } })
    };
    let strange = json!({ "layers": [{ "blob": "sha256:aa", "parent": 0 }],
        "records": [record("k", 7), record("l", -3), record("m", 0), { "digest": "sha256:cc" }] });
    for (hostile, words) in [
        (many, "a list of at most 100000"),
        (deep, "1 of 1 records"),
        (strange.to_string(), "4 of 4 records"),
        ("[1".to_owned(), "cannot be read"),
    ] {
        plant(&folder, hostile.as_bytes());
        let output = build(&engine, &["-t", "x", "--cache-from", &from]);
        assert_eq!(output.code, 0, "{output}");
        assert!(output.stdout.contains(words), "{words}: {output}");
    }
    fs::write(folder.join("index.json"), "no index").unwrap();
    assert_ne!(build(&engine, &["--cache-from", &from]).code, 0);
}

/// Makes the folder's cache one with this list.
fn plant(folder: &Path, config: &[u8]) {
    let put = |raw: &[u8]| {
        let hex = fixtures::digest(raw);
        fs::write(folder.join("blobs/sha256").join(&hex), raw).unwrap();
        json!({ "digest": format!("sha256:{hex}"), "size": raw.len() })
    };
    let mut listed = put(config);
    listed["mediaType"] = "application/vnd.buildkit.cacheconfig.v0".into();
    let manifest = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": listed, "layers": [] });
    let mut entry = put(manifest.to_string().as_bytes());
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    fs::write(folder.join("index.json"), json!({ "schemaVersion": 2, "manifests": [entry] }).to_string())
        .unwrap();
}

#[test]
fn what_cannot_be_read_or_written_is_said() {
    let engine = Engine::with_busybox();
    let registry = Registry::start(&engine);
    registry.fill(&engine, &fixtures::busybox(), "plain:1");
    stages(&engine);
    let image = format!("{}/plain:1", registry.address());
    let none = format!("{}/none:1", registry.address());
    let output =
        build(&engine, &["--cache-from", &image, "--cache-from", &none, "--cache-from", "127.0.0.1:1/x"]);
    assert_eq!(ran(&output).len(), 4, "{output}");
    assert!(output.stdout.contains("is an image without a cache"), "{output}");
    assert!(output.stdout.contains("manifest unknown") || output.stdout.contains("name unknown"), "{output}");
    assert_eq!(output.stdout.matches("is not used: ").count(), 3, "{output}");

    let to = "type=registry,ref=127.0.0.1:1/x";
    let failed = build(&engine, &["--cache-to", to]);
    assert!(failed.code != 0 && failed.stderr.contains("127.0.0.1:1"), "{failed}");
    let ignored = build(&engine, &["--cache-to", &format!("{to},ignore-error=true")]);
    assert_eq!(ignored.code, 0, "{ignored}");
    assert!(ignored.stdout.contains("the cache was not written to 127.0.0.1:1/x"), "{ignored}");
    for (args, words) in [
        (["--cache-to", "type=gha"], "not built"),
        (["--cache-to", "type=inline,mode=max"], "mode=max is for registry and local"),
        (["--cache-to", "type=registry"], "needs ref=NAME"),
        (["--cache-to", "type=local"], "dest=FOLDER"),
        (["--cache-from", "type=local"], "src=FOLDER"),
        (["--cache-from", "mode=max"], "type="),
    ] {
        let refused = build(&engine, &args);
        assert!(refused.code != 0 && refused.stderr.contains(words), "{args:?}: {refused}");
    }
}
