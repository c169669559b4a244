//! What the registry tests share: a real registry, lying servers, and images to move about.

#![allow(dead_code, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use brigantine_image::model::Descriptor;
use brigantine_image::{Digest, Image, NewImage, Platform, Reference, Store, media};
use brigantine_registry::{Client, Config, Credentials, Progress, PushOptions, Report};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Debian's registry on a port of its own.
pub struct RealRegistry {
    child: Child,
    pub address: String,
    pub dir: tempfile::TempDir,
}

impl RealRegistry {
    /// `None` where the package is not installed.
    pub fn start(htpasswd: Option<&str>) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let auth = htpasswd.map_or(String::new(), |line| {
            let path = dir.path().join("htpasswd");
            std::fs::write(&path, format!("{line}\n")).unwrap();
            format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", path.display())
        });
        let config = dir.path().join("config.yml");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n{auth}",
                dir.path().join("data").display()
            ),
        )
        .unwrap();
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let rest = line.split("listening on ").nth(1)?;
            let end =
                rest.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | ':'))).unwrap_or(rest.len());
            Some(rest[..end].to_owned())
        });
        std::thread::spawn(move || lines.for_each(drop));
        Some(Self { child, address: address.expect("the registry said where it listens"), dir })
    }
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A server whose answers the test writes: one per request, given its head.
pub struct LyingServer {
    pub address: String,
    pub heads: Arc<Mutex<Vec<String>>>,
}

pub enum Answer {
    /// Head and body, as they are.
    Raw(Vec<u8>),
    /// Those bytes, and then silence.
    Stall(Vec<u8>),
}

impl LyingServer {
    pub async fn start(answer: impl Fn(&str, usize) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let answer = Arc::new(answer);
        tokio::spawn({
            let heads = Arc::clone(&heads);
            async move {
                while let Ok((io, _)) = listener.accept().await {
                    tokio::spawn(serve(io, Arc::clone(&heads), Arc::clone(&answer)));
                }
            }
        });
        Self { address, heads }
    }

    pub fn requests(&self, what: &str) -> Vec<String> {
        self.heads.lock().unwrap().iter().filter(|head| head.starts_with(what)).cloned().collect()
    }
}

async fn serve(
    mut io: TcpStream,
    heads: Arc<Mutex<Vec<String>>>,
    answer: Arc<impl Fn(&str, usize) -> Answer>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match io.read(&mut byte).await {
            Ok(1) => head.push(byte[0]),
            _ => return,
        }
        // A TLS client hello: no HTTP here for that.
        if head[0] == 0x16 {
            return;
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let number = {
        let mut heads = heads.lock().unwrap();
        let line = head.lines().next().unwrap().to_owned();
        heads.push(head.clone());
        heads.iter().filter(|head| head.starts_with(&line)).count()
    };
    let (bytes, stall) = match answer(&head, number) {
        Answer::Raw(bytes) => (bytes, false),
        Answer::Stall(bytes) => (bytes, true),
    };
    if io.write_all(&bytes).await.is_ok() {
        if stall {
            tokio::time::sleep(std::time::Duration::from_mins(10)).await;
        }
        drop(io.shutdown().await);
    }
}

/// An answer with a right Content-Length.
pub fn reply(status: &str, headers: &str, body: &[u8]) -> Answer {
    let mut bytes =
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len())
            .into_bytes();
    bytes.extend_from_slice(body);
    Answer::Raw(bytes)
}

/// An image as its documents and blobs.
pub struct Sample {
    pub layer: Vec<u8>,
    pub config: Vec<u8>,
    pub manifest: Vec<u8>,
    pub diff_id: Digest,
}

impl Sample {
    /// One layer with one incompressible file, so that the blob is about `size` bytes.
    pub fn new(size: usize) -> Self {
        let mut state = 0x2545_F491_4F6C_DD1D_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .take(size)
        .collect();
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(noise.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, "etc/noise", noise.as_slice()).unwrap();
        let archive = tar.into_inner().unwrap();
        let diff_id = Digest::sha256(&archive);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&archive).unwrap();
        let layer = gzip.finish().unwrap();
        let host = Platform::host();
        let config = serde_json::to_vec(&json!({
            "architecture": host.architecture, "os": "linux", "config": {"Cmd": ["/x"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id.to_string()]},
        }))
        .unwrap();
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": media::OCI_MANIFEST,
            "config": {"mediaType": media::OCI_CONFIG, "digest": Digest::sha256(&config).to_string(), "size": config.len()},
            "layers": [{"mediaType": media::OCI_LAYER_GZIP, "digest": Digest::sha256(&layer).to_string(), "size": layer.len()}],
        }))
        .unwrap();
        Self { layer, config, manifest, diff_id }
    }

    /// The same with its layer not compressed.
    pub fn plain(mut self) -> Self {
        let mut archive = Vec::new();
        flate2::read::GzDecoder::new(&self.layer[..]).read_to_end(&mut archive).unwrap();
        let mut manifest: serde_json::Value = serde_json::from_slice(&self.manifest).unwrap();
        manifest["layers"][0] = json!({
            "mediaType": media::OCI_LAYER, "digest": self.diff_id.to_string(), "size": archive.len(),
        });
        self.manifest = serde_json::to_vec(&manifest).unwrap();
        self.layer = archive;
        self
    }

    pub fn store_in(&self, store: &Store, name: &str) -> Image {
        let lease = store.lease().unwrap();
        store.content().put(&lease, &self.layer).unwrap();
        store.content().put(&lease, &self.config).unwrap();
        let digest = store.content().put(&lease, &self.manifest).unwrap();
        let manifest = Descriptor::new(media::OCI_MANIFEST, digest, self.manifest.len() as u64);
        let names = vec![Reference::parse(name).unwrap()];
        store.add_image(&lease, NewImage { manifest, names, parent: None, index: None }).unwrap()
    }

    /// What an honest registry answers.
    pub fn honest(&self, head: &str) -> Option<Answer> {
        let path = head.split(' ').nth(1).unwrap();
        if path == "/v2/" {
            return Some(reply("200 OK", "", b"{}"));
        }
        if path.contains("/manifests/") {
            return Some(reply(
                "200 OK",
                &format!("Content-Type: {}\r\n", media::OCI_MANIFEST),
                &self.manifest,
            ));
        }
        if path.ends_with(Digest::sha256(&self.config).as_str()) {
            return Some(reply("200 OK", "", &self.config));
        }
        None
    }

    pub fn is_layer(&self, head: &str) -> bool {
        head.split(' ').nth(1).unwrap().ends_with(Digest::sha256(&self.layer).as_str())
    }
}

pub fn store(dir: &Path) -> Store {
    Store::open(&dir.join("image")).unwrap()
}

pub fn client() -> Client {
    Client::new(Config {
        stall: std::time::Duration::from_millis(500),
        back_off: std::time::Duration::from_millis(10),
        attempts: 3,
        ..Config::default()
    })
}

/// For registries that do as they should, on a machine that may be busy.
pub fn patient() -> Client {
    Client::new(Config { back_off: std::time::Duration::from_millis(10), ..Config::default() })
}

/// Options of a push with these credentials.
pub fn pushing(credentials: Option<Credentials>) -> PushOptions {
    PushOptions { credentials, ..PushOptions::default() }
}

pub fn password(username: &str, password: &str) -> Option<Credentials> {
    Some(Credentials::Password { username: username.to_owned(), password: password.to_owned() })
}

/// Collects reports.
pub fn report() -> (Report, Arc<Mutex<Vec<Progress>>>) {
    let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let kept = Arc::clone(&seen);
    (Arc::new(move |progress| kept.lock().unwrap().push(progress)), seen)
}

pub fn silent() -> Report {
    Arc::new(|_| {})
}

/// A registry of ours, in this process; it stops when this is dropped.
pub struct OwnRegistry {
    pub address: String,
    pub metrics: Option<String>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    running: tokio::task::JoinHandle<()>,
}

impl OwnRegistry {
    pub async fn start(options: brigantine_registry::server::Options) -> Self {
        let server = brigantine_registry::server::Server::bind(options).await.unwrap();
        let address = server.addresses().unwrap()[0].to_string();
        let metrics = server.metrics_address().map(|address| address.to_string());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn(server.run(async move {
            stopped.await.unwrap_or_default();
        }));
        Self { address, metrics, stop: Some(stop), running }
    }

    /// With its storage below `root` and everything else at its default.
    pub async fn at(root: &Path) -> Self {
        Self::start(own_options(root)).await
    }

    /// Tells it to stop; what it is doing may end.
    pub fn tell_to_stop(&mut self) {
        drop(self.stop.take());
    }

    /// Stops it and waits until it is gone.
    pub async fn stop(mut self) {
        self.tell_to_stop();
        tokio::time::timeout(std::time::Duration::from_mins(1), self.running).await.unwrap().unwrap();
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/v2/{path}", self.address)
    }
}

pub fn own_options(root: &Path) -> brigantine_registry::server::Options {
    use brigantine_registry::server::{Options, Source};
    Options::new("127.0.0.1:0", Source::Storage(root.to_owned()))
}

/// A plain HTTP client.
pub fn http() -> reqwest::Client {
    rustls::crypto::ring::default_provider().install_default().ok();
    reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy().build().unwrap()
}

impl Sample {
    /// Pushes the image by hand.
    pub async fn push_to(&self, registry: &OwnRegistry, repository: &str, tag: &str) {
        for blob in [&self.layer, &self.config] {
            let answer = http()
                .post(registry.url(&format!("{repository}/blobs/uploads/?digest={}", Digest::sha256(blob))))
                .body(blob.clone())
                .send()
                .await
                .unwrap();
            assert_eq!(answer.status(), 201, "{}", answer.text().await.unwrap());
        }
        let answer = http()
            .put(registry.url(&format!("{repository}/manifests/{tag}")))
            .header("content-type", media::OCI_MANIFEST)
            .body(self.manifest.clone())
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), 201, "{}", answer.text().await.unwrap());
    }
}
