//! Mounts beyond directories: images, file systems that a volume's options name, websockets, TLS and metrics beside them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use brigantine_testkit::{Client, Engine, eventually};

use crate::Host;

both![
    an_images_files_can_be_mounted,
    volumes_with_options_are_file_systems,
    shared_memory_goes_with_the_ipc_namespace,
    what_the_hosts_mount_forbids_is_forbidden_inside,
];

fn an_images_files_can_be_mounted(client: Client) {
    let host = Host::new(client);
    if host.is_peer() {
        // Debian's is older than such mounts.
        return;
    }
    let mut lower = brigantine_testkit::fixtures::Layer::default();
    lower.dir("data", 0o755).file("data/a", 0o644, b"from below").file("data/gone", 0o644, b"x");
    let mut upper = brigantine_testkit::fixtures::Layer::default();
    upper.file("data/.wh.gone", 0o644, b"").file("data/b", 0o644, b"from above");
    let image =
        brigantine_testkit::fixtures::Archive::new("files:1").layer(lower.finish()).layer(upper.finish());
    host.load(&image.write(host.dir(), "files.tar"));
    let mount = "type=image,source=files:1,target=/img";
    let script = "cat /img/data/a /img/data/b; ls /img/data; touch /img/x || echo read-only";
    let out = host.cli(["run", "--rm", "--mount", mount, "busybox", "sh", "-c", script]).ok();
    assert_eq!(out, "from belowfrom abovea\nb\nread-only");
    host.cli(["create", "--name", "holder", "--mount", mount, "busybox"]).ok();
    assert_eq!(host.inspect("holder")["Mounts"][0]["Type"], "image");
    host.cli(["rmi", "files:1"]).exits(1);
    host.cli(["rm", "holder"]).ok();
    host.cli(["rmi", "files:1"]).ok();
    host.cli(["run", "--rm", "--mount", "type=image,source=none:1,target=/x", "busybox", "true"]).exits(125);
    host.assert_nothing_left();
}

fn shared_memory_goes_with_the_ipc_namespace(client: Client) {
    let host = Host::new(client);
    host.background(&["--name", "donor", "--ipc", "shareable"], "echo there >/dev/shm/file; sleep 1000");
    host.wait_exec("donor", &["test", "-s", "/dev/shm/file"]);
    let script = "cat /dev/shm/file; echo back >/dev/shm/other";
    assert_eq!(host.script(&["--ipc", "container:donor"], script), "there");
    assert_eq!(host.cli(["exec", "donor", "cat", "/dev/shm/other"]).ok(), "back");
    // Nobody's but its own.
    assert_eq!(host.script(&[], "ls /dev/shm"), "");
    host.background(&["--name", "closed"], "sleep 1000");
    let refused = host.cli(["run", "--rm", "--ipc", "container:closed", "busybox", "true"]).exits(125);
    assert!(refused.stderr.contains("non-shareable IPC"), "{}", refused.stderr);
    host.cli(["rm", "-f", "donor", "closed"]).ok();
    host.assert_nothing_left();
}

fn what_the_hosts_mount_forbids_is_forbidden_inside(client: Client) {
    let host = Host::new(client);
    let source = host.dir().join("forbidding");
    std::fs::create_dir(&source).unwrap();
    let mount = |words: &[&str]| {
        assert!(host.sandbox().command("mount").args(words).arg(&source).status().unwrap().success());
    };
    mount(&["-t", "tmpfs", "x"]);
    mount(&["-o", "remount,bind,ro,nosuid,noexec"]);
    let volume = format!("{}:/data", source.display());
    let script = "touch /data/x || grep ' /data ' /proc/self/mounts";
    let out = host.script(&["-v", &volume], script);
    assert!(out.contains(" ro,nosuid,noexec,"), "{out}");
    assert!(host.sandbox().command("umount").arg(&source).status().unwrap().success());
    host.assert_nothing_left();
}

/// `:U`: a directory of whoever on the host is the container's user's, and stays whose it is.
#[test]
fn a_mounts_owner_can_be_mapped() {
    let host = Host::new(Client::Docker);
    let dir = host.dir().join("project");
    std::fs::create_dir(&dir).unwrap();
    std::os::unix::fs::chown(&dir, Some(4711), Some(4712)).unwrap();
    let bind = |mode: &str| format!("{}:/d{mode}", dir.display());
    let script = "stat -c '%u %g' /d; echo x >/d/file; stat -c '%u %g' /d/file";
    let plain = ["run", "--rm", "-u", "1000:1000", "-v", &bind(""), "busybox", "sh", "-c", script];
    assert!(host.cli(plain).exits(1).stderr.contains("ermission denied"));
    let mapped = ["run", "--rm", "-u", "1000:1000", "-v", &bind(":U"), "busybox", "sh", "-c", script];
    assert_eq!(host.cli(mapped).ok(), "1000 1000\n1000 1000");
    let owner = std::os::unix::fs::MetadataExt::uid;
    assert_eq!(owner(&std::fs::metadata(dir.join("file")).unwrap()), 4711);
    assert_eq!(owner(&std::fs::metadata(&dir).unwrap()), 4711);
    // Read-only stays so.
    let read_only = ["run", "--rm", "-v", &bind(":ro,idmap"), "busybox", "touch", "/d/file"];
    assert!(host.cli(read_only).exits(1).stderr.contains("Read-only"));
    host.assert_nothing_left();
}

fn volumes_with_options_are_file_systems(client: Client) {
    let mut host = Host::new(client);
    host.cli([
        "volume",
        "create",
        "-o",
        "type=tmpfs",
        "-o",
        "device=tmpfs",
        "-o",
        "o=size=1m,mode=700,noexec",
        "small",
    ])
    .ok();
    host.background(&["--name", "first", "-v", "small:/s"], "echo shared >/s/file; sleep 1000");
    host.wait_exec("first", &["test", "-s", "/s/file"]);
    // Shared by those who run at the same time, and gone with the last.
    assert_eq!(
        host.script(&["-v", "small:/t"], "cat /t/file; grep ' /t ' /proc/mounts | cut -d' ' -f3"),
        "shared\ntmpfs"
    );
    host.cli(["exec", "first", "sh", "-c", "head -c 2m /dev/zero >/s/big"]).exits(1);
    if !host.is_peer() {
        host.engine.kill_daemon();
        host.engine.restart_daemon();
        assert_eq!(host.script(&["-v", "small:/t"], "cat /t/file"), "shared");
    }
    host.cli(["rm", "-f", "first"]).ok();
    let mounts = || host.sandbox().mounts().iter().any(|line| line.contains("volumes/small"));
    eventually("the file system to be unmounted", || (!mounts()).then_some(()));
    assert_eq!(host.script(&["-v", "small:/t"], "ls -A /t"), "");
    host.cli(["volume", "rm", "small"]).ok();
    host.cli(["volume", "create", "-o", "type=tmpfs", "bad"])
        .exits(1)
        .expect_stderr("missing required option");
    host.cli(["volume", "create", "-o", "type=nosuchfs", "-o", "device=x", "odd"]).ok();
    host.cli(["run", "--rm", "-v", "odd:/o", "busybox", "true"])
        .exits(125)
        .expect_stderr("failed to mount local volume");
    host.cli(["volume", "rm", "odd"]).ok();
    host.assert_nothing_left();
}

/// One unfragmented frame of the server: its kind and payload.
fn frame(from: &mut impl Read) -> (u8, Vec<u8>) {
    let mut head = [0; 2];
    from.read_exact(&mut head).unwrap();
    let length = match head[1] {
        126 => {
            let mut long = [0; 2];
            from.read_exact(&mut long).unwrap();
            usize::from(u16::from_be_bytes(long))
        }
        short => usize::from(short),
    };
    let mut payload = vec![0; length];
    from.read_exact(&mut payload).unwrap();
    (head[0] & 0x0f, payload)
}

#[test]
fn a_websocket_carries_the_streams() {
    let host = Host::new(Client::Docker);
    host.cli([
        "create",
        "-i",
        "--name",
        "echo",
        "busybox",
        "sh",
        "-c",
        "read line; echo got $line; read more || echo end",
    ])
    .ok();
    let path = "/v1.41/containers/echo/attach/ws?stream=1&stdin=1&stdout=1&stderr=1";
    let mut stream = host.connect();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    .unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(reader.read_line(&mut head).unwrap() > 0, "{head}");
    }
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    // RFC 6455's own example.
    assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    host.cli(["start", "echo"]).ok();
    // A masked binary frame: the mask is zero.
    stream.write_all(b"\x82\x86\0\0\0\0hello\n").unwrap();
    let (kind, payload) = frame(&mut reader);
    assert_eq!((kind, payload.as_slice()), (2, &b"got hello\n"[..]));
    host.wait_state("echo", "running");
    host.cli(["kill", "echo"]).ok();
    assert_eq!(frame(&mut reader).0, 8, "a close frame");
    host.request("GET", path).expect(400);
}

#[test]
fn metrics_are_served_in_openmetrics_form() {
    let mut engine = Engine::builder();
    engine = engine.flag("--metrics-addr=127.0.0.1:9323").busybox();
    let engine = engine.start();
    engine.docker(["run", "-d", "--name", "metered", "--memory", "64m", "busybox", "sleep", "1000"]).ok();
    let scrape = |path: &str| {
        engine.sandbox().within_net(|| {
            let mut stream = TcpStream::connect("127.0.0.1:9323").unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        })
    };
    let text = scrape("/metrics");
    assert!(text.contains("application/openmetrics-text") && text.ends_with("# EOF\n"), "{text}");
    let sample = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name) && line.contains("name=\"metered\""));
        line.unwrap_or_else(|| panic!("{name} is not in {text}"))
            .rsplit(' ')
            .next()
            .unwrap()
            .parse::<f64>()
            .unwrap()
    };
    assert!(sample("brigantine_container_memory_bytes") > 0.0);
    assert!((sample("brigantine_container_memory_limit_bytes") - f64::from(64 << 20)).abs() < 1.0);
    assert!(sample("brigantine_container_cpu_seconds_total") > 0.0);
    assert!(sample("brigantine_container_processes") >= 1.0);
    assert!(text.contains("brigantine_containers{state=\"running\"} 1"), "{text}");
    assert!(scrape("/").starts_with("HTTP/1.1 404"));
}
