//! Every flag of the docker command for containers' verbs, used once: what it does is seen from inside the container, or
//! in its document. The tables are held against the command's own help, so that no flag is left out.

use std::collections::BTreeSet;
use std::fs;
use std::panic::AssertUnwindSafe;

use brigantine_testkit::Client;

use crate::Host;

/// Flags (words as in a shell; `DIR` is the test's directory, `DISK` a block device), and what comes of them.
enum Row {
    /// What a script prints in the container, lines joined by blanks.
    Inside(&'static str, &'static str, &'static str),
    /// A template over the container's document, and what it gives.
    Shown(&'static str, &'static str, &'static str),
    /// It is refused, or warned about, with these words where the kernel lacks it; else shown.
    Kernel(&'static str, &'static str, &'static str),
    /// The client's alone, or without a meaning on Linux: accepted.
    Accepted(&'static str),
    Refused(&'static str, &'static str),
}

use Row::{Accepted, Inside, Kernel, Refused, Shown};

/// Bit `n` of the effective capabilities.
const NET_ADMIN: &str = "x=0x$(sed -n 's/CapEff:.//p' /proc/self/status); echo $(( (x >> 12) & 1 ))";
const CHOWN: &str = "x=0x$(sed -n 's/CapEff:.//p' /proc/self/status); echo $(( x & 1 ))";

const CREATE: &[Row] = &[
    Inside("--add-host one.test:10.1.2.3", "grep one.test /etc/hosts | tr '\\t' ' '", "10.1.2.3 one.test"),
    Shown("--annotation a=b", "{{index .HostConfig.Annotations \"a\"}}", "b"),
    Inside("-a stdout", "echo out; echo err >&2", "out"),
    Kernel("--blkio-weight 300", "{{.HostConfig.BlkioWeight}}", "300"),
    Kernel("--blkio-weight-device DISK:300", "{{len .HostConfig.BlkioWeightDevice}}", "1"),
    Inside("--cap-add NET_ADMIN", NET_ADMIN, "1"),
    Inside("--cap-drop CHOWN", CHOWN, "0"),
    Shown("--cgroup-parent /somewhere", "{{.HostConfig.CgroupParent}}", "/somewhere"),
    Shown("--cgroupns host", "{{.HostConfig.CgroupnsMode}}", "host"),
    Inside("--cidfile DIR/cid", "true", ""),
    // The client itself refuses what is Windows' alone.
    Refused("--cpu-count 1 --cpu-percent 1 --io-maxbandwidth 1m --io-maxiops 1", "windows"),
    Accepted("--isolation default"),
    Kernel(
        "--cpu-period 50000 --cpu-quota 20000",
        "{{.HostConfig.CpuPeriod}} {{.HostConfig.CpuQuota}}",
        "50000 20000",
    ),
    Kernel(
        "--cpu-rt-period 1000000 --cpu-rt-runtime 1000",
        "{{.HostConfig.CPURealtimePeriod}} {{.HostConfig.CPURealtimeRuntime}}",
        "1000000 1000",
    ),
    Kernel("-c 512", "{{.HostConfig.CpuShares}}", "512"),
    Kernel("--cpus 0.5", "{{.HostConfig.NanoCpus}}", "500000000"),
    Kernel("--cpuset-cpus 0 --cpuset-mems 0", "{{.HostConfig.CpusetCpus}} {{.HostConfig.CpusetMems}}", "0 0"),
    Inside("--device DISK:/dev/it:r", "test -b /dev/it && ( : >>/dev/it ) 2>/dev/null || echo no", "no"),
    Shown("--device-cgroup-rule 'c 42:* rmw'", "{{index .HostConfig.DeviceCgroupRules 0}}", "c 42:* rmw"),
    Kernel(
        "--device-read-bps DISK:1mb --device-read-iops DISK:10 --device-write-bps DISK:2mb --device-write-iops DISK:20",
        "{{(index .HostConfig.BlkioDeviceReadBps 0).Rate}} {{(index .HostConfig.BlkioDeviceReadIOps 0).Rate}} {{(index .HostConfig.BlkioDeviceWriteBps 0).Rate}} {{(index .HostConfig.BlkioDeviceWriteIOps 0).Rate}}",
        "1048576 10 2097152 20",
    ),
    Accepted("--disable-content-trust"),
    Inside(
        "--dns 10.9.9.9 --dns-option ndots:3 --dns-search in.test",
        "grep -v '^#' /etc/resolv.conf",
        "search in.test nameserver 10.9.9.9 options ndots:3",
    ),
    Inside("--hostname h1 --domainname d1.test", "hostname; cat /proc/sys/kernel/domainname", "h1 d1.test"),
    Inside("--entrypoint /bin/sh", "-c 'echo entered'", "entered"),
    Inside("-e A=1 --env-file DIR/env", "echo $A $FROM_FILE", "1 yes"),
    Shown("--expose 81", "{{range $p, $_ := .Config.ExposedPorts}}{{$p}}{{end}}", "81/tcp"),
    Refused("--gpus all", "could not select device driver"),
    Inside("--group-add 4711", "id -G", "0 4711"),
    Shown(
        "--health-cmd true --health-interval 7s --health-retries 2 --health-start-interval 3s --health-start-period 5s --health-timeout 4s",
        "{{with .Config.Healthcheck}}{{.Test}} {{.Interval}} {{.Retries}} {{.StartInterval}} {{.StartPeriod}} {{.Timeout}}{{end}}",
        "[CMD-SHELL true] 7s 2 3s 5s 4s",
    ),
    Inside("--init", "tr '\\0' ' ' </proc/1/cmdline | grep -c init", "1"),
    Shown("-i", "{{.Config.OpenStdin}} {{.Config.StdinOnce}}", "true true"),
    Inside(
        "--network flags --ip 172.28.7.9 --ip6 fd07::9",
        "ip addr | grep -oE '172.28.7.9|fd07::9'",
        "172.28.7.9 fd07::9",
    ),
    Shown("--ipc shareable", "{{.HostConfig.IpcMode}}", "shareable"),
    Accepted("--kernel-memory 64m"),
    Shown("-l a=1 --label-file DIR/labels", "{{.Config.Labels.a}} {{.Config.Labels.from}}", "1 file"),
    Inside("--link anchor:other", "grep -c other /etc/hosts; echo $OTHER_NAME | grep -c /other", "1 1"),
    Inside("--network flags --link-local-ip 169.254.7.7", "ip addr | grep -o 169.254.7.7", "169.254.7.7"),
    Shown(
        "--log-driver json-file --log-opt max-size=7m",
        "{{.HostConfig.LogConfig.Type}} {{index .HostConfig.LogConfig.Config \"max-size\"}}",
        "json-file 7m",
    ),
    Inside(
        "--mac-address 02:42:ac:11:00:99",
        "ip link show eth0 | grep -o 02:42:ac:11:00:99",
        "02:42:ac:11:00:99",
    ),
    Kernel(
        "-m 64m --memory-reservation 32m --memory-swap 96m",
        "{{.HostConfig.Memory}} {{.HostConfig.MemoryReservation}} {{.HostConfig.MemorySwap}}",
        "67108864 33554432 100663296",
    ),
    Kernel("--memory-swappiness 7", "{{.HostConfig.MemorySwappiness}}", "7"),
    Inside(
        "--mount type=tmpfs,dst=/t,tmpfs-size=1m",
        "df -k /t | tail -1 | tr -s ' ' | cut -d' ' -f2",
        "1024",
    ),
    Shown("--name chosen", "{{.Name}}", "/chosen"),
    Shown(
        "--network flags --network-alias also",
        "{{index (index .NetworkSettings.Networks \"flags\").Aliases 0}}",
        "also",
    ),
    Shown("--no-healthcheck", "{{.Config.Healthcheck.Test}}", "[NONE]"),
    Kernel("--oom-kill-disable -m 64m", "{{.HostConfig.OomKillDisable}}", "true"),
    Inside("--oom-score-adj 300", "cat /proc/self/oom_score_adj", "300"),
    Inside("--pid host", "test $$ != 1 && echo outside", "outside"),
    Kernel("--pids-limit 77", "{{.HostConfig.PidsLimit}}", "77"),
    Accepted("--platform linux/amd64"),
    Inside("--privileged", "test -w /proc/sys/kernel/domainname && echo may", "may"),
    Shown(
        "-p 127.0.0.1::80/udp -P",
        "{{(index (index .HostConfig.PortBindings \"80/udp\") 0).HostIp}} {{.HostConfig.PublishAllPorts}}",
        "127.0.0.1 true",
    ),
    Refused("--pull always", "rror"),
    Accepted("-q"),
    Inside("--read-only", "touch /x 2>/dev/null || echo refused", "refused"),
    Shown(
        "--restart on-failure:3",
        "{{.HostConfig.RestartPolicy.Name}} {{.HostConfig.RestartPolicy.MaximumRetryCount}}",
        "on-failure 3",
    ),
    Shown("--rm", "{{.HostConfig.AutoRemove}}", "true"),
    Shown("--runtime runc", "{{.HostConfig.Runtime}}", "runc"),
    Inside("--security-opt no-new-privileges", "grep NoNewPrivs /proc/self/status | cut -f2", "1"),
    Inside("--shm-size 3m", "df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2", "3072"),
    Shown("--stop-signal USR1 --stop-timeout 3", "{{.Config.StopSignal}} {{.Config.StopTimeout}}", "USR1 3"),
    Refused("--storage-opt nonsense=1", "nonsense"),
    Inside("--sysctl net.ipv4.ip_default_ttl=77", "cat /proc/sys/net/ipv4/ip_default_ttl", "77"),
    Inside("--tmpfs /t:size=2m", "df -k /t | tail -1 | tr -s ' ' | cut -d' ' -f2", "2048"),
    Shown("-t", "{{.Config.Tty}}", "true"),
    Inside("--ulimit nofile=99:100", "ulimit -n; ulimit -Hn", "99 100"),
    Accepted("--use-api-socket"),
    Inside("-u 33:44", "id -u; id -g", "33 44"),
    Shown("--userns host", "{{.HostConfig.UsernsMode}}", "host"),
    Shown("--uts host", "{{.HostConfig.UTSMode}}", "host"),
    Inside("-v DIR:/d:ro", "cat /d/env; touch /d/x 2>/dev/null || echo refused", "FROM_FILE=yes refused"),
    Shown("--volume-driver local -v /anonymous", "{{(index .Mounts 0).Driver}}", "local"),
    Inside("--volumes-from anchor", "cat /shared/note", "kept"),
    Inside("-w /tmp", "pwd", "/tmp"),
];

/// Of `run` alone: the rest is in [`CREATE`].
const RUN: &[&str] = &["--detach", "--detach-keys", "--sig-proxy"];

const UPDATE: &[Row] = &[
    Kernel("--blkio-weight 400", "{{.HostConfig.BlkioWeight}}", "400"),
    Kernel(
        "--cpu-period 40000 --cpu-quota 10000",
        "{{.HostConfig.CpuPeriod}} {{.HostConfig.CpuQuota}}",
        "40000 10000",
    ),
    Kernel("--cpu-rt-period 1000000 --cpu-rt-runtime 1000", "{{.HostConfig.CPURealtimeRuntime}}", "1000"),
    Kernel("-c 256", "{{.HostConfig.CpuShares}}", "256"),
    Kernel("--cpuset-cpus 0 --cpuset-mems 0", "{{.HostConfig.CpusetCpus}} {{.HostConfig.CpusetMems}}", "0 0"),
    Kernel(
        "-m 80m --memory-swap 160m",
        "{{.HostConfig.Memory}} {{.HostConfig.MemorySwap}}",
        "83886080 167772160",
    ),
    Kernel("--memory-reservation 40m", "{{.HostConfig.MemoryReservation}}", "41943040"),
    Kernel("--pids-limit 55", "{{.HostConfig.PidsLimit}}", "55"),
    Shown("--restart always", "{{.HostConfig.RestartPolicy.Name}}", "always"),
];

/// The long flags that `docker VERB --help` tells of.
fn told(verb: &[&str]) -> BTreeSet<String> {
    let out = std::process::Command::new(brigantine_testkit::docker_command())
        .args(verb)
        .arg("--help")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let flags = text.lines().filter_map(|line| {
        let line = line.trim_start();
        line.starts_with('-').then(|| line.split([' ', ',']).find(|word| word.starts_with("--")))?
    });
    flags.map(str::to_owned).filter(|flag| flag != "--help").collect()
}

fn long(short: &str) -> &str {
    match short {
        "-a" => "--attach",
        "-c" => "--cpu-shares",
        "-e" => "--env",
        "-i" => "--interactive",
        "-l" => "--label",
        "-m" => "--memory",
        "-p" => "--publish",
        "-P" => "--publish-all",
        "-q" => "--quiet",
        "-t" => "--tty",
        "-u" => "--user",
        "-v" => "--volume",
        "-w" => "--workdir",
        other => other,
    }
}

fn flags_of(row: &Row) -> &'static str {
    match row {
        Inside(flags, ..) | Shown(flags, ..) | Kernel(flags, ..) | Accepted(flags) | Refused(flags, _) => {
            flags
        }
    }
}

/// The flags of a table, those of `more`, and no others.
fn assert_complete(verb: &[&str], table: &[Row], more: &[&str]) {
    let words = table.iter().flat_map(|row| flags_of(row).split(' ')).filter(|word| word.starts_with('-'));
    let used: BTreeSet<String> =
        words.chain(more.iter().copied()).map(|flag| long(flag).to_owned()).collect();
    let missing: Vec<_> = told(verb).difference(&used).cloned().collect();
    // What this version of the command does not have any more does no harm.
    assert_eq!(missing, Vec::<String>::new(), "flags of {verb:?} that no row uses");
}

/// Whether it was the kernel that has not, or not enough of, what was asked for.
fn is_the_kernels(text: &str) -> bool {
    text.to_lowercase().contains("kernel") || text.contains("/cgroup/")
}

/// A block device of this machine.
fn disk() -> Option<String> {
    let disks =
        fs::read_dir("/sys/block").ok()?.flatten().map(|disk| format!("/dev/{}", disk.file_name().display()));
    disks.into_iter().find(|disk| fs::metadata(disk).is_ok())
}

struct Bench {
    host: Host,
    disk: Option<String>,
}

impl Bench {
    /// A row's flags as words; none if the machine has not what they need.
    fn words(&self, flags: &str) -> Option<Vec<String>> {
        let mut flags = flags.replace("DIR", &self.host.dir().join("flags").display().to_string());
        if flags.contains("DISK") {
            flags = flags.replace("DISK", self.disk.as_deref()?);
        }
        Some(crate::verbs::words(&flags))
    }

    fn check(&self, row: &Row) {
        let Some(words) = self.words(flags_of(row)) else { return };
        let words = || words.iter().map(String::as_str);
        let create = || {
            let args = ["container", "create"].into_iter().chain(words()).chain(["busybox", "true"]);
            self.host.cli(args).run()
        };
        let what = flags_of(row);
        match row {
            Inside(_, script, expected) => {
                let by_shell = ["sh", "-c", script];
                let plain = crate::verbs::words(script);
                // An entrypoint takes the words themselves.
                let command: Vec<&str> = if what.contains("--entrypoint") {
                    plain.iter().map(String::as_str).collect()
                } else {
                    by_shell.to_vec()
                };
                let args =
                    ["container", "run", "--rm"].into_iter().chain(words()).chain(["busybox"]).chain(command);
                let out = self.host.cli(args).run();
                assert_eq!(out.code, 0, "{what}: {}", out.stderr);
                assert_eq!(out.stdout.split_whitespace().collect::<Vec<_>>().join(" "), *expected, "{what}");
            }
            Shown(_, template, expected) | Kernel(_, template, expected) => {
                let out = create();
                let may_lack = matches!(row, Kernel(..));
                if may_lack && (out.code != 0 || !out.stderr.is_empty()) {
                    assert!(is_the_kernels(&out.stderr), "{what}: {}", out.stderr);
                    if out.code != 0 {
                        return;
                    }
                }
                assert_eq!(out.code, 0, "{what}: {}", out.stderr);
                let id = out.stdout.trim();
                let shown = self.host.cli(["inspect", "-f", template, id]).ok();
                if !may_lack || out.stderr.is_empty() {
                    assert_eq!(shown, *expected, "{what}");
                }
                self.host.cli(["container", "rm", "-v", id]).ok();
            }
            Accepted(_) => {
                let out = create();
                assert_eq!(out.code, 0, "{what}: {}", out.stderr);
                self.host.cli(["container", "rm", out.stdout.trim()]).ok();
            }
            Refused(_, says) => {
                let out = create();
                assert_ne!(out.code, 0, "{what}");
                assert!(out.stderr.contains(says), "{what}: {}", out.stderr);
            }
        }
    }
}

fn bench() -> Bench {
    let host = Host::new(Client::Docker);
    let dir = host.dir().join("flags");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("env"), "FROM_FILE=yes\n").unwrap();
    fs::write(dir.join("labels"), "from=file\n").unwrap();
    host.cli(["network", "create", "--ipv6", "--subnet", "172.28.7.0/24", "--subnet", "fd07::/64", "flags"])
        .ok();
    host.background(&["--name", "anchor", "-v", "/shared"], "echo kept >/shared/note; sleep 1000");
    host.wait_exec("anchor", &["test", "-s", "/shared/note"]);
    Bench { host, disk: disk() }
}

#[test]
fn every_flag_of_create_and_run_does_what_it_says() {
    assert_complete(&["container", "create"], CREATE, &["--help"]);
    assert_complete(&["container", "run"], CREATE, RUN);
    let bench = bench();
    let failed =
        CREATE.iter().filter(|row| std::panic::catch_unwind(AssertUnwindSafe(|| bench.check(row))).is_err());
    assert_eq!(failed.map(flags_of).collect::<Vec<_>>(), Vec::<&str>::new());
    assert_eq!(fs::read_to_string(bench.host.dir().join("flags/cid")).unwrap().len(), 64);
    bench.host.cli(["rm", "-fv", "anchor"]).ok();
    bench.host.cli(["network", "rm", "flags"]).ok();
    bench.host.assert_nothing_left();
}

#[test]
fn every_flag_of_update_changes_a_running_container() {
    assert_complete(&["container", "update"], UPDATE, &["--cpus"]);
    let bench = bench();
    for row in UPDATE {
        let (Shown(flags, template, expected) | Kernel(flags, template, expected)) = row else {
            unreachable!()
        };
        let words = bench.words(flags).unwrap();
        let args =
            ["container", "update"].into_iter().chain(words.iter().map(String::as_str)).chain(["anchor"]);
        let out = bench.host.cli(args).run();
        if out.code != 0 {
            assert!(matches!(row, Kernel(..)) && is_the_kernels(&out.stderr), "{flags}: {}", out.stderr);
            continue;
        }
        assert_eq!(bench.host.cli(["inspect", "-f", template, "anchor"]).ok(), *expected, "{flags}");
    }
    bench.host.background(&["--name", "free"], "sleep 1000");
    bench.host.cli(["container", "update", "--cpus", "0.5", "free"]).ok();
    assert_eq!(bench.host.cli(["inspect", "-f", "{{.HostConfig.NanoCpus}}", "free"]).ok(), "500000000");
    bench.host.cli(["rm", "-fv", "anchor", "free"]).ok();
}
