//! Programs of others that tests talk to: a registry, podman, skopeo.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::{Engine, Sandbox, must, until};

/// `user` with the password `secret`, as bcrypt.
pub const HTPASSWD: &str = "user:$2b$05$Bswvf/muHmh.8SWZMURSE.zTv3sOxuWw1z/4XNAT0nnlrHTH70qsa\n";

/// podman with storage of its own in a sandbox.
pub fn podman(sandbox: &Sandbox) -> Command {
    let mut command = sandbox.command("podman");
    let dir = |name: &str| sandbox.dir().join(name);
    command.arg("--root").arg(dir("podman")).arg("--runroot").arg(dir("podman-run"));
    command.arg("--tmpdir").arg(dir("podman-tmp")).env("HOME", sandbox.dir());
    command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
    command.args(["--runtime", "/usr/sbin/runc"]);
    command
}

/// skopeo, where the engine's registries are reached.
#[track_caller]
pub fn skopeo(engine: &Engine, args: &[&str]) -> String {
    must(engine.sandbox().command("skopeo").args(args))
}

/// A registry (Debian's `docker-registry` or ours), on loopback in the engine's own network.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    port: u16,
}

impl Registry {
    /// Starts an empty registry that the engine can reach as `127.0.0.1:PORT`.
    #[track_caller]
    pub fn start(engine: &Engine) -> Self {
        Self::start_debians(engine, |_dir| String::new())
    }

    /// The same, asking `user` for the password `secret`.
    #[track_caller]
    pub fn start_with_password(engine: &Engine) -> Self {
        Self::start_debians(engine, |dir| {
            let file = dir.join("htpasswd");
            fs::write(&file, HTPASSWD).expect("a file in the sandbox");
            format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", file.display())
        })
    }

    #[track_caller]
    fn start_debians(engine: &Engine, more: impl FnOnce(&Path) -> String) -> Self {
        let (dir, port) = Self::place(engine);
        let config = dir.join("config.yml");
        let text = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    \
             enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n{}",
            dir.join("store").display(),
            more(&dir)
        );
        fs::write(&config, text).expect("a file in the sandbox");
        let mut command = engine.sandbox().command("docker-registry");
        command.arg("serve").arg(&config);
        Self::run(engine, command, &dir, port)
    }

    /// Starts `brig registry serve` instead of Debian's.
    #[track_caller]
    pub fn start_ours(engine: &Engine) -> Self {
        Self::start_ours_with(engine, |_dir| Vec::new())
    }

    /// The same, asking `user` for the password `secret`.
    #[track_caller]
    pub fn start_ours_with_password(engine: &Engine) -> Self {
        Self::start_ours_with(engine, |dir| {
            let file = dir.join("htpasswd");
            fs::write(&file, HTPASSWD).expect("a file in the sandbox");
            vec!["--htpasswd".to_owned(), file.display().to_string()]
        })
    }

    /// The same as [`Self::start_ours`] with what it stores in `store`, where an earlier one may have left something.
    #[track_caller]
    pub fn start_ours_in(engine: &Engine, store: &Path) -> Self {
        let (dir, port) = Self::place(engine);
        Self::run(engine, Self::ours(engine, port, store), &dir, port)
    }

    /// The same as [`Self::start_ours`] with these flags, made for the registry's own directory.
    #[track_caller]
    pub fn start_ours_with(engine: &Engine, flags: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let (dir, port) = Self::place(engine);
        let mut command = Self::ours(engine, port, &dir.join("store"));
        command.args(flags(&dir));
        Self::run(engine, command, &dir, port)
    }

    fn ours(engine: &Engine, port: u16, store: &Path) -> Command {
        let mut command = engine.sandbox().command(crate::engine::executable("brig"));
        command.args(["registry", "serve", "--listen", &format!("127.0.0.1:{port}"), "--root"]).arg(store);
        command
    }

    fn place(engine: &Engine) -> (PathBuf, u16) {
        let dir = engine.dir().join("registry");
        fs::create_dir_all(&dir).expect("a directory in the sandbox");
        // Free at this moment, and nobody else is in this network.
        let port = engine
            .sandbox()
            .within_net(|| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()))
            .expect("a free port")
            .port();
        (dir, port)
    }

    #[track_caller]
    fn run(engine: &Engine, mut command: Command, dir: &Path, port: u16) -> Self {
        let log = fs::File::create(dir.join("log")).expect("a file in the sandbox");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut child = command.spawn().expect("nsenter");
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let up = until(Duration::from_secs(20), || {
            if child.try_wait().is_ok_and(|s| s.is_some()) {
                return Some(false);
            }
            engine.sandbox().within_net(|| TcpStream::connect(at).is_ok()).then_some(true)
        });
        let said = fs::read_to_string(dir.join("log")).unwrap_or_default();
        assert!(up == Some(true), "{command:?} does not start: {said}");
        Self { child, port }
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Copies an image archive into the registry under this name (with skopeo).
    #[track_caller]
    pub fn fill(&self, engine: &Engine, archive: &std::path::Path, name: &str) {
        let mut command = engine.sandbox().command("skopeo");
        command
            .args(["copy", "--insecure-policy", "--dest-tls-verify=false"])
            .arg(format!("docker-archive:{}", archive.display()))
            .arg(format!("docker://{}/{name}", self.address()));
        let output = command.output().expect("nsenter");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // The server itself is this one's child and goes with the sandbox.
        if let Some(server) = crate::sandbox::only_child(self.child.id()) {
            Command::new("kill").args(["-9", &server.to_string()]).status().ok();
        }
        self.child.wait().ok();
    }
}
