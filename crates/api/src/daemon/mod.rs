//! `brig daemon`: from arguments to a serving engine, and orderly to its end.
//!
//! Invariant: containers do not depend on this process. Ending it ends the serving, nothing else.

pub mod authorization;
pub mod lock;
pub mod logging;
pub mod metrics;
pub mod notify;
pub mod options;
pub mod projects;
pub mod settings;
pub mod socket;
pub mod table;
pub mod tls;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, RwLock};
use std::time::Instant;

use brigantine_engine::Engine;
use brigantine_engine::events::Kind;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::http::error::chain;
use crate::http::server::Server;
use crate::routes::{self, State};
use options::{Live, Options};
use settings::{CommandLine, Given, SettingsError};

/// Where the configuration file is unless `--config-file` says otherwise; it need not exist there.
pub const CONFIG_FILE: &str = "/etc/brigantine/daemon.json";

/// The word behind `brig daemon` that makes the process the engine's network helper instead. Only daemons say it.
const NETWORK_HELPER: &str = "network-helper";

/// What handlers may ask about the daemon itself.
pub struct Daemon {
    pub options: Options,
    live: RwLock<Live>,
}

impl Daemon {
    pub fn new(options: Options) -> Self {
        Self { live: RwLock::new(options.live.clone()), options }
    }

    /// Authorization plugins, in the order that they are asked in.
    pub fn authorization(&self) -> Arc<[String]> {
        let live = self.live.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        Arc::clone(&live.authorization_plugins)
    }

    /// The settings that a SIGHUP may have changed, as they are now.
    pub fn live(&self) -> Live {
        self.live.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Lock(#[from] lock::LockError),
    #[error(transparent)]
    Listen(#[from] socket::ListenError),
    #[error("start the engine: {0}")]
    Engine(String),
    #[error("use the authorization plugins: {0}")]
    Authorization(String),
    #[error("start the runtime for requests")]
    Io(#[from] std::io::Error),
}

/// Runs the daemon until it is told to stop. `args` are those after `brig daemon`.
#[expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the command's own output")]
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut args = args.into_iter().peekable();
    if args.peek().is_some_and(|first| first == NETWORK_HELPER) {
        let _level = logging::start(options::LogFormat::Text, options::LogLevel::Warn);
        return brigantine_network::helper::main();
    }
    let loaded = settings::command_line(args).and_then(|line| {
        if line.help || line.version {
            return Ok((line, None));
        }
        let loaded = load(&line)?;
        Ok((line, Some(loaded)))
    });
    let (line, loaded) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            eprintln!("brig daemon: {}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    if line.help {
        print!("{}", settings::help());
        return ExitCode::SUCCESS;
    }
    let Some((options, warnings)) = loaded else {
        println!("brig daemon version {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    };
    if line.validate {
        println!("configuration OK");
        return ExitCode::SUCCESS;
    }
    let level = logging::start(options.log_format, options.live.level());
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    match run(options, &line, &level) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Joins command line and configuration file.
fn load(line: &CommandLine) -> Result<(Options, Vec<String>), SettingsError> {
    let given = gather(line)?;
    let warnings = settings::review(&given)?;
    Ok((Options::from_given(&given)?, warnings))
}

fn gather(line: &CommandLine) -> Result<Given, SettingsError> {
    let path = line.config_file.clone().unwrap_or_else(|| PathBuf::from(CONFIG_FILE));
    if line.config_file.is_none() && !path.exists() {
        return Ok(line.given.clone());
    }
    settings::merge(line.given.clone(), settings::read_file(&path)?, &path)
}

fn run(options: Options, line: &CommandLine, level: &logging::LevelHandle) -> Result<(), StartError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("brig").build()?;
    let result = runtime.block_on(serve(options, line, level));
    // Blocking work that is still going on (a layer being extracted) is safe to lose at any point.
    runtime.shutdown_background();
    result
}

async fn serve(options: Options, line: &CommandLine, level: &logging::LevelHandle) -> Result<(), StartError> {
    let began = Instant::now();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    lock::private_dir(&options.engine.data_root)?;
    let _lock = lock::RootLock::take(&options.engine.data_root)?;
    lock::private_dir(&options.engine.exec_root)?;
    let _pidfile = lock::PidFile::write(&options.pidfile)?;
    let sockets = socket::listen(
        &options.hosts,
        options.group.as_deref(),
        &options.engine.exec_root,
        options.tls.as_ref(),
    )?;
    let metrics = match &options.metrics {
        Some(address) => Some(
            metrics::listen(address)
                .await
                .map_err(|source| socket::ListenError::Tcp { address: *address, source })?,
        ),
        None => None,
    };

    let mut config = options.engine.clone();
    // This very executable, also when its file was replaced meanwhile.
    config.network_helper = ["/proc/self/exe", "daemon", NETWORK_HELPER].map(OsString::from).to_vec();
    let engine = Engine::open(config).await.map_err(|error| StartError::Engine(error.report()))?;
    let daemon = Arc::new(Daemon::new(options));
    let state = State::new(engine.clone(), Arc::clone(&daemon));
    let authorization = Arc::new(authorization::Authorization::new(Arc::clone(&daemon)));
    authorization.check().await.map_err(|error| StartError::Authorization(error.report()))?;
    let state = state.with_gate(authorization.clone());
    let server = Arc::new(Server::new(routes::bind(), state.clone()).with_gate(authorization));
    state.sockets.open_all(&state);
    tokio::spawn(engine.clone().keep_build_cache());

    let (stop, stopped) = watch::channel(false);
    let mut serving = tokio::task::JoinSet::new();
    let mut made = Vec::new();
    for mut socket in sockets {
        if let Some(listener) = socket.listener.take() {
            serving.spawn(Arc::clone(&server).serve(listener, stopped.clone()));
        }
        made.push(socket);
    }
    if let Some(listener) = metrics {
        serving.spawn(metrics::serve(listener, engine.clone(), stopped.clone()));
    }
    notify::notify("READY=1\nSTATUS=serving the Engine API");
    let hosts: Vec<String> = daemon.options.hosts.iter().map(ToString::to_string).collect();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        root = %daemon.options.engine.data_root.display(),
        hosts = hosts.join(" "),
        elapsed = ?began.elapsed(),
        "ready"
    );

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => {
                notify::notify(&notify::reloading());
                reload(&daemon, &state, line, level);
                notify::notify("READY=1");
            }
        }
    }
    notify::notify("STOPPING=1");
    tracing::info!("stopping; containers keep running");
    // Nobody waits on our receiver being gone.
    stop.send_replace(true);
    state.sockets.close_all().await;
    while serving.join_next().await.is_some() {}
    drop(made);
    // Layers that a reboot would otherwise have to extract again.
    if let Err(error) = engine.images().with(brigantine_image::Store::settle).await {
        tracing::warn!(error = error.report(), "sync extracted layers");
    }
    let builder = engine.builder().clone();
    match tokio::task::spawn_blocking(move || builder.settle()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = error.report(), "sync the build cache"),
        Err(error) => tracing::warn!(%error, "sync the build cache"),
    }
    Ok(())
}

/// SIGHUP: takes over the settings that may change while running; a broken file changes nothing.
fn reload(daemon: &Daemon, state: &State, line: &CommandLine, level: &logging::LevelHandle) {
    let new = gather(line).and_then(|given| {
        settings::review(&given)?;
        Options::from_given(&given)
    });
    let new = match new {
        Ok(options) => options,
        Err(error) => {
            tracing::error!(error = chain(&error), "the configuration was not reloaded");
            return;
        }
    };
    if new.hosts != daemon.options.hosts || new.engine.data_root != daemon.options.engine.data_root {
        tracing::warn!("some changed settings take effect only when the daemon starts again");
    }
    level.set(new.live.level());
    *daemon.live.write().unwrap_or_else(std::sync::PoisonError::into_inner) = new.live.clone();
    state.reconfigured(&new.live);
    let attributes = BTreeMap::from([("name".to_owned(), state.engine.id().to_owned())]);
    state.engine.events().publish(Kind::Daemon, "reload", state.engine.id(), attributes);
    tracing::info!("the configuration was reloaded");
}

/// The default socket of a root, for the client that starts a daemon by itself.
pub fn default_socket(exec_root: &Path) -> PathBuf {
    exec_root.join("brig.sock")
}
