//! What every command may ask for: the client, and the user's configuration.

use std::cell::OnceCell;
use std::path::PathBuf;

use crate::client::{Client, Endpoint};
use crate::config::Config;
use crate::fault::Outcome;

pub struct Context {
    pub client: Client,
    pub config_dir: PathBuf,
    pub debug: bool,
    config: OnceCell<Config>,
}

impl Context {
    pub fn new(host: Option<&str>, config_dir: Option<&str>, debug: bool) -> Outcome<Self> {
        let config_dir = config_dir
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("DOCKER_CONFIG").map(PathBuf::from))
            .unwrap_or_else(|| {
                PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".docker")
            });
        Ok(Self { client: Client::new(Endpoint::choose(host)?), config_dir, debug, config: OnceCell::new() })
    }

    /// The configuration file, read when first asked for.
    pub fn config(&self) -> Outcome<&Config> {
        if let Some(config) = self.config.get() {
            return Ok(config);
        }
        let loaded = Config::load(&self.config_dir)?;
        Ok(self.config.get_or_init(|| loaded))
    }
}
