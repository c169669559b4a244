//! Folders that `brig build` lends: what is sent of them, and when again.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use brigantine_testkit::{Engine, eventually};

fn folder(engine: &Engine, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let dir = engine.dir().join(name);
    fs::create_dir_all(&dir).unwrap();
    for (path, text) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    // What was just made may change within the clock's tick, and is sent again.
    std::thread::sleep(Duration::from_millis(50));
    dir
}

#[track_caller]
fn build(engine: &Engine, dir: &Path, args: &[&str]) -> String {
    engine.brig(["build"].iter().chain(args).copied().chain([dir.to_str().unwrap()])).ok()
}

/// The files that the engine keeps of contexts: each by its path after `files/`, with what would be another if it had been
/// sent again.
fn kept(engine: &Engine) -> BTreeMap<String, (i64, i64)> {
    fn walk(dir: &Path, found: &mut BTreeMap<String, (i64, i64)>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                walk(&entry.path(), found);
                continue;
            }
            // What is not written keeps the time of its last change, which nobody can set.
            let time = (metadata.ctime(), metadata.ctime_nsec());
            if let Some((_, path)) = entry.path().to_str().unwrap().rsplit_once("/files/") {
                assert_eq!(found.insert(path.to_owned(), time), None, "{path} is kept twice");
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(&engine.data_root().join("build/contexts"), &mut found);
    found
}

#[test]
fn only_what_is_used_and_has_changed_is_sent() {
    let engine = Engine::with_busybox();
    let dockerfile =
        "FROM busybox\nCOPY a d /c/\nCOPY --from=lib l* /l/\nRUN cat /c/* /l/* | xargs echo has\n";
    let files =
        [("Dockerfile", dockerfile), ("a", "1\n"), ("d/b", "2\n"), ("d/skip.o", ""), ("unused/x", "")];
    let dir = folder(&engine, "ctx", &files);
    fs::write(dir.join(".dockerignore"), "*/*.o\n").unwrap();
    let lib = folder(&engine, "lib", &[("l1", "3\n"), ("l2", "4\n"), ("m", ""), (".dockerignore", "l2\n")]);
    let named = format!("--build-context=lib={}", lib.display());
    let names = |kept: &BTreeMap<String, (i64, i64)>| kept.keys().cloned().collect::<Vec<_>>().join(" ");
    assert!(build(&engine, &dir, &[&named]).contains("has 1 2 3"));
    let first = kept(&engine);
    assert_eq!(names(&first), "a d/b l1");
    std::thread::sleep(Duration::from_millis(50));

    // Nothing has changed: nothing is sent.
    let again = build(&engine, &dir, &[&named]);
    assert!(again.contains("Using cache") && !again.contains("Running in"), "{again}");
    assert_eq!(kept(&engine), first);

    // The same length and the same time, another byte; and a file that is gone.
    let mtime = fs::metadata(dir.join("a")).unwrap().modified().unwrap();
    fs::write(dir.join("a"), "9\n").unwrap();
    fs::File::options().write(true).open(dir.join("a")).unwrap().set_modified(mtime).unwrap();
    assert!(build(&engine, &dir, &[&named]).contains("has 9 2 3"));
    let second = kept(&engine);
    assert_eq!(names(&second), "a d/b l1");
    assert_ne!(second["a"], first["a"]);
    assert_eq!((second["d/b"], second["l1"]), (first["d/b"], first["l1"]));
    fs::remove_file(dir.join("d/b")).unwrap();
    assert!(build(&engine, &dir, &[&named]).contains("has 9 3"));
    assert_eq!(names(&kept(&engine)), "a l1");

    // Another Dockerfile of the folder has a place of its own.
    fs::write(dir.join("other"), "FROM busybox\nCOPY unused /u/\n").unwrap();
    build(&engine, &dir, &["-f", dir.join("other").to_str().unwrap()]);
    assert_eq!(names(&kept(&engine)), "a l1 unused/x");
    let counted = engine.docker(["system", "df", "-v", "--format", "{{json .BuildCache}}"]).ok();
    assert_eq!(counted.matches("source.local").count(), 3, "{counted}");
    engine.brig(["builder", "prune", "-af"]).ok();
    assert_eq!(names(&kept(&engine)), "");
}

#[test]
fn links_wildcards_and_names_of_any_kind_are_found() {
    let engine = Engine::with_busybox();
    let dir = folder(
        &engine,
        "ctx",
        &[
            ("real/f", "f"),
            ("real/deep/g", "g"),
            ("d/h", "h"),
            ("größe 1", "ö"),
            ("ärger", "no"),
            ("d/[x]", "x"),
        ],
    );
    symlink("../real/f", dir.join("d/to-f")).unwrap();
    symlink("/real/deep", dir.join("abs")).unwrap();
    symlink("../../../../etc/passwd", dir.join("d/out")).unwrap();
    fs::write(dir.join(".dockerignore"), "ä*\n").unwrap();
    // More names than a header of the usual size takes.
    let many = (0..3000).map(|n| format!("many/file-{n}")).collect::<Vec<_>>().join(" ");
    fs::create_dir(dir.join("many")).unwrap();
    for n in 0..3000 {
        fs::write(dir.join(format!("many/file-{n}")), "").unwrap();
    }
    let dockerfile = format!(
        "FROM busybox\nCOPY d/t* /1/\nCOPY abs/g /2/\nCOPY [\"größe*\", \"/3/\"]\nCOPY d/[[]x] /4/\n\
         COPY --exclude=m* */*/g /5/\nCOPY {many} /6/\n\
         RUN cat /1/* /2/* /3/* /4/* /5/* | xargs echo; ls /6 | wc -l\n"
    );
    fs::write(dir.join("Dockerfile"), dockerfile).unwrap();
    let built = build(&engine, &dir, &[]);
    assert!(built.contains("fgöxg\n3000\n"), "{built}");
    assert!(!kept(&engine).contains_key("ärger"));
    for source in ["d/out", "ärger", "d/nothing"] {
        fs::write(dir.join("Dockerfile"), format!("FROM busybox\nCOPY [\"{source}\", \"/\"]\n")).unwrap();
        let refused = engine.brig(["build", dir.to_str().unwrap()]).run();
        assert!(refused.code != 0 && refused.stderr.contains(source), "{refused}");
    }
}

#[test]
fn a_file_that_changes_while_it_is_sent_ends_the_build() {
    let engine = Engine::with_busybox();
    let dir = folder(&engine, "ctx", &[("Dockerfile", "FROM busybox\nCOPY log /\n")]);
    let mut log = fs::File::create(dir.join("log")).unwrap();
    log.set_len(64 << 20).unwrap();
    let over = AtomicBool::new(false);
    let refused = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                log.write_all(b"more").unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let refused = engine.brig(["build", dir.to_str().unwrap()]).run();
        over.store(true, Ordering::Relaxed);
        refused
    });
    assert_ne!(refused.code, 0, "{refused}");
    assert!(refused.stderr.contains("\"log\" was changed while it was being read"), "{refused}");
    build(&engine, &dir, &[]);
}

#[test]
fn several_builds_of_a_folder_at_once_and_a_client_that_leaves_while_it_sends() {
    let engine = Engine::with_busybox();
    let dir = folder(
        &engine,
        "ctx",
        &[("Dockerfile", "FROM busybox\nCOPY . /c\nRUN cat /c/f && sleep 0.5\n"), ("f", "whole\n")],
    );
    let at_once = |count: usize| {
        std::thread::scope(|scope| {
            for number in 0..count {
                let (engine, dir) = (&engine, &dir);
                scope.spawn(move || {
                    let tag = format!("x{number}");
                    let built = build(engine, dir, &["--no-cache", "-t", &tag]);
                    assert!(built.contains("whole\n"), "{built}");
                });
            }
        });
    };
    // Each place with when its file was written.
    let places = || {
        let dir = engine.data_root().join("build/contexts");
        let places = fs::read_dir(dir).unwrap().map(|place| place.unwrap().path());
        let written = |place: &Path| {
            let file = fs::metadata(place.join("files/f")).ok()?;
            Some((file.ctime(), file.ctime_nsec()))
        };
        places
            .map(|place| (written(&place), place))
            .map(|(at, place)| (place, at))
            .collect::<BTreeMap<_, _>>()
    };
    at_once(6);
    let first = places();
    assert!((3..=6).contains(&first.len()) && first.values().all(Option::is_some), "{first:?}");
    // So many more are sent nothing.
    at_once(first.len());
    assert_eq!(places(), first);
    at_once(9);
    eventually("only eight are kept", || (places().len() <= 8).then_some(()));

    let large = dir.join("large");
    fs::File::create(&large).unwrap().set_len(4 << 30).unwrap();
    let mut client = engine.brig(["build", dir.to_str().unwrap()]).spawn();
    eventually("it is being sent", || kept_large(&engine).then_some(()));
    client.kill().unwrap();
    client.wait().unwrap();
    fs::remove_file(&large).unwrap();
    assert!(build(&engine, &dir, &["--no-cache"]).contains("whole\n"));
    assert!(!kept_large(&engine));
}

/// Whether a part of a file of that name has come.
fn kept_large(engine: &Engine) -> bool {
    let places = fs::read_dir(engine.data_root().join("build/contexts")).into_iter().flatten().flatten();
    places.map(|place| place.path().join("files/large")).any(|file| file.exists())
}
