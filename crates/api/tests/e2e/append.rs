//! Images made without running anything: `brig image append` and `brig image mutate`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use brigantine_testkit::{Client, must, peers::Registry};
use serde_json::Value;

use crate::Host;

fn inspect(host: &Host, image: &str) -> Value {
    let all: Value = serde_json::from_str(&host.cli(["image", "inspect", image]).ok()).unwrap();
    all[0].clone()
}

/// A folder with a program and a link to it.
fn program(host: &Host) -> String {
    let dir = host.dir().join("app");
    fs::create_dir_all(dir.join("sub")).unwrap();
    fs::write(dir.join("hello"), "#!/bin/sh\necho \"hello $WHO from $(pwd) as $(id -u)\"\n").unwrap();
    fs::set_permissions(dir.join("hello"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(dir.join("sub/data"), "data").unwrap();
    std::os::unix::fs::symlink("../hello", dir.join("sub/link")).unwrap();
    dir.to_str().unwrap().to_owned()
}

#[test]
fn a_folder_on_a_base_runs_and_the_same_input_gives_the_same_image() {
    let host = Host::new(Client::Brig);
    let app = program(&host);
    let source = format!("{app}:/srv/app");
    let make = |tag: &str| {
        host.cli([
            "image",
            "append",
            "-b",
            "busybox",
            "-t",
            tag,
            "--entrypoint",
            "[\"/srv/app/sub/link\"]",
            "-e",
            "WHO=you",
            "-w",
            "/srv/app",
            "-u",
            "7:8",
            "-l",
            "a=b",
            "--expose",
            "80-81",
            &source,
        ])
        .ok()
    };
    let id = make("app:1");
    assert_eq!(host.cli(["run", "--rm", "app:1"]).ok(), "hello you from /srv/app as 7");
    let listed = host.cli(["run", "--rm", "--entrypoint", "ls", "app:1", "-ln", "/srv/app"]).ok();
    assert!(listed.contains("-rwxr-xr-x    1 0        0 "), "{listed}");
    assert!(listed.contains("Jan  1  1970 hello"), "{listed}");
    let image = inspect(&host, "app:1");
    assert_eq!(image["Id"], id.as_str());
    assert_eq!(image["Config"]["Labels"], serde_json::json!({"a": "b"}));
    assert_eq!(image["Config"]["ExposedPorts"], serde_json::json!({"80/tcp": {}, "81/tcp": {}}));
    assert_eq!(image["Config"]["Cmd"], Value::Null, "a new entry point makes the base's command void");
    let base = inspect(&host, "busybox");
    assert_eq!(image["Created"], base["Created"]);
    let layers = |image: &Value| image["RootFS"]["Layers"].as_array().unwrap().len();
    assert_eq!(layers(&image), layers(&base) + 1);
    let history = host.cli(["history", "--no-trunc", "--format", "{{.CreatedBy}}", "app:1"]).ok();
    assert!(history.starts_with("brig image append /srv/app"), "{history}");

    // The files' times and owners are nothing to it, nor is what was there before.
    assert!(Command::new("touch").arg(format!("{app}/hello")).status().unwrap().success());
    assert!(Command::new("chown").args(["-R", "5:5", &app]).status().unwrap().success());
    host.cli(["rmi", "app:1"]).ok();
    assert_eq!(make("app:2"), id);
    let dated =
        host.cli(["image", "append", "-b", "busybox", &source]).env("SOURCE_DATE_EPOCH", "1700000000").ok();
    assert_eq!(inspect(&host, &dated)["Created"], "2023-11-14T22:13:20Z");

    // One static program on nothing at all.
    let busybox = host.dir().join("busybox");
    let copied = host.cli(["create", "--name", "from", "busybox"]).ok();
    host.cli(["cp", &format!("{copied}:/bin/busybox"), busybox.to_str().unwrap()]).ok();
    host.cli(["rm", "from"]).ok();
    host.cli([
        "image",
        "append",
        "-t",
        "bare",
        "--entrypoint",
        "/bin/busybox",
        "--cmd",
        "echo 'two words'",
        &format!("{}:/bin/", busybox.display()),
    ])
    .ok();
    assert_eq!(host.cli(["run", "--rm", "bare"]).ok(), "two words");
    assert_eq!(layers(&inspect(&host, "bare")), 1);
}

#[test]
fn the_base_may_be_an_archive_a_layout_or_in_a_registry_and_others_read_the_result() {
    let host = Host::new(Client::Brig);
    let app = program(&host);
    let at = |name: &str| host.dir().join(name).to_str().unwrap().to_owned();
    let source = format!("{app}:/app");
    let (archive, layout) = (at("base.tar"), at("layout"));
    host.cli(["save", "-o", &archive, "busybox"]).ok();
    let skopeo = |args: &[&str]| must(Command::new("skopeo").args(args));
    skopeo(&["copy", "--insecure-policy", &format!("oci-archive:{archive}"), &format!("oci:{layout}:x")]);
    let registry = Registry::start(&host.engine);
    let remote = format!("{}/base:1", registry.address());
    host.cli(["tag", "busybox", &remote]).ok();
    host.cli(["push", "-q", &remote]).ok();
    let made = |base: &str| host.cli(["image", "append", "-b", base, &source]).ok();
    let wanted = made("busybox");
    host.cli(["rmi", "-f", &remote, "busybox", &wanted]).ok();
    for base in [
        format!("docker-archive:{archive}"),
        format!("oci-archive:{archive}"),
        format!("oci:{layout}"),
        remote,
    ] {
        assert_eq!(made(&base), wanted, "{base}");
        let names = host.cli(["images", "--format", "{{.Repository}}"]).ok();
        assert!(!names.lines().any(|name| name == "busybox"), "names in an archive are left alone: {names}");
        host.cli(["rmi", "-f", &wanted]).ok();
    }

    // Out again: in an archive that skopeo and docker read, and to the registry.
    let (out, name) = (at("out.tar"), format!("{}/made:1", registry.address()));
    let output = format!("type=oci,dest={out}");
    let id = host
        .cli(["image", "append", "-b", &format!("oci:{layout}"), "-t", &name, "--push", "-o", &output])
        .args([format!("{app}:/app")])
        .ok();
    let seen: Value =
        serde_json::from_str(&skopeo(&["inspect", "--config", "--raw", &format!("oci-archive:{out}")]))
            .unwrap();
    assert_eq!(seen["os"], "linux");
    host.cli(["rmi", "-f", &id]).ok();
    host.engine.docker(["load", "-i", &out]).ok();
    assert_eq!(inspect(&host, &name)["Id"], id.as_str());
    host.cli(["rmi", "-f", &id]).ok();
    host.cli(["pull", "-q", &name]).ok();
    assert_eq!(host.cli(["run", "--rm", &name, "cat", "/app/sub/data"]).ok(), "data");
}

#[test]
fn an_image_is_changed_without_a_layer_and_what_is_wrong_is_said() {
    let host = Host::new(Client::Brig);
    let id = host
        .cli([
            "image",
            "mutate",
            "-t",
            "m",
            "--cmd",
            "echo hi",
            "--set-platform",
            "linux/arm64",
            "-e",
            "A=b c",
            "busybox",
        ])
        .ok();
    let (image, base) = (inspect(&host, "m"), inspect(&host, "busybox"));
    assert_eq!(image["Id"], id.as_str());
    assert_eq!(image["RootFS"], base["RootFS"]);
    assert_eq!((&image["Architecture"], &image["Os"]), (&"arm64".into(), &"linux".into()));
    assert!(image["Config"]["Env"].as_array().unwrap().contains(&"A=b c".into()), "{image}");
    let again = host.cli(["image", "mutate", "-q", "--append", "/etc/hostname:/e/", "m"]).ok();
    assert_eq!(inspect(&host, &again)["Parent"], id.as_str());
    host.engine.leaving_nothing(|| {
        for (args, words) in [
            (vec!["mutate", "-e", "novalue", "busybox"], "NAME=VALUE is expected"),
            (vec!["mutate", "-w", "rel", "busybox"], "it must be absolute"),
            (vec!["mutate", "--expose", "x", "busybox"], "is expected"),
            (vec!["mutate", "--set-platform", "a/b/c/d", "busybox"], "is not a platform"),
            (vec!["mutate", "--cmd", "[1]", "busybox"], "not a JSON array of strings"),
            (vec!["mutate", "--created", "today", "busybox"], "RFC 3339"),
            (vec!["append", "-b", "busybox", "/does/not/exist"], "/does/not/exist"),
            (vec!["append", "-b", "busybox", "/dev/null:/x"], "cannot be added"),
            (vec!["append", "-b", "oci:/does/not/exist", "/etc/hostname"], "/does/not/exist"),
        ] {
            let refused = host.cli(["image"].iter().chain(&args)).run();
            assert!(
                refused.code != 0 && refused.stderr.contains(words),
                "{args:?}: {} {}",
                refused.stdout,
                refused.stderr
            );
        }
    });
}
