//! Images as archives: save, load, import, several platforms.

use std::{fs, process::Command};

use brigantine_testkit::{
    Client, Engine,
    fixtures::{self, Archive, Layer},
    must,
    peers::Registry,
};

use crate::Host;

both![
    save_and_load_keep_the_identity,
    an_oci_archive_loads,
    every_compression_loads,
    an_archive_is_saved_compressed,
    the_platform_asked_for_is_the_one_that_goes,
    import_makes_an_image_of_a_root_file_system,
    several_platforms_are_put_under_one_name,
];

fn save_and_load_keep_the_identity(client: Client) {
    let host = Host::new(client);
    let id = host.cli(["images", "-q", "--no-trunc"]).ok();
    host.cli(["tag", "busybox", "other/name:v1"]).ok();
    let file = host.dir().join("saved.tar");
    let file = file.to_str().unwrap();
    host.cli(["save", "-o", file, "busybox", "other/name:v1"]).ok();
    host.cli(["rmi", "busybox", "other/name:v1"]).ok();
    assert_eq!(host.cli(["images", "-q"]).ok(), "");
    let said = host.cli(["load", "-i", file]).ok();
    assert!(
        said.contains("Loaded image: busybox:latest") && said.contains("Loaded image: other/name:v1"),
        "{said}"
    );
    assert_eq!(host.cli(["inspect", "-f", "{{.Id}}", "other/name:v1"]).ok(), id);
    assert_eq!(host.busybox(&["echo", "works"]), "works");
}

/// The busybox fixture as another kind of archive.
fn converted(host: &Host, to: &str, name: &str) -> String {
    let file = host.dir().join(name);
    let to = format!("{to}:{}:busybox:converted", file.display());
    let from = format!("docker-archive:{}", fixtures::busybox().display());
    must(Command::new("skopeo").args(["copy", "--insecure-policy", &from, &to]));
    file.to_str().unwrap().to_owned()
}

fn an_oci_archive_loads(client: Client) {
    let host = Host { engine: Engine::start(), client };
    if host.is_peer() {
        return; // Docker 20.10 does not know this format.
    }
    let file = converted(&host, "oci-archive", "oci.tar");
    let said = host.cli(["load", "-i", &file]).ok();
    assert!(said.contains("Loaded image"), "{said}");
    let id = host.cli(["images", "-q", "--no-trunc"]).ok();
    assert_eq!(host.cli(["run", "--rm", &id, "echo", "works"]).ok(), "works");
}

fn every_compression_loads(client: Client) {
    let host = Host { engine: Engine::start(), client };
    for (program, name) in [("gzip", "a.gz"), ("bzip2", "a.bz2"), ("xz", "a.xz"), ("zstd", "a.zst")] {
        if program == "zstd" && host.is_peer() {
            continue; // Not yet known to Docker 20.10.
        }
        let Ok(output) = Command::new(program).arg("-c").arg(fixtures::busybox()).output() else {
            continue; // A program that is not on this machine.
        };
        let file = host.dir().join(name);
        fs::write(&file, output.stdout).unwrap();
        let said = host.cli(["load", "-q", "-i", file.to_str().unwrap()]).ok();
        assert_eq!(said, "Loaded image: busybox:latest", "{program}");
        host.cli(["rmi", "busybox"]).ok();
    }
    // By standard input, too.
    let bytes = fs::read(fixtures::busybox()).unwrap();
    assert_eq!(host.cli(["load", "-q"]).stdin(bytes).ok(), "Loaded image: busybox:latest");
}

/// Ours alone: docker leaves it to other programs.
fn an_archive_is_saved_compressed(client: Client) {
    let host = Host::new(client);
    if host.is_peer() || client != Client::Brig {
        return;
    }
    let id = host.cli(["images", "-q", "--no-trunc"]).ok();
    let file = host.dir().join("saved");
    let file = file.to_str().unwrap();
    for (compression, program) in [("gzip", "gzip"), ("zstd:9", "zstd")] {
        host.cli(["save", "--compression", compression, "-o", file, "busybox"]).ok();
        let tested = Command::new(program).args(["-t", "-c"]).stdin(fs::File::open(file).unwrap()).status();
        assert!(tested.unwrap().success(), "{program}");
        host.cli(["rmi", "busybox"]).ok();
        host.cli(["load", "-i", file]).ok();
        assert_eq!(host.cli(["images", "-q", "--no-trunc"]).ok(), id);
    }
    host.cli(["save", "--compression", "lz4", "-o", file, "busybox"])
        .exits(1)
        .expect_stderr("compression \"lz4\" is not known");
}

/// An OCI archive of one image for two platforms.
fn two_platforms(host: &Host) -> String {
    let layout = host.dir().join("layout");
    let mut listed = Vec::new();
    for architecture in ["amd64", "arm64"] {
        let mut layer = Layer::default();
        layer.file("machine", 0o644, architecture.as_bytes());
        let archive = Archive::new("two:1").layer(layer.finish()).architecture(architecture);
        let file = archive.write(host.dir(), architecture);
        let to = format!("oci:{}:{architecture}", layout.display());
        let from = format!("docker-archive:{}", file.display());
        must(Command::new("skopeo").args(["copy", "--insecure-policy", &from, &to]));
        let index: serde_json::Value =
            serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
        let mut descriptor = index["manifests"].as_array().unwrap().last().unwrap().clone();
        descriptor["platform"] = serde_json::json!({ "os": "linux", "architecture": architecture });
        descriptor.as_object_mut().unwrap().remove("annotations");
        listed.push(descriptor);
    }
    let media_type = "application/vnd.oci.image.index.v1+json";
    let list = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": media_type, "manifests": listed,
    }))
    .unwrap();
    let part = layout.join("list");
    fs::write(&part, &list).unwrap();
    let said = Command::new("sha256sum").arg(&part).output().unwrap().stdout;
    let digest = String::from_utf8(said).unwrap()[..64].to_owned();
    fs::rename(part, layout.join("blobs/sha256").join(&digest)).unwrap();
    let index = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": list.len(),
            "annotations": { "io.containerd.image.name": "docker.io/library/two:1" },
        }],
    }))
    .unwrap();
    fs::write(layout.join("index.json"), index).unwrap();
    let file = host.dir().join("two.tar");
    let done = Command::new("tar").arg("-cf").arg(&file).arg("-C").arg(&layout).arg(".").status().unwrap();
    assert!(done.success());
    file.to_str().unwrap().to_owned()
}

fn the_platform_asked_for_is_the_one_that_goes(client: Client) {
    let host = Host { engine: Engine::start(), client };
    if host.is_peer() {
        return; // Not yet known to Docker 20.10.
    }
    let file = two_platforms(&host);
    let saved = host.dir().join("saved.tar");
    let saved = saved.to_str().unwrap();
    let registry = Registry::start(&host.engine);
    let remote = format!("{}/two:1", registry.address());
    for (platform, other) in [("linux/arm64", "linux/amd64"), ("linux/amd64", "linux/arm64")] {
        let machine = &platform[6..];
        host.cli(["load", "--platform", platform, "-i", &file]).ok();
        let of = || host.cli(["inspect", "-f", "{{.Architecture}}", "two:1"]).ok();
        assert_eq!(of(), machine);
        let mismatch = format!("does not match the specified platform: wanted {other}, actual: {platform}");
        host.cli(["save", "--platform", other, "-o", saved, "two:1"]).exits(1).expect_stderr(&mismatch);
        host.cli(["save", "--platform", platform, "-o", saved, "two:1"]).ok();
        host.cli(["load", "--platform", other, "-i", saved]).exits(1).expect_stderr(&mismatch);
        host.cli(["tag", "two:1", &remote]).ok();
        host.cli(["push", "--platform", other, &remote]).exits(1).expect_stderr(&mismatch);
        host.cli(["push", "--platform", platform, &remote]).ok();
        host.cli(["history", "--platform", other, "two:1"]).exits(1).expect_stderr(&mismatch);
        host.cli(["rmi", "two:1", &remote]).ok();
        host.cli(["pull", "--platform", platform, &remote]).ok();
        host.cli(["tag", &remote, "two:1"]).ok();
        assert_eq!(of(), machine);
        host.cli(["rmi", "two:1", &remote]).ok();
    }
    host.cli(["load", "--platform", "linux/s390x", "-i", &file])
        .exits(1)
        .expect_stderr("wanted linux/s390x, actual: linux/a");
    host.cli(["load", "-i", &file]).ok();
    let own = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    assert_eq!(host.cli(["inspect", "-f", "{{.Architecture}}", "two:1"]).ok(), own);
}

fn import_makes_an_image_of_a_root_file_system(client: Client) {
    let host = Host { engine: Engine::start(), client };
    let root = host.dir().join("root.tar");
    fs::write(&root, fixtures::busybox_layer().unwrap()).unwrap();
    let root = root.to_str().unwrap();
    let id = host
        .cli([
            "import",
            "-c",
            "CMD [\"echo\", \"imported\"]",
            "-c",
            "ENV A=b",
            "-m",
            "why",
            root,
            "made/here:1",
        ])
        .ok();
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(host.cli(["run", "--rm", "made/here:1"]).ok(), "imported");
    assert_eq!(host.cli(["run", "--rm", "made/here:1", "sh", "-c", "echo $A"]).ok(), "b");
    assert_eq!(host.cli(["history", "--no-trunc", "--format", "{{.Comment}}", "made/here:1"]).ok(), "why");
    let bytes = fixtures::busybox_layer().unwrap();
    assert!(host.cli(["import", "-"]).stdin(bytes.clone()).ok().starts_with("sha256:"));

    // From a web server, which the engine asks.
    let listener = host.sandbox().within_net(|| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let at = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let answers = [
            format!("HTTP/1.1 302 Found\r\nLocation: http://{at}/there\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").into_bytes(),
            [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", bytes.len()).as_bytes(), &bytes].concat(),
            [&b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\nConnection: close\r\n\r\n"[..], &bytes[..70_000]].concat(),
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec(),
        ];
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            // The question is one small segment; what it says is of no interest.
            std::io::Read::read(&mut stream, &mut [0; 4096]).unwrap();
            std::io::Write::write_all(&mut stream, &answer).unwrap();
        }
    });
    let url = format!("http://{at}/root.tar");
    host.cli(["import", "-c", "CMD echo fetched", &url, "made/there:1"]).ok();
    assert_eq!(host.cli(["run", "--rm", "made/there:1"]).ok(), "fetched");
    for _ in ["cut short", "missing"] {
        host.cli(["import", &url, "made/nowhere:1"]).exits(1);
    }
    server.join().unwrap();
    assert_eq!(host.cli(["images", "-q", "made/nowhere"]).ok(), "");
}

fn several_platforms_are_put_under_one_name(client: Client) {
    let host = Host { engine: Engine::start(), client };
    let registry = Registry::start_ours(&host.engine);
    let name = |tag: &str| format!("{}/team/app:{tag}", registry.address());
    let own = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let mut ids = Vec::new();
    for architecture in [own, "s390x"] {
        let mut layer = Layer::default();
        layer.file("which", 0o644, architecture.as_bytes());
        let image =
            Archive::new(&name(architecture)).architecture(architecture).layer(layer.finish()).cmd(&["x"]);
        host.load(&image.write(host.dir(), "image.tar"));
        host.cli(["push", &name(architecture)]).ok();
        ids.push(image.id());
    }
    // The client asks the registry by itself: it has to be where the registry is.
    let manifest = |args: &[&str]| {
        let invocation = host.cli(["manifest"].iter().chain(args).copied().collect::<Vec<_>>());
        let command = invocation.into_command();
        let mut inside = host.sandbox().net_command(command.get_program());
        inside.args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(key, value),
                None => inside.env_remove(key),
            };
        }
        brigantine_testkit::Invocation::new(inside).ok()
    };
    manifest(&["create", "--insecure", &name("all"), &name(own), &name("s390x")]);
    manifest(&["annotate", "--os-version", "9", &name("all"), &name("s390x")]);
    manifest(&["push", "--insecure", &name("all")]);
    let shown: serde_json::Value =
        serde_json::from_str(&manifest(&["inspect", "--insecure", &name("all")])).unwrap();
    let platforms: Vec<(&str, &str)> = shown["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            let platform = &one["platform"];
            (platform["architecture"].as_str().unwrap(), platform["os.version"].as_str().unwrap_or_default())
        })
        .collect();
    assert!(platforms.contains(&(own, "")) && platforms.contains(&("s390x", "9")), "{shown}");
    host.cli(["rmi", &name(own), &name("s390x")]).ok();
    host.cli(["pull", &name("all")]).ok();
    assert_eq!(host.get(&format!("/images/{}/json", name("all")))["Id"], *ids[0]);
    host.cli(["rmi", &name("all")]).ok();
    host.cli(["pull", "--platform", "linux/s390x", &name("all")]).ok();
    assert_eq!(host.get(&format!("/images/{}/json", name("all")))["Id"], *ids[1]);
}
