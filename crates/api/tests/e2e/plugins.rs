//! Volume plugins: a small one of our own, driven through the engine by the docker command; one that hangs; one that lies.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigantine_testkit::{Client, Engine, eventually};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};

use crate::Host;

/// What the plugin is to do wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Good,
    /// It takes calls and never answers.
    Hangs,
    /// Mountpoints that are not there, volumes nobody asked for, no JSON.
    Lies,
}

/// A plugin on threads of the test: directories in `root` are its volumes.
struct Plugin {
    calls: Arc<Mutex<Vec<(String, Value)>>>,
    socket: PathBuf,
}

impl Plugin {
    fn start(dir: &Path, name: &str, manner: Manner) -> Self {
        let socket = dir.join(format!("{name}.sock"));
        let root = dir.join(format!("{name}-volumes"));
        fs::create_dir(&root).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let state = (Arc::clone(&calls), Arc::new(Mutex::new(BTreeMap::new())), root);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (calls, volumes, root) = state.clone();
                std::thread::spawn(move || serve(&mut stream, manner, &calls, &volumes, &root));
            }
        });
        Self { calls, socket }
    }

    /// The same inside TLS, for clients with a certificate of the directory's authority.
    fn start_tls(dir: &Path, listener: TcpListener) -> Self {
        let config = server_config(dir);
        let root = dir.join("tls-volumes");
        fs::create_dir(&root).unwrap();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let state = (Arc::clone(&calls), Arc::new(Mutex::new(BTreeMap::new())), root);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (calls, volumes, root) = state.clone();
                let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
                std::thread::spawn(move || {
                    let mut stream = rustls::StreamOwned::new(connection, stream);
                    serve(&mut stream, Manner::Good, &calls, &volumes, &root);
                    stream.conn.send_close_notify();
                    stream.flush().ok();
                });
            }
        });
        Self { calls, socket: PathBuf::new() }
    }

    /// Where the engine's sandbox finds it: a file of the plugin's name.
    fn spec(&self) -> String {
        format!("unix://{}\n", self.socket.display())
    }

    /// The calls so far of one method.
    fn calls(&self, method: &str) -> Vec<Value> {
        let calls = self.calls.lock().unwrap();
        calls.iter().filter(|(of, _)| of == method).map(|(_, body)| body.clone()).collect()
    }
}

type Volumes = Mutex<BTreeMap<String, Value>>;

/// One call, if there is one: its method and its body.
pub(crate) fn receive(stream: &mut impl Read) -> Option<(String, Value)> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or_default() == 0 {
        return None;
    }
    let method = line.split_whitespace().nth(1).unwrap_or_default().trim_start_matches('/').to_owned();
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        let header = header.trim().to_ascii_lowercase();
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if header.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    Some((method, serde_json::from_slice(&body).unwrap_or_default()))
}

pub(crate) fn reply(stream: &mut impl Write, answer: &str) {
    let head =
        "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.plugins.v1.1+json\r\nConnection: close\r\n";
    // Who asked may have gone.
    write!(stream, "{head}Content-Length: {}\r\n\r\n{answer}", answer.len()).ok();
    stream.flush().ok();
}

fn serve(
    stream: &mut (impl Read + Write),
    manner: Manner,
    calls: &Mutex<Vec<(String, Value)>>,
    volumes: &Volumes,
    root: &Path,
) {
    let Some((method, body)) = receive(stream) else { return };
    calls.lock().unwrap().push((method.clone(), body.clone()));
    if manner == Manner::Hangs && method != "Plugin.Activate" {
        std::thread::sleep(Duration::from_mins(2));
        return;
    }
    let answer =
        if manner == Manner::Lies { lie(&method) } else { answer(&method, &body, volumes, root).to_string() };
    reply(stream, &answer);
}

fn answer(method: &str, body: &Value, volumes: &Volumes, root: &Path) -> Value {
    let name = body["Name"].as_str().unwrap_or_default();
    let path = root.join(name);
    let volume = |name: &str, options: &Value| json!({ "Name": name, "Mountpoint": root.join(name), "Status": { "made": options } });
    let mut volumes = volumes.lock().unwrap();
    match method {
        "Plugin.Activate" => json!({ "Implements": ["VolumeDriver"] }),
        "VolumeDriver.Capabilities" => json!({ "Capabilities": { "Scope": "global" } }),
        "VolumeDriver.Create" if body["Opts"]["fail"] == "yes" => json!({ "Err": "the shelf is full" }),
        "VolumeDriver.Create" => {
            fs::create_dir(&path).unwrap();
            volumes.insert(name.to_owned(), body["Opts"].clone());
            json!({ "Err": "" })
        }
        "VolumeDriver.Get" => match volumes.get(name) {
            Some(options) => json!({ "Volume": volume(name, options) }),
            None => json!({ "Err": format!("no volume {name}") }),
        },
        "VolumeDriver.List" => {
            json!({ "Volumes": volumes.iter().map(|(name, options)| volume(name, options)).collect::<Vec<_>>() })
        }
        "VolumeDriver.Remove" => {
            volumes.remove(name);
            fs::remove_dir_all(&path).unwrap();
            json!({})
        }
        "VolumeDriver.Mount" | "VolumeDriver.Path" => json!({ "Mountpoint": path }),
        "VolumeDriver.Unmount" => json!({}),
        other => json!({ "Err": format!("{other} is not implemented") }),
    }
}

fn lie(method: &str) -> String {
    match method {
        "Plugin.Activate" => json!({ "Implements": ["VolumeDriver"] }).to_string(),
        "VolumeDriver.Create" | "VolumeDriver.Remove" | "VolumeDriver.Unmount" => "{}".to_owned(),
        "VolumeDriver.Mount" => json!({ "Mountpoint": "no/such/place" }).to_string(),
        "VolumeDriver.Get" => json!({ "Volume": { "Name": "another", "Mountpoint": "/" } }).to_string(),
        _ => "<html>what?</html>".to_owned(),
    }
}

/// An engine that knows these plugins.
fn host(plugins: &[(&str, &Plugin)]) -> Host {
    let mut builder = Engine::builder().busybox();
    for (name, plugin) in plugins {
        builder = builder.etc(format!("docker/plugins/{name}.spec"), plugin.spec());
    }
    Host { engine: builder.start(), client: Client::Docker }
}

#[test]
fn a_plugins_volumes_are_used_like_the_engines_own() {
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::start(dir.path(), "shelf", Manner::Good);
    let mut host = host(&[("shelf", &plugin)]);
    let drivers = host.cli(["info", "--format", "{{.Plugins.Volume}}"]).ok();
    assert_eq!(drivers, "[local shelf]");

    // Created, seen, refused.
    host.cli(["volume", "create", "-d", "shelf", "-o", "colour=red", "--label", "a=b", "books"]).ok();
    assert_eq!(
        plugin.calls("VolumeDriver.Create"),
        [json!({ "Name": "books", "Opts": { "colour": "red" } })]
    );
    let seen = host.get("/volumes/books");
    assert_eq!(
        (&seen["Driver"], &seen["Scope"], &seen["Labels"]["a"]),
        (&json!("shelf"), &json!("global"), &json!("b"))
    );
    assert_eq!(seen["Mountpoint"], json!(dir.path().join("shelf-volumes/books")));
    assert_eq!(seen["Status"]["made"]["colour"], "red");
    let list = |filter: &str| {
        host.cli(["volume", "ls", "--filter", filter, "--format", "{{.Driver}} {{.Name}}"]).ok()
    };
    assert_eq!(list("driver=shelf"), "shelf books");
    assert_eq!(list("driver=local"), "");
    host.cli(["volume", "create", "-d", "shelf", "-o", "fail=yes", "more"])
        .exits(1)
        .expect_stderr("plugin shelf: VolumeDriver.Create: the shelf is full");
    host.cli(["volume", "inspect", "more"]).exits(1);
    host.cli(["volume", "create", "-d", "local", "books"])
        .exits(1)
        .expect_stderr("already exists with the shelf driver");
    host.cli(["volume", "create", "-d", "nobody", "x1"])
        .exits(1)
        .expect_stderr("plugin \"nobody\" not found");

    // Mounted once for each container, and filled from the image when it is empty.
    let script = "cat /etc/passwd >/dev/null && echo kept >/etc/note && sleep 1000";
    let id = host.background(&["-v", "books:/etc", "--name", "reader"], script);
    let files = dir.path().join("shelf-volumes/books");
    eventually("the container's file in the volume", || fs::read(files.join("note")).ok());
    assert!(files.join("passwd").exists(), "filled from the image");
    let mounts = plugin.calls("VolumeDriver.Mount");
    assert!(mounts.iter().all(|call| *call == json!({ "Name": "books", "ID": id })), "{mounts:?}");
    assert_eq!(mounts.len(), plugin.calls("VolumeDriver.Unmount").len() + 1);
    let mount = &host.inspect("reader")["Mounts"][0];
    assert_eq!((&mount["Driver"], &mount["Source"]), (&json!("shelf"), &json!(files)));
    host.cli(["volume", "rm", "books"]).exits(1).expect_stderr("volume is in use");

    // A container that ends while the daemon is away is unmounted all the same.
    host.engine.kill_daemon();
    let pid = host.engine.sandbox().processes().into_iter().find(|(_, command)| command == "sleep 1000");
    let (pid, _) = pid.expect("the container runs on");
    assert!(host.engine.sandbox().command("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    host.engine.restart_daemon();
    host.wait_state("reader", "exited");
    eventually("an unmount for each mount", || {
        (plugin.calls("VolumeDriver.Unmount").len() == plugin.calls("VolumeDriver.Mount").len()).then_some(())
    });
    // By --mount and --volume-driver, also without a name.
    let mount = "type=volume,src=books,dst=/b,volume-driver=shelf";
    assert_eq!(host.script(&["--mount", mount], "cat /b/note"), "kept");
    host.script(&["--volume-driver", "shelf", "-v", "/anonymous"], "test -d /anonymous");
    host.cli(["rm", "reader"]).ok();
    // Prune is for the engine's own.
    host.cli(["volume", "prune", "-af"]).ok();
    assert_eq!(
        plugin.calls("VolumeDriver.Remove").len(),
        1,
        "the one without a name went with its container"
    );
    host.cli(["volume", "rm", "books"]).ok();
    assert!(!files.exists());
    host.assert_nothing_left();
}

#[test]
fn a_plugin_that_hangs_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::start(dir.path(), "asleep", Manner::Hangs);
    let host = host(&[("asleep", &plugin)]);
    host.cli(["volume", "create", "mine"]).ok();
    let began = Instant::now();
    // It is asked for its volumes, too; the others are shown without waiting for ever.
    let listed = host.cli(["volume", "ls", "-q"]).run().expect_code(0);
    assert_eq!(listed.stdout, "mine\n");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    // Meanwhile nobody else waits.
    let creating = host.cli(["volume", "create", "-d", "asleep", "dreams"]).spawn();
    eventually("the plugin to be asked", || (!plugin.calls("VolumeDriver.Create").is_empty()).then_some(()));
    let began = Instant::now();
    host.script(&["-v", "other:/o"], "true");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    drop(creating);
}

#[test]
fn a_plugin_that_lies_is_quoted() {
    let dir = tempfile::tempdir().unwrap();
    let plugin = Plugin::start(dir.path(), "liar", Manner::Lies);
    let gone = Plugin::start(dir.path(), "gone", Manner::Good);
    fs::remove_file(&gone.socket).unwrap();
    let host = host(&[("liar", &plugin), ("gone", &gone)]);
    host.cli(["volume", "create", "-d", "gone", "x1"])
        .exits(1)
        .expect_stderr("plugin gone: Plugin.Activate: cannot be reached, or does not speak the protocol");
    host.cli(["volume", "create", "-d", "liar", "tale"]).ok();
    let message = host.request("GET", "/volumes/tale").expect(500).message();
    assert!(message.contains("it was asked for volume tale and told of \"another\""), "{message}");
    host.cli(["run", "--rm", "-v", "tale:/t", "busybox", "true"])
        .exits(125)
        .expect_stderr("it says that volume tale is at \"no/such/place\", which is not a directory");
    assert_eq!(plugin.calls("VolumeDriver.Mount").len(), plugin.calls("VolumeDriver.Unmount").len());
    // A list is still one, with a word about the plugin.
    let listed = host.get("/volumes");
    let warning = listed["Warnings"][0].as_str().unwrap();
    assert!(
        warning.contains("plugin liar: VolumeDriver.List: the answer is not what the protocol says"),
        "{warning}"
    );
    assert_eq!(listed["Volumes"][0]["Name"], "tale");
    host.cli(["volume", "rm", "tale"]).ok();
    host.assert_nothing_left();
}

fn server_config(dir: &Path) -> Arc<rustls::ServerConfig> {
    let certificates = |name: &str| {
        CertificateDer::pem_file_iter(dir.join(name)).unwrap().collect::<Result<Vec<_>, _>>().unwrap()
    };
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(certificates("ca.pem"));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(&provider));
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(
            certificates("server-cert.pem"),
            PrivateKeyDer::from_pem_file(dir.join("server-key.pem")).unwrap(),
        );
    Arc::new(config.unwrap())
}

#[test]
fn a_plugin_inside_tls_is_shown_a_certificate_and_has_to_show_one() {
    let dir = tempfile::tempdir().unwrap();
    crate::tls::certificates(dir.path());
    let at = |name: &str| dir.path().join(name);
    let described = |authority: &str, who: &str, more: Value| {
        let mut tls = json!({
            "CAFile": at(authority),
            "CertFile": at(&format!("{who}-cert.pem")),
            "KeyFile": at(&format!("{who}-key.pem")),
        });
        tls.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "Name": "shelf", "Addr": "https://127.0.0.1:7443", "TLSConfig": tls }).to_string()
    };
    let host = Host {
        engine: Engine::builder()
            .busybox()
            .etc("docker/plugins/known.json", described("ca.pem", "client", json!({})))
            .etc("docker/plugins/stranger.json", described("ca.pem", "stranger", json!({})))
            .etc("docker/plugins/doubted.json", described("other-ca.pem", "client", json!({})))
            .etc(
                "docker/plugins/trusting.json",
                described("other-ca.pem", "client", json!({ "InsecureSkipVerify": true })),
            )
            .start(),
        client: Client::Docker,
    };
    let listener = host.sandbox().within_net(|| TcpListener::bind("127.0.0.1:7443").unwrap());
    let plugin = Plugin::start_tls(dir.path(), listener);
    host.cli(["volume", "create", "-d", "known", "books"]).ok();
    assert_eq!(host.get("/volumes/books")["Mountpoint"], json!(at("tls-volumes/books")));
    host.script(&["-v", "books:/b"], "echo kept >/b/note");
    assert_eq!(fs::read_to_string(at("tls-volumes/books/note")).unwrap(), "kept\n");
    let made = plugin.calls("VolumeDriver.Create").len();
    for name in ["stranger", "doubted"] {
        host.cli(["volume", "create", "-d", name, "none"])
            .exits(1)
            .expect_stderr(&format!("plugin {name}: Plugin.Activate: cannot be reached"));
    }
    assert_eq!(plugin.calls("VolumeDriver.Create").len(), made);
    host.cli(["volume", "create", "-d", "trusting", "more"]).ok();
    host.cli(["volume", "rm", "books", "more"]).ok();
    host.assert_nothing_left();
}
