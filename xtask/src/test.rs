//! `cargo xtask test`: everything the tests need, then the tests.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{build, packages, root, say};

/// Containers, and kills of the daemon, of the long run.
const SOAK: [(&str, &str); 2] = [("BRIG_TEST_CONTAINERS", "50"), ("BRIG_TEST_KILLS", "100")];

/// The test that kills the daemon over and over, at a size that takes minutes.
pub fn soak() -> Result<()> {
    packages::install(&[packages::BUILD, packages::IMAGES, packages::TEST])?;
    // As for the bench: executables that are there already.
    let dist = match std::env::var_os("BRIG_TEST_DIST") {
        Some(dist) => PathBuf::from(dist),
        None => build::build(build::Profile::Release)?,
    };
    say::step("Killing the daemon a hundred times under fifty containers");
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).env("BRIG_TEST_DIST", dist).envs(SOAK);
    command.args([
        "test",
        "--locked",
        "-p",
        "brigantine-api",
        "--test",
        "e2e",
        "unkillable::a_daemon",
        "--",
        "--nocapture",
    ]);
    say::run(&mut command)
}

/// Runs all tests, or those whose names contain one of `filters`.
pub fn test(filters: &[String]) -> Result<()> {
    packages::install(&[packages::BUILD, packages::IMAGES, packages::TEST])?;
    let dist = build::build(build::Profile::Debug)?;
    say::step("Running the tests");
    let nextest = say::capture(Command::new(env!("CARGO")).args(["nextest", "--version"]))?.status.success();
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).env("BRIG_TEST_DIST", dist);
    if nextest {
        command.args(["nextest", "run", "--workspace", "--locked"]).args(filters);
    } else {
        say::note("cargo-nextest is not installed; cargo's own runner does as well, with less parallelism");
        command.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
        command.args(filters.first());
    }
    say::run(&mut command)
}
