//! Images to test with, made here from Debian's packages: no registry is needed.
//!
//! Each is made once per machine and kept under `target/fixtures/`; parallel tests wait for each other on a lock file.
//! What tests need broken is made from parts by [`Archive`].

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// The workspace's target directory.
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new(".")).join("target")
        }
    }
}

/// `busybox:latest` as a docker-archive: Debian's busybox-static and a few files in `/etc`.
#[track_caller]
pub fn busybox() -> PathBuf {
    must(cached("busybox-2", |to| {
        let layer = busybox_layer()?;
        let image = Archive::new("busybox:latest").layer(layer).cmd(&["sh"]);
        fs::write(to, image.bytes()).map_err(Into::into)
    }))
}

/// `debian:bookworm` as a docker-archive: a minimal Debian 12 made by mmdebstrap from the signed packages.
#[track_caller]
pub fn debian() -> PathBuf {
    must(debian_bookworm())
}

/// Like [`debian`], for those who want the error.
pub fn debian_bookworm() -> Result<PathBuf> {
    cached("debian-bookworm-2", |to| {
        let root = to.with_extension("root.tar");
        let status = Command::new("mmdebstrap")
            .args(["--quiet", "--variant=minbase", "--mode=root"])
            .args(
                ["doc", "man", "info", "locale"].map(|d| format!("--dpkgopt=path-exclude=/usr/share/{d}/*")),
            )
            .args(["--aptopt=Apt::Install-Recommends \"false\"", "bookworm"])
            .arg(&root)
            .status()
            .context("mmdebstrap (Debian package of that name)")?;
        if !status.success() {
            bail!("mmdebstrap could not make a Debian root file system: {status}");
        }
        let layer = fs::read(&root)?;
        fs::remove_file(&root)?;
        fs::write(to, Archive::new("debian:bookworm").layer(layer).cmd(&["bash"]).bytes())?;
        Ok(())
    })
}

/// A repository of Debian packages as a tar archive: gcc, make and all they need, for `deb [trusted=yes] copy:DIR ./`.
/// They come from where this machine's own packages come from, as those of [`debian`] do.
#[track_caller]
pub fn repository() -> PathBuf {
    must(cached("repository-1", |to| {
        let dir = to.with_extension("packages");
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(dir.join("partial"))?;
        // As on a machine that has nothing: all they need is fetched.
        let status = dir.join("status");
        fs::write(&status, "")?;
        let option = |name: &str, value: &Path| format!("-o{name}={}", value.display());
        let run = |command: &mut Command| -> Result<Vec<u8>> {
            let output = command.output().with_context(|| format!("{command:?}"))?;
            if !output.status.success() {
                bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
            }
            Ok(output.stdout)
        };
        run(Command::new("apt-get")
            .args([option("Dir::State::status", &status), option("Dir::Cache::archives", &dir)])
            .args(["-oDebug::NoLocking=1", "-oAPT::Sandbox::User=root", "-y", "--no-install-recommends"])
            .args(["--download-only", "install", "gcc", "libc6-dev", "make"]))?;
        for left in ["status", "lock"] {
            fs::remove_file(dir.join(left))
                .or_else(|e| if dir.join(left).exists() { Err(e) } else { Ok(()) })?;
        }
        fs::remove_dir_all(dir.join("partial"))?;
        let index = run(Command::new("dpkg-scanpackages").args(["--multiversion", "."]).current_dir(&dir))?;
        fs::write(dir.join("Packages"), index)?;
        run(Command::new("tar").arg("-cf").arg(to).arg("-C").arg(&dir).arg("."))?;
        fs::remove_dir_all(&dir)?;
        Ok(())
    }))
}

/// The archive of the given name, made by `make` if nobody did so yet.
fn cached(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let dir = target_dir().join("fixtures");
    fs::create_dir_all(&dir)?;
    let done = dir.join(format!("{name}.tar"));
    if done.exists() {
        return Ok(done);
    }
    let lock = File::create(dir.join(format!("{name}.lock")))?;
    lock.lock()?;
    if !done.exists() {
        let part = dir.join(format!("{name}.part"));
        make(&part).with_context(|| format!("making the test image {name}"))?;
        fs::rename(&part, &done)?;
    }
    Ok(done)
}

#[track_caller]
fn must<T>(made: Result<T>) -> T {
    match made {
        Ok(made) => made,
        Err(e) => panic!("{e:#}"),
    }
}

/// `tools:latest` as a docker-archive: busybox, and real programs of Debian's that test networks, with their libraries.
#[track_caller]
pub fn tools() -> PathBuf {
    must(cached("tools-1", |to| {
        let programs = programs_layer(&["/usr/bin/dig", "/usr/bin/curl", "/usr/bin/iperf3"])?;
        let image = Archive::new("tools:latest").layer(busybox_layer()?).layer(programs).cmd(&["sh"]);
        fs::write(to, image.bytes()).map_err(Into::into)
    }))
}

/// `agent:latest` as a docker-archive: busybox and `ssh-add`.
#[track_caller]
pub fn agent() -> PathBuf {
    must(cached("agent-1", |to| {
        let programs = programs_layer(&["/usr/bin/ssh-add"])?;
        let image = Archive::new("agent:latest").layer(busybox_layer()?).layer(programs).cmd(&["sh"]);
        fs::write(to, image.bytes()).map_err(Into::into)
    }))
}

/// `load:latest`: busybox, and programs that make load and take it; nginx answers on port 80 when started as
/// `nginx -c /etc/nginx.conf`.
pub fn load_programs() -> Result<PathBuf> {
    const NGINX: &str = "user root; daemon off; worker_processes 1; error_log /dev/null; pid /tmp/nginx.pid;\n\
        events { worker_connections 4096; }\n\
        http { access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f;\n\
        uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s; server { listen 80; location / { return 200 hello; } } }\n";
    cached("load-1", |to| {
        let programs = programs_layer(&["/usr/bin/iperf3", "/usr/bin/wrk", "/usr/sbin/nginx"])?;
        let mut settings = Layer::default();
        settings.file("etc/nginx.conf", 0o644, NGINX.as_bytes());
        settings
            .dir("var/log", 0o755)
            .dir("var/log/nginx", 0o755)
            .dir("var/lib", 0o755)
            .dir("var/lib/nginx", 0o755);
        let image =
            Archive::new("load:latest").layer(busybox_layer()?).layer(programs).layer(settings.finish());
        fs::write(to, image.cmd(&["sh"]).bytes()).map_err(Into::into)
    })
}

/// Programs of this machine's with all libraries that they load.
fn programs_layer(programs: &[&str]) -> Result<Vec<u8>> {
    let mut layer = Layer::default();
    for dir in ["lib", "lib64", "usr/share"] {
        layer.dir(dir, 0o755);
    }
    let mut files = std::collections::BTreeSet::new();
    for program in programs {
        let listed = Command::new("ldd").arg(program).output()?;
        if !listed.status.success() {
            bail!("{program} is not there: its Debian package is needed");
        }
        files.insert((*program).to_owned());
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        files.extend(listed.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned));
    }
    for file in files {
        // The loader has a place of its own, programs theirs, and libraries one that is searched.
        let name = Path::new(&file).file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let at = match file.strip_prefix('/') {
            Some(path) if programs.contains(&file.as_str()) || path.starts_with("lib64/") => path.to_owned(),
            _ => format!("lib/{name}"),
        };
        layer.file(&at, 0o755, &fs::read(&file)?);
    }
    Ok(layer.finish())
}

/// The root file system of the busybox image as an uncompressed tar.
pub fn busybox_layer() -> Result<Vec<u8>> {
    let program = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| Path::new(p).exists());
    let program = program.context("no busybox: apt-get install busybox-static")?;
    let applets = Command::new(program).arg("--list").output()?;
    let mut bytes = Vec::new();
    File::open(program)?.read_to_end(&mut bytes)?;
    if bytes.windows(14).any(|w| w == b"/lib64/ld-linu") {
        bail!("{program} is linked dynamically: apt-get install busybox-static");
    }
    let mut layer = Layer::default();
    for dir in
        ["bin", "dev", "etc", "home", "proc", "root", "sys", "usr", "usr/bin", "usr/sbin", "var", "sbin"]
    {
        layer.dir(dir, 0o755);
    }
    layer.dir("tmp", 0o1777);
    layer.file("bin/busybox", 0o755, &bytes);
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|a| *a != "busybox") {
        layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    layer.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nguest:x:1000:1000:guest:/home:/bin/sh\n",
    );
    layer.file("etc/group", 0o644, b"root:x:0:\nguest:x:1000:\nwheel:x:10:guest\n");
    layer.file("etc/os-release", 0o644, b"ID=busybox\n");
    Ok(layer.finish())
}

/// An uncompressed layer, file by file; takes names as they are, also bad ones.
#[derive(Default)]
pub struct Layer {
    tar: Option<tar::Builder<Vec<u8>>>,
}

impl Layer {
    fn entry(&mut self, name: &str, kind: tar::EntryType, mode: u32, link: Option<&str>, data: &[u8]) {
        let mut header = tar::Header::new_gnu();
        self.entry_of(&mut header, name, kind, mode, link, data);
    }

    /// With what the header says already.
    fn entry_of(
        &mut self,
        header: &mut tar::Header,
        name: &str,
        kind: tar::EntryType,
        mode: u32,
        link: Option<&str>,
        data: &[u8],
    ) {
        // Written by hand, because the library refuses the very names that an engine has to refuse.
        header.as_gnu_mut().expect("a GNU header").name[..name.len()].copy_from_slice(name.as_bytes());
        if let Some(link) = link {
            header.as_gnu_mut().expect("a GNU header").linkname[..link.len()]
                .copy_from_slice(link.as_bytes());
        }
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(data.len() as u64);
        header.set_mtime(1_700_000_000);
        header.set_uid(0);
        header.set_gid(0);
        header.set_cksum();
        self.tar
            .get_or_insert_with(|| tar::Builder::new(Vec::new()))
            .append(header, data)
            .expect("to memory");
    }

    pub fn dir(&mut self, name: &str, mode: u32) -> &mut Self {
        self.entry(&format!("{name}/"), tar::EntryType::Directory, mode, None, b"");
        self
    }

    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> &mut Self {
        self.entry(name, tar::EntryType::Regular, mode, None, data);
        self
    }

    pub fn symlink(&mut self, name: &str, to: &str) -> &mut Self {
        self.entry(name, tar::EntryType::Symlink, 0o777, Some(to), b"");
        self
    }

    pub fn hardlink(&mut self, name: &str, to: &str) -> &mut Self {
        self.entry(name, tar::EntryType::Link, 0o644, Some(to), b"");
        self
    }

    /// A character device's node.
    pub fn device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> &mut Self {
        let mut header = tar::Header::new_gnu();
        header.set_device_major(major).and_then(|()| header.set_device_minor(minor)).expect("a GNU header");
        self.entry_of(&mut header, name, tar::EntryType::Char, mode, None, b"");
        self
    }

    /// The tar.
    pub fn finish(&mut self) -> Vec<u8> {
        self.tar.take().unwrap_or_else(|| tar::Builder::new(Vec::new())).into_inner().expect("to memory")
    }
}

/// A docker-archive image, put together from parts.
#[derive(Clone, Debug)]
#[must_use]
pub struct Archive {
    reference: String,
    layers: Vec<Vec<u8>>,
    /// What the config says instead of the layers' true digests.
    diff_ids: Option<Vec<String>>,
    architecture: String,
    config: Value,
}

impl Archive {
    pub fn new(reference: &str) -> Self {
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        Self {
            reference: reference.to_owned(),
            layers: Vec::new(),
            diff_ids: None,
            architecture: if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }.to_owned(),
            config: json!({ "Env": [path] }),
        }
    }

    pub fn layer(mut self, tar: Vec<u8>) -> Self {
        self.layers.push(tar);
        self
    }

    pub fn cmd(self, argv: &[&str]) -> Self {
        self.set("Cmd", json!(argv))
    }

    /// One field of the image's config.
    pub fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    pub fn architecture(mut self, name: &str) -> Self {
        name.clone_into(&mut self.architecture);
        self
    }

    /// Lies about the layers' digests.
    pub fn diff_ids(mut self, ids: &[&str]) -> Self {
        self.diff_ids = Some(ids.iter().map(|&id| id.to_owned()).collect());
        self
    }

    /// The config blob, whose digest is the image's id.
    pub fn config_bytes(&self) -> Vec<u8> {
        let true_ids = || self.layers.iter().map(|l| format!("sha256:{}", digest(l))).collect();
        let diff_ids: Vec<String> = self.diff_ids.clone().unwrap_or_else(true_ids);
        let history: Vec<_> = diff_ids.iter().map(|_| json!({ "created_by": "testkit" })).collect();
        json!({
            "architecture": self.architecture,
            "os": "linux",
            "created": "2024-01-02T03:04:05Z",
            "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": history,
        })
        .to_string()
        .into_bytes()
    }

    /// `sha256:…`
    pub fn id(&self) -> String {
        format!("sha256:{}", digest(&self.config_bytes()))
    }

    /// The archive.
    pub fn bytes(&self) -> Vec<u8> {
        let config = self.config_bytes();
        let config_name = format!("{}.json", digest(&config));
        let mut archive = Layer::default();
        archive.file(&config_name, 0o644, &config);
        let mut names = Vec::new();
        for layer in &self.layers {
            let dir = digest(layer);
            names.push(format!("{dir}/layer.tar"));
            archive.dir(&dir, 0o755).file(&format!("{dir}/layer.tar"), 0o644, layer);
        }
        let manifest = json!([{ "Config": config_name, "RepoTags": [self.reference], "Layers": names }]);
        archive.file("manifest.json", 0o644, manifest.to_string().as_bytes());
        archive.finish()
    }

    /// Writes the archive as a file of this name into `dir`.
    #[track_caller]
    pub fn write(&self, dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        File::create(&path).and_then(|mut f| f.write_all(&self.bytes())).expect("writing an archive");
        path
    }
}

/// A program that is a script, for tests of what the kernel refuses.
#[track_caller]
pub fn script(path: &Path, text: &str) {
    fs::write(path, text).expect("writing a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("chmod");
}

/// SHA-256 in hexadecimal.
pub fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_names_what_is_in_it() {
        let image = Archive::new("a:b").layer(Layer::default().file("../x", 0o644, b"1").finish());
        let mut seen = Vec::new();
        for entry in tar::Archive::new(&image.bytes()[..]).entries().unwrap() {
            seen.push(entry.unwrap().path().unwrap().display().to_string());
        }
        assert!(seen.contains(&"manifest.json".to_owned()));
        assert!(seen.contains(&format!("{}.json", image.id().trim_start_matches("sha256:"))));
    }
}
