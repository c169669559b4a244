//! Programs of others that are told to use `brig-runtime`: Debian's podman, dockerd and containerd run a real image with
//! it. Each is in a sandbox of its own, with its own daemon, storage and cgroup.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use brigantine_testkit::engine::executable;
use brigantine_testkit::{Sandbox, fixtures, until};

/// Podman's defaults are above what root may have on some machines.
const PODMAN_LIMITS: [&str; 4] = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"];

struct User {
    sandbox: Sandbox,
    /// The client with its options, up to the verb.
    words: Vec<String>,
}

impl User {
    fn path(&self, name: &str) -> String {
        self.sandbox.dir().join(name).display().to_string()
    }

    fn run(&self, words: &[&str]) -> Output {
        let mut command = self.sandbox.command(&self.words[0]);
        command.args(&self.words[1..]).args(words).stdin(Stdio::null());
        if self.words[0] == "docker" {
            command.env("DOCKER_CONFIG", self.sandbox.dir());
        }
        command.output().unwrap()
    }

    /// What a command that must succeed says.
    #[track_caller]
    fn good(&self, words: &[&str]) -> String {
        let output = self.run(words);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        assert!(output.status.success(), "{words:?}: {}\n{out}{err}{log}", output.status);
        out
    }

    /// What a command that must fail says, and how it ends.
    #[track_caller]
    fn bad(&self, words: &[&str]) -> (i32, String) {
        let output = self.run(words);
        assert!(!output.status.success(), "{words:?}: {}", text(&output.stdout));
        (output.status.code().unwrap_or(-1), text(&output.stderr))
    }

    /// Starts a daemon, and waits until the client's `probe` succeeds.
    #[track_caller]
    fn daemon(&self, program: &str, args: &[String], probe: &[&str]) {
        let log = File::create(self.path("log")).unwrap();
        let mut command = self.sandbox.command(program);
        command.args(args).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        // It ends with the sandbox.
        let mut child = command.spawn().unwrap();
        let up = until(std::time::Duration::from_mins(1), || {
            let ended = child.try_wait().is_ok_and(|status| status.is_some());
            (ended || self.run(probe).status.success()).then_some(!ended)
        });
        let said = fs::read_to_string(self.path("log")).unwrap_or_default();
        assert_eq!(up, Some(true), "{program} does not start: {said}");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn words(all: &[&str]) -> Vec<String> {
    all.iter().map(|&w| w.to_owned()).collect()
}

fn runtime() -> PathBuf {
    executable("brig-runtime")
}

/// What is the same for everyone whose command line is docker's.
fn dockers_way(user: &User, options: &[&str], image: &str) {
    let with = |verb: &[&'static str], rest: &[&str]| -> Vec<String> {
        let all = [verb, options, &["--network", "none"], rest].concat();
        words(&all)
    };
    let good = |all: Vec<String>| user.good(&all.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(good(with(&["run", "--rm"], &[image, "echo", "hello"])), "hello\n");
    good(with(&["run", "-d", "--name", "one"], &[image, "sleep", "1000"]));
    assert_eq!(user.good(&["exec", "one", "sh", "-c", "hostname >/tmp/h; id -u"]), "0\n");
    assert_eq!(user.bad(&["exec", "one", "sh", "-c", "exit 5"]).0, 5);
    assert!(user.good(&["top", "one"]).contains("sleep 1000"));
    user.good(&["pause", "one"]);
    assert!(user.good(&["ps", "-a"]).contains("Paused"));
    user.good(&["unpause", "one"]);
    user.good(&["kill", "one"]);
    let code = until(std::time::Duration::from_secs(20), || {
        let said = user.good(&["inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "one"]);
        said.starts_with("exited").then_some(said)
    });
    assert_eq!(code.as_deref().map(str::trim), Some("exited 137"));
    user.good(&["rm", "one"]);
    let script = "grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; exit 3";
    let confined = ["--memory", "64m", "--pids-limit", "20", "--cap-drop", "all"];
    let more = ["--security-opt", "no-new-privileges", "--name", "two", image, "sh", "-c", script];
    let (code, _) = user.bad(
        &with(&["run"], &[&confined[..], &more].concat()).iter().map(String::as_str).collect::<Vec<_>>(),
    );
    assert_eq!(code, 3);
    let logged = user.good(&["logs", "two"]);
    assert_eq!(logged, "CapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n");
    user.good(&["rm", "two"]);
    let missing = with(&["run", "--rm"], &[image, "/no/such"]);
    let (code, said) = user.bad(&missing.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(code, 127, "{said}");
    assert!(said.contains("/no/such: no such file or directory"), "{said}");
}

#[test]
fn podman_runs_an_image() {
    let sandbox = Sandbox::new().unwrap();
    let dir = sandbox.dir().display();
    let mut all = vec!["podman".to_owned()];
    for (flag, sub) in
        [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp"), ("--network-config-dir", "net")]
    {
        all.extend([flag.to_owned(), format!("{dir}/{sub}")]);
    }
    all.extend(["--runtime".to_owned(), runtime().display().to_string()]);
    all.extend(words(&[
        "--cgroup-manager",
        "cgroupfs",
        "--storage-driver",
        "overlay",
        "--events-backend",
        "file",
    ]));
    let parent = format!("--cgroup-parent=/{}", sandbox.cgroup());
    let user = User { sandbox, words: all };
    user.good(&["load", "-q", "-i", fixtures::busybox().to_str().unwrap()]);
    let options = [&PODMAN_LIMITS[..], &[&parent]].concat();
    dockers_way(&user, &options, "localhost/busybox:latest");
}

#[test]
fn dockerd_runs_an_image() {
    let sandbox = Sandbox::new().unwrap();
    let dir = sandbox.dir().display().to_string();
    let socket = format!("unix://{dir}/sock");
    let flags = [
        format!("--data-root={dir}/data"),
        format!("--exec-root={dir}/exec"),
        format!("--host={socket}"),
        format!("--pidfile={dir}/pid"),
        format!("--cgroup-parent=/{}", sandbox.cgroup()),
        format!("--add-runtime=brig={}", runtime().display()),
        "--storage-driver=overlay2".to_owned(),
        "--bridge=none".to_owned(),
        "--iptables=false".to_owned(),
    ];
    let user = User { sandbox, words: words(&["docker", "--host", &socket]) };
    user.daemon("dockerd", &flags, &["version"]);
    user.good(&["load", "-q", "-i", fixtures::busybox().to_str().unwrap()]);
    dockers_way(&user, &["--runtime", "brig"], "busybox:latest");
}

#[test]
fn containerd_runs_an_image() {
    let sandbox = Sandbox::new().unwrap();
    let dir = sandbox.dir().display().to_string();
    let group = format!("/{}/one", sandbox.cgroup());
    let config = format!(
        "version = 2\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{dir}/sock\"\n"
    );
    fs::write(format!("{dir}/config.toml"), config).unwrap();
    let user = User { sandbox, words: words(&["ctr", "--address", &format!("{dir}/sock")]) };
    user.daemon("containerd", &words(&["--config", &format!("{dir}/config.toml")]), &["version"]);
    user.good(&["images", "import", fixtures::busybox().to_str().unwrap()]);
    let (exe, state) = (runtime().display().to_string(), format!("{dir}/runc"));
    let ours = ["--runc-binary", &exe, "--runc-root", &state, "--cgroup", &group];
    let image = "docker.io/library/busybox:latest";
    let run =
        |options: &[&str], rest: &[&str]| user.good(&[&["run"], options, &ours[..], &[image], rest].concat());
    assert_eq!(run(&["--rm"], &["one", "echo", "hello"]), "hello\n");
    run(&["-d"], &["one", "sleep", "1000"]);
    let state = |wanted: &str| assert!(user.good(&["tasks", "ls"]).contains(wanted), "not {wanted}");
    state("RUNNING");
    assert_eq!(user.good(&["tasks", "exec", "--exec-id", "two", "one", "id", "-u"]), "0\n");
    assert!(user.good(&["tasks", "metrics", "one"]).contains("memory"));
    user.good(&["tasks", "pause", "one"]);
    state("PAUSED");
    user.good(&["tasks", "resume", "one"]);
    state("RUNNING");
    user.good(&["tasks", "kill", "--signal", "SIGKILL", "one"]);
    let stopped = until(std::time::Duration::from_secs(20), || {
        user.good(&["tasks", "ls"]).contains("STOPPED").then_some(())
    });
    assert!(stopped.is_some());
    user.run(&["tasks", "rm", "one"]);
    user.good(&["containers", "rm", "one"]);
    let missing = [&["run", "--rm"], &ours[..], &[image, "one", "/no/such"]].concat();
    let (_, said) = user.bad(&missing);
    assert!(said.contains("/no/such: no such file or directory"), "{said}");
    assert!(!Path::new(&format!("/sys/fs/cgroup/pids{group}")).exists());
}
