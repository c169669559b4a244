//! A container for a test: a root of static busybox in a directory of its own, a monitor, and the daemon's ends of its
//! streams. Dropping it kills what is left; [`Fixture::assert_nothing_left`] checks that there was nothing.

#![allow(dead_code, reason = "each test file uses its own part")]
#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use brigantine_shim::frame::{self, Kind};
use brigantine_shim::spec::{Process, Spec};
use brigantine_shim::{
    AttachOptions, AttachStream, Client, Config, Event, EventReader, ExecConfig, ExecRecord, ExitRecord,
    Inherited, JsonFileLog, LogConfig, Rootfs, SpawnError, Spawned, spawn,
};
use brigantine_sys::SealedExe;
use serde_json::{Value, json};

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 25] = [
    "sh", "cat", "echo", "sleep", "true", "false", "head", "tail", "tr", "wc", "stty", "kill", "ls", "seq",
    "dd", "printf", "yes", "id", "env", "test", "mkdir", "touch", "ps", "tee", "readlink",
];

/// One container and where it lives.
pub struct Fixture {
    pub temp: tempfile::TempDir,
    pub id: String,
    pub config: Config,
    pub exe: SealedExe,
}

/// A container that has been started.
pub struct Running {
    pub spawned: Spawned,
    pub client: Client,
    pub events: EventReader,
    /// The first client, if [`Fixture::start_attached`] was used.
    pub attach: Option<UnixStream>,
}

/// The executable under test: what was built for the tests, or the one that `BRIGANTINE_RUNTIME` names (a static release
/// build, say).
pub fn runtime() -> PathBuf {
    std::env::var_os("BRIGANTINE_RUNTIME")
        .map_or_else(|| env!("CARGO_BIN_EXE_brig-runtime").into(), PathBuf::from)
}

impl Fixture {
    /// A container that will run `args`, with a log and without terminal or input.
    pub fn new(args: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let temp = tempfile::tempdir().unwrap();
        let id = format!("shimtest-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = temp.path().join("root");
        for dir in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        let config = Config {
            id: id.clone(),
            spec: spec(&id, &root, args),
            rootfs: Rootfs::Path(root),
            terminal: false,
            console_size: None,
            open_stdin: false,
            stdin_once: false,
            log: LogConfig::JsonFile(JsonFileLog::new(temp.path().join("log"))),
            exit_path: temp.path().join("exit.json"),
            dir: temp.path().join("run"),
            systemd_cgroup: false,
            durable_exit: true,
            runtime: None,
        };
        Self { temp, id, config, exe: SealedExe::from_path(&runtime()).unwrap() }
    }

    pub fn shell(script: &str) -> Self {
        Self::new(&["/bin/sh", "-c", script])
    }

    pub fn with(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    /// Give the container a memory limit.
    pub fn with_memory(self, bytes: i64) -> Self {
        self.with_spec(|spec| spec["linux"]["resources"]["memory"] = json!({"limit": bytes, "swap": bytes}))
    }

    pub fn with_spec(mut self, change: impl FnOnce(&mut Value)) -> Self {
        let mut value = serde_json::to_value(&self.config.spec).unwrap();
        change(&mut value);
        self.config.spec = serde_json::from_value(value).unwrap();
        self
    }

    /// Start without a client.
    pub fn start(&self) -> Running {
        self.try_start(Vec::new()).unwrap()
    }

    /// Start with one client that wants everything.
    pub fn start_attached(&self) -> Running {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let options = AttachOptions {
            key: "first".into(),
            stdin: self.config.open_stdin,
            stdout: true,
            stderr: true,
            patience: None,
        };
        let mut running = self.try_start(vec![AttachStream { stream: theirs, options }]).unwrap();
        running.attach = Some(ours);
        running
    }

    pub fn try_start(&self, attach: Vec<AttachStream>) -> Result<Running, SpawnError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        let inherited =
            Inherited { netns: None, layers: Vec::new(), held: Vec::new(), attach, events: Some(theirs) };
        let spawned = spawn(&self.exe, &self.config, inherited)?;
        let client = Client::connect(&self.config.dir).unwrap();
        Ok(Running { spawned, client, events: EventReader::new(ours), attach: None })
    }

    #[expect(clippy::unused_self, reason = "reads as what it is: an exec in this container")]
    pub fn exec(&self, id: &str, args: &[&str]) -> ExecConfig {
        ExecConfig {
            id: id.into(),
            process: process(args),
            terminal: false,
            console_size: None,
            stdin: false,
            stdout: true,
            stderr: true,
        }
    }

    pub fn log(&self) -> Vec<(brigantine_shim::log::Source, Vec<u8>)> {
        read_log(&self.temp.path().join("log"))
    }

    /// No process, control group, socket or directory of the container is there.
    pub fn assert_nothing_left(&self) {
        eventually("the monitor's directory goes", || !self.config.dir.exists());
        eventually("all processes go", || self.processes().is_empty());
        assert_eq!(self.cgroups(), Vec::<PathBuf>::new());
    }

    /// Processes whose command line has the container's id (monitors), or that are in its control group.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
            let group = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
            if cmdline.contains(&format!("{} ", self.id)) || group.lines().any(|l| l.ends_with(&self.id)) {
                found.push((pid, cmdline));
            }
        }
        found
    }

    pub fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut look = vec![PathBuf::from("/sys/fs/cgroup")];
        for _ in 0..3 {
            let mut next = Vec::new();
            for dir in look.drain(..) {
                for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                    if entry.file_type().is_ok_and(|t| t.is_dir()) {
                        if entry.file_name() == *self.id {
                            found.push(entry.path());
                        }
                        next.push(entry.path());
                    }
                }
            }
            look = next;
        }
        found
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Ok(client) = Client::connect(&self.config.dir) {
            drop(client.kill(9, true));
            drop(client.kill(9, false));
            let since = Instant::now();
            while client.release().is_err() && Client::connect(&self.config.dir).is_ok() {
                if since.elapsed() > Duration::from_secs(10) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

impl Running {
    /// The container's end; other events are passed over.
    pub fn exited(&mut self) -> ExitRecord {
        loop {
            if let Event::Exited(record) =
                self.events.read().unwrap().expect("the monitor went without a word")
            {
                return record;
            }
        }
    }

    /// Everything the first client gets, until the end.
    pub fn output(&mut self) -> Output {
        read_output(self.attach.as_mut().unwrap())
    }

    pub fn stdin(&self) -> UnixStream {
        self.attach.as_ref().unwrap().try_clone().unwrap()
    }
}

/// What a client got.
#[derive(Debug, Default)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exec: Option<ExecRecord>,
    pub lagged: bool,
}

impl Output {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

pub fn read_frame(stream: &mut UnixStream) -> Option<(Kind, Vec<u8>)> {
    let mut header = [0; frame::HEADER];
    match stream.read_exact(&mut header) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return None,
        Err(e) => panic!("attach stream: {e}"),
    }
    let (kind, length) = frame::parse_header(header).unwrap_or_else(|| panic!("bad header {header:?}"));
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).unwrap();
    Some((kind, payload))
}

pub fn read_output(stream: &mut UnixStream) -> Output {
    stream.set_read_timeout(Some(Duration::from_mins(2))).unwrap();
    let mut output = Output::default();
    while let Some((kind, payload)) = read_frame(stream) {
        match kind {
            Kind::Stdout => output.stdout.extend(payload),
            Kind::Stderr => output.stderr.extend(payload),
            Kind::ExecExited => output.exec = Some(frame::exec_record(&payload).unwrap()),
            Kind::Lagged => output.lagged = true,
        }
    }
    output
}

/// Read standard output until it contains `text`.
pub fn read_until(stream: &mut UnixStream, text: &str) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut seen = String::new();
    while !seen.contains(text) {
        let (_, payload) = read_frame(stream).unwrap_or_else(|| panic!("ended before {text:?}: {seen:?}"));
        seen.push_str(&String::from_utf8_lossy(&payload));
    }
    seen
}

pub fn read_log(path: &Path) -> Vec<(brigantine_shim::log::Source, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let lines = bytes.split_inclusive(|&b| b == b'\n');
    lines
        .map(|l| {
            brigantine_shim::log::Line::parse(l).unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(l)))
        })
        .map(|line| (line.source, line.bytes))
        .collect()
}

/// Wait for a condition, for at most a minute: a machine may be busy, or emulated.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < Duration::from_mins(1), "does not happen: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn process(args: &[&str]) -> Process {
    serde_json::from_value(json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/bin", "TERM=xterm"],
        "cwd": "/",
    }))
    .unwrap()
}

fn spec(id: &str, root: &Path, args: &[&str]) -> Spec {
    serde_json::from_value(json!({
        "ociVersion": "1.2.0",
        "root": {"path": root},
        "process": serde_json::to_value(process(args)).unwrap(),
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {
            "cgroupsPath": format!("/{id}"),
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
        },
    }))
    .unwrap()
}

pub fn write_all(stream: &mut UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
}
