//! `brig doctor`: looks whether this host has what the engine needs, and says what to do where it has not.
//!
//! Invariant: it only looks. Each line stands for itself: `ok`, `warn` (something will not work) or `fail` (nothing
//! will); the exit status is 1 when there is a `fail`.

use std::path::Path;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;

pub static COMMAND: Command = Command {
    name: "doctor",
    usage: "[OPTIONS]",
    about: "Look whether this host has what the engine needs",
    flags: &[
        Flag::text("data-root", "Where images, containers and volumes live").default("/var/lib/brigantine"),
        Flag::switch("quiet", "Show only what is not in order").short('q'),
    ],
    operands: Operands::None,
    run: runs!(run),
    ..Command::EMPTY
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug)]
struct Finding {
    verdict: Verdict,
    what: String,
    /// What to do about it.
    remedy: String,
}

fn ok(what: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Ok, what: what.into(), remedy: String::new() }
}

fn warn(what: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Warn, what: what.into(), remedy: remedy.into() }
}

fn fail(what: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Fail, what: what.into(), remedy: remedy.into() }
}

async fn run(context: &Context, matches: Matches) -> Outcome {
    let root = Path::new(matches.text("data-root")).to_owned();
    let mut findings = tokio::task::spawn_blocking(move || look(&root))
        .await
        .map_err(|error| Fault::said(format!("looking at the host broke: {error}")))?;
    findings.push(match context.client.get("/version").send().await {
        Ok(reply) => {
            let version = reply.value().await?;
            ok(format!("the engine answers: version {}", version.at("Version").text()))
        }
        Err(fault) => warn(
            format!("no engine answers: {fault}"),
            "start one: brig daemon, or systemctl start brigantine",
        ),
    });
    for finding in &findings {
        let word = match finding.verdict {
            Verdict::Ok if matches.is("quiet") => continue,
            Verdict::Ok => "ok  ",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        };
        output::line(&format!("{word}  {}", finding.what));
        if !finding.remedy.is_empty() {
            output::line(&format!("      {}", finding.remedy));
        }
    }
    if findings.iter().any(|finding| finding.verdict == Verdict::Fail) { Err(Fault::Exit(1)) } else { Ok(()) }
}

fn look(root: &Path) -> Vec<Finding> {
    let mut all = vec![privilege(), kernel(), filesystems()];
    all.extend(namespaces());
    all.push(seccomp());
    all.extend(cgroups());
    all.extend(storage(root));
    all.extend(network());
    all.extend(limits());
    all
}

fn text(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn privilege() -> Finding {
    if rustix::process::geteuid().is_root() {
        ok("running as root")
    } else {
        warn("not running as root: some checks cannot look", "sudo brig doctor")
    }
}

/// The new mount API, pidfds and openat2 are all there from 5.12 on.
fn kernel() -> Finding {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    match version(&release) {
        Some(version) if version >= (5, 12) => ok(format!("kernel {release}")),
        _ => fail(format!("kernel {release} is too old"), "install a kernel of version 5.12 or newer"),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn filesystems() -> Finding {
    let known = text("/proc/filesystems");
    if known.lines().any(|line| line.split_whitespace().last() == Some("overlay")) {
        ok("overlay file system")
    } else {
        fail("the kernel has no overlay file system", "modprobe overlay, and list it in /etc/modules-load.d")
    }
}

fn namespaces() -> Vec<Finding> {
    ["mnt", "pid", "net", "ipc", "uts", "cgroup"]
        .iter()
        .filter(|name| !Path::new("/proc/self/ns").join(name).exists())
        .map(|name| fail(format!("the kernel has no {name} namespaces"), "use a kernel that has them"))
        .chain(std::iter::once(if Path::new("/proc/self/ns/user").exists() {
            ok("namespaces")
        } else {
            warn("the kernel has no user namespaces", "idmapped mounts and rootless use need CONFIG_USER_NS")
        }))
        .collect()
}

fn seccomp() -> Finding {
    if text("/proc/sys/kernel/seccomp/actions_avail").contains("errno") {
        ok("seccomp filters")
    } else {
        fail(
            "the kernel has no seccomp filters: containers would not start",
            "use a kernel with CONFIG_SECCOMP_FILTER",
        )
    }
}

fn cgroups() -> Vec<Finding> {
    let unified = text("/sys/fs/cgroup/cgroup.controllers");
    if !unified.is_empty() {
        let missing: Vec<&str> = ["cpu", "memory", "pids", "io", "cpuset"]
            .into_iter()
            .filter(|name| !unified.split_whitespace().any(|known| known == *name))
            .collect();
        return vec![if missing.is_empty() {
            ok("control groups, version 2")
        } else {
            warn(
                format!("control groups, version 2, without {}", missing.join(", ")),
                "their limits are refused; see cgroup_disable on the kernel's command line",
            )
        }];
    }
    let mounted = text("/proc/self/cgroup");
    let has = |name: &str| {
        mounted
            .lines()
            .any(|line| line.split(':').nth(1).is_some_and(|all| all.split(',').any(|one| one == name)))
    };
    if !["memory", "pids", "devices", "freezer"].iter().any(|name| has(name)) {
        return vec![fail("no control groups are mounted", "mount -t cgroup2 none /sys/fs/cgroup")];
    }
    let missing: Vec<&str> = ["cpu", "cpuset", "memory", "pids", "devices", "freezer", "blkio"]
        .into_iter()
        .filter(|n| !has(n))
        .collect();
    vec![if missing.is_empty() {
        ok("control groups, version 1")
    } else {
        warn(
            format!("control groups, version 1, without {}", missing.join(", ")),
            "their limits are refused; on Debian, memory needs cgroup_enable=memory on the kernel's command line",
        )
    }]
}

fn storage(root: &Path) -> Vec<Finding> {
    // The nearest directory that is there.
    let Some(dir) = root.ancestors().find(|dir| dir.exists()) else { return Vec::new() };
    let shown = dir.display();
    let mut all = Vec::new();
    match rustix::fs::statvfs(dir) {
        Ok(space) => {
            let free = space.f_bavail * space.f_frsize;
            let share = space.f_favail.checked_mul(100).and_then(|n| n.checked_div(space.f_files));
            if free < 2 << 30 {
                all.push(warn(
                    format!("{shown} has {} MiB left", free >> 20),
                    "brig system prune, or another --data-root",
                ));
            } else {
                all.push(ok(format!("{shown} has {} GiB left", free >> 30)));
            }
            if share.is_some_and(|share| share < 5) {
                all.push(warn(
                    format!("{shown} is short of inodes"),
                    "brig system prune, or another --data-root",
                ));
            }
        }
        Err(error) => all.push(warn(format!("cannot look at {shown}: {error}"), "")),
    }
    let kind = mount_of(dir).unwrap_or_default();
    match kind.as_str() {
        "overlay" | "nfs" | "nfs4" | "vfat" | "ntfs" | "9p" | "fuse.sshfs" => all.push(fail(
            format!("{shown} is on {kind}, which cannot hold the layers of an overlay"),
            "choose a --data-root on ext4, xfs or btrfs",
        )),
        kind => all.push(ok(format!("{shown} is on {kind}"))),
    }
    all
}

/// The file system of the mount that a directory is in.
fn mount_of(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    text("/proc/self/mounts")
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (at, kind) = (fields.nth(1)?, fields.next()?);
            dir.starts_with(at).then(|| (at.len(), kind.to_owned()))
        })
        .max_by_key(|(length, _)| *length)
        .map(|(_, kind)| kind)
}

fn network() -> Vec<Finding> {
    let mut all = Vec::new();
    if text("/proc/sys/net/ipv4/ip_forward").trim() == "1" {
        all.push(ok("IPv4 forwarding"));
    } else {
        all.push(warn("IPv4 forwarding is off", "the daemon switches it on when it makes its first network"));
    }
    let modules = text("/proc/modules");
    let has = |name: &str| {
        modules.lines().any(|line| line.split(' ').next() == Some(name))
            || Path::new("/sys/module").join(name).exists()
    };
    if has("nf_tables") || rustix::system::uname().release().to_string_lossy().is_empty() {
        all.push(ok("nftables"));
    } else {
        all.push(warn(
            "nf_tables is not loaded",
            "modprobe nf_tables; if it is built into the kernel, nothing is wrong",
        ));
    }
    let policy = std::process::Command::new("nft").args(["list", "chains"]).output();
    if let Ok(output) = policy
        && output.status.success()
    {
        let chains = String::from_utf8_lossy(&output.stdout).into_owned();
        let drops = chains.lines().any(|line| line.contains("hook forward") && line.contains("policy drop"));
        if drops {
            all.push(warn(
                "another program's firewall drops forwarded packets by default (ufw, docker, firewalld)",
                "allow those of brig0 and br-…: docs/network.md says how",
            ));
        }
    }
    all
}

fn limits() -> Vec<Finding> {
    let mut all = Vec::new();
    let watches: u64 = text("/proc/sys/fs/inotify/max_user_instances").trim().parse().unwrap_or(128);
    if watches < 256 {
        all.push(warn(
            format!("fs.inotify.max_user_instances is {watches}: many `logs -f` at once use it up"),
            "sysctl -w fs.inotify.max_user_instances=1024",
        ));
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    if limit < 65536 {
        all.push(warn(
            format!("at most {limit} files may be open at once"),
            "LimitNOFILE=1048576 in the service's unit",
        ));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        assert_eq!(version("6.18.0-rc1"), Some((6, 18)));
        assert_eq!(version("5.10-arch"), Some((5, 10)));
        assert_eq!(version("odd"), None);
    }

    #[test]
    fn looking_does_no_harm_and_finds_something() {
        let found = look(Path::new("/var/lib/brigantine/none"));
        assert!(found.iter().any(|finding| finding.what.starts_with("kernel ")));
        assert!(found.iter().all(|finding| finding.verdict == Verdict::Ok
            || !finding.remedy.is_empty()
            || finding.what.starts_with("cannot look")));
    }
}
