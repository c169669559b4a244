//! `cargo xtask vm`: the runtime's tests, and the engine, on a machine whose cgroups are version 2 throughout, and which
//! has AppArmor and systemd.
//!
//! The virtual machine comes from `../shared/vm/run-in-vm`, which is not part of this repository.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use cargo_metadata::Message;

use crate::{build, packages, root, say};

/// Test binaries of these packages run in the machine.
const PACKAGES: &[&str] = &["brigantine-sys", "brigantine-runtime", "brigantine-shim", "brigantine-network"];

/// Where the machine's script is, beside the repository.
const SCRIPT: &str = "../shared/vm/run-in-vm";

/// How long the machine may take, in seconds: it is emulated, ten to twenty times slower than what emulates it.
const TIMEOUT: &str = "3600";

/// What the machine needs beyond what its script gives it: systemd and a bus, AppArmor's own tool is there.
const GUEST_PACKAGES: &str = "systemd,systemd-sysv,dbus,python3-dbus,python3-gi";

/// Runs the engine's tests and all test programs in the machine, or those whose names contain one of `filters`
/// (`engine` is the engine's). `script`: another place of the machine's script.
pub fn vm(filters: &[String], script: Option<PathBuf>) -> Result<()> {
    let door = script.unwrap_or_else(|| root().join(SCRIPT));
    if !door.exists() {
        bail!(
            "{} is not there: the virtual machine's script is kept outside the repository, in `shared` beside it; \
             `--script FILE` names another place. Any Linux with a pure cgroup v2 hierarchy does as well: run \
             `cargo xtask test` there",
            door.display()
        );
    }
    let tools: &[packages::Need] =
        &[("busybox-static", &["busybox"]), ("e2fsprogs", &["mkfs.ext4"]), ("xfsprogs", &["mkfs.xfs"])];
    packages::install(&[packages::BUILD, packages::IMAGES, tools])?;
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()));
    say::step("Building the tests that go into the machine");
    let payload = brigantine_testkit::fixtures::target_dir().join("vm-payload");
    if payload.exists() {
        fs::remove_dir_all(&payload)?;
    }
    fs::create_dir_all(payload.join("tests"))?;
    if wanted("engine") {
        fs::copy(build::build(build::Profile::Debug)?.join("brig"), payload.join("brig"))?;
        fs::write(payload.join("engine.sh"), ENGINE)?;
        disks(&payload)?;
    }
    fs::copy(build::runtime(build::Profile::Debug)?, payload.join("brig-runtime"))?;
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args(["test", "--no-run", "--locked", "--message-format=json"]);
    command.args(PACKAGES.iter().flat_map(|p| ["--package", p]));
    let output = command.stderr(std::process::Stdio::inherit()).output()?;
    if !output.status.success() {
        bail!("{} ended with {}", say::spelled(&command), output.status);
    }
    let mut count = 0;
    for message in Message::parse_stream(&output.stdout[..]) {
        let Message::CompilerArtifact(artifact) = message? else { continue };
        if let Some(exe) = artifact.executable.filter(|_| artifact.profile.test) {
            let name = exe.file_name().context("a test has a name")?;
            if wanted(name) {
                fs::copy(&exe, payload.join("tests").join(name))?;
                count += 1;
            }
        }
    }
    for dir in ["seeds", "found"] {
        let (from, to) = (root().join("fuzz").join(dir), payload.join("fuzz").join(dir));
        fs::create_dir_all(&to)?;
        for file in fs::read_dir(from)? {
            let file = file?;
            fs::copy(file.path(), to.join(file.file_name()))?;
        }
    }
    let run = payload.join("run.sh");
    fs::write(&run, RUN)?;
    fs::set_permissions(&run, fs::Permissions::from_mode(0o755))?;
    let engine = if wanted("engine") { "the engine and " } else { "" };
    say::step(&format!("Running {engine}{count} test programs on cgroup v2"));
    let mut command = Command::new(door);
    command.args(["--timeout", TIMEOUT, "--add", GUEST_PACKAGES]);
    say::run(command.arg(&payload).args(["--", "./run.sh"]))
}

/// Empty file systems that can have project quotas, for the engine's part.
fn disks(payload: &Path) -> Result<()> {
    for (format, megabytes, options) in
        [("xfs", 400, &[][..]), ("ext4", 200, &["-O", "quota,project", "-E", "quotatype=prjquota"][..])]
    {
        let disk = payload.join(format!("disk.{format}"));
        fs::File::create(&disk)?.set_len(megabytes << 20)?;
        say::run(Command::new(format!("mkfs.{format}")).arg("-q").args(options).arg(&disk))?;
    }
    Ok(())
}

const ENGINE: &str = include_str!("vm-engine.sh");

/// Runs in the machine.
const RUN: &str = include_str!("vm-run.sh");
