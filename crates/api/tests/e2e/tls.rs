//! What goes inside TLS: the daemon's own TCP socket, and collectors of logs (against OpenSSL's server).

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use brigantine_testkit::{Client, Engine, eventually};

use crate::Host;

/// Keys and certificates of an authority, a server and a client, made by openssl.
pub(crate) fn certificates(dir: &Path) {
    let script = r#"
set -e
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca-key.pem -out ca.pem -subj /CN=ca -days 30
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout other-key.pem -out other-ca.pem -subj /CN=other -days 30
leaf() { # name, authority, its key, extension
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout $1-key.pem -out $1.csr -subj /CN=$1
    printf "$4\n" >ext
    openssl x509 -req -in $1.csr -CA $2 -CAkey $3 -CAcreateserial -out $1-cert.pem -days 30 -extfile ext
}
leaf server ca.pem ca-key.pem 'subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth'
leaf client ca.pem ca-key.pem 'extendedKeyUsage=clientAuth'
leaf stranger other-ca.pem other-key.pem 'extendedKeyUsage=clientAuth'
"#;
    let made = std::process::Command::new("sh").args(["-c", script]).current_dir(dir).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

#[test]
fn tcp_lets_in_only_clients_with_a_certificate() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let mut builder = Engine::builder();
    for flag in [
        "--host=tcp://127.0.0.1:2376".to_owned(),
        "--tlsverify".to_owned(),
        format!("--tlscacert={}", at("ca.pem")),
        format!("--tlscert={}", at("server-cert.pem")),
        format!("--tlskey={}", at("server-key.pem")),
    ] {
        builder = builder.flag(flag);
    }
    let engine = builder.start();
    let docker = |who: &str| {
        engine
            .sandbox()
            .net_command(brigantine_testkit::docker_command())
            .args(["-H", "tcp://127.0.0.1:2376", "--tlsverify", "--tlscacert", &at("ca.pem")])
            .args(["--tlscert", &at(&format!("{who}-cert.pem")), "--tlskey", &at(&format!("{who}-key.pem"))])
            .args(["version", "--format", "{{.Server.Os}}"])
            .env("HOME", engine.dir())
            .output()
            .unwrap()
    };
    let out = docker("client");
    assert_eq!(
        String::from_utf8_lossy(&out.stdout).trim(),
        "linux",
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(!docker("stranger").status.success());
    // Plain HTTP gets nothing.
    let plain = engine.sandbox().within_net(|| {
        let mut stream = TcpStream::connect("127.0.0.1:2376").unwrap();
        stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        // A reset is an answer as well.
        stream.read_to_end(&mut answer).ok();
        answer
    });
    assert!(!String::from_utf8_lossy(&plain).contains("200 OK"));
}

#[test]
fn tcp_without_certificates_is_refused() {
    for flags in [&["--host=tcp://127.0.0.1:0"][..], &["--host=tcp://127.0.0.1:0", "--tls"][..]] {
        let out = std::process::Command::new(brigantine_testkit::executable("brig"))
            .args(["daemon", "--validate"])
            .args(flags)
            .output()
            .unwrap();
        assert!(!out.status.success());
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(text.contains("--tlsverify"), "{text}");
    }
}

/// `openssl s_server` in an engine's network; it writes what it receives into a file.
struct Server {
    child: Child,
    received: PathBuf,
}

impl Server {
    fn start(engine: &Engine, dir: &Path, address: &str, flags: &[&str]) -> Self {
        let received = dir.join("received");
        let child = engine
            .sandbox()
            .net_command("openssl")
            .args([
                "s_server",
                "-quiet",
                "-accept",
                address,
                "-cert",
                "server-cert.pem",
                "-key",
                "server-key.pem",
            ])
            .args(flags)
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(std::fs::File::create(&received).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the server to listen", || {
            engine.sandbox().within_net(|| TcpStream::connect(address)).ok().map(drop)
        });
        Self { child, received }
    }

    fn received(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.received).unwrap()).into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn syslog_goes_to_a_server_that_shows_and_wants_certificates() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let host = Host::new(Client::Docker);
    let server = Server::start(
        &host,
        dir.path(),
        "127.0.0.1:6514",
        &["-CAfile", "ca.pem", "-Verify", "1", "-verify_return_error"],
    );
    let at = |name: &str| dir.path().join(name).display().to_string();
    let run = |address: &str, options: &[String]| {
        let address = format!("syslog-address=tcp+tls://{address}");
        let options = options.iter().flat_map(|option| ["--log-opt", option]);
        let driver = ["run", "--rm", "--log-driver", "syslog", "--log-opt", &address];
        let script = "echo one; echo two >&2; head -c 5000 /dev/zero | tr '\\0' x; echo";
        host.cli(driver.into_iter().chain(options).chain(["busybox", "sh", "-c", script]))
    };
    let authority = |name: &str| format!("syslog-tls-ca-cert={}", at(name));
    let identity = |name: &str| {
        [
            format!("syslog-tls-cert={}", at(&format!("{name}-cert.pem"))),
            format!("syslog-tls-key={}", at(&format!("{name}-key.pem"))),
        ]
    };

    let [certificate, key] = identity("client");
    let format = "syslog-format=rfc5424".to_owned();
    run("127.0.0.1:6514", &[authority("ca.pem"), certificate.clone(), key.clone(), format]).ok();
    let messages = eventually("all messages", || {
        let text = server.received();
        let mut rest = text.as_str();
        let mut messages = Vec::new();
        // RFC 5425: each with its length before it.
        while let Some((length, behind)) = rest.split_once(' ') {
            let message = behind.get(..length.parse().unwrap())?;
            messages.push(message.to_owned());
            rest = &behind[message.len()..];
        }
        (messages.len() == 3).then_some(messages)
    });
    assert!(messages.iter().all(|message| message.contains(">1 20")), "{messages:?}");
    assert!(messages.iter().any(|message| message.starts_with("<30>") && message.ends_with(" - one\n")));
    assert!(messages.iter().any(|message| message.starts_with("<27>") && message.ends_with(" - two\n")));
    assert!(messages.iter().any(|message| message.ends_with(&format!("{}\n", "x".repeat(5000)))));

    // A server of an unknown authority, or of another name, is none.
    for (address, options, says) in [
        (
            "127.0.0.1:6514",
            vec![authority("other-ca.pem"), certificate.clone(), key.clone()],
            "UnknownIssuer",
        ),
        ("localhost:6514", vec![authority("ca.pem"), certificate.clone(), key.clone()], "not valid for name"),
        ("127.0.0.1:6514", vec![authority("missing.pem")], "missing.pem"),
        ("127.0.0.1:6514", vec![authority("ca.pem"), certificate.clone()], "belong together"),
    ] {
        run(address, &options).exits(125).expect_stderr(says);
    }
    // Unless nobody asks.
    let skipping = ["syslog-tls-skip-verify=true".to_owned(), certificate, key];
    run("localhost:6514", &skipping).ok();
    eventually("messages in the old form", || {
        let text = server.received();
        text.lines().any(|line| line.starts_with("<30>") && line.ends_with("]: one")).then_some(())
    });
    host.cli(["create", "--log-driver", "syslog", "--log-opt", "syslog-tls-skip-verify=perhaps", "busybox"])
        .exits(1)
        .expect_stderr("syslog-tls-skip-verify");
    host.assert_nothing_left();
}

#[test]
fn fluentd_is_reached_inside_tls_if_a_known_authority_vouches_for_it() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let authority = dir.path().join("ca.pem").display().to_string();
    let engine = Engine::builder().busybox().env("SSL_CERT_FILE", authority).start();
    let host = Host { engine, client: Client::Docker };
    let server = Server::start(&host, dir.path(), "127.0.0.1:24224", &[]);
    let run = |address: &str| {
        let address = format!("fluentd-address=tls://{address}");
        host.cli([
            "run",
            "--rm",
            "--log-driver",
            "fluentd",
            "--log-opt",
            &address,
            "busybox",
            "echo",
            "inside",
        ])
    };
    run("127.0.0.1").ok();
    eventually("the record", || {
        let text = server.received();
        (text.contains("container_name") && text.contains("inside")).then_some(())
    });
    run("localhost").exits(125).expect_stderr("not valid for name");
    host.assert_nothing_left();
}
