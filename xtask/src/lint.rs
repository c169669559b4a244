//! `cargo xtask lint`: what CI insists on besides tests.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{layering, packages, root, say};

/// Checks everything and reports all failures, not only the first.
pub fn lint() -> Result<()> {
    let mut failed = Vec::new();
    let mut check = |what: &str, done: Result<()>| {
        if let Err(e) = done {
            say::error(&e);
            failed.push(what.to_owned());
        }
    };
    let cargo = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO"));
        command.current_dir(root()).args(args);
        say::run(&mut command)
    };
    say::step("Format");
    check("format", cargo(&["fmt", "--all", "--check"]));
    say::step("Layering");
    check("layering", layering::check());
    say::step("Clippy");
    packages::install(&[packages::BUILD])?;
    check(
        "clippy",
        cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--quiet", "--", "-D", "warnings"]),
    );
    if packages::there("cargo-deny") {
        say::step("Licences and sources of dependencies");
        check("dependencies", cargo(&["deny", "--offline", "check", "bans", "licenses", "sources"]));
    } else {
        say::note(
            "cargo-deny is not installed: dependencies' licences not checked (cargo install cargo-deny)",
        );
    }
    if failed.is_empty() { Ok(()) } else { bail!("lint failed: {}", failed.join(", ")) }
}
