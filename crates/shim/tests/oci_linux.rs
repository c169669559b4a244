//! The Linux part of the runtime specification: namespaces, mounts, process attributes. Filters of system calls are in `oci_seccomp`.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};

use bundle::Bundle;
use serde_json::{Value, json};

fn run(bundle: &Bundle) -> String {
    bundle.good(&["run", "--bundle", bundle.dir(), &bundle.id])
}

fn refusal(bundle: &Bundle) -> String {
    let says = bundle.bad(&["run", "--bundle", bundle.dir(), &bundle.id]);
    bundle.assert_nothing_left();
    says
}

fn namespaces(bundle: &Bundle, change: impl FnOnce(&mut Vec<Value>)) {
    bundle.configure(|c| change(c["linux"]["namespaces"].as_array_mut().unwrap()));
}

fn applet(bundle: &Bundle, name: &str) {
    symlink("busybox", bundle.root().join("bin").join(name)).unwrap();
}

/// A process in namespaces of its own, for others to join; ended when dropped.
struct Holder(Child);

impl Holder {
    fn new(options: &[&str]) -> Self {
        let mut command = Command::new("unshare");
        command.args(options).args(["sh", "-c", "echo ready; exec cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        Self(child)
    }

    fn path(&self, name: &str) -> String {
        format!("/proc/{}/ns/{name}", self.0.id())
    }

    fn namespace(&self, name: &str) -> String {
        fs::read_link(self.path(name)).unwrap().display().to_string()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // The end of its input is its end.
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn namespaces_are_joined_by_path() {
    let holder = Holder::new(&["--net", "--uts", "--ipc", "--mount", "--cgroup", "--time"]);
    let bundle = Bundle::new(&[
        "/bin/sh",
        "-c",
        "for n in net uts ipc mnt cgroup time; do readlink /proc/self/ns/$n; done",
    ]);
    bundle.configure(|c| drop(c.as_object_mut().unwrap().remove("hostname")));
    namespaces(&bundle, |list| {
        *list = vec![json!({"type": "pid"})];
        for (typ, name) in [
            ("network", "net"),
            ("uts", "uts"),
            ("ipc", "ipc"),
            ("mount", "mnt"),
            ("cgroup", "cgroup"),
            ("time", "time_for_children"),
        ] {
            list.push(json!({"type": typ, "path": holder.path(name)}));
        }
    });
    let all = ["net", "uts", "ipc", "mnt", "cgroup", "time_for_children"].map(|n| holder.namespace(n));
    let wanted = all.map(|n| n.replace("time_for_children", "time")).join("\n");
    assert_eq!(run(&bundle).trim(), wanted);
    namespaces(&bundle, |list| list[1] = json!({"type": "network", "path": "/no/such/namespace"}));
    assert!(
        refusal(&bundle)
            .contains("opening the net namespace \"/no/such/namespace\": no such file or directory")
    );
    namespaces(&bundle, |list| list[1] = json!({"type": "network", "path": "/proc/self/ns/uts"}));
    assert!(refusal(&bundle).contains("entering the net namespace: invalid argument"));
}

#[test]
fn a_user_namespace_is_joined_with_what_belongs_to_it() {
    let holder = Holder::new(&["--user", "--net", "--uts"]);
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{map}", holder.0.id()), "0 100000 1000").unwrap();
    }
    let script = "id -u; id -g; readlink /proc/self/ns/user; readlink /proc/self/ns/net; echo $$; \
                  cat /proc/self/uid_map; ls -ln /file | cut -c1-30; echo x >/made && echo x >/dev/null; hostname changed && hostname";
    let bundle = Bundle::new(&["/bin/sh", "-c", script]);
    applet(&bundle, "cut");
    let root = bundle.root();
    fs::write(root.join("file"), "").unwrap();
    for path in [&root.join("file"), &root] {
        std::os::unix::fs::chown(path, Some(100_000), Some(100_000)).unwrap();
    }
    // The way to the bundle must be open to the mapped user.
    fs::set_permissions(bundle.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    bundle.configure(|c| {
        let caps = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
        c["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    });
    namespaces(&bundle, |list| {
        *list = vec![json!({"type": "pid"}), json!({"type": "mount"}), json!({"type": "ipc"})];
        for (typ, name) in [("network", "net"), ("uts", "uts"), ("user", "user")] {
            list.push(json!({"type": typ, "path": holder.path(name)}));
        }
    });
    let out = run(&bundle);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..5], ["0", "0", &holder.namespace("user"), &holder.namespace("net"), "1"], "{out}");
    assert!(lines[5].split_whitespace().eq(["0", "100000", "1000"]), "{out}");
    assert!(lines[6].contains(" 0 ") && lines[7] == "changed", "{out}");
    assert_eq!(fs::metadata(root.join("made")).unwrap().uid(), 100_000);
    bundle.assert_nothing_left();

    let bundle2 = Bundle::new(&["/bin/sleep", "1000"]);
    fs::set_permissions(bundle2.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(bundle2.path("config.json"), fs::read(bundle.path("config.json")).unwrap()).unwrap();
    bundle2.configure(|c| {
        c["process"]["args"] = json!(["/bin/sleep", "1000"]);
        c["linux"]["cgroupsPath"] = json!(format!("/{}", bundle2.id));
    });
    bundle2.good(&["run", "-d", "--bundle", bundle2.dir(), &bundle2.id]);
    assert_eq!(
        bundle2.good(&["exec", &bundle2.id, "readlink", "/proc/self/ns/user"]).trim(),
        holder.namespace("user")
    );
    bundle2.good(&["delete", "--force", &bundle2.id]);
    bundle2.assert_nothing_left();
}

#[test]
fn clocks_have_their_offsets() {
    let bundle = Bundle::new(&[
        "/bin/sh",
        "-c",
        "cat /proc/uptime; readlink /proc/self/ns/time; cat /proc/self/timens_offsets",
    ]);
    namespaces(&bundle, |list| list.push(json!({"type": "time"})));
    bundle.configure(|c| {
        c["linux"]["timeOffsets"] =
            json!({"boottime": {"secs": 7_777_777}, "monotonic": {"secs": -5, "nanosecs": 9}});
    });
    let out = run(&bundle);
    let uptime: f64 = out.split_whitespace().next().unwrap().parse().unwrap();
    let own: f64 =
        fs::read_to_string("/proc/uptime").unwrap().split_whitespace().next().unwrap().parse().unwrap();
    assert!((uptime - own - 7_777_777.0).abs() < 60.0, "{uptime} {own}");
    assert!(!out.contains(fs::read_link("/proc/self/ns/time").unwrap().to_str().unwrap()), "{out}");
    let words: Vec<&str> = out.split_whitespace().collect();
    assert!(words.ends_with(&["monotonic", "-5", "9", "boottime", "7777777", "0"]), "{out}");
    bundle.configure(|c| c["linux"]["timeOffsets"] = json!({"realtime": {"secs": 1}}));
    assert!(refusal(&bundle).contains("clock \"realtime\""));
    bundle.configure(|c| c["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1}}));
    namespaces(&bundle, |list| list.retain(|n| n["type"] != "time"));
    assert!(refusal(&bundle).contains("timeOffsets need a new time namespace"));
}

#[test]
fn ids_of_a_mount_are_mapped() {
    let bundle = Bundle::new(&["/bin/sh", "-c", "ls -ln /data/f /data/sub/g; echo x >/data/new"]);
    let source = bundle.path("source");
    fs::create_dir_all(format!("{source}/sub")).unwrap();
    for file in ["f", "sub/g"] {
        fs::write(format!("{source}/{file}"), "").unwrap();
        std::os::unix::fs::chown(format!("{source}/{file}"), Some(1), Some(2)).unwrap();
    }
    let map = |inside: u32| json!([{"containerID": 0, "hostID": inside, "size": 10}]);
    let mount = |options: &[&str], maps: bool| {
        let mut mount = json!({"destination": "/data", "type": "bind", "source": source, "options": options});
        if maps {
            mount["uidMappings"] = map(5000);
            mount["gidMappings"] = map(6000);
        }
        bundle.configure(|c| {
            let list = c["mounts"].as_array_mut().unwrap();
            list.retain(|m| m["destination"] != "/data");
            list.push(mount);
        });
    };
    mount(&["bind", "idmap"], true);
    // What is 1 in the file system is 5001 here, and root's new file is nobody's there that is mapped.
    let done = bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]);
    assert_eq!(done.out.matches(" 5001 ").count(), 2, "{done:?}");
    assert_eq!(done.out.matches(" 6002 ").count(), 2, "{done:?}");
    assert!(
        done.err.contains("Value too large") && !fs::exists(format!("{source}/new")).unwrap(),
        "{done:?}"
    );
    mount(&["rbind", "ridmap", "ro"], true);
    assert!(bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]).out.contains(" 5001 "));
    mount(&["bind", "idmap"], false);
    assert!(refusal(&bundle).contains("needs uidMappings and gidMappings"));
    bundle.configure(|c| {
        let list = c["mounts"].as_array_mut().unwrap();
        list.retain(|m| m["destination"] != "/data");
        list.push(json!({"destination": "/data", "type": "tmpfs", "source": "t", "options": ["idmap"]}));
    });
    assert!(refusal(&bundle).contains("only supported for bind mounts"));
    // In a user namespace, its maps are taken: files of the host's user 1 are user 1's inside.
    bundle.configure(|c| {
        let list = c["mounts"].as_array_mut().unwrap();
        list.retain(|m| m["destination"] != "/data");
        list.push(
            json!({"destination": "/data", "type": "bind", "source": source, "options": ["bind", "idmap"]}),
        );
        let wide = json!([{"containerID": 0, "hostID": 200_000, "size": 1000}]);
        c["linux"]["uidMappings"] = wide.clone();
        c["linux"]["gidMappings"] = wide;
    });
    namespaces(&bundle, |list| list.push(json!({"type": "user"})));
    fs::set_permissions(bundle.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    let out = bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]);
    assert_eq!(out.out.matches(" 1 1        2 ").count(), 2, "{out:?}");
    bundle.assert_nothing_left();
}

#[test]
fn attributes_hold_for_mounts_below() {
    let holder = Holder::new(&["--mount"]);
    let bundle = Bundle::new(&[
        "/bin/sh",
        "-c",
        "echo x >/data/top; echo x >/data/sub/f; grep /data /proc/self/mountinfo",
    ]);
    let source = bundle.path("source");
    fs::create_dir_all(format!("{source}/sub")).unwrap();
    let options = |options: &[&str]| {
        bundle.configure(|c| {
            let list = c["mounts"].as_array_mut().unwrap();
            list.retain(|m| m["destination"] != "/data");
            list.push(json!({"destination": "/data", "type": "bind", "source": source, "options": options}));
        });
        // With a mount below the source, in a mount namespace that nobody else sees.
        let words = format!(
            "nsenter --mount={} sh -c 'mountpoint -q {source}/sub || mount -t tmpfs inner {source}/sub; \
             exec {} --root {}/state run --bundle {2} {}' 2>&1",
            holder.path("mnt"),
            bundle.exe.display(),
            bundle.dir(),
            bundle.id
        );
        let done = Command::new("sh").args(["-c", &words]).output().unwrap();
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    let out = options(&["rbind", "rro", "rnosuid", "rnoexec"]);
    assert_eq!(out.matches("Read-only file system").count(), 2, "{out}");
    assert_eq!(out.matches(" ro,nosuid,noexec,relatime").count(), 2, "{out}");
    let out = options(&["rbind", "ro"]);
    assert_eq!(out.matches("Read-only file system").count(), 1, "{out}");
    let out = options(&["bind"]);
    assert_eq!(out.matches("/data").count(), 1, "{out}");
    bundle.assert_nothing_left();
}

#[test]
fn a_bind_mount_has_what_is_named_and_what_its_source_forbids_to_user_namespaces() {
    let holder = Holder::new(&["--mount"]);
    let bundle = Bundle::new(&["/bin/sh", "-c", "grep ' /data ' /proc/self/mountinfo"]);
    fs::set_permissions(bundle.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    let source = bundle.path("source");
    fs::create_dir(&source).unwrap();
    // With a source of those attributes, in a mount namespace that nobody else sees.
    let run = |have: &str, options: &[&str]| {
        bundle.configure(|c| {
            let list = c["mounts"].as_array_mut().unwrap();
            list.retain(|m| m["destination"] != "/data");
            list.push(json!({"destination": "/data", "type": "bind", "source": source, "options": options}));
        });
        let words = format!(
            "nsenter --mount={} sh -c 'umount -q {source}; mount -t tmpfs inner {source} && \
             mount -o remount,bind,{have} {source} && \
             exec {} --root {}/state run --bundle {2} {}' 2>&1",
            holder.path("mnt"),
            bundle.exe.display(),
            bundle.dir(),
            bundle.id
        );
        let done = Command::new("sh").args(["-c", &words]).output().unwrap();
        let out = String::from_utf8_lossy(&done.stdout).into_owned();
        out.split(' ').nth(5).filter(|_| done.status.success()).map(str::to_owned).ok_or(out)
    };
    let has = |have: &str, options: &[&str], wanted: &str| {
        assert_eq!(run(have, options).as_deref(), Ok(wanted), "{have} {options:?}");
    };
    has("ro,nosuid,noatime", &["bind"], "ro,nosuid,noatime");
    has("ro,nosuid,noatime", &["bind", "noexec"], "rw,noexec,noatime");
    has("ro,nosuid,noatime", &["bind", "rw", "atime"], "rw,noatime");
    has("noexec,noatime", &["bind", "ro", "nodiratime"], "ro,nodiratime,relatime");
    has("noexec,noatime", &["rbind", "rro"], "ro,noexec,noatime");
    let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    bundle.configure(|c| {
        c["linux"]["uidMappings"] = ids.clone();
        c["linux"]["gidMappings"] = ids;
    });
    namespaces(&bundle, |list| list.push(json!({"type": "user"})));
    has("ro,nosuid,noatime", &["bind"], "ro,nosuid,noatime");
    has("ro,nosuid,noatime", &["bind", "noexec"], "ro,nosuid,noexec,noatime");
    has("noexec,noatime", &["bind", "rw", "atime"], "rw,noexec,noatime");
    for (have, options, which) in [
        ("ro", ["bind", "rw"], "ro"),
        ("nodev", ["bind", "dev"], "nodev"),
        ("noatime", ["bind", "relatime"], "access times"),
    ] {
        let says = run(have, &options).unwrap_err();
        let wanted =
            format!("{which} of its source cannot be changed for a user namespace: operation not permitted");
        assert!(says.contains(&wanted), "{says}");
    }
    bundle.assert_nothing_left();
}

/// The process is in its group of the unified hierarchy by then.
#[test]
fn maps_that_the_kernel_refuses_leave_nothing() {
    let bundle = Bundle::new(&["/bin/true"]);
    let twice = json!([
        {"containerID": 0, "hostID": 100_000, "size": 10},
        {"containerID": 5, "hostID": 200_000, "size": 10},
    ]);
    bundle.configure(|c| {
        c["linux"]["uidMappings"] = twice.clone();
        c["linux"]["gidMappings"] = twice;
    });
    namespaces(&bundle, |list| list.push(json!({"type": "user"})));
    let says = refusal(&bundle);
    assert!(says.contains("gid_map of the container's process: invalid argument"), "{says}");
}

#[test]
fn a_tmpfs_begins_with_what_it_covers() {
    let bundle = Bundle::new(&[
        "/bin/sh",
        "-c",
        "ls -lnR /etc; cat /etc/deep/file; echo more >>/etc/deep/file; readlink /etc/link",
    ]);
    let etc = bundle.root().join("etc");
    fs::create_dir(etc.join("deep")).unwrap();
    fs::write(etc.join("deep/file"), "content\n").unwrap();
    std::os::unix::fs::chown(etc.join("deep/file"), Some(12), Some(34)).unwrap();
    fs::set_permissions(etc.join("deep/file"), fs::Permissions::from_mode(0o4751)).unwrap();
    symlink("/outside", etc.join("link")).unwrap();
    bundle.configure(|c| {
        c["mounts"].as_array_mut().unwrap().push(json!(
            {"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "nosuid"]}));
    });
    let out = run(&bundle);
    assert!(
        out.contains("-rwsr-x--x    1 12       34 ")
            && out.contains("content\n")
            && out.ends_with("/outside\n"),
        "{out}"
    );
    assert_eq!(fs::read_to_string(etc.join("deep/file")).unwrap(), "content\n");
    bundle.configure(|c| c["mounts"][3]["type"] = json!("ramfs"));
    assert!(refusal(&bundle).contains("tmpcopyup is for tmpfs only"));
}

#[test]
fn propagation_is_as_asked_for() {
    for (word, shows) in
        [("rslave", "master:"), ("rshared", "shared:"), ("rprivate", ""), ("runbindable", "unbindable")]
    {
        let bundle = Bundle::new(&["/bin/grep", " /data ", "/proc/self/mountinfo"]);
        let source = bundle.path("source");
        fs::create_dir(&source).unwrap();
        bundle.configure(|c| {
            c["mounts"].as_array_mut().unwrap().push(json!(
                {"destination": "/data", "type": "bind", "source": source, "options": ["rbind", word]}));
        });
        // The source is a mount that is shared with its namespace's others.
        let words = format!(
            "mount --make-rprivate / && mount --bind {source} {source} && mount --make-shared {source} && \
             exec {} --root {}/state run --bundle {1} {}",
            bundle.exe.display(),
            bundle.dir(),
            bundle.id
        );
        let done = Command::new("unshare").args(["--mount", "sh", "-c", &words]).output().unwrap();
        let out = String::from_utf8_lossy(&done.stdout).into_owned();
        let fields: Vec<&str> = out.split(" - ").next().unwrap().split(' ').skip(6).collect();
        let fits = if shows.is_empty() {
            fields.is_empty()
        } else {
            fields.len() == 1 && fields[0].starts_with(shows)
        };
        assert!(fits, "{word}: {out} {}", String::from_utf8_lossy(&done.stderr));
    }
}

#[test]
fn process_attributes_reach_the_program() {
    let script = "cat /proc/sys/kernel/domainname; grep -E '^(policy|prio) ' /proc/self/sched; uname -m; \
                  grep -m1 -o 'bind[=:0-9a-z]*' /proc/self/numa_maps; ionice; grep Cpus_allowed_list /proc/self/status";
    let bundle = Bundle::new(&["/bin/sh", "-c", script]);
    for name in ["uname", "ionice", "cut"] {
        applet(&bundle, name);
    }
    bundle.configure(|c| {
        c["domainname"] = json!("example.org");
        c["process"]["scheduler"] =
            json!({"policy": "SCHED_BATCH", "nice": 7, "flags": ["SCHED_RESET_ON_FORK"]});
        c["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
        c["linux"]["personality"] = json!({"domain": "LINUX32"});
        c["linux"]["memoryPolicy"] =
            json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]});
    });
    let out = run(&bundle);
    for part in ["example.org\n", "i686\n", "bind=static:0\n", "idle"] {
        assert!(out.contains(part), "{part:?}: {out}");
    }
    bundle.configure(|c| c["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "700"}));
    assert!(refusal(&bundle).contains("setting the memory policy: invalid argument"));
    bundle.configure(|c| c["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "x"}));
    assert!(refusal(&bundle).contains("invalid memory policy nodes: \"x\""));
    bundle.configure(|c| {
        drop(c["linux"].as_object_mut().unwrap().remove("memoryPolicy"));
        c["linux"]["intelRdt"] = json!({"closID": "x"});
    });
    if !fs::exists("/sys/fs/resctrl/schemata").unwrap() {
        assert!(refusal(&bundle).contains("no resctrl file system is mounted"), "honest where there is none");
    }
}

#[test]
fn network_devices_move_in_with_their_addresses() {
    let script = "cat /sys/class/net/inside/flags; ip -o addr show dev inside; ls /sys/class/net";
    let bundle = Bundle::new(&["/bin/sh", "-c", script]);
    applet(&bundle, "ip");
    bundle.configure(|c| {
        c["mounts"]
            .as_array_mut()
            .unwrap()
            .push(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}));
        c["linux"]["netDevices"] = json!({"outside": {"name": "inside"}});
    });
    let run = |setup: &str| {
        let words = format!(
            "{setup} {} --root {}/state run --bundle {1} {} 2>&1; ip -o link show",
            bundle.exe.display(),
            bundle.dir(),
            bundle.id
        );
        let done = Command::new("unshare").args(["--net", "sh", "-c", &words]).output().unwrap();
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    let out = run("ip link add outside type veth peer name other && ip link set other up && \
                   ip addr add 10.77.0.5/24 dev outside && ip addr add fd77::5/64 dev outside nodad &&");
    assert!(out.contains("inet 10.77.0.5/24") && out.contains("inet6 fd77::5/64"), "{out}");
    assert!(out.starts_with("0x1003\n") && !out.contains(": outside"), "{out}");
    let out = run("");
    assert!(
        out.contains("moving network device \"outside\" into the container as \"inside\": no such device"),
        "{out}"
    );
    bundle.assert_nothing_left();
    bundle.configure(|c| c["linux"]["netDevices"] = json!({"a/b": {}}));
    assert!(refusal(&bundle).contains("\"a/b\" is not an interface's name"));
    bundle.configure(|c| c["linux"]["netDevices"] = json!({"outside": {}}));
    namespaces(&bundle, |list| list.retain(|n| n["type"] != "network"));
    assert!(refusal(&bundle).contains("network namespace"));
}

#[test]
fn a_missing_mount_point_behind_a_link_to_nothing_is_made_inside() {
    let bundle = Bundle::new(&["/bin/sh", "-c", "cat /link/file; cat /real/deep/file"]);
    let source = bundle.path("source");
    fs::create_dir(&source).unwrap();
    fs::File::create(format!("{source}/file")).unwrap().write_all(b"text\n").unwrap();
    symlink("/../../real/deep", bundle.root().join("link")).unwrap();
    bundle.configure(|c| {
        c["mounts"].as_array_mut().unwrap().push(json!(
            {"destination": "/link", "type": "bind", "source": source, "options": ["bind"]}));
    });
    assert_eq!(run(&bundle), "text\ntext\n");
    assert!(bundle.root().join("real/deep").is_dir());
}

fn with_user_namespace(bundle: &Bundle) {
    bundle.configure(|c| {
        c["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        for maps in ["uidMappings", "gidMappings"] {
            c["linux"][maps] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
        }
    });
    fs::set_permissions(bundle.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    Command::new("chown").args(["-hR", "100000:100000"]).arg(bundle.root()).status().unwrap();
}

#[test]
fn sources_inside_the_root_are_taken_as_earlier_mounts_left_them() {
    for (user, mapped) in [(false, false), (true, false), (false, true), (true, true)] {
        let script = "cat /final/file; stat -c %u /final/file; grep -c ' /final ' /proc/self/mountinfo; cat /stolen/passwd || echo none";
        let bundle = Bundle::new(&["/bin/sh", "-c", script]);
        applet(&bundle, "stat");
        let (root, outside) = (bundle.root().canonicalize().unwrap(), bundle.path("outside"));
        fs::create_dir(&outside).unwrap();
        fs::write(format!("{outside}/file"), "from outside\n").unwrap();
        // A link of the image's leads to its own files, not to the host's.
        symlink("/etc", root.join("link")).unwrap();
        if user {
            with_user_namespace(&bundle);
        }
        std::os::unix::fs::chown(format!("{outside}/file"), Some(5), Some(5)).unwrap();
        bundle.configure(|c| {
            let mounts = c["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/first", "type": "bind", "source": outside, "options": ["rbind"]}));
            let mut second = json!({"destination": root.join("final"), "type": "bind", "source": root.join("first"), "options": ["rbind"]});
            if mapped {
                second["options"] = json!(["rbind", "ridmap"]);
                for maps in ["uidMappings", "gidMappings"] {
                    second[maps] = json!([{"containerID": 5, "hostID": 100_007, "size": 1}]);
                }
            }
            mounts.push(second);
            mounts.push(json!({"destination": "/stolen", "type": "bind", "source": root.join("link"), "options": ["rbind"]}));
        });
        let id = match (user, mapped) {
            (false, false) => 5,
            (false, true) => 100_007,
            (true, false) => 65_534,
            (true, true) => 7,
        };
        let done = bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]);
        assert_eq!(done.out, format!("from outside\n{id}\n1\nnone\n"), "{user} {mapped}: {}", done.err);
        assert!(!root.join(&bundle.dir()[1..]).exists(), "the destination's whole path is made inside");
        bundle.assert_nothing_left();
    }
}

#[test]
fn a_tmpfs_has_the_covered_directorys_mode_or_its_own_default() {
    let bundle =
        Bundle::new(&["/bin/sh", "-c", "stat -c %a /covered /new/one /given; grep -w tmpfs /proc/mounts"]);
    applet(&bundle, "stat");
    fs::create_dir(bundle.root().join("covered")).unwrap();
    fs::set_permissions(bundle.root().join("covered"), fs::Permissions::from_mode(0o3710)).unwrap();
    bundle.configure(|c| {
        for (at, options) in
            [("/covered", json!(["ro"])), ("/new/one", json!([])), ("/given", json!(["mode=1500"]))]
        {
            let mount = json!({"destination": at, "type": "tmpfs", "source": "tmpfs", "options": options});
            c["mounts"].as_array_mut().unwrap().push(mount);
        }
    });
    let out = run(&bundle);
    assert!(out.starts_with("3710\n1777\n1500\n"), "{out}");
    let line = |at: &str| out.lines().find(|l| l.contains(at)).unwrap().to_owned();
    assert!(line(" /covered ").contains(" ro,") && line(" /covered ").contains("mode=3710"), "{out}");
    assert!(!line(" /new/one ").contains("mode="), "{out}");
}

#[test]
fn clocks_have_their_offsets_in_a_user_namespace_too() {
    let bundle = Bundle::new(&["/bin/cat", "/proc/self/timens_offsets"]);
    with_user_namespace(&bundle);
    bundle.configure(|c| {
        c["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
        c["linux"]["timeOffsets"] =
            json!({"monotonic": {"secs": 7881, "nanosecs": 5}, "boottime": {"secs": 1337}});
    });
    let out = run(&bundle);
    assert!(out.split_whitespace().eq(["monotonic", "7881", "5", "boottime", "1337", "0"]), "{out}");
}

#[test]
fn a_user_namespace_is_joined_with_a_network_that_is_not_its() {
    let (user, network) = (Holder::new(&["--user"]), Holder::new(&["--net"]));
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{map}", user.0.id()), "0 100000 1000").unwrap();
    }
    let bundle = Bundle::new(&["/bin/sh", "-c", "readlink /proc/self/ns/user; readlink /proc/self/ns/net"]);
    with_user_namespace(&bundle);
    bundle.configure(|c| {
        drop(c["linux"].as_object_mut().unwrap().remove("uidMappings"));
        drop(c["linux"].as_object_mut().unwrap().remove("gidMappings"));
    });
    namespaces(&bundle, |list| {
        list.retain(|n| n["type"] != "network" && n["type"] != "user");
        list.push(json!({"type": "user", "path": user.path("user")}));
        list.push(json!({"type": "network", "path": network.path("net")}));
    });
    assert_eq!(run(&bundle), format!("{}\n{}\n", user.namespace("user"), network.namespace("net")));
}

#[test]
fn without_pivot_root_no_bare_proc_can_be_mounted() {
    let script = "unshare -mrpf sh -c 'mount -t proc none /proc && echo mounted'";
    let bundle = Bundle::new(&["/bin/sh", "-c", script]);
    applet(&bundle, "unshare");
    applet(&bundle, "mount");
    bundle.configure(|c| {
        let caps = json!(["CAP_SETFCAP", "CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID"]);
        c["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
        c["linux"]["maskedPaths"] = json!(["/proc/kcore"]);
        c["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
    });
    for flags in [&["run"][..], &["run", "--no-pivot"]] {
        let words = [flags, &["--bundle", bundle.dir(), &bundle.id]].concat();
        let done = bundle.run(&words);
        assert!(done.code != 0 && !done.out.contains("mounted"), "{flags:?}: {done:?}");
        assert!(
            done.err.contains("ermission denied") || done.err.contains("not permitted"),
            "{flags:?}: {done:?}"
        );
    }
}

#[test]
fn a_shared_root_is_shared_inside_and_shows_nothing_to_the_host() {
    let bundle = Bundle::new(&["/bin/grep", " / rw", "/proc/self/mountinfo"]);
    bundle.configure(|c| c["linux"]["rootfsPropagation"] = json!("shared"));
    // As service managers leave it.
    let words = format!(
        "mount --make-rshared / && {} --root {1}/state run --bundle {1} {2} && echo host: && grep {1} /proc/self/mountinfo",
        bundle.exe.display(),
        bundle.dir(),
        bundle.id
    );
    let done = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &words])
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    let (inside, host) = out.split_once("host:\n").unwrap_or_else(|| panic!("{out} {err}"));
    assert!(inside.contains(" shared:") && host.is_empty(), "{inside} {host}");
}
