//! Archives with layers too large for memory: they are unpacked while they come, whatever stands where in the archive.

mod common;

use std::path::Path;

use brigantine_image::{Digest, Error, ErrorClass, InUse, Storage, Store, archive};
use common::{Tar, files};
use tempfile::TempDir;

const FORMS: [Storage; 3] = [Storage::Erofs, Storage::Overlay, Storage::Copy];

fn store(storage: Storage) -> (TempDir, Store) {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::open_with(&dir.path().join("image"), Some(storage)).expect("a store");
    (dir, store)
}

fn load(store: &Store, archive: &[u8]) -> Result<Vec<archive::Loaded>, Error> {
    archive::load(store, archive, &mut |_| {})
}

/// What does not compress.
fn noise(length: usize, seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed) << 1 | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// A layer of many files, too large for memory.
fn layer(seed: u32) -> Vec<u8> {
    let tar = Tar::new().dir("d").file(&format!("d/large-{seed}"), &noise(500_000, seed));
    (0..40).fold(tar, |tar, n| tar.file(&format!("d/{seed}-{n}"), &noise(700, n))).done()
}

/// Documents of an image with these members as layers.
fn documents(tag: &str, diff_ids: &[Digest], members: &[String]) -> Vec<(String, Vec<u8>)> {
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["sh"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = serde_json::to_vec(&config).expect("JSON");
    let name = format!("{}.json", Digest::sha256(&config).hex());
    let manifest = serde_json::json!([{ "Config": name, "RepoTags": [tag], "Layers": members }]);
    vec![(name, config), ("manifest.json".to_owned(), serde_json::to_vec(&manifest).expect("JSON"))]
}

fn tar(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    members.iter().fold(Tar::new(), |tar, (name, data)| tar.file(name, data)).done()
}

/// Names of what is under way, or was left behind.
fn left(store: &Store) -> usize {
    files(&store.root().join("tmp")) + files(&store.root().join("leases"))
}

fn layers(root: &Path) -> usize {
    files(&root.join("layers"))
}

#[test]
fn layers_are_unpacked_in_any_order_and_from_every_form() {
    let plain = [layer(1), layer(2), layer(3)];
    let diff_ids: Vec<Digest> = plain.iter().map(|layer| Digest::sha256(layer)).collect();
    let packed: Vec<Vec<Vec<u8>>> = plain.iter().map(|layer| common::compressed(layer)).collect();
    for storage in FORMS {
        for form in [None, Some(0), Some(2), Some(3)] {
            let of = |n: usize| form.map_or_else(|| plain[n].clone(), |form: usize| packed[n][form].clone());
            let mut members: Vec<(String, Vec<u8>)> =
                (0..plain.len()).map(|n| (format!("{n}/layer.tar"), of(n))).collect();
            let names: Vec<String> = members.iter().map(|(name, _)| name.clone()).collect();
            members.extend(documents("x:1", &diff_ids, &names));
            for reversed in [false, true].into_iter().take(if form.is_none() { 2 } else { 1 }) {
                let about = format!("{storage}, form {form:?}, the manifest first: {reversed}");
                let (_dir, store) = store(storage);
                if reversed {
                    members.reverse();
                }
                load(&store, &tar(&members)).unwrap();
                let image = store.resolve("x:1").unwrap();
                assert_eq!(image.config.rootfs.diff_ids, diff_ids, "{about}");
                assert_eq!(left(&store), 0, "{about}");
                store.ensure_unpacked(&image).unwrap();
                let opened: Vec<_> =
                    store.layer_files(&image).unwrap().iter().map(|files| files.open().unwrap()).collect();
                for seed in 1..=3_u32 {
                    let path = format!("d/large-{seed}");
                    let found = opened.iter().find_map(|lower| std::fs::read(lower.path().join(&path)).ok());
                    assert!(found == Some(noise(500_000, seed)), "{about}: {path}");
                }
                assert_eq!(store.check(false, &InUse::default()).unwrap().problems, [], "{about}");
            }
        }
    }
}

#[test]
fn what_no_image_has_is_left_alone() {
    let wanted = layer(1);
    let climbs = Tar::new().file("../climbs", &noise(400_000, 9)).done();
    let mut cut = common::compressed(&noise(600_000, 8)).swap_remove(0);
    cut.truncate(400_000);
    for storage in FORMS {
        let (_dir, store) = store(storage);
        let mut members = vec![
            ("climbs.tar".to_owned(), climbs.clone()),
            ("cut.gz".to_owned(), cut.clone()),
            ("other.tar".to_owned(), layer(5)),
            ("same.tar".to_owned(), wanted.clone()),
            ("layer.tar".to_owned(), wanted.clone()),
            ("noise".to_owned(), noise(400_000, 7)),
        ];
        members.extend(documents("x:1", &[Digest::sha256(&wanted)], &["layer.tar".to_owned()]));
        load(&store, &tar(&members)).unwrap();
        assert_eq!((left(&store), layers(store.root())), (0, 1), "{storage}");
        assert_eq!(store.content().walk().unwrap().len(), 3, "{storage}: layer, configuration, manifest");
    }
}

#[test]
fn a_layer_that_is_none_fails_the_load_and_leaves_nothing() {
    let good = layer(1);
    let climbs = Tar::new().file("a", &noise(400_000, 1)).file("../climbs", b"x").done();
    let other = layer(4);
    let mut cut = common::compressed(&other).swap_remove(0);
    cut.truncate(cut.len() / 2);
    let cases: [(Vec<u8>, Digest, &str); 4] = [
        (climbs.clone(), Digest::sha256(&climbs), "climbs with"),
        (cut, Digest::sha256(&other), "the gzip data is truncated"),
        (layer(2), Digest::sha256(&other), "not the diff id"),
        (noise(400_000, 3), Digest::sha256(&noise(400_000, 3)), "not a tar header"),
    ];
    for storage in FORMS {
        for (bad, diff_id, reason) in &cases {
            let (_dir, store) = store(storage);
            let mut members = vec![("0.tar".to_owned(), good.clone()), ("1.tar".to_owned(), bad.clone())];
            let diff_ids = [Digest::sha256(&good), diff_id.clone()];
            members.extend(documents("x:1", &diff_ids, &["0.tar".to_owned(), "1.tar".to_owned()]));
            let error = load(&store, &tar(&members)).unwrap_err();
            assert!(error.chain().contains(reason), "{storage}: {:?} should say {reason:?}", error.chain());
            assert_eq!(error.class(), ErrorClass::InvalidParameter, "{storage}: {}", error.chain());
            assert_eq!((left(&store), layers(store.root())), (0, 0), "{storage}: {reason}");
            assert!(store.content().walk().unwrap().is_empty(), "{storage}: {reason}");
        }
    }
}

/// An image layout with an index of images, each a layer for a platform; documents first, or last.
fn layout(images: &[(&str, Vec<u8>)], documents_first: bool) -> Vec<u8> {
    let blob = |raw: Vec<u8>| {
        let digest = Digest::sha256(&raw);
        (
            serde_json::json!({ "digest": digest, "size": raw.len() }),
            (format!("blobs/sha256/{}", digest.hex()), raw),
        )
    };
    let json = |value: &serde_json::Value| serde_json::to_vec(value).expect("JSON");
    let (mut documents, mut layers, mut manifests) = (Vec::new(), Vec::new(), Vec::new());
    for (architecture, layer) in images {
        let mut plain = Vec::new();
        let mut decoded = brigantine_image::decode(&layer[..]).expect("a stream");
        std::io::Read::read_to_end(&mut decoded, &mut plain).expect("a whole layer");
        let (config, raw) = blob(json(&serde_json::json!({
            "architecture": architecture, "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [Digest::sha256(&plain)] },
        })));
        documents.push(raw);
        let (mut described, raw) = blob(layer.clone());
        described["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip".into();
        layers.push(raw);
        let (mut manifest, raw) = blob(json(&serde_json::json!({
            "schemaVersion": 2, "config": config, "layers": [described],
        })));
        documents.push(raw);
        manifest["platform"] = serde_json::json!({ "architecture": architecture, "os": "linux" });
        manifests.push(manifest);
    }
    let (mut index, raw) = blob(json(&serde_json::json!({ "schemaVersion": 2, "manifests": manifests })));
    documents.push(raw);
    index["annotations"] = serde_json::json!({ "io.containerd.image.name": "docker.io/library/many:1" });
    let index = json(&serde_json::json!({ "schemaVersion": 2, "manifests": [index] }));
    documents.push(("index.json".to_owned(), index));
    if documents_first {
        documents.append(&mut layers);
        return tar(&documents);
    }
    layers.append(&mut documents);
    tar(&layers)
}

#[test]
fn one_platform_of_several_is_loaded_and_nothing_is_kept_of_the_others() {
    let packed = |seed| common::compressed(&layer(seed)).swap_remove(0);
    let images = [("s390x", packed(1)), ("riscv64", packed(2)), ("ppc64le", packed(3))];
    for storage in FORMS {
        for documents_first in [true, false] {
            for (n, (architecture, blob)) in images.iter().enumerate() {
                let (_dir, store) = store(storage);
                let archive = layout(&images, documents_first);
                let platform = format!("linux/{architecture}").parse().unwrap();
                archive::load_for(&store, &archive[..], Some(&platform), &mut |_| {}).unwrap();
                let image = store.resolve("many:1").unwrap();
                assert_eq!(image.config.architecture, *architecture);
                assert_eq!(image.layers[0].digest, Digest::sha256(blob), "{storage}, {n}");
                assert_eq!((left(&store), layers(store.root())), (0, 1), "{storage}, {n}");
                assert_eq!(store.content().walk().unwrap().len(), 3, "{storage}, {n}");
            }
            let (_dir, store) = store(storage);
            let platform = "linux/amd64".parse().unwrap();
            // As with an index in a registry: what fits nothing is the first, and then refused.
            let archive = layout(&images, documents_first);
            let error = archive::load_for(&store, &archive[..], Some(&platform), &mut |_| {}).unwrap_err();
            assert!(error.to_string().contains("linux/amd64"), "{error}");
            assert_eq!((left(&store), layers(store.root())), (0, 0), "{storage}");
            assert!(store.content().walk().unwrap().is_empty(), "{storage}");
        }
    }
}

/// A blob that claims to be a layer which is there already, or comes with the same archive, is looked at all the same:
/// it would be what is saved and pushed as that layer.
#[test]
fn every_blob_has_to_be_the_layer_it_is_said_to_be() {
    let good = layer(1);
    let diff_id = Digest::sha256(&good);
    let [gzip, _, _, zstd] = <[Vec<u8>; 4]>::try_from(common::compressed(&good)).unwrap();
    let foreign = common::compressed(&layer(2)).swap_remove(0);
    let small = common::compressed(&Tar::new().file("small", b"x").done()).swap_remove(0);
    let load_all = |store: &Store, tag: &str, blobs: &[&Vec<u8>]| {
        let mut members: Vec<(String, Vec<u8>)> =
            blobs.iter().enumerate().map(|(n, blob)| (format!("{n}.tar"), (*blob).clone())).collect();
        let names: Vec<String> = members.iter().map(|(name, _)| name.clone()).collect();
        members.extend(documents(tag, &vec![diff_id.clone(); blobs.len()], &names));
        load(store, &tar(&members))
    };
    for storage in FORMS {
        let (_dir, store) = store(storage);
        for (n, bad) in [&foreign, &layer(2), &small].into_iter().enumerate() {
            for blobs in [vec![&good, bad], vec![bad, &good], vec![&gzip, bad], vec![bad]] {
                let error = load_all(&store, "x:bad", &blobs).unwrap_err();
                assert!(error.chain().contains("not the diff id"), "{storage}, {n}: {}", error.chain());
                assert_eq!(left(&store), 0, "{storage}, {n}");
            }
            // From the second on with the layer there.
            load_all(&store, "x:1", &[&good, &gzip, &zstd, &gzip]).unwrap();
            load_all(&store, "x:2", &[&gzip]).unwrap();
        }
        assert_eq!(store.list().unwrap().len(), 2, "{storage}");
        assert_eq!(layers(store.root()), 1, "{storage}");
    }
}

#[test]
fn an_archive_that_breaks_off_leaves_nothing() {
    let layers_of_it = [layer(1), common::compressed(&layer(2)).swap_remove(3)];
    let members: Vec<(String, Vec<u8>)> =
        layers_of_it.iter().enumerate().map(|(n, layer)| (format!("{n}.tar"), layer.clone())).collect();
    let whole = tar(&members);
    let named = format!("blobs/sha256/{}", "0".repeat(64));
    let corrupt = tar(&[(named, layer(1))]);
    for storage in FORMS {
        let (_dir, store) = store(storage);
        for cut in [300_000, layers_of_it[0].len() + 100_000, whole.len() - 5000] {
            let error = load(&store, &whole[..cut]).unwrap_err();
            assert!(error.chain().contains("ends early"), "{storage}, {cut}: {}", error.chain());
            assert_eq!((left(&store), layers(store.root())), (0, 0), "{storage}, {cut}");
        }
        let error = load(&store, &corrupt).unwrap_err();
        assert!(error.chain().contains("is corrupt"), "{storage}: {}", error.chain());
        assert_eq!((left(&store), layers(store.root())), (0, 0), "{storage}");
    }
}

const CHILD: &str = "BRIGANTINE_TEST_WITHOUT_MKNOD";

/// Run as a child process only: root that may not make device nodes.
#[test]
#[ignore = "the child of the test below"]
fn without_mknod() {
    let Some(_) = std::env::var_os(CHILD) else { return };
    let mut nodes = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Char);
    header.set_device_major(1).unwrap();
    header.set_device_minor(1).unwrap();
    header.set_size(0);
    nodes.append_data(&mut header, "nodes/mem", &b""[..]).unwrap();
    let image = common::docker_archive(&["x:1"], &[nodes.into_inner().unwrap()]);
    let (_dir, store) = store(Storage::Overlay);
    let error = load(&store, &image).unwrap_err();
    let told = error.chain();
    assert!(told.contains("mknod \"nodes/mem\"") && told.contains("Operation not permitted"), "{told}");
    assert_eq!((left(&store), layers(store.root())), (0, 0));
    assert!(store.list().unwrap().is_empty() && store.content().walk().unwrap().is_empty());
}

#[test]
fn a_device_node_that_may_not_be_made_fails_the_load_by_its_name() {
    let output = std::process::Command::new("setpriv")
        .args(["--bounding-set=-mknod", "--inh-caps=-mknod", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "without_mknod"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}
