//! The image store behind the engine: each form of layer does the same, bytes come back, and damage is found.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use brigantine_testkit::fixtures::{self, Archive, Layer};
use brigantine_testkit::{Client, Engine, executable, until};

fn start(storage: &str) -> Engine {
    Engine::builder().flag(format!("--storage={storage}")).start()
}

fn layers(engine: &Engine) -> Vec<PathBuf> {
    within(engine, "layers")
}

/// What is in a directory of the store.
fn within(engine: &Engine, dir: &str) -> Vec<PathBuf> {
    let dir = engine.data_root().join("image").join(dir);
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
    works(&start(storage), storage);
}

fn works(engine: &Engine, storage: &str) {
    let brig = |args: &[&str]| engine.client(Client::Brig, args.iter().copied()).ok();
    assert!(engine.get("/info")["DriverStatus"].to_string().contains(storage));
    engine.load(&layered(engine));
    let seen = brig(&[
        "run",
        "--rm",
        "layered:1",
        "sh",
        "-c",
        "cat keep/a; ls keep data; stat -c '%a %h' keep/a data/new",
    ]);
    assert_eq!(seen, "adata:\nnew\n\nkeep:\na\nhard\n644 2\n4755 1");
    let in_form = |path: &PathBuf| {
        let (index, tree) = (path.join("index.erofs").exists(), path.join("diff").exists());
        (index, tree) == (storage == "erofs", storage == "overlay")
    };
    assert!(layers(engine).iter().all(in_form), "{:?}", layers(engine));
    assert_eq!(within(engine, "trees").is_empty(), storage != "copy");

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
    assert_eq!(changes, "C /keep\nC /keep/a\nD /keep/hard", "nothing but what was changed");
    let out = engine.dir().join("out");
    brig(&["cp", "box:/keep/a", out.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(&out).unwrap(), "ax\n");
    brig(&["commit", "box", "committed:1"]);
    assert_eq!(brig(&["run", "--rm", "committed:1", "sh", "-c", "cat keep/a; ls keep"]), "ax\na");
    // The same changes are the same layer.
    brig(&["commit", "box", "committed:2"]);
    let top = |image: &str| brig(&["inspect", "-f", "{{json .RootFS.Layers}}", image]);
    assert_eq!(top("committed:1"), top("committed:2"));
    brig(&["rmi", "committed:2"]);
    // Copied into, stopped and started again.
    let into = engine.dir().join("into");
    fs::write(&into, "copied").unwrap();
    brig(&["create", "--name", "again", "layered:1", "cat", "/keep/into"]);
    brig(&["cp", into.to_str().unwrap(), "again:/keep/into"]);
    assert_eq!(brig(&["start", "-a", "again"]), "copied");
    assert_eq!(brig(&["diff", "again"]), "C /keep\nA /keep/into");
    brig(&["rm", "again"]);

    // Built on: what a step removes stays removed, what it adds is there for the next one.
    let context = engine.dir().join("context");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("file"), "from the context").unwrap();
    let dockerfile = "FROM layered:1\nRUN rm keep/a && echo made > keep/made && mkdir -p deep/er\nCOPY file /deep/er/\n\
                      RUN cat keep/made deep/er/file > all\nFROM layered:1\nCOPY --from=0 /all /\n\
                      RUN --mount=type=bind,from=0,target=/mnt ls /mnt/keep >> all\nCMD cat all\n";
    fs::write(context.join("Dockerfile"), dockerfile).unwrap();
    brig(&["build", "-q", "-t", "built:1", context.to_str().unwrap()]);
    assert_eq!(brig(&["run", "--rm", "built:1"]), "made\nfrom the contexthard\nmade");
    brig(&["rmi", "built:1"]);
    brig(&["builder", "prune", "-af"]);

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
    for dir in ["layers", "trees", "blobs/sha256"] {
        assert_eq!(within(engine, dir), Vec::<PathBuf>::new(), "the bytes are given back");
    }
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

#[test]
fn plain_copies_do_all_that_layers_do() {
    passes("copy");
}

#[test]
fn the_environment_names_a_form_and_a_flag_wins() {
    let form = |engine: &Engine| engine.get("/info")["DriverStatus"].to_string();
    let told = Engine::builder().env("BRIG_STORAGE", "copy").start();
    assert!(form(&told).contains("copy"), "{}", form(&told));
    told.load(&layered(&told));
    assert!(
        !within(&told, "layers").is_empty()
            && within(&told, "layers").iter().all(|l| !l.join("diff").exists())
    );
    let overruled = Engine::builder().env("BRIG_STORAGE", "copy").flag("--storage=overlay").start();
    assert!(form(&overruled).contains("overlay"), "{}", form(&overruled));
    let mut unknown = overruled.sandbox().command(executable("brig"));
    unknown.args(["daemon", "--data-root"]).arg(overruled.dir().join("other")).env("BRIG_STORAGE", "zfs");
    let output = unknown.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("BRIG_STORAGE") && said.contains("zfs"), "{said}");
}

#[test]
fn a_file_system_without_overlay_gets_plain_copies() {
    let mut engine = Engine::start();
    engine.stop_daemon();
    // An overlay is none that another overlay writes to.
    let (lower, upper, work) =
        (engine.dir().join("lower"), engine.dir().join("upper"), engine.dir().join("work"));
    for dir in [&lower, &upper, &work] {
        fs::create_dir(dir).unwrap();
    }
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    let mut mount = engine.sandbox().command("mount");
    mount.args(["-t", "overlay", "overlay", "-o", &options]).arg(engine.data_root());
    assert!(mount.status().unwrap().success());
    engine.restart_daemon();
    assert!(engine.get("/info")["DriverStatus"].to_string().contains("copy"));
    let run = |args: &[&str]| engine.client(Client::Brig, args.iter().copied());
    engine.load(&layered(&engine));
    assert_eq!(run(&["run", "--name", "box", "layered:1", "sh", "-c", "rm keep/a; ls keep"]).ok(), "hard");
    assert_eq!(run(&["diff", "box"]).ok(), "C /keep\nD /keep/a");
    run(&["commit", "box", "committed:1"]).ok();
    assert_eq!(run(&["run", "--rm", "committed:1", "ls", "keep"]).ok(), "hard");
    run(&["rm", "box"]).ok();
}

#[test]
fn the_last_container_of_a_removed_image_gives_its_layers_back() {
    for storage in ["erofs", "overlay", "copy"] {
        let engine = start(storage);
        let brig = |args: &[&str]| engine.client(Client::Brig, args.iter().copied());
        engine.load(&layered(&engine));
        brig(&["run", "--name", "one", "layered:1", "touch", "/new"]).ok();
        brig(&["create", "--name", "two", "layered:1", "cat", "/keep/a"]).ok();
        brig(&["rmi", "-f", "layered:1"]).ok();
        brig(&["rm", "one"]).ok();
        assert_eq!(brig(&["start", "-a", "two"]).ok(), "a", "{storage}: it has its layers");
        assert_eq!(brig(&["diff", "two"]).ok(), "");
        brig(&["rm", "two"]).ok();
        for dir in ["layers", "trees", "blobs/sha256"] {
            assert_eq!(within(&engine, dir), Vec::<PathBuf>::new(), "{storage}: {dir}");
        }
    }
}

#[test]
fn what_is_not_compressed_is_stored_once() {
    let engine = start("erofs");
    let brig = |args: &[&str]| engine.client(Client::Brig, args.iter().copied());
    engine.load(&layered(&engine));
    let fill = "dd if=/dev/urandom of=/large bs=1M count=8 2>/dev/null";
    brig(&["run", "--name", "box", "layered:1", "sh", "-c", fill]).ok();
    brig(&["commit", "box", "committed:1"]).ok();
    for layer in layers(&engine) {
        let blob = engine.data_root().join("image/blobs/sha256").join(layer.file_name().unwrap());
        let (archive, blob) = (fs::metadata(layer.join("data.tar")).unwrap(), fs::metadata(blob).unwrap());
        assert_eq!(archive.ino(), blob.ino(), "{}", layer.display());
    }
    let told = engine.get("/system/df")["LayersSize"].as_u64().unwrap();
    let taken = du(&engine.data_root().join("image"), &mut std::collections::HashSet::new());
    assert!(told.abs_diff(taken) * 100 < taken, "df {told}, du {taken}");
    brig(&["rm", "box"]).ok();
    let freed = brig(&["image", "prune", "-af"]).ok();
    assert!(freed.contains("MB") && within(&engine, "blobs/sha256").is_empty(), "{freed}");
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
fn layers_are_synced_after_a_while() {
    let engine = Engine::start();
    engine.load(&layered(&engine));
    let metas =
        || layers(&engine).iter().map(|layer| fs::read_to_string(layer.join("meta.json")).unwrap()).collect();
    let all: Vec<String> = metas();
    assert!(all.iter().all(|meta| meta.contains("unsettled")), "nobody waited for that: {all:?}");
    let synced = until(Duration::from_mins(1), || {
        let all: Vec<String> = metas();
        all.iter().all(|meta| !meta.contains("unsettled")).then_some(())
    });
    assert!(synced.is_some(), "{:?}", metas());
}

#[test]
fn df_says_what_du_says() {
    for storage in ["erofs", "overlay", "copy"] {
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
        engine.brig(["create", "large:1", "x"]).ok();
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
    let layer = layers(&engine)[0].clone();
    let archive = layer.join("data.tar");
    let mut raw = fs::read(&archive).unwrap();
    raw[520] ^= 4;
    // A file of its own: the blob stays what it is.
    fs::remove_file(&archive).unwrap();
    fs::write(&archive, &raw).unwrap();
    let found = brig(&["system", "check"]).run();
    assert_eq!(found.code, 1, "{found:?}");
    assert!(found.stdout.contains("corrupt layer sha256:"), "{found:?}");
    let repaired = brig(&["system", "check", "--repair"]).ok();
    assert!(repaired.contains("1 problems") && repaired.contains("Repaired:"), "{repaired}");
    assert!(brig(&["system", "check"]).ok().contains(", 0 problems"));
    assert_eq!(brig(&["run", "--rm", "layered:1", "cat", "keep/a"]).ok(), "a");

    // The one file that blob and layer are: what is made from it has to be brought again.
    let blob = engine.data_root().join("image/blobs/sha256").join(layer.file_name().unwrap());
    fs::write(&blob, &raw).unwrap();
    let found = brig(&["system", "check"]).exits(1);
    assert!(found.stdout.contains("corrupt layer") && found.stdout.contains("corrupt blob"), "{found}");
    brig(&["system", "check", "--repair"]).ok();
    let found = brig(&["system", "check"]).exits(1);
    assert!(found.stdout.contains("lacks blob"), "{found}");
    engine.load(&engine.dir().join("layered.tar"));
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
