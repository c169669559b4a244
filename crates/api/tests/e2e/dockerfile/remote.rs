//! Sources from elsewhere: files of a web server, repositories of git's own server, both in the test's network.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use brigantine_testkit::eventually;

use super::{Given, Yard};

/// One request: its path and the headers that matter here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    path: String,
    etag: Option<String>,
    authorization: Option<String>,
}

/// A web server that has what it is told to have.
struct Web {
    port: u16,
    text: Arc<Mutex<String>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Web {
    fn start(yard: &Yard) -> Self {
        let listener = yard.host.sandbox().within_net(|| TcpListener::bind("127.0.0.1:0").unwrap());
        let port = listener.local_addr().unwrap().port();
        let (text, asked) = (Arc::new(Mutex::new("one\n".to_owned())), Arc::<Mutex<Vec<Asked>>>::default());
        let (has, heard) = (Arc::clone(&text), Arc::clone(&asked));
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                answer(stream, port, &has, &heard);
            }
        });
        Self { port, text, asked }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// What was asked since the last time.
    fn heard(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

fn answer(mut stream: TcpStream, port: u16, text: &Mutex<String>, asked: &Mutex<Vec<Asked>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let path = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_owned();
    let mut request = Asked { path, etag: None, authorization: None };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap_or_default();
        match name.to_ascii_lowercase().as_str() {
            "if-none-match" => request.etag = Some(value.to_owned()),
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let text = text.lock().unwrap().clone();
    // An archive's text is nothing for a header.
    let name = if text.contains('\0') { "archive" } else { text.trim() };
    let etag = format!("\"{name}\"");
    let empty = |status: &str, header: &str| {
        format!("HTTP/1.1 {status}\r\n{header}content-length: 0\r\nconnection: close\r\n\r\n")
    };
    let reply = match request.path.as_str() {
        "/moved" => empty("302 Found", &format!("location: http://localhost:{port}/file\r\n")),
        "/private" if request.authorization.is_none() => empty("401 Unauthorized", ""),
        "/gone" => empty("404 Not Found", ""),
        _ if request.etag.as_deref() == Some(etag.as_str()) => empty("304 Not Modified", ""),
        _ => format!(
            "HTTP/1.1 200 OK\r\netag: {etag}\r\nlast-modified: Thu, 01 Jan 1998 00:00:00 GMT\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n{text}",
            text.len()
        ),
    };
    asked.lock().unwrap().push(request);
    // A client may have gone.
    stream.write_all(reply.as_bytes()).ok();
}

#[test]
fn files_of_a_web_server() {
    let yard = Yard::new();
    let web = Web::start(&yard);
    let none = || -> [(&str, Given<'_>); 0] { [] };
    let dockerfile = format!("FROM busybox\nADD {} /f\nRUN cat /f > /g\n", web.url("/file"));
    yard.shows(&dockerfile, &none(), "cat /g; stat -c '%a %Y' /f", "one\n600 883612800");
    assert_eq!(web.heard().len(), 1);
    // The second time the server is asked whether it changed.
    yard.shows(&dockerfile, &none(), "cat /g", "one");
    let heard = web.heard();
    assert_eq!(heard.iter().map(|asked| asked.etag.as_deref()).collect::<Vec<_>>(), [Some("\"one\"")]);
    "two\n".clone_into(&mut web.text.lock().unwrap());
    yard.shows(&dockerfile, &none(), "cat /g", "two");
    web.heard();
    // A file whose checksum is known is not asked for at all; a wrong one is never used.
    let sum = "sha256:27dd8ed44a83ff94d557f9fd0412ed5a8cbca69ea04922d88c01184a07300a5a";
    let checked = format!("FROM busybox\nADD --checksum={sum} {} /f\n", web.url("/file"));
    yard.shows(&checked, &none(), "cat /f", "two");
    assert_eq!(web.heard(), []);
    let wrong = checked.replace("27dd", "37dd");
    yard.refuses(wrong.as_bytes(), &none(), &[], "digest mismatch");
    yard.refuses(
        format!("FROM busybox\nADD {} /f\n", web.url("/private")).as_bytes(),
        &none(),
        &[],
        "401 Unauthorized",
    );
    web.heard();
    // What is kept is shown and given back.
    let shown = yard.host.cli(["system", "df", "-v", "--format", "{{json .BuildCache}}"]).ok();
    assert!(shown.contains("source.http"), "{shown}");
    yard.host.cli(["builder", "prune", "-f"]).ok();
    yard.shows(&checked, &none(), "cat /f", "two");
    assert_eq!(web.heard().len(), 1);
    // Credentials go to their host, not to where it redirects to.
    let token = yard.host.dir().join("token");
    std::fs::write(&token, "t0k").unwrap();
    let secret = format!("id=HTTP_AUTH_TOKEN_127.0.0.1,src={}", token.display());
    for path in ["/private", "/moved"] {
        let dockerfile = format!("FROM busybox\nADD {} /{path}\n", web.url(path));
        yard.shows_with(
            &dockerfile,
            &none(),
            &["--secret", &secret],
            "cat /private /moved 2>/dev/null; true",
            "two",
        );
    }
    let heard: Vec<_> = web.heard().into_iter().map(|asked| (asked.path, asked.authorization)).collect();
    let bearer = Some("Bearer t0k".to_owned());
    assert_eq!(
        heard,
        [("/private".to_owned(), bearer.clone()), ("/moved".to_owned(), bearer), ("/file".to_owned(), None)]
    );
}

#[test]
fn an_archive_of_a_web_server_is_a_context_with_a_name() {
    let yard = Yard::new();
    let web = Web::start(&yard);
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(5);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    archive.append_data(&mut header, "d/f", &b"file\n"[..]).unwrap();
    *web.text.lock().unwrap() = String::from_utf8(archive.into_inner().unwrap()).unwrap();
    let context = format!("files={}", web.url("/files.tar"));
    let dockerfile =
        "FROM busybox\nCOPY --from=files d/f /one\nRUN --mount=from=files,target=/m cp /m/d/f /two\n";
    yard.shows_with(dockerfile, &[], &["--build-context", &context], "cat /one /two", "file\nfile");
    // Its time, as the server says it, may be that of the image.
    let flags = ["--build-context", &context, "--build-arg", "SOURCE_DATE_EPOCH=files"];
    let (built, tag) = yard.build(dockerfile.as_bytes(), &[], &flags);
    assert_eq!(built.code, 0, "{built}");
    assert_eq!(created(&yard, &tag), "1998-01-01T00:00:00Z");
    // So may that of a stage which is one download, whether it is used or not.
    let stages = format!(
        "FROM scratch AS src\nARG FILE=none\nADD {} /\nFROM busybox AS other\nFROM busybox\nCOPY --from=src f /\n",
        web.url("/$FILE")
    );
    let flags = |stage: &'static str| ["--build-arg", "FILE=f", "--build-arg", stage];
    let (built, tag) = yard.build(stages.as_bytes(), &[], &flags("SOURCE_DATE_EPOCH=src"));
    assert_eq!(built.code, 0, "{built}");
    assert_eq!(created(&yard, &tag), "1998-01-01T00:00:00Z");
    let other = flags("SOURCE_DATE_EPOCH=other");
    yard.refuses(stages.as_bytes(), &[], &other, "SOURCE_DATE_EPOCH=other: the stage is not FROM scratch");
    let two = format!("FROM scratch AS src\nADD {0} /\nADD {0} /g\nFROM busybox\n", web.url("/f"));
    let src = ["--build-arg", "SOURCE_DATE_EPOCH=src"];
    yard.refuses(two.as_bytes(), &[], &src, "one ADD of a URL or a repository");
    let zeros = "0".repeat(64);
    let sum =
        format!("FROM scratch AS src\nADD --checksum=sha256:{zeros} {} /\nFROM busybox\n", web.url("/f"));
    yard.refuses(sum.as_bytes(), &[], &src, &zeros);
}

fn created(yard: &Yard, image: &str) -> String {
    yard.host.cli(["inspect", "-f", "{{.Created}}", image]).ok()
}

#[test]
fn the_time_of_a_folder_is_not_used_and_that_of_the_dockerfile_is() {
    let yard = Yard::new();
    let built = |dockerfile: &[u8], flags: &[&str]| {
        let (built, tag) = yard.build(dockerfile, &[], flags);
        assert_eq!(built.code, 0, "{built}");
        created(&yard, &tag)
    };
    let own = b"ARG SOURCE_DATE_EPOCH=86400\nFROM busybox\nARG SOURCE_DATE_EPOCH\nRUN echo at $SOURCE_DATE_EPOCH > /at\n";
    assert_eq!(built(own, &[]), "1970-01-02T00:00:00Z");
    assert_eq!(built(own, &["--build-arg", "SOURCE_DATE_EPOCH=172800"]), "1970-01-03T00:00:00Z");
    let context = ["--build-arg", "SOURCE_DATE_EPOCH=context"];
    assert!(built(b"FROM busybox\nRUN true\n", &context).starts_with("20"));
    yard.refuses(own, &[], &["--build-arg", "SOURCE_DATE_EPOCH=other"], "SOURCE_DATE_EPOCH=other");
    let image = ["--build-context", "b=docker-image://busybox", "--build-arg", "SOURCE_DATE_EPOCH=b"];
    yard.refuses(own, &[], &image, "an image has no time of its own");
}

#[track_caller]
fn git(dir: &Path, args: &[&str]) {
    let output = Command::new("git")
        .current_dir(dir)
        .args(["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"])
        .args(args)
        .env("HOME", dir)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_COMMITTER_DATE", "2001-02-03T04:05:06Z")
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A repository with one file and its commit.
fn repository(base: &Path, name: &str, file: &str) -> std::path::PathBuf {
    let dir = base.join(name);
    std::fs::create_dir_all(dir.join("sub")).unwrap();
    std::fs::write(dir.join("sub").join(file), format!("{name}\n")).unwrap();
    git(&dir, &["init", "-q", "-b", "main", "."]);
    git(&dir, &["add", "."]);
    git(&dir, &["commit", "-q", "-m", "first"]);
    dir
}

#[test]
fn repositories_with_submodules() {
    let yard = Yard::new();
    let base = yard.host.dir().join("git");
    let inner = repository(&base, "inner", "in");
    let outer = repository(&base, "outer", "out");
    git(&outer, &["tag", "v1"]);
    git(&outer, &["submodule", "-q", "add", "../inner", "module"]);
    std::fs::write(outer.join("Dockerfile"), "FROM busybox\nCOPY . /ctx\n").unwrap();
    git(&outer, &["add", "."]);
    git(&outer, &["commit", "-q", "-m", "second"]);
    // A repository that asks for a path of the machine.
    let evil = repository(&base, "evil", "e");
    git(&evil, &["submodule", "-q", "add", inner.to_str().unwrap(), "module"]);
    git(&evil, &["commit", "-q", "-m", "third"]);

    let port = yard.host.sandbox().within_net(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let address = port.local_addr().unwrap();
    drop(port);
    let mut server = yard
        .host
        .sandbox()
        .command("git")
        .args(["-c", "safe.directory=*", "daemon", "--reuseaddr", "--export-all", "--listen=127.0.0.1"])
        .arg(format!("--port={}", address.port()))
        .arg(format!("--base-path={}", base.display()))
        .arg(&base)
        .env("HOME", &base)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("git's server", || yard.host.sandbox().within_net(|| TcpStream::connect(address).ok()));
    let none = || -> [(&str, Given<'_>); 0] { [] };
    let url = format!("git://{address}/outer");
    yard.shows(
        &format!("FROM busybox\nADD {url} /whole\nADD {url}#v1:sub /part\nADD --keep-git-dir {url}#v1 /kept\n"),
        &none(),
        "cat /whole/sub/out /whole/module/sub/in /part/out; find /whole -name .git; test -f /kept/.git/HEAD && echo kept",
        "outer\ninner\nouter\nkept",
    );
    yard.shows(
        &format!("FROM busybox\nADD {url}?submodules=false /whole\n"),
        &none(),
        "ls /whole/module | wc -l",
        "0",
    );
    let wrong = "0123456789012345678901234567890123456789";
    yard.refuses(format!("FROM busybox\nADD --checksum={wrong} {url} /x\n").as_bytes(), &none(), &[], wrong);
    yard.refuses(
        format!("FROM busybox\nADD git://{address}/evil /x\n").as_bytes(),
        &none(),
        &[],
        "fetch the submodules",
    );
    // A repository as the context.
    yard.host.cli(["build", "-t", "from-git", &url]).ok();
    assert_eq!(yard.host.cli(["run", "--rm", "from-git", "cat", "/ctx/module/sub/in"]).ok(), "inner");
    let keep = ["build", "-t", "with-git", "--build-arg", "BUILDKIT_CONTEXT_KEEP_GIT_DIR=1", &url];
    yard.host.cli(keep).ok();
    let found = |name: &str| yard.host.cli(["run", "--rm", name, "ls", "-A", "/ctx"]).ok().contains(".git\n");
    assert!(found("with-git") && !found("from-git"));
    let timed = ["build", "-t", "timed", "--build-arg", "SOURCE_DATE_EPOCH=context", &url];
    yard.host.cli(timed).ok();
    assert_eq!(created(&yard, "timed"), "2001-02-03T04:05:06Z");
    // The time of a stage that is a checkout.
    let staged = format!("FROM scratch AS src\nADD {url}#v1 /\nFROM busybox\nCOPY --from=src sub/out /\n");
    let (built, tag) = yard.build(staged.as_bytes(), &none(), &["--build-arg", "SOURCE_DATE_EPOCH=src"]);
    assert_eq!(built.code, 0, "{built}");
    assert_eq!(created(&yard, &tag), "2001-02-03T04:05:06Z");
    // And as a context with a name.
    let named = format!("repo={url}#v1:sub");
    let dockerfile =
        "FROM busybox\nCOPY --from=repo out /one\nRUN --mount=from=repo,target=/m cp /m/out /two\n";
    yard.shows_with(dockerfile, &none(), &["--build-context", &named], "cat /one /two", "outer\nouter");
    server.kill().unwrap();
    server.wait().unwrap();
}

/// A password in a source's URL goes to its server, and nowhere else.
#[test]
fn passwords_in_urls_are_shown_nowhere() {
    const SECRET: &str = "s3cr3t";
    const BASIC: &str = "Basic dTpzM2NyM3Q=";
    let yard = Yard::new();
    let web = Web::start(&yard);
    let url = |path: &str| format!("http://u:{SECRET}@127.0.0.1:{}{path}", web.port);
    let authorized = || -> Vec<_> {
        web.heard().into_iter().map(|asked| asked.authorization.unwrap_or_default().to_lowercase()).collect()
    };
    let silent = |said: &str| assert!(!said.contains(SECRET), "{said}");
    let hides = |said: &str| {
        silent(said);
        assert!(said.contains("u:xxxxx@"), "{said}");
    };
    // What is built tells of it in its progress, its history, its provenance and the cache.
    let dockerfile = format!("FROM busybox\nADD {} /f\nRUN cat /f\n", url("/private"));
    let attest = ["--provenance=mode=max", "--progress=plain"];
    let (built, tag) = yard.build(dockerfile.as_bytes(), &[], &attest);
    assert_eq!(built.code, 0, "{built}");
    assert_eq!(authorized(), [BASIC.to_lowercase()]);
    hides(&built.to_string());
    hides(&yard.host.cli(["history", "--no-trunc", &tag]).ok());
    hides(&yard.host.cli(["builder", "du", "--format", "json"]).ok());
    hides(&yard.host.get("/build/history").to_string());
    let saved = yard.host.dir().join("saved.tar");
    yard.host.cli(["save", "-o", saved.to_str().unwrap(), &tag]).ok();
    let raw = String::from_utf8_lossy(&std::fs::read(&saved).unwrap()).into_owned();
    assert!(raw.contains("slsa"), "no provenance was saved");
    hides(&raw);
    // What fails does, too: a file, a repository (which git says more of), a context, an import.
    for line in ["ADD {}/nobody /f", "ADD {}/r.git /f", "COPY {}/f /f"] {
        let dockerfile = format!("FROM busybox\n{}\n", line.replace("{}", &url("")));
        let wrong = dockerfile.replace("/nobody", "/private").replace(&format!(":{}", web.port), ":1");
        for dockerfile in [dockerfile.replace("/nobody", "/gone"), wrong] {
            let (built, _) = yard.build(dockerfile.as_bytes(), &[], &["--progress=plain"]);
            assert_ne!(built.code, 0, "{built}");
            hides(&built.to_string());
        }
    }
    assert!(authorized().iter().all(|given| *given == BASIC.to_lowercase()));
    for context in [url("/r.git"), url("/gone"), format!("http://u:{SECRET}@127.0.0.1:1/x")] {
        let built = yard.host.cli(["build", "--progress=plain", &context]).run();
        assert_ne!(built.code, 0, "{built}");
        silent(&(built.stdout + &built.stderr));
    }
    assert!(authorized().iter().all(|given| *given == BASIC.to_lowercase()));
    for from in [url("/gone"), format!("http://u:{SECRET}@127.0.0.1:1/x"), url("/private")] {
        let imported = yard.host.cli(["import", &from, "imported"]).run();
        silent(&(imported.stdout + &imported.stderr));
    }
    // What the engine keeps.
    hides(&yard.host.get("/build/history").to_string());
}
