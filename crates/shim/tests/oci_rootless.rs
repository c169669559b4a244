//! Containers of a user without any privileges, with one id of their own or with those that the system gave the user.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use bundle::{Bundle, Done, eventually};
use serde_json::{Value, json};

/// Has no files, no groups and no privileges.
const NOBODY: u32 = 65_534;

fn give(path: &Path) {
    std::os::unix::fs::lchown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).unwrap().flatten() {
            give(&entry.path());
        }
    }
}

/// A bundle of that user's, as its own `spec --rootless` makes it.
fn bundle(args: &[&str]) -> Bundle {
    let mut bundle = Bundle::new(args);
    let exe = Path::new(bundle.dir()).join("brig-runtime");
    fs::copy(&bundle.exe, &exe).unwrap();
    bundle.exe = exe;
    fs::create_dir(bundle.path("run")).unwrap();
    fs::remove_file(bundle.path("config.json")).unwrap();
    fs::set_permissions(bundle.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    give(Path::new(bundle.dir()));
    let made = run(&bundle, "", &format!("spec --rootless --bundle {}", bundle.dir()));
    assert_eq!((made.code, made.err.as_str()), (0, ""));
    bundle.configure(|c| {
        c["process"]["terminal"] = json!(false);
        c["process"]["args"] = json!(args);
        c["process"]["env"] = json!(["PATH=/bin"]);
        c["root"]["readonly"] = json!(false);
    });
    bundle
}

/// Runs the command as nobody; `before` as root, in a mount namespace of its own.
fn run(bundle: &Bundle, before: &str, words: &str) -> Done {
    let out = bundle.path("rootless.out");
    let script = format!(
        "{before} exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups \
         env -i PATH=/usr/bin:/bin XDG_RUNTIME_DIR={0}/run {1} {words}",
        bundle.dir(),
        bundle.exe.display()
    );
    let status = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .stdin(std::process::Stdio::null())
        .stdout(fs::File::create(&out).unwrap())
        .stderr(fs::File::create(format!("{out}.err")).unwrap())
        .status()
        .unwrap();
    let read = |file: &str| fs::read_to_string(file).unwrap();
    Done { code: status.code().unwrap(), out: read(&out), err: read(&format!("{out}.err")) }
}

#[test]
fn a_user_has_containers_with_its_own_id() {
    let bundle =
        bundle(&["/bin/sh", "-c", "id -u; cat /proc/self/uid_map; echo x >/made; hostname; exec sleep 1000"]);
    let id = bundle.id.as_str();
    let good = |words: &str| {
        let done = run(&bundle, "", words);
        assert_eq!((done.code, done.err.as_str()), (0, ""), "{words}");
        done.out
    };
    let begun = good(&format!("run -d --bundle {} {id}", bundle.dir()));
    let out = || fs::read_to_string(bundle.path("rootless.out")).unwrap();
    drop((begun, out));
    eventually("it runs", || bundle.root().join("made").exists());
    assert_eq!(fs::metadata(bundle.root().join("made")).unwrap().uid(), NOBODY);
    // Its records are its own.
    assert!(Path::new(&bundle.path("run/brig-runtime")).join(id).join("state.json").exists());
    let list: Value = serde_json::from_str(&good("list -f json")).unwrap();
    assert_eq!(
        (&list[0]["id"], &list[0]["owner"], &list[0]["status"]),
        (&json!(id), &json!("nobody"), &json!("running"))
    );
    let host = list[0]["pid"].as_i64().unwrap();
    let inside = good(&format!(
        "exec {id} sh -c 'id -u; cat /proc/1/comm; readlink /proc/self/ns/user; readlink /proc/self/ns/mnt'"
    ));
    let own = |name: &str| fs::read_link(format!("/proc/{host}/ns/{name}")).unwrap().display().to_string();
    assert_eq!(inside, format!("0\nsleep\n{}\n{}\n", own("user"), own("mnt")));
    assert_eq!(good(&format!("ps -f json {id}")).trim(), format!("[{host}]"));
    let refused = run(&bundle, "", &format!("delete {id}"));
    assert!(refused.err.contains("it is running"), "{refused:?}");
    good(&format!("kill {id} KILL"));
    eventually("it stops", || good(&format!("state {id}")).contains("\"stopped\""));
    good(&format!("delete {id}"));
    assert_eq!(good("list -q"), "");
    // And one that is deleted by force is gone with all its processes, though it has no cgroup.
    good(&format!("run -d --bundle {} {id}", bundle.dir()));
    good(&format!("delete --force {id}"));
    assert!(!bundle.root().join("..").join("run/brig-runtime").join(id).exists());
}

#[test]
fn what_a_user_may_not_have_is_refused_by_name() {
    let bundle = bundle(&["/bin/true"]);
    let run = |words: &str| run(&bundle, "", &format!("{words} --bundle {} {}", bundle.dir(), bundle.id));
    assert_eq!(run("run").code, 0);
    let refused = |change: &dyn Fn(&mut Value), says: &str| {
        let before = fs::read(bundle.path("config.json")).unwrap();
        bundle.configure(change);
        let done = run("run");
        assert!(
            done.code == 1 && done.err.contains(says) && done.err.lines().count() == 1,
            "{says}: {done:?}"
        );
        fs::write(bundle.path("config.json"), before).unwrap();
        assert!(!Path::new(&bundle.path("run/brig-runtime")).join(&bundle.id).exists());
    };
    refused(&|c| c["linux"]["resources"] = json!({"memory": {"limit": 1 << 20}}), "creating cgroup");
    refused(&|c| c["process"]["user"]["additionalGids"] = json!([5]), "additionalGids");
    refused(&|c| c["process"]["user"]["uid"] = json!(7), "user id 7");
    refused(
        &|c| c["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "user"),
        "id mappings are given, but no user namespace",
    );
    refused(
        &|c| {
            c["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "user");
            for map in ["uidMappings", "gidMappings"] {
                drop(c["linux"].as_object_mut().unwrap().remove(map));
            }
        },
        "operation not permitted",
    );
    // Where nothing says where its records are to be, it hears what cannot be used.
    let done = Command::new("setpriv")
        .args(["--reuid", &NOBODY.to_string(), "--clear-groups", "env", "-i", bundle.exe.to_str().unwrap()])
        .args(["run", "--bundle", bundle.dir(), &bundle.id])
        .output()
        .unwrap();
    let says = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(says.contains("creating /run/brig-runtime") && says.contains("XDG_RUNTIME_DIR"), "{says}");
}

#[test]
fn a_user_has_the_ids_that_the_system_gave_it() {
    let bundle = bundle(&["/bin/sh", "-c", "cat /proc/self/uid_map; id -u; id -G; echo x >/tmp/made"]);
    fs::set_permissions(bundle.root().join("tmp"), fs::Permissions::from_mode(0o777)).unwrap();
    bundle.configure(|c| {
        let maps = json!([{"containerID": 0, "hostID": NOBODY, "size": 1}, {"containerID": 1, "hostID": 300_000, "size": 1000}]);
        c["linux"]["uidMappings"] = maps.clone();
        c["linux"]["gidMappings"] = maps;
        c["process"]["user"] = json!({"uid": 5, "gid": 6, "additionalGids": [7]});
    });
    let table = bundle.path("ids");
    fs::write(&table, "nobody:300000:1000\n").unwrap();
    let given = format!("mount --bind {table} /etc/subuid && mount --bind {table} /etc/subgid &&");
    let words = format!("run --bundle {} {}", bundle.dir(), bundle.id);
    for file in ["/etc/subuid", "/etc/subgid"] {
        assert!(Path::new(file).exists(), "{file} comes with uidmap's dependencies");
    }
    let done = run(&bundle, &given, &words);
    assert_eq!((done.code, done.err.as_str()), (0, ""));
    let lines: Vec<&str> = done.out.lines().collect();
    assert!(lines[1].split_whitespace().eq(["1", "300000", "1000"]), "{}", done.out);
    assert_eq!(lines[2..], ["5", "6 7"]);
    let made = fs::metadata(bundle.root().join("tmp/made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (300_004, 300_005));

    // Not given, or no program to ask for it.
    let done = run(&bundle, "", &words);
    assert!(done.code == 1 && done.err.contains("newgidmap") && done.err.contains("not allowed"), "{done:?}");
    let done = run(&bundle, &format!("{given} mount --bind /dev/null /usr/bin/newgidmap &&"), &words);
    assert!(done.code == 1 && done.err.contains("newgidmap"), "{done:?}");
    assert!(!Path::new(&bundle.path("run/brig-runtime")).join(&bundle.id).exists());
}
