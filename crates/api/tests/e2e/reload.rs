//! SIGHUP: settings that may change while the daemon runs, what it tells the service manager, and a broken file.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use brigantine_testkit::{Client, Engine, eventually};
use serde_json::{Value, json};

use crate::Host;

#[test]
fn a_reload_takes_over_what_may_change_and_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let hear = || {
        let mut buffer = [0; 256];
        let length = manager.recv(&mut buffer).expect("a word to the service manager");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let config = |labels: Value| json!({ "labels": labels, "runtimes": {} });
    let engine = Engine::builder()
        .busybox()
        .etc("brigantine/daemon.json", config(json!(["stage=one"])).to_string())
        .env("NOTIFY_SOCKET", path.to_str().unwrap())
        .start();
    let host = Host { engine, client: Client::Docker };
    assert!(hear().starts_with("READY=1"));
    let labels = || host.cli(["info", "--format", "{{json .Labels}}"]).ok();
    assert_eq!(labels(), r#"["stage=one"]"#);
    let write = |text: &str| {
        let script = "cat >/etc/brigantine/daemon.json.new && mv /etc/brigantine/daemon.json.new /etc/brigantine/daemon.json";
        let file = host.dir().join("new.json");
        fs::write(&file, text).unwrap();
        let mut shell = host.sandbox().command("sh");
        shell.args(["-c", script]).stdin(fs::File::open(&file).unwrap());
        assert!(shell.status().unwrap().success());
    };

    let mut changed = config(json!(["stage=two"]));
    changed["runtimes"] = json!({ "late": { "path": "/usr/sbin/runc" } });
    write(&changed.to_string());
    let before = monotonic();
    host.signal_daemon("HUP");
    let told = hear();
    let (state, since) = told.split_once("\nMONOTONIC_USEC=").expect("since when");
    assert_eq!(state, "RELOADING=1");
    let since: u64 = since.parse().unwrap();
    assert!((before..=monotonic()).contains(&since), "{since} is not between {before} and now");
    assert!(hear().starts_with("READY=1"));
    assert_eq!(labels(), r#"["stage=two"]"#);
    host.script(&["--runtime", "late"], "true");
    let format = "{{.Type}} {{.Action}}";
    let events =
        ["system", "events", "--since", "1h", "--until", "1s", "--filter", "type=daemon", "--format", format];
    eventually("the event", || (host.cli(events).ok() == "daemon reload").then_some(()));

    // A broken file changes nothing, and the daemon says why.
    for broken in ["{", r#"{"labels":"one"}"#, r#"{"default-runtime":"nosuch"}"#] {
        write(broken);
        host.signal_daemon("HUP");
        assert!(hear().starts_with("RELOADING=1"));
        assert!(hear().starts_with("READY=1"));
        assert_eq!(labels(), r#"["stage=two"]"#);
    }
    let log = host.daemon_log();
    assert!(
        log.contains("is not valid JSON") && log.contains("unknown or invalid runtime name: nosuch"),
        "{log}"
    );
}

/// Microseconds of the clock that systemd compares with.
fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (now.tv_sec * 1_000_000 + now.tv_nsec / 1000).cast_unsigned()
}
