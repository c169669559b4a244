//! `cargo xtask vm`: the runtime's tests, and the engine, on a machine whose cgroups are version 2 throughout.
//!
//! The virtual machine comes from `../shared/vm/run-in-vm`, which is not part of this repository.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use anyhow::{Context as _, Result, bail};
use cargo_metadata::Message;

use crate::{build, packages, root, say};

/// Test binaries of these packages run in the machine.
const PACKAGES: &[&str] = &["brigantine-sys", "brigantine-runtime", "brigantine-shim"];

pub fn vm() -> Result<()> {
    let door = root().join("../shared/vm/run-in-vm");
    if !door.exists() {
        bail!(
            "{} is not there: the virtual machine's script is kept outside the repository, in `shared` beside it. \
             Any Linux with a pure cgroup v2 hierarchy does as well: run `cargo xtask test` there",
            door.display()
        );
    }
    packages::install(&[packages::BUILD, packages::IMAGES, &[("busybox-static", &["busybox"])]])?;
    let dist = build::build(build::Profile::Debug)?;
    say::step("Building the tests that go into the machine");
    let payload = brigantine_testkit::fixtures::target_dir().join("vm-payload");
    if payload.exists() {
        fs::remove_dir_all(&payload)?;
    }
    fs::create_dir_all(payload.join("tests"))?;
    for name in ["brig", "brig-runtime"] {
        fs::copy(dist.join(name), payload.join(name))?;
    }
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
            fs::copy(&exe, payload.join("tests").join(exe.file_name().context("a test has a name")?))?;
            count += 1;
        }
    }
    let script = payload.join("run.sh");
    fs::write(&script, RUN)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    fs::write(payload.join("engine.sh"), ENGINE)?;
    say::step(&format!("Running the engine and {count} test programs on cgroup v2"));
    say::run(Command::new(door).args(["--timeout", "1500"]).arg(&payload).args(["--", "./run.sh"]))
}

const ENGINE: &str = include_str!("vm-engine.sh");

/// Runs in the machine.
const RUN: &str = r#"#!/bin/sh
export BRIG_TEST_DIST=/payload BRIGANTINE_RUNTIME=/payload/brig-runtime CARGO_TARGET_DIR=/payload/target
failed=0
echo "== the engine"
sh ./engine.sh || failed=$((failed + 1))
for test in tests/*; do
    echo "== $test"
    "./$test" --test-threads 2 || failed=$((failed + 1))
done
echo "$failed programs failed"
[ "$failed" = 0 ]
"#;
