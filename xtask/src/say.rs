//! The only place of xtask that prints.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a developer's tool talks to its user")]

use std::{
    ffi::OsStr,
    process::{Command, Output},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// A line on standard output.
pub fn line(text: &str) -> Result<()> {
    println!("{text}");
    Ok(())
}

/// A step's headline.
pub fn step(text: &str) {
    println!("\x1b[1m==> {text}\x1b[0m");
}

/// A remark.
pub fn note(text: &str) {
    println!("    {text}");
}

/// Indented text of somebody else.
pub fn quote(text: &str) {
    for line in text.trim_end().lines() {
        println!("  | {line}");
    }
}

/// The last word of a command that failed.
pub fn error(e: &anyhow::Error) {
    eprintln!("xtask: {e:#}");
}

/// A command as one would type it.
pub fn spelled(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Shows the command, runs it with this process's own input and output, insists on success.
pub fn run(command: &mut Command) -> Result<()> {
    println!("  $ {}", spelled(command));
    let status =
        command.status().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{} ended with {status}", spelled(command));
    }
    Ok(())
}

/// Runs the command, insists on success, returns what it printed.
pub fn read(command: &mut Command) -> Result<String> {
    let output = capture(command)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} ended with {}: {}", spelled(command), output.status, said.trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs the command and returns everything, success or not.
pub fn capture(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| format!("cannot run {}", command.get_program().display()))
}

/// How long `work` took, with its result.
pub fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let began = Instant::now();
    let done = work()?;
    Ok((done, began.elapsed()))
}
