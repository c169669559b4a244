//! `cargo xtask fuzz`: libFuzzer on what comes from outside, with the toolchain that builds everything else.
//!
//! Coverage is asked of the compiler by stable options; no nightly and no `cargo fuzz` is needed. What is found is to
//! be put into `fuzz/found`, which the ordinary tests read.

use std::{fs, process::Command};

use anyhow::Result;

use crate::{build, packages, root, say};

/// Instruments every branch and comparison for libFuzzer (its inline counters and table of places).
const FLAGS: &str = "--cfg fuzzing -C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 \
     -C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table \
     -C llvm-args=-sanitizer-coverage-trace-compares -C force-frame-pointers";

/// The fuzzer brings its own main part in C++.
const COMPILER: &[packages::Need] = &[("g++", &["c++"])];

/// Fuzzes `config.json` for so many seconds, from the seeds and from what earlier runs came upon.
pub fn fuzz(seconds: u32) -> Result<()> {
    packages::install(&[packages::BUILD, COMPILER])?;
    let dir = root().join("fuzz");
    let triple = build::host_triple()?;
    let target = brigantine_testkit::fixtures::target_dir().join("fuzz");
    say::step("Building the fuzz target");
    say::run(
        Command::new(env!("CARGO"))
            .current_dir(&dir)
            .args(["build", "--release", "--locked", "--quiet", "--target", &triple, "--target-dir"])
            .arg(&target)
            .env("RUSTFLAGS", FLAGS),
    )?;
    let corpus = target.join("corpus-config");
    fs::create_dir_all(&corpus)?;
    say::step(&format!("Fuzzing config.json for {seconds} s; a finding is written to {}", target.display()));
    let mut command = Command::new(target.join(triple).join("release/config"));
    command.arg(&corpus).args([dir.join("seeds"), dir.join("found")]);
    command.arg(format!("-max_total_time={seconds}"));
    command.args(["-max_len=65536", "-rss_limit_mb=1024", "-timeout=10", "-print_final_stats=1"]);
    command.arg(format!("-artifact_prefix={}/", target.display()));
    say::run(&mut command)
}
