//! The architecture as a check: who may depend on whom, and who may say `unsafe`.
//!
//! The order stands in DESIGN's crate table: dependencies go downward only. A new crate has to be put on a level here.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result, bail};
use cargo_metadata::{DependencyKind, MetadataCommand};

use crate::root;

/// What each crate may build on, directly.
const MAY_USE: &[(&str, &[&str])] = &[
    ("sys", &[]),
    ("runtime", &["sys"]),
    ("shim", &["sys", "runtime"]),
    ("image", &["sys"]),
    ("registry", &["sys", "image"]),
    ("network", &["sys"]),
    ("session", &[]),
    ("sbom", &[]),
    ("build", &["sys", "runtime", "shim", "image", "registry", "session", "sbom"]),
    ("engine", &["sys", "runtime", "shim", "image", "registry", "network", "build"]),
    (
        "api",
        &["sys", "runtime", "shim", "image", "registry", "network", "session", "sbom", "build", "engine"],
    ),
    // The client calls the Engine API; the daemon and its store's types come in through the command line alone. What
    // needs no engine (a registry, copies between registries) runs in the client.
    ("cli", &["sys", "image", "registry", "session", "build", "api"]),
    ("testkit", &["sys"]),
    ("xtask", &["sys", "testkit"]),
];

/// Crates that no shipped crate may depend on, but in its tests.
const FOR_TESTS: &[&str] = &["testkit", "xtask"];

/// One dependency within the workspace.
#[derive(Clone, Debug)]
pub struct Edge {
    pub from: String,
    pub to: String,
    /// Only its tests use it.
    pub dev: bool,
}

/// Checks the workspace as it is.
pub fn check() -> Result<()> {
    let mut wrong = faults(&edges()?);
    wrong.extend(unsafe_outside_sys(&root().join("crates"))?);
    wrong.extend(unsafe_outside_sys(&root().join("xtask"))?);
    if wrong.is_empty() { Ok(()) } else { bail!("layering:\n  {}", wrong.join("\n  ")) }
}

/// The workspace's dependencies on its own crates.
fn edges() -> Result<Vec<Edge>> {
    let metadata = MetadataCommand::new().current_dir(root()).no_deps().exec()?;
    let mut edges = Vec::new();
    for package in &metadata.packages {
        for dependency in package.dependencies.iter().filter(|d| d.path.is_some()) {
            edges.push(Edge {
                from: noun(&package.name).to_owned(),
                to: noun(&dependency.name).to_owned(),
                dev: dependency.kind == DependencyKind::Development,
            });
        }
    }
    Ok(edges)
}

fn noun(package: &str) -> &str {
    package.strip_prefix("brigantine-").unwrap_or(package)
}

/// What is wrong with these dependencies, a sentence each.
fn faults(edges: &[Edge]) -> Vec<String> {
    let rules: BTreeMap<_, _> = MAY_USE.iter().copied().collect();
    let mut wrong = Vec::new();
    for Edge { from, to, dev } in edges {
        let Some(allowed) = rules.get(from.as_str()) else {
            wrong.push(format!("{from} has no place in the order of crates (xtask/src/layering.rs)"));
            continue;
        };
        if FOR_TESTS.contains(&to.as_str()) {
            if !dev && !FOR_TESTS.contains(&from.as_str()) {
                wrong.push(format!("{from} ships, so it may use {to} in its tests only"));
            }
        } else if !allowed.contains(&to.as_str()) {
            wrong.push(format!("{from} may not depend on {to}: it is not below it"));
        }
    }
    wrong
}

/// Files outside `crates/sys` that say `unsafe` in code, or lift the lint against it.
fn unsafe_outside_sys(dir: &Path) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            if path != root().join("crates/sys") {
                wrong.extend(unsafe_outside_sys(&path)?);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            let lines = unsafe_lines(&fs::read_to_string(&path)?);
            wrong.extend(
                lines.iter().map(|n| format!("{}:{n}: unsafe belongs into crates/sys", path.display())),
            );
        }
    }
    Ok(wrong)
}

/// The numbers of the lines that have unsafe code in them.
fn unsafe_lines(source: &str) -> Vec<usize> {
    // Spelled so that this file does not find itself.
    let marks = ["{", "fn ", "impl ", "trait ", "extern "].map(|rest| format!("{} {rest}", "unsafe"));
    let lint = format!("allow({}_code", "unsafe");
    source
        .lines()
        .enumerate()
        .filter(|(_, line)| {
            let code = line.trim_start();
            !code.starts_with("//") && (marks.iter().any(|m| code.contains(m)) || code.contains(&lint))
        })
        .map(|(i, _)| i + 1)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_keeps_its_layers() {
        check().unwrap();
    }

    #[test]
    fn an_upward_dependency_is_found() {
        let edge = |from: &str, to: &str, dev| Edge { from: from.into(), to: to.into(), dev };
        assert_eq!(faults(&[edge("sys", "engine", false)]).len(), 1);
        assert_eq!(faults(&[edge("image", "registry", true)]).len(), 1);
        assert_eq!(faults(&[edge("cli", "engine", false)]).len(), 1);
        assert_eq!(faults(&[edge("engine", "testkit", false)]).len(), 1);
        assert_eq!(faults(&[edge("novel", "sys", false)]).len(), 1);
        assert!(faults(&[edge("engine", "testkit", true), edge("engine", "shim", false)]).is_empty());
    }

    #[test]
    fn every_crate_of_the_workspace_has_rules() {
        for edge in edges().unwrap() {
            assert!(MAY_USE.iter().any(|(name, _)| *name == edge.from), "{}", edge.from);
        }
    }

    #[test]
    fn code_that_says_unsafe_is_found_and_a_comment_is_not() {
        let word = "unsafe";
        let source = format!(
            "// {word} {{ }}\nlet x = {word} {{ y() }};\n{word} fn f() {{}}\n#![allow({word}_code)]\n"
        );
        assert_eq!(unsafe_lines(&source), [2, 3, 4]);
    }
}
