//! Pull and push against Debian's registry.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use brigantine_image::{Digest, Reference};
use brigantine_registry::{Class, PullOptions};
use support::{RealRegistry, Sample, client, password, report, silent, store};

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
    let pushed = client().push(&here, &image, &reference, None, reports).await.unwrap();
    assert_eq!(pushed.digest, Digest::sha256(&sample.manifest));
    let lines: Vec<String> = seen.lock().unwrap().iter().map(|p| p.status.clone()).collect();
    assert_eq!(lines[0], format!("The push refers to repository [{}/a/b]", registry.address));
    assert!(lines.iter().any(|line| line == "Pushed"));
    assert_eq!(*lines.last().unwrap(), format!("t: digest: {} size: {}", pushed.digest, pushed.size));

    let (reports, seen) = report();
    client().push(&here, &image, &reference, None, reports).await.unwrap();
    assert!(seen.lock().unwrap().iter().any(|p| p.status == "Layer already exists"));

    // Another repository of the same registry takes the layer without an upload.
    let sister = Reference::parse(&format!("{}/c:t", registry.address)).unwrap();
    let (reports, seen) = report();
    client().push(&here, &here.resolve(&name).unwrap(), &sister, None, reports).await.unwrap();
    assert!(seen.lock().unwrap().iter().any(|p| p.status == "Mounted from a/b"), "{seen:?}");

    let (reports, seen) = report();
    let pulled = client().pull(&there, &reference, PullOptions::default(), reports).await.unwrap();
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
    let again = client().pull(&there, &reference, PullOptions::default(), reports).await.unwrap();
    assert!(!again.newer);
    let lines: Vec<String> = seen.lock().unwrap().iter().map(|p| p.status.clone()).collect();
    assert!(lines.iter().any(|line| line == "Already exists"));
    assert_eq!(*lines.last().unwrap(), format!("Status: Image is up to date for {name}"));

    let by_digest = Reference::parse(&format!("{}/a/b@{}", registry.address, pushed.digest)).unwrap();
    client().pull(&there, &by_digest, PullOptions::default(), silent()).await.unwrap();
    let resolved = client().resolve(&reference, None).await.unwrap();
    assert_eq!(resolved.descriptor.digest, pushed.digest);
    assert_eq!(resolved.platforms.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_named() {
    let Some(registry) = RealRegistry::start(None) else { return };
    let dir = tempfile::tempdir().unwrap();
    let name = format!("{}/no/such:thing", registry.address);
    let reference = Reference::parse(&name).unwrap();
    let error =
        client().pull(&store(dir.path()), &reference, PullOptions::default(), silent()).await.unwrap_err();
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

    let client = client();
    let login = |user, word| {
        let (client, address) = (client.clone(), registry.address.clone());
        async move { client.login(&address, password(user, word).unwrap()).await }
    };
    login("user", "secret").await.unwrap();
    assert_eq!(login("user", "wrong").await.unwrap_err().class(), Class::Unauthorized);

    let refused = client.push(&store, &image, &reference, None, silent()).await.unwrap_err();
    assert_eq!(refused.class(), Class::Unauthorized, "{refused}");
    client.push(&store, &image, &reference, password("user", "secret"), silent()).await.unwrap();

    let anonymous = client.pull(&store, &reference, PullOptions::default(), silent()).await.unwrap_err();
    assert_eq!(anonymous.class(), Class::NotFound);
    assert!(anonymous.to_string().contains("pull access denied for"), "{anonymous}");
    assert!(!format!("{anonymous:?}").contains("secret"));
    let options = PullOptions { credentials: password("user", "secret"), ..PullOptions::default() };
    client.pull(&store, &reference, options, silent()).await.unwrap();
}
