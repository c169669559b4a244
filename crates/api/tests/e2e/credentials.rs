//! Credentials kept by helpers: programs `docker-credential-NAME` that the client asks, here one of a few lines of shell.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use brigantine_testkit::peers::Registry;
use brigantine_testkit::{Client, Engine, Invocation};
use serde_json::{Value, json};

use super::Host;

both![a_helper_keeps_the_secret, a_build_takes_what_the_store_has];

/// Keeps what it is given in files beside itself, one for each server, and notes what it was asked.
const FILES: &str = r#"#!/bin/sh
dir=$(dirname "$0")/kept
mkdir -p "$dir"
input=$(cat)
echo "$1" >>"$dir/../asked"
name() { printf %s "$1" | tr -c 'A-Za-z0-9.\n' _; }
case $1 in
store) printf %s "$input" >"$dir/$(name "$(printf %s "$input" | sed 's/.*"ServerURL":"\([^"]*\)".*/\1/')")" ;;
get) cat "$dir/$(name "$input")" 2>/dev/null || { echo "credentials not found in native keychain"; exit 1; } ;;
erase) rm "$dir/$(name "$input")" 2>/dev/null || { echo "credentials not found in native keychain"; exit 1; } ;;
list)
    printf '{'
    cat "$dir"/* 2>/dev/null | sed 's/.*"ServerURL":"\([^"]*\)","Username":"\([^"]*\)".*/"\1":"\2"/'
    printf '}' ;;
esac
"#;

/// The client's side: a configuration, and helpers in a directory of the PATH.
struct Helpers<'h> {
    host: &'h Host,
    programs: PathBuf,
}

impl<'h> Helpers<'h> {
    fn new(host: &'h Host) -> Self {
        let programs = host.engine.dir().join("helpers");
        fs::create_dir(&programs).unwrap();
        fs::create_dir_all(host.engine.dir().join("config")).unwrap();
        let helpers = Self { host, programs };
        helpers.install("files", FILES);
        helpers
    }

    fn install(&self, name: &str, script: &str) {
        let path = self.programs.join(format!("docker-credential-{name}"));
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn config_path(&self) -> PathBuf {
        self.host.engine.dir().join("config/config.json")
    }

    fn configure(&self, config: &Value) {
        fs::write(self.config_path(), config.to_string()).unwrap();
    }

    fn cli<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Invocation {
        let path = format!("{}:{}", self.programs.display(), std::env::var("PATH").unwrap());
        self.host.cli(args.into_iter().collect::<Vec<_>>()).env("PATH", &path)
    }

    /// What the helper has kept, all of it.
    fn kept(&self) -> String {
        let Ok(dir) = fs::read_dir(self.programs.join("kept")) else { return String::new() };
        dir.map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap()).collect()
    }

    fn asked(&self) -> Vec<String> {
        let text = fs::read_to_string(self.programs.join("asked")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

fn a_helper_keeps_the_secret(client: Client) {
    let host = Host { engine: Engine::with_busybox(), client };
    let registry = Registry::start_ours_with_password(&host.engine);
    let helpers = Helpers::new(&host);
    let name = format!("{}/team/box:1", registry.address());
    host.cli(["tag", "busybox", &name]).ok();
    // One for this registry alone, and one for all.
    for config in [
        json!({ "credHelpers": { registry.address(): "files" }, "credsStore": "nobody" }),
        json!({ "credsStore": "files" }),
    ] {
        helpers.configure(&config);
        helpers.cli(["push", &name]).exits(1);
        let wrong = helpers.cli(["login", "-u", "user", "-p", "wrong", &registry.address()]).exits(1);
        assert!(helpers.kept().is_empty(), "{wrong}");
        let login = ["login", "-u", "user", "--password-stdin", &registry.address()];
        let said = helpers.cli(login).stdin("secret\n").exits(0);
        assert!(said.stdout.contains("Login Succeeded"), "{said}");
        assert!(!said.stderr.contains("unencrypted"), "{said}");
        let kept: Value = serde_json::from_str(&helpers.kept()).unwrap();
        assert_eq!(kept, json!({ "ServerURL": registry.address(), "Username": "user", "Secret": "secret" }));
        let file = fs::read_to_string(helpers.config_path()).unwrap();
        // `user:secret` in base64.
        assert!(!file.contains("secret") && !file.contains("dXNlcjpzZWNyZXQ"), "{file}");

        helpers.cli(["push", &name]).ok();
        helpers.cli(["rmi", &name]).ok();
        helpers.cli(["pull", &name]).ok();
        // What is kept serves for the next login as well.
        helpers.cli(["login", &registry.address()]).ok();

        let said = helpers.cli(["logout", &registry.address()]).ok();
        assert!(said.contains("Removing login credentials"), "{said}");
        assert!(helpers.kept().is_empty());
        let refused = helpers.cli(["pull", &name]).exits(1);
        let text = refused.stderr.to_lowercase();
        assert!(
            ["no basic auth", "unauthorized", "denied"].iter().any(|word| text.contains(word)),
            "{refused}"
        );
    }
    let asked = helpers.asked();
    for verb in ["get", "store", "erase"] {
        assert!(asked.iter().any(|asked| asked == verb), "{verb}: {asked:?}");
    }
    drop(registry);
}

/// A build may take its base from any registry: the client sends what it has for all of them.
fn a_build_takes_what_the_store_has(client: Client) {
    let host = Host { engine: Engine::with_busybox(), client };
    let registry = Registry::start_ours_with_password(&host.engine);
    let helpers = Helpers::new(&host);
    helpers.configure(&json!({ "credsStore": "files" }));
    let name = format!("{}/team/base:1", registry.address());
    host.cli(["tag", "busybox", &name]).ok();
    helpers.cli(["login", "-u", "user", "-p", "secret", &registry.address()]).ok();
    helpers.cli(["push", &name]).ok();
    helpers.cli(["rmi", &name]).ok();
    let context = host.engine.dir().join("context");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("Dockerfile"), format!("FROM {name}\nLABEL made=here\n")).unwrap();
    let build =
        || helpers.cli(["build", "-q", "-t", "built", context.to_str().unwrap()]).env("DOCKER_BUILDKIT", "0");
    build().ok();
    assert!(helpers.asked().iter().any(|asked| asked == "list"));
    helpers.cli(["rmi", "built", &name]).run();
    helpers.cli(["logout", &registry.address()]).ok();
    build().exits(1);
    drop(registry);
}

/// Ours says what is wrong with a helper, and waits for none for ever.
#[test]
fn helpers_that_fail_are_named() {
    let host = Host { engine: Engine::start(), client: Client::Brig };
    let registry = Registry::start_ours_with_password(&host.engine);
    let helpers = Helpers::new(&host);
    let name = format!("{}/team/box:1", registry.address());
    let pull = |helper: &str| {
        helpers.configure(&json!({ "credHelpers": { registry.address(): helper } }));
        helpers.cli(["pull", &name]).env("BRIG_CREDENTIAL_TIMEOUT", "1")
    };
    pull("missing").exits(1).expect_stderr("docker-credential-missing get: no such program on the PATH");
    pull("../x").exits(1).expect_stderr("credential helper \"../x\"");

    helpers.install("garbage", "#!/bin/sh\necho '{\"Username\": \"user\", \"Secret\": hunter2}'\n");
    let garbled = pull("garbage").exits(1);
    assert!(
        garbled.stderr.contains("docker-credential-garbage get: answers with something else"),
        "{garbled}"
    );
    assert!(!garbled.stderr.contains("hunter"), "{garbled}");

    // It does not even read what it is asked.
    helpers.install("hangs", "#!/bin/sh\nexec sleep 100\n");
    let late = pull("hangs").exits(1);
    assert!(late.stderr.contains("docker-credential-hangs get: does not answer within 1 seconds"), "{late}");
    assert!(late.took < Duration::from_secs(30), "{late}");

    helpers.install("talks", "#!/bin/sh\nexec yes\n");
    pull("talks").exits(1).expect_stderr("docker-credential-talks get:");

    helpers.install("locked", "#!/bin/sh\necho 'the key ring is locked'\nexit 2\n");
    pull("locked").exits(1).expect_stderr("docker-credential-locked get: the key ring is locked");
    helpers.install("silent", "#!/bin/sh\nexit 3\n");
    pull("silent").exits(1).expect_stderr("docker-credential-silent get: failed and did not say why");

    // What a login found right and cannot keep is told; nothing of it goes into the file instead.
    helpers.install("locked", "#!/bin/sh\ncase $1 in get) echo credentials not found in native keychain;; *) echo no room;; esac\nexit 1\n");
    helpers.configure(&json!({ "credsStore": "locked" }));
    let login = ["login", "-u", "user", "-p", "secret", &registry.address()];
    helpers.cli(login).exits(1).expect_stderr("docker-credential-locked store: no room");
    assert!(!fs::read_to_string(helpers.config_path()).unwrap().contains("auths"));
    drop(registry);
}
