//! Real containers: what is promised about them, seen from inside. Each test has its own container,
//! root file system and cgroup, and leaves none of them.

mod common;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use brigantine_runtime::spec::{LinuxNamespaceType, PosixRlimitBuilder, PosixRlimitType};
use brigantine_runtime::{Kind, OverlayOptions, Rootfs, Stdio};
use common::{Case, able, executable, finish, pipes, wait};

macro_rules! container_tests {
    ($($(#[$meta:meta])* fn $name:ident() $body:block)*) => {
        $($(#[$meta])* #[test] fn $name() {
            if !able() {
                return;
            }
            $body
        })*
    };
}

container_tests! {
    fn a_container_runs_and_says_so() {
        let case = Case::new("echo hello; hostname; echo $$; id -u; pwd; echo $HOME");
        assert_eq!(case.output(), "hello\nship\n1\n0\n/\n/root\n");
    }

    fn the_exit_status_is_the_programs() {
        assert_eq!(Case::new("exit 42").run().unwrap().status, 42);
        let mut by_signal = Case::new("true");
        by_signal.args(&["/bin/sh", "-c", "sh -c 'kill -9 $$; true'; exit $?"]);
        assert_eq!(by_signal.run().unwrap().status, 137);
    }

    fn every_namespace_is_the_containers_own() {
        let case = Case::new("for n in mnt pid ipc uts net cgroup; do readlink /proc/self/ns/$n; done");
        let own: Vec<String> = ["mnt", "pid", "ipc", "uts", "net", "cgroup"]
            .map(|n| fs::read_link(format!("/proc/self/ns/{n}")).unwrap().display().to_string())
            .to_vec();
        let inside = case.output();
        assert_eq!(inside.lines().count(), own.len());
        for line in inside.lines() {
            assert!(!own.contains(&line.to_owned()), "{line} is the host's");
        }
    }

    fn only_lo_and_no_host_mount_is_seen() {
        let case = Case::new("ls /sys/class/net; cat /proc/self/mountinfo | wc -l; cat /proc/self/cgroup");
        let out = case.output();
        assert!(out.starts_with("lo\n"), "{out}");
        assert!(!out.contains("brigantine-test"), "{out}");
    }

    fn the_capabilities_are_dockers() {
        let out = Case::new("grep Cap /proc/self/status").output();
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            assert!(out.contains(&format!("{set}:\t00000000a80425fb")), "{out}");
        }
        assert!(out.contains("CapInh:\t0000000000000000"), "{out}");
        assert!(out.contains("CapAmb:\t0000000000000000"), "{out}");
    }

    fn another_user_has_no_capabilities() {
        let mut case = Case::new("grep CapEff /proc/self/status; id -u; id -g; id -G; echo $HOME; echo out > /dev/stdout");
        case.process(|p| {
            p.set_user(serde_json::from_value(serde_json::json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 44]})).unwrap());
        });
        assert_eq!(case.output(), "CapEff:\t0000000000000000\n1000\n1000\n1000 5 44\n/home/user\nout\n");
    }

    fn ambient_capabilities_reach_another_user() {
        let mut case = Case::new("grep CapEff /proc/self/status");
        case.process(|p| {
            let one = serde_json::json!(["CAP_NET_BIND_SERVICE"]);
            let sets = serde_json::json!({"bounding": one, "effective": one, "permitted": one, "inheritable": one, "ambient": one});
            p.set_capabilities(Some(serde_json::from_value(sets).unwrap()));
            p.set_user(serde_json::from_value(serde_json::json!({"uid": 1000, "gid": 1000})).unwrap());
        });
        assert_eq!(case.output(), "CapEff:\t0000000000000400\n");
    }

    fn seccomp_blocks_what_docker_blocks() {
        let out = Case::new("grep Seccomp: /proc/self/status; unshare -m true 2>&1; mount -t tmpfs x /tmp 2>&1; true").output();
        assert!(out.contains("Seccomp:\t2"), "{out}");
        assert_eq!(out.matches("not permitted").count() + out.matches("denied").count(), 2, "{out}");
    }

    fn seccomp_blocks_an_allowed_capability_too() {
        let mut case = Case::new("mkdir /tmp/x 2>&1; touch /tmp/y && echo made");
        case.linux(|l| {
            l.set_seccomp(Some(serde_json::from_value(serde_json::json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]
            })).unwrap()));
        });
        let out = case.output();
        assert!(out.contains("not supported") && out.contains("made"), "{out}");
    }

    fn no_new_privileges_is_set_on_request() {
        let mut case = Case::new("grep NoNewPrivs /proc/self/status; grep Seccomp: /proc/self/status");
        case.process(|p| { p.set_no_new_privileges(Some(true)); });
        assert_eq!(case.output(), "NoNewPrivs:\t1\nSeccomp:\t2\n");
        assert!(Case::new("grep NoNewPrivs /proc/self/status").output().contains(":\t0"));
    }

    fn masked_paths_are_empty_and_readonly_paths_cannot_be_written() {
        let out = Case::new(
            "wc -c < /proc/interrupts; wc -c < /proc/keys; ls /sys/firmware | wc -l; \
             echo x > /proc/sys/kernel/hostname; echo x > /proc/irq/default_smp_affinity; echo 1 > /sys/kernel/profiling; true",
        ).output();
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(&lines[..3], ["0", "0", "0"], "{out}");
        assert_eq!(out.matches("Read-only file system").count(), 3, "{out}");
    }

    fn devices_are_there_and_no_others_can_be_used() {
        let out = Case::new(
            "ls /dev; echo x > /dev/null && head -c 3 /dev/zero | wc -c; readlink /dev/fd; readlink /dev/ptmx; \
             mknod /tmp/mem c 1 1 && cat /tmp/mem 2>&1 | head -c 60; true",
        ).output();
        for name in ["null", "zero", "full", "random", "urandom", "tty", "pts", "shm", "mqueue", "ptmx", "fd", "stdin"] {
            assert!(out.lines().any(|l| l == name), "{name}: {out}");
        }
        assert!(out.contains("/proc/self/fd\npts/ptmx") && out.contains("not permitted"), "{out}");
    }

    fn a_device_of_the_spec_is_made() {
        let mut case = Case::new("stat -c '%t:%T %a %u' /dev/fuse-like");
        case.linux(|l| {
            let device = serde_json::json!([{"path": "/dev/fuse-like", "type": "c", "major": 10, "minor": 229, "fileMode": 432, "uid": 7, "gid": 0}]);
            l.set_devices(Some(serde_json::from_value(device).unwrap()));
        });
        assert_eq!(case.output(), "a:e5 660 7\n");
    }

    fn binds_are_mounted_with_their_options() {
        let mut case = Case::new("cat /data/f; echo x > /data/g; cat /data/sub/deep/f 2>&1; grep ' /data ' /proc/self/mountinfo; true");
        let source = case.dir.path().join("source");
        fs::create_dir_all(source.join("sub/deep")).unwrap();
        fs::write(source.join("f"), "content\n").unwrap();
        case.mount(serde_json::json!({"destination": "/data", "type": "bind", "source": source, "options": ["rbind", "ro", "nosuid", "rprivate"]}));
        let out = case.output();
        assert!(out.contains("content") && out.contains("Read-only") && out.contains("ro,nosuid"), "{out}");
        assert!(!source.join("g").exists());
    }

    fn a_file_can_be_bound_over_a_missing_one() {
        let mut case = Case::new("cat /etc/deep/er/hosts");
        let source = case.dir.path().join("hosts");
        fs::write(&source, "127.0.0.1 me\n").unwrap();
        case.mount(serde_json::json!({"destination": "/etc/deep/er/hosts", "type": "bind", "source": source, "options": ["bind"]}));
        assert_eq!(case.output(), "127.0.0.1 me\n");
    }

    fn tmpfs_takes_its_options() {
        let mut case = Case::new("grep ' /scratch ' /proc/self/mountinfo; stat -c %a /scratch /keep");
        fs::create_dir(case.root().join("keep")).unwrap();
        fs::set_permissions(case.root().join("keep"), std::os::unix::fs::PermissionsExt::from_mode(0o751)).unwrap();
        case.mount(serde_json::json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["noexec", "size=64k", "mode=1777"]}));
        case.mount(serde_json::json!({"destination": "/keep", "type": "tmpfs", "source": "tmpfs"}));
        let out = case.output();
        assert!(out.contains("noexec") && out.contains("size=64k") && out.ends_with("1777\n751\n"), "{out}");
    }

    fn a_readonly_root_is_read_only() {
        let mut case = Case::new("echo x > /file; echo y > /dev/shm/file && echo shm");
        case.spec.root_mut().as_mut().unwrap().set_readonly(Some(true));
        let out = case.output();
        assert!(out.contains("Read-only file system") && out.contains("shm"), "{out}");
    }

    fn an_overlay_root_keeps_its_lower_layers() {
        let case = Case::new("echo new > /etc/new; rm /etc/passwd; cat /etc/top");
        let (top, upper, work) = (case.dir.path().join("top"), case.dir.path().join("upper"), case.dir.path().join("work"));
        for dir in [&top, &upper, &work] {
            fs::create_dir(dir).unwrap();
        }
        fs::create_dir(top.join("etc")).unwrap();
        fs::write(top.join("etc/top"), "top\n").unwrap();
        let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let rootfs = Rootfs::Overlay { lower: vec![top, case.root()], upper: upper.clone(), work, options: OverlayOptions::default() };
        let done = case.run_on(rootfs).unwrap();
        assert_eq!((done.status, done.out.as_str()), (0, "top\n"));
        assert_eq!(fs::read_to_string(upper.join("etc/new")).unwrap(), "new\n");
        assert!(case.root().join("etc/passwd").exists());
        let left = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = |t: &str| t.lines().filter(|l| l.contains(case.dir.path().to_str().unwrap())).count();
        assert_eq!((ours(&before), ours(&left)), (0, 0));
    }

    fn a_missing_layer_is_named() {
        let case = Case::new("true");
        let missing = case.dir.path().join("no-such-layer");
        let (upper, work) = (case.dir.path().join("u"), case.dir.path().join("w"));
        let rootfs = Rootfs::Overlay { lower: vec![missing], upper, work, options: OverlayOptions::default() };
        let error = case.run_on(rootfs).err().unwrap();
        assert!(error.to_string().contains("no-such-layer"), "{error}");
    }

    fn limits_are_written() {
        let mut case = Case::new("echo ok");
        case.linux(|l| {
            let resources = serde_json::json!({"memory": {"limit": 67_108_864, "swap": 67_108_864, "reservation": 33_554_432},
                "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0"}, "pids": {"limit": 33}});
            l.set_resources(Some(serde_json::from_value(resources).unwrap()));
        });
        let (stdio, _reader) = pipes();
        let mut created = case.create(stdio).unwrap();
        let stats = created.cgroup().stats().unwrap();
        assert_eq!(stats.memory.limit, 64 << 20);
        assert_eq!(stats.pids.limit, Some(33));
        assert_eq!(created.cgroup().procs().unwrap(), [created.pid()]);
        created.start().unwrap();
        assert_eq!(wait(&created), 0);
        let group = created.cgroup().clone();
        let copy: brigantine_runtime::Cgroup = serde_json::from_str(&serde_json::to_string(&group).unwrap()).unwrap();
        copy.delete().unwrap();
        assert!(!group.exists());
    }

    fn too_much_memory_is_told() {
        let mut case = Case::new("dd if=/dev/zero of=/dev/null bs=200M count=1");
        case.linux(|l| {
            let resources = serde_json::json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
            l.set_resources(Some(serde_json::from_value(resources).unwrap()));
        });
        let (stdio, _reader) = pipes();
        let mut created = case.create(stdio).unwrap();
        let watch = created.cgroup().oom_events().unwrap().unwrap();
        created.start().unwrap();
        assert_ne!(wait(&created), 0);
        let mut fds = [rustix::event::PollFd::new(&watch, rustix::event::PollFlags::IN)];
        let second = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&second)).unwrap(), 1);
        assert!(created.cgroup().oom_kills().unwrap() >= 1);
        created.cgroup().delete().unwrap();
    }

    fn a_container_is_frozen_and_thawed() {
        let case = Case::new("while true; do sleep 1; done");
        let (stdio, _reader) = pipes();
        let mut created = case.create(stdio).unwrap();
        created.start().unwrap();
        let group = created.cgroup().clone();
        group.freeze().unwrap();
        assert!(group.is_frozen().unwrap());
        group.thaw().unwrap();
        assert!(!group.is_frozen().unwrap());
        group.freeze().unwrap();
        finish(created);
        assert!(!group.exists());
    }

    fn a_frozen_group_is_refused_and_left_alone() {
        let case = Case::new("true");
        let path = format!("/brigantine-test-{}", case.id);
        let group = brigantine_runtime::Cgroup::create(&path, None).unwrap();
        group.freeze().unwrap();
        let error = case.run().err().unwrap();
        assert_eq!(error.to_string(), "container's cgroup unexpectedly frozen");
        assert!(group.is_frozen().unwrap());
        group.delete().unwrap();
    }

    fn an_empty_group_that_is_there_is_taken_over_and_a_used_one_is_not() {
        let case = Case::new("true");
        let path = format!("/brigantine-test-{}", case.id);
        let group = brigantine_runtime::Cgroup::create(&path, None).unwrap();
        // All of it is there, then each part alone.
        let dirs: Vec<_> = group.paths().into_iter().map(|(_, dir)| dir).collect();
        for kept in std::iter::once(None).chain(dirs.iter().map(Some)) {
            for dir in &dirs {
                if kept.is_none_or(|kept| kept == dir) {
                    fs::create_dir_all(dir).unwrap();
                } else {
                    fs::remove_dir(dir).ok();
                }
            }
            assert_eq!(case.run().unwrap().status, 0, "{kept:?}");
        }
        let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        for dir in &dirs {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join("cgroup.procs"), other.id().to_string()).unwrap();
            let error = case.run().err().unwrap().to_string();
            assert!(error.contains("is not empty") && error.contains(&dir.display().to_string()), "{error}");
            fs::write(dir.parent().unwrap().join("cgroup.procs"), other.id().to_string()).unwrap();
        }
        other.kill().unwrap();
        other.wait().unwrap();
        group.delete().unwrap();
    }

    fn a_hybrid_machines_unified_group_is_entered_too() {
        let case = Case::new("cat");
        let (stdio, _reader) = pipes();
        let mut created = case.create(stdio).unwrap();
        let text = fs::read_to_string(format!("/proc/{}/cgroup", created.pid())).unwrap();
        let unified = text.lines().find(|l| l.starts_with("0::"));
        assert!(unified.is_none_or(|l| l.contains(&case.id)), "{text}");
        created.start().unwrap();
        finish(created);
    }

    fn exec_sees_the_container_and_its_confinement() {
        let case = Case::new("sleep 100");
        let (stdio, _reader) = pipes();
        let mut created = case.create(stdio).unwrap();
        created.start().unwrap();
        let done = case.exec(&created, "hostname; grep -E 'CapEff|Seccomp:' /proc/self/status; ls /proc/self/fd | wc -l; \
            cat /proc/1/cmdline | tr '\\0' ' '; exit 7").unwrap();
        assert_eq!(done.status, 7);
        // Standard descriptors, and the directory that ls reads.
        assert_eq!(done.out, "ship\nCapEff:\t00000000a80425fb\nSeccomp:\t2\n4\nsleep 100 ");
        let error = {
            let mut other = Case::new("true");
            other.args(&["/nonexistent"]);
            let process = other.spec.process().clone().unwrap();
            brigantine_runtime::exec(brigantine_runtime::ExecRequest {
                process, stdio: Stdio::Null, pid: created.pid(), cgroup: None, seccomp: None, listener: None, common: brigantine_runtime::Common::default(), die_with_parent: true, preserve_fds: 0,
                executable: None,
            }).unwrap_err()
        };
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::NotFound, "exec: \"/nonexistent\": stat /nonexistent: no such file or directory"));
        assert_eq!(case.exec(&created, "cat /proc/self/cgroup | wc -l").unwrap().status, 0);
        finish(created);
    }

    fn no_descriptor_of_the_caller_leaks() {
        let case = Case::new("ls -l /proc/self/fd | wc -l; ls /proc/self/fd | tr '\\n' ' '");
        let _open = fs::File::open("/").unwrap();
        assert!(case.output().ends_with("0 1 2 3 "));
    }

    fn a_terminal_is_the_containers_own() {
        let mut case = Case::new("tty; stty size; test -c /dev/console && echo console");
        case.process(|p| {
            p.set_console_size(Some(serde_json::from_value(serde_json::json!({"height": 31, "width": 97})).unwrap()));
        });
        let mut created = case.create(Stdio::Terminal).unwrap();
        let master = created.take_terminal().unwrap();
        created.start().unwrap();
        let mut out = Vec::new();
        let mut buffer = [0; 256];
        while let Ok(n @ 1..) = rustix::io::read(&master, &mut buffer) {
            out.extend(&buffer[..n]);
        }
        assert_eq!(String::from_utf8(out).unwrap(), "/dev/pts/0\r\n31 97\r\nconsole\r\n");
        finish(created);
    }

    fn a_terminal_can_be_had_for_exec() {
        let case = Case::new("sleep 100");
        let (stdio, _reader) = pipes();
        let mut created = case.create(stdio).unwrap();
        created.start().unwrap();
        let mut process = case.spec.process().clone().unwrap();
        process.set_args(Some(vec!["tty".to_owned()]));
        let done = brigantine_runtime::exec(brigantine_runtime::ExecRequest {
            process, stdio: Stdio::Terminal, pid: created.pid(), cgroup: None, seccomp: None, listener: None, common: brigantine_runtime::Common::default(), die_with_parent: true, preserve_fds: 0,
            executable: None,
        }).unwrap();
        let mut said = Vec::new();
        // A terminal gives what is there, not whole lines.
        while !said.ends_with(b"\n") {
            let mut buffer = [0; 64];
            let n = rustix::io::read(done.terminal.as_ref().unwrap(), &mut buffer).unwrap();
            said.extend_from_slice(&buffer[..n]);
        }
        assert_eq!(said, b"/dev/pts/0\r\n");
        rustix::process::waitid(rustix::process::WaitId::PidFd(done.pidfd.as_fd()), rustix::process::WaitIdOptions::EXITED).unwrap();
        finish(created);
    }

    fn a_user_namespace_maps_ids() {
        let mut case = Case::new("id -u; cat /proc/self/uid_map; touch /tmp/mine && stat -c %u /tmp/mine; echo x > /dev/null && echo null; ls /sys/class/net");
        let all = |path: &Path| std::os::unix::fs::chown(path, Some(200_000), Some(200_000)).unwrap();
        all(&case.root());
        for sub in ["tmp", "dev", "proc", "sys", "etc", "bin"] {
            all(&case.root().join(sub));
        }
        fs::set_permissions(case.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        case.linux(|l| {
            let map = serde_json::json!([{"containerID": 0, "hostID": 200_000, "size": 65536}]);
            l.set_uid_mappings(Some(serde_json::from_value(map.clone()).unwrap()));
            l.set_gid_mappings(Some(serde_json::from_value(map).unwrap()));
            l.namespaces_mut().as_mut().unwrap().push(serde_json::from_value(serde_json::json!({"type": "user"})).unwrap());
        });
        let out = case.output();
        assert!(out.starts_with("0\n") && out.contains("200000") && out.contains("\n0\nnull\nlo\n"), "{out}");
        assert_eq!(fs::metadata(case.root().join("tmp/mine")).unwrap().uid(), 200_000);
    }

    fn a_namespace_is_joined_by_descriptor() {
        let mut case = Case::new("readlink /proc/self/ns/net");
        common::without_namespace(&mut case.spec, LinuxNamespaceType::Network);
        let netns = brigantine_sys::netns::create().unwrap();
        let inode = rustix::fs::fstat(&netns).unwrap().st_ino;
        let (stdio, mut reader) = pipes();
        let mut launch = brigantine_runtime::Launch::new(case.id.clone(), case.spec.clone(), case.rootfs(), stdio);
        launch.joined.push((LinuxNamespaceType::Network, netns));
        let mut created = brigantine_runtime::create(launch).unwrap();
        created.start().unwrap();
        let mut out = String::new();
        std::io::Read::read_to_string(&mut reader, &mut out).unwrap();
        assert_eq!(out, format!("net:[{inode}]\n"));
        finish(created);
    }

    fn sysctls_of_own_namespaces_are_set_and_others_refused() {
        let mut case = Case::new("cat /proc/sys/net/ipv4/ip_forward");
        case.linux(|l| { l.set_sysctl(Some([("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into())); });
        assert_eq!(case.output(), "1\n");
        case.linux(|l| { l.set_sysctl(Some([("kernel.panic".to_owned(), "1".to_owned())].into())); });
        let error = case.error();
        assert!(error.kind() == Kind::Invalid && error.to_string().contains("kernel.panic"), "{error}");
    }

    fn a_hard_limit_is_lowered_and_a_raise_refused_in_words() {
        let mut case = Case::new("ulimit -n");
        let limit = |n: u64| PosixRlimitBuilder::default().typ(PosixRlimitType::RlimitNofile).hard(n).soft(n).build().unwrap();
        case.process(|p| { p.set_rlimits(Some(vec![limit(333)])); });
        assert_eq!(case.output(), "333\n");
        case.process(|p| { p.set_rlimits(Some(vec![limit(1 << 40)])); });
        assert!(case.error().to_string().contains("RLIMIT_NOFILE"));
    }

    fn a_missing_program_is_told_as_docker_does() {
        let mut case = Case::new("");
        case.args(&["nope"]);
        let error = case.error();
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::NotFound, "exec: \"nope\": executable file not found in $PATH"));
        case.args(&["/nope"]);
        let error = case.error();
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::NotFound, "exec: \"/nope\": stat /nope: no such file or directory"));
        case.args(&["/etc/passwd"]);
        let error = case.error();
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::PermissionDenied, "exec: \"/etc/passwd\": permission denied"));
        case.args(&["/etc"]);
        assert_eq!(case.error().kind(), Kind::PermissionDenied);
    }

    fn another_architecture_and_a_missing_loader_are_told_apart() {
        let mut case = Case::new("");
        executable(&case.root().join("bin/arm"), b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0");
        case.args(&["/bin/arm"]);
        let error = case.error();
        assert!(error.kind() == Kind::NotExecutable && error.to_string().contains("exec format error: a program for arm64"), "{error}");
        executable(&case.root().join("bin/script"), b"#!/no/such/interpreter\n");
        case.args(&["/bin/script"]);
        let error = case.error();
        assert!(error.kind() == Kind::NotFound && error.to_string().ends_with("the script's interpreter /no/such/interpreter is missing"), "{error}");
    }

    fn a_bad_spec_is_an_error_that_names_the_part() {
        let mut case = Case::new("true");
        case.args(&[]);
        assert!(case.error().to_string().contains("process.args"));
        let mut case = Case::new("true");
        case.process(|p| { p.set_cwd("relative".into()); });
        assert!(case.error().to_string().contains("relative"));
        let mut case = Case::new("true");
        case.mount(serde_json::json!({"destination": "/x", "type": "nonsensefs", "source": "x"}));
        assert!(case.error().to_string().contains("mounting nonsensefs at \"/x\""));
        let mut case = Case::new("true");
        case.mount(serde_json::json!({"destination": "/x", "type": "tmpfs", "source": "x", "options": ["nonsense=1"]}));
        assert!(case.error().to_string().contains("setting an option"));
        let mut case = Case::new("true");
        case.mount(serde_json::json!({"destination": "/x", "type": "bind", "source": "/no/such/source", "options": ["bind"]}));
        assert!(case.error().to_string().contains("/no/such/source"));
        let mut case = Case::new("true");
        case.id = "../x".to_owned();
        assert!(case.run().is_err());
    }

    fn the_working_directory_is_made_if_missing() {
        let mut case = Case::new("pwd");
        case.process(|p| { p.set_cwd("/srv/deep/er".into()); });
        assert_eq!(case.output(), "/srv/deep/er\n");
    }

    fn dropping_a_created_container_leaves_nothing() {
        let case = Case::new("true");
        let created = case.create(Stdio::Null).unwrap();
        let (pid, group) = (created.pid(), created.cgroup().clone());
        assert!(group.exists());
        drop(created);
        assert!(!group.exists());
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}

// Attacks.
container_tests! {
    /// CVE-2019-19921 and kin: a link in the image must not move /proc or /sys.
    fn a_linked_proc_is_refused() {
        for name in ["proc", "sys"] {
            let case = Case::new("true");
            fs::remove_dir(case.root().join(name)).unwrap();
            symlink("/tmp", case.root().join(name)).unwrap();
            let error = case.error();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    /// CVE-2021-30465, CVE-2018-15664: a destination that climbs out through a link stays inside.
    fn a_linked_destination_stays_in_the_root() {
        let mut case = Case::new("cat /escape/file; ls /outside");
        let outside = case.dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        symlink("../../../../../../../../outside", case.root().join("escape")).unwrap();
        fs::create_dir(case.root().join("outside")).unwrap();
        let source = case.dir.path().join("source");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("file"), "bound\n").unwrap();
        case.mount(serde_json::json!({"destination": "/escape", "type": "bind", "source": source, "options": ["bind"]}));
        assert_eq!(case.output(), "bound\nfile\n");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }

    /// CVE-2025-31133, CVE-2025-52881: nothing may be mounted into /proc, directly or through a link.
    fn a_mount_into_proc_is_refused() {
        for (destination, link) in [("/proc/sys", false), ("/thing", true)] {
            let mut case = Case::new("true");
            if link {
                symlink("/proc/sys", case.root().join("thing")).unwrap();
            }
            let source = case.dir.path().join("fake");
            fs::create_dir(&source).unwrap();
            case.mount(serde_json::json!({"destination": destination, "type": "bind", "source": source, "options": ["bind"]}));
            let error = case.error();
            assert!(error.to_string().contains("leads into /proc"), "{error}");
        }
    }

    /// CVE-2025-31133: masking must not use whatever the image put in place of /dev/null.
    fn a_false_null_device_is_refused() {
        let mut case = Case::new("true");
        // An own /dev without the runtime's devices.
        let dev = case.dir.path().join("dev");
        fs::create_dir(&dev).unwrap();
        symlink("/etc/passwd", dev.join("null")).unwrap();
        case.spec.mounts_mut().as_mut().unwrap().retain(|m| !m.destination().starts_with("/dev"));
        case.mount(serde_json::json!({"destination": "/dev", "type": "bind", "source": dev, "options": ["bind"]}));
        let error = case.error();
        assert!(error.to_string().contains("masking"), "{error}");
    }

    /// A link in place of /dev itself must not make device nodes elsewhere.
    fn a_linked_dev_stays_in_the_root() {
        let case = Case::new("test -c /dev/null && echo null");
        fs::remove_dir(case.root().join("dev")).unwrap();
        symlink("../../../tmp", case.root().join("dev")).unwrap();
        // Whether it is refused or made inside, the host's /tmp is not touched.
        if let Ok(done) = case.run() {
            assert_eq!(done.out, "null\n");
        }
        assert!(!Path::new("/tmp/null").exists());
    }

    /// CVE-2024-21626: a working directory through a descriptor of the runtime's.
    fn a_working_directory_through_a_descriptor_is_refused() {
        for number in 0..20 {
            let mut case = Case::new("cat ../../../../etc/hostname; pwd");
            case.process(|p| { p.set_cwd(format!("/proc/self/fd/{number}").into()); });
            match case.run() {
                Err(_) => {}
                Ok(done) => panic!("descriptor {number} was entered: {}", done.out),
            }
        }
    }

    /// CVE-2022-29162: no inheritable capabilities unless asked for.
    fn exec_has_no_inheritable_capabilities() {
        let case = Case::new("sleep 100");
        let (stdio, _reader) = pipes();
        let mut created = case.create(stdio).unwrap();
        created.start().unwrap();
        let done = case.exec(&created, "grep -E 'CapInh|CapAmb' /proc/self/status").unwrap();
        assert_eq!(done.out, "CapInh:\t0000000000000000\nCapAmb:\t0000000000000000\n");
        finish(created);
    }
}
