//! The image store behind the engine: each form of layer does the same, bytes come back, and damage is found.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use brigantine_testkit::fixtures::{self, Archive, Layer};
use brigantine_testkit::{Client, Engine};

fn start(storage: &str) -> Engine {
    Engine::builder().flag(format!("--storage={storage}")).start()
}

fn layers(engine: &Engine) -> Vec<PathBuf> {
    let dir = engine.data_root().join("image/layers");
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| !path.ends_with(".empty")).collect()
}

fn layered(engine: &Engine) -> PathBuf {
    let mut lower = Layer::default();
    lower.dir("keep", 0o755).file("keep/a", 0o644, b"a").file("keep/b", 0o600, b"b");
    lower.dir("data", 0o755).file("data/seed", 0o640, b"seed").hardlink("keep/hard", "keep/a");
    let mut upper = Layer::default();
    upper
        .file("keep/.wh.b", 0o644, b"")
        .file("data/.wh..wh..opq", 0o644, b"")
        .file("data/new", 0o4755, b"new");
    let image = Archive::new("layered:1")
        .layer(fixtures::busybox_layer().unwrap())
        .layer(lower.finish())
        .layer(upper.finish());
    image.cmd(&["sh"]).write(engine.dir(), "layered.tar")
}

/// What each form of layer must pass.
fn passes(storage: &str) {
    let engine = start(storage);
    let brig = |args: &[&str]| engine.client(Client::Brig, args.iter().copied()).ok();
    assert!(engine.get("/info")["DriverStatus"].to_string().contains(storage));
    engine.load(&layered(&engine));
    let seen = brig(&[
        "run",
        "--rm",
        "layered:1",
        "sh",
        "-c",
        "cat keep/a; ls keep data; stat -c '%a %h' keep/a data/new",
    ]);
    assert_eq!(seen, "adata:\nnew\n\nkeep:\na\nhard\n644 2\n4755 1");
    let in_form =
        |path: &PathBuf| path.join(if storage == "erofs" { "index.erofs" } else { "diff" }).exists();
    assert!(layers(&engine).iter().all(in_form), "{:?}", layers(&engine));

    // A volume is filled from the image; files are copied, changed, told, exported and committed.
    brig(&[
        "run",
        "--name",
        "box",
        "-v",
        "vol:/data",
        "layered:1",
        "sh",
        "-c",
        "cat /data/new; rm keep/hard; echo x >> keep/a",
    ]);
    assert_eq!(brig(&["run", "--rm", "-v", "vol:/mnt", "layered:1", "ls", "/mnt"]), "new");
    let changes = brig(&["diff", "box"]);
    assert!(changes.contains("C /keep/a") && changes.contains("D /keep/hard"), "{changes}");
    let out = engine.dir().join("out");
    brig(&["cp", "box:/keep/a", out.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(&out).unwrap(), "ax\n");
    brig(&["commit", "box", "committed:1"]);
    assert_eq!(brig(&["run", "--rm", "committed:1", "sh", "-c", "cat keep/a; ls keep"]), "ax\na");
    let exported = engine.dir().join("exported.tar");
    brig(&["export", "-o", exported.to_str().unwrap(), "box"]);
    brig(&["import", exported.to_str().unwrap(), "imported:1"]);
    assert_eq!(brig(&["run", "--rm", "imported:1", "/bin/busybox", "cat", "/keep/a"]), "ax");

    // Saved, removed and loaded again it is the same image.
    let id = brig(&["inspect", "-f", "{{.Id}}", "committed:1"]);
    let saved = engine.dir().join("saved.tar");
    brig(&["save", "-o", saved.to_str().unwrap(), "committed:1"]);
    brig(&["rm", "box"]);
    brig(&["rmi", "committed:1", "imported:1", "layered:1"]);
    assert_eq!(layers(&engine), Vec::<PathBuf>::new(), "the bytes are given back");
    engine.load(&saved);
    assert_eq!(brig(&["inspect", "-f", "{{.Id}}", "committed:1"]), id);
    assert!(brig(&["system", "check"]).contains(", 0 problems"));
}

#[test]
fn erofs_layers_do_all_that_layers_do() {
    passes("erofs");
}

#[test]
fn extracted_layers_do_all_that_layers_do() {
    passes("overlay");
}

/// Bytes allocated below a directory, a file with several names counted once.
fn du(dir: &Path, seen: &mut std::collections::HashSet<u64>) -> u64 {
    let mut total = 0;
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        if seen.insert(metadata.ino()) {
            total += metadata.blocks() * 512;
        }
        if metadata.is_dir() {
            total += du(&entry.path(), seen);
        }
    }
    total
}

#[test]
fn df_says_what_du_says() {
    for storage in ["erofs", "overlay"] {
        let engine = start(storage);
        let mut layer = Layer::default();
        let mut state = 1_u32;
        for n in 0..40 {
            let bytes: Vec<u8> = (0..500_000)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) as u8
                })
                .collect();
            layer.file(&format!("f{n}"), 0o644, &bytes);
        }
        let image = Archive::new("large:1").layer(layer.finish());
        engine.load(&image.cmd(&["sh"]).write(engine.dir(), "large.tar"));
        let told = engine.get("/system/df")["LayersSize"].as_u64().unwrap();
        let taken = du(&engine.data_root().join("image"), &mut std::collections::HashSet::new());
        assert!(told.abs_diff(taken) * 100 < taken, "{storage}: df {told}, du {taken}");
    }
}

#[test]
fn a_check_tells_of_damage_and_repairs_it() {
    let engine = start("erofs");
    let brig = |args: &[&str]| engine.client(Client::Brig, args.iter().copied());
    engine.load(&layered(&engine));
    brig(&["run", "--rm", "layered:1", "true"]).ok();
    let archive = layers(&engine)[0].join("data.tar");
    let mut raw = fs::read(&archive).unwrap();
    raw[520] ^= 4;
    fs::write(&archive, raw).unwrap();
    let found = brig(&["system", "check"]).run();
    assert_eq!(found.code, 1, "{found:?}");
    assert!(found.stdout.contains("corrupt layer sha256:"), "{found:?}");
    let repaired = brig(&["system", "check", "--repair"]).ok();
    assert!(repaired.contains("1 problems") && repaired.contains("Repaired:"), "{repaired}");
    assert!(brig(&["system", "check"]).ok().contains(", 0 problems"));
    assert_eq!(brig(&["run", "--rm", "layered:1", "cat", "keep/a"]).ok(), "a");
}

#[test]
fn images_are_explored_compared_and_shown_as_a_tree() {
    let engine = start("erofs");
    let brig = |args: &[&str]| engine.client(Client::Brig, args.iter().copied()).ok();
    engine.load(&layered(&engine));
    brig(&["run", "--name", "box", "layered:1", "sh", "-c", "echo longer > keep/a; touch added"]);
    brig(&["commit", "-c", "CMD echo", "box", "child:1"]);
    let explored = brig(&["image", "explore", "child:1"]);
    assert!(explored.contains("in 4 layers") && explored.contains("/data/seed"), "{explored}");
    let listed = brig(&["image", "explore", "--layer", "3", "child:1"]);
    assert!(listed.contains('D') && listed.contains("/keep/b"), "{listed}");
    let json = brig(&["image", "explore", "--format", "json", "child:1"]);
    assert!(json.contains("\"Efficiency\":0.9"), "{json}");
    let differs = brig(&["image", "diff", "layered:1", "child:1"]);
    assert!(differs.contains("A /added") && differs.contains("C /keep/a (content"), "{differs}");
    assert!(differs.contains("config.Cmd:"), "{differs}");
    let tree = brig(&["image", "tree"]);
    let lines: Vec<&str> = tree.lines().collect();
    assert!(lines[0].contains("3 layers up to"), "{tree}");
    assert!(lines[1].contains("layered:1") && lines[3].contains("child:1"), "{tree}");
}
