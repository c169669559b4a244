//! One engine for one test: its own root, socket, network and cgroup parent.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::{
    Client, Invocation, Response, Sandbox, Terminal, client, fixtures, http, leftovers, must,
    sandbox::only_child,
    wait::{eventually, until},
};

/// Whose engine it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    /// `brig daemon` with `brig-runtime`.
    Brig,
    /// Debian's dockerd, to prove a test on the peer first: `BRIG_TEST_ENGINE=dockerd`.
    Dockerd,
}

impl Flavor {
    fn from_environment() -> Self {
        match std::env::var("BRIG_TEST_ENGINE").as_deref() {
            Err(_) | Ok("" | "brig") => Self::Brig,
            Ok("dockerd") => Self::Dockerd,
            Ok(other) => panic!("BRIG_TEST_ENGINE={other}: neither brig nor dockerd"),
        }
    }
}

/// How an engine is to be started.
#[derive(Clone, Debug)]
#[must_use]
pub struct Builder {
    flavor: Flavor,
    flags: Vec<String>,
    environment: Vec<(String, String)>,
    busybox: bool,
    /// Files of the engine's own `/etc`: name, text.
    etc: Vec<(String, String)>,
}

/// A running engine and everything that belongs to it; all of it is gone when this is dropped.
#[derive(Debug)]
pub struct Engine {
    flavor: Flavor,
    flags: Vec<String>,
    environment: Vec<(String, String)>,
    /// `nsenter`, whose only child is the daemon; `None` while it is killed.
    daemon: Option<Child>,
    baseline: Option<leftovers::Snapshot>,
    // Last: dropped after the daemon's handle.
    sandbox: Sandbox,
}

impl Builder {
    /// One more flag for the daemon.
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// A variable of the daemon's environment.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// A file that the engine, and nobody outside its sandbox, sees in `/etc`.
    pub fn etc(mut self, name: impl Into<String>, text: impl Into<String>) -> Self {
        self.etc.push((name.into(), text.into()));
        self
    }

    /// Whose engine; by default what `$BRIG_TEST_ENGINE` says, else ours.
    pub fn flavor(mut self, flavor: Flavor) -> Self {
        self.flavor = flavor;
        self
    }

    /// Whether it will be Docker's.
    pub fn is_peer(&self) -> bool {
        self.flavor != Flavor::Brig
    }

    /// Loads `busybox:latest` at the start.
    pub fn busybox(mut self) -> Self {
        self.busybox = true;
        self
    }

    /// Starts the engine and waits until it answers.
    #[track_caller]
    pub fn start(self) -> Engine {
        let sandbox = match Sandbox::new() {
            Ok(sandbox) => sandbox,
            Err(e) => panic!("{e:#}"),
        };
        for dir in ["data", "exec", "config", "home"] {
            fs::create_dir(sandbox.dir().join(dir)).expect("a directory in the sandbox");
        }
        if !self.etc.is_empty() {
            let (upper, work) = (sandbox.dir().join("etc"), sandbox.dir().join("etc.work"));
            for dir in [&upper, &work] {
                fs::create_dir(dir).expect("a directory in the sandbox");
            }
            for (name, text) in &self.etc {
                let path = upper.join(name);
                fs::create_dir_all(path.parent().unwrap_or(&upper)).expect("a directory in the sandbox");
                fs::write(path, text).expect("a file in the sandbox");
            }
            let options = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
            let status =
                sandbox.command("mount").args(["-t", "overlay", "overlay", "-o", &options, "/etc"]).status();
            assert!(status.is_ok_and(|s| s.success()), "cannot give the engine an /etc of its own");
        }
        let mut engine = Engine {
            flavor: self.flavor,
            flags: self.flags,
            environment: self.environment,
            daemon: None,
            baseline: None,
            sandbox,
        };
        engine.start_daemon();
        if self.busybox {
            engine.load(&fixtures::busybox());
        }
        engine.baseline = Some(leftovers::Snapshot::take(&engine));
        engine
    }
}

impl Engine {
    /// An engine without any image.
    #[track_caller]
    pub fn start() -> Self {
        Self::builder().start()
    }

    /// An engine that has `busybox:latest`.
    #[track_caller]
    pub fn with_busybox() -> Self {
        Self::builder().busybox().start()
    }

    pub fn builder() -> Builder {
        Builder {
            flavor: Flavor::from_environment(),
            flags: Vec::new(),
            environment: Vec::new(),
            busybox: false,
            etc: Vec::new(),
        }
    }

    pub fn flavor(&self) -> Flavor {
        self.flavor
    }

    /// Whether the engine under test is Docker's.
    pub fn is_peer(&self) -> bool {
        self.flavor != Flavor::Brig
    }

    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// A scratch directory of the test's own.
    pub fn dir(&self) -> &Path {
        self.sandbox.dir()
    }

    pub fn data_root(&self) -> PathBuf {
        self.dir().join("data")
    }

    pub fn exec_root(&self) -> PathBuf {
        self.dir().join("exec")
    }

    pub fn socket_path(&self) -> PathBuf {
        self.dir().join("sock")
    }

    /// The daemon's own output so far.
    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.dir().join("daemon.log")).unwrap_or_default()
    }

    /// A connection to the API socket.
    #[track_caller]
    pub fn connect(&self) -> UnixStream {
        let stream = match UnixStream::connect(self.socket_path()) {
            Ok(stream) => stream,
            Err(e) => panic!("the engine does not listen: {e}\n{}", self.daemon_log()),
        };
        // A test that would hang fails instead.
        stream.set_read_timeout(Some(Duration::from_mins(1))).expect("SO_RCVTIMEO");
        stream
    }

    /// One request without a body.
    #[track_caller]
    pub fn request(&self, method: &str, path: &str) -> Response {
        http::exchange(self.connect(), method, path, None)
    }

    /// One GET that must answer 200; its JSON.
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        self.request("GET", path).expect(200).json()
    }

    /// One POST with a JSON body.
    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Response {
        http::exchange(self.connect(), "POST", path, Some(("application/json", body.to_string().as_bytes())))
    }

    /// One POST with a body of bytes.
    #[track_caller]
    pub fn post_bytes(&self, path: &str, kind: &str, body: &[u8]) -> Response {
        http::exchange(self.connect(), "POST", path, Some((kind, body)))
    }

    /// One PUT with a body of bytes.
    #[track_caller]
    pub fn put_bytes(&self, path: &str, kind: &str, body: &[u8]) -> Response {
        http::exchange(self.connect(), "PUT", path, Some((kind, body)))
    }

    /// Loads an image archive and insists that it worked.
    #[track_caller]
    pub fn load(&self, archive: &Path) {
        let bytes = fs::read(archive).expect("an image archive");
        let answer = self.post_bytes("/images/load?quiet=1", "application/x-tar", &bytes).expect(200);
        assert!(!answer.text().contains("errorDetail"), "load failed: {}", answer.text());
    }

    /// The unmodified docker command.
    #[track_caller]
    pub fn docker<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Invocation {
        self.client(Client::Docker, args)
    }

    /// Our own command.
    #[track_caller]
    pub fn brig<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Invocation {
        self.client(Client::Brig, args)
    }

    /// Docker's own BuildKit client: docker 20.10 with `DOCKER_BUILDKIT=1`.
    #[track_caller]
    pub fn buildkit<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Invocation {
        self.program(client::buildkit_command(), args).env("DOCKER_BUILDKIT", "1")
    }

    /// Either client.
    #[track_caller]
    pub fn client<S: AsRef<str>>(&self, client: Client, args: impl IntoIterator<Item = S>) -> Invocation {
        let program = match client {
            Client::Docker => client::docker_command(),
            Client::Brig => executable("brig"),
        };
        self.program(program, args)
    }

    #[track_caller]
    fn program<S: AsRef<str>>(&self, program: PathBuf, args: impl IntoIterator<Item = S>) -> Invocation {
        let host = format!("unix://{}", self.socket_path().display());
        let mut command = Command::new(program);
        for (key, _) in std::env::vars().filter(|(k, _)| k.starts_with("DOCKER_") || k.starts_with("BRIG_")) {
            command.env_remove(key);
        }
        command
            .env("HOME", self.dir().join("home"))
            .env("DOCKER_CONFIG", self.dir().join("config"))
            .env("DOCKER_HOST", &host)
            .env("DOCKER_CLI_HINTS", "false");
        Invocation::new(command).args(args)
    }

    /// A client on a terminal.
    #[track_caller]
    pub fn terminal<S: AsRef<str>>(&self, client: Client, args: impl IntoIterator<Item = S>) -> Terminal {
        let mut command = self.client(client, args).into_command();
        command.env("TERM", "xterm");
        Terminal::spawn(command)
    }

    /// The container's PID 1 as the sandbox sees it.
    #[track_caller]
    pub fn container_pid(&self, container: &str) -> u32 {
        let pid = self.inspect(container)["State"]["Pid"].as_u64().unwrap_or(0);
        u32::try_from(pid).expect("a PID")
    }

    /// Runs `work` on a thread that is in the container's network.
    #[track_caller]
    pub fn within_container<T: Send>(&self, container: &str, work: impl FnOnce() -> T + Send) -> T {
        let path = self.sandbox.proc(self.container_pid(container)).join("ns/net");
        let netns = File::open(path).expect("the container does not run").into();
        crate::sandbox::within(&netns, work)
    }

    /// The container's inspect document.
    #[track_caller]
    pub fn inspect(&self, container: &str) -> Value {
        self.get(&format!("/containers/{}/json", http::escape(container)))
    }

    /// Waits until the container is in this state (`running`, `exited`, …).
    #[track_caller]
    pub fn wait_state(&self, container: &str, state: &str) {
        eventually(&format!("{container} to be {state}"), || {
            (self.inspect(container)["State"]["Status"] == state).then_some(())
        });
    }

    /// Waits until the container's log has `text` in it.
    #[track_caller]
    pub fn wait_log(&self, container: &str, text: &str) {
        eventually(&format!("{text:?} in the log of {container}"), || {
            let output = self.docker(["logs", container]).run();
            (output.stdout.contains(text) || output.stderr.contains(text)).then_some(())
        });
    }

    /// Waits until a command in the container ends with 0.
    #[track_caller]
    pub fn wait_exec(&self, container: &str, command: &[&str]) {
        eventually(&format!("{command:?} to succeed in {container}"), || {
            let output = self.docker(["exec", container].iter().chain(command)).run();
            (output.code == 0).then_some(())
        });
    }

    /// The daemon's PID as the host sees it.
    #[track_caller]
    pub fn daemon_pid(&self) -> u32 {
        let entered = self.daemon.as_ref().expect("the daemon was killed").id();
        only_child(entered).expect("the daemon is gone")
    }

    /// kill -9; everything else goes on.
    #[track_caller]
    pub fn kill_daemon(&mut self) {
        self.signal_daemon("KILL");
        self.reap_daemon();
    }

    /// Asks the daemon to end, as a service manager does, and waits for that.
    #[track_caller]
    pub fn stop_daemon(&mut self) {
        self.signal_daemon("TERM");
        self.reap_daemon();
    }

    /// Stops the daemon, forgets all it knew, and starts it with nothing but `busybox:latest`.
    #[track_caller]
    pub fn make_new(&mut self) {
        self.stop_daemon();
        must(Command::new("find").arg(self.data_root()).args(["-mindepth", "1", "-delete"]));
        self.restart_daemon();
        self.load(&fixtures::busybox());
    }

    /// Starts the daemon again after it was killed or stopped.
    #[track_caller]
    pub fn restart_daemon(&mut self) {
        assert!(self.daemon.is_none(), "the daemon still runs");
        self.start_daemon();
    }

    /// Sends the daemon a signal by name.
    #[track_caller]
    pub fn signal_daemon(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.daemon_pid().to_string()]).status();
        assert!(status.is_ok_and(|s| s.success()), "cannot signal the daemon");
    }

    /// Panics if anything of a container is left anywhere: see [`leftovers`].
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let baseline = self.baseline.as_ref().expect("taken at the start");
        let mut left = Vec::new();
        let clean = until(Duration::from_secs(5), || {
            left = leftovers::Snapshot::take(self).beyond(baseline);
            left.is_empty().then_some(())
        });
        assert!(clean.is_some(), "left behind:\n  {}\n{}", left.join("\n  "), self.daemon_log());
    }

    /// Runs `check`, then insists that it left nothing behind.
    #[track_caller]
    pub fn leaving_nothing<T>(&self, check: impl FnOnce() -> T) -> T {
        let done = check();
        self.assert_nothing_left();
        done
    }

    fn reap_daemon(&mut self) {
        if let Some(mut entered) = self.daemon.take() {
            let ended = until(Duration::from_secs(20), || entered.try_wait().transpose());
            assert!(ended.is_some(), "the daemon does not end\n{}", self.daemon_log());
        }
    }

    #[track_caller]
    fn start_daemon(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir().join("daemon.log"))
            .expect("a log file");
        let dir = self.dir().display();
        let program = match self.flavor {
            Flavor::Brig => executable("brig"),
            Flavor::Dockerd => PathBuf::from("dockerd"),
        };
        let mut command = self.sandbox.command(program);
        match self.flavor {
            Flavor::Brig => {
                command.args(["daemon", "--bridge", "brig0"]);
                command.arg("--runtime-exe").arg(executable("brig-runtime"));
            }
            Flavor::Dockerd => {
                command.args(["--storage-driver", "overlay2"]);
            }
        }
        command
            .args(["--bip", "172.30.0.1/16", "--debug"])
            .arg(format!("--data-root={dir}/data"))
            .arg(format!("--exec-root={dir}/exec"))
            .arg(format!("--host=unix://{dir}/sock"))
            .arg(format!("--pidfile={dir}/pid"))
            .arg(format!("--cgroup-parent=/{}", self.sandbox.cgroup()))
            .args(&self.flags)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("HOME", self.dir().join("home"))
            .env("TMPDIR", "/tmp")
            .env_remove("DOCKER_HOST")
            .env_remove("BRIG_HOST")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("dup"))
            .stderr(log);
        self.daemon = Some(command.spawn().expect("nsenter"));
        let up = until(Duration::from_secs(30), || {
            let ended = self.daemon.as_mut().and_then(|d| d.try_wait().transpose());
            if ended.is_some() {
                return Some(false);
            }
            self.answers().then_some(true)
        });
        assert!(up == Some(true), "the engine did not start: {command:?}\n{}", self.daemon_log());
    }

    fn answers(&self) -> bool {
        let Ok(stream) = UnixStream::connect(self.socket_path()) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok();
        if (&stream).write_all(b"GET /_ping HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n").is_err() {
            return false;
        }
        let mut head = [0; 12];
        std::io::Read::read_exact(&mut &stream, &mut head).is_ok() && &head == b"HTTP/1.1 200"
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.daemon_log();
            let lines: Vec<_> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(60)..].join("\n");
            let mut err = std::io::stderr();
            writeln!(err, "--- the daemon's log, last lines\n{tail}\n--- {:?}", self.sandbox.processes())
                .ok();
        }
        if let Some(mut entered) = self.daemon.take() {
            // Its child, the daemon, goes with the sandbox.
            entered.kill().ok();
            entered.wait().ok();
        }
    }
}

/// Where the executables under test are.
///
/// `$BRIG_TEST_DIST` if set (as `cargo xtask test` does), else what `cargo xtask build --debug` or
/// `cargo xtask build` made last.
#[track_caller]
pub fn executable(name: &str) -> PathBuf {
    let target = fixtures::target_dir();
    let dirs = match std::env::var_os("BRIG_TEST_DIST") {
        Some(dir) => vec![PathBuf::from(dir)],
        None => vec![target.join("dist-debug"), target.join("dist")],
    };
    let newest = dirs
        .iter()
        .map(|d| d.join(name))
        .filter_map(|exe| Some((fs::metadata(&exe).ok()?.modified().ok()?, exe)))
        .max();
    match newest {
        Some((_, exe)) => exe,
        None => panic!("no executable {name} in {dirs:?}: run `cargo xtask build --debug` first"),
    }
}
