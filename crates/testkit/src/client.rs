//! A command line client (the docker command or `brig`) bound to one engine, and what a run of it gave.

use std::{
    fmt,
    io::{Read as _, Write as _},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// Which client drives an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// The unmodified docker command.
    Docker,
    /// Our own.
    Brig,
}

/// A command about to be run.
#[derive(Debug)]
pub struct Invocation {
    command: Command,
    stdin: Option<Vec<u8>>,
    limit: Duration,
    label: String,
}

/// What a finished command gave.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command as typed.
    pub label: String,
    pub status: ExitStatus,
    /// 128+n for a client that died of signal n, as a shell says it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Invocation {
    /// Wraps a prepared command.
    pub fn new(command: Command) -> Self {
        let mut label = command.get_program().to_string_lossy().into_owned();
        for arg in command.get_args() {
            label.push(' ');
            label.push_str(&arg.to_string_lossy());
        }
        Self { command, stdin: None, limit: Duration::from_mins(1), label }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<str>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        for arg in args {
            self.label.push(' ');
            self.label.push_str(arg.as_ref());
            self.command.arg(arg.as_ref());
        }
        self
    }

    /// Gives standard input; it is closed behind these bytes. Without this it is `/dev/null`.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.command.env(key, value);
        self
    }

    /// The command is killed and the test fails when it takes longer. The default is a minute.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts it and lets it run; standard input stays open until the caller drops it.
    #[track_caller]
    pub fn spawn(mut self) -> Child {
        match self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() {
            Ok(child) => child,
            Err(e) => panic!("cannot run `{}`: {e}", self.label),
        }
    }

    /// The command itself, for a test that wires it up its own way.
    pub fn into_command(self) -> Command {
        self.command
    }

    /// Runs it to its end, whatever that is.
    #[track_caller]
    pub fn run(mut self) -> Output {
        let input = self.stdin.take();
        self.command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = match self.command.spawn() {
            Ok(child) => child,
            Err(e) => panic!("cannot run `{}`: {e}", self.label),
        };
        let (mut out, mut err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let sink = child.stdin.take();
        let label = self.label;
        let limit = self.limit;
        let (status, stdout, stderr, late) = std::thread::scope(|scope| {
            scope.spawn(move || {
                if let (Some(mut sink), Some(bytes)) = (sink, input) {
                    // A client that ends early closes the pipe: what it read is its own affair.
                    sink.write_all(&bytes).ok();
                }
            });
            let stdout = scope.spawn(move || {
                let mut all = Vec::new();
                out.read_to_end(&mut all).map(|_| all)
            });
            let stderr = scope.spawn(move || {
                let mut all = Vec::new();
                err.read_to_end(&mut all).map(|_| all)
            });
            let finished = crate::until(limit, || child.try_wait().transpose());
            let late = finished.is_none();
            let status = match finished {
                Some(status) => status,
                None => child.kill().and_then(|()| child.wait()),
            };
            let text = |t: std::thread::ScopedJoinHandle<'_, std::io::Result<Vec<u8>>>| {
                String::from_utf8_lossy(&t.join().expect("no panic in a reader").expect("reading a pipe"))
                    .into_owned()
            };
            (status.expect("waiting for a child"), text(stdout), text(stderr), late)
        });
        let done = Output { label, code: code_of(status), status, stdout, stderr, took: began.elapsed() };
        assert!(!late, "took longer than {limit:?}: {done}");
        done
    }

    /// Runs it, insists on status 0, returns standard output without the last line's end.
    #[track_caller]
    pub fn ok(self) -> String {
        self.run().expect_code(0).stdout.trim_end_matches('\n').to_owned()
    }

    /// Runs it, insists on this status, returns everything.
    #[track_caller]
    pub fn exits(self, code: i32) -> Output {
        self.run().expect_code(code)
    }
}

impl Output {
    /// Panics with both outputs unless the status was `code`.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert!(self.code == code, "expected exit status {code}: {self}");
        self
    }

    /// Panics unless standard error has this text in it (letter case aside).
    #[track_caller]
    pub fn expect_stderr(self, text: &str) -> Self {
        assert!(
            self.stderr.to_lowercase().contains(&text.to_lowercase()),
            "expected {text:?} on stderr: {self}"
        );
        self
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` ended with {} after {:?}\n--- stdout\n{}\n--- stderr\n{}\n---",
            self.label, self.code, self.took, self.stdout, self.stderr
        )
    }
}

/// Runs another program, which has to succeed: what it prints, without the last line's end.
#[track_caller]
pub fn must(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// The status as a shell gives it.
pub fn code_of(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// The docker command and its version: the newest one there is on `$PATH`.
///
/// Panics if there is none: Debian's package `docker.io` brings one.
#[track_caller]
pub fn docker_command() -> PathBuf {
    static FOUND: std::sync::OnceLock<Option<PathBuf>> = std::sync::OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let named = std::env::var_os("BRIG_TEST_DOCKER").map(PathBuf::from);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut all: Vec<_> = std::env::split_paths(&path)
            .map(|dir| dir.join("docker"))
            .chain(named)
            .filter_map(|exe| docker_version(&exe).map(|v| (v, exe)))
            .collect();
        all.sort();
        all.pop().map(|(_, exe)| exe)
    });
    match found {
        Some(exe) => exe.clone(),
        None => panic!(
            "these tests drive the engine with the docker command, and there is none: apt-get install docker.io"
        ),
    }
}

/// The last docker command with a BuildKit client of its own (18.09 to 20.10; Debian 12's): later ones leave it to a
/// plugin.
///
/// Panics if there is none.
#[track_caller]
pub fn buildkit_command() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join("docker"))
        .find(|exe| docker_version(exe).is_some_and(|version| (18..=20).contains(&version)));
    match found {
        Some(exe) => exe,
        None => {
            panic!("there is no docker command of 20.10 on the path: apt-get install docker.io on Debian 12")
        }
    }
}

/// The major version of a docker executable.
pub fn docker_version(exe: &std::path::Path) -> Option<u32> {
    if !exe.is_file() {
        return None;
    }
    let out = Command::new(exe).arg("--version").output().ok()?;
    // "Docker version 28.2.2, build e6534b4"
    String::from_utf8_lossy(&out.stdout).split_ascii_whitespace().nth(2)?.split('.').next()?.parse().ok()
}
