//! An OCI bundle of busybox with a state directory of its own, and the runtime's command run on it. Dropping it deletes
//! the container by force.

#![allow(dead_code, reason = "each test file uses its own part")]
#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: &str = "sh cat dd echo env grep hostname id kill ls mkdir ps pwd readlink sleep test true";

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Bundle {
    temp: tempfile::TempDir,
    pub id: String,
    /// The command under test: what was built, or a copy of it that a test may lose.
    pub exe: PathBuf,
    /// Who deletes the container at the end.
    owner: PathBuf,
}

/// What a command left.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// The executable under test: what was built for the tests, or the one that `BRIGANTINE_RUNTIME` names.
pub fn runtime() -> PathBuf {
    std::env::var_os("BRIGANTINE_RUNTIME")
        .map_or_else(|| env!("CARGO_BIN_EXE_brig-runtime").into(), PathBuf::from)
}

/// A root file system of static busybox.
pub fn busybox_root(root: &Path) {
    for dir in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    for applet in APPLETS.split_whitespace() {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
}

/// Put into `root` the shared libraries that this test program uses: the runtime, if it was not linked statically, uses
/// no others, and can then be executed in there.
pub fn add_libraries(root: &Path) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let files: BTreeSet<&str> =
        maps.lines().filter_map(|l| l.split_whitespace().nth(5)).filter(|f| f.contains(".so")).collect();
    for file in files {
        let inside = root.join(&file[1..]);
        fs::create_dir_all(inside.parent().unwrap()).unwrap();
        fs::copy(file, inside).unwrap();
        // Where the kernel looks for the loader.
        let loader = Path::new(file).file_name().unwrap().to_str().unwrap();
        if loader.starts_with("ld-linux") {
            for dir in ["lib", "lib64"] {
                fs::create_dir_all(root.join(dir)).unwrap();
                fs::copy(file, root.join(dir).join(loader)).unwrap();
            }
        }
    }
}

impl Bundle {
    pub fn new(args: &[&str]) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let id = format!("ocitest-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        busybox_root(&temp.path().join("rootfs"));
        let config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "hostname": "box",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": args,
                "env": ["PATH=/bin"],
                "cwd": "/",
                "capabilities": {
                    "bounding": ["CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE"],
                    "effective": ["CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE"],
                    "permitted": ["CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE"],
                },
            },
            "annotations": {"org.example.colour": "blue"},
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
        });
        fs::write(temp.path().join("config.json"), config.to_string()).unwrap();
        Self { temp, id, exe: runtime(), owner: runtime() }
    }

    /// For another runtime with the same command line.
    pub fn of(exe: &Path, args: &[&str]) -> Self {
        let mut bundle = Self::new(args);
        exe.clone_into(&mut bundle.exe);
        exe.clone_into(&mut bundle.owner);
        bundle
    }

    /// Changes `config.json`.
    pub fn spec(&self, change: impl FnOnce(&mut Value)) {
        let file = self.path("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        change(&mut spec);
        fs::write(&file, spec.to_string()).unwrap();
    }

    /// A container that runs until somebody ends it.
    pub fn sleeping() -> Self {
        let bundle = Self::new(&["/bin/sleep", "1000"]);
        bundle.good(&["run", "-d", "--bundle", bundle.dir(), &bundle.id]);
        bundle
    }

    pub fn dir(&self) -> &str {
        self.temp.path().to_str().unwrap()
    }

    pub fn path(&self, name: &str) -> String {
        self.temp.path().join(name).to_str().unwrap().to_owned()
    }

    /// Changes the configuration.
    pub fn configure(&self, change: impl FnOnce(&mut Value)) {
        let file = self.path("config.json");
        let mut config = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        change(&mut config);
        fs::write(&file, config.to_string()).unwrap();
    }

    pub fn root(&self) -> PathBuf {
        self.temp.path().join("rootfs")
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.exe);
        command.arg("--root").arg(self.temp.path().join("state")).stdin(Stdio::null());
        command
    }

    /// A container that outlives its command keeps the outputs open, so they are files.
    pub fn run(&self, words: &[&str]) -> Done {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let made = matches!(words, ["create", ..] | ["run", "-d", ..]);
        let out = if made { self.path("container.out") } else { self.path(&format!("out.{number}")) };
        let err = self.path(&format!("err.{number}"));
        let mut command = self.command();
        command.args(words).stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        let status = command.status().unwrap();
        let read = |file: &str| fs::read_to_string(file).unwrap();
        Done { code: status.code().unwrap_or(-1), out: read(&out), err: read(&err) }
    }

    /// The output of a command that must succeed and complain of nothing.
    pub fn good(&self, words: &[&str]) -> String {
        let done = self.run(words);
        assert_eq!((done.code, done.err.as_str()), (0, ""), "{words:?}");
        done.out
    }

    /// What a command that must fail says: one line on standard error, and status 1.
    pub fn bad(&self, words: &[&str]) -> String {
        let done = self.run(words);
        let code = if words.contains(&"exec") { 255 } else { 1 };
        assert_eq!((done.code, done.out.as_str()), (code, ""), "{words:?}: {}", done.err);
        assert_eq!(done.err.trim_end().lines().count(), 1, "{words:?}: {}", done.err);
        assert!(done.err.starts_with("brig-runtime: "), "{words:?}: {}", done.err);
        done.err
    }

    pub fn state(&self) -> Value {
        serde_json::from_str(&self.good(&["state", &self.id])).unwrap()
    }

    pub fn status(&self) -> String {
        self.state()["status"].as_str().unwrap().to_owned()
    }

    /// What the container wrote after `create` or `run -d`.
    pub fn container_output(&self) -> String {
        fs::read_to_string(self.path("container.out")).unwrap_or_default()
    }

    pub fn assert_nothing_left(&self) {
        assert!(!Path::new(&self.path("state")).join(&self.id).exists(), "the container's record stays");
        let hierarchies = fs::read_dir("/sys/fs/cgroup").unwrap().flatten();
        let mut dirs: Vec<PathBuf> = hierarchies.map(|e| e.path().join(&self.id)).collect();
        dirs.push(Path::new("/sys/fs/cgroup").join(&self.id));
        dirs.retain(|d| d.exists());
        assert_eq!(dirs, Vec::<PathBuf>::new());
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // A copy may have been lost.
        self.exe.clone_from(&self.owner);
        self.run(&["delete", "--force", &self.id]);
    }
}

/// For a test that has nothing to test, for the machine lacks something: true, but a failure where everything is there
/// by arrangement (`BRIG_TEST_STRICT`).
pub fn lacking(what: &str) -> bool {
    assert!(std::env::var_os("BRIG_TEST_STRICT").is_none(), "this machine should have {what}");
    true
}

/// Wait for a condition, for at most a minute: a machine may be busy, or emulated.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < Duration::from_mins(1), "does not happen: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
