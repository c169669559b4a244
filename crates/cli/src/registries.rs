//! A client for registries in this process, for the commands that need no engine.

use brigantine_image::Reference;
use brigantine_registry::{Client, Config, Credentials, Error};

use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::images;

/// A client that trusts what this machine is set up to trust, and `insecure` hosts without TLS.
pub fn client(insecure: Vec<String>, hosts: Option<&str>) -> Client {
    let mut config = Config { insecure, ..Config::for_host() };
    if let Some(hosts) = hosts {
        config.hosts.insert(0, hosts.into());
    }
    Client::new(config)
}

/// The user's credentials for a reference's registry.
pub fn credentials(context: &Context, reference: &Reference) -> Outcome<Option<Credentials>> {
    let found = images::credentials(context, reference)?;
    if !found.registrytoken.is_empty() {
        return Ok(Some(Credentials::Registry { token: found.registrytoken }));
    }
    if !found.identitytoken.is_empty() {
        return Ok(Some(Credentials::Identity { username: found.username, token: found.identitytoken }));
    }
    if found.username.is_empty() {
        return Ok(None);
    }
    Ok(Some(Credentials::Password { username: found.username, password: found.password }))
}

pub fn fault(error: Error) -> Fault {
    Fault::said(error.report())
}
