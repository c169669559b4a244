//! Engines that are measured: how each is started, given the image, and made to run something.

use std::{
    cell::RefCell,
    fs::{self, File},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use brigantine_testkit::{Sandbox, until};

use super::meter::Meter;
use crate::{packages, say};

const IMAGE: &str = "debian:bookworm";
pub(super) const DOCKERD: &[&str] = &["--storage-driver", "overlay2"];

/// One engine with one client.
pub struct Contender {
    name: String,
    sandbox: std::rc::Rc<Sandbox>,
    client: Client,
    daemon: Option<Daemon>,
    meter: Option<Meter>,
}

/// A daemon that can be started again.
struct Daemon {
    program: PathBuf,
    first: &'static [&'static str],
    /// `nsenter`, which ends with it.
    child: RefCell<Child>,
}

enum Client {
    /// A command that talks to a socket.
    Remote(PathBuf),
    /// Podman, which has no daemon: it runs in the sandbox itself.
    Podman,
}

/// Starts everything that is installed.
pub fn all(dist: &Path, image: &Path) -> Result<Vec<Contender>> {
    let mut all = Vec::new();
    let ours = engine(&dist.join("brig"), &["daemon"])?;
    let brig = Contender {
        name: "brig".to_owned(),
        sandbox: ours.clone(),
        client: Client::Remote(dist.join("brig")),
        daemon: None,
        meter: None,
    };
    brig.load(image)?;
    all.push(brig);
    let docker = find("docker");
    match &docker {
        Some(docker) => {
            all.push(Contender {
                name: "brig daemon, docker CLI".to_owned(),
                sandbox: ours,
                client: Client::Remote(docker.clone()),
                daemon: None,
                meter: None,
            });
        }
        None => say::note("the docker command is not installed: left out"),
    }
    match (&docker, find("dockerd")) {
        (Some(docker), Some(dockerd)) => {
            let sandbox = engine(&dockerd, DOCKERD)?;
            let name = format!("docker {}", version(&dockerd));
            let contender = Contender {
                name,
                sandbox,
                client: Client::Remote(docker.clone()),
                daemon: None,
                meter: None,
            };
            contender.load(image)?;
            all.push(contender);
        }
        _ => say::note("dockerd is not installed: left out"),
    }
    match find("podman") {
        Some(podman) if find("runc").is_some() => {
            let name = format!("podman {}, runc", version(&podman));
            let sandbox = for_podman()?.into();
            let contender = Contender { name, sandbox, client: Client::Podman, daemon: None, meter: None };
            contender.load(image)?;
            all.push(contender);
        }
        _ => say::note("podman with runc is not installed: left out"),
    }
    Ok(all)
}

/// Everything that is installed and moves images, without one; ours in each form of its storage. All are metered.
pub fn for_images(dist: &Path) -> Result<Vec<Contender>> {
    let metered = |name: String, program: &Path, first: &[&str], client: PathBuf| -> Result<Contender> {
        let sandbox = Sandbox::new()?;
        let meter = Meter::new(&sandbox)?;
        drop(start(&sandbox, program, first, Some(&meter))?);
        let (sandbox, client) = (sandbox.into(), Client::Remote(client));
        Ok(Contender { name, sandbox, client, daemon: None, meter: Some(meter) })
    };
    let mut all = Vec::new();
    let brig = dist.join("brig");
    for storage in ["erofs", "overlay"] {
        let name = format!("brig, {storage}");
        all.push(metered(name, &brig, &["daemon", "--storage", storage], brig.clone())?);
    }
    match (find("docker"), find("dockerd")) {
        (Some(docker), Some(dockerd)) => {
            all.push(metered(format!("docker {}", version(&dockerd)), &dockerd, DOCKERD, docker)?);
        }
        _ => say::note("docker or dockerd is not installed: left out"),
    }
    match find("podman") {
        Some(podman) => {
            let sandbox = for_podman()?;
            let meter = Some(Meter::new(&sandbox)?);
            let name = format!("podman {}", version(&podman));
            all.push(Contender {
                name,
                sandbox: sandbox.into(),
                client: Client::Podman,
                daemon: None,
                meter,
            });
        }
        None => say::note("podman is not installed: left out"),
    }
    Ok(all)
}

/// Everything that is installed and answers on a socket, without an image.
pub fn for_api(dist: &Path) -> Result<Vec<Contender>> {
    let remote = |name: String, program: PathBuf, first: &'static [&'static str]| -> Result<Contender> {
        let sandbox = std::rc::Rc::new(Sandbox::new()?);
        let child = RefCell::new(start(&sandbox, &program, first, None)?);
        let client = Client::Remote(program.clone());
        Ok(Contender { name, sandbox, client, daemon: Some(Daemon { program, first, child }), meter: None })
    };
    let mut all = vec![remote("brig".to_owned(), dist.join("brig"), &["daemon"])?];
    match find("dockerd") {
        Some(dockerd) => {
            let name = format!("docker {}", version(&dockerd));
            all.push(remote(name, dockerd, DOCKERD)?);
        }
        None => say::note("dockerd is not installed: left out"),
    }
    match find("podman") {
        Some(podman) if find("runc").is_some() => all.push(Contender {
            name: format!("podman {}, runc", version(&podman)),
            sandbox: for_podman()?.into(),
            client: Client::Podman,
            daemon: None,
            meter: None,
        }),
        _ => say::note("podman with runc is not installed: left out"),
    }
    Ok(all)
}

/// One with shared memory of its own: podman keeps the locks of all its containers in a file there, which has room for so
/// many and is not emptied with what they were for.
fn for_podman() -> Result<Sandbox> {
    let sandbox = Sandbox::new()?;
    let options = ["-t", "tmpfs", "-o", "mode=1777,size=64m", "shm", "/dev/shm"];
    say::read(sandbox.command("mount").args(options))?;
    Ok(sandbox)
}

pub(super) fn find(program: &str) -> Option<PathBuf> {
    if !packages::there(program) {
        return None;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into()]).map(|d| d.join(program)).find(|p| p.is_file())
}

/// "Docker version 20.10.24+dfsg1, build …" or "podman version 4.3.1" → the number.
pub(super) fn version(program: &Path) -> String {
    let text = say::read(Command::new(program).arg("--version")).unwrap_or_default();
    text.split_ascii_whitespace()
        .nth(2)
        .unwrap_or("?")
        .trim_end_matches(',')
        .split('+')
        .next()
        .unwrap_or("?")
        .to_owned()
}

/// Starts a daemon that takes dockerd's flags, in a sandbox of its own.
fn engine(program: &Path, first: &[&str]) -> Result<std::rc::Rc<Sandbox>> {
    let sandbox = Sandbox::new()?;
    // Ends with the sandbox.
    drop(start(&sandbox, program, first, None)?);
    Ok(sandbox.into())
}

/// Starts one there, and waits until it answers.
pub(super) fn start(
    sandbox: &Sandbox,
    program: &Path,
    first: &[&str],
    meter: Option<&Meter>,
) -> Result<Child> {
    let dir = sandbox.dir().display();
    let log = File::create(sandbox.dir().join("log"))?;
    let mut command = sandbox.command(program);
    command
        .args(first)
        .arg(format!("--data-root={dir}/data"))
        .arg(format!("--exec-root={dir}/exec"))
        .arg(format!("--host=unix://{dir}/sock"))
        .arg(format!("--pidfile={dir}/pid"))
        .arg(format!("--cgroup-parent=/{}", sandbox.cgroup()))
        .args(["--bip", "172.30.0.1/16"]);
    if let Some(meter) = meter {
        command = meter.metered(command);
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut daemon = command.spawn().context("nsenter")?;
    let socket = sandbox.dir().join("sock");
    let up = until(Duration::from_secs(30), || {
        if daemon.try_wait().is_ok_and(|ended| ended.is_some()) {
            return Some(false);
        }
        answers(&socket).then_some(true)
    });
    if up != Some(true) {
        let said = fs::read_to_string(sandbox.dir().join("log")).unwrap_or_default();
        bail!("{} did not start:\n{said}", program.display());
    }
    Ok(daemon)
}

/// Whether an engine listens there and answers.
pub fn answers(socket: &Path) -> bool {
    use std::io::{Read as _, Write as _};
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    let mut head = [0; 12];
    stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: xtask\r\nConnection: close\r\n\r\n").is_ok()
        && stream.read_exact(&mut head).is_ok()
        && &head == b"HTTP/1.1 200"
}

impl Contender {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether this is what the ratios refer to.
    pub fn is_docker(&self) -> bool {
        self.name.starts_with("docker ")
    }

    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// What counts its processor time; only those for images have it.
    pub fn meter(&self) -> Option<&Meter> {
        self.meter.as_ref()
    }

    pub fn is_podman(&self) -> bool {
        matches!(self.client, Client::Podman)
    }

    /// A command of the engine's client: `verb` is its first word.
    pub fn command(&self, verb: &str) -> Command {
        let dir = self.sandbox.dir();
        match &self.client {
            Client::Remote(program) => {
                let host = format!("unix://{}/sock", dir.display());
                let mut command = Command::new(program);
                command.env("DOCKER_HOST", &host).env("BRIG_HOST", &host).env("DOCKER_CONFIG", dir).arg(verb);
                command
            }
            Client::Podman => {
                let mut command = self.sandbox.command("podman");
                for (flag, sub) in [
                    ("--root", "root"),
                    ("--runroot", "run"),
                    ("--tmpdir", "tmp"),
                    ("--network-config-dir", "net"),
                ] {
                    command.arg(flag).arg(dir.join(sub));
                }
                command.args(["--runtime", "/usr/sbin/runc", "--cgroup-manager", "cgroupfs"]);
                command.args(["--storage-driver", "overlay", "--events-backend", "file"]);
                command.arg(verb);
                if verb == "run" {
                    // Its defaults are above what root may have on some machines.
                    command.args(["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]);
                    command.arg(format!("--cgroup-parent=/{}", self.sandbox.cgroup()));
                }
                command
            }
        }
    }

    pub fn load(&self, archive: &Path) -> Result<()> {
        say::note(&self.name);
        say::read(self.command("load").arg("-i").arg(archive)).map(|_| ())
    }

    /// How long one `run --rm` of `true` takes.
    pub fn run_true(&self, network: &str) -> Result<Duration> {
        let mut command = self.command("run");
        command
            .args(["--rm", "--network", network, IMAGE, "true"])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let began = Instant::now();
        let output = command.stderr(Stdio::piped()).output()?;
        let took = began.elapsed();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{}: {} ended with {}: {said}", self.name, say::spelled(&command), output.status);
        }
        Ok(took)
    }

    /// How long each of `count` takes that begin together.
    pub fn run_many(&self, count: usize) -> Result<Vec<Duration>> {
        let mut commands = Vec::new();
        for _ in 0..count {
            let mut command = self.command("run");
            command
                .args(["--rm", IMAGE, "true"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            commands.push(command);
        }
        let barrier = std::sync::Barrier::new(count);
        let results: Vec<Result<Duration>> = std::thread::scope(|scope| {
            let tasks: Vec<_> = commands
                .iter_mut()
                .map(|command| {
                    scope.spawn(|| {
                        barrier.wait();
                        let began = Instant::now();
                        let output = command.output()?;
                        if !output.status.success() {
                            bail!("{}: {}", say::spelled(command), String::from_utf8_lossy(&output.stderr));
                        }
                        Ok(began.elapsed())
                    })
                })
                .collect();
            tasks.into_iter().map(|t| t.join().unwrap_or_else(|_| bail!("a start panicked"))).collect()
        });
        results.into_iter().collect::<Result<_>>().with_context(|| self.name.clone())
    }

    /// Ends the daemon as a service manager does; how long its next start takes until it answers.
    pub fn restart(&self) -> Result<Duration> {
        let daemon = self.daemon.as_ref().context("there is no daemon")?;
        let pid = fs::read_to_string(self.sandbox.dir().join("pid"))?;
        say::read(self.sandbox.command("kill").args(["-TERM", pid.trim()]))?;
        daemon.child.borrow_mut().wait()?;
        let began = Instant::now();
        *daemon.child.borrow_mut() = start(&self.sandbox, &daemon.program, daemon.first, None)?;
        Ok(began.elapsed())
    }

    /// KiB of private memory of the monitor of a container, of which `pid` is the program.
    pub fn monitor_memory(&self, pid: &str) -> Result<u64> {
        let status = fs::read_to_string(self.sandbox.proc(pid).join("status"))?;
        let parent = status.lines().find_map(|l| l.strip_prefix("PPid:\t")).context("no parent")?.to_owned();
        private(&self.sandbox.proc(parent))
    }

    /// KiB of private memory of an idle container's monitor and of its program.
    pub fn idle_memory(&self) -> Result<(u64, u64)> {
        let mut command = self.command("run");
        say::read(command.args(["-d", "--name", "idle", IMAGE, "sleep", "1000"]))?;
        let format = ["-f", "{{.State.Pid}}", "idle"];
        let pid = say::read(self.command("inspect").args(format))?.trim().to_owned();
        let program = self.sandbox.proc(&pid);
        // A moment to settle; nothing reports that.
        std::thread::sleep(Duration::from_secs(1));
        let both = (self.monitor_memory(&pid)?, private(&program)?);
        say::read(self.command("rm").args(["-f", "idle"]))?;
        Ok(both)
    }
}

/// Private pages of a process in KiB.
fn private(proc: &Path) -> Result<u64> {
    let path = proc.join("smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let lines =
        text.lines().filter_map(|l| l.strip_prefix("Private_Clean:").or(l.strip_prefix("Private_Dirty:")));
    Ok(lines.filter_map(|l| l.split_ascii_whitespace().next()?.parse::<u64>().ok()).sum())
}
