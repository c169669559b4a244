//! What a container may leave behind, as a list of lines that can be compared: after `rm`, none may be new.
//!
//! The lists are complete rather than clever: every process and mount of the sandbox, every cgroup below its parent,
//! every interface, every element of every firewall set and map, every namespace the daemon holds, every file outside
//! the image store and the database.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde_json::Value;

use crate::Engine;

/// What there is at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// How often each line was seen.
    lines: BTreeMap<String, usize>,
}

impl Snapshot {
    /// Looks at everything of this engine.
    pub fn take(engine: &Engine) -> Self {
        let mut lines = BTreeMap::new();
        let mut add = |line: String| *lines.entry(line).or_default() += 1;
        let sandbox = engine.sandbox();
        for (_, line) in sandbox.processes() {
            // The daemon may be another one by now, with other threads' helpers: what counts is what it runs.
            add(format!("process: {line}"));
        }
        // Docker keeps the host's network bound there from the first use of `--network host` on.
        for line in sandbox.mounts().into_iter().filter(|l| !l.ends_with("/netns/default nsfs")) {
            add(format!("mount: {line}"));
        }
        for dir in sandbox.cgroups() {
            add(format!("cgroup: {}", dir.display()));
        }
        for name in interfaces(engine) {
            add(format!("interface: {name}"));
        }
        for line in firewall(engine) {
            add(format!("firewall: {line}"));
        }
        for line in namespaces(engine) {
            add(format!("namespace held by the daemon: {line}"));
        }
        if !engine.is_peer() {
            for root in [engine.data_root().join("containers"), engine.exec_root()] {
                for path in files(&root) {
                    add(format!("file: {path}"));
                }
            }
        }
        Self { lines }
    }

    /// What is here and was not (or not as often) in `earlier`.
    pub fn beyond(&self, earlier: &Self) -> Vec<String> {
        self.lines
            .iter()
            .filter(|(line, n)| **n > earlier.lines.get(*line).copied().unwrap_or(0))
            .map(|(line, n)| if *n == 1 { line.clone() } else { format!("{line} ({n} times)") })
            .collect()
    }
}

/// Interfaces of the engine's network; the default bridge stays, whenever it is made.
fn interfaces(engine: &Engine) -> BTreeSet<String> {
    let Ok(output) = engine.sandbox().net_command("ip").args(["-j", "link"]).output() else {
        return BTreeSet::new();
    };
    let list: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let names = list.as_array().into_iter().flatten().filter_map(|l| l["ifname"].as_str());
    names.filter(|n| !["brig0", "docker0"].contains(n)).map(str::to_owned).collect()
}

/// Every element of every set and map, and (for a peer, which has no sets) every rule.
fn firewall(engine: &Engine) -> Vec<String> {
    let Ok(output) = engine.sandbox().net_command("nft").args(["-j", "list", "ruleset"]).output() else {
        return vec![];
    };
    let ruleset: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let mut lines = Vec::new();
    for object in ruleset["nftables"].as_array().into_iter().flatten() {
        for kind in ["set", "map"] {
            let set = &object[kind];
            for element in set["elem"].as_array().into_iter().flatten() {
                lines.push(format!("{kind} {} {}: {element}", set["table"], set["name"]));
            }
        }
        if engine.is_peer() && object["rule"].is_object() {
            let rule = &object["rule"];
            lines.push(format!("rule in {} {}", rule["table"], rule["chain"]));
        }
    }
    lines
}

/// Network, mount and PID namespaces that the daemon keeps alive by a descriptor, by kind only: a pool may replace one
/// by another.
fn namespaces(engine: &Engine) -> Vec<String> {
    let dir = format!("/proc/{}/fd", engine.daemon_pid());
    let links =
        fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| fs::read_link(e.path()).ok());
    links
        .filter_map(|l| l.to_str().and_then(|l| l.split_once(":[")).map(|(kind, _)| kind.to_owned()))
        .filter(|kind| ["net", "mnt", "pid", "ipc", "uts", "user", "cgroup"].contains(&kind.as_str()))
        .collect()
}

/// Every path below `root`, relative to it.
fn files(root: &Path) -> Vec<String> {
    fn walk(root: &Path, at: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(at).into_iter().flatten().flatten() {
            let path = entry.path();
            found.push(path.strip_prefix(root).unwrap_or(&path).display().to_string());
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                walk(root, &path, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(root, root, &mut found);
    found
}
