//! Credential helpers: programs `docker-credential-NAME` that keep users' secrets, asked with one word (`get`, `store`,
//! `erase`, `list`) on their command line and a document on their standard input, as docker's do.
//!
//! Invariants: a helper is given a limited time and may say a limited amount; what it says of a secret is in no error.

use std::collections::BTreeMap;
use std::io::{Read, Write as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::Credentials;
use crate::fault::{Fault, Outcome};

/// Longest answer: a list of very many registries.
const MOST: u64 = 1 << 20;
/// A helper may ask its user for a pass phrase.
const PATIENCE: Duration = Duration::from_mins(2);
/// Seconds that count instead.
const PATIENCE_VARIABLE: &str = "BRIG_CREDENTIAL_TIMEOUT";
/// The user name under which a token is kept that is no password.
const TOKEN: &str = "<token>";
/// How helpers say that they know nothing, with status 1.
const UNKNOWN: &str = "credentials not found in native keychain";

/// One helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Helper {
    program: String,
}

/// What a helper reads and writes.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Record {
    #[serde(rename = "ServerURL", default)]
    server_url: String,
    username: String,
    secret: String,
}

impl Helper {
    /// The helper that the configuration calls `name`.
    pub fn named(name: &str) -> Outcome<Self> {
        if name.is_empty() || name.contains('/') {
            return Err(Fault::said(format!(
                "credential helper {name:?}: the name of a program docker-credential-NAME on the PATH is expected"
            )));
        }
        Ok(Self { program: format!("docker-credential-{name}") })
    }

    /// What it keeps for the server; empty when that is nothing.
    pub fn get(&self, server: &str) -> Outcome<Credentials> {
        let answer = match self.run("get", server.as_bytes())? {
            Answer::Done(answer) => answer,
            Answer::Refused(said) if said.contains(UNKNOWN) => return Ok(Credentials::default()),
            Answer::Refused(said) => return Err(self.refused("get", &said)),
        };
        // The parser's own words could repeat a part of the secret.
        let record: Record = serde_json::from_slice(&answer).map_err(|error| {
            self.wrong(
                "get",
                &format!(
                    "answers with something else than {{\"Username\":…,\"Secret\":…}} (line {}, column {})",
                    error.line(),
                    error.column()
                ),
            )
        })?;
        let mut found = Credentials { serveraddress: server.to_owned(), ..Credentials::default() };
        if record.username == TOKEN {
            found.identitytoken = record.secret;
        } else {
            found.username = record.username;
            found.password = record.secret;
        }
        Ok(found)
    }

    pub fn store(&self, server: &str, credentials: &Credentials) -> Outcome {
        let token = !credentials.identitytoken.is_empty();
        let record = Record {
            server_url: server.to_owned(),
            username: if token { TOKEN.to_owned() } else { credentials.username.clone() },
            secret: if token { credentials.identitytoken.clone() } else { credentials.password.clone() },
        };
        let input = serde_json::to_vec(&record).map_err(|error| Fault::said(error.to_string()))?;
        match self.run("store", &input)? {
            Answer::Done(_) => Ok(()),
            Answer::Refused(said) => Err(self.refused("store", &said)),
        }
    }

    /// Forgets what it keeps for the server; false when that was nothing.
    pub fn erase(&self, server: &str) -> Outcome<bool> {
        match self.run("erase", server.as_bytes())? {
            Answer::Done(_) => Ok(true),
            Answer::Refused(said) if said.contains(UNKNOWN) => Ok(false),
            Answer::Refused(said) => Err(self.refused("erase", &said)),
        }
    }

    /// The servers it keeps something for.
    pub fn list(&self) -> Outcome<Vec<String>> {
        match self.run("list", b"")? {
            Answer::Done(answer) => {
                let known: BTreeMap<String, String> = serde_json::from_slice(&answer).map_err(|error| {
                    self.wrong("list", &format!("answers with something else than a map of servers: {error}"))
                })?;
                Ok(known.into_keys().collect())
            }
            Answer::Refused(said) => Err(self.refused("list", &said)),
        }
    }

    fn wrong(&self, verb: &str, what: &str) -> Fault {
        Fault::said(format!("credential helper {} {verb}: {what}", self.program))
    }

    fn refused(&self, verb: &str, said: &str) -> Fault {
        self.wrong(verb, if said.is_empty() { "failed and did not say why" } else { said })
    }

    fn run(&self, verb: &str, input: &[u8]) -> Outcome<Answer> {
        let mut child = Command::new(&self.program)
            .arg(verb)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => self.wrong(
                    verb,
                    "no such program on the PATH; install it, or take it out of \"credsStore\" and \"credHelpers\" in \
                     docker's config.json",
                ),
                _ => self.wrong(verb, &crate::output::os_text(&error)),
            })?;
        let patience = patience()?;
        let until = Instant::now() + patience;
        let (output, heard) = mpsc::channel();
        collect(child.stdout.take(), output.clone(), Heard::Output);
        collect(child.stderr.take(), output, Heard::Complaint);
        let mut stdin = child.stdin.take();
        if let Some(stdin) = &mut stdin
            && let Err(error) = stdin.write_all(input)
            && error.kind() != std::io::ErrorKind::BrokenPipe
        {
            return Err(self.wrong(verb, &format!("writing to it: {}", crate::output::os_text(&error))));
        }
        drop(stdin);
        let (mut output, mut complaint) = (None, None);
        while output.is_none() || complaint.is_none() {
            match heard.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Heard::Output(bytes)) => output = Some(bytes),
                Ok(Heard::Complaint(bytes)) => complaint = Some(bytes),
                Err(_) => break,
            }
        }
        let status = ended(&mut child, until).map_err(|error| {
            self.wrong(verb, &format!("waiting for it: {}", crate::output::os_text(&error)))
        })?;
        let (Some(status), Some(output), Some(complaint)) = (status, output, complaint) else {
            return Err(self.wrong(
                verb,
                &format!(
                    "does not answer within {} seconds and was ended ({PATIENCE_VARIABLE} sets how long it may take)",
                    patience.as_secs()
                ),
            ));
        };
        if output.len() as u64 > MOST {
            return Err(self.wrong(verb, &format!("says more than {MOST} bytes")));
        }
        if status.success() {
            return Ok(Answer::Done(output));
        }
        // Helpers complain on their standard output.
        let said = if output.trim_ascii().is_empty() { complaint } else { output };
        Ok(Answer::Refused(String::from_utf8_lossy(&said).trim().to_owned()))
    }
}

enum Answer {
    Done(Vec<u8>),
    /// It ended with another status than 0; what it said.
    Refused(String),
}

enum Heard {
    Output(Vec<u8>),
    Complaint(Vec<u8>),
}

fn patience() -> Outcome<Duration> {
    match std::env::var(PATIENCE_VARIABLE) {
        Err(_) => Ok(PATIENCE),
        Ok(text) => text.parse().map(Duration::from_secs).map_err(|error| {
            Fault::said(format!("{PATIENCE_VARIABLE}={text}: a number of seconds is expected: {error}"))
        }),
    }
}

/// Reads to the end, or a byte beyond what is allowed, on a thread of its own: what a helper leaves running may keep the
/// pipe open.
fn collect(pipe: Option<impl Read + Send + 'static>, to: mpsc::Sender<Heard>, as_what: fn(Vec<u8>) -> Heard) {
    let Some(pipe) = pipe else { return };
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // A pipe that breaks has ended. Nobody listens any more when the helper took too long.
        pipe.take(MOST + 1).read_to_end(&mut bytes).unwrap_or_default();
        to.send(as_what(bytes)).unwrap_or_default();
    });
}

/// How the child ended; `None` when it had to be ended.
fn ended(child: &mut Child, until: Instant) -> std::io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= until {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        // It has closed its pipes: all that is left is to end.
        std::thread::sleep(Duration::from_millis(1));
    }
}
