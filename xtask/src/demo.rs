//! `cargo xtask demo`: a real container from a bare machine, step by step with timings.
//!
//! It never touches an installed engine: the daemon has a root, a socket, a network and processes of its own, in a
//! sandbox that is gone when the demo ends, also by a failure.

use std::{
    fs::File,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use brigantine_testkit::{Sandbox, until};

use crate::{build, packages, say};

/// The engine of the demo.
struct Demo {
    dist: PathBuf,
    sandbox: Sandbox,
    took: Vec<(String, Duration)>,
}

pub fn demo() -> Result<()> {
    packages::install(&[packages::BUILD, packages::IMAGES, packages::DEMO])?;
    let (dist, built) = say::timed(|| build::build(build::Profile::Release))?;
    let sandbox = Sandbox::new()?;
    let mut demo = Demo { dist, sandbox, took: vec![("build in release mode".to_owned(), built)] };
    let done = demo.show();
    if done.is_err() {
        say::note("the daemon's log ends with:");
        let log = std::fs::read_to_string(demo.sandbox.dir().join("daemon.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        say::quote(&lines[lines.len().saturating_sub(30)..].join("\n"));
    }
    done?;
    let Demo { sandbox, took, .. } = demo;
    let dir = sandbox.dir().to_owned();
    drop(sandbox);
    if dir.exists() {
        bail!("{} is still there", dir.display());
    }
    say::step("Done; nothing is left of it. How long each step took");
    for (what, time) in took {
        say::note(&format!("{:>10.1} ms  {what}", time.as_secs_f64() * 1e3));
    }
    Ok(())
}

impl Demo {
    fn show(&mut self) -> Result<()> {
        self.start_daemon()?;
        self.brig("the embedded image", &["run", "--rm", "hello"])?;
        self.brig(
            "a Debian image from Debian's signed packages",
            &["image", "bootstrap", "debian:bookworm"],
        )?;
        self.brig("images", &["images"])?;
        self.brig("a Debian container", &["run", "--rm", "debian:bookworm", "cat", "/etc/os-release"])?;
        self.brig("the same, again", &["run", "--rm", "debian:bookworm", "echo", "hi"])?;
        let count = "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done";
        self.brig(
            "one in the background",
            &["run", "-d", "--name", "counter", "debian:bookworm", "sh", "-c", count],
        )?;
        self.brig("ps", &["ps"])?;
        self.brig("exec", &["exec", "counter", "hostname", "-I"])?;
        let seen = until(Duration::from_secs(10), || {
            let mut logs = self.client(&["logs", "counter"]);
            logs.output().is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("line 3")).then_some(())
        });
        seen.context("the container's log does not grow")?;
        self.brig("logs", &["logs", "--tail", "3", "counter"])?;
        self.brig("stats", &["stats", "--no-stream", "counter"])?;
        self.brig("cleaning up", &["rm", "-f", "counter"])?;
        self.brig("nothing is left", &["ps", "-a"])
    }

    fn start_daemon(&mut self) -> Result<()> {
        say::step("Starting a daemon with a root, socket and network of its own");
        let dir = self.sandbox.dir().to_owned();
        let log = File::create(dir.join("daemon.log"))?;
        let mut command = self.sandbox.command(self.dist.join("brig"));
        command
            .arg("daemon")
            .arg(format!("--data-root={}/data", dir.display()))
            .arg(format!("--exec-root={}/exec", dir.display()))
            .arg(format!("--host=unix://{}/sock", dir.display()))
            .arg(format!("--pidfile={}/pid", dir.display()))
            .arg(format!("--cgroup-parent=/{}", self.sandbox.cgroup()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let ((), took) = say::timed(|| {
            let mut daemon = command.spawn().context("nsenter")?;
            let up = until(Duration::from_secs(30), || {
                if daemon.try_wait().is_ok_and(|ended| ended.is_some()) {
                    return Some(false);
                }
                crate::bench::answers(&dir.join("sock")).then_some(true)
            });
            if up == Some(true) { Ok(()) } else { bail!("the daemon did not start") }
        })?;
        self.took.push(("start of the daemon".to_owned(), took));
        Ok(())
    }

    fn client(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.dist.join("brig"));
        command.args(args).env("BRIG_HOST", format!("unix://{}/sock", self.sandbox.dir().display()));
        command.stdin(Stdio::null());
        command
    }

    fn brig(&mut self, what: &str, args: &[&str]) -> Result<()> {
        let shown = args.iter().map(|a| if a.contains(' ') { format!("'{a}'") } else { (*a).to_owned() });
        let shown = format!("brig {}", shown.collect::<Vec<_>>().join(" "));
        say::step(&shown);
        let (text, took) = say::timed(|| say::read(&mut self.client(args)))?;
        say::quote(&text);
        self.took.push((format!("{what}: {shown}"), took));
        Ok(())
    }
}
