//! Files of containers: cp, diff, export, commit.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use brigantine_testkit::{Client, Engine};

use crate::Host;

both![
    cp_takes_files_out_of_running_and_stopped_containers,
    cp_puts_files_in_by_dockers_rules,
    cp_goes_through_volumes_and_respects_what_is_read_only,
    diff_lists_what_changed,
    export_and_commit_keep_what_a_container_made
];

fn cp_takes_files_out_of_running_and_stopped_containers(client: Client) {
    let host = Host::new(client);
    let made = "mkdir -p /d/sub; echo hi >/d/a; echo two >/d/sub/b; ln -s a /d/link; ln -s /d /dl; chown 1:2 /d/a; touch /ready; sleep 1000";
    host.background(&["--name", "web"], made);
    host.wait_exec("web", &["test", "-e", "/ready"]);
    let dir = host.dir().join("out");
    fs::create_dir(&dir).unwrap();
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    for stopped in [false, true] {
        if stopped {
            host.cli(["kill", "web"]).ok();
            host.wait_state("web", "exited");
            fs::remove_dir_all(&dir).unwrap();
            fs::create_dir(&dir).unwrap();
        }
        // A directory into one that exists, under its own name.
        host.cli(["cp", "web:/d", &at("")]).ok();
        assert_eq!(fs::read_to_string(at("d/a")).unwrap(), "hi\n");
        assert_eq!(fs::read_to_string(at("d/sub/b")).unwrap(), "two\n");
        assert_eq!(fs::read_link(at("d/link")).unwrap().to_str(), Some("a"));
        // To a name that is not there; the content alone; through a link.
        host.cli(["cp", "web:/d/.", &at("new")]).ok();
        assert_eq!(fs::read_to_string(at("new/sub/b")).unwrap(), "two\n");
        host.cli(["cp", "web:/dl/", &at("through")]).ok();
        assert!(fs::metadata(at("through/a")).unwrap().is_file());
        host.cli(["cp", "web:/dl", &at("itself")]).ok();
        assert_eq!(fs::read_link(at("itself")).unwrap().to_str(), Some("/d"));
        host.cli(["cp", "-L", "web:/d/link", &at("followed")]).ok();
        assert_eq!(fs::read_to_string(at("followed")).unwrap(), "hi\n");
        host.cli(["cp", "-a", "web:/d/a", &at("owned")]).ok();
        // As an archive.
        let listed = host.cli(["cp", "web:/d/sub", "-"]).ok();
        assert!(listed.contains("sub/b"), "{listed:?}");
        host.cli(["cp", "web:/nothing", &at("")]).exits(1).expect_stderr("Could not find the file /nothing");
    }
    host.cli(["cp", "none:/d", &at("")]).exits(1).expect_stderr("No such container: none");
    host.cli(["rm", "web"]).ok();
    host.assert_nothing_left();
}

fn cp_puts_files_in_by_dockers_rules(client: Client) {
    let host = Host::new(client);
    let dir = host.dir().join("in");
    fs::create_dir_all(dir.join("tree/sub")).unwrap();
    fs::write(dir.join("tree/sub/file"), "deep").unwrap();
    fs::write(dir.join("file"), "text").unwrap();
    symlink("file", dir.join("link")).unwrap();
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    host.cli(["create", "--name", "box", "busybox", "sh", "-c", "sleep 1000"]).ok();
    for running in [false, true] {
        if running {
            host.cli(["start", "box"]).ok();
        }
        let to = |name: &str| format!("box:/{}{name}", if running { "run-" } else { "" });
        host.cli(["cp", &at("file"), &to("copied")]).ok();
        host.cli(["cp", &at("tree"), &to("new")]).ok();
        host.cli(["cp", &at("tree"), &to("new")]).ok();
        host.cli(["cp", &at("tree/."), &to("new")]).ok();
        host.cli(["cp", &at("link"), &to("link")]).ok();
        host.cli(["cp", "-L", &at("link"), &to("linked")]).ok();
        host.cli(["cp", &at("file"), &to("absent/")]).exits(1);
        host.cli(["cp", &at("file"), &to("no/where/file")]).exits(1).expect_stderr("Could not find the file");
        host.cli(["cp", &at("tree"), &to("copied")]).exits(1);
        host.cli(["cp", &at("none"), &to("copied")]).exits(1).expect_stderr("no such file");
    }
    let script = "for p in '' run-; do cat /${p}copied /${p}new/sub/file /${p}new/tree/sub/file /${p}linked; readlink /${p}link; done";
    let all = host.cli(["exec", "box", "sh", "-c", script]).ok();
    assert_eq!(all, "textdeepdeeptextfile\ntextdeepdeeptextfile");
    // A file does not replace a directory.
    fs::write(dir.join("new"), "file").unwrap();
    let put = host.cli(["cp", &at("new"), "box:/"]).exits(1);
    put.expect_stderr("cannot overwrite directory");
    // From an archive.
    let mut layer = brigantine_testkit::fixtures::Layer::default();
    layer.dir("ar", 0o750).file("ar/x", 0o4711, b"from tar");
    host.cli(["cp", "-", "box:/tmp"]).stdin(layer.finish()).ok();
    assert_eq!(
        host.cli(["exec", "box", "sh", "-c", "stat -c %a /tmp/ar /tmp/ar/x; cat /tmp/ar/x"]).ok(),
        "750\n4711\nfrom tar"
    );
    host.cli(["rm", "-f", "box"]).ok();
    host.assert_nothing_left();
}

fn cp_goes_through_volumes_and_respects_what_is_read_only(client: Client) {
    let host = Host::new(client);
    let dir = host.dir().join("bind");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("host"), "of the host").unwrap();
    fs::write(host.dir().join("file"), "text").unwrap();
    let file = host.dir().join("file").to_str().unwrap().to_owned();
    let bind = format!("{}:/ro:ro", dir.display());
    host.cli([
        "create",
        "--name",
        "vols",
        "--read-only",
        "-v",
        "data:/deep/data",
        "-v",
        &bind,
        "busybox",
        "sleep",
        "1000",
    ])
    .ok();
    for running in [false, true] {
        if running {
            host.cli(["start", "vols"]).ok();
        }
        let name = format!("f{running}");
        host.cli(["cp", &file, &format!("vols:/deep/data/{name}")]).ok();
        assert_eq!(
            fs::read_to_string(host.data_root().join("volumes/data/_data").join(&name)).unwrap(),
            "text"
        );
        host.cli(["cp", &file, "vols:/ro/x"]).exits(1).expect_stderr("mounted volume is marked read-only");
        host.cli(["cp", &file, "vols:/x"]).exits(1).expect_stderr("container rootfs is marked read-only");
        let out = host.dir().join(format!("out{running}"));
        host.cli(["cp", "vols:/ro/host", out.to_str().unwrap()]).ok();
        assert_eq!(fs::read_to_string(out).unwrap(), "of the host");
    }
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    host.cli(["rm", "-f", "vols"]).ok();
    host.cli(["volume", "rm", "data"]).ok();
    host.assert_nothing_left();
}

fn diff_lists_what_changed(client: Client) {
    let host = Host::new(client);
    let script = "rm /bin/vi; echo x >>/etc/passwd; mkdir -p /new/dir; echo 1 >/new/dir/file; chmod 700 /tmp; echo done; sleep 1000";
    host.background(&["--name", "differ"], script);
    host.wait_log("differ", "done");
    let diff = host.cli(["diff", "differ"]).ok();
    let lines: Vec<&str> = diff.lines().collect();
    for expected in ["D /bin/vi", "C /etc/passwd", "A /new", "A /new/dir", "A /new/dir/file", "C /tmp"] {
        assert!(lines.contains(&expected), "{expected} is not in {lines:?}");
    }
    for never in ["/proc", "/sys", "/etc/hosts", "/etc/resolv.conf", "/dev"] {
        assert!(!lines.iter().any(|line| line.ends_with(never)), "{never} is in {lines:?}");
    }
    host.cli(["create", "--name", "untouched", "busybox"]).ok();
    assert_eq!(host.cli(["diff", "untouched"]).ok(), "");
    host.cli(["diff", "none"]).exits(1).expect_stderr("No such container: none");
}

fn export_and_commit_keep_what_a_container_made(client: Client) {
    let host = Host::new(client);
    let script = "echo kept >/kept; rm /bin/vi; chown 7:8 /kept; echo in >/v/in; echo done; sleep 1000";
    host.background(&["--name", "maker", "-v", "vol:/v", "-e", "A=1"], script);
    host.wait_log("maker", "done");
    let archive = host.dir().join("export.tar");
    host.cli(["export", "-o", archive.to_str().unwrap(), "maker"]).ok();
    let listed = std::process::Command::new("tar").arg("-tvf").arg(&archive).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.lines().any(|line| line.contains(" 7/8 ") && line.ends_with(" kept")), "{listed}");
    assert!(!listed.contains("bin/vi\n") && !listed.contains(".wh.") && !listed.contains("v/in"), "{listed}");

    let id = host
        .cli([
            "commit",
            "-m",
            "why",
            "-a",
            "who",
            "-c",
            "CMD [\"cat\", \"/kept\"]",
            "-c",
            "ENV B=2",
            "maker",
            "made:v1",
        ])
        .ok();
    let image = host.get("/images/made:v1/json");
    assert_eq!(image["Id"], id.trim());
    assert_eq!((image["Comment"].as_str(), image["Author"].as_str()), (Some("why"), Some("who")));
    assert!(image["Config"]["Env"].as_array().unwrap().iter().any(|v| v == "A=1"), "{image}");
    assert_eq!(host.cli(["run", "--rm", "made:v1"]).ok(), "kept");
    let script =
        "echo $A$B; stat -c %u:%g /kept; test -e /bin/vi || echo gone; test -e /v/in || echo no volume";
    assert_eq!(host.cli(["run", "--rm", "made:v1", "sh", "-c", script]).ok(), "12\n7:8\ngone\nno volume");
    // It went on after the pause.
    assert_eq!(host.inspect("maker")["State"]["Status"], "running");
    host.cli(["exec", "maker", "true"]).ok();
    host.cli(["commit", "none"]).exits(1).expect_stderr("No such container: none");
}

/// CVE-2018-15664: a container that swaps a directory for a link to the host's root while files are copied.
#[test]
fn a_container_that_swaps_links_gets_and_gives_nothing_of_the_host() {
    let engine = Engine::with_busybox();
    let secret = engine.dir().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key"), "of the host").unwrap();
    let path = secret.to_str().unwrap();
    // Inside, the same path leads to the container's own; outside it would be the host's.
    let script = format!(
        "mkdir -p {path} /real; echo inside >{path}/key; echo inside >/real/key; ln -s {path} /link; mkdir /dir; echo inside >/dir/key
         echo ready; while true; do mv /dir /stash; mv /link /dir; mv /dir /link; mv /stash /dir; done"
    );
    engine.docker(["run", "-d", "--name", "evil", "busybox", "sh", "-c", &script]).ok();
    engine.wait_log("evil", "ready");
    let out = engine.dir().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(engine.dir().join("key2"), "from outside").unwrap();
    for _ in 0..60 {
        let answer = engine.request("GET", "/containers/evil/archive?path=/dir/key");
        if answer.status == 200 {
            assert!(!String::from_utf8_lossy(&answer.body).contains("of the host"));
        }
        engine.request("HEAD", "/containers/evil/archive?path=/dir/");
    }
    let mut layer = brigantine_testkit::fixtures::Layer::default();
    layer.file("planted", 0o644, b"from outside").file("sub/planted", 0o644, b"from outside");
    let archive = layer.finish();
    let mut landed = 0;
    for _ in 0..60 {
        let answer = engine.put_bytes("/containers/evil/archive?path=/dir", "application/x-tar", &archive);
        landed += i32::from(answer.status == 200);
    }
    assert!(landed > 0, "no copy succeeded: nothing was tested");
    let left: Vec<_> = fs::read_dir(&secret).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["key"]);
    assert_eq!(fs::read_to_string(secret.join("key")).unwrap(), "of the host");
    assert_eq!(fs::metadata(secret.join("key")).unwrap().nlink(), 1);
}

/// Bad requests to the archive endpoints.
#[test]
fn archives_that_lead_out_or_break_are_refused() {
    let engine = Engine::with_busybox();
    engine.docker(["run", "-d", "--name", "box", "busybox", "sleep", "1000"]).ok();
    let put = |path: &str, body: &[u8]| {
        engine.put_bytes(&format!("/containers/box/archive?path={path}"), "application/x-tar", body)
    };
    put("/tmp", b"this is no archive").expect(400);
    let mut layer = brigantine_testkit::fixtures::Layer::default();
    layer.file("ok", 0o644, &[7; 5000]);
    let whole = layer.finish();
    put("/tmp", &whole[..2000]).expect(400);
    put("", &whole).expect(400);
    put("/none", &whole).expect(404);
    put("/etc/passwd", &whole).expect(400);
    let mut layer = brigantine_testkit::fixtures::Layer::default();
    layer.file("../../escape", 0o644, b"x");
    let answer = put("/tmp", &layer.finish()).expect(400).message();
    assert!(answer.contains("outside of"), "{answer}");
    engine.request("GET", "/containers/box/archive").expect(400);
    engine.request("GET", "/containers/none/archive?path=/").expect(404);
    // Compressed archives are taken, as docker takes them.
    let mut gz = std::process::Command::new("gzip")
        .arg("-c")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut gz.stdin.take().unwrap(), &whole).unwrap();
    put("/tmp", &gz.wait_with_output().unwrap().stdout).expect(200);
    engine.docker(["exec", "box", "test", "-s", "/tmp/ok"]).ok();
}
