//! Another engine on the same machine, the real one with its own networks and rules: podman with its plugins. Containers
//! of each go out and are reached; nothing of theirs changes when ours come and go.

use std::fs;
use std::io::Read as _;
use std::net::TcpStream;
use std::process::{Command, Stdio};

use brigantine_testkit::{Client, Engine, Outside, until, wait::PATIENCE};

use crate::Host;

const SERVER: &str = "while :; do echo served | nc -l -p 80; done";

/// As podman calls what is `busybox` in an archive of docker's.
const IMAGE: &str = "docker.io/library/busybox:latest";

#[track_caller]
fn must(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// Whether a container answers at a port of the machine, asked from another one.
fn is_served(outside: &Outside, port: u16) -> bool {
    let hear = || {
        let mut stream: TcpStream = outside.tcp(port).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        (text == "served\n").then_some(())
    };
    until(PATIENCE, hear).is_some()
}

/// The rules that are not ours, without what counts packets.
fn theirs(host: &Host) -> Vec<String> {
    let text = must(host.sandbox().command("iptables-nft-save").stderr(Stdio::null()));
    text.lines().filter(|line| line.starts_with('-')).map(str::to_owned).collect()
}

fn busybox(engine: &Engine) -> std::path::PathBuf {
    let archive = engine.dir().join("busybox.tar");
    engine.docker(["save", "-o", archive.to_str().unwrap(), "busybox"]).ok();
    archive
}

/// podman 4.3 with the network that Debian configures: bridge, portmap, firewall and tuning.
#[test]
fn podman_and_we_are_reached_on_one_machine() {
    let engine = Engine::with_busybox();
    if engine.is_peer() {
        return;
    }
    let host = Host { engine, client: Client::Docker };
    let sandbox = host.sandbox();
    // What its plugins remember is this machine's.
    for place in ["/var/lib/cni", "/etc/cni/net.d"] {
        let dir = host.engine.dir().join(place.replace('/', "_"));
        fs::create_dir(&dir).unwrap();
        if place.starts_with("/etc") {
            must(Command::new("cp").arg("/etc/cni/net.d/87-podman-bridge.conflist").arg(&dir));
        }
        must(sandbox.command("mkdir").args(["-p", place]));
        must(sandbox.command("mount").arg("--bind").arg(&dir).arg(place));
    }
    let podman = || {
        let mut command = sandbox.command("podman");
        let dir = |name: &str| sandbox.dir().join(name);
        command.arg("--root").arg(dir("podman")).arg("--runroot").arg(dir("podman-run"));
        command.arg("--tmpdir").arg(dir("podman-tmp")).env("HOME", sandbox.dir());
        command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
        command.args(["--runtime", "/usr/sbin/runc"]);
        command
    };
    must(podman().args(["load", "-q", "-i"]).arg(busybox(&host.engine)));
    let outside = Outside::connect(&host.engine);
    let parent = format!("--cgroup-parent=/{}", sandbox.cgroup());
    let other = must(podman().args([
        "run",
        "-d",
        "--pull=never",
        &parent,
        "-p",
        "9090:80",
        IMAGE,
        "sh",
        "-c",
        SERVER,
    ]));
    let before = theirs(&host);
    let ours = host.background(&["-p", "8080:80"], SERVER);
    assert!(is_served(&outside, 9090), "theirs");
    assert!(is_served(&outside, 8080), "ours");
    // Each sees the other at the published port only, and the world.
    let listener = outside.listen();
    let port = listener.local_addr().unwrap().port();
    let accepting = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, from) = listener.accept().unwrap();
            std::io::Write::write_all(&mut stream, from.ip().to_string().as_bytes()).unwrap();
        }
    });
    let outwards = format!("nc -w 5 {} {port} </dev/null", Outside::ADDRESS);
    assert_eq!(host.script(&[], &outwards), Outside::ENGINE.to_string(), "ours outwards");
    assert_eq!(
        must(podman().args(["exec", &other, "sh", "-c", &outwards])),
        Outside::ENGINE.to_string(),
        "theirs outwards"
    );
    accepting.join().unwrap();
    let at = host.inspect(&ours)["NetworkSettings"]["IPAddress"].as_str().unwrap().to_owned();
    let directly = format!("nc -w 1 {at} 80 </dev/null || echo none");
    assert_eq!(
        must(podman().args(["exec", &other, "sh", "-c", &directly])),
        "none",
        "past what is published"
    );
    let published = format!("nc -w 5 {} 8080 </dev/null", Outside::ENGINE);
    assert_eq!(must(podman().args(["exec", &other, "sh", "-c", &published])), "served");
    host.cli(["rm", "-f", &ours]).ok();
    assert_eq!(theirs(&host), before, "nothing of theirs changed");
    assert!(is_served(&outside, 9090), "and it works");
    must(podman().args(["rm", "-f", "-t", "0", &other]));
    drop(outside);
}
