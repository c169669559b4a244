//! Archives and layouts exchanged with other programs: skopeo and umoci read what we write and the reverse, and
//! every id stays what it was.

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use brigantine_image::bootstrap::{BootstrapConfig, image_from_rootfs_tar};
use brigantine_image::{Digest, Image, Store, archive};
use common::{listing, run, store};

fn skopeo(args: &[&str]) -> String {
    run(Command::new("skopeo").arg("--insecure-policy").args(args))
}

fn load(store: &Store, path: &Path) -> Image {
    let loaded =
        archive::load(store, std::io::BufReader::new(File::open(path).expect("an archive")), &mut |_| {})
            .expect("it loads");
    let name = loaded[0].reference.as_ref().expect("a name").to_string();
    store.resolve(&name).expect("the image")
}

fn save(store: &Store, name: &str, path: &Path) {
    archive::save(store, &[name.to_owned()], File::create(path).expect("a file")).expect("it saves");
}

/// A busybox image as `image_from_rootfs_tar` makes it, in a file.
fn busybox(dir: &Path) -> (std::path::PathBuf, Digest) {
    let tree = dir.join("rootfs");
    let script = "mkdir -p $1/bin $1/etc $1/tmp; cp /bin/busybox $1/bin/; ln -s busybox $1/bin/sh; \
                  ln $1/bin/busybox $1/bin/ls; chmod 1777 $1/tmp; echo root:x:0:0::/:/bin/sh > $1/etc/passwd; \
                  chown 12:34 $1/etc/passwd; touch -d '2020-02-02 02:02:02.25 UTC' $1/etc/passwd";
    run(Command::new("sh").args(["-ec", script, "sh"]).arg(&tree));
    let rootfs = dir.join("rootfs.tar");
    let args = ["--sort=name", "--mtime=@1600000000", "--format=posix", "-cf"];
    run(Command::new("tar").args(args).arg(&rootfs).arg("-C").arg(&tree).arg("."));
    let config = BootstrapConfig {
        reference: "busybox:test".parse().expect("a reference"),
        architecture: "amd64".into(),
        variant: None,
        created: "2020-01-01T00:00:00Z".into(),
        created_by: "test".into(),
        comment: None,
        cmd: vec!["sh".into()],
        env: vec!["PATH=/bin".into()],
        labels: vec![],
    };
    let mut first = Vec::new();
    let made =
        image_from_rootfs_tar(File::open(&rootfs).expect("the tar"), &config, &mut first).expect("an image");
    let mut second = Vec::new();
    let compressed = zstd::encode_all(File::open(&rootfs).expect("the tar"), 1).expect("zstd");
    image_from_rootfs_tar(&compressed[..], &config, &mut second).expect("an image");
    assert!(first == second, "the same input gives the same archive");
    let path = dir.join("busybox.tar");
    fs::write(&path, first).expect("written");
    (path, made.image)
}

#[test]
fn skopeo_reads_what_we_write_and_we_read_what_it_writes() {
    let (dir, store) = store();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (path, id) = busybox(dir.path());
    let image = load(&store, &path);
    assert_eq!(image.id, id);
    assert_eq!(image.tags[0].familiar(), "busybox:test");

    // Ours, as a docker-archive and as an OCI archive.
    save(&store, "busybox:test", &dir.path().join("saved.tar"));
    let raw = skopeo(&["inspect", "--config", "--raw", &format!("docker-archive:{}", at("saved.tar"))]);
    assert_eq!(Digest::sha256(raw.as_bytes()), id);
    let raw = skopeo(&["inspect", "--raw", &format!("oci-archive:{}", at("saved.tar"))]);
    assert_eq!(Digest::sha256(raw.as_bytes()), image.manifest.digest);

    // Through skopeo and back: a layout with gzip layers, and both kinds of archive of it.
    let layout = format!("oci:{}:busybox:test", at("layout"));
    skopeo(&["copy", &format!("docker-archive:{}", at("saved.tar")), &layout]);
    skopeo(&["copy", &layout, &format!("docker-archive:{}:busybox:back", at("back.tar"))]);
    skopeo(&["copy", &layout, &format!("oci-archive:{}:busybox:oci", at("oci.tar"))]);
    let back = load(&store, &dir.path().join("back.tar"));
    assert_eq!(back.config.rootfs, image.config.rootfs);
    let oci = load(&store, &dir.path().join("oci.tar"));
    assert_eq!(oci.tags.last().map(brigantine_image::Reference::familiar), Some("busybox:oci".into()));
    let raw = skopeo(&["inspect", "--raw", &layout]);
    assert_eq!(oci.manifest.digest, Digest::sha256(raw.as_bytes()));
    assert!(oci.layers[0].media_type.ends_with("+gzip"), "{}", oci.layers[0].media_type);

    // Compressed blobs go out as they came.
    save(&store, "busybox:oci", &dir.path().join("gzip.tar"));
    let raw = skopeo(&["inspect", "--config", "--raw", &format!("docker-archive:{}", at("gzip.tar"))]);
    assert_eq!(Digest::sha256(raw.as_bytes()), oci.id);
    skopeo(&["copy", &format!("oci-archive:{}", at("gzip.tar")), &format!("oci:{}:again", at("again"))]);

    // The store's own directory is a layout.
    let raw = skopeo(&["inspect", "--raw", &format!("oci:{}:busybox:oci", store.root().display())]);
    assert_eq!(Digest::sha256(raw.as_bytes()), oci.manifest.digest);
}

#[test]
fn umoci_extracts_the_same_tree() {
    let (dir, store) = store();
    let (path, _) = busybox(dir.path());
    let image = load(&store, &path);
    let layout = dir.path().join("layout");
    skopeo(&["copy", &format!("docker-archive:{}", path.display()), &format!("oci:{}:t", layout.display())]);
    let bundle = dir.path().join("bundle");
    run(Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(format!("{}:t", layout.display()))
        .arg(&bundle));
    let ours = store.layer_files(&image).expect("a layer")[0].open().expect("it mounts");
    assert_eq!(listing(ours.path()), listing(&bundle.join("rootfs")));
}
