//! What comes from servers in builds of docker's BuildKit client: contexts by URL and git, files and repositories that
//! ask for secrets of the session, base images of registries that ask for the client's login.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use brigantine_testkit::peers::Registry;
use brigantine_testkit::{Engine, Invocation};
use serde_json::json;

use super::peer::{Answers, Method, Peer, fields, text};
use super::{context, shown};

const SERVICE: &str = "the registry";
const ISSUER: &str = "the site";

/// A web server over a folder, with git's own server for repositories in it, and a token server. What is below `/private/`
/// wants to be asked with [`ALLOWED`].
struct Site {
    port: u16,
    asked: Heard,
}

/// What was asked for, and with which `Authorization`.
type Heard = Arc<Mutex<Vec<(String, Option<String>)>>>;

const ALLOWED: [&str; 2] = ["Bearer t0k", "basic eC1hY2Nlc3MtdG9rZW46dDBr"];

impl Site {
    fn start(engine: &Engine, root: &Path) -> Self {
        let listener = engine.sandbox().within_net(|| TcpListener::bind("127.0.0.1:0").unwrap());
        let port = listener.local_addr().unwrap().port();
        let asked = Heard::default();
        let (heard, root) = (Arc::clone(&asked), root.to_owned());
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let (heard, root) = (Arc::clone(&heard), root.clone());
                // A client may have gone.
                std::thread::spawn(move || answer(stream, &root, &heard).ok());
            }
        });
        Self { port, asked }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// What was asked since the last time.
    fn heard(&self) -> Vec<(String, Option<String>)> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

fn answer(stream: TcpStream, root: &Path, heard: &Heard) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split(' ');
    let (method, target) =
        (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let authorization = headers.get("authorization").cloned();
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    heard.lock().unwrap().push((path.to_owned(), authorization.clone()));
    let open = path.strip_prefix("/private");
    let (status, headers, body) = if path == "/token" {
        token_server(root, query, authorization.as_deref())
    } else if open.is_some() && !authorization.is_some_and(|given| ALLOWED.contains(&&*given)) {
        ("401 Unauthorized".to_owned(), "WWW-Authenticate: Basic realm=\"x\"\r\n".to_owned(), Vec::new())
    } else if path.contains(".git/") {
        repository(root, open.unwrap_or(path), query, &method, &headers, &body)
    } else {
        match fs::read(root.join(open.unwrap_or(path).trim_start_matches('/'))) {
            Ok(file) => ("200 OK".to_owned(), String::new(), file),
            Err(_) => ("404 Not Found".to_owned(), String::new(), Vec::new()),
        }
    };
    let head =
        format!("HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n", body.len());
    (&stream).write_all(head.as_bytes())?;
    (&stream).write_all(&body)
}

type Answer = (String, String, Vec<u8>);

/// `git http-backend`, as a web server runs it.
fn repository(
    root: &Path,
    path: &str,
    query: &str,
    method: &str,
    headers: &HashMap<String, String>,
    body: &[u8],
) -> Answer {
    let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
    let mut child = Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        .env("HOME", root)
        .env("PATH_INFO", path)
        .env("QUERY_STRING", query)
        .env("REQUEST_METHOD", method)
        .env("CONTENT_TYPE", header("content-type"))
        .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
        .env("HTTP_GIT_PROTOCOL", header("git-protocol"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(body).unwrap();
    let said = child.wait_with_output().unwrap().stdout;
    let at = said.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let head = String::from_utf8_lossy(&said[..at + 2]).into_owned();
    let (states, others): (Vec<&str>, Vec<&str>) =
        head.split_inclusive("\r\n").partition(|line| line.starts_with("Status: "));
    let status = states.first().map_or("200 OK", |line| line["Status: ".len()..].trim());
    (status.to_owned(), others.concat(), said[at + 4..].to_vec())
}

/// Gives `user` with the password `secret` whatever is asked for.
fn token_server(root: &Path, query: &str, authorization: Option<&str>) -> Answer {
    let wanted = format!("Basic {}", STANDARD.encode("user:secret"));
    if authorization != Some(wanted.as_str()) {
        return ("401 Unauthorized".to_owned(), String::new(), Vec::new());
    }
    let scopes: Vec<String> = url::form_urlencoded::parse(query.as_bytes())
        .filter(|(key, _)| key == "scope")
        .map(|(_, value)| value.into_owned())
        .collect();
    let token = token(root, &scopes);
    ("200 OK".to_owned(), String::new(), json!({ "token": token }).to_string().into_bytes())
}

/// A token for these scopes, signed with the folder's key.
fn token(root: &Path, scopes: &[String]) -> String {
    let access: Vec<_> = scopes
        .iter()
        .map(|scope| {
            let parts: Vec<&str> = scope.split(':').collect();
            json!({ "type": parts[0], "name": parts[1], "actions": parts[2].split(',').collect::<Vec<_>>() })
        })
        .collect();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let claims = json!({ "iss": ISSUER, "aud": SERVICE, "sub": "user", "exp": now + 300, "access": access });
    let signed = [json!({ "alg": "RS256", "typ": "JWT" }), claims]
        .map(|part| URL_SAFE_NO_PAD.encode(part.to_string()))
        .join(".");
    let mut openssl = Command::new("openssl")
        .args(["dgst", "-sha256", "-sign"])
        .arg(root.join("key.pem"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    openssl.stdin.take().unwrap().write_all(signed.as_bytes()).unwrap();
    let signature = openssl.wait_with_output().unwrap().stdout;
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

const DOCKERFILE: &str = "FROM busybox\nCOPY f /f\nRUN cat /f > /g\n";

/// A site with an archive, a lone Dockerfile, and a repository whose tag `v1` is an earlier state.
fn site(engine: &Engine) -> (Site, PathBuf) {
    let root = engine.dir().join("site");
    fs::create_dir_all(&root).unwrap();
    let files = [
        ("Dockerfile", DOCKERFILE),
        ("f", "main\n"),
        ("sub/Dockerfile", DOCKERFILE),
        ("sub/f", "sub\n"),
        ("other/My.file", "FROM busybox\nCOPY sub/f /g\n"),
    ];
    let work = context(engine, "work", &files);
    run(Command::new("tar").arg("-C").arg(&work).arg("-czf").arg(root.join("ctx.tar.gz")).arg("."));
    fs::write(root.join("Dockerfile"), "FROM busybox\nRUN echo alone > /g\n").unwrap();
    fs::write(root.join("file"), "a file\n").unwrap();
    let git = |args: &[&str]| {
        let identity = ["-c", "user.name=t", "-c", "user.email=t@t"];
        run(Command::new("git").current_dir(&work).env("HOME", &root).args(identity).args(args));
    };
    git(&["init", "-q", "-b", "main", "."]);
    git(&["add", "."]);
    git(&["commit", "-q", "-m", "one"]);
    git(&["tag", "v1"]);
    fs::write(work.join("f"), "later\n").unwrap();
    git(&["commit", "-q", "-a", "-m", "two"]);
    git(&["clone", "-q", "--bare", ".", root.join("repo.git").to_str().unwrap()]);
    (Site::start(engine, &root), root)
}

fn build(engine: &Engine, args: &[&str]) -> Invocation {
    engine.buildkit(["build", "--progress", "plain", "-t", "x"].iter().chain(args))
}

#[track_caller]
fn assert_shows(engine: &Engine, wanted: &str) {
    assert_eq!(engine.docker(["run", "--rm", "--network", "none", "x", "cat", "/g"]).ok(), wanted);
}

#[test]
fn contexts_are_fetched_by_url_and_git() {
    let engine = Engine::with_busybox();
    let (site, _) = site(&engine);
    for (args, wanted) in [
        (vec![site.url("/ctx.tar.gz")], "main"),
        (vec![site.url("/Dockerfile")], "alone"),
        (vec![site.url("/repo.git")], "later"),
        (vec![site.url("/repo.git#v1")], "main"),
        (vec![site.url("/repo.git#main:sub")], "sub"),
        (vec!["-f".to_owned(), "other/My.file".to_owned(), site.url("/ctx.tar.gz")], "sub"),
        (vec!["-f".to_owned(), "other/My.file".to_owned(), site.url("/repo.git")], "sub"),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let said = shown(build(&engine, &args));
        assert!(said.contains("[internal] load remote build context"), "{said}");
        assert_shows(&engine, wanted);
        let again = shown(build(&engine, &args));
        assert!(again.contains("CACHED"), "{args:?}: {again}");
    }
    for (args, words) in [
        (vec![site.url("/none.tar")], "404 Not Found"),
        (vec![site.url("/repo.git#none")], "failed to fetch none"),
        (vec![site.url("/repo.git#main:none")], "none"),
        (vec![site.url("/none.git")], "failed to fetch"),
        (vec![site.url("/file")], "unknown instruction"),
        (
            vec!["-f".to_owned(), "none".to_owned(), site.url("/ctx.tar.gz")],
            "Cannot locate specified Dockerfile: none",
        ),
        (vec!["http://127.0.0.1:1/x.tar".to_owned()], "127.0.0.1:1"),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        build(&engine, &args).exits(1).expect_stderr(words);
    }

    // The Dockerfile from standard input: docker's client keeps it to itself, ours sends it.
    let stdin = "FROM busybox\nCOPY sub/f /g\n";
    let url = site.url("/ctx.tar.gz");
    build(&engine, &["-f", "-", &url]).stdin(stdin).exits(1).expect_stderr("the client sent none");
    for url in [url, site.url("/repo.git")] {
        engine.docker(["rmi", "-f", "x"]).run();
        engine.brig(["build", "-t", "x", "-f", "-", &url]).stdin(stdin).ok();
        assert_shows(&engine, "sub");
    }
    let classic = engine.docker(["build", "-t", "x", &site.url("/Dockerfile")]).env("DOCKER_BUILDKIT", "0");
    assert_ne!(classic.run().code, 0, "that client fetches it itself, from a network where it is not");
}

#[test]
fn secrets_of_the_session_are_shown_to_their_host() {
    let engine = Engine::with_busybox();
    let (site, _) = site(&engine);
    let secret = engine.dir().join("token");
    fs::write(&secret, "t0k\n").unwrap();
    let flag = |id: &str| format!("id={id},src={}", secret.display());
    let (http, git) = (flag("HTTP_AUTH_TOKEN_127.0.0.1"), flag("GIT_AUTH_TOKEN.127.0.0.1"));
    let dockerfile = format!(
        "FROM busybox\nADD {} /g\nADD {} /open\nADD {} /repo\nRUN cat /g /repo/f\n",
        site.url("/private/file"),
        site.url("/file").replace("127.0.0.1", "localhost"),
        site.url("/private/repo.git#v1")
    );
    let dir = context(&engine, "ctx", &[("Dockerfile", &dockerfile)]);
    let dir = dir.to_str().unwrap();
    build(&engine, &[dir]).exits(1).expect_stderr("401 Unauthorized");
    build(&engine, &["--secret", &http, dir]).exits(1).expect_stderr("failed to fetch v1");
    site.heard();
    let said = shown(build(&engine, &["--secret", &http, "--secret", &git, dir]));
    assert!(said.contains("a file\n") && said.contains("main\n"), "{said}");
    let heard = site.heard();
    let shown_to = |path: &str| -> Vec<Option<String>> {
        heard.iter().filter(|(asked, _)| asked.starts_with(path)).map(|(_, given)| given.clone()).collect()
    };
    assert_eq!(shown_to("/private/file"), [Some(ALLOWED[0].to_owned())]);
    assert!(shown_to("/private/repo.git/").contains(&Some(ALLOWED[1].to_owned())), "{heard:?}");
    assert_eq!(shown_to("/file"), [None], "another name is another host");

    // Contexts as well.
    let url = site.url("/private/ctx.tar.gz");
    build(&engine, &[&url]).exits(1).expect_stderr("401 Unauthorized");
    shown(build(&engine, &["--secret", &http, &url]));
    assert_shows(&engine, "main");
    let url = site.url("/private/repo.git");
    shown(build(&engine, &["--secret", &git, &url]));
    assert_shows(&engine, "later");
    let found =
        Command::new("grep").args(["-rlaE", "t0k|eC1hY2Nlc3MtdG9rZW46dDBr"]).arg(engine.data_root()).output();
    assert_eq!(String::from_utf8_lossy(&found.unwrap().stdout), "", "the secrets were kept");
}

/// Builds on an image that only `user` may pull; the engine itself has no credentials.
#[track_caller]
fn the_clients_login_is_enough(engine: &Engine, registry: &Registry) -> String {
    let name = format!("{}/team/base:1", registry.address());
    let login = || engine.docker(["login", "-u", "user", "-p", "secret", &registry.address()]).ok();
    let logout = || engine.docker(["logout", &registry.address()]).ok();
    login();
    engine.docker(["tag", "busybox", &name]).ok();
    engine.docker(["push", &name]).ok();
    engine.docker(["rmi", &name]).ok();
    logout();
    let dockerfile = format!("FROM {name}\nRUN echo based > /g\n");
    let dir = context(engine, "ctx", &[("Dockerfile", &dockerfile)]);
    let dir = dir.to_str().unwrap().to_owned();
    let refused = build(engine, &[&dir]).exits(1).stderr;
    assert!(refused.contains("nauthorized") || refused.contains("docker login"), "{refused}");
    login();
    shown(build(engine, &[&dir]));
    assert_shows(engine, "based");
    logout();
    engine.docker(["rmi", "-f", "x", &name]).ok();
    assert_ne!(engine.docker(["pull", &name]).run().code, 0, "the engine kept the credentials");
    name
}

#[test]
fn base_images_are_pulled_with_the_clients_password() {
    let engine = Engine::with_busybox();
    let registry = Registry::start_with_password(&engine);
    the_clients_login_is_enough(&engine, &registry);
}

#[test]
fn base_images_are_pulled_with_tokens_the_clients_password_or_the_client_itself_gets() {
    let engine = Engine::with_busybox();
    let (site, root) = site(&engine);
    run(Command::new("openssl").args(["genrsa", "-out"]).arg(root.join("key.pem")).arg("2048"));
    let keys = root.join("keys.pem");
    run(Command::new("openssl")
        .args(["rsa", "-pubout", "-in"])
        .arg(root.join("key.pem"))
        .arg("-out")
        .arg(&keys));
    let registry = Registry::start_ours_with(&engine, |_dir| {
        let keys = keys.display().to_string();
        [
            "--token-realm",
            &site.url("/token"),
            "--token-issuer",
            ISSUER,
            "--token-service",
            SERVICE,
            "--token-keys",
            &keys,
        ]
        .map(str::to_owned)
        .to_vec()
    });
    let name = the_clients_login_is_enough(&engine, &registry);
    assert!(site.heard().iter().any(|(path, given)| path == "/token" && given.is_some()));

    // A client that keeps its password, and gets the tokens.
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let build = |method: Method| {
        let methods = HashMap::from([("/moby.filesync.v1.Auth/FetchToken".to_owned(), method)]);
        let dockerfile = format!("FROM {name}\nRUN echo based > /g\n");
        let peer = Peer::with(&engine, "key", &dockerfile, Answers::files(&[]), methods);
        let path = format!("/build?version=2&remote=client-session&t=x&session={}", peer.session());
        engine.post_bytes(&path, "application/x-tar", b"").text()
    };
    let (heard, keys) = (Arc::clone(&asked), root.clone());
    let said = build(Box::new(move |request: &[u8]| {
        let (_, texts) = fields(request);
        let texts = [2, 3, 4, 5].map(|field| String::from_utf8(texts[&field].clone()).unwrap());
        heard.lock().unwrap().extend(texts.clone());
        let mut answer = Vec::new();
        text(&mut answer, 1, token(&keys, &texts[3..]).as_bytes());
        Ok(answer)
    }));
    assert!(said.contains("moby.image.id"), "{said}");
    assert_shows(&engine, "based");
    let wanted =
        [registry.address(), site.url("/token"), SERVICE.to_owned(), "repository:team/base:pull".to_owned()];
    assert_eq!(asked.lock().unwrap()[..4], wanted);
    assert_eq!(site.heard(), [], "the engine asked the token server itself");
    // One that gets none: the registry is asked without; and one that says why.
    engine.docker(["rmi", "-f", "x", &name]).ok();
    for code in [5, 7] {
        let said = build(Box::new(move |_request: &[u8]| Err(code)));
        assert!(said.contains("nauthorized") || said.contains("ask for a token"), "{code}: {said}");
    }
}
