//! What a program in a container can and cannot do, seen from inside and, for limits, in the host's cgroup files.

use std::{fs, path::PathBuf};

use brigantine_testkit::{Client, Engine};

use crate::Host;

both![
    every_namespace_is_its_own,
    capabilities_are_dockers,
    seccomp_is_on_unless_lifted,
    kernel_files_are_masked_and_read_only,
    a_read_only_root_and_its_tmpfs,
    privileged_lifts_it,
    limits_are_seen_inside_and_stand_in_the_cgroup,
    too_much_memory_is_an_oom_kill,
    too_many_processes_are_refused,
    no_new_privileges_is_set_when_asked,
    devices_are_the_few_that_are_allowed,
];

fn every_namespace_is_its_own(client: Client) {
    let host = Host::new(client);
    let inside = host.script(&[], "for n in mnt pid net ipc uts; do readlink /proc/self/ns/$n; done");
    let outside: String = ["mnt", "pid", "net", "ipc", "uts"]
        .iter()
        .map(|n| {
            fs::read_link(format!("/proc/{}/ns/{n}", host.daemon_pid())).unwrap().display().to_string() + "\n"
        })
        .collect();
    for (a, b) in inside.lines().zip(outside.lines()) {
        assert_ne!(a, b);
    }
    assert_eq!(host.script(&[], "echo $$"), "1");
    let mounts = host.script(&[], "cat /proc/mounts");
    assert!(mounts.lines().next().unwrap().starts_with("overlay / overlay rw"), "{mounts}");
    // Nothing of the host shows: no path of the engine's, no descriptor but the three and ls's own.
    assert_eq!(host.script(&[], "ls /proc/self/fd | wc -l"), "4");
    if !host.is_peer() {
        let cgroup = host.script(&["--cgroupns", "private"], "cat /proc/self/cgroup");
        assert!(cgroup.lines().all(|l| l.ends_with(":/")), "{cgroup}");
    }
}

fn capabilities_are_dockers(client: Client) {
    let host = Host::new(client);
    let caps = "grep -E '^Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status | cut -f2 | tr '\\n' ' '";
    let (none, default) = ("0000000000000000", "00000000a80425fb");
    let inherited = |text: &str| text.split(' ').skip(1).collect::<Vec<_>>().join(" ");
    assert_eq!(inherited(&host.script(&[], caps)), format!("{default} {default} {default} {none} "));
    assert_eq!(
        inherited(&host.script(&["--cap-drop", "ALL"], caps)),
        format!("{none} {none} {none} {none} ")
    );
    let some = host.script(&["--cap-drop", "ALL", "--cap-add", "NET_ADMIN", "--cap-add", "CHOWN"], caps);
    assert!(some.contains("0000000000001001"), "{some}");
    assert!(host.script(&["-u", "guest"], caps).contains(&format!("{none} {none} {default} {none}")));
    host.cli(["run", "--rm", "--cap-add", "NOPE", "busybox", "true"]).exits(125).expect_stderr("NOPE");
    // The kernel agrees.
    host.cli(["run", "--rm", "busybox", "mount", "-t", "tmpfs", "x", "/tmp"]).exits(1);
    assert_eq!(host.script(&[], "chown 5 /tmp && echo yes"), "yes");
    host.cli(["run", "--rm", "--cap-drop", "CHOWN", "busybox", "chown", "5", "/tmp"]).exits(1);
}

fn seccomp_is_on_unless_lifted(client: Client) {
    let host = Host::new(client);
    let mode = "grep ^Seccomp: /proc/self/status | cut -f2";
    assert_eq!(host.script(&[], mode), "2");
    assert_eq!(host.script(&["--security-opt", "seccomp=unconfined"], mode), "0");
    host.cli(["run", "--rm", "busybox", "unshare", "-U", "true"]).exits(1).expect_stderr("not permitted");
    host.cli(["run", "--rm", "--security-opt", "seccomp=unconfined", "busybox", "unshare", "-U", "true"])
        .exits(0);
}

fn kernel_files_are_masked_and_read_only(client: Client) {
    let host = Host::new(client);
    assert_eq!(host.script(&[], "cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c"), "0");
    assert_eq!(
        host.script(&[], "ls /proc/acpi /sys/firmware /proc/scsi 2>/dev/null | grep -v : | wc -w"),
        "0"
    );
    for path in [
        "/proc/sys/kernel/hostname",
        "/proc/sysrq-trigger",
        "/proc/irq/default_smp_affinity",
        "/sys/kernel/profiling",
    ] {
        let output = host.cli(["run", "--rm", "busybox", "sh", "-c", &format!("echo 1 >{path}")]).run();
        assert!(output.code != 0, "{path} is writable");
    }
}

fn a_read_only_root_and_its_tmpfs(client: Client) {
    let host = Host::new(client);
    host.cli(["run", "--rm", "--read-only", "busybox", "touch", "/x"])
        .exits(1)
        .expect_stderr("read-only file system");
    let flags = ["--read-only", "--tmpfs", "/scratch:size=1m,mode=1770"];
    let seen = host.script(
        &flags,
        "touch /scratch/x && stat -c %a /scratch; df -k /scratch | tail -1 | awk '{print $2}'",
    );
    assert_eq!(seen, "1770\n1024");
    assert_eq!(
        host.script(&["--mount", "type=tmpfs,dst=/t,tmpfs-size=2m"], "df -k /t | tail -1 | awk '{print $2}'"),
        "2048"
    );
    assert_eq!(host.script(&["--shm-size", "3m"], "df -k /dev/shm | tail -1 | awk '{print $2}'"), "3072");
    host.assert_nothing_left();
}

fn privileged_lifts_it(client: Client) {
    let host = Host::new(client);
    if host.is_peer() {
        return; // runc insists on capabilities that this machine's root may lack.
    }
    let text = host.script(&["--privileged"], "mount -t tmpfs x /tmp && echo mounted; grep -E '^(Seccomp:|CapEff)' /proc/self/status; ls -d /dev/kmsg /dev/mem 2>/dev/null | head -1");
    assert!(text.contains("mounted") && text.contains("Seccomp:\t0"), "{text}");
    assert!(!text.contains("00000000a80425fb"), "{text}");
    assert_eq!(
        host.script(&["--privileged"], "test -w /proc/sys/kernel/hostname && test -w /sys/kernel && echo w"),
        "w"
    );
}

/// The container's cgroup directory of a version 1 controller, or the version 2 one.
fn cgroup(engine: &Engine, id: &str, controller: &str) -> PathBuf {
    engine
        .sandbox()
        .cgroups()
        .into_iter()
        .filter(|dir| dir.to_string_lossy().contains(id))
        .find(|dir| {
            dir.starts_with(format!("/sys/fs/cgroup/{controller}"))
                || dir.join("cgroup.controllers").exists() && dir.join("memory.max").exists()
        })
        .unwrap_or_else(|| panic!("no {controller} cgroup of {id} among {:?}", engine.sandbox().cgroups()))
}

fn limits_are_seen_inside_and_stand_in_the_cgroup(client: Client) {
    let host = Host::new(client);
    let flags = [
        "--memory",
        "32m",
        "--cpus",
        "0.5",
        "--pids-limit",
        "17",
        "--cpu-shares",
        "512",
        "--cpuset-cpus",
        "0",
    ];
    let id = host.background(&flags, "sleep 1000");
    let read = |controller: &str, v1: &str, v2: &str| {
        let dir = cgroup(&host, &id, controller);
        let file = if dir.join(v1).exists() { v1 } else { v2 };
        fs::read_to_string(dir.join(file)).unwrap().trim().to_owned()
    };
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), (32 << 20).to_string());
    assert!(["50000", "50000 100000"].contains(&read("cpu", "cpu.cfs_quota_us", "cpu.max").as_str()));
    assert_eq!(read("pids", "pids.max", "pids.max"), "17");
    assert_eq!(read("cpuset", "cpuset.cpus", "cpuset.cpus"), "0");
    let inside = host
        .cli([
            "exec",
            &id,
            "sh",
            "-c",
            "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; nproc",
        ])
        .ok();
    assert_eq!(inside, "33554432\n1");
    let writable = host
        .cli([
            "exec",
            &id,
            "sh",
            "-c",
            "echo 1 >$(ls /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null)",
        ])
        .run();
    assert_ne!(writable.code, 0, "a container raises its own limit");
    host.cli(["rm", "-f", &id]).ok();
    host.assert_nothing_left();
}

fn too_much_memory_is_an_oom_kill(client: Client) {
    let host = Host::new(client);
    let id = host.background(&["-m", "16m", "--memory-swap", "16m"], "tail /dev/zero; exit $?");
    assert_eq!(host.cli(["wait", &id]).ok(), "137");
    assert_eq!(host.inspect(&id)["State"]["OOMKilled"], true);
}

fn too_many_processes_are_refused(client: Client) {
    let host = Host::new(client);
    let script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; echo all";
    let output = host.cli(["run", "--rm", "--pids-limit", "5", "busybox", "sh", "-c", script]).run();
    assert!(output.stderr.contains("can't fork"), "{output}");
    assert!(!output.stdout.contains("all"));
}

fn no_new_privileges_is_set_when_asked(client: Client) {
    let host = Host::new(client);
    let line = "grep ^NoNewPrivs: /proc/self/status | cut -f2";
    assert_eq!(host.script(&["--security-opt", "no-new-privileges"], line), "1");
    assert_eq!(host.script(&[], line), "0");
}

fn devices_are_the_few_that_are_allowed(client: Client) {
    let host = Host::new(client);
    let list = host.script(&[], "cd /dev; ls -d console fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero 2>/dev/null | tr '\\n' ' '; ls | grep -vx core | wc -l");
    // A console is there for a terminal only.
    assert_eq!(list, "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero 14");
    assert_eq!(
        host.script(&[], "echo x >/dev/null; head -c 3 /dev/zero | wc -c; stat -c '%a %t:%T' /dev/null"),
        "3\n666 1:3"
    );
    // Nodes can be made, but the device cgroup does not let them be opened.
    let output =
        host.cli(["run", "--rm", "busybox", "sh", "-c", "mknod /tmp/mem c 1 1 && cat /tmp/mem"]).exits(1);
    output.expect_stderr("not permitted");
    let with = host.script(
        &["--device", "/dev/fuse:/dev/other:r"],
        "stat -c '%t:%T' /dev/other; echo x 2>/dev/null >/dev/other || echo refused",
    );
    assert_eq!(with, "a:e5\nrefused");
}

#[test]
fn dangerous_system_calls_are_refused_in_a_real_distribution() {
    let engine = Engine::start();
    engine.load(&brigantine_testkit::fixtures::debian());
    // keyctl, bpf, perf_event_open, kexec_load, init_module, open_by_handle_at, ptrace of nobody
    for (name, call) in [
        ("keyctl", "250, 0, -3, 0"),
        ("bpf", "321, 0, 0, 0"),
        ("perf_event_open", "298, 0, 0, -1, -1, 0"),
        ("kexec_load", "246, 0, 0, 0, 0"),
        ("init_module", "175, 0, 0, 0"),
        ("userfaultfd", "323, 0"),
        ("clone into a user namespace", "56, 0x10000000, 0, 0, 0, 0"),
        ("mount", "165, 0, 0, 0, 0, 0"),
    ] {
        let script = format!(
            "$r = syscall({call}); print $r < 0 ? $!{{EPERM}} ? 'refused' : \"errno \" . ($! + 0) : 'done';"
        );
        let seen = engine.docker(["run", "--rm", "debian:bookworm", "perl", "-MErrno", "-e", &script]).ok();
        assert_eq!(seen, "refused", "{name}");
    }
    // clone3 does not exist as far as the program is told, so that libraries fall back to what can be filtered.
    let script = "$r = syscall(435, 0, 0); print $!{ENOSYS} ? 'absent' : $! + 0";
    assert_eq!(
        engine.docker(["run", "--rm", "debian:bookworm", "perl", "-MErrno", "-e", script]).ok(),
        "absent"
    );
}
