//! One call of one plugin: its environment, its input, and what it answers.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde_json::Value;

use super::Attaching;
use crate::error::Error;

/// How long a plugin may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// More than any result has.
const MOST: u64 = 1 << 20;

/// A program that somebody is still writing (ETXTBSY) is tried again.
const TRIES: u32 = 50;

pub(super) struct Call<'a> {
    pub network: &'a str,
    /// The plugin's type, which is its file's name.
    pub kind: &'a str,
    pub command: &'static str,
    pub at: &'a Attaching,
    pub input: &'a Value,
    pub path: &'a [PathBuf],
}

/// The executable of a plugin.
pub(super) fn find(path: &[PathBuf], kind: &str) -> Result<PathBuf, Error> {
    let is_executable = |file: &PathBuf| {
        std::fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    path.iter().map(|dir| dir.join(kind)).find(is_executable).ok_or_else(|| Error::NoCniPlugin {
        plugin: kind.to_owned(),
        dirs: path.iter().map(|dir| dir.display().to_string()).collect(),
    })
}

impl Call<'_> {
    /// The plugin's result; null if it says nothing, as all but ADD may.
    pub(super) fn make(&self) -> Result<Value, Error> {
        let file = find(self.path, self.kind)?;
        let answer = self.run(&file).map_err(|source| self.failed(source.to_string()))?;
        if !answer.succeeded {
            return Err(self.failed(complaint(&answer)));
        }
        if answer.output.iter().all(u8::is_ascii_whitespace) {
            return Ok(Value::Null);
        }
        match serde_json::from_slice(&answer.output) {
            Ok(value) => Ok(value),
            // Only a result is of interest.
            Err(_) if self.command != "ADD" => Ok(Value::Null),
            Err(error) => Err(self.failed(format!("its result is no JSON: {error}"))),
        }
    }

    fn failed(&self, reason: String) -> Error {
        Error::CniPlugin {
            plugin: self.kind.to_owned(),
            command: self.command,
            network: self.network.to_owned(),
            reason,
        }
    }

    fn spawn(&self, file: &Path) -> std::io::Result<Child> {
        let args: Vec<String> = self.at.args.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let path: Vec<String> = self.path.iter().map(|dir| dir.display().to_string()).collect();
        let mut command = Command::new(file);
        command
            .env("CNI_COMMAND", self.command)
            .env("CNI_CONTAINERID", &self.at.container)
            .env("CNI_NETNS", &self.at.netns)
            .env("CNI_IFNAME", &self.at.interface)
            .env("CNI_ARGS", args.join(";"))
            .env("CNI_PATH", path.join(":"))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        for _ in 1..TRIES {
            match command.spawn() {
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                result => return result,
            }
        }
        command.spawn()
    }

    fn run(&self, file: &Path) -> std::io::Result<Answer> {
        let mut child = self.spawn(file)?;
        let pid = Pid::from_child(&child);
        let input = serde_json::to_vec(self.input)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                let Some(mut stdin) = stdin else { return };
                if let Err(error) = stdin.write_all(&input) {
                    // One that does not read its configuration may still succeed.
                    tracing::debug!(%error, "a CNI plugin has not read its configuration");
                }
            });
            let output = scope.spawn(move || read(stdout));
            let errors = scope.spawn(move || read(stderr));
            let ended = ends_in_time(pid);
            if !matches!(ended, Ok(true)) {
                // Also what it has started, which would keep the pipes open.
                if let Err(error) = kill_process_group(pid, Signal::KILL) {
                    tracing::debug!(%error, "end a CNI plugin");
                }
            }
            let status = child.wait()?;
            let gone = |_panic| std::io::Error::other("a thread ended early");
            writer.join().map_err(gone)?;
            let (output, errors) = (output.join().map_err(gone)??, errors.join().map_err(gone)??);
            if !ended? {
                return Err(std::io::Error::other(format!(
                    "it has not ended within {} s and was killed",
                    PATIENCE.as_secs()
                )));
            }
            Ok(Answer { succeeded: status.success(), status: status.to_string(), output, errors })
        })
    }
}

struct Answer {
    succeeded: bool,
    status: String,
    output: Vec<u8>,
    errors: Vec<u8>,
}

fn read(pipe: Option<impl Read>) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let Some(mut pipe) = pipe else { return Ok(text) };
    pipe.by_ref().take(MOST).read_to_end(&mut text)?;
    // The rest is read and forgotten: nobody shall wait for a full pipe.
    std::io::copy(&mut pipe, &mut std::io::sink())?;
    if text.len() as u64 == MOST {
        return Err(std::io::Error::other("it says more than 1 MiB"));
    }
    Ok(text)
}

/// Whether the process ends before the patience does. It is not reaped.
fn ends_in_time(pid: Pid) -> std::io::Result<bool> {
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(ready) => return Ok(ready > 0),
        }
    }
}

/// A plugin's error in one line: what its document says, or the last line of its messages.
fn complaint(answer: &Answer) -> String {
    let said: Value = serde_json::from_slice(&answer.output).unwrap_or_default();
    let part = |name: &str| said[name].as_str().map(str::trim).filter(|text| !text.is_empty());
    let text = match (part("msg"), part("details")) {
        (Some(message), Some(details)) => format!("{message}: {details}"),
        (Some(text), None) | (None, Some(text)) => text.to_owned(),
        (None, None) => {
            let messages = String::from_utf8_lossy(&answer.errors);
            let last = messages.lines().rev().map(str::trim).find(|line| !line.is_empty());
            last.map_or_else(|| answer.status.clone(), |line| format!("{}: {line}", answer.status))
        }
    };
    let mut line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(500) {
        line.truncate(end);
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line() {
        let said = |output: &str, errors: &str| {
            complaint(&Answer {
                succeeded: false,
                status: "exit status: 1".to_owned(),
                output: output.as_bytes().to_vec(),
                errors: errors.as_bytes().to_vec(),
            })
        };
        assert_eq!(
            said(r#"{ "code": 11, "msg": "no address\n left", "details": "in 10.0.0.0/30" }"#, "ignored"),
            "no address left: in 10.0.0.0/30"
        );
        assert_eq!(said("", "first\nlast\n\n"), "exit status: 1: last");
        assert_eq!(said("nonsense", ""), "exit status: 1");
        assert!(said(&format!(r#"{{ "msg": "{}" }}"#, "x".repeat(9000)), "").len() < 600);
    }
}
