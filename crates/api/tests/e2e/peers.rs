//! Other programs in the same room: what we save loads in docker and podman and the reverse, with the same ids; and
//! docker, podman, skopeo and we push to and pull from each other's registries with TLS and passwords.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use brigantine_testkit::fixtures::{self, Archive, Layer};
use brigantine_testkit::peers::{HTPASSWD, podman};
use brigantine_testkit::{Client, Engine, Flavor, Sandbox, executable, must, until};

/// An image of two layers whose files have owners, links and times of their own.
fn image(name: &str) -> Archive {
    let mut layer = Layer::default();
    layer
        .dir("data", 0o2755)
        .file("data/a", 0o4711, b"a")
        .hardlink("data/b", "data/a")
        .symlink("data/c", "a");
    Archive::new(name)
        .layer(fixtures::busybox_layer().unwrap())
        .layer(layer.finish())
        .cmd(&["cat", "/data/c"])
}

/// The id that podman knows the one image of this name by.
fn podman_id(sandbox: &Sandbox) -> String {
    format!(
        "sha256:{}",
        must(podman(sandbox).args(["images", "--no-trunc", "-q"])).trim_start_matches("sha256:")
    )
}

fn id(engine: &Engine, name: &str) -> String {
    engine.docker(["inspect", "-f", "{{.Id}}", name]).ok()
}

#[test]
fn docker_loads_what_we_save_and_we_what_docker_saves() {
    let ours = Engine::builder().flavor(Flavor::Brig).start();
    let docker = Engine::builder().flavor(Flavor::Dockerd).start();
    let original = image("round/trip:1");
    ours.load(&original.write(ours.dir(), "image.tar"));
    let (there, back) = (ours.dir().join("there.tar"), ours.dir().join("back.tar"));
    for client in [Client::Docker, Client::Brig] {
        ours.client(client, ["save", "-o", there.to_str().unwrap(), "round/trip:1"]).ok();
        docker.load(&there);
        assert_eq!(id(&docker, "round/trip:1"), original.id());
        assert_eq!(docker.docker(["run", "--rm", "--network", "none", "round/trip:1"]).ok(), "a");
        docker.docker(["save", "-o", back.to_str().unwrap(), "round/trip:1"]).ok();
        ours.docker(["rmi", "round/trip:1"]).ok();
        docker.docker(["rmi", "round/trip:1"]).ok();
        ours.load(&back);
        assert_eq!(id(&ours, "round/trip:1"), original.id());
        assert_eq!(ours.docker(["run", "--rm", "--network", "none", "round/trip:1"]).ok(), "a");
    }
    // What was made here, too.
    ours.docker(["run", "--name", "box", "--network", "none", "round/trip:1", "rm", "/data/b"]).ok();
    ours.docker(["commit", "box", "made/here:1"]).ok();
    ours.docker(["save", "-o", there.to_str().unwrap(), "made/here:1"]).ok();
    docker.load(&there);
    assert_eq!(id(&docker, "made/here:1"), id(&ours, "made/here:1"));
    assert_eq!(
        docker.docker(["run", "--rm", "--network", "none", "made/here:1", "ls", "/data"]).ok(),
        "a\nc"
    );
}

#[test]
fn podman_loads_what_we_save_and_we_what_podman_saves() {
    let ours = Engine::builder().flavor(Flavor::Brig).start();
    let original = image("localhost/round/trip:1");
    ours.load(&original.write(ours.dir(), "image.tar"));
    let (there, name) = (ours.dir().join("there.tar"), "localhost/round/trip:1");
    ours.docker(["save", "-o", there.to_str().unwrap(), name]).ok();
    must(podman(ours.sandbox()).args(["load", "-q", "-i"]).arg(&there));
    assert_eq!(podman_id(ours.sandbox()), original.id());
    for format in ["docker-archive", "oci-archive"] {
        let back = ours.dir().join(format);
        must(podman(ours.sandbox()).args(["save", "-q", "--format", format, "-o"]).arg(&back).arg(name));
        ours.docker(["rmi", name]).ok();
        ours.load(&back);
        // An OCI archive of podman's has a configuration of OCI's form: the same layers, another document.
        if format == "docker-archive" {
            assert_eq!(id(&ours, name), original.id());
        }
        assert_eq!(ours.docker(["run", "--rm", "--network", "none", name]).ok(), "a", "{format}");
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Server {
    Ours,
    Debians,
}

/// A registry with TLS and passwords that the engine knows as `registry.test:PORT`; its authority is `ca.crt`.
fn serve(engine: &Engine, server: Server) -> (String, Child) {
    let dir = engine.dir().join("secured");
    fs::create_dir(&dir).unwrap();
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
    write("htpasswd", HTPASSWD);
    write("ext", "subjectAltName=DNS:registry.test\nbasicConstraints=CA:FALSE\n");
    let openssl = |line: &str| must(Command::new("openssl").args(line.split(' ')).current_dir(&dir));
    openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=ca");
    openssl("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=registry.test");
    openssl(
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out server.crt",
    );
    let listener =
        engine.sandbox().within_net(|| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let at = |name: &str| dir.join(name).display().to_string();
    let mut command = match server {
        Server::Ours => {
            let mut command = engine.sandbox().command(executable("brig"));
            command.args([
                "registry",
                "serve",
                "--listen",
                &format!("127.0.0.1:{port}"),
                "--root",
                &at("store"),
            ]);
            command.args(["--tls-cert", &at("server.crt"), "--tls-key", &at("server.key")]);
            command.args(["--htpasswd", &at("htpasswd")]);
            command
        }
        Server::Debians => {
            let config = format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: \
                 127.0.0.1:{port}\n  tls: {{certificate: {}, key: {}}}\nauth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                at("store"),
                at("server.crt"),
                at("server.key"),
                at("htpasswd"),
            );
            write("config.yml", &config);
            let mut command = engine.sandbox().command("docker-registry");
            command.args(["serve", &at("config.yml")]);
            command
        }
    };
    let log = fs::File::create(dir.join("log")).unwrap();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let up = || engine.sandbox().within_net(|| TcpStream::connect(address)).ok();
    assert!(until(Duration::from_secs(20), up).is_some(), "{}", fs::read_to_string(dir.join("log")).unwrap());
    (format!("registry.test:{port}"), child)
}

fn authority(engine: &Engine) -> PathBuf {
    engine.dir().join("secured")
}

/// The engine, skopeo and podman push and pull, with the right password and authority only.
fn everybody_gets_along(flavor: Flavor, server: Server) {
    let hosts = "127.0.0.1 localhost registry.test\n";
    let engine = Engine::builder().flavor(flavor).etc("hosts", hosts).start();
    let (registry, mut served) = serve(&engine, server);
    let original = image("made/here:1");
    engine.load(&original.write(engine.dir(), "image.tar"));
    let name = |tag: &str| format!("{registry}/team/box:{tag}");
    engine.docker(["tag", "made/here:1", &name("engine")]).ok();

    if flavor == Flavor::Brig {
        // Docker's daemon believes whoever is on loopback, by whatever name.
        engine.docker(["push", &name("engine")]).exits(1).expect_stderr("certificate");
    }
    let trust = format!("/etc/docker/certs.d/{registry}");
    must(engine.sandbox().command("mkdir").args(["-p", &trust]));
    must(engine.sandbox().command("cp").arg(authority(&engine).join("ca.crt")).arg(&trust));
    let refused = engine.docker(["push", &name("engine")]).exits(1);
    let said = refused.stderr.to_lowercase();
    assert!(["no basic auth", "unauthorized", "denied"].iter().any(|word| said.contains(word)), "{refused}");
    engine.docker(["login", "-u", "user", "-p", "wrong", &registry]).exits(1).expect_stderr("unauthorized");
    engine.docker(["login", "-u", "user", "-p", "secret", &registry]).ok();
    engine.docker(["push", &name("engine")]).ok();
    engine.docker(["rmi", &name("engine")]).ok();
    engine.docker(["pull", &name("engine")]).ok();
    assert_eq!(id(&engine, &name("engine")), original.id());

    // skopeo: what the engine pushed comes out, and what it pushes the engine takes.
    let skopeo = |from: &str, to: &str, side: &str| {
        let mut command = engine.sandbox().command("skopeo");
        command.args(["--insecure-policy", "copy", &format!("--{side}-cert-dir"), &trust]);
        command.args([&format!("--{side}-creds"), "user:secret", from, to]);
        must(&mut command)
    };
    let layout = engine.dir().join("layout").display().to_string();
    skopeo(&format!("docker://{}", name("engine")), &format!("dir:{layout}"), "src");
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(Path::new(&layout).join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["config"]["digest"], original.id());
    skopeo(&format!("dir:{layout}"), &format!("docker://{}", name("skopeo")), "dest");
    engine.docker(["pull", &name("skopeo")]).ok();
    assert_eq!(id(&engine, &name("skopeo")), original.id());

    // podman, which has the image under the same id.
    let access = ["--cert-dir", &trust, "--creds", "user:secret"];
    must(podman(engine.sandbox()).args(["pull", "-q"]).args(access).arg(name("engine")));
    assert_eq!(podman_id(engine.sandbox()), original.id());
    must(podman(engine.sandbox()).args(["push", "-q"]).args(access).args([&name("engine"), &name("podman")]));
    engine.docker(["pull", &name("podman")]).ok();
    assert_eq!(id(&engine, &name("podman")), original.id());
    let denied = podman(engine.sandbox())
        .args(["pull", "-q", "--cert-dir", &trust, "--creds", "user:wrong", &name("skopeo")])
        .output()
        .unwrap();
    assert!(!denied.status.success());

    if flavor == Flavor::Brig {
        // Without an engine.
        let target = engine.dir().join("copied.tar");
        let to = format!("oci-archive:{}", target.display());
        let mut copy = engine.sandbox().command(executable("brig"));
        copy.env("DOCKER_CONFIG", engine.dir().join("config")).env("HOME", engine.dir().join("home"));
        must(copy.args(["image", "copy", &format!("docker://{}", name("podman")), &to]));
        assert!(target.exists());
    }
    // The server itself goes with the sandbox.
    served.kill().unwrap();
    served.wait().unwrap();
}

#[test]
fn our_registry_serves_our_engine_skopeo_and_podman_with_tls_and_passwords() {
    everybody_gets_along(Flavor::Brig, Server::Ours);
}

#[test]
fn our_registry_serves_dockers_daemon_with_tls_and_passwords() {
    everybody_gets_along(Flavor::Dockerd, Server::Ours);
}

#[test]
fn debians_registry_serves_our_engine_with_tls_and_passwords() {
    everybody_gets_along(Flavor::Brig, Server::Debians);
}
