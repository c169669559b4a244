//! `brig registry`: a registry in this process, and its garbage collection.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::Duration;

use brigantine_registry::server::{
    self, Access, Collection, Limits, Options, Quotas, Server, Source, Tls, Upstream,
};
use brigantine_registry::{Config, Credentials};

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::{output, units};

pub static SERVE: Command = Command {
    name: "serve",
    usage: "[OPTIONS]",
    about: "Run a registry in the foreground",
    flags: &[
        Flag::switch("allow-sparse", "Take manifests that name content which is not there"),
        Flag::switch("anonymous-read", "With --htpasswd: reading needs no password"),
        Flag::one("cache-fresh", "duration", "With --cache-of: for how long a tag is not asked for again")
            .default("1m"),
        Flag::one(
            "cache-keep",
            "duration",
            "With --cache-of: remove what nobody asked for so long (0: keep)",
        )
        .default("168h"),
        Flag::text("cache-of", "Be a read-only cache of the registry at this URL"),
        Flag::list("cache-insecure", "With --cache-of: hosts that may be reached without TLS"),
        Flag::text("cache-password-file", "With --cache-of: file that holds upstream's password"),
        Flag::text("cache-username", "With --cache-of: user name at upstream"),
        Flag::one("chunk-min", "bytes", "Tell clients that smaller chunks are not worth sending"),
        Flag::text("engine-store", "Serve this engine's images, read-only, instead of --root"),
        Flag::one("gc-grace", "duration", "What was used so lately is never garbage").default("24h"),
        Flag::one("gc-interval", "duration", "Time between two garbage collections (0: only when asked)")
            .default("6h"),
        Flag::switch("gc-untagged", "Manifests that no tag leads to are garbage"),
        Flag::text("htpasswd", "File of users with bcrypt hashes (htpasswd -B)"),
        Flag::list("listen", "Address to listen on (default \"127.0.0.1:5000\"); may be repeated"),
        Flag::text("log-format", "Form of the log: text or json").default("text"),
        Flag::text("log-level", "How much to say: trace, debug, info, warn, error").default("info"),
        Flag::text("metrics", "Serve /metrics on this address instead of beside the registry"),
        Flag::list("quota", "Bytes each repository may hold, or NAME=BYTES, PREFIX/*=BYTES"),
        Flag::switch("read-only", "Refuse what changes anything"),
        Flag::text("realm", "With --htpasswd: what the user is asked the password for").default("Registry"),
        Flag::text("root", "Directory of the registry's content"),
        Flag::text("tls-cert", "Certificate chain in PEM"),
        Flag::text("tls-client-ca", "Clients have to show a certificate of this authority"),
        Flag::text("tls-key", "The certificate's key in PEM"),
        Flag::text("token-issuer", "With --token-realm: who has to have issued tokens"),
        Flag::text("token-keys", "With --token-realm: the issuer's public keys (PEM or JSON Web Key Set)"),
        Flag::text("token-realm", "URL of the token server that users get tokens from"),
        Flag::text("token-service", "With --token-realm: the registry's name in tokens"),
        Flag::one("upload-lifetime", "duration", "Forget uploads nobody went on with for so long")
            .default("168h"),
    ],
    operands: Operands::None,
    run: runs!(serve),
    ..Command::EMPTY
};

pub static COLLECT: Command = Command {
    name: "gc",
    usage: "[OPTIONS]",
    about: "Remove what no manifest of a registry names",
    flags: &[
        Flag::text("format", "\"json\" for a document"),
        Flag::one("grace", "duration", "What was used so lately is left").default("24h"),
        Flag::text("root", "Directory of the registry's content; a registry may be running on it"),
        Flag::switch("untagged", "Manifests that no tag leads to are garbage"),
        Flag::one("upload-lifetime", "duration", "Forget uploads nobody went on with for so long")
            .default("168h"),
    ],
    operands: Operands::None,
    run: runs!(collect),
    ..Command::EMPTY
};

fn fault(error: brigantine_registry::Error) -> Fault {
    Fault::said(error.report())
}

fn time(matches: &Matches, name: &str) -> Outcome<Duration> {
    let nanoseconds = matches.duration(name)?.unwrap_or(0);
    let nanoseconds = u64::try_from(nanoseconds)
        .map_err(|_negative| matches.invalid(name, matches.text(name), "is negative"))?;
    Ok(Duration::from_nanos(nanoseconds))
}

fn path(matches: &Matches, name: &str) -> Option<PathBuf> {
    matches.optional(name).map(PathBuf::from)
}

/// Flags that mean something only beside another one.
fn needs(matches: &Matches, names: &[&str], other: &str) -> Outcome {
    match names.iter().find(|name| matches.given(name)) {
        Some(name) if !matches.given(other) => {
            Err(Fault::said(format!("--{name} means something only together with --{other}")))
        }
        _ => Ok(()),
    }
}

fn options(matches: &Matches) -> Outcome<Options> {
    needs(
        matches,
        &["cache-fresh", "cache-keep", "cache-insecure", "cache-password-file", "cache-username"],
        "cache-of",
    )?;
    needs(matches, &["token-issuer", "token-keys", "token-service"], "token-realm")?;
    needs(matches, &["anonymous-read", "realm"], "htpasswd")?;
    needs(matches, &["tls-key", "tls-client-ca"], "tls-cert")?;
    let listen = match matches.owned_list("listen") {
        none if none.is_empty() => vec!["127.0.0.1:5000".to_owned()],
        given => given,
    };
    let mut options = Options::new(String::new(), source(matches)?);
    options.listen = listen;
    options.read_only = matches.is("read-only");
    options.sparse = matches.is("allow-sparse");
    options.access = access(matches)?;
    if let Some(certificate) = path(matches, "tls-cert") {
        let key = path(matches, "tls-key").ok_or_else(|| Fault::said("--tls-cert needs --tls-key"))?;
        options.tls = Some(Tls { certificate, key, client_authority: path(matches, "tls-client-ca") });
    }
    if let Some(address) = matches.optional("metrics") {
        let parsed = address.parse();
        options.metrics =
            Some(parsed.map_err(|_error| matches.invalid("metrics", address, "is not an address:port"))?);
    }
    options.quotas = quotas(matches)?;
    options.collection = Collection {
        interval: Some(time(matches, "gc-interval")?).filter(|interval| !interval.is_zero()),
        grace: time(matches, "gc-grace")?,
        untagged: matches.is("gc-untagged"),
        uploads: time(matches, "upload-lifetime")?,
    };
    options.limits = Limits {
        chunk: matches.bytes("chunk-min")?.and_then(|bytes| u64::try_from(bytes).ok()),
        ..Limits::default()
    };
    Ok(options)
}

fn source(matches: &Matches) -> Outcome<Source> {
    let root = path(matches, "root");
    if let Some(store) = path(matches, "engine-store") {
        if root.is_some() || matches.given("cache-of") {
            return Err(Fault::said(
                "--engine-store serves an engine's images: there is no --root or --cache-of then",
            ));
        }
        return Ok(Source::Engine(store));
    }
    let root =
        root.ok_or_else(|| Fault::said("--root is missing: the directory of the registry's content"))?;
    let Some(url) = matches.optional("cache-of") else { return Ok(Source::Storage(root)) };
    let credentials = match (matches.optional("cache-username"), path(matches, "cache-password-file")) {
        (None, None) => None,
        (Some(username), Some(file)) => {
            let password = std::fs::read_to_string(&file)
                .map_err(Fault::io(format_args!("reading {}", file.display())))?;
            let password = password.trim_end_matches(['\r', '\n']).to_owned();
            Some(Credentials::Password { username: username.to_owned(), password })
        }
        _ => return Err(Fault::said("--cache-username and --cache-password-file belong together")),
    };
    let upstream = Upstream {
        url: url.to_owned(),
        credentials,
        fresh: time(matches, "cache-fresh")?,
        keep: Some(time(matches, "cache-keep")?).filter(|keep| !keep.is_zero()),
        config: Config { insecure: matches.owned_list("cache-insecure"), ..Config::for_host() },
    };
    Ok(Source::Cache { root, upstream: Box::new(upstream) })
}

fn access(matches: &Matches) -> Outcome<Access> {
    match (path(matches, "htpasswd"), matches.optional("token-realm")) {
        (Some(_), Some(_)) => {
            Err(Fault::said("--htpasswd and --token-realm exclude each other: users are asked one way"))
        }
        (Some(file), None) => Ok(Access::Htpasswd {
            file,
            realm: matches.text("realm").to_owned(),
            anonymous_read: matches.is("anonymous-read"),
        }),
        (None, Some(realm)) => {
            let needed = |name: &str| {
                matches.optional(name).ok_or_else(|| Fault::said(format!("--token-realm needs --{name}")))
            };
            Ok(Access::Token {
                realm: realm.to_owned(),
                service: needed("token-service")?.to_owned(),
                issuer: needed("token-issuer")?.to_owned(),
                keys: PathBuf::from(needed("token-keys")?),
            })
        }
        (None, None) => Ok(Access::Open),
    }
}

fn quotas(matches: &Matches) -> Outcome<Quotas> {
    let mut quotas = Quotas::default();
    for given in matches.list("quota") {
        let (name, bytes) = given.split_once('=').map_or((None, given), |(name, bytes)| (Some(name), bytes));
        let bytes = units::parse_bytes(bytes)
            .and_then(|bytes| u64::try_from(bytes).map_err(|_negative| "is negative".to_owned()))
            .map_err(|why| matches.invalid("quota", given, &why))?;
        match name {
            None => quotas.default = Some(bytes),
            Some(name) => quotas.named.push((name.to_owned(), bytes)),
        }
    }
    Ok(quotas)
}

async fn serve(_context: &Context, matches: Matches) -> Outcome {
    let options = options(&matches)?;
    start_log(&matches)?;
    // The client's own runtime has one thread.
    let served = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(Fault::io("starting"))?;
        runtime.block_on(run(options))
    });
    served.await.map_err(|error| Fault::said(error.to_string()))?
}

async fn run(options: Options) -> Outcome {
    use tokio::signal::unix::{SignalKind, signal};
    let catch = |kind| signal(kind).map_err(Fault::io("catching signals"));
    let (mut interrupt, mut terminate) = (catch(SignalKind::interrupt())?, catch(SignalKind::terminate())?);
    let secure = options.tls.is_some();
    let server = Server::bind(options).await.map_err(fault)?;
    for address in server.addresses().map_err(Fault::io("listening"))? {
        let scheme = if secure { "https" } else { "http" };
        output::line(&format!("listening on {scheme}://{address}"));
    }
    if let Some(address) = server.metrics_address() {
        output::line(&format!("metrics on http://{address}/metrics"));
    }
    server
        .run(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        })
        .await;
    Ok(())
}

/// The log goes to standard error, one line a request.
fn start_log(matches: &Matches) -> Outcome {
    let level = matches.text("log-level");
    if !["trace", "debug", "info", "warn", "error"].contains(&level) {
        return Err(matches.invalid("log-level", level, "is not trace, debug, info, warn or error"));
    }
    let below = if level == "trace" { "trace" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::new(format!("{below},brigantine_registry={level}"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match matches.text("log-format") {
        "text" => tracing::subscriber::set_global_default(builder.finish()),
        "json" => tracing::subscriber::set_global_default(builder.json().finish()),
        other => return Err(matches.invalid("log-format", other, "is neither text nor json")),
    };
    started.map_err(|error| Fault::said(error.to_string()))
}

async fn collect(_context: &Context, matches: Matches) -> Outcome {
    let root = path(&matches, "root")
        .ok_or_else(|| Fault::said("--root is missing: the directory of the registry's content"))?;
    let collection = Collection {
        interval: None,
        grace: time(&matches, "grace")?,
        untagged: matches.is("untagged"),
        uploads: time(&matches, "upload-lifetime")?,
    };
    let collected = server::collect(&root, &collection).await.map_err(fault)?;
    if matches.text("format") == "json" {
        let text = serde_json::to_string(&collected).map_err(|error| Fault::said(error.to_string()))?;
        output::line(&text);
        return Ok(());
    }
    output::line(&format!("Removed manifests:     {}", collected.manifests));
    output::line(&format!("Removed blobs:         {}", collected.blobs));
    output::line(&format!("Removed repositories:  {}", collected.repositories));
    output::line(&format!("Reclaimed space:       {}", units::human_size(collected.bytes as f64, 4)));
    Ok(())
}
