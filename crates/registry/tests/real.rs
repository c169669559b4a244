//! Pull and push against Debian's registry.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use brigantine_image::{Digest, Document, Encoding, Reference, Storage, media};
use brigantine_registry::{Class, PullOptions, PushOptions};
use support::{RealRegistry, Sample, password, patient, pushing, report, silent, store};

/// `user:secret`, bcrypt.
const HTPASSWD: &str = "user:$2b$05$Bswvf/muHmh.8SWZMURSE.zTv3sOxuWw1z/4XNAT0nnlrHTH70qsa";

#[tokio::test(flavor = "multi_thread")]
async fn an_image_survives_push_and_pull() {
    let Some(registry) = RealRegistry::start(None) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (store(&dir.path().join("here")), store(&dir.path().join("there")));
    let sample = Sample::new(3 << 20);
    let name = format!("{}/a/b:t", registry.address);
    let image = sample.store_in(&here, &name);
    let reference = Reference::parse(&name).unwrap();

    let (reports, seen) = report();
    let pushed = patient().push(&here, &image, &reference, pushing(None), reports).await.unwrap();
    assert_eq!(pushed.digest, Digest::sha256(&sample.manifest));
    let lines: Vec<String> = seen.lock().unwrap().iter().map(|p| p.status.clone()).collect();
    assert_eq!(lines[0], format!("The push refers to repository [{}/a/b]", registry.address));
    assert!(lines.iter().any(|line| line == "Pushed"));
    assert_eq!(*lines.last().unwrap(), format!("t: digest: {} size: {}", pushed.digest, pushed.size));

    let (reports, seen) = report();
    patient().push(&here, &image, &reference, pushing(None), reports).await.unwrap();
    assert!(seen.lock().unwrap().iter().any(|p| p.status == "Layer already exists"));

    // Another repository of the same registry takes the layer without an upload.
    let sister = Reference::parse(&format!("{}/c:t", registry.address)).unwrap();
    let (reports, seen) = report();
    patient().push(&here, &here.resolve(&name).unwrap(), &sister, pushing(None), reports).await.unwrap();
    assert!(seen.lock().unwrap().iter().any(|p| p.status == "Mounted from a/b"), "{seen:?}");

    let (reports, seen) = report();
    let pulled = patient().pull(&there, &reference, PullOptions::default(), reports).await.unwrap();
    assert!(pulled.newer);
    assert_eq!(pulled.image.id, image.id);
    assert_eq!(pulled.digest, pushed.digest);
    let lines: Vec<String> = seen.lock().unwrap().iter().map(|p| p.status.clone()).collect();
    for expected in
        ["Pulling from a/b", "Pulling fs layer", "Downloading", "Download complete", "Pull complete"]
    {
        assert!(lines.iter().any(|line| line == expected), "{expected} in {lines:?}");
    }
    assert_eq!(*lines.last().unwrap(), format!("Status: Downloaded newer image for {name}"));
    let lower = there.layer_files(&pulled.image).unwrap()[0].open().unwrap();
    let tree = lower.path();
    assert_eq!(std::fs::metadata(tree.join("etc/noise")).unwrap().len(), 3 << 20);

    let (reports, seen) = report();
    let again = patient().pull(&there, &reference, PullOptions::default(), reports).await.unwrap();
    assert!(!again.newer);
    let lines: Vec<String> = seen.lock().unwrap().iter().map(|p| p.status.clone()).collect();
    assert!(lines.iter().any(|line| line == "Already exists"));
    assert_eq!(*lines.last().unwrap(), format!("Status: Image is up to date for {name}"));

    let by_digest = Reference::parse(&format!("{}/a/b@{}", registry.address, pushed.digest)).unwrap();
    patient().pull(&there, &by_digest, PullOptions::default(), silent()).await.unwrap();
    let resolved = patient().resolve(&reference, None).await.unwrap();
    assert_eq!(resolved.descriptor.digest, pushed.digest);
    assert_eq!(resolved.platforms.len(), 1);
}

/// What is made here is stored plain. Whoever compresses it, at whatever time, gets the same digests.
#[tokio::test(flavor = "multi_thread")]
async fn plain_layers_are_compressed_on_the_way() {
    let Some(registry) = RealRegistry::start(None) else { return };
    let sample = Sample::new(3 << 20).plain();
    let plain = Digest::sha256(&sample.layer);
    for (encoding, media_type) in [
        (Encoding::GZIP, media::OCI_LAYER_GZIP),
        (Encoding::ZSTD, media::OCI_LAYER_ZSTD),
        (Encoding::Plain, media::OCI_LAYER),
    ] {
        let tag = encoding.to_string().replace(':', "-");
        let reference = Reference::parse(&format!("{}/plain:{tag}", registry.address)).unwrap();
        let mut digests = Vec::new();
        for _ in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            let (here, there) = (store(&dir.path().join("here")), store(&dir.path().join("there")));
            let image = sample.store_in(&here, &reference.to_string());
            here.tag(image.id.as_str(), &Reference::parse("another:name").unwrap()).unwrap();
            let options = PushOptions { credentials: None, encoding };
            let pushed = patient().push(&here, &image, &reference, options, silent()).await.unwrap();
            digests.push(pushed.digest.clone());

            let found = patient().resolve(&reference, None).await.unwrap();
            assert_eq!(found.descriptor.digest, pushed.digest);
            let Document::Manifest(manifest) = found.document else { panic!("an index") };
            assert_eq!(manifest.layers[0].media_type, media_type);
            let pulled = patient().pull(&there, &reference, PullOptions::default(), silent()).await.unwrap();
            assert_eq!(pulled.image.id, image.id);
            if encoding == Encoding::Plain && there.storage() == Storage::Erofs {
                let blob = std::fs::metadata(there.content().path(&plain)).unwrap();
                assert_eq!(std::os::unix::fs::MetadataExt::nlink(&blob), 2, "it is the layer's archive, too");
            }

            // Here the image now is what was pushed, under each of its names, and nothing is there twice.
            for name in [reference.to_string(), "another:name".to_owned()] {
                let image = here.resolve(&name).unwrap();
                assert_eq!(image.manifest.digest, pushed.digest);
                assert!(here.content().has(&image.layers[0].digest));
            }
            assert_eq!(here.content().has(&plain), encoding == Encoding::Plain);
            let (reports, seen) = report();
            let image = here.resolve("another:name").unwrap();
            if encoding != Encoding::Plain {
                let again = patient().push(&here, &image, &reference, pushing(None), reports).await.unwrap();
                assert_eq!(again.digest, pushed.digest);
                assert!(seen.lock().unwrap().iter().any(|p| p.status == "Layer already exists"));
            }
            here.ensure_unpacked(&image).unwrap();
        }
        assert_eq!(digests[0], digests[1]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_named() {
    let Some(registry) = RealRegistry::start(None) else { return };
    let dir = tempfile::tempdir().unwrap();
    let name = format!("{}/no/such:thing", registry.address);
    let reference = Reference::parse(&name).unwrap();
    let error =
        patient().pull(&store(dir.path()), &reference, PullOptions::default(), silent()).await.unwrap_err();
    assert_eq!(error.class(), Class::NotFound);
    assert!(
        error.to_string().starts_with(&format!("manifest for {name} not found: manifest unknown: ")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_are_asked_for_and_checked() {
    let Some(registry) = RealRegistry::start(Some(HTPASSWD)) else { return };
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let name = format!("{}/private:1", registry.address);
    let reference = Reference::parse(&name).unwrap();
    let image = Sample::new(1000).store_in(&store, &name);

    let client = patient();
    let login = |user, word| {
        let (client, address) = (client.clone(), registry.address.clone());
        async move { client.login(&address, password(user, word).unwrap()).await }
    };
    login("user", "secret").await.unwrap();
    assert_eq!(login("user", "wrong").await.unwrap_err().class(), Class::Unauthorized);

    let refused = client.push(&store, &image, &reference, pushing(None), silent()).await.unwrap_err();
    assert_eq!(refused.class(), Class::Unauthorized, "{refused}");
    client.push(&store, &image, &reference, pushing(password("user", "secret")), silent()).await.unwrap();

    let anonymous = client.pull(&store, &reference, PullOptions::default(), silent()).await.unwrap_err();
    assert_eq!(anonymous.class(), Class::NotFound);
    assert!(anonymous.to_string().contains("pull access denied for"), "{anonymous}");
    assert!(!format!("{anonymous:?}").contains("secret"));
    let options = PullOptions { credentials: password("user", "secret"), ..PullOptions::default() };
    client.pull(&store, &reference, options, silent()).await.unwrap();
}
