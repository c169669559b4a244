//! The daemon's own log on stderr.
//!
//! Invariant: the level can change while the daemon runs.

use tracing_subscriber::EnvFilter;

use super::options::{LogFormat, LogLevel};

/// Changes the level of the running log.
pub struct LevelHandle(Box<dyn Fn(EnvFilter) + Send + Sync>);

impl LevelHandle {
    pub fn set(&self, level: LogLevel) {
        (self.0)(filter(level));
    }
}

/// Starts logging. A subscriber that is already there (in tests) stays.
pub fn start(format: LogFormat, level: LogLevel) -> LevelHandle {
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false);
    // The two forms are different types all the way down.
    match format {
        LogFormat::Text => {
            let builder = builder.with_env_filter(filter(level)).with_filter_reloading();
            let handle = builder.reload_handle();
            install(builder.finish());
            LevelHandle(Box::new(move |filter| report(handle.reload(filter))))
        }
        LogFormat::Json => {
            let builder = builder.json().with_env_filter(filter(level)).with_filter_reloading();
            let handle = builder.reload_handle();
            install(builder.finish());
            LevelHandle(Box::new(move |filter| report(handle.reload(filter))))
        }
    }
}

fn install(subscriber: impl tracing::Subscriber + Send + Sync) {
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        tracing::debug!(%error, "a log was already there");
    }
}

fn report(changed: Result<(), impl std::fmt::Display>) {
    if let Err(error) = changed {
        tracing::warn!(%error, "changing the log level");
    }
}

/// Our own crates at the level; the libraries below only when something is wrong, or when tracing everything.
fn filter(level: LogLevel) -> EnvFilter {
    EnvFilter::new(match level {
        LogLevel::Trace => "trace",
        LogLevel::Debug => "debug,hyper=info,hyper_util=info,h2=info,rustls=info,reqwest=info",
        LogLevel::Info => "info,hyper=warn,hyper_util=warn,h2=warn,rustls=warn,reqwest=warn",
        LogLevel::Warn => "warn",
        LogLevel::Error => "error",
    })
}
