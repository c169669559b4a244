//! `brig login` and `brig logout`.

use std::io::Read as _;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::config::{Config, Credentials, HUB};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::{output, terminal};

pub static LOGIN: Command = Command {
    name: "login",
    usage: "[OPTIONS] [SERVER]",
    about: "Log in to a registry",
    flags: &[
        Flag::text("password", "Password or token").short('p'),
        Flag::switch("password-stdin", "Read the password from standard input"),
        Flag::text("username", "User name").short('u'),
    ],
    operands: Operands::AtMost(1),
    run: runs!(login),
    ..Command::EMPTY
};

pub static LOGOUT: Command = Command {
    name: "logout",
    usage: "[SERVER]",
    about: "Log out of a registry",
    operands: Operands::AtMost(1),
    run: runs!(logout),
    ..Command::EMPTY
};

/// The key of a server in the configuration; docker's hub has one of its own.
fn key_of(server: &str) -> String {
    let bare = server.split_once("://").map_or(server, |(_, rest)| rest);
    let host = bare.split('/').next().unwrap_or(bare);
    match host {
        "" | "docker.io" | "index.docker.io" | "registry-1.docker.io" => HUB.to_owned(),
        host => host.to_owned(),
    }
}

async fn login(context: &Context, matches: Matches) -> Outcome {
    let server = key_of(matches.operand(0));
    let mut username = matches.text("username").to_owned();
    let mut password = matches.text("password").to_owned();
    if matches.is("password-stdin") {
        if !password.is_empty() {
            return Err(Fault::said(
                "conflicting options: cannot specify both --password and --password-stdin",
            ));
        }
        if username.is_empty() {
            return Err(Fault::said("the --password-stdin option requires --username to be set"));
        }
        std::io::stdin().read_to_string(&mut password).map_err(Fault::io("reading the password"))?;
        password.truncate(password.trim_end_matches(['\r', '\n']).len());
    } else if !password.is_empty() {
        output::error_line("WARNING! Using --password via the CLI is insecure. Use --password-stdin.");
    }
    let mut config = Config::load(&context.config_dir)?;
    let stored = config.credentials(&server)?;
    let from_store = username.is_empty() && password.is_empty() && !stored.is_empty();
    if from_store {
        output::error_line("Authenticating with existing credentials...");
    } else if username.is_empty() || password.is_empty() {
        if !terminal::stdin_is_terminal() {
            return Err(Fault::said("Error: Cannot perform an interactive login from a non TTY device"));
        }
        if username.is_empty() {
            output::write("Username: ");
            std::io::stdin().read_line(&mut username).map_err(Fault::io("reading the user name"))?;
            username = username.trim().to_owned();
        }
        if password.is_empty() {
            password = terminal::read_secret("Password: ").map_err(Fault::io("reading the password"))?;
        }
        if username.is_empty() || password.is_empty() {
            return Err(Fault::said("Error: a user name and a password are required"));
        }
    }
    let mut credentials = if from_store {
        stored
    } else {
        Credentials { username, password, serveraddress: server.clone(), ..Credentials::default() }
    };
    let answer = context.client.post("/auth").json(&credentials)?.send().await?.value().await?;
    let token = answer.at("IdentityToken").text();
    if !token.is_empty() {
        token.clone_into(&mut credentials.identitytoken);
        credentials.password.clear();
    }
    if config.keeps_in_file(&server)? && !from_store {
        output::error_line(&format!(
            "\nWARNING! Your credentials are stored unencrypted in '{}'.\nConfigure a credential helper to avoid this.\n",
            config.path().display()
        ));
    }
    config.store(&server, &credentials)?;
    let status = answer.at("Status").text();
    output::line(if status.is_empty() { "Login Succeeded" } else { status });
    Ok(())
}

async fn logout(context: &Context, matches: Matches) -> Outcome {
    let server = key_of(matches.operand(0));
    let mut config = Config::load(&context.config_dir)?;
    if config.erase(&server)? {
        output::line(&format!("Removing login credentials for {server}"));
    } else {
        output::line(&format!("Not logged in to {server}"));
    }
    Ok(())
}
