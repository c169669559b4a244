//! Those who build: each with its command, its cache and its registry.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use brigantine_testkit::Sandbox;

use super::projects::Projects;
use crate::bench::contender::{DOCKERD, find, start, version};
use crate::bench::server::{Make, Server};
use crate::say;

/// No command takes longer.
const LONGEST: Duration = Duration::from_mins(10);
/// Within each one's own network.
const PORT: u16 = 5003;

enum Kind {
    Brig,
    /// Docker's command without BuildKit, and our engine.
    Classic,
    Docker,
    Buildah,
}

/// One contender.
pub struct Station {
    name: String,
    kind: Kind,
    program: PathBuf,
    sandbox: Sandbox,
    _registry: Server,
}

impl Station {
    fn new(name: String, kind: Kind, program: PathBuf, daemon: Option<(&Path, &[&str])>) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        if let Some((daemon, first)) = daemon {
            // It ends with the sandbox.
            drop(start(&sandbox, daemon, first, None)?);
        } else {
            let options = ["-t", "tmpfs", "-o", "mode=1777,size=64m", "shm", "/dev/shm"];
            say::read(sandbox.command("mount").args(options))?;
        }
        let registry = Server::start(Make::Debians, &sandbox, None, &sandbox.dir().join("registry"), PORT)?;
        Ok(Self { name, kind, program, sandbox, _registry: registry })
    }

    pub fn brig(dist: &Path) -> Result<Self> {
        let brig = dist.join("brig");
        Self::new("brig".to_owned(), Kind::Brig, brig.clone(), Some((&brig, &["daemon"])))
    }

    pub fn classic(dist: &Path) -> Result<Option<Self>> {
        let Some(docker) = find("docker") else {
            say::note("the docker command is not installed: left out");
            return Ok(None);
        };
        let name = "brig daemon, classic docker".to_owned();
        Self::new(name, Kind::Classic, docker, Some((&dist.join("brig"), &["daemon"]))).map(Some)
    }

    /// Debian's, with the BuildKit that is in it: later commands want a plugin for that.
    pub fn docker() -> Result<Option<Self>> {
        let docker = PathBuf::from("/usr/bin/docker");
        match find("dockerd") {
            Some(dockerd) if docker.is_file() && version(&docker).starts_with("20.") => {
                let name = format!("docker {}, BuildKit", version(&dockerd));
                Self::new(name, Kind::Docker, docker, Some((&dockerd, DOCKERD))).map(Some)
            }
            _ => {
                say::note("Debian's docker.io is not installed: left out");
                Ok(None)
            }
        }
    }

    pub fn buildah() -> Result<Option<Self>> {
        match find("buildah") {
            Some(buildah) if find("runc").is_some() => {
                let name = format!("buildah {}", version(&buildah));
                Self::new(name, Kind::Buildah, buildah, None).map(Some)
            }
            _ => {
                say::note("buildah with runc is not installed: left out");
                Ok(None)
            }
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the ratios refer to it.
    pub fn is_docker(&self) -> bool {
        matches!(self.kind, Kind::Docker)
    }

    /// Whether something is wanted of it.
    pub fn is_judged(&self) -> bool {
        matches!(self.kind, Kind::Brig)
    }

    fn command(&self, verb: &str) -> Command {
        let dir = self.sandbox.dir();
        if matches!(self.kind, Kind::Buildah) {
            let mut command = self.sandbox.command(&self.program);
            command.arg("--root").arg(dir.join("root")).arg("--runroot").arg(dir.join("run"));
            command.args(["--storage-driver", "overlay"]).arg(verb);
            return command;
        }
        let host = format!("unix://{}/sock", dir.display());
        let mut command = Command::new(&self.program);
        let buildkit = if matches!(self.kind, Kind::Docker) { "1" } else { "0" };
        command.env("DOCKER_HOST", &host).env("BRIG_HOST", &host).env("DOCKER_CONFIG", dir);
        command.env("DOCKER_BUILDKIT", buildkit).arg(verb);
        command
    }

    pub fn load(&self, archive: &Path) -> Result<()> {
        match self.kind {
            Kind::Buildah => {
                let from = format!("docker-archive:{}", archive.display());
                say::read(self.command("pull").arg(from)).map(drop)
            }
            _ => say::read(self.command("load").arg("-i").arg(archive)).map(drop),
        }
    }

    fn building(&self, folder: &Path, tag: &str, more: &[&str]) -> Command {
        let mut command = self.command("build");
        match self.kind {
            Kind::Buildah => {
                // Its defaults are above what root may have on some machines.
                command.args(["--layers", "--isolation", "oci", "--runtime", "/usr/sbin/runc"]);
                command.args(["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]);
                command.args(["--pull-never", "--format", "docker"]);
                command.arg(format!("--cgroup-parent=/{}", self.sandbox.cgroup()));
            }
            Kind::Docker => {
                command.args(["--progress", "plain"]);
            }
            Kind::Brig | Kind::Classic => {}
        }
        command.args(["-t", tag]).args(more).arg(folder);
        command
    }

    fn timed(command: &Command) -> Result<Duration> {
        let mut limited = crate::bench::limited(command, LONGEST);
        limited.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let began = Instant::now();
        let output = limited.output()?;
        let took = began.elapsed();
        if !output.status.success() {
            let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
            bail!("{}: {}", say::spelled(command), said.concat().trim_end());
        }
        Ok(took)
    }

    fn build(&self, folder: &Path, more: &[&str]) -> Result<Duration> {
        Self::timed(&self.building(folder, "built:latest", more))
    }

    pub fn noop(&self, projects: &Projects, round: usize) -> Result<Duration> {
        if round == 0 {
            self.build(&projects.six(), &[])?;
        }
        self.build(&projects.six(), &[])
    }

    pub fn uncached(&self, projects: &Projects, _round: usize) -> Result<Duration> {
        self.build(&projects.six(), &["--no-cache"])
    }

    /// The file was changed before.
    pub fn changed(&self, projects: &Projects, _round: usize) -> Result<Duration> {
        self.build(&projects.six(), &[])
    }

    pub fn stages(&self, projects: &Projects, _round: usize) -> Result<Duration> {
        let jobs = ["--no-cache", "--jobs", "2"];
        let more: &[&str] = if matches!(self.kind, Kind::Buildah) { &jobs } else { &jobs[..1] };
        self.build(&projects.stages(), more)
    }

    pub fn cold(&self, projects: &Projects, _round: usize) -> Result<Duration> {
        self.build(&projects.context(), &[])
    }

    pub fn warm(&self, projects: &Projects, round: usize) -> Result<Duration> {
        self.cold(projects, round)
    }

    pub fn touched(&self, projects: &Projects, round: usize) -> Result<Duration> {
        self.cold(projects, round)
    }

    /// The stage that has the file is cached from the first round on, the copy goes to another place each time.
    pub fn copy(&self, projects: &Projects, round: usize) -> Result<Duration> {
        let to = format!("TO=round-{round}");
        let took = self.build(&projects.large(), &["--build-arg", &to])?;
        // What it takes is not to add up.
        self.remove("built:latest")?;
        Ok(took)
    }

    /// Until the last of them is done.
    pub fn many(&self, projects: &Projects, round: usize) -> Result<Duration> {
        let count = projects.clients();
        let argument = format!("ROUND={round}-{}", std::process::id());
        let barrier = Barrier::new(count + 1);
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..count)
                .map(|number| {
                    let (barrier, argument) = (&barrier, &argument);
                    scope.spawn(move || {
                        let tag = format!("many:{number}");
                        let command = self.building(&projects.many(), &tag, &["--build-arg", argument]);
                        barrier.wait();
                        Self::timed(&command)
                    })
                })
                .collect();
            barrier.wait();
            let began = Instant::now();
            for client in clients {
                client.join().unwrap_or_else(|_| bail!("a client panicked"))?;
            }
            Ok(began.elapsed())
        })
    }

    /// A build of two large layers, and its image as an archive: by one command where there is one.
    pub fn export(&self, projects: &Projects, round: usize) -> Result<Duration> {
        let archive = projects.archive(&self.name);
        let argument = format!("ROUND=export-{round}");
        let arguments = ["--build-arg", &argument];
        let took = match self.kind {
            Kind::Brig => {
                let output = format!("type=oci,dest={}", archive.display());
                let more = [&arguments[..], &["-o", &output]].concat();
                self.build(&projects.exported(), &more)?
            }
            Kind::Classic | Kind::Docker => {
                let built = self.build(&projects.exported(), &arguments)?;
                let mut save = self.command("save");
                save.arg("-o").arg(&archive).arg("built:latest");
                built + Self::timed(&save)?
            }
            Kind::Buildah => {
                let built = self.build(&projects.exported(), &arguments)?;
                let mut push = self.command("push");
                push.arg("built:latest").arg(format!("oci-archive:{}", archive.display()));
                built + Self::timed(&push)?
            }
        };
        std::fs::remove_file(&archive).with_context(|| format!("{} is not there", archive.display()))?;
        Ok(took)
    }

    /// Of a build with two layers that no registry has.
    pub fn push(&self, projects: &Projects, round: usize) -> Result<Duration> {
        let argument = format!("ROUND=push-{round}");
        let tag = format!("127.0.0.1:{PORT}/pushed:{round}");
        let more = ["--build-arg", &argument, "--no-cache"];
        Self::timed(&self.building(&projects.exported(), &tag, &more))?;
        let mut push = self.command("push");
        if matches!(self.kind, Kind::Buildah) {
            push.arg("--tls-verify=false");
        }
        // Not the same to a registry: layers that it has are not sent again.
        let stored = self.sandbox.dir().join("registry/docker");
        if stored.exists() {
            std::fs::remove_dir_all(stored)?;
        }
        push.arg(&tag);
        let took = Self::timed(&push)?;
        self.remove(&tag)?;
        Ok(took)
    }

    fn remove(&self, tag: &str) -> Result<()> {
        say::read(self.command("rmi").arg(tag)).map(drop)
    }
}
