//! Debian packages that a command needs: looked up first, installed only when missing, and said so.

use std::{path::Path, process::Command};

use anyhow::{Result, bail};

use crate::say;

/// A file whose presence shows that a package (or an equal of another origin) is there.
pub type Need = (&'static str, &'static [&'static str]);

/// What `cargo xtask build` needs besides Rust: bundled C code is compiled.
pub const BUILD: &[Need] = &[("gcc", &["cc"]), ("libc6-dev", &["/usr/include/stdlib.h"])];

/// What makes a root file system and images without a registry.
pub const IMAGES: &[Need] =
    &[("mmdebstrap", &["mmdebstrap"]), ("ca-certificates", &["/etc/ssl/certs/ca-certificates.crt"])];

/// What the test suite drives, looks with or talks to.
pub const TEST: &[Need] = &[
    ("docker.io", &["docker", "dockerd"]),
    ("busybox-static", &["busybox"]),
    ("iproute2", &["ip"]),
    ("nftables", &["nft"]),
    ("iptables", &["iptables-nft-restore", "iptables-legacy-restore"]),
    ("containernetworking-plugins", &["/usr/lib/cni/bridge"]),
    ("firewalld", &["firewalld"]),
    ("ufw", &["ufw"]),
    ("bind9-dnsutils", &["dig"]),
    ("curl", &["curl"]),
    ("git", &["git"]),
    ("iperf3", &["iperf3"]),
    ("util-linux", &["unshare", "nsenter", "setsid"]),
    ("docker-registry", &["docker-registry"]),
    ("skopeo", &["skopeo"]),
    ("umoci", &["umoci"]),
    ("xz-utils", &["xz"]),
    ("bzip2", &["bzip2"]),
    ("zstd", &["zstd"]),
    ("procps", &["ps"]),
    ("dpkg-dev", &["dpkg-scanpackages"]),
    ("uidmap", &["newuidmap"]),
    ("dbus-daemon", &["dbus-daemon"]),
    ("python3-dbus", &["/usr/lib/python3/dist-packages/dbus/__init__.py"]),
    ("python3-gi", &["/usr/lib/python3/dist-packages/gi/__init__.py"]),
    ("runc", &["runc"]),
    ("crun", &["crun"]),
    ("containerd", &["containerd", "ctr"]),
    ("podman", &["podman"]),
    ("docker-compose", &["docker-compose"]),
    ("openssl", &["openssl"]),
    ("qemu-user-static", &["qemu-aarch64-static"]),
    ("e2fsprogs", &["mkfs.ext4"]),
    ("xfsprogs", &["mkfs.xfs"]),
];

/// What `bench network` loads networks with.
pub const LOAD: &[Need] = &[("iperf3", &["iperf3"]), ("wrk", &["wrk"]), ("nginx-light", &["nginx"])];

/// What `bench build` builds with besides.
pub const PEERS: &[Need] = &[("buildah", &["buildah"])];

/// What the demo's private network needs.
pub const DEMO: &[Need] = &[("iproute2", &["ip"]), ("util-linux", &["unshare", "nsenter"])];

/// Installs those that are missing.
pub fn install(needs: &[&[Need]]) -> Result<()> {
    let mut missing: Vec<_> =
        needs.iter().copied().flatten().filter(|n| !n.1.iter().all(|f| there(f))).map(|n| n.0).collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    if !there("apt-get") {
        bail!(
            "these programs are needed, and there is no apt-get to install them with: {}",
            missing.join(", ")
        );
    }
    say::step(&format!("Installing Debian packages that are missing: {}", missing.join(" ")));
    // A daemon that a package brings must not be started: nothing here uses the system's.
    let guard = PolicyGuard::new()?;
    say::run(Command::new("apt-get").args(["update", "-qq"]))?;
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command.args(["install", "-qq", "-y", "--no-install-recommends"]).args(missing);
    let done = say::run(command.stdin(std::process::Stdio::null()));
    guard.lift()?;
    done
}

/// Whether a program is on `$PATH` or an absolute path exists.
pub fn there(file: &str) -> bool {
    if file.starts_with('/') {
        return Path::new(file).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(file).is_file())
}

/// Keeps maintainer scripts from starting services, by Debian's `policy-rc.d` interface.
struct PolicyGuard {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl PolicyGuard {
    fn new() -> Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        if Path::new(POLICY).exists() {
            return Ok(Self { ours: false });
        }
        std::fs::write(POLICY, "#!/bin/sh\nexit 101\n")?;
        std::fs::set_permissions(POLICY, std::fs::Permissions::from_mode(0o755))?;
        Ok(Self { ours: true })
    }

    fn lift(self) -> Result<()> {
        if self.ours {
            std::fs::remove_file(POLICY)?;
        }
        Ok(())
    }
}
