//! Registries that are measured, or measured with: each a process in a sandbox's network.

use std::{
    fs,
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use brigantine_testkit::{Sandbox, until};

use super::meter::Meter;

/// Whose registry.
#[derive(Clone, Copy)]
pub enum Make<'a> {
    /// `brig registry serve` of this executable.
    Ours(&'a Path),
    /// Debian's docker-registry.
    Debians,
}

/// A registry that listens on loopback; it ends when this is dropped.
pub struct Server {
    child: Child,
}

impl Server {
    /// Starts one over `dir` and waits until it listens.
    pub fn start(
        make: Make<'_>,
        sandbox: &Sandbox,
        meter: Option<&Meter>,
        dir: &Path,
        port: u16,
    ) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let mut command = match make {
            Make::Ours(brig) => ours(brig, sandbox, dir, port),
            Make::Debians => debians(sandbox, dir, port)?,
        };
        if let Some(meter) = meter {
            command = meter.metered(command);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let server = Self { child };
        let up = until(Duration::from_secs(20), || {
            sandbox.within_net(|| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()).then_some(())
        });
        up.context("a registry does not start")?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // nsenter has become the server.
        if self.child.kill().is_ok() {
            self.child.wait().ok();
        }
    }
}

fn ours(brig: &Path, sandbox: &Sandbox, dir: &Path, port: u16) -> Command {
    let mut command = sandbox.net_command(brig);
    command.args(["registry", "serve", "--log-level", "error", "--listen", &format!("127.0.0.1:{port}")]);
    command.arg("--root").arg(dir);
    command
}

fn debians(sandbox: &Sandbox, dir: &Path, port: u16) -> Result<Command> {
    let config = sandbox.dir().join(format!("registry-{port}.yml"));
    let text = format!(
        "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    \
         rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
        dir.display()
    );
    fs::write(&config, text)?;
    let mut command = sandbox.net_command("docker-registry");
    command.arg("serve").arg(&config);
    Ok(command)
}
