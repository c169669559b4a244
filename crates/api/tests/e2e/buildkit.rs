//! Building with docker's own BuildKit client (docker 20.10, `DOCKER_BUILDKIT=1`): a session lends files, secrets,
//! agents and a place for results. And clients that do not keep to the rules.

mod cancel;
mod hostile;
mod peer;
mod remote;

use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use brigantine_testkit::{Client, Engine, Invocation, Output, eventually, fixtures};
use serde_json::Value;

/// A folder with these files.
fn context(engine: &Engine, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let dir = engine.dir().join(name);
    for (path, text) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn build(engine: &Engine, dir: &Path, args: &[&str]) -> Invocation {
    let dir = dir.to_str().unwrap();
    engine.buildkit(["build", "--progress", "plain"].iter().chain(args).chain(&[dir]))
}

fn text(output: &Output) -> String {
    format!("{}{}", output.stdout, output.stderr)
}

/// What a build that succeeds shows.
#[track_caller]
fn shown(build: Invocation) -> String {
    build.exits(0).stderr
}

/// How many bytes of the context the last of these lines says were sent: `transferring context: 12.34kB`.
fn sent(shown: &str) -> &str {
    shown.rsplit("transferring context: ").next().unwrap().split_whitespace().next().unwrap()
}

const STAGES: &str = r#"ARG BASE=busybox
FROM ${BASE} AS build
ARG WHO=world
WORKDIR /src
COPY a.txt sub/ ./
RUN echo "hello $WHO" > out.txt && cat a.txt s.txt >> out.txt && echo said && echo louder >&2
RUN --mount=type=bind,source=sub,target=/b --mount=type=cache,target=/c cat /b/s.txt && echo x >> /c/log
FROM busybox AS never
RUN exit 1
FROM busybox
COPY --from=build --chown=5:6 /src/out.txt /out/
COPY <<EOT /etc/motd
hi
EOT
LABEL a=b
CMD ["cat", "/out/out.txt"]
"#;

#[test]
fn stages_are_shown_as_they_run_and_only_what_changed_is_sent() {
    let engine = Engine::with_busybox();
    let files =
        [("Dockerfile", STAGES), ("a.txt", "A\n"), ("sub/s.txt", "S\n"), ("not/used", &"x".repeat(100_000))];
    let dir = context(&engine, "ctx", &files);
    let args = ["-t", "x:1", "--build-arg", "WHO=me", "--label", "l=m"];
    let first = shown(build(&engine, &dir, &args));
    for line in [
        "[internal] load build definition from Dockerfile",
        "[internal] load .dockerignore",
        "[internal] load metadata for docker.io/library/busybox:latest",
        "[internal] load build context",
        "COPY a.txt sub/ ./",
        "said\n",
        "louder\n",
        "exporting to image",
        "writing image sha256:",
        "naming to x:1",
    ] {
        assert!(first.contains(line), "{line:?} is missing in {first}");
    }
    assert!(!first.contains("CACHED") && !first.contains("exit 1"), "{first}");
    assert!(first.lines().any(|line| line.ends_with("DONE 0.0s")), "{first}");
    assert_eq!(engine.docker(["run", "--rm", "x:1"]).ok(), "hello me\nA\nS");
    let image: Value = serde_json::from_str(&engine.docker(["inspect", "x:1"]).ok()).unwrap();
    assert_eq!(image[0]["Config"]["Labels"], serde_json::json!({"a": "b", "l": "m"}));

    let again = shown(build(&engine, &dir, &args));
    assert_eq!(again.matches("CACHED").count(), 6, "{again}");
    let id = || engine.docker(["inspect", "-f", "{{.Id}}", "x:1"]).ok();
    assert_eq!(id(), image[0]["Id"].as_str().unwrap());
    fs::write(dir.join("a.txt"), "B\n").unwrap();
    fs::remove_file(dir.join("sub/s.txt")).unwrap();
    fs::write(dir.join("sub/s.txt"), "T\n").unwrap();
    let changed = shown(build(&engine, &dir, &args));
    assert!(changed.contains("said\n"), "{changed}");
    assert_eq!(engine.docker(["run", "--rm", "x:1"]).ok(), "hello me\nB\nT");
    let none = build(&engine, &dir, &["--no-cache", "-q"]).ok();
    assert!(none.starts_with("sha256:") && none.len() == 71, "{none}");
}

#[test]
fn a_context_is_kept_and_follows_the_folder() {
    let engine = Engine::with_busybox();
    let list = "FROM busybox\nCOPY . /c\nRUN cd /c && find . | sort && ls -l ln && stat -c %a:%s:%h:%Y x/f hard d && cat x/f\n";
    let dir = context(
        &engine,
        "ctx",
        &[
            ("Dockerfile", list),
            ("x/f", "one"),
            ("big", &"b".repeat(300_000)),
            ("gone/a/b", "1"),
            ("out.o", ""),
        ],
    );
    fs::write(dir.join(".dockerignore"), "*.o\n!keep.o\n").unwrap();
    fs::write(dir.join("keep.o"), "").unwrap();
    symlink("x/f", dir.join("ln")).unwrap();
    fs::hard_link(dir.join("x/f"), dir.join("hard")).unwrap();
    fs::create_dir(dir.join("d")).unwrap();
    fs::set_permissions(dir.join("d"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::set_permissions(dir.join("x/f"), fs::Permissions::from_mode(0o751)).unwrap();
    let first = shown(build(&engine, &dir, &[]));
    assert!(first.contains("./gone/a/b\n") && first.contains("./keep.o\n"), "{first}");
    assert!(!first.contains("./out.o"), "{first}");
    assert!(first.contains("751:3:"), "{first}");
    assert!(first.contains("1777:"), "{first}");
    assert!(first.contains("ln -> x/f"), "{first}");
    assert!(sent(&first).ends_with("kB") && sent(&first).starts_with("300"), "{first}");

    // A directory becomes a file, a file a link, a link a directory; one is changed, one is gone.
    fs::remove_dir_all(dir.join("gone")).unwrap();
    fs::write(dir.join("gone"), "a file").unwrap();
    fs::remove_file(dir.join("hard")).unwrap();
    symlink("gone", dir.join("hard")).unwrap();
    fs::remove_file(dir.join("ln")).unwrap();
    fs::create_dir_all(dir.join("ln/deep/er")).unwrap();
    fs::write(dir.join("ln/deep/er/f"), "deep").unwrap();
    fs::write(dir.join("x/f"), "two!").unwrap();
    let second = shown(build(&engine, &dir, &[]));
    assert!(second.contains("./ln/deep/er/f\n") && second.contains("two!"), "{second}");
    assert!(!second.contains("./gone/a"), "{second}");
    assert!(!sent(&second).ends_with("kB"), "the large file was sent again: {second}");
    let count = engine.docker(["system", "df", "--format", "{{.Type}} {{.TotalCount}}"]).ok();
    assert!(count.contains("Build Cache"), "{count}");
    engine.docker(["builder", "prune", "-af"]).ok();
    assert_eq!(fs::read_dir(engine.data_root().join("build/contexts")).unwrap().count(), 0);
    assert!(sent(&shown(build(&engine, &dir, &["--no-cache"]))).ends_with("kB"));
}

#[test]
fn secrets_agents_networks_and_hosts_reach_the_steps_and_nothing_else() {
    let engine = Engine::with_busybox();
    engine.load(&fixtures::agent());
    let dockerfile = "FROM agent\n\
        RUN --mount=type=secret,id=s,required cat /run/secrets/s | tr a-z A-Z\n\
        RUN --mount=type=secret,id=none true\n\
        RUN --mount=type=ssh ssh-add -l && ls -l $SSH_AUTH_SOCK\n\
        RUN --mount=type=ssh,id=other,required,mode=0666 USER=x ssh-add -L && ssh-add -L\n\
        RUN grep added /etc/hosts; ip link | grep -c eth0 || echo alone\n";
    let dir = context(&engine, "ctx", &[("Dockerfile", dockerfile)]);
    let secret = engine.dir().join("secret");
    fs::write(&secret, "whispered").unwrap();
    let agent = Agent::start(&engine);
    let args = [
        "-t".to_owned(),
        "x".to_owned(),
        format!("--secret=id=s,src={}", secret.display()),
        format!("--ssh=default={}", agent.socket.display()),
        format!("--ssh=other={}", agent.socket.display()),
        "--network=none".to_owned(),
        "--add-host=added:10.9.8.7".to_owned(),
    ];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let shown = shown(build(&engine, &dir, &args));
    assert!(shown.contains("WHISPERED"), "{shown}");
    assert_eq!(shown.matches("a-test-key").count(), 3, "{shown}");
    assert!(shown.contains("10.9.8.7") && shown.contains("alone"), "{shown}");
    let kept = engine.dir().join("kept.tar");
    engine.docker(["save", "-o", kept.to_str().unwrap(), "x"]).ok();
    let kept = fs::read(kept).unwrap();
    assert!(!kept.windows(9).any(|word| word == b"whispered"));

    // brig lends its agent in the same way.
    let dir = context(&engine, "brig", &[("Dockerfile", "FROM agent\nRUN --mount=type=ssh ssh-add -l\n")]);
    let brig = |args: &[&str]| {
        engine
            .client(Client::Brig, ["build", "--no-cache"].iter().chain(args).chain(&[dir.to_str().unwrap()]))
    };
    let built = brig(&["--ssh", "default"]).env("SSH_AUTH_SOCK", agent.socket.to_str().unwrap()).ok();
    assert!(built.contains("a-test-key"), "{built}");
    let named = format!("default={}", agent.socket.display());
    assert!(brig(&["--ssh", &named]).ok().contains("a-test-key"));
    brig(&["--ssh", "default"]).env("SSH_AUTH_SOCK", "").exits(1).expect_stderr("no ssh agent is running");
    brig(&["--ssh", "default=/etc/passwd"]).exits(1).expect_stderr("is not an agent's socket");
    let required = "FROM agent\nRUN --mount=type=ssh,required ssh-add -l\n";
    fs::write(dir.join("Dockerfile"), required).unwrap();
    brig(&[]).exits(1).expect_stderr("ssh agent default: not found: start the build with --ssh default");
}

/// A real agent with one key.
struct Agent {
    socket: PathBuf,
    child: std::process::Child,
}

impl Agent {
    fn start(engine: &Engine) -> Self {
        let (socket, key) = (engine.dir().join("agent.sock"), engine.dir().join("key"));
        let child = Command::new("ssh-agent")
            .args(["-D", "-a"])
            .arg(&socket)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "a-test-key", "-f"])
            .arg(&key)
            .status()
            .unwrap();
        assert!(made.success());
        eventually("the agent listens", || {
            fs::metadata(&socket).is_ok_and(|metadata| metadata.file_type().is_socket()).then_some(())
        });
        let added =
            Command::new("ssh-add").arg("-q").arg(&key).env("SSH_AUTH_SOCK", &socket).status().unwrap();
        assert!(added.success());
        Self { socket, child }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn contexts_and_dockerfiles_come_from_anywhere_and_results_go_to_the_client() {
    let engine = Engine::with_busybox();
    let dockerfile = "FROM busybox AS build\nCOPY f /o/f\nRUN chmod 700 /o/f && ln -s f /o/l && ln /o/f /o/h && mkdir -p /o/deep/er && head -c 200000 /dev/zero > /o/deep/big\n\
                      FROM scratch AS last\nCOPY --from=build /o /o\n";
    let dir = context(
        &engine,
        "ctx",
        &[("Dockerfile", dockerfile), ("f", "made\n"), ("other/My.file", dockerfile)],
    );
    let at = |name: &str| engine.dir().join(name).to_str().unwrap().to_owned();

    // A folder, also over what is there; an archive; standard output.
    let out = at("out");
    fs::create_dir_all(engine.dir().join("out/o")).unwrap();
    fs::write(engine.dir().join("out/o/other"), "stays").unwrap();
    shown(build(&engine, &dir, &["-o", &out]));
    assert_eq!(fs::read_to_string(engine.dir().join("out/o/l")).unwrap(), "made\n");
    assert_eq!(fs::read_to_string(engine.dir().join("out/o/other")).unwrap(), "stays");
    let metadata = fs::metadata(engine.dir().join("out/o/f")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o700);
    assert_eq!(std::os::unix::fs::MetadataExt::nlink(&metadata), 2);
    assert_eq!(fs::metadata(engine.dir().join("out/o/deep/big")).unwrap().len(), 200_000);
    let archive = at("files.tar");
    shown(build(&engine, &dir, &["--output", &format!("type=tar,dest={archive}")]));
    assert!(tar_names(&archive).iter().any(|name| name == "o/deep/big"), "{:?}", tar_names(&archive));
    let piped = build(&engine, &dir, &["-o", "-"]).exits(0);
    assert!(piped.stdout.contains("o/deep/er"), "{}", piped.stderr);
    assert_eq!(engine.docker(["images", "-aq"]).ok().lines().count(), 1, "no image was asked for");

    // The Dockerfile of another name, from standard input; the context as an archive, or none.
    let other = dir.join("other/My.file");
    shown(build(&engine, &dir, &["-t", "a", "-f", other.to_str().unwrap()]));
    let iid = at("iid");
    let stdin = ["-t", "b", "-f", "-", "--iidfile", &iid, "--target", "build"];
    shown(build(&engine, &dir, &stdin).stdin(dockerfile));
    let id = |name: &str| engine.docker(["inspect", "-f", "{{.Id}}", name]).ok();
    assert_eq!(fs::read_to_string(&iid).unwrap(), id("b"));
    let tar =
        Command::new("tar").args(["-C", dir.to_str().unwrap(), "-czf", "-", "."]).output().unwrap().stdout;
    let piped = engine.buildkit(["build", "--progress", "plain", "-t", "c", "-"]);
    shown(piped.stdin(tar));
    assert_eq!(id("c"), id("a"));
    let piped = engine.buildkit(["build", "--progress", "plain", "-t", "d", "-"]);
    shown(piped.stdin("FROM busybox\nRUN echo alone > /f\n"));
    assert_eq!(engine.docker(["run", "--rm", "d", "cat", "/f"]).ok(), "alone");

    // From a repository.
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        command.current_dir(&dir).env("HOME", engine.dir()).args([
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@t",
        ]);
        assert!(command.args(args).output().unwrap().status.success(), "git {args:?}");
    };
    git(&["init", "-q", "-b", "main", "."]);
    git(&["add", "."]);
    git(&["commit", "-q", "-m", "one"]);
    let (serve, port) = serve_git(&engine, &dir);
    let url = format!("git://127.0.0.1:{port}/ctx/.git#main");
    shown(engine.buildkit(["build", "--progress", "plain", "-t", "e", &url]));
    drop(serve);
    assert_eq!(engine.docker(["inspect", "-f", "{{.RootFS.Layers}}", "e"]).ok().matches("sha256").count(), 1);
}

/// A process that ends with this.
struct Ends(std::process::Child);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// `git daemon` over a folder's parent, in the engine's network.
fn serve_git(engine: &Engine, dir: &Path) -> (Ends, u16) {
    const PORT: u16 = 9418;
    let parent = dir.parent().unwrap();
    let child = engine
        .sandbox()
        .command("git")
        .args(["daemon", "--reuseaddr", "--export-all", "--listen=127.0.0.1"])
        .arg(format!("--port={PORT}"))
        .arg(format!("--base-path={}", parent.display()))
        .env("HOME", engine.dir())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let ends = Ends(child);
    eventually("git serves", || {
        let url = format!("git://127.0.0.1:{PORT}/{}/.git", dir.file_name().unwrap().to_str().unwrap());
        engine
            .sandbox()
            .command("git")
            .args(["ls-remote", &url])
            .output()
            .is_ok_and(|out| out.status.success())
            .then_some(())
    });
    (ends, PORT)
}

/// The names in an archive.
fn tar_names(archive: &str) -> Vec<String> {
    let listed = Command::new("tar").args(["-tf", archive]).output().unwrap();
    assert!(listed.status.success(), "{archive}: {}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout).unwrap();
    names.lines().map(|name| name.trim_start_matches("./").to_owned()).collect()
}

#[test]
fn what_is_wrong_is_said_with_its_place_and_leaves_nothing() {
    let engine = Engine::with_busybox();
    let fails = |name: &str, dockerfile: &str, args: &[&str], words: &[&str]| {
        let dir = context(&engine, name, &[("Dockerfile", dockerfile)]);
        let output = build(&engine, &dir, args).run();
        assert_eq!(output.code, 1, "{}", text(&output));
        for words in words {
            assert!(text(&output).contains(words), "{name}: {words:?} is missing in {}", text(&output));
        }
    };
    engine.leaving_nothing(|| {
        fails(
            "word",
            "FROM busybox\nRUM x\n",
            &[],
            &["unknown instruction: RUM (did you mean RUN?)", ">>> RUM x"],
        );
        fails(
            "exit",
            "FROM busybox\nRUN echo why; exit 7\n",
            &[],
            &[
                "why\n",
                "process \"/bin/sh -c echo why; exit 7\" did not complete successfully: exit code: 7",
                ">>> RUN echo why; exit 7",
                "failed to solve: ",
            ],
        );
        fails(
            "file",
            "FROM busybox\nCOPY nothing /\n",
            &[],
            &["\"/nothing\": not found", ">>> COPY nothing /"],
        );
        fails("stage", "FROM busybox\n", &["--target", "z"], &["target stage \"z\" could not be found"]);
        fails("image", "FROM localhost:1/none\n", &[], &["localhost:1/none"]);
        let secret = "FROM busybox\nRUN --mount=type=secret,id=s,required cat /run/secrets/s\n";
        fails("secret", secret, &[], &["secret s: not found"]);
        let ssh = "FROM busybox\nRUN --mount=type=ssh,required true\n";
        fails("ssh", ssh, &[], &["ssh agent default: not found"]);
        let dir = context(&engine, "none", &[("x", "")]);
        build(&engine, &dir, &[]).exits(1);
        build(&engine, &dir, &["-o", "type=oci,dest=x"])
            .exits(1)
            .expect_stderr("output type oci is not built");
        engine.docker(["builder", "prune", "-af"]).ok();
        engine.docker(["image", "prune", "-f"]).ok();
    });
}

/// A client without a plugin for BuildKit says so itself: nothing reaches the engine.
#[test]
fn later_docker_commands_want_their_plugin() {
    let engine = Engine::with_busybox();
    let dir = context(&engine, "ctx", &[("Dockerfile", "FROM busybox\n")]);
    let output = engine.docker(["build", dir.to_str().unwrap()]).env("DOCKER_BUILDKIT", "1").run();
    if output.code != 0 {
        assert!(
            output.stderr.contains("BuildKit is enabled but the buildx component is missing"),
            "{output}"
        );
    }
    engine.docker(["build", dir.to_str().unwrap()]).env("DOCKER_BUILDKIT", "0").ok();
}

#[test]
fn a_client_that_goes_away_ends_its_build() {
    let engine = Engine::with_busybox();
    let dir = context(&engine, "ctx", &[("Dockerfile", "FROM busybox\nRUN echo begun && sleep 1000\n")]);
    engine.leaving_nothing(|| {
        for signal in ["-KILL", "-INT"] {
            let mut client = build(&engine, &dir, &[]).spawn();
            let mut shown = BufReader::new(client.stderr.take().unwrap());
            let mut line = String::new();
            while !line.ends_with("begun\n") || line.contains("RUN") {
                line.clear();
                assert_ne!(std::io::BufRead::read_line(&mut shown, &mut line).unwrap(), 0);
            }
            let sent = Command::new("kill").args([signal, &client.id().to_string()]).status().unwrap();
            assert!(sent.success());
            client.wait().unwrap();
            eventually("the step is ended", || {
                (fs::read_dir(engine.exec_root().join("b")).unwrap().count() == 0).then_some(())
            });
        }
        engine.docker(["builder", "prune", "-af"]).ok();
    });
}

/// Opens a session by hand, and says what the engine says after its head.
fn open(engine: &Engine, id: &str, extra: &str) -> (u16, BufReader<UnixStream>) {
    let stream = engine.connect();
    let method = "X-Docker-Expose-Session-Grpc-Method: /moby.filesync.v1.FileSync/DiffCopy";
    let head = format!(
        "POST /session HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nX-Docker-Expose-Session-Uuid: {id}\r\n{method}\r\n{extra}\r\n"
    );
    (&stream).write_all(head.as_bytes()).unwrap();
    let mut reader = BufReader::new(stream);
    let response = brigantine_testkit::http::read_head(&mut reader);
    (response.status, reader)
}

#[test]
fn sessions_that_are_none_are_refused_and_let_go() {
    let engine = Engine::with_busybox();
    let refused = |path: &str, status: u16, words: &str| {
        let answer = engine.post_bytes(path, "application/x-tar", b"");
        assert_eq!(answer.status, status, "{path}: {}", answer.text());
        assert!(answer.text().contains(words), "{path}: {}", answer.text());
    };
    engine.leaving_nothing(|| {
        refused(
            "/build?version=2&remote=client-session&session=nobody",
            404,
            "no session \\\"nobody\\\" is open",
        );
        refused("/build?version=2&remote=client-session", 400, "needs a session");
        refused("/build?version=2&remote=upload-request&buildid=b", 400, "was not sent");
        refused("/build?version=2&buildid=upload-request:b", 404, "asks for a context");
        refused("/build?version=3", 400, "1 and 2 are known");
        refused("/build?version=2&outputs=%5B%7B%22Type%22:%22local%22%7D%5D", 400, "session");
        refused("/session", 400, "Upgrade: h2c");
        // The id is missing; too long; open already.
        assert_eq!(open(&engine, "", "").0, 400);
        assert_eq!(open(&engine, &"x".repeat(300), "").0, 400);
        let (status, mut first) = open(&engine, "one", "");
        assert_eq!(status, 101);
        assert_eq!(open(&engine, "one", "").0, 409);
        // The engine speaks HTTP/2 as a client does.
        let mut preface = [0; 24];
        first.read_exact(&mut preface).unwrap();
        assert_eq!(&preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        drop(first);
        let mut again = None;
        eventually("the place is free again", || {
            let (status, stream) = open(&engine, "one", "");
            again = Some(stream);
            (status == 101).then_some(())
        });
        // What is no HTTP/2 ends the session, and with it the build that waits for an answer.
        let stream = again.unwrap().into_inner();
        let answer = std::thread::scope(|scope| {
            let build = scope.spawn(|| {
                engine.post_bytes(
                    "/build?version=2&remote=client-session&session=one",
                    "application/x-tar",
                    b"",
                )
            });
            (&stream).write_all(&[b'x'; 4096]).unwrap_or_default();
            build.join().unwrap()
        });
        assert!(
            answer.text().contains("the client's session has ended")
                || answer.text().contains("the build was cancelled")
                || answer.text().contains("is open"),
            "{}",
            answer.text()
        );
    });
}
