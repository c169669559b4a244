//! Authorization plugins: small ones of our own are asked about what the docker command does.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use brigantine_testkit::{Client, Engine};
use serde_json::{Value, json};

use crate::Host;
use crate::plugins::{receive, reply};

type Calls = Arc<Mutex<Vec<(String, Value)>>>;

/// A plugin on a thread of the test; `answer` decides.
struct Judge {
    socket: PathBuf,
    calls: Calls,
}

impl Judge {
    fn start(dir: &Path, name: &str, answer: fn(&str, &Value) -> Value) -> Self {
        let socket = dir.join(format!("{name}.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        let calls = Calls::default();
        let seen = Arc::clone(&calls);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let Some((method, body)) = receive(&mut stream) else { continue };
                let said = match method.as_str() {
                    "Plugin.Activate" => json!({ "Implements": ["authz"] }),
                    _ => answer(&method, &body),
                };
                seen.lock().unwrap().push((method, body));
                reply(&mut stream, &said.to_string());
            }
        });
        Self { socket, calls }
    }

    fn spec(&self) -> String {
        format!("unix://{}\n", self.socket.display())
    }

    /// What it was asked about the requests to `path`, and about their answers.
    fn asked(&self, path: &str) -> [Vec<Value>; 2] {
        let calls = self.calls.lock().unwrap();
        ["AuthZPlugin.AuthZReq", "AuthZPlugin.AuthZRes"].map(|method| {
            let of = calls.iter().filter(|(asked, body)| {
                asked == method && body["RequestUri"].as_str().is_some_and(|uri| uri.contains(path))
            });
            of.map(|(_, body)| body.clone()).collect()
        })
    }
}

fn decoded(text: &Value) -> Value {
    let bytes = base64::engine::general_purpose::STANDARD.decode(text.as_str().expect("a body")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn path(body: &Value) -> &str {
    body["RequestUri"].as_str().unwrap_or_default()
}

/// No privileged containers, no volumes named `secret` shown, and a plugin that fails for one path.
fn strict(method: &str, body: &Value) -> Value {
    if method == "AuthZPlugin.AuthZRes" {
        let shows = path(body).contains("/volumes/secret") && body["ResponseStatusCode"] == 200;
        return json!({ "Allow": !shows, "Msg": "that one is not shown" });
    }
    if path(body).contains("/networks/create") {
        return json!({ "Err": "the judge is ill" });
    }
    let privileged = path(body).contains("/containers/create")
        && body.get("RequestBody").is_some()
        && decoded(&body["RequestBody"])["HostConfig"]["Privileged"] == true;
    json!({ "Allow": !privileged, "Msg": "no privileges here" })
}

fn lenient(_method: &str, _body: &Value) -> Value {
    json!({ "Allow": true })
}

#[test]
fn plugins_decide_about_requests_and_their_answers() {
    let dir = tempfile::tempdir().unwrap();
    let first = Judge::start(dir.path(), "lenient", lenient);
    let second = Judge::start(dir.path(), "strict", strict);
    let host = Host {
        engine: Engine::builder()
            .busybox()
            .etc("docker/plugins/lenient.spec", first.spec())
            .etc("docker/plugins/strict.spec", second.spec())
            .flag("--authorization-plugin=lenient")
            .flag("--authorization-plugin=strict")
            .start(),
        client: Client::Docker,
    };
    assert_eq!(host.cli(["info", "--format", "{{.Plugins.Authorization}}"]).ok(), "[lenient strict]");

    // What is allowed works, streams and taken over connections as well.
    assert_eq!(host.busybox(&["echo", "allowed"]), "allowed");
    let [before, after] = second.asked("/containers/create");
    assert_eq!((before.len(), after.len()), (1, 1));
    assert_eq!(decoded(&before[0]["RequestBody"])["Cmd"], json!(["echo", "allowed"]));
    assert_eq!((&before[0]["RequestMethod"], &after[0]["ResponseStatusCode"]), (&json!("POST"), &json!(201)));
    assert_eq!(before[0]["RequestHeaders"]["Content-Type"], "application/json");
    assert!(before[0].get("User").is_none() && before[0].get("ResponseStatusCode").is_none());
    assert_eq!(decoded(&after[0]["ResponseBody"])["Id"].as_str().map(str::len), Some(64));
    let [_, attached] = second.asked("/attach");
    assert!(attached[0].get("ResponseBody").is_none(), "{attached:?}");
    // An archive is nothing to read for it.
    let [before, _] = second.asked("/images/load");
    assert!(before[0].get("RequestBody").is_none());

    // What one denies is not done; the first was asked all the same.
    host.cli(["run", "--rm", "--privileged", "busybox", "true"])
        .exits(125)
        .expect_stderr("authorization denied by plugin strict: no privileges here");
    let refused = host.request("POST", "/containers/create?name=bare");
    assert_eq!(refused.status, 400);
    assert_eq!(host.cli(["ps", "-aq"]).ok(), "");
    assert_eq!(first.asked("/containers/create")[0].len(), second.asked("/containers/create")[0].len());
    // An answer that is denied is not shown.
    host.cli(["volume", "create", "secret"]).ok();
    let answer = host.request("GET", "/volumes/secret").expect(403);
    assert_eq!(answer.message(), "authorization denied by plugin strict: that one is not shown");
    host.request("DELETE", "/volumes/secret").expect(204);
    // One that fails lets nothing pass.
    let answer = host.request("POST", "/networks/create").expect(500);
    assert!(answer.message().contains("plugin strict: AuthZPlugin.AuthZReq: the judge is ill"));
    // A body that is too long to be shown is refused.
    let long = json!({ "Image": "busybox", "Labels": { "a": "x".repeat(1 << 20) } }).to_string();
    let answer = host.post_bytes("/containers/create", "application/json", long.as_bytes());
    assert_eq!(answer.status, 400);
    assert!(answer.message().contains("larger than 1048576 bytes"), "{}", answer.message());
    // Neither does one that has gone.
    std::fs::remove_file(&first.socket).unwrap();
    let answer = host.request("GET", "/containers/json").expect(500);
    assert!(answer.message().contains("plugin lenient: "), "{}", answer.message());
}

#[test]
fn plugins_of_a_configuration_are_changed_by_a_reload_and_have_to_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let judge = Judge::start(dir.path(), "strict", strict);
    let config = dir.path().join("daemon.json");
    std::fs::write(&config, "{}").unwrap();
    let host = Host {
        engine: Engine::builder()
            .busybox()
            .etc("docker/plugins/strict.spec", judge.spec())
            .flag(format!("--config-file={}", config.display()))
            .start(),
        client: Client::Docker,
    };
    let privileged = |host: &Host| host.cli(["create", "--privileged", "busybox"]);
    let id = privileged(&host).ok();
    host.cli(["rm", &id]).ok();
    std::fs::write(&config, json!({ "authorization-plugins": ["strict"] }).to_string()).unwrap();
    host.signal_daemon("HUP");
    brigantine_testkit::eventually("the plugin to be asked", || {
        let wanted = json!({ "Image": "busybox", "HostConfig": { "Privileged": true } });
        (host.post("/containers/create", &wanted).status == 403).then_some(())
    });
    privileged(&host).exits(1).expect_stderr("no privileges here");
    // A daemon does not start without them.
    let failed = host
        .sandbox()
        .net_command(brigantine_testkit::executable("brig"))
        .args(["daemon", "--bridge=none", "--authorization-plugin=nobody", "--config-file=/dev/null"])
        .args(["--data-root", "data", "--exec-root", "exec"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(!failed.status.success());
    let said = String::from_utf8_lossy(&failed.stderr) + String::from_utf8_lossy(&failed.stdout);
    assert!(said.contains("use the authorization plugins: plugin \"nobody\" not found"), "{said}");
}
