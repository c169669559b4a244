//! Images: load, save, import, tag, rmi, list, pull from a registry.

use std::{fs, process::Command};

use brigantine_testkit::{
    Client, Engine,
    fixtures::{self, Archive, Layer},
    peers::Registry,
};

use crate::Host;

both![
    save_and_load_keep_the_identity,
    an_oci_archive_loads,
    every_compression_loads,
    import_makes_an_image_of_a_root_file_system,
    tags_come_and_go,
    an_image_in_use_is_kept,
    images_are_listed_and_filtered,
    a_registrys_image_is_pulled,
    our_registry_takes_and_gives,
    an_unknown_image_is_named,
    layers_hide_what_they_delete,
    history_and_inspect_tell_where_it_came_from,
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
    let output = Command::new("skopeo").args(["copy", "--insecure-policy", &from, &to]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
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
    assert!(host.cli(["import", "-"]).stdin(bytes).ok().starts_with("sha256:"));
}

fn tags_come_and_go(client: Client) {
    let host = Host::new(client);
    let id = host.cli(["images", "-q", "--no-trunc"]).ok();
    host.cli(["tag", "busybox", "a:1"]).ok();
    host.cli(["tag", &id[7..19], "registry.example:5000/b/c:2"]).ok();
    assert_eq!(host.cli(["rmi", "a:1"]).ok(), "Untagged: a:1");
    host.cli(["rmi", &id]).exits(1).expect_stderr("must be forced");
    host.cli(["rmi", "registry.example:5000/b/c:2"]).ok();
    let gone = host.cli(["rmi", "busybox"]).ok();
    assert!(
        gone.starts_with("Untagged: busybox:latest\n") && gone.contains(&format!("Deleted: {id}")),
        "{gone}"
    );
    host.cli(["tag", "busybox", "x"]).exits(1).expect_stderr("No such image: busybox:latest");
    host.load(&fixtures::busybox());
    host.cli(["tag", "busybox", "UPPER"]).exits(1);
}

fn an_image_in_use_is_kept(client: Client) {
    let host = Host::new(client);
    let id = host.cli(["create", "busybox"]).ok();
    host.cli(["rmi", "busybox"]).exits(1).expect_stderr(&id[..12]);
    host.cli(["rm", &id]).ok();
    host.cli(["rmi", "busybox"]).ok();
}

fn images_are_listed_and_filtered(client: Client) {
    let host = Host::new(client);
    let table = host.cli(["images"]).ok();
    let mut lines = table.lines();
    assert!(lines.next().unwrap().starts_with("REPOSITORY   TAG       IMAGE ID"), "{table}");
    assert!(lines.next().unwrap().starts_with("busybox      latest"), "{table}");
    assert_eq!(host.cli(["images", "--format", "{{.Repository}}:{{.Tag}}"]).ok(), "busybox:latest");
    assert_eq!(host.cli(["images", "-q", "--filter", "dangling=true"]).ok(), "");
    assert_eq!(host.cli(["images", "-q", "--filter", "reference=busy*"]).ok().len(), 12);
    assert_eq!(host.cli(["images", "-q", "nothing"]).ok(), "");
    let list = host.get("/images/json");
    assert!(list[0]["Created"].is_i64());
    assert_eq!(list[0]["RepoTags"][0], "busybox:latest");
}

fn a_registrys_image_is_pulled(client: Client) {
    let host = Host { engine: Engine::start(), client };
    let registry = Registry::start(&host.engine);
    registry.fill(&host.engine, &fixtures::busybox(), "team/box:v2");
    let name = format!("{}/team/box:v2", registry.address());
    let said = host.cli(["pull", &name]).ok();
    assert!(said.contains("Pulling from team/box"), "{said}");
    assert!(said.contains(&format!("Status: Downloaded newer image for {name}")), "{said}");
    let digest = said.lines().find_map(|l| l.strip_prefix("Digest: ")).unwrap().to_owned();
    let said = host.cli(["pull", &name]).ok();
    assert!(said.contains(&format!("Status: Image is up to date for {name}")), "{said}");
    assert_eq!(host.cli(["run", "--rm", &name, "echo", "pulled"]).ok(), "pulled");
    let by_digest = format!("{}/team/box@{digest}", registry.address());
    assert_eq!(host.cli(["run", "--rm", &by_digest, "echo", "same"]).ok(), "same");
    let listed = host.cli(["images", "--digests", "--format", "{{.Digest}}"]).ok();
    assert_eq!(listed, digest);
    // `run` pulls by itself what is not there.
    host.cli(["rmi", "-f", &name]).ok();
    let output = host.cli(["run", "--rm", &name, "echo", "again"]).exits(0);
    assert_eq!(output.stdout, "again\n");
    assert!(output.stderr.contains("Unable to find image"), "{output}");
    host.cli(["pull", &format!("{}/team/none:v1", registry.address())]).exits(1);
    host.cli(["pull", &format!("{}/team/box:v9", registry.address())]).exits(1).expect_stderr("not found");
    drop(registry);
    host.assert_nothing_left();
}

/// docker's daemon as well, when the suite is run on it.
fn our_registry_takes_and_gives(client: Client) {
    let host = Host::new(client);
    let registry = Registry::start_ours(&host.engine);
    let id = host.cli(["images", "-q", "--no-trunc", "busybox"]).ok();
    let name = |tag: &str| format!("{}/team/box:{tag}", registry.address());
    host.cli(["tag", "busybox", &name("v1")]).ok();
    host.cli(["tag", "busybox", &name("v2")]).ok();
    let said = host.cli(["push", &name("v1")]).ok();
    assert!(said.contains(": Pushed") && said.contains("v1: digest: sha256:"), "{said}");
    let said = host.cli(["push", &name("v2")]).ok();
    assert!(said.contains(": Layer already exists"), "{said}");
    let sister = format!("{}/other/box:v1", registry.address());
    host.cli(["tag", "busybox", &sister]).ok();
    let said = host.cli(["push", &sister]).ok();
    assert!(said.contains(": Mounted from team/box"), "{said}");
    host.cli(["rmi", &name("v1"), &name("v2"), &sister]).ok();
    let said = host.cli(["pull", &name("v1")]).ok();
    assert!(said.contains("Status: Downloaded newer image"), "{said}");
    assert_eq!(host.cli(["inspect", "-f", "{{.Id}}", &name("v1")]).ok(), id);
    assert_eq!(host.cli(["run", "--rm", &name("v1"), "echo", "pulled"]).ok(), "pulled");
    let all = host.cli(["pull", "-a", &format!("{}/team/box", registry.address())]).ok();
    assert!(all.contains("Digest: "), "{all}");
    assert_eq!(host.cli(["inspect", "-f", "{{.Id}}", &name("v2")]).ok(), id);
    if !host.is_peer() {
        // Docker's daemon asks for docker's own search, which no registry has.
        let found =
            host.cli(["search", "--format", "{{.Name}}", &format!("{}/team", registry.address())]).ok();
        assert_eq!(found, format!("{}/team/box", registry.address()));
    }
    host.cli(["push", &format!("{}/team/none:v1", registry.address())]).exits(1);
    drop(registry);
}

fn an_unknown_image_is_named(client: Client) {
    let host = Host { engine: Engine::start(), client };
    host.cli(["run", "--rm", "--pull", "never", "nothing/here", "true"])
        .exits(125)
        .expect_stderr("No such image: nothing/here:latest");
    host.cli(["inspect", "--type", "image", "nothing/here"])
        .exits(1)
        .expect_stderr("No such image: nothing/here");
    host.cli(["rmi", "nothing/here"]).exits(1).expect_stderr("No such image: nothing/here");
    host.cli(["run", "--rm", "Bad//Name", "true"]).exits(125).expect_stderr("invalid reference format");
}

fn layers_hide_what_they_delete(client: Client) {
    let host = Host { engine: Engine::start(), client };
    let mut lower = Layer::default();
    lower.dir("keep", 0o755).file("keep/a", 0o644, b"a").file("keep/b", 0o600, b"b");
    lower.dir("opaque", 0o755).file("opaque/old", 0o644, b"old").hardlink("keep/hard", "keep/a");
    let mut upper = Layer::default();
    upper.file("keep/.wh.b", 0o644, b"").dir("opaque", 0o700).file("opaque/.wh..wh..opq", 0o644, b"");
    upper.file("opaque/new", 0o4755, b"new").symlink("link", "keep/a");
    let image = Archive::new("layered:1")
        .layer(fixtures::busybox_layer().unwrap())
        .layer(lower.finish())
        .layer(upper.finish());
    let file = image.cmd(&["sh"]).write(host.dir(), "layered.tar");
    host.cli(["load", "-i", file.to_str().unwrap()]).ok();
    let script = "ls -a keep opaque; cat link keep/hard; stat -c '%a %h' opaque opaque/new keep/a";
    let seen = host.cli(["run", "--rm", "layered:1", "sh", "-c", script]).ok();
    let expected = "keep:\n.\n..\na\nhard\n\nopaque:\n.\n..\nnew\naa700 2\n4755 1\n644 2";
    // Overlay counts a merged directory's links as one.
    assert_eq!(seen.replace("700 1", "700 2"), expected);
}

fn history_and_inspect_tell_where_it_came_from(client: Client) {
    let host = Host::new(client);
    let info = host.get("/images/busybox/json");
    assert_eq!(info["Architecture"], if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" });
    assert_eq!(info["Os"], "linux");
    assert_eq!(info["RepoTags"][0], "busybox:latest");
    assert_eq!(info["Config"]["Cmd"][0], "sh");
    assert_eq!(info["RootFS"]["Layers"].as_array().unwrap().len(), 1);
    assert!(info["Size"].as_i64().unwrap() > 100_000);
    assert_eq!(info["Created"], "2024-01-02T03:04:05Z");
    assert!(host.cli(["history", "busybox"]).ok().contains("testkit"));
}
