//! Who may use the registry: passwords, tokens, certificates; our client against all of them.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use brigantine_image::{Digest, Reference};
use brigantine_registry::server::{Access, Options, Tls};
use brigantine_registry::{Class, Client, Config, PullOptions};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use support::{OwnRegistry, Sample, client, http, own_options, password, pushing, reply, silent, store};

fn with_passwords(root: &Path, anonymous_read: bool) -> Options {
    let file = root.join("users");
    std::fs::write(&file, format!("ann:{}\n", bcrypt::hash("secret", 4).unwrap())).unwrap();
    let access = Access::Htpasswd { file, realm: "our \"realm\"".into(), anonymous_read };
    Options { access, ..own_options(&root.join("registry")) }
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::start(with_passwords(dir.path(), false)).await;
    let refused = http().get(registry.url("")).send().await.unwrap();
    assert_eq!(refused.status(), 401);
    assert_eq!(refused.headers()["www-authenticate"], "Basic realm=\"our realm\"");
    assert_eq!(refused.json::<Value>().await.unwrap()["errors"][0]["code"], "UNAUTHORIZED");
    for path in ["_catalog", "a/tags/list", "../metrics"] {
        assert_eq!(http().get(registry.url(path)).send().await.unwrap().status(), 401, "{path}");
    }

    let store = store(dir.path());
    let name = format!("{}/private:1", registry.address);
    let reference = Reference::parse(&name).unwrap();
    let image = Sample::new(1000).store_in(&store, &name);
    let client = client();
    client.login(&registry.address, password("ann", "secret").unwrap()).await.unwrap();
    let wrong = client.login(&registry.address, password("ann", "wrong").unwrap()).await.unwrap_err();
    assert_eq!(wrong.class(), Class::Unauthorized);
    let refused = client.push(&store, &image, &reference, pushing(None), silent()).await.unwrap_err();
    assert_eq!(refused.class(), Class::Unauthorized);
    client.push(&store, &image, &reference, pushing(password("ann", "secret")), silent()).await.unwrap();
    let options = PullOptions { credentials: password("ann", "secret"), ..PullOptions::default() };
    client.pull(&store, &reference, options, silent()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_may_be_open_to_all() {
    let dir = tempfile::tempdir().unwrap();
    let registry = OwnRegistry::start(with_passwords(dir.path(), true)).await;
    // Clients ask `/v2/` first: without a challenge there they would never show a password.
    assert_eq!(http().get(registry.url("")).send().await.unwrap().status(), 401);
    assert_eq!(http().get(registry.url("_catalog")).send().await.unwrap().status(), 200);
    assert_eq!(http().get(registry.url("a/manifests/x")).send().await.unwrap().status(), 404);
    assert_eq!(http().post(registry.url("a/blobs/uploads/")).send().await.unwrap().status(), 401);
    let wrong = http().get(registry.url("_catalog")).basic_auth("ann", Some("wrong")).send().await.unwrap();
    assert_eq!(wrong.status(), 401);
}

struct Issuer {
    ec: rcgen::KeyPair,
    keys: std::path::PathBuf,
}

impl Issuer {
    fn new(dir: &Path) -> Self {
        let ec = rcgen::KeyPair::generate().unwrap();
        let keys = dir.join("keys.pem");
        std::fs::write(&keys, ec.public_key_pem()).unwrap();
        Self { ec, keys }
    }

    fn access(&self, realm: &str) -> Access {
        Access::Token {
            realm: realm.to_owned(),
            service: "registry.test".into(),
            issuer: "issuer.test".into(),
            keys: self.keys.clone(),
        }
    }

    fn sign(key: &rcgen::KeyPair, claims: &Value) -> String {
        let key = EncodingKey::from_ec_der(&key.serialize_der());
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), claims, &key).unwrap()
    }

    fn token(&self, access: &Value) -> String {
        Self::sign(&self.ec, &claims(access))
    }
}

fn claims(access: &Value) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    json!({"iss": "issuer.test", "sub": "ann", "aud": "registry.test", "exp": now + 300, "nbf": now - 10,
        "access": access})
}

fn grant(name: &str, actions: &[&str]) -> Value {
    json!({"type": "repository", "name": name, "actions": actions})
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_grant_what_they_say_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = Issuer::new(dir.path());
    let options = Options {
        access: issuer.access("https://auth.test/token"),
        ..own_options(&dir.path().join("registry"))
    };
    let registry = OwnRegistry::start(options).await;
    let refused = http().post(registry.url("a/b/blobs/uploads/")).send().await.unwrap();
    assert_eq!(refused.status(), 401);
    assert_eq!(
        refused.headers()["www-authenticate"],
        "Bearer realm=\"https://auth.test/token\",service=\"registry.test\",scope=\"repository:a/b:pull,push\""
    );
    let status = |method: &str, path: &str, token: &str| {
        let request = http().request(method.parse().unwrap(), registry.url(path)).bearer_auth(token);
        async move { request.send().await.unwrap().status().as_u16() }
    };
    let rights = issuer.token(&json!([grant("a/b", &["pull", "push"]), grant("c", &["pull"])]));
    assert_eq!(status("GET", "", &rights).await, 200);
    assert_eq!(status("POST", "a/b/blobs/uploads/", &rights).await, 202);
    assert_eq!(status("GET", "c/manifests/x", &rights).await, 404);
    for (method, path) in [
        ("POST", "c/blobs/uploads/"),
        ("GET", "d/manifests/x"),
        ("DELETE", "a/b/manifests/x"),
        ("GET", "_catalog"),
    ] {
        assert_eq!(status(method, path, &rights).await, 401, "{method} {path}");
    }
    let all = issuer.token(&json!([{"type": "registry", "name": "catalog", "actions": ["*"]}]));
    assert_eq!(status("GET", "_catalog", &all).await, 200);

    // A blob of a repository that may not be read is not mounted, with or without its name.
    let secret = b"secret";
    let digest = Digest::sha256(secret);
    let owner = issuer.token(&json!([grant("owned", &["pull", "push"])]));
    let pushed = http()
        .post(registry.url(&format!("owned/blobs/uploads/?digest={digest}")))
        .bearer_auth(&owner)
        .body(&secret[..])
        .send();
    assert_eq!(pushed.await.unwrap().status(), 201);
    for query in [format!("mount={digest}&from=owned"), format!("mount={digest}")] {
        assert_eq!(status("POST", &format!("a/b/blobs/uploads/?{query}"), &rights).await, 202, "{query}");
    }
    let both = issuer.token(&json!([grant("a/b", &["pull", "push"]), grant("owned", &["pull"])]));
    let path = format!("a/b/blobs/uploads/?mount={digest}&from=owned");
    assert_eq!(status("POST", &path, &both).await, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_tokens_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = Issuer::new(dir.path());
    let options =
        Options { access: issuer.access("https://auth.test/"), ..own_options(&dir.path().join("r")) };
    let registry = OwnRegistry::start(options).await;
    let access = json!([grant("a", &["pull"])]);
    let good = issuer.token(&access);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut claims = claims(&access);
        change(&mut claims);
        Issuer::sign(&issuer.ec, &claims)
    };
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(serde_json::to_vec(value).unwrap());
    let body = good.split('.').nth(1).unwrap();
    let public = std::fs::read(&issuer.keys).unwrap();
    let shared = EncodingKey::from_secret(&public);
    let other = rcgen::KeyPair::generate().unwrap();
    let tampered = {
        let mut parts: Vec<String> = good.split('.').map(str::to_owned).collect();
        parts[1] = part(&claims(&json!([grant("a", &["pull", "push"])])));
        parts.join(".")
    };
    let bad = [
        ("no signature", format!("{}.{body}.", part(&json!({"alg": "none", "typ": "JWT"})))),
        (
            "public key as secret",
            jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims(&access), &shared).unwrap(),
        ),
        ("another's key", Issuer::sign(&other, &claims(&access))),
        ("tampered", tampered),
        ("another audience", with(&|claims| claims["aud"] = json!("other"))),
        ("another issuer", with(&|claims| claims["iss"] = json!("other"))),
        ("over", with(&|claims| claims["exp"] = json!(1_000_000))),
        ("never over", with(&|claims| drop(claims.as_object_mut().unwrap().remove("exp")))),
        ("not yet", with(&|claims| claims["nbf"] = json!(9_000_000_000_u64))),
        ("garbage", "a.b.c".to_owned()),
    ];
    let status = |token: &str| {
        let request = http().get(registry.url("a/manifests/x")).bearer_auth(token);
        async move { request.send().await.unwrap().status().as_u16() }
    };
    assert_eq!(status(&good).await, 404);
    for (what, token) in bad {
        assert_eq!(status(&token).await, 401, "{what}");
    }
}

/// Our client, our registry, and a token server between them.
#[tokio::test(flavor = "multi_thread")]
async fn our_client_gets_tokens_for_our_registry() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = Issuer::new(dir.path());
    let token = issuer.token(&json!([grant("app", &["pull", "push"])]));
    let tokens = support::LyingServer::start(move |head, _| {
        let right = head.to_ascii_lowercase().contains("authorization: basic yw5uonnly3jlda==");
        if right {
            reply("200 OK", "", json!({ "token": token }).to_string().as_bytes())
        } else {
            reply("401 Unauthorized", "", b"{\"details\":\"who are you?\"}")
        }
    })
    .await;
    let access = issuer.access(&format!("http://{}/token", tokens.address));
    let registry = OwnRegistry::start(Options { access, ..own_options(&dir.path().join("r")) }).await;
    let store = store(dir.path());
    let name = format!("{}/app:1", registry.address);
    let reference = Reference::parse(&name).unwrap();
    let image = Sample::new(1000).store_in(&store, &name);
    let client = client();
    client.push(&store, &image, &reference, pushing(password("ann", "secret")), silent()).await.unwrap();
    let asked = tokens.requests("GET /token?").join("\n");
    assert!(
        asked.contains("service=registry.test") && asked.contains("scope=repository%3Aapp%3Apull%2Cpush"),
        "{asked}"
    );
    let options = PullOptions { credentials: password("ann", "secret"), ..PullOptions::default() };
    client.pull(&store, &reference, options, silent()).await.unwrap();
    let refused = client.push(&store, &image, &reference, pushing(None), silent()).await.unwrap_err();
    assert_eq!(refused.class(), Class::Unauthorized, "{refused}");
}

struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: rcgen::Issuer::new(params, key), pem }
    }

    fn certify(&self, name: &str, dir: &Path, ending: &str) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(dir.join(format!("{ending}.cert")), certificate.pem()).unwrap();
        std::fs::write(dir.join(format!("{ending}.key")), key.serialize_pem()).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_checked_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let (authority, stranger) = (Authority::new(), Authority::new());
    authority.certify("127.0.0.1", dir.path(), "server");
    let client_authority = dir.path().join("clients.pem");
    std::fs::write(&client_authority, &authority.pem).unwrap();
    let tls = |client_authority| Tls {
        certificate: dir.path().join("server.cert"),
        key: dir.path().join("server.key"),
        client_authority,
    };
    let options = Options { tls: Some(tls(None)), ..own_options(&dir.path().join("r")) };
    let registry = OwnRegistry::start(options).await;
    let options = Options { tls: Some(tls(Some(client_authority))), ..own_options(&dir.path().join("s")) };
    let strict = OwnRegistry::start(options).await;

    let hosts = dir.path().join("certs.d");
    let client_for = |registry: &OwnRegistry, authority: &Authority| {
        let host = hosts.join(&registry.address);
        std::fs::create_dir_all(&host).unwrap();
        std::fs::write(host.join("ca.crt"), &authority.pem).unwrap();
        let back_off = Duration::from_millis(10);
        let config = Config { hosts: vec![hosts.clone()], attempts: 2, back_off, ..Config::default() };
        Client::new(config)
    };
    let store = store(dir.path());
    let name = format!("{}/app:1", registry.address);
    let reference = Reference::parse(&name).unwrap();
    let image = Sample::new(50_000).store_in(&store, &name);
    let wrong =
        client_for(&registry, &stranger).push(&store, &image, &reference, pushing(None), silent()).await;
    assert!(wrong.unwrap_err().report().to_lowercase().contains("certificate"));
    let client = client_for(&registry, &authority);
    client.push(&store, &image, &reference, pushing(None), silent()).await.unwrap();
    client.pull(&store, &reference, PullOptions::default(), silent()).await.unwrap();

    let reference = Reference::parse(&format!("{}/app:1", strict.address)).unwrap();
    let client = client_for(&strict, &authority);
    assert!(client.push(&store, &image, &reference, pushing(None), silent()).await.is_err());
    authority.certify("a client", &hosts.join(&strict.address), "client");
    let client = client_for(&strict, &authority);
    client.push(&store, &image, &reference, pushing(None), silent()).await.unwrap();
}
