//! The image that is moved: layers of this machine's own trees, in a registry's directory and in an archive.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Result, bail};
use brigantine_testkit::Sandbox;
use serde_json::{Value, json};

use super::{
    super::server::{Make, Server},
    LOADED, SOURCE,
};
use crate::say;

/// What the image is made of: files of this machine's own trees, in order of their names.
const TREES: &[&str] = &["/usr"];
const LAYERS: usize = 6;
/// How many of them, in number and bytes: all of Debian's usual trees but their largest files.
pub const FULL: Limits = Limits { files: 150_000, bytes: 2_360 << 20, disk: 18 << 30 };
/// Enough to see that everything works.
pub const SMALL: Limits = Limits { files: 3_000, bytes: 60 << 20, disk: 2 << 30 };
#[derive(Clone, Copy)]
pub struct Limits {
    files: usize,
    bytes: u64,
    /// What everybody's copies of it take at the most, in bytes.
    pub disk: u64,
}

/// The image in a registry's directory: tags `first`, and `second` with another last layer.
pub struct Fixture {
    pub registry: PathBuf,
    /// The first image as `docker save` writes it, without any compression.
    pub archive: PathBuf,
    pub described: String,
}

impl Fixture {
    pub fn make(work: &Path, limits: Limits) -> Result<Self> {
        let layout = work.join("layout");
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let (files, bytes) = list(work, limits);
        let per_layer = files.len().div_ceil(LAYERS);
        let parts: Vec<&[PathBuf]> = files.chunks(per_layer).collect();
        let layers = layers(work, &blobs, &parts)?;
        let described = format!(
            "{} layers, {} files and directories, {} MB, {} MB in gzip",
            layers.len(),
            files.len(),
            bytes / 1_000_000,
            layers.iter().map(|layer| layer.size).sum::<u64>() / 1_000_000
        );
        let changed = work.join("changed");
        fs::write(&changed, format!("{:?}", Instant::now()))?;
        let last = files.len().saturating_sub(per_layer / 10);
        let mut second: Vec<PathBuf> = files[last..].to_vec();
        second.push(changed.strip_prefix("/")?.to_owned());
        let mut other = layers.clone();
        other.pop();
        other.push(layer(work, &blobs, LAYERS, &second)?);
        let manifests = [manifest(&blobs, &layers, "first")?, manifest(&blobs, &other, "second")?];
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
        let registry = work.join("registry");
        let sandbox = Sandbox::new()?;
        let server = Server::start(Make::Debians, &sandbox, None, &registry, SOURCE)?;
        for tag in ["first", "second"] {
            let mut copy = sandbox.command("skopeo");
            copy.args(["copy", "--insecure-policy", "--dest-tls-verify=false"]);
            copy.arg(format!("oci:{}:{tag}", layout.display()));
            say::read(copy.arg(format!("docker://127.0.0.1:{SOURCE}/many:{tag}")))?;
        }
        drop(server);
        let archive = work.join("first.tar");
        let mut copy = Command::new("skopeo");
        copy.args(["copy", "--insecure-policy"]).arg(format!("oci:{}:first", layout.display()));
        say::read(copy.arg(format!("docker-archive:{}:{LOADED}", archive.display())))?;
        fs::remove_dir_all(&layout)?;
        Ok(Self { registry, archive, described })
    }

    /// Has the archive in memory, for whoever copies it or loads it next.
    pub fn read_archive(&self) -> Result<()> {
        io::copy(&mut File::open(&self.archive)?, &mut io::sink())?;
        Ok(())
    }
}

/// Files and directories below the trees, without the leading slash, and the sum of the files' lengths. What is too
/// much is left out from the largest files on.
fn list(work: &Path, limits: Limits) -> (Vec<PathBuf>, u64) {
    let mut found: Vec<(PathBuf, u64)> = Vec::new();
    let mut waiting: Vec<PathBuf> = TREES.iter().rev().map(PathBuf::from).collect();
    while let Some(path) = waiting.pop() {
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if path.starts_with(work) {
            continue;
        }
        if found.len() == limits.files {
            break;
        }
        if metadata.is_dir() {
            let mut names: Vec<PathBuf> =
                fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            names.sort_unstable_by(|a, b| b.cmp(a));
            waiting.extend(names);
        }
        let Ok(relative) = path.strip_prefix("/") else { continue };
        found.push((relative.to_owned(), if metadata.is_file() { metadata.len() } else { 0 }));
    }
    let mut bytes: u64 = found.iter().map(|(_, length)| length).sum();
    let mut lengths: Vec<u64> = found.iter().map(|(_, length)| *length).collect();
    lengths.sort_unstable();
    let mut most = u64::MAX;
    while bytes > limits.bytes
        && let Some(length) = lengths.pop()
    {
        bytes -= length;
        most = length;
    }
    (found.into_iter().filter(|(_, length)| *length < most).map(|(path, _)| path).collect(), bytes)
}

/// Makes the layers, as many at a time as there are processors.
fn layers(work: &Path, blobs: &Path, parts: &[&[PathBuf]]) -> Result<Vec<Layer>> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(parts.len());
    let make = || -> Result<Vec<(usize, Layer)>> {
        let mut made = Vec::new();
        loop {
            let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(files) = parts.get(n) else { return Ok(made) };
            made.push((n, layer(work, blobs, n, files)?));
        }
    };
    let mut all: Vec<(usize, Layer)> = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let tasks: Vec<_> = (0..threads).map(|_| scope.spawn(make)).collect();
        for task in tasks {
            all.extend(task.join().map_err(|_panic| anyhow::anyhow!("making a layer panicked"))??);
        }
        Ok(())
    })?;
    all.sort_unstable_by_key(|(n, _)| *n);
    Ok(all.into_iter().map(|(_, layer)| layer).collect())
}

#[derive(Clone)]
struct Layer {
    digest: String,
    diff_id: String,
    size: u64,
}

fn layer(work: &Path, blobs: &Path, n: usize, files: &[PathBuf]) -> Result<Layer> {
    let names = work.join(format!("{n}.list"));
    let mut list = File::create(&names)?;
    for file in files {
        list.write_all(file.as_os_str().as_encoded_bytes())?;
        list.write_all(&[0])?;
    }
    let archive = work.join(format!("{n}.tar"));
    let mut tar = Command::new("tar");
    tar.args(["--numeric-owner", "--no-recursion", "--null", "-C", "/", "-cf"])
        .arg(&archive)
        .arg("-T")
        .arg(&names);
    say::read(&mut tar)?;
    let packed = work.join(format!("{n}.tar.gz"));
    let mut gzip = Command::new("gzip");
    gzip.args(["-n", "-c"]).stdin(File::open(&archive)?).stdout(File::create(&packed)?);
    if !gzip.status()?.success() {
        bail!("gzip failed");
    }
    let hash = |path: &Path| -> Result<String> {
        let text = say::read(Command::new("sha256sum").arg(path))?;
        Ok(text.split_ascii_whitespace().next().unwrap_or_default().to_owned())
    };
    let (digest, diff_id) = (hash(&packed)?, hash(&archive)?);
    let size = fs::metadata(&packed)?.len();
    fs::remove_file(&archive)?;
    fs::rename(&packed, blobs.join(&digest))?;
    Ok(Layer { digest, diff_id, size })
}

/// Writes an image's documents; returns what the index says of it.
fn manifest(blobs: &Path, layers: &[Layer], tag: &str) -> Result<Value> {
    let put = |document: &Value| -> Result<(String, usize)> {
        let raw = serde_json::to_vec(document)?;
        let path = blobs.join("part");
        fs::write(&path, &raw)?;
        let digest = say::read(Command::new("sha256sum").arg(&path))?;
        let digest = digest.split_ascii_whitespace().next().unwrap_or_default().to_owned();
        fs::rename(path, blobs.join(&digest))?;
        Ok((format!("sha256:{digest}"), raw.len()))
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", layer.diff_id)).collect();
    let (config, config_size) = put(&json!({
        "architecture": oci_architecture(), "os": "linux", "created": "2026-01-01T00:00:00Z",
        "config": { "Cmd": ["sh"] }, "history": [], "rootfs": { "type": "layers", "diff_ids": diff_ids },
    }))?;
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    let listed: Vec<Value> = layers
        .iter()
        .map(|layer| {
            json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": format!("sha256:{}", layer.digest), "size": layer.size,
            })
        })
        .collect();
    let (digest, size) = put(&json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size },
        "layers": listed,
    }))?;
    Ok(json!({
        "mediaType": MANIFEST, "digest": digest, "size": size,
        "annotations": { "org.opencontainers.image.ref.name": tag },
    }))
}

fn oci_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
