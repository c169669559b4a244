//! The programs of iptables, for one family: reading the rules of the kernel, and changing them in one transaction a table.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::error::Error;

/// The programs of one family.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    pub is_ipv4: bool,
    restore: PathBuf,
    save: PathBuf,
    is_legacy: bool,
}

/// Whether the programs for IPv4 are there.
pub(super) fn is_there() -> bool {
    Programs::find(true).is_some()
}

impl Programs {
    /// Those that work without nf_tables, if they can be told apart by their names, go before.
    pub fn find(is_ipv4: bool) -> Option<Self> {
        let family = if is_ipv4 { "iptables" } else { "ip6tables" };
        [true, false].into_iter().find_map(|by_name| {
            let base = if by_name { format!("{family}-legacy") } else { family.to_owned() };
            let (restore, save) = (find(&format!("{base}-restore"))?, find(&format!("{base}-save"))?);
            let is_legacy = by_name || !version(&save).contains("nf_tables");
            Some(Self { is_ipv4, restore, save, is_legacy })
        })
    }

    /// The rules of all tables, as they are saved.
    pub fn saved(&self) -> Result<String, Error> {
        run(&self.save, &[], "", |_pid| {})
    }

    /// Carries out what `text` says, table by table; rules that it does not name stay. `begins` is told the program's
    /// process id before it does anything.
    pub fn restore(&self, text: &str, begins: impl FnOnce(u32)) -> Result<(), Error> {
        run(&self.restore, &["--noflush", "--wait", "10"], text, begins).map(|_nothing| ())
    }

    /// They change what the kernel's `ip_tables` has, and not nf_tables in its place.
    pub fn is_legacy(&self) -> bool {
        self.is_legacy
    }

    /// What the kernel says of its tables without a program: the same as long as nobody changes them. `None` if it does
    /// not tell.
    pub fn fingerprint(&self, tables: &[&str]) -> Option<Vec<Vec<u8>>> {
        if !self.is_legacy {
            return None;
        }
        tables.iter().map(|table| brigantine_sys::xtables::info(self.is_ipv4, table).ok()).collect()
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    dirs.map(|dir| dir.join(program)).find(|file| file.is_file())
}

fn version(program: &PathBuf) -> String {
    run(program, &["--version"], "", |_pid| {}).unwrap_or_default()
}

fn run(
    program: &PathBuf,
    arguments: &[&str],
    input: &str,
    begins: impl FnOnce(u32),
) -> Result<String, Error> {
    let failed = |reason: String| Error::FirewallProgram { program: program.display().to_string(), reason };
    let io = |error: std::io::Error| failed(error.to_string());
    let mut child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(io)?;
    begins(child.id());
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut stdin) = stdin
                && let Err(error) = stdin.write_all(input.as_bytes())
            {
                // It says why it does not want more.
                tracing::debug!(%error, "write to a program of iptables");
            }
        });
        let messages = child.stderr.take().map(|mut stderr| {
            scope.spawn(move || {
                let mut text = String::new();
                stderr.read_to_string(&mut text).map(|_length| text)
            })
        });
        let mut output = String::new();
        if let Some(mut stdout) = stdout {
            stdout.read_to_string(&mut output).map_err(io)?;
        }
        let status = child.wait().map_err(io)?;
        let messages = messages.and_then(|thread| thread.join().ok()?.ok()).unwrap_or_default();
        if status.success() {
            return Ok(output);
        }
        let lines: Vec<&str> = messages.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let line = lines.iter().find(|line| !line.starts_with("Try `")).copied().unwrap_or_default();
        Err(failed(format!("{status}: {line}")))
    })
}
