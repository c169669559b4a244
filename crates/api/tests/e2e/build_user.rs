//! What a user of `brig build` meets: what a Dockerfile offers, the live view, contexts with names, files and what
//! attests to them, and Ctrl-C.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use brigantine_testkit::{Client, Output, Terminal, eventually, must};
use serde_json::{Value, json};

use crate::Host;

/// A folder with these files.
fn folder(host: &Host, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let dir = host.dir().join(name);
    for (path, text) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn build(host: &Host, dir: &Path, args: &[&str]) -> Output {
    let dir = dir.to_str().unwrap().to_owned();
    host.cli(["build"].iter().chain(args).map(|arg| (*arg).to_owned()).chain([dir])).run()
}

#[track_caller]
fn built(host: &Host, dir: &Path, args: &[&str]) -> Output {
    let output = build(host, dir, args);
    assert_eq!(output.code, 0, "{args:?}: {output}");
    output
}

#[track_caller]
fn refused(host: &Host, dir: &Path, args: &[&str], words: &str) {
    let output = build(host, dir, args);
    assert!(output.code != 0 && output.stderr.contains(words), "{args:?}: {words:?} is missing: {output}");
}

const OFFERS: &str = "# BASE is what all is made on
ARG BASE=busybox
ARG UNUSED=1
# tools has what is needed to build
FROM ${BASE} AS tools
# VERSION is what is made
ARG VERSION=1.0
ARG BASE PLAIN
RUN --mount=type=secret,id=token,required --mount=type=ssh true

FROM busybox AS other
ARG HIDDEN=x
RUN --mount=type=secret,id=hidden true
# app is the program
FROM --platform=linux/amd64 tools AS app
RUN --mount=type=secret,id=more exit 1
";

#[test]
fn what_a_dockerfile_offers_is_told_without_building_it() {
    let host = Host::new(Client::Brig);
    let dir = folder(&host, "ctx", &[("Dockerfile", OFFERS), ("big", "not sent")]);
    let told = built(&host, &dir, &["--call", "targets"]).stdout;
    assert_eq!(
        told,
        "TARGET         DESCRIPTION\ntools          has what is needed to build\nother\napp (default)  is the program\n"
    );
    let told = built(&host, &dir, &["--call", "outline", "--build-arg", "VERSION=2"]).stdout;
    let wanted = "TARGET:        app
DESCRIPTION:   is the program

BUILD ARG   VALUE     DESCRIPTION
VERSION     2         is what is made
BASE        busybox   is what all is made on
PLAIN

SECRET   REQUIRED
token    true
more

SSH       REQUIRED
default
";
    assert_eq!(told, wanted);
    let other = built(&host, &dir, &["--call", "outline", "--target", "other"]).stdout;
    assert!(other.contains("HIDDEN") && other.contains("hidden") && !other.contains("VERSION"), "{other}");
    // For programs, in the shape of the frontend's subrequests.
    let parse = |args: &[&str]| -> Value { serde_json::from_str(&built(&host, &dir, args).stdout).unwrap() };
    let outline = parse(&["--call", "outline,format=json"]);
    assert_eq!(outline["args"][0]["name"], "VERSION");
    assert_eq!(
        outline["args"][0]["location"]["ranges"][0],
        json!({ "start": { "line": 7 }, "end": { "line": 7 } })
    );
    assert_eq!(
        outline["secrets"][0],
        json!({ "name": "token", "required": true, "location": { "ranges": [{ "start": { "line": 9 }, "end": { "line": 9 } }] } })
    );
    let targets = parse(&["--call", "targets,format=json"]);
    assert_eq!(targets["targets"][2]["default"], true);
    assert_eq!(
        (&targets["targets"][0]["base"], &targets["targets"][2]["platform"]),
        (&json!("busybox"), &json!("linux/amd64"))
    );
    let checked = build(&host, &dir, &["--call", "check,format=json"]);
    assert_eq!(
        serde_json::from_str::<Value>(&checked.stdout).unwrap()["Warnings"][0]["Rule"],
        "FromPlatformFlagConstDisallowed"
    );
    refused(&host, &dir, &["--call", "everything"], "build, check, outline and targets are known");
    refused(
        &host,
        &dir,
        &["--call", "outline", "--target", "none"],
        "target stage \"none\" could not be found",
    );
    assert_eq!(host.cli(["images", "-aq"]).ok().lines().count(), 1, "nothing was built");
}

#[test]
fn contexts_with_names_are_folders_images_layouts_and_urls() {
    let host = Host::new(Client::Brig);
    let dockerfile = "FROM busybox AS files\nRUN echo stage > /f\nFROM base\nCOPY --from=files f /one\n\
                      RUN --mount=from=more,target=/m cat /m/deep/f > /two && ls /m > /three\n";
    let dir = folder(&host, "ctx", &[("Dockerfile", dockerfile)]);
    let files = folder(&host, "files", &[("f", "folder\n")]);
    let more = folder(
        &host,
        "more",
        &[("deep/f", "deep\n"), ("left/out", "x"), (".dockerignore", "left\n.dockerignore\n")],
    );
    symlink("/etc", more.join("leads-out")).unwrap();
    assert!(Command::new("mkfifo").arg(more.join("pipe")).status().unwrap().success());
    let named = |name: &str, dir: &Path| format!("{name}={}", dir.display());
    // A folder stands for a stage, an image for an image.
    let (files, more) = (named("files", &files), named("more", &more));
    let args = [
        "-t",
        "c:1",
        "--build-context",
        &files,
        "--build-context",
        &more,
        "--build-context",
        "base=docker-image://busybox",
    ];
    built(&host, &dir, &args);
    let show = |name: &str| host.cli(["run", "--rm", name, "cat", "/one", "/two", "/three"]).ok();
    assert_eq!(show("c:1"), "folder\ndeep\ndeep\nleads-out");
    assert!(built(&host, &dir, &args).stdout.contains("Using cache"));

    // An image of a layout, by its tag among several; it is not there when the build is over.
    let layout = host.dir().join("layout");
    fs::create_dir(&layout).unwrap();
    let archive = brigantine_testkit::fixtures::busybox();
    for tag in ["one", "two"] {
        let to = format!("oci:{}:{tag}", layout.display());
        let from = format!("docker-archive:{}", archive.display());
        must(Command::new("skopeo").args(["copy", "--insecure-policy", &from, &to]));
    }
    host.cli(["rmi", "-f", "c:1", "busybox"]).ok();
    host.cli(["builder", "prune", "-af"]).ok();
    fs::write(dir.join("Dockerfile"), "FROM base\nCOPY --from=files f /one\nRUN cat /one\n").unwrap();
    let base = format!("base=oci-layout://{}:two", layout.display());
    let out = host.dir().join("out").to_str().unwrap().to_owned();
    built(&host, &dir, &["-o", &out, "--build-context", &files, "--build-context", &base]);
    assert_eq!(fs::read_to_string(host.dir().join("out/one")).unwrap(), "folder\n");
    let images = || host.cli(["images", "-aq"]).ok();
    eventually("the layout's image is gone", || images().is_empty().then_some(()));
    // Built on it, the image has its layers.
    built(&host, &dir, &["-t", "c:2", "--build-context", &files, "--build-context", &base]);
    assert_eq!(host.cli(["run", "--rm", "c:2", "cat", "/one"]).ok(), "folder");

    for (context, words) in [
        ("files", "NAME=VALUE is expected"),
        ("=x", "NAME=VALUE is expected"),
        ("files=/nonexistent", "no such file"),
        ("files=target:other", "bake"),
        ("files=oci-layout:///nonexistent", "no OCI image layout"),
        ("base=docker-image://127.0.0.1:1/none", "127.0.0.1:1"),
    ] {
        refused(&host, &dir, &["--build-context", context], words);
    }
    let file = format!("files={}", dir.join("Dockerfile").display());
    refused(&host, &dir, &["--build-context", &file], "not a directory");
}

#[test]
fn a_live_view_shows_what_runs_and_what_is_done() {
    let host = Host::new(Client::Brig);
    let gate = host.dir().join("gate");
    fs::create_dir(&gate).unwrap();
    let dockerfile = "FROM busybox AS make\nRUN echo early\n\
                      RUN --mount=from=gate,target=/g for n in 1 2 3 4 5 6 7 8 9; do echo line-$n-$((n*7)); done; printf 'half\\033[2J\\rdone'; sleep 1000 & wait\n";
    let dir = folder(&host, "ctx", &[("Dockerfile", dockerfile)]);
    let context = format!("gate={}", gate.display());
    let screen = |shown: &str, rows, columns| {
        let mut parser = vt100::Parser::new(rows, columns, 0);
        parser.process(shown.as_bytes());
        parser.screen().contents()
    };
    let args = ["build", "--build-context", &context, dir.to_str().unwrap()];
    let mut terminal = host.terminal(args);
    let live = eventually("the step's last lines", || {
        let shown = screen(&terminal.shown(), 24, 80);
        (shown.contains("=> => # done") && shown.contains("=> => # line-9-63")).then_some(shown)
    });
    let lines: Vec<&str> = live.lines().collect();
    assert!(lines[0].starts_with("[+] Building ") && lines[0].contains('/'), "{live}");
    let tail: Vec<&&str> = lines.iter().filter(|line| line.starts_with(" => => #")).collect();
    assert_eq!(tail.len(), 6, "{live}");
    assert!(!live.contains("line-4-"), "{live}");
    assert!(
        lines.iter().any(|line| line.starts_with(" => [make 2/3] RUN echo early") && line.ends_with('s')),
        "{live}"
    );
    // Smaller: nothing is wider or higher than it.
    terminal.resize(8, 40);
    eventually("a smaller view", || {
        let bytes = terminal.shown();
        let frame = bytes.rsplit_once("[+] Building").map(|(_, frame)| frame.to_owned())?;
        let small = frame.contains("line-9-63") && !frame.contains("early");
        small.then_some(())
    });
    // Ctrl-C: the step ends, the client says so.
    terminal.send([3]);
    assert_eq!(terminal.wait().code(), Some(130), "{}", terminal.shown());
    let sleeps = || host.sandbox().processes().iter().any(|(_, line)| line.ends_with("sleep 1000"));
    eventually("the step ends", || (!sleeps()).then_some(()));

    // All over: the whole list, what was there before is marked, colours only where they are wanted.
    fs::write(dir.join("Dockerfile"), "FROM busybox AS make\nRUN echo early\nRUN echo late; exit 3\n")
        .unwrap();
    let mut terminal = host.terminal(["build", dir.to_str().unwrap()]);
    assert_eq!(terminal.wait().code(), Some(3), "{}", terminal.shown());
    let bytes = terminal.shown();
    let shown = screen(&bytes, 50, 80);
    for part in [
        "ERROR",
        "=> CACHED [make 2/3] RUN echo early",
        "=> ERROR [make 3/3] RUN echo late",
        " > [make 3/3]",
        "late",
        "   3 | >>> RUN echo late; exit 3",
    ] {
        assert!(shown.contains(part), "{part:?} is missing: {shown}");
    }
    assert!(!shown.contains("# late"), "{shown}");
    assert!(bytes.contains("\x1b[31m"), "{bytes:?}");
    let on_terminal = |name: &str, value: &str| {
        let mut command = host.cli(["build", dir.to_str().unwrap()]).into_command();
        command.env("TERM", "xterm").env(name, value);
        Terminal::spawn(command)
    };
    let mut dumb = on_terminal("NO_COLOR", "1");
    assert_eq!(dumb.wait().code(), Some(3));
    assert!(dumb.shown().contains("[+] Building") && !dumb.shown().contains("\x1b[3"), "{:?}", dumb.shown());
    // Lines where they are asked for, or where there is no terminal.
    let mut plain = on_terminal("BUILDKIT_PROGRESS", "plain");
    assert_eq!(plain.wait().code(), Some(3));
    assert!(
        plain.shown().contains("Step 3/3 : RUN echo late") && !plain.shown().contains("[+]"),
        "{}",
        plain.shown()
    );
    let piped = build(&host, &dir, &["--progress", "tty"]);
    assert!(piped.stdout.contains("Step 3/3") && !piped.stdout.contains("[+]"), "{piped}");
    refused(&host, &dir, &["--progress", "fancy"], "auto, tty, plain, rawjson and quiet are known");
}

#[test]
fn an_interrupted_build_leaves_nothing() {
    let host = Host::new(Client::Brig);
    let dir = folder(&host, "ctx", &[("Dockerfile", "FROM busybox\nRUN sleep 1235\n")]);
    let at = |name: &str| host.dir().join(name).to_str().unwrap().to_owned();
    let (tar, out) = (at("f.tar"), at("o"));
    let output = format!("type=tar,dest={tar}");
    let sleeps = || host.sandbox().processes().iter().any(|(_, line)| line.ends_with("sleep 1235"));
    let before = host.cli(["images", "-aq"]).ok();
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let mut client = host.cli(["build", "-o", &output, "-o", &out, dir.to_str().unwrap()]).spawn();
        eventually("the step runs", || sleeps().then_some(()));
        let pid = client.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        assert_eq!(client.wait().unwrap().code(), Some(code));
        eventually("the step ends", || (!sleeps()).then_some(()));
    }
    let left: Vec<_> = fs::read_dir(host.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(
        !left.iter().any(|name| name == "f.tar" || name.to_string_lossy().starts_with(".tmp")),
        "{left:?}"
    );

    // While the result is sent: to a pipe that nobody reads.
    fs::write(dir.join("Dockerfile"), "FROM busybox\nRUN head -c 3000000 /dev/urandom > /f\n").unwrap();
    let pipe = at("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = fs::File::options().read(true).write(true).open(&pipe).unwrap();
    for kind in ["oci", "tar"] {
        let output = format!("type={kind},dest={pipe}");
        let mut client = host.cli(["build", "-o", &output, dir.to_str().unwrap()]).spawn();
        eventually("the archive is being sent", || (pending(&reader) > 0).then_some(()));
        client.kill().unwrap();
        client.wait().unwrap();
        eventually("no image stays", || (host.cli(["images", "-aq"]).ok() == before).then_some(()));
        drain(&reader);
    }
    // One that waits for its reader as well is ended by a second signal at once.
    let mut client =
        host.cli(["build", "-o", &format!("type=tar,dest={pipe}"), dir.to_str().unwrap()]).spawn();
    eventually("the archive is being sent", || (pending(&reader) > 60_000).then_some(()));
    let interrupt = || {
        let pid = client.id().to_string();
        assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    };
    interrupt();
    std::thread::sleep(std::time::Duration::from_millis(500));
    interrupt();
    let ended = eventually("the client ends", || client.try_wait().unwrap());
    assert_eq!(ended.code(), Some(130));
    drain(&reader);
    assert_eq!(host.cli(["ps", "-aq"]).ok(), "");
    // The cache is right: what was made is used, and whole.
    let again = built(&host, &dir, &["-o", &out]).stdout;
    assert!(again.contains("Using cache"), "{again}");
    assert_eq!(fs::metadata(host.dir().join("o/f")).unwrap().len(), 3_000_000);
}

/// Bytes that wait in a pipe.
fn pending(pipe: &fs::File) -> u64 {
    rustix::io::ioctl_fionread(pipe).unwrap()
}

fn drain(mut pipe: &fs::File) {
    while pending(pipe) > 0 {
        let mut buffer = vec![0; 1 << 16];
        std::io::Read::read(&mut pipe, &mut buffer).unwrap();
    }
}

#[test]
fn files_have_what_attests_to_them_and_metadata_tells_of_the_build() {
    let host = Host::new(Client::Brig);
    let dockerfile = "FROM scratch\nARG TARGETARCH\nCOPY f status /d/\nCOPY <<EOT /arch\n$TARGETARCH\nEOT\n";
    let dir = folder(&host, "ctx", &[("Dockerfile", dockerfile), ("f", "file\n"), ("status", "x")]);
    let at = |name: &str| host.dir().join(name).to_str().unwrap().to_owned();
    let read = |path: &str| -> Value {
        serde_json::from_slice(&fs::read(host.dir().join(path)).unwrap_or_else(|e| panic!("{path}: {e}")))
            .unwrap()
    };
    let (out, metadata, iid) = (at("out"), at("metadata"), at("iid"));
    let asked = ["--provenance", "mode=max", "--sbom=true"];
    let args = [&asked[..], &["-o", &out, "--metadata-file", &metadata, "--iidfile", &iid]].concat();
    built(&host, &dir, &args);
    for (file, kind) in [
        ("provenance.json", "https://slsa.dev/provenance/v1"),
        ("sbom.spdx.json", "https://spdx.dev/Document"),
    ] {
        let statement = read(&format!("out/{file}"));
        assert_eq!(
            (&statement["predicateType"], &statement["_type"]),
            (&json!(kind), &json!("https://in-toto.io/Statement/v1"))
        );
        let subjects: Vec<&str> =
            statement["subject"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
        assert_eq!(subjects, ["arch", "d/f", "d/status"]);
        let sum = Command::new("sha256sum").arg(host.dir().join("out/d/f")).output().unwrap().stdout;
        assert!(
            String::from_utf8(sum)
                .unwrap()
                .starts_with(statement["subject"][1]["digest"]["sha256"].as_str().unwrap())
        );
    }
    let said = read("metadata");
    assert!(said["buildx.build.ref"].as_str().unwrap().starts_with("brigantine/brigantine/"), "{said}");
    assert_eq!(
        said["buildx.build.provenance"]["buildDefinition"]["externalParameters"]["request"]["frontend"],
        "dockerfile.v0"
    );
    assert!(said["containerimage.digest"].is_null(), "{said}");
    assert_eq!(fs::read_to_string(&iid).unwrap(), "");

    // One folder for each platform, or names of their own.
    let both = [&asked[..], &["--platform", "linux/amd64,linux/arm64"]].concat();
    let split = at("split");
    built(
        &host,
        &dir,
        &[&both[..], &["-o", &format!("type=local,dest={split},attestation-prefix=x-")]].concat(),
    );
    for arch in ["amd64", "arm64"] {
        assert_eq!(
            fs::read_to_string(host.dir().join(format!("split/linux_{arch}/arch"))).unwrap(),
            format!("{arch}\n")
        );
        assert_eq!(
            read(&format!("split/linux_{arch}/x-sbom.spdx.json"))["predicateType"],
            "https://spdx.dev/Document"
        );
    }
    let archive = at("files.tar");
    built(
        &host,
        &dir,
        &[&both[..], &["-o", &format!("type=tar,dest={archive},platform-split=false")]].concat(),
    );
    let listed = Command::new("tar").args(["-tf", &archive]).output().unwrap();
    assert!(listed.status.success());
    let names = String::from_utf8(listed.stdout).unwrap();
    for name in ["provenance.linux_amd64.json", "sbom.linux_arm64.spdx.json", "d/f"] {
        assert!(names.lines().any(|line| line == name), "{name}: {names}");
    }
    // Without being asked nothing is attested.
    built(&host, &dir, &["-o", &at("bare")]);
    assert!(!host.dir().join("bare/provenance.json").exists());

    // An image's keys.
    let oci = format!("type=oci,dest={}", at("image.tar"));
    let args = [&asked[..], &["-o", &oci, "--metadata-file", &metadata, "--iidfile", &iid]].concat();
    let before = host.cli(["images", "-aq"]).ok();
    built(&host, &dir, &args);
    eventually("the archive's image is not the engine's", || {
        (host.cli(["images", "-aq"]).ok() == before).then_some(())
    });
    let said = read("metadata");
    assert_eq!(fs::read_to_string(&iid).unwrap(), said["containerimage.config.digest"].as_str().unwrap());
    assert_eq!(said["containerimage.descriptor"]["digest"], said["containerimage.digest"]);
    assert_eq!(said["containerimage.descriptor"]["mediaType"], "application/vnd.oci.image.index.v1+json");
    let inspected = Command::new("skopeo")
        .args(["inspect", "--raw", &format!("oci-archive:{}", at("image.tar"))])
        .output()
        .unwrap();
    let index: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    assert_eq!(index["manifests"][1]["annotations"]["vnd.docker.reference.type"], "attestation-manifest");
    built(&host, &dir, &["-o", "type=cacheonly", "--metadata-file", &metadata]);
    assert!(read("metadata")["containerimage.digest"].is_null());
    assert_eq!(host.cli(["images", "-aq"]).ok(), before);
}

#[test]
fn arguments_that_the_builder_itself_reads() {
    let host = Host::new(Client::Brig);
    let dockerfile = "FROM busybox\nRUN --mount=type=cache,target=/c hostname; ls /c; echo x > /c/kept\n";
    let dir = folder(&host, "ctx", &[("Dockerfile", dockerfile)]);
    let with = |arg: &str| built(&host, &dir, &["--no-cache", "-t", "a:1", "--build-arg", arg]).stdout;
    let said = |text: &str, word: &str| text.lines().any(|line| line == word);
    let first = with("BUILDKIT_SANDBOX_HOSTNAME=box");
    assert!(said(&first, "box") && !said(&first, "kept"), "{first}");
    let same = with("BUILDKIT_BUILD_NAME=x");
    assert!(said(&same, "buildkitsandbox") && said(&same, "kept"), "{same}");
    let other = with("BUILDKIT_CACHE_MOUNT_NS=other");
    assert!(!said(&other, "kept"), "{other}");
    let kind = || host.engine.get("/v1.48/images/a:1/json")["Descriptor"]["mediaType"].clone();
    assert_eq!(kind(), "application/vnd.oci.image.manifest.v1+json");
    with("BUILDKIT_MULTI_PLATFORM=1");
    assert_eq!(kind(), "application/vnd.oci.image.index.v1+json");
}
