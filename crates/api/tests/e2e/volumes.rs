//! Bind mounts, named volumes, tmpfs mounts.

use std::fs;

use brigantine_testkit::{Client, Engine};

use crate::Host;

both![
    bind_mounts_show_the_hosts_files,
    a_named_volume_outlives_its_containers,
    an_images_volume_is_filled_from_it
];

fn bind_mounts_show_the_hosts_files(client: Client) {
    let host = Host::new(client);
    let dir = host.dir().join("shared");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("in"), "from the host").unwrap();
    let dir = dir.to_str().unwrap();
    assert_eq!(
        host.script(&["-v", &format!("{dir}:/s")], "cat /s/in; echo -n back >/s/out"),
        "from the host"
    );
    assert_eq!(fs::read_to_string(format!("{dir}/out")).unwrap(), "back");
    let read_only = format!("{dir}:/s:ro");
    host.cli(["run", "--rm", "-v", &read_only, "busybox", "touch", "/s/x"])
        .exits(1)
        .expect_stderr("read-only file system");
    let mount = format!("type=bind,src={dir},dst=/s,readonly");
    host.cli(["run", "--rm", "--mount", &mount, "busybox", "touch", "/s/x"]).exits(1);
    // A single file.
    assert_eq!(host.script(&["-v", &format!("{dir}/in:/etc/motd")], "cat /etc/motd"), "from the host");
    // -v makes a missing source, --mount refuses it.
    host.script(&["-v", &format!("{dir}/new/deep:/n")], "test -d /n");
    assert!(fs::metadata(format!("{dir}/new/deep")).unwrap().is_dir());
    let missing = format!("type=bind,src={dir}/missing,dst=/n");
    host.cli(["run", "--rm", "--mount", &missing, "busybox", "true"])
        .exits(125)
        .expect_stderr("does not exist");
    host.assert_nothing_left();
}

fn a_named_volume_outlives_its_containers(client: Client) {
    let host = Host::new(client);
    host.script(&["-v", "data:/d"], "echo kept >/d/file");
    assert_eq!(host.script(&["--mount", "type=volume,src=data,dst=/e"], "cat /e/file"), "kept");
    let info = host.get("/volumes/data");
    assert_eq!(info["Driver"], "local");
    let path = info["Mountpoint"].as_str().unwrap();
    assert_eq!(fs::read_to_string(format!("{path}/file")).unwrap(), "kept\n");
    assert_eq!(host.request("GET", "/volumes/nothing").expect(404).message(), "get nothing: no such volume");
    let id = host.cli(["create", "-v", "data:/d", "busybox"]).ok();
    host.request("DELETE", "/volumes/data").expect(409);
    host.cli(["rm", &id]).ok();
    host.request("DELETE", "/volumes/data").expect(204);
    assert!(!fs::exists(path).unwrap());
}

fn an_images_volume_is_filled_from_it(client: Client) {
    let host = Host { engine: Engine::start(), client };
    let mut layer = brigantine_testkit::fixtures::Layer::default();
    layer.dir("var", 0o755).dir("var/db", 0o750).file("var/db/seed", 0o640, b"seed");
    let image = brigantine_testkit::fixtures::Archive::new("seeded:1")
        .layer(brigantine_testkit::fixtures::busybox_layer().unwrap())
        .layer(layer.finish())
        .cmd(&["sh"])
        .set("Volumes", serde_json::json!({ "/var/db": {} }));
    host.load(&image.write(host.dir(), "seeded.tar"));
    let script = "cat /var/db/seed; stat -c %a /var/db /var/db/seed; grep -c ' /var/db ' /proc/mounts";
    assert_eq!(host.cli(["run", "--rm", "seeded:1", "sh", "-c", script]).ok(), "seed750\n640\n1");
    // An anonymous volume goes with --rm; a named one is seeded once.
    assert_eq!(host.get("/volumes")["Volumes"].as_array().map_or(0, Vec::len), 0);
    host.cli(["run", "--rm", "-v", "mine:/var/db", "seeded:1", "sh", "-c", "cd /var/db; mv seed other"]).ok();
    assert_eq!(
        host.cli(["run", "--rm", "-v", "mine:/var/db", "seeded:1", "ls", "-A", "/var/db"]).ok(),
        "other"
    );
}
