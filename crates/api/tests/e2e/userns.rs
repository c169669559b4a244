//! `--userns-remap`: root in a container is nobody on the host, and nobody in the container notices.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use brigantine_testkit::fixtures::{Archive, Layer, busybox_layer};
use brigantine_testkit::{Client, Engine};

use crate::Host;

both![
    root_inside_is_nobody_outside,
    files_keep_their_owners_on_disk,
    the_hosts_namespaces_are_not_for_remapped_containers,
    execs_and_neighbours_are_in_the_same_namespace,
    ports_names_and_limits_work_as_ever,
    device_nodes_of_an_image_give_no_access,
];

/// Ids that container ids stand for.
const FIRST: u32 = 300_000;

fn host(client: Client) -> Host {
    host_with(client, &[])
}

fn host_with(client: Client, flags: &[&str]) -> Host {
    let ids = format!("77:{FIRST}:65536\n");
    let mut builder =
        Engine::builder().etc("subuid", &ids).etc("subgid", &ids).flag("--userns-remap=77:77").busybox();
    for flag in flags {
        builder = builder.flag(*flag);
    }
    Host { engine: builder.start(), client }
}

/// A container whose files are a plain copy has them mapped as one with an overlay has.
#[test]
fn copied_files_are_mapped_too() {
    let host = host_with(Client::Brig, &["--storage=copy"]);
    let id = host.background(
        &["-v", "data:/data"],
        "touch /mine /data/mine; chown 33:44 /mine; stat -c %u:%g / /bin/busybox /mine /data/mine /etc/hosts; \
         exec sleep 1000",
    );
    host.engine.wait_log(&id, "0:0\n0:0\n33:44\n0:0\n0:0\n");
    let process = host.engine.sandbox().proc(host.engine.container_pid(&id));
    assert_eq!(fs::metadata(process).unwrap().uid(), FIRST);
    let root = host.data_root().join(format!("containers/{}/root", id.trim()));
    let mine = fs::metadata(root.join("mine")).unwrap();
    assert_eq!((mine.uid(), mine.gid()), (33, 44));
    let diff = host.cli(["diff", &id]).ok();
    assert!(diff.contains("A /mine") && !diff.contains("busybox"), "{diff}");
    // Copied in and out, committed, stopped and started again.
    let copy = host.dir().join("copy");
    fs::write(&copy, "x").unwrap();
    host.cli(["cp", &copy.display().to_string(), &format!("{id}:/tmp/in")]).ok();
    assert_eq!(host.cli(["exec", &id, "stat", "-c", "%u:%g", "/tmp/in"]).ok(), "0:0");
    host.cli(["restart", "-t", "0", &id]).ok();
    assert_eq!(host.cli(["exec", &id, "stat", "-c", "%u:%g", "/mine"]).ok(), "33:44");
    host.cli(["commit", &id, "changed"]).ok();
    assert_eq!(host.cli(["run", "--rm", "changed", "stat", "-c", "%u:%g", "/mine"]).ok(), "33:44");
    host.cli(["rm", "-f", &id]).ok();
    host.assert_nothing_left();
}

fn root_inside_is_nobody_outside(client: Client) {
    let host = host(client);
    for network in ["bridge", "none"] {
        let id =
            host.background(&["--network", network], "id -u > /tmp/id; chmod 700 /tmp/id; exec sleep 1000");
        let process = host.engine.sandbox().proc(host.engine.container_pid(&id));
        assert_eq!(fs::metadata(&process).unwrap().uid(), FIRST, "{network}");
        let map = fs::read_to_string(process.join("uid_map")).unwrap();
        assert_eq!(map.split_ascii_whitespace().collect::<Vec<_>>(), ["0", "300000", "65536"]);
        assert_eq!(host.cli(["exec", &id, "id", "-u"]).ok(), "0");
        // The network is the container's own: its root may change it, and see it in /sys.
        let seen = host.cli(["exec", &id, "sh", "-c", "ls /sys/class/net; hostname"]).ok();
        assert!(seen.starts_with(if network == "bridge" { "eth0" } else { "lo" }), "{seen}");
        host.cli(["rm", "-f", &id]).ok();
    }
    assert!(host.cli(["info", "--format", "{{json .SecurityOptions}}"]).ok().contains("name=userns"));
    // Who asks for the host's namespace gets it.
    let plain = host.script(&["--userns", "host"], "cat /proc/self/uid_map");
    assert_eq!(plain.split_ascii_whitespace().collect::<Vec<_>>(), ["0", "0", "4294967295"]);
    host.assert_nothing_left();
}

fn files_keep_their_owners_on_disk(client: Client) {
    let host = host(client);
    let id = host.background(
        &["-v", "data:/data", "--tmpfs", "/scratch"],
        "touch /mine /data/mine; chown 33:44 /data/mine; stat -c %u:%g / /bin/busybox /mine /data/mine /scratch /etc/hosts; \
         exec sleep 1000",
    );
    host.engine.wait_log(&id, "0:0\n0:0\n0:0\n33:44\n0:0\n0:0\n");
    let volume = fs::metadata(host.data_root().join("volumes/data/_data/mine")).unwrap();
    assert_eq!((volume.uid(), volume.gid()), (33, 44));
    let upper = fs::metadata(host.data_root().join(format!("containers/{}/upper/mine", id.trim()))).unwrap();
    assert_eq!((upper.uid(), upper.gid()), (0, 0));
    // Copies keep them as well, both ways, of a running container and of a stopped one.
    let copy = host.dir().join("copy");
    fs::write(&copy, "x").unwrap();
    let copy = copy.display().to_string();
    for running in [true, false] {
        if !running {
            host.cli(["stop", "-t", "0", &id]).ok();
        }
        host.cli(["cp", &copy, &format!("{id}:/tmp/{running}")]).ok();
        // The archive's header has user and group in octal.
        let archive = host.cli(["cp", &format!("{id}:/data/mine"), "-"]).run().stdout;
        assert!(archive.contains("\x000000041\x000000054\0"), "running: {running}: {archive:?}");
    }
    host.cli(["start", &id]).ok();
    assert_eq!(host.cli(["exec", &id, "stat", "-c", "%u:%g", "/tmp/true", "/tmp/false"]).ok(), "0:0\n0:0");
    host.cli(["rm", "-f", &id]).ok();
    // A volume is the same for a container without the remapping.
    let seen = host.script(&["--userns", "host", "-v", "data:/data"], "stat -c %u:%g /data/mine");
    assert_eq!(seen, "33:44");
    // A directory of the host's shows whose it is, and its files are safe.
    let bind = host.dir().join("bind");
    fs::create_dir(&bind).unwrap();
    fs::write(bind.join("secret"), "of the host's root").unwrap();
    fs::set_permissions(bind.join("secret"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let mount = format!("{}:/bind", bind.display());
    let answer = host.cli(["run", "--rm", "-v", &mount, "busybox", "cat", "/bind/secret"]).exits(1);
    answer.expect_stderr("Permission denied");
}

fn the_hosts_namespaces_are_not_for_remapped_containers(client: Client) {
    let host = host(client);
    for (flags, text) in [
        (["--privileged"].as_slice(), "privileged mode is incompatible with user namespaces"),
        (&["--network", "host"], "cannot share the host's network namespace"),
        (&["--pid", "host"], "cannot share the host PID namespace"),
    ] {
        let args = ["run", "--rm"].iter().chain(flags).chain(&["busybox", "true"]);
        host.cli(args).exits(125).expect_stderr(text);
        let args = ["run", "--rm", "--userns", "host"].iter().chain(flags).chain(&["busybox", "true"]);
        host.cli(args).ok();
    }
    host.assert_nothing_left();
}

fn execs_and_neighbours_are_in_the_same_namespace(client: Client) {
    let host = host(client);
    let id = host.background(&["--name", "first"], "exec sleep 1000");
    let own = host.cli(["exec", &id, "readlink", "/proc/self/ns/user"]).ok();
    let first = host.cli(["exec", &id, "readlink", "/proc/1/ns/user"]).ok();
    assert_eq!(own, first);
    let neighbour =
        host.script(&["--network", "container:first"], "readlink /proc/self/ns/user; ls /sys/class/net");
    assert!(neighbour.starts_with(&own) && neighbour.contains("eth0"), "{neighbour}");
    let stranger = host.script(&[], "readlink /proc/self/ns/user");
    assert_ne!(stranger, own);
}

fn ports_names_and_limits_work_as_ever(client: Client) {
    let host = host(client);
    let id = host.background(
        &["-m", "64m", "--pids-limit", "50", "-p", "127.0.0.1:8080:80"],
        "echo hello > /index.html; exec httpd -f -p 80 -h /",
    );
    let answer = brigantine_testkit::eventually("the page", || {
        let out = host
            .sandbox()
            .command("busybox")
            .args(["wget", "-qO-", "http://127.0.0.1:8080/"])
            .output()
            .unwrap();
        out.status.success().then(|| String::from_utf8(out.stdout).unwrap())
    });
    assert_eq!(answer, "hello\n");
    assert!(host.cli(["exec", &id, "cat", "/etc/hosts"]).ok().contains(&id.trim()[..12]));
    assert!(
        host.cli(["exec", "-i", &id, "sh", "-c", "echo x > /dev/null; cat /dev/null; ls -l /dev/null"])
            .ok()
            .starts_with('c')
    );
    host.cli(["rm", "-f", &id]).ok();
    host.assert_nothing_left();
}

/// They are there, none can be made, and none gives anything away.
fn device_nodes_of_an_image_give_no_access(client: Client) {
    let host = host(client);
    let layer = Layer::default().dir("nodes", 0o755).device("nodes/mem", 0o666, 1, 1).finish();
    let image = Archive::new("nodes:1").layer(busybox_layer().unwrap()).layer(layer);
    host.engine.load(&image.write(host.dir(), "nodes.tar"));
    let script = "stat -c '%F %t:%T' /nodes/mem; head -c 1 /nodes/mem; mknod /x c 1 1";
    let shown = host.cli(["run", "--rm", "--network", "none", "nodes:1", "sh", "-c", script]).run();
    assert_eq!(shown.stdout, "character special file 1:1\n", "{shown}");
    assert!(
        shown.code != 0 && shown.stderr.contains("head: ") && shown.stderr.contains("mknod: "),
        "{shown}"
    );
}
