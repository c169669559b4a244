//! Projects' sockets: what they are for works, and whoever holds one gets at nothing else. Mostly attacks.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use brigantine_testkit::{Engine, Response, http};
use serde_json::{Value, json};

const LABEL: &str = "com.docker.compose.project";

/// An engine with a socket for the project `shop`.
struct Shop {
    engine: Engine,
    socket: PathBuf,
}

impl Shop {
    #[track_caller]
    fn open(more: &[&str]) -> Self {
        let engine = Engine::with_busybox();
        let socket = engine.dir().join("shop.sock");
        let path = socket.display().to_string();
        let words = ["socket", "create", "--project", "shop"];
        let answer = engine.brig(words.iter().chain(more).chain(&[path.as_str()])).ok();
        assert_eq!(answer, path);
        Self { engine, socket }
    }

    /// The usual: with every image there is.
    #[track_caller]
    fn new() -> Self {
        Self::open(&["--image", "*"])
    }

    #[track_caller]
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("the project's socket");
        stream.set_read_timeout(Some(Duration::from_mins(1))).expect("SO_RCVTIMEO");
        stream
    }

    #[track_caller]
    fn request(&self, method: &str, path: &str) -> Response {
        http::exchange(self.connect(), method, path, None)
    }

    #[track_caller]
    fn send(&self, method: &str, path: &str, body: &Value) -> Response {
        let body = body.to_string();
        http::exchange(self.connect(), method, path, Some(("application/json", body.as_bytes())))
    }

    #[track_caller]
    fn post(&self, path: &str, body: &Value) -> Response {
        self.send("POST", path, body)
    }

    /// The docker command on the project's socket.
    #[track_caller]
    fn docker(&self, args: &[&str]) -> String {
        let host = format!("unix://{}", self.socket.display());
        self.engine.docker(["-H", &host].iter().chain(args)).ok()
    }

    /// A running container made through the engine's own socket.
    #[track_caller]
    fn foreign(&self, name: &str, flags: &[&str]) -> String {
        let words = ["run", "-d", "--name", name];
        self.engine.docker(words.iter().chain(flags).chain(&["busybox", "sleep", "1000"])).ok()
    }
}

#[test]
fn a_project_works_through_its_socket() {
    let shop = Shop::new();
    shop.docker(&["network", "create", "inside"]);
    shop.docker(&["volume", "create", "data"]);
    shop.docker(&[
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "inside",
        "-v",
        "data:/data",
        "-v",
        "/anonymous",
        "-p",
        "18080:80",
        "--memory",
        "64m",
        "busybox",
        "sh",
        "-c",
        "echo hello; exec sleep 1000",
    ]);
    assert_eq!(shop.docker(&["exec", "web", "sh", "-c", "echo kept > /data/file; cat /data/file"]), "kept");
    assert_eq!(shop.docker(&["logs", "web"]), "hello");
    assert_eq!(shop.docker(&["ps", "--format", "{{.Names}}"]), "web");
    let answer =
        shop.docker(&["run", "--rm", "--network", "inside", "busybox", "nslookup", "-type=a", "web"]);
    assert!(answer.contains("Name:\tweb"), "{answer}");
    assert_eq!(shop.docker(&["inspect", "-f", "{{.Config.Labels}}", "web"]), format!("map[{LABEL}:shop]"));
    assert_eq!(shop.docker(&["network", "ls", "-q", "-f", "name=inside"]).len(), 12);
    assert_eq!(shop.docker(&["volume", "ls", "-q"]).lines().count(), 2);
    shop.docker(&["network", "disconnect", "inside", "web"]);
    shop.docker(&["network", "connect", "inside", "web"]);
    shop.docker(&["rename", "web", "front"]);
    shop.docker(&["update", "--memory", "96m", "--memory-swap", "96m", "front"]);
    shop.docker(&["cp", "front:/data/file", &shop.engine.dir().join("copied").display().to_string()]);
    assert_eq!(std::fs::read_to_string(shop.engine.dir().join("copied")).unwrap(), "kept\n");
    // Through the engine's own socket they are there, too.
    assert_eq!(shop.engine.docker(["ps", "--format", "{{.Names}}"]).ok(), "front");
    shop.docker(&["rm", "-f", "-v", "front"]);
    shop.docker(&["volume", "rm", "data"]);
    shop.docker(&["network", "rm", "inside"]);
    shop.engine.assert_nothing_left();
}

#[test]
fn another_projects_containers_are_not_there() {
    let shop = Shop::new();
    let own = shop.docker(&["run", "-d", "--name", "own", "busybox", "sleep", "1000"]);
    let other = shop.foreign("other", &["--label", &format!("{LABEL}=rival"), "--memory", "64m"]);
    let plain = shop.foreign("plain", &[]);
    let before = [&other, &plain].map(|id| shop.engine.inspect(id));
    let references =
        [other.as_str(), &other[..12], &other[..4], "other", plain.as_str(), &plain[..12], "plain"];
    for reference in references {
        let name = http::escape(reference);
        let at = |rest: &str| format!("/containers/{name}{rest}");
        let requests: &[(&str, String, Option<Value>)] = &[
            ("GET", at("/json"), None),
            ("GET", at("/json?size=1"), None),
            ("GET", at("/top"), None),
            ("GET", at("/logs?stdout=1"), None),
            ("GET", at("/stats?stream=0"), None),
            ("GET", at("/changes"), None),
            ("GET", at("/export"), None),
            ("GET", at("/archive?path=/etc/passwd"), None),
            ("HEAD", at("/archive?path=/etc/passwd"), None),
            ("PUT", at("/archive?path=/"), Some(json!({}))),
            ("POST", at("/start"), None),
            ("POST", at("/stop?t=0"), None),
            ("POST", at("/restart?t=0"), None),
            ("POST", at("/kill"), None),
            ("POST", at("/pause"), None),
            ("POST", at("/unpause"), None),
            ("POST", at("/wait"), None),
            ("POST", at("/resize?h=1&w=1"), None),
            ("POST", at("/attach?stream=1&stdin=1&stdout=1"), None),
            ("GET", at("/attach/ws?stream=1"), None),
            ("POST", at("/rename?name=mine"), None),
            ("POST", at("/update"), Some(json!({ "Memory": 8 << 20 }))),
            ("POST", at("/exec"), Some(json!({ "Cmd": ["true"] }))),
            ("DELETE", at("?force=1&v=1"), None),
        ];
        for (method, path, body) in requests {
            let answer = match body {
                None => shop.request(method, path),
                Some(body) => shop.send(method, path, body),
            };
            assert_eq!(answer.status, 404, "{method} {path}: {}", answer.text());
            if *method != "HEAD" {
                assert_eq!(answer.message(), format!("No such container: {reference}"), "{method} {path}");
            }
        }
        // By way of the version in the path, and of an encoded slash.
        shop.request("GET", &format!("/v1.45/containers/{name}/json")).expect(404);
        assert_ne!(shop.request("GET", &format!("/containers/{own}%2F..%2F{name}/json")).status, 200);
    }
    // A prefix that is ambiguous among all is not among the project's.
    shop.request("GET", &format!("/containers/{}/json", &own[..1])).expect(200);
    // Filters do not find them either.
    for filters in ["{}", r#"{"name":["other"]}"#, r#"{"label":["com.docker.compose.project=rival"]}"#] {
        let list = shop.request("GET", &format!("/containers/json?all=1&filters={}", http::escape(filters)));
        let names = list.expect(200).json();
        assert!(names.as_array().unwrap().iter().all(|one| one["Id"] == own.as_str()), "{filters}: {names}");
    }
    shop.request("GET", "/containers/json?filters=%7B%22before%22%3A%5B%22other%22%5D%7D").expect(404);
    // Execs of theirs.
    let exec =
        shop.engine.post(&format!("/containers/{other}/exec"), &json!({ "Cmd": ["sleep", "9"] })).expect(201);
    let exec = exec.json()["Id"].as_str().unwrap().to_owned();
    shop.request("GET", &format!("/exec/{exec}/json")).expect(404);
    shop.request("POST", &format!("/exec/{exec}/resize?h=1&w=1")).expect(404);
    let (answer, _stream) = http::hijack(shop.connect(), &format!("/exec/{exec}/start"), "{}", true);
    assert_eq!(answer.status, 404);
    // Nothing has happened to them.
    for (id, before) in [&other, &plain].into_iter().zip(before) {
        let after = shop.engine.inspect(id);
        for part in ["State", "Name", "HostConfig"] {
            assert_eq!(after[part], before[part]);
        }
    }
}

#[test]
fn nothing_of_others_can_be_joined_or_used() {
    let shop = Shop::new();
    let own = shop.docker(&["run", "-d", "--name", "own", "busybox", "sleep", "1000"]);
    let other = shop.foreign("other", &["-v", "treasure:/t"]);
    shop.engine.docker(["network", "create", "theirs"]).ok();
    let network = shop.engine.docker(["network", "ls", "-q", "-f", "name=theirs", "--no-trunc"]).ok();
    let create =
        |host: Value| shop.post("/containers/create", &json!({ "Image": "busybox", "HostConfig": host }));
    for reference in ["other", &other, &other[..12]] {
        create(json!({ "NetworkMode": format!("container:{reference}") })).expect(404);
        create(json!({ "PidMode": format!("container:{reference}") })).expect(404);
        create(json!({ "IpcMode": format!("container:{reference}") })).expect(404);
        create(json!({ "VolumesFrom": [reference] })).expect(404);
        create(json!({ "VolumesFrom": [format!("{reference}:ro")] })).expect(404);
    }
    for reference in ["theirs", &network, &network[..12]] {
        create(json!({ "NetworkMode": reference })).expect(404);
        let body =
            json!({ "Image": "busybox", "NetworkingConfig": { "EndpointsConfig": { reference: {} } } });
        shop.post("/containers/create", &body).expect(404);
        shop.request("GET", &format!("/networks/{reference}")).expect(404);
        shop.post(&format!("/networks/{reference}/connect"), &json!({ "Container": own })).expect(404);
        shop.post(
            &format!("/networks/{reference}/disconnect"),
            &json!({ "Container": other, "Force": true }),
        )
        .expect(404);
        shop.request("DELETE", &format!("/networks/{reference}")).expect(404);
    }
    shop.docker(&["network", "create", "mine"]);
    shop.post("/networks/mine/connect", &json!({ "Container": "other" })).expect(404);
    // Their containers, and who is on them, are nobody's business.
    for predefined in ["bridge", "host", "none"] {
        shop.request("GET", &format!("/networks/{predefined}")).expect(404);
    }
    assert_eq!(shop.request("GET", "/networks").expect(200).json().as_array().unwrap().len(), 1);
    // Volumes.
    create(json!({ "Binds": ["treasure:/t"] })).expect(404);
    create(json!({ "Mounts": [{ "Type": "volume", "Source": "treasure", "Target": "/t" }] })).expect(404);
    shop.request("GET", "/volumes/treasure").expect(404);
    shop.request("DELETE", "/volumes/treasure?force=1").expect(404);
    shop.post("/volumes/create", &json!({ "Name": "treasure" })).expect(409);
    assert_eq!(shop.request("GET", "/volumes").expect(200).json()["Volumes"], json!([]));
    // A label of another project's is not kept.
    let body = json!({ "Name": "planted", "Labels": { LABEL: "rival" } });
    assert_eq!(shop.post("/volumes/create", &body).expect(201).json()["Labels"][LABEL], "shop");
    let body = json!({ "Image": "busybox", "Labels": { LABEL: "rival" } });
    let planted =
        shop.post("/containers/create", &body).expect(201).json()["Id"].as_str().unwrap().to_owned();
    assert_eq!(shop.engine.inspect(&planted)["Config"]["Labels"][LABEL], "shop");
    // What was refused has left nothing.
    let all = shop.engine.get("/containers/json?all=1");
    assert_eq!(all.as_array().unwrap().len(), 3, "{all}");
}

#[test]
fn prunes_events_and_counts_are_of_the_project_alone() {
    let shop = Shop::new();
    shop.engine.docker(["create", "--name", "stopped", "busybox", "true"]).ok();
    shop.engine.docker(["volume", "create", "unused"]).ok();
    shop.engine.docker(["network", "create", "unused"]).ok();
    shop.docker(&["create", "--name", "own", "busybox", "true"]);
    shop.docker(&["volume", "create", "own"]);
    shop.docker(&["network", "create", "own"]);
    let info = shop.request("GET", "/info").expect(200).json();
    assert_eq!((&info["Containers"], &info["ContainersStopped"]), (&json!(1), &json!(1)));
    let pruned = shop.request("POST", "/containers/prune").expect(200).json();
    assert_eq!(pruned["ContainersDeleted"].as_array().unwrap().len(), 1);
    let pruned =
        shop.request("POST", "/volumes/prune?filters=%7B%22all%22%3A%5B%22true%22%5D%7D").expect(200).json();
    assert_eq!(pruned["VolumesDeleted"], json!(["own"]));
    let pruned = shop.request("POST", "/networks/prune").expect(200).json();
    assert_eq!(pruned["NetworksDeleted"], json!(["own"]));
    for (path, what) in
        [("/containers/stopped/json", "Name"), ("/volumes/unused", "Name"), ("/networks/unused", "Name")]
    {
        assert!(shop.engine.get(path)[what].is_string());
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 1;
    let path = format!("/events?since=1&until={now}");
    let seen = |answer: Response| -> Vec<String> {
        let text = answer.expect(200).text();
        let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events
            .map(|event| {
                format!("{} {} {}", event["Type"], event["Action"], event["Actor"]["Attributes"]["name"])
            })
            .collect()
    };
    let own = seen(shop.request("GET", &path));
    assert!(own.iter().any(|event| event.contains("create") && event.contains("own")), "{own:?}");
    assert!(!own.iter().any(|event| event.contains("stopped") || event.contains("unused")), "{own:?}");
    let all = seen(shop.engine.request("GET", &path));
    assert!(all.len() > own.len() && all.iter().any(|event| event.contains("stopped")));
}

#[test]
fn what_amounts_to_root_is_refused_with_a_reason() {
    let shop = Shop::new();
    for (flags, reason) in [
        (&["--privileged"][..], "--privileged is not allowed"),
        (&["-v", "/:/host"], "the bind mount \"/:/host\" is not allowed"),
        (&["--mount", "type=bind,source=/,target=/host"], "a bind mount is not allowed"),
        (&["--pid", "host"], "--pid host is not allowed"),
        (&["--network", "host"], "--network host is not allowed"),
        (&["--cap-add", "SYS_ADMIN"], "SYS_ADMIN is not allowed"),
        (&["--security-opt", "seccomp=unconfined"], "--security-opt seccomp=unconfined is not allowed"),
        (&["--device", "/dev/null"], "--device is not allowed"),
        (&["--sysctl", "net.ipv4.ip_forward=1"], "--sysctl is not allowed"),
        (&["--cgroup-parent", "/x"], "--cgroup-parent is not allowed"),
        (&["-p", "80:80"], "publishing port 80 (below 1024) is not allowed"),
        (
            &[
                "--mount",
                "type=volume,source=v,target=/v,volume-driver=local,volume-opt=type=none,volume-opt=o=bind,volume-opt=device=/",
            ],
            "an option for a volume's driver is not allowed",
        ),
    ] {
        let host = format!("unix://{}", shop.socket.display());
        let words = ["-H", &host, "run", "--rm"];
        let run = shop.engine.docker(words.iter().chain(flags).chain(&["busybox", "true"])).exits(125);
        assert!(run.stderr.contains(reason), "{flags:?}: {}", run.stderr);
    }
    let own = shop.docker(&["run", "-d", "busybox", "sleep", "1000"]);
    shop.post(&format!("/containers/{own}/exec"), &json!({ "Cmd": ["true"], "Privileged": true }))
        .expect(403);
    shop.post(&format!("/containers/{own}/update"), &json!({ "Devices": [{ "PathOnHost": "/dev/sda" }] }))
        .expect(403);
    shop.post(
        "/networks/create",
        &json!({ "Name": "n", "IPAM": { "Config": [{ "Subnet": "8.8.8.0/24" }] } }),
    )
    .expect(403);
    shop.post("/volumes/create", &json!({ "Name": "v", "DriverOpts": { "device": "/", "o": "bind" } }))
        .expect(403);
}

#[test]
fn endpoints_that_are_not_a_projects_do_not_exist() {
    let shop = Shop::open(&["--image", "*", "--allow", "containers,exec,files,volumes,networks,pull"]);
    let own = shop.docker(&["run", "-d", "busybox", "sleep", "1000"]);
    for (method, path) in [
        ("GET", "/sockets".to_owned()),
        ("POST", "/sockets/create".to_owned()),
        ("DELETE", "/sockets/shop".to_owned()),
        ("GET", "/system/df".to_owned()),
        ("POST", "/system/check?repair=1".to_owned()),
        ("POST", "/auth".to_owned()),
        ("POST", "/build?t=busybox".to_owned()),
        ("POST", "/build/prune".to_owned()),
        ("POST", "/session".to_owned()),
        ("POST", "/grpc".to_owned()),
        ("POST", format!("/commit?container={own}&repo=busybox")),
        ("POST", "/images/load".to_owned()),
        ("POST", "/images/create?fromSrc=-&repo=busybox".to_owned()),
        ("POST", "/images/busybox/tag?repo=x".to_owned()),
        ("POST", "/images/busybox/push".to_owned()),
        ("POST", "/images/prune".to_owned()),
        ("DELETE", "/images/busybox?force=1".to_owned()),
        ("GET", "/images/busybox/get".to_owned()),
        ("GET", "/images/get?names=busybox".to_owned()),
        ("GET", "/plugins".to_owned()),
        ("GET", "/swarm".to_owned()),
        ("PUT", "/volumes/x".to_owned()),
        ("PATCH", "/anything/at/all".to_owned()),
        ("GET", "/".to_owned()),
    ] {
        let answer = shop.request(method, &path);
        assert_eq!(answer.status, 403, "{method} {path}: {}", answer.text());
        assert!(answer.message().contains("project's socket"), "{}", answer.text());
    }
    shop.engine.get("/images/busybox/json");
}

#[test]
fn an_images_label_makes_nobody_a_member() {
    let shop = Shop::new();
    let layer = shop.engine.docker(["create", "busybox", "true"]).ok();
    let change = format!("LABEL {LABEL}=shop");
    shop.engine.docker(["commit", "--change", &change, &layer, "trojan"]).ok();
    let id =
        shop.engine.docker(["run", "-d", "--privileged", "--name", "admin", "trojan", "sleep", "1000"]).ok();
    assert_eq!(shop.engine.inspect(&id)["Config"]["Labels"][LABEL], "shop");
    shop.request("GET", "/containers/admin/json").expect(404);
    shop.post("/containers/admin/exec", &json!({ "Cmd": ["sh"] })).expect(404);
    assert_eq!(shop.request("GET", "/containers/json?all=1").expect(200).json(), json!([]));
    // The request's own does: whoever may do everything has said so.
    shop.foreign("labelled", &["--label", &format!("{LABEL}=shop")]);
    shop.request("GET", "/containers/labelled/json").expect(200);
}

#[test]
fn a_network_of_the_same_name_is_not_the_same_network() {
    let shop = Shop::new();
    shop.docker(&["network", "create", "net"]);
    let own = shop.docker(&["create", "--network", "net", "busybox", "sleep", "1000"]);
    shop.docker(&["network", "rm", "net"]);
    shop.engine.docker(["network", "create", "net"]).ok();
    let answer = shop.request("POST", &format!("/containers/{own}/start")).expect(404);
    assert_eq!(answer.message(), "network net not found");
    shop.engine.docker(["network", "rm", "net"]).ok();
    shop.docker(&["network", "create", "net"]);
    shop.docker(&["start", &own]);
}

#[test]
fn images_are_used_when_granted_or_pulled() {
    let shop = Shop::open(&["--allow", "containers,pull", "--image", "nothing:*"]);
    let create = |image: &str| shop.post("/containers/create", &json!({ "Image": image }));
    let id = shop.engine.get("/images/busybox/json")["Id"].as_str().unwrap().to_owned();
    for name in ["busybox", "busybox:latest", &id, &id[7..19]] {
        create(name).expect(404);
        shop.request("GET", &format!("/images/{name}/json")).expect(404);
    }
    let mount = json!({ "Type": "image", "Source": "busybox", "Target": "/i" });
    shop.request("POST", "/images/create?fromImage=hello&tag=latest").expect(200);
    create("hello").expect(201);
    let body = json!({ "Image": "hello", "HostConfig": { "Mounts": [mount] } });
    shop.post("/containers/create", &body).expect(404);
    let list = shop.request("GET", "/images/json").expect(200).json();
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    assert_eq!(list[0]["RepoTags"], json!(["hello:latest"]));
    // Without the permission, nothing is pulled.
    let other = shop.engine.dir().join("other.sock").display().to_string();
    shop.engine.brig(["socket", "create", "--project", "other", &other]).ok();
    let stream = UnixStream::connect(&other).unwrap();
    http::exchange(stream, "POST", "/images/create?fromImage=hello&tag=latest", None).expect(403);
}

#[test]
fn permissions_lifetime_and_owner_are_kept() {
    let engine = Engine::with_busybox();
    let mut shop = Shop { socket: engine.dir().join("shop.sock"), engine };
    let path = shop.socket.display().to_string();
    let flags =
        ["--project", "shop", "--allow", "containers", "--image", "busybox:*", "--owner", "4711:4712"];
    shop.engine.brig(["socket", "create"].iter().chain(&flags).chain(&[path.as_str()])).ok();
    let file = std::fs::metadata(&shop.socket).unwrap();
    assert_eq!((file.uid(), file.gid(), file.permissions().mode() & 0o777), (4711, 4712, 0o660));
    let own = shop.docker(&["run", "-d", "busybox", "sleep", "1000"]);
    for (method, path, body) in [
        ("POST", format!("/containers/{own}/exec"), json!({ "Cmd": ["true"] })),
        ("PUT", format!("/containers/{own}/archive?path=/"), json!({})),
        ("POST", "/volumes/create".to_owned(), json!({})),
        ("POST", "/networks/create".to_owned(), json!({ "Name": "n" })),
        ("POST", "/images/create?fromImage=hello".to_owned(), json!({})),
    ] {
        let answer = shop.send(method, &path, &body).expect(403);
        assert!(answer.message().contains("would take the permission"), "{}", answer.text());
    }
    let listed =
        shop.engine.brig(["socket", "ls", "--format", "{{.Name}} {{.Project}} {{.Owner}} {{.Allow}}"]).ok();
    assert_eq!(listed, "shop shop 4711:4712 containers");
    let again = shop.engine.brig(["socket", "create", "--project", "shop"]).exits(1);
    assert!(again.stderr.contains("already exists"), "{}", again.stderr);
    // It is there again with the next daemon, whatever became of the one before.
    shop.engine.kill_daemon();
    shop.engine.restart_daemon();
    shop.request("GET", &format!("/containers/{own}/json")).expect(200);
    shop.engine.brig(["socket", "rm", "shop"]).ok();
    assert!(!shop.socket.exists());
    assert!(UnixStream::connect(&shop.socket).is_err());
    let gone = shop.engine.brig(["socket", "rm", "shop"]).exits(1);
    assert!(gone.stderr.contains("No such socket: shop"), "{}", gone.stderr);
    shop.engine.docker(["rm", "-f", &own]).ok();
    shop.engine.assert_nothing_left();
}
