//! Another engine on the same machine, the real one with its own networks and rules: podman with its plugins, dockerd.
//! Containers of each go out and are reached; nothing of theirs changes when ours come and go.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use brigantine_testkit::{Client, Engine, Outside, must, peers, until, wait::PATIENCE};

use crate::Host;

const SERVER: &str = "while :; do echo served | nc -l -p 80; done";

/// As podman calls what is `busybox` in an archive of docker's.
const IMAGE: &str = "docker.io/library/busybox:latest";

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

/// Two containers ask the other machine whom it sees, by the command that is given.
fn go_out(outside: &Outside, both: impl FnOnce(&str)) {
    let listener = outside.listen();
    let port = listener.local_addr().unwrap().port();
    let accepting = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, from) = listener.accept().unwrap();
            std::io::Write::write_all(&mut stream, from.ip().to_string().as_bytes()).unwrap();
        }
    });
    both(&format!("nc -w 5 {} {port} </dev/null", Outside::ADDRESS));
    accepting.join().unwrap();
}

/// The rules that are not ours, without what counts packets.
fn theirs(host: &Host) -> Vec<String> {
    let text = must(host.sandbox().command("iptables-nft-save").stderr(Stdio::null()));
    text.lines().filter(|line| line.starts_with('-')).map(str::to_owned).collect()
}

fn busybox(engine: &Engine) -> PathBuf {
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
    let podman = || peers::podman(sandbox);
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
    go_out(&outside, |outwards| {
        assert_eq!(host.script(&[], outwards), Outside::ENGINE.to_string(), "ours outwards");
        let said = must(podman().args(["exec", &other, "sh", "-c", outwards]));
        assert_eq!(said, Outside::ENGINE.to_string(), "theirs outwards");
    });
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

/// dockerd in the sandbox of an engine of ours, with files of its own.
struct Docker {
    dir: PathBuf,
    daemon: Child,
}

impl Docker {
    fn start(host: &Host) -> Self {
        let dir = host.dir().join("docker");
        fs::create_dir(&dir).unwrap();
        let docker = Self { daemon: Self::run(host, &dir), dir };
        docker.wait();
        docker
    }

    /// Containers outlive its daemon, as ours do.
    fn run(host: &Host, dir: &Path) -> Child {
        let log = fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
        let (sandbox, dir) = (host.sandbox(), dir.display());
        let mut command = sandbox.command("dockerd");
        command
            .args(["--storage-driver", "overlay2", "--live-restore", "--bip", "172.29.0.1/16"])
            .arg(format!("--data-root={dir}/data"))
            .arg(format!("--exec-root={dir}/exec"))
            .arg(format!("--host=unix://{dir}/sock"))
            .arg(format!("--pidfile={dir}/pid"))
            .arg(format!("--cgroup-parent=/{}", sandbox.cgroup()))
            .env_remove("DOCKER_HOST");
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command.spawn().unwrap()
    }

    fn wait(&self) {
        let up =
            until(PATIENCE, || self.command(&["version"]).output().unwrap().status.success().then_some(()));
        assert!(up.is_some(), "{}", fs::read_to_string(self.dir.join("log")).unwrap());
    }

    fn restart(&mut self, host: &Host) {
        let pid = fs::read_to_string(self.dir.join("pid")).unwrap();
        must(host.sandbox().command("kill").arg(pid.trim()));
        let ended = until(PATIENCE, || self.daemon.try_wait().unwrap());
        assert!(ended.is_some(), "dockerd ends");
        self.daemon = Self::run(host, &self.dir);
        self.wait();
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg("--host").arg(format!("unix://{}/sock", self.dir.display())).args(words);
        command.env("HOME", &self.dir).stdin(Stdio::null());
        command
    }

    fn cli(&self, words: &[&str]) -> String {
        must(&mut self.command(words))
    }

    /// A container of its that is published at 9090.
    fn serve(&self, host: &Host) -> String {
        self.cli(&["load", "-q", "-i", busybox(&host.engine).to_str().unwrap()]);
        self.cli(&["run", "-d", "-p", "9090:80", "busybox", "sh", "-c", SERVER])
    }
}

#[track_caller]
fn both_go_out(outside: &Outside, host: &Host, docker: &Docker, theirs: &str) {
    go_out(outside, |outwards| {
        assert_eq!(host.script(&[], outwards), Outside::ENGINE.to_string(), "ours outwards");
        let said = docker.cli(&["exec", theirs, "sh", "-c", outwards]);
        assert_eq!(said, Outside::ENGINE.to_string(), "theirs outwards");
    });
}

#[track_caller]
fn both_are_served(outside: &Outside, when: &str) {
    assert!(is_served(outside, 9090), "theirs, {when}");
    assert!(is_served(outside, 8080), "ours, {when}");
}

/// Debian's dockerd 20.10 with its default bridge, on a machine that we were on first.
#[test]
fn docker_and_we_are_reached_on_one_machine() {
    let engine = Engine::with_busybox();
    if engine.is_peer() {
        return;
    }
    let mut host = Host { engine, client: Client::Docker };
    let outside = Outside::connect(&host.engine);
    let ours = host.background(&["-p", "8080:80"], SERVER);
    let mut docker = Docker::start(&host);
    let other = docker.serve(&host);
    both_are_served(&outside, "side by side");
    both_go_out(&outside, &host, &docker, &other);
    // Each sees the other at its published port, and theirs do not see ours otherwise.
    let at = host.inspect(&ours)["NetworkSettings"]["IPAddress"].as_str().unwrap().to_owned();
    let directly = format!("nc -w 1 {at} 80 </dev/null || echo none");
    assert_eq!(docker.cli(&["exec", &other, "sh", "-c", &directly]), "none", "past what is published");
    let published = |port: u16| format!("nc -w 5 {} {port} </dev/null", Outside::ENGINE);
    assert_eq!(docker.cli(&["exec", &other, "sh", "-c", &published(8080)]), "served");
    assert_eq!(host.script(&[], &published(9090)), "served");
    // Networks of one's own do not take each other's subnets.
    let mut subnets = BTreeSet::new();
    for name in ["one", "two"] {
        docker.cli(&["network", "create", name]);
        host.cli(["network", "create", name]).ok();
        let ask = ["network", "inspect", "-f", "{{(index .IPAM.Config 0).Subnet}}", name];
        subnets.extend([docker.cli(&ask), host.cli(ask).ok()]);
    }
    assert_eq!(subnets.len(), 4, "{subnets:?}");
    for name in ["one", "two"] {
        docker.cli(&["network", "rm", name]);
        host.cli(["network", "rm", name]).ok();
    }
    docker.restart(&host);
    both_are_served(&outside, "after a restart of theirs");
    // It orders its rules anew when its networks come and go.
    let before = theirs(&host);
    host.engine.stop_daemon();
    host.engine.restart_daemon();
    both_are_served(&outside, "after a restart of ours");
    both_go_out(&outside, &host, &docker, &other);
    host.cli(["rm", "-f", &ours]).ok();
    assert_eq!(theirs(&host), before, "nothing of theirs changed");
    assert!(is_served(&outside, 9090), "and it works");
    docker.cli(&["rm", "-f", &other]);
}

/// Where docker came first it turned forwarding on, and drops what others forward: our log says so. With the way for others
/// that its documentation names, and ours, all is well, also after a restart of either.
#[test]
fn where_docker_was_first_ours_pass_by_its_users_chain() {
    let engine = Engine::with_busybox();
    if engine.is_peer() {
        return;
    }
    let mut host = Host { engine, client: Client::Docker };
    let outside = Outside::connect(&host.engine);
    host.engine.stop_daemon();
    must(host.sandbox().command("sysctl").arg("net.ipv4.ip_forward=0"));
    let mut docker = Docker::start(&host);
    host.engine.restart_daemon();
    let other = docker.serve(&host);
    host.background(&["-p", "8080:80"], SERVER);
    assert!(is_served(&outside, 9090), "theirs");
    assert!(outside.tcp(8080).is_err(), "theirs drop what they do not know");
    let log = host.engine.daemon_log();
    let said = log
        .lines()
        .any(|line| line.contains("drops forwarded packets") && line.contains("ip filter FORWARD"));
    assert!(said, "{log}");
    for direction in ["-i", "-o"] {
        must(host.sandbox().command("iptables").args([
            "-I",
            "DOCKER-USER",
            direction,
            "brig0",
            "-j",
            "ACCEPT",
        ]));
    }
    both_are_served(&outside, "with the way for others");
    both_go_out(&outside, &host, &docker, &other);
    docker.restart(&host);
    both_are_served(&outside, "after a restart of theirs");
    host.engine.stop_daemon();
    host.engine.restart_daemon();
    both_are_served(&outside, "after a restart of ours");
    both_go_out(&outside, &host, &docker, &other);
}
