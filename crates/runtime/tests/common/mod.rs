//! A container per test: a root file system of busybox, a spec, what it printed, nothing left.

#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "each test program uses its own part"
)]

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use brigantine_runtime::spec::{Capabilities, LinuxNamespaceType, Spec};
use brigantine_runtime::{
    Created, Error, ExecRequest, Launch, Rootfs, Stdio, create, exec, profile, seccomp,
};
use rustix::process::{WaitId, WaitIdOptions, waitid};

pub struct Case {
    pub dir: tempfile::TempDir,
    pub id: String,
    pub spec: Spec,
}

pub struct Finished {
    pub status: i32,
    pub out: String,
}

/// False where tests cannot make containers at all.
pub fn able() -> bool {
    rustix::process::geteuid().is_root()
}

fn busybox() -> &'static Path {
    Path::new("/usr/bin/busybox")
}

impl Case {
    /// A container with docker's default confinement that runs `script` with busybox' sh.
    pub fn new(script: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = tempfile::tempdir().unwrap();
        let id = format!("rt-test-{}-{number}", std::process::id());
        let root = dir.path().join("rootfs");
        for sub in ["bin", "etc", "tmp", "proc", "sys", "dev"] {
            fs::create_dir_all(root.join(sub)).unwrap();
        }
        fs::copy(busybox(), root.join("bin/busybox")).unwrap();
        let applets = "sh cat echo ls id mount umount mkdir touch readlink hostname sleep true false env pwd stat \
             kill grep ps chmod ip mknod unshare stty wc head tr dd tty chroot ln rm date test";
        for applet in applets.split_whitespace() {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        let mut case = Self { dir, id, spec: docker_spec() };
        case.args(&["/bin/sh", "-c", script]);
        let path = format!("/brigantine-test-{}", case.id);
        case.linux(|l| {
            l.set_cgroups_path(Some(path.into()));
        });
        case
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    pub fn args(&mut self, args: &[&str]) {
        self.process(|p| {
            p.set_args(Some(args.iter().map(|a| (*a).to_owned()).collect()));
        });
    }

    pub fn process(&mut self, change: impl FnOnce(&mut brigantine_runtime::spec::Process)) {
        change(self.spec.process_mut().as_mut().unwrap());
    }

    pub fn linux(&mut self, change: impl FnOnce(&mut brigantine_runtime::spec::Linux)) {
        change(self.spec.linux_mut().as_mut().unwrap());
    }

    pub fn mount(&mut self, json: serde_json::Value) {
        let mount = serde_json::from_value(json).unwrap();
        self.spec.mounts_mut().as_mut().unwrap().push(mount);
    }

    pub fn rootfs(&self) -> Rootfs {
        Rootfs::Path(self.root())
    }

    pub fn create(&self, stdio: Stdio) -> Result<Created, Error> {
        self.create_on(self.rootfs(), stdio)
    }

    pub fn create_on(&self, rootfs: Rootfs, stdio: Stdio) -> Result<Created, Error> {
        create(Launch::new(self.id.clone(), self.spec.clone(), rootfs, stdio))
    }

    pub fn run(&self) -> Result<Finished, Error> {
        self.run_on(self.rootfs())
    }

    pub fn run_on(&self, rootfs: Rootfs) -> Result<Finished, Error> {
        let (stdio, mut reader) = pipes();
        let mut created = self.create_on(rootfs, stdio)?;
        let started = created.start();
        if let Err(e) = started {
            let group = created.cgroup().clone();
            drop(created);
            assert!(!group.exists(), "a failed start must leave no cgroup");
            return Err(e);
        }
        let mut out = String::new();
        reader.read_to_string(&mut out).unwrap();
        let status = wait(&created);
        created.cgroup().delete().unwrap();
        assert!(!created.cgroup().exists());
        Ok(Finished { status, out })
    }

    /// The output of a container that must succeed.
    pub fn output(&self) -> String {
        let done = self.run().unwrap();
        assert_eq!(done.status, 0, "output: {}", done.out);
        done.out
    }

    /// The error of a container that must not start, with nothing left of it.
    pub fn error(&self) -> Error {
        let error = self.run().err().expect("this container must not start");
        assert!(!error.to_string().contains('\n'));
        let left = brigantine_runtime::Cgroup::open(&format!("/brigantine-test-{}", self.id));
        assert!(left.is_err(), "a failed creation must leave no cgroup");
        error
    }

    pub fn exec(&self, created: &Created, script: &str) -> Result<Finished, Error> {
        let mut process = self.spec.process().clone().unwrap();
        process.set_args(Some(vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()]));
        let (stdio, mut reader) = pipes();
        let filter = self.spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
        let done = exec(ExecRequest {
            process,
            stdio,
            pid: created.pid(),
            cgroup: Some(created.cgroup().clone()),
            seccomp: filter.map(|f| seccomp::compile(f).unwrap().unwrap()),
            listener: None,
            common: brigantine_runtime::Common::of(&self.spec),
            die_with_parent: true,
            preserve_fds: 0,
            executable: None,
        })?;
        let mut out = String::new();
        reader.read_to_string(&mut out).unwrap();
        let status = waitid(WaitId::PidFd(done.pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
        Ok(Finished { status: status.exit_status().unwrap_or(-1), out })
    }
}

pub fn pipes() -> (Stdio, std::io::PipeReader) {
    let (reader, writer) = std::io::pipe().unwrap();
    let stdin = fs::File::open("/dev/null").unwrap();
    let stderr = writer.try_clone().unwrap();
    (Stdio::Fds { stdin: stdin.into(), stdout: writer.into(), stderr: stderr.into() }, reader)
}

/// Exit status, or 128 and the signal.
pub fn wait(created: &Created) -> i32 {
    let status = waitid(WaitId::PidFd(created.pidfd()), WaitIdOptions::EXITED).unwrap().unwrap();
    status.exit_status().or_else(|| status.terminating_signal().map(|s| 128 + s)).unwrap_or(-1)
}

pub fn finish(created: Created) {
    created.cgroup().kill_all().unwrap();
    wait(&created);
    created.cgroup().delete().unwrap();
}

/// What the engine asks for when nobody asks for anything.
pub fn docker_spec() -> Spec {
    let capabilities: Capabilities = profile::capabilities().into_iter().collect();
    let json = serde_json::json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/",
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "capabilities": {"bounding": &capabilities, "effective": &capabilities, "permitted": &capabilities},
        },
        "root": {"path": "rootfs"},
        "hostname": "ship",
        "mounts": profile::mounts(64 << 20),
        "linux": {
            "resources": {"devices": profile::device_rules()},
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "network"}, {"type": "cgroup"}],
            "maskedPaths": profile::masked_paths(),
            "readonlyPaths": profile::readonly_paths(),
            "seccomp": profile::seccomp(&profile::SeccompContext {
                capabilities: profile::capabilities(), kernel: None }).unwrap(),
        },
    });
    serde_json::from_value(json).unwrap()
}

pub fn without_namespace(spec: &mut Spec, typ: LinuxNamespaceType) {
    let linux = spec.linux_mut().as_mut().unwrap();
    linux.namespaces_mut().as_mut().unwrap().retain(|n| n.typ() != typ);
}

pub fn executable(path: &Path, content: &[u8]) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}
