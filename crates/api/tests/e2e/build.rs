//! Building images with unmodified classic clients: the docker command without BuildKit, and plain requests.

use std::fs;
use std::path::{Path, PathBuf};

use brigantine_testkit::{Client, Engine, Invocation, Output, eventually, peers::Registry};
use serde_json::Value;

use crate::Host;

/// A folder with these files.
fn context(host: &Host, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let dir = host.dir().join(name);
    for (path, text) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn docker_build(host: &Host, dir: &Path, args: &[&str]) -> Invocation {
    let dir = dir.to_str().unwrap().to_owned();
    let args: Vec<String> = ["build"].iter().chain(args).map(|arg| (*arg).to_owned()).chain([dir]).collect();
    host.cli(args).env("DOCKER_BUILDKIT", "0")
}

fn text(output: &Output) -> String {
    format!("{}{}", output.stdout, output.stderr)
}

#[test]
fn stages_steps_and_mounts_make_an_image_and_are_cached() {
    let host = Host::new(Client::Docker);
    let dockerfile = r#"
ARG BASE=busybox
FROM ${BASE} AS build
ARG WHO=world
ENV GREET="hello $WHO"
WORKDIR /src
COPY a.txt sub/ ./
RUN echo "$GREET" > out.txt && cat a.txt s.txt >> out.txt && echo said
RUN --mount=type=cache,target=/cache --mount=type=tmpfs,target=/t --mount=type=bind,source=sub,target=/b ls /b && echo x >> /cache/log
FROM busybox AS never
RUN exit 1
FROM busybox
COPY --from=build --chown=5:6 --chmod=640 /src/out.txt /out/
COPY <<EOT /etc/motd
hi $PATH
EOT
RUN true
RUN <<EOT
set -e
mkdir -p /made && id -u > /made/uid
EOT
LABEL a=b
USER 5
CMD ["cat", "/out/out.txt"]
"#;
    let files = [("Dockerfile", dockerfile), ("a.txt", "A\n"), ("sub/s.txt", "S\n")];
    let dir = context(&host, "ctx", &files);
    let args = ["-t", "x:1", "--build-arg", "WHO=me", "--build-arg", "NONE=1", "--label", "l=m"];
    let first = docker_build(&host, &dir, &args).run();
    assert_eq!(first.code, 0, "{}", text(&first));
    for line in [
        "Step 1/16 : ARG BASE=busybox",
        "said\n",
        "s.txt\n",
        "[Warning] One or more build-args [NONE] were not consumed",
        "Successfully built ",
        "Successfully tagged x:1",
    ] {
        assert!(first.stdout.contains(line), "{line:?} is missing in {}", first.stdout);
    }
    assert!(!first.stdout.contains("Using cache"), "{}", first.stdout);
    assert_eq!(host.cli(["run", "--rm", "x:1"]).ok(), "hello me\nA\nS");
    let listed = host.cli([
        "run",
        "--rm",
        "-u",
        "0",
        "x:1",
        "sh",
        "-c",
        "ls -ln /out/out.txt; cat /etc/motd /made/uid; ls /dev/pipes",
    ]);
    let listed = listed.run().stdout;
    assert!(listed.starts_with("-rw-r-----    1 5        6 "), "{listed}");
    assert!(listed.contains("hi /usr/local/sbin:") && listed.contains("\n0\n"), "{listed}");
    let image: Value = serde_json::from_str(&host.cli(["inspect", "x:1"]).ok()).unwrap();
    let config = &image[0]["Config"];
    assert_eq!(config["Labels"], serde_json::json!({"a": "b", "l": "m"}));
    assert_eq!(config["User"], "5");
    // `RUN true` makes no layer, nor do the files that mounting needs.
    assert_eq!(image[0]["RootFS"]["Layers"].as_array().unwrap().len(), 4, "{image}");
    let history = host.cli(["history", "--no-trunc", "--format", "{{.CreatedBy}}", "x:1"]).ok();
    assert!(history.contains("COPY --chown=5:6 --chmod=640 /src/out.txt /out/ # buildkit"), "{history}");
    assert!(history.contains("RUN /bin/sh -c true # buildkit"), "{history}");

    let again = docker_build(&host, &dir, &args).ok();
    assert_eq!(again.matches("Using cache").count(), 13, "{again}");
    let id = |name: &str| host.cli(["inspect", "-f", "{{.Id}}", name]).ok();
    assert_eq!(id("x:1"), image[0]["Id"].as_str().unwrap());
    // Touched, not changed: the content decides.
    fs::write(dir.join("a.txt"), "A\n").unwrap();
    assert_eq!(docker_build(&host, &dir, &args).ok().matches("Using cache").count(), 13);
    fs::write(dir.join("a.txt"), "B\n").unwrap();
    let changed = docker_build(&host, &dir, &args).ok();
    assert!(changed.contains("said\n"), "{changed}");
    assert_eq!(host.cli(["run", "--rm", "x:1"]).ok(), "hello me\nB\nS");
    let none = docker_build(&host, &dir, &["--no-cache", "-q"]).ok();
    assert!(none.starts_with("sha256:") && none.len() == 71, "{none}");
}

#[test]
fn what_is_wrong_is_said_and_leaves_nothing() {
    let host = Host::new(Client::Docker);
    let fails = |name: &str, dockerfile: &str, args: &[&str], words: &str| {
        let dir = context(&host, name, &[("Dockerfile", dockerfile)]);
        let output = docker_build(&host, &dir, args).run();
        assert_ne!(output.code, 0, "{}", text(&output));
        assert!(text(&output).contains(words), "{name}: {words:?} is missing in {}", text(&output));
    };
    host.engine.leaving_nothing(|| {
        fails(
            "word",
            "FROM busybox\nRUM x\n",
            &[],
            "Dockerfile:2:1: unknown instruction: RUM (did you mean RUN?)",
        );
        fails(
            "exit",
            "FROM busybox\nRUN exit 7\n",
            &[],
            "The command '/bin/sh -c exit 7' returned a non-zero code: 7",
        );
        fails(
            "kill",
            "FROM busybox\nRUN sh -c 'kill -9 $$'; exit $?\n",
            &[],
            "returned a non-zero code: 137",
        );
        fails("none", "FROM busybox\nRUN [\"nope\"]\n", &[], "nope");
        fails("file", "FROM busybox\nCOPY nothing /\n", &[], "\"/nothing\": not found");
        fails("stage", "FROM busybox\nCOPY --from=7 /a /\n", &[], "invalid from flag value 7");
        fails(
            "later",
            "FROM busybox AS a\nCOPY --from=b /a /\nFROM busybox AS b\n",
            &["--target", "a"],
            "comes later",
        );
        fails("self", "FROM busybox AS a\nCOPY --from=a /a /\n", &[], "circular dependency");
        fails(
            "target",
            "FROM busybox AS a\n",
            &["--target", "z"],
            "target stage \"z\" could not be found (stages: a)",
        );
        fails(
            "out",
            "FROM busybox\nRUN --mount=type=secret,id=s,required cat /run/secrets/s\n",
            &[],
            "secret s: not found",
        );
        fails(
            "dir",
            "FROM busybox\nCOPY Dockerfile /etc\nCOPY Dockerfile /bin/sh/x\n",
            &[],
            "cannot copy to non-directory: /bin/busybox",
        );
        let dir = context(&host, "missing", &[("x", "")]);
        let output = docker_build(&host, &dir, &["-f", dir.join("x").to_str().unwrap()]).run();
        assert!(text(&output).contains("file with no instructions"), "{}", text(&output));
        // The cache of what succeeded is still right.
        let dir = context(&host, "exit", &[("Dockerfile", "FROM busybox\nRUN echo ok > /ok\nRUN cat /ok\n")]);
        assert!(docker_build(&host, &dir, &[]).ok().contains("ok\n"));
        host.cli(["builder", "prune", "-af"]).ok();
        host.cli(["image", "prune", "-f"]).ok();
    });
}

#[test]
fn an_archives_entries_stay_inside() {
    let engine = Engine::with_busybox();
    let response = engine.post_bytes("/build?t=x", "application/x-tar", b"FROM busybox\nRUN echo bare\n");
    assert_eq!(response.status, 200);
    assert!(
        response.text().contains("bare\\n") && response.text().contains("Successfully tagged x:latest"),
        "{}",
        response.text()
    );
    let response = engine.post_bytes("/build", "application/x-tar", b"FROM busybox\nBAD\n");
    assert_eq!(response.status, 400);
    assert!(
        response.message().contains("Dockerfile:2:1: unknown instruction: BAD"),
        "{}",
        response.message()
    );
    assert_eq!(engine.post_bytes("/build?version=3", "application/x-tar", b"").status, 400);
    assert_eq!(engine.post_bytes("/build", "application/x-tar", b"").status, 400);
}

fn brig_build(host: &Host, dir: &Path, args: &[&str]) -> Invocation {
    let dir = dir.to_str().unwrap().to_owned();
    host.cli(["build"].iter().chain(args).map(|arg| (*arg).to_owned()).chain([dir]).collect::<Vec<_>>())
}

#[test]
fn checks_are_told_and_can_fail_a_build() {
    let host = Host::new(Client::Brig);
    let files = [
        ("Dockerfile", "FROM busybox\nMAINTAINER me\nCOPY no.key /\nCMD true\n"),
        (".dockerignore", "*.key\n"),
    ];
    let dir = context(&host, "ctx", &files);
    let checked = brig_build(&host, &dir, &["--check"]).run();
    assert_eq!(checked.code, 1, "{}", text(&checked));
    for rule in ["MaintainerDeprecated", "CopyIgnoredFile", "JSONArgsRecommended"] {
        assert!(checked.stdout.contains(&format!("WARNING: {rule}\n")), "{}", checked.stdout);
    }
    assert!(checked.stdout.contains("   2 | >>> MAINTAINER me"), "{}", checked.stdout);
    assert!(checked.stderr.contains("3 warnings were found"), "{}", checked.stderr);
    fs::write(dir.join("Dockerfile"), "# check=error=true\nFROM busybox\nCMD true\n").unwrap();
    let refused = brig_build(&host, &dir, &["-t", "refused"]).run();
    assert_ne!(refused.code, 0);
    assert!(
        refused.stderr.contains("JSONArgsRecommended") && refused.stderr.contains("--check"),
        "{}",
        text(&refused)
    );
    fs::write(dir.join("Dockerfile"), "FROM busybox\nCMD true\n").unwrap();
    let built = brig_build(&host, &dir, &["-t", "built"]).ok();
    assert!(built.contains("[Warning] JSONArgsRecommended: "), "{built}");
    fs::write(dir.join("Dockerfile"), "FROM busybox\nCMD [\"true\"]\n").unwrap();
    assert_eq!(brig_build(&host, &dir, &["--check"]).ok(), "Check complete, no warnings found.");
    assert_ne!(host.cli(["image", "inspect", "refused"]).run().code, 0);
}

#[test]
fn a_miss_is_explained_down_to_the_file() {
    let host = Host::new(Client::Brig);
    let dockerfile = "FROM busybox\nRUN echo one\nCOPY src /src\nRUN cat /src/*\n";
    let dir = context(&host, "ctx", &[("Dockerfile", dockerfile), ("src/a", "1"), ("src/b", "1")]);
    assert!(host.cli(["build", "explain"]).run().stderr.contains("no build is on record"));
    brig_build(&host, &dir, &["-t", "x:1"]).ok();
    let first = host.cli(["build", "explain"]).ok();
    assert_eq!(first.matches("this step was not run here before").count(), 3, "{first}");
    fs::write(dir.join("src/b"), "2").unwrap();
    fs::write(dir.join("src/c"), "3").unwrap();
    brig_build(&host, &dir, &["-t", "x:2"]).ok();
    let second = host.cli(["builder", "explain"]).ok();
    assert!(second.contains("RUN echo one\n    cached"), "{second}");
    assert!(second.contains("changed: the files taken (src/b changed, src/c added)"), "{second}");
    assert!(second.contains("changed: the step below it"), "{second}");
    fs::write(dir.join("Dockerfile"), "FROM busybox\nRUN exit 3\n").unwrap();
    assert_ne!(brig_build(&host, &dir, &[]).run().code, 0);
    let failed = host.cli(["build", "explain"]).ok();
    assert!(failed.contains(" failed after ") && failed.contains("non-zero code: 3"), "{failed}");
    let listed = host.cli(["builder", "history", "--format", "{{.Name}} {{.Status}} {{.Cached}}"]).ok();
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!(lines.len(), 3, "{listed}");
    assert!(lines[0].ends_with("failed 0/2") && lines[1].starts_with("x:2 done 1/5"), "{listed}");
    assert_ne!(host.cli(["build", "explain", "nothing"]).run().code, 0);
}

#[test]
fn cache_mounts_can_be_listed_moved_and_removed() {
    let host = Host::new(Client::Brig);
    let write = "FROM busybox\nRUN --mount=type=cache,target=/c echo kept > /c/f\n";
    let read = "FROM busybox\nRUN --mount=type=cache,target=/c cat /c/f\n";
    let dir = context(&host, "ctx", &[("Dockerfile", write)]);
    brig_build(&host, &dir, &[]).ok();
    assert_eq!(host.cli(["builder", "cache", "ls", "--format", "{{.ID}} {{.InUse}}"]).ok(), "/c false");
    let archive = host.dir().join("cache.tar");
    host.cli(["builder", "cache", "export", "-o", archive.to_str().unwrap(), "/c"]).ok();
    let du = host.cli(["builder", "du", "--format", "{{.CacheType}}"]).ok();
    let mut kinds: Vec<&str> = du.lines().collect();
    kinds.sort_unstable();
    assert_eq!(kinds, ["exec.cachemount", "regular"], "{du}");
    host.cli(["builder", "prune", "-af"]).ok();
    assert_eq!(host.cli(["builder", "cache", "ls", "--format", "{{.ID}}"]).ok(), "");
    assert_ne!(host.cli(["builder", "cache", "export", "-o", "/dev/null", "/c"]).run().code, 0);
    host.cli(["builder", "cache", "import", "/c", archive.to_str().unwrap()]).ok();
    fs::write(dir.join("Dockerfile"), read).unwrap();
    let built = brig_build(&host, &dir, &[]).ok();
    assert!(built.lines().any(|line| line == "kept"), "{built}");
    fs::write(&archive, "no archive").unwrap();
    assert_ne!(host.cli(["builder", "cache", "import", "/c", archive.to_str().unwrap()]).run().code, 0);
    let again = brig_build(&host, &dir, &["--no-cache"]).ok();
    assert!(again.lines().any(|line| line == "kept"), "{again}");
}

/// The names in an archive.
fn entries(archive: &str) -> Vec<String> {
    let listed = std::process::Command::new("tar").args(["-tf", archive]).output().unwrap();
    assert!(listed.status.success(), "{archive}: {}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout).unwrap();
    names.lines().map(|name| name.trim_start_matches("./").to_owned()).collect()
}

#[test]
fn a_builds_output_is_a_folder_an_archive_or_an_image_in_a_registry() {
    let host = Host::new(Client::Brig);
    let dockerfile = "FROM busybox AS build\nRUN mkdir /o && echo made > /o/f && ln -s f /o/l && chmod 700 /o/f\n\
                      FROM scratch\nCOPY --from=build /o /o\n";
    let dir = context(&host, "ctx", &[("Dockerfile", dockerfile)]);
    let at = |name: &str| host.dir().join(name).to_str().unwrap().to_owned();
    let images = || host.cli(["images", "-aq", "--no-trunc"]).ok();
    let before = images();

    // Files: nothing of the image stays, also where something else is in the folder.
    let out = at("out");
    fs::create_dir_all(host.dir().join("out/o")).unwrap();
    fs::write(host.dir().join("out/o/other"), "stays").unwrap();
    brig_build(&host, &dir, &["-t", "not:named", "-o", &out]).ok();
    assert_eq!(fs::read_to_string(host.dir().join("out/o/l")).unwrap(), "made\n");
    assert_eq!(fs::read_to_string(host.dir().join("out/o/other")).unwrap(), "stays");
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &fs::metadata(host.dir().join("out/o/f")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o700);
    let archive = at("files.tar");
    brig_build(&host, &dir, &["--output", &format!("type=tar,dest={archive}")]).ok();
    let names = entries(&archive);
    assert!(names.iter().any(|n| n == "o/f"), "{names:?}");
    let piped = brig_build(&host, &dir, &["-o", "-"]).run();
    assert_eq!(piped.code, 0, "{}", piped.stderr);
    assert!(piped.stdout.contains("o/f") && piped.stderr.contains("Step 1/"), "{}", piped.stderr);
    assert_eq!(images(), before, "the images were not asked for");
    assert_eq!(host.cli(["ps", "-aq"]).ok(), "");

    // An archive of the image, which docker's load and skopeo take.
    let archive = at("image.tar");
    let built = brig_build(&host, &dir, &["-t", "x:1", "-o", &format!("type=oci,dest={archive}")]).ok();
    assert!(built.contains("Successfully tagged x:1"), "{built}");
    let names = entries(&archive);
    assert!(
        ["index.json", "oci-layout", "manifest.json"].iter().all(|n| names.iter().any(|m| m == n)),
        "{names:?}"
    );
    let id = host.cli(["inspect", "-f", "{{.Id}}", "x:1"]).ok();
    host.cli(["rmi", "x:1"]).ok();
    host.cli(["load", "-i", &archive]).ok();
    assert_eq!(host.cli(["inspect", "-f", "{{.Id}}", "x:1"]).ok(), id);

    // A registry, and what was built in words for programs.
    let registry = Registry::start(&host.engine);
    let name = format!("{}/a/b:c", registry.address());
    let (metadata, iid) = (at("metadata.json"), at("iid"));
    let files = ["--metadata-file", &metadata, "--iidfile", &iid];
    let args: Vec<&str> = ["-q", "-t", &name, "--push"].into_iter().chain(files).collect();
    brig_build(&host, &dir, &args).ok();
    assert_eq!(fs::read_to_string(&iid).unwrap(), id);
    let said: Value = serde_json::from_slice(&fs::read(&metadata).unwrap()).unwrap();
    assert_eq!(
        (&said["containerimage.config.digest"], &said["image.name"]),
        (&id.clone().into(), &name.clone().into())
    );
    host.cli(["rmi", &name]).ok();
    host.cli(["pull", "-q", &name]).ok();
    assert_eq!(host.cli(["inspect", "-f", "{{.Id}}", &name]).ok(), id);

    // What cannot be is said before anything is built.
    for (args, words) in [
        (vec!["--push"], "a push needs the image's name"),
        (vec!["-o", "type=local"], "dest is required for local output"),
        (vec!["-o", "-", "-o", "type=oci"], "only one output can go to standard output"),
    ] {
        let refused = brig_build(&host, &dir, &args).run();
        assert!(refused.code != 0 && refused.stderr.contains(words), "{args:?}: {}", text(&refused));
    }
}

/// Bytes that the cache alone takes.
fn cached_bytes(host: &Host) -> u64 {
    let usage = host.engine.get("/system/df?type=build-cache");
    let own = |entry: &&Value| entry["Shared"] != true;
    usage["BuildCache"]
        .as_array()
        .unwrap()
        .iter()
        .filter(own)
        .map(|entry| entry["Size"].as_u64().unwrap())
        .sum()
}

#[test]
fn the_cache_stays_below_its_cap_and_what_was_used_last_stays() {
    let gc = r#"{"builder": {"gc": {"enabled": true, "policy": [{"maxUsedSpace": "6MB"}]}}}"#;
    let engine = Engine::builder().etc("brigantine/daemon.json", gc).busybox().start();
    let host = Host { engine, client: Client::Brig };
    let dir = host.dir().join("ctx");
    let build = |number: usize| {
        let text = format!(
            "FROM busybox AS b\nRUN dd if=/dev/urandom of=/f bs=1M count=2 && echo ran-{number}\nFROM scratch\n"
        );
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("Dockerfile"), text).unwrap();
        brig_build(&host, &dir, &["-t", "x", "--target", "b", "-o", "type=tar,dest=/dev/null"]).ok()
    };
    for number in 0..6 {
        build(number);
        eventually("the cache is within its bounds", || (cached_bytes(&host) <= 6 << 20).then_some(()));
    }
    assert!(cached_bytes(&host) >= 2 << 20, "what was made last stays");
    let ran = |said: &str, number: usize| said.lines().any(|line| line == format!("ran-{number}"));
    assert!(!ran(&build(5), 5), "the last build is cached");
    assert!(ran(&build(0), 0), "the first is not any more");
    // By hand: to a smaller cap, then a filter that takes nothing.
    host.cli(["builder", "prune", "-f", "--max-used-space", "3MB"]).ok();
    assert!(cached_bytes(&host) <= 3 << 20);
    let before = cached_bytes(&host);
    host.cli(["builder", "prune", "-f", "--filter", "unused-for=48h"]).ok();
    host.cli(["builder", "prune", "-af", "--reserved-space", "1GB"]).ok();
    assert_eq!(cached_bytes(&host), before);
    let wrong = host.cli(["builder", "prune", "-f", "--filter", "type=nonsense"]).run();
    assert!(wrong.stderr.contains("regular, source.local and exec.cachemount are known"), "{}", wrong.stderr);
    host.cli(["builder", "prune", "-af"]).ok();
    assert_eq!(cached_bytes(&host), 0);
}
