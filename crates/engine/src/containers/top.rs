//! The processes of a container: as `ps -ef` shows them, read from the kernel; with other options by the host's `ps`.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::Containers;
use crate::error::Context;
use crate::{Error, Result};

impl Containers {
    /// The container's lines of `ps` with `arguments` (docker's default is `-ef`).
    pub async fn top(&self, reference: &str, arguments: &str) -> Result<Value> {
        let container = self.find(reference)?;
        let live = container.running()?;
        let pids = live
            .ask(brigantine_shim::Client::pids)
            .await
            .doing(|| format!("list the processes of container {}", container.id))?;
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let (titles, processes) = if let Some(columns) = columns(&words) {
            crate::blocking(move || Ok(table(&columns, &pids))).await?
        } else {
            select(&ps(&words).await?, &pids)?
        };
        self.publish(&container, "top", &[]);
        Ok(json!({ "Titles": titles, "Processes": processes }))
    }
}

/// What we can show ourselves, by the titles of `ps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    User,
    Uid,
    Pid,
    Ppid,
    Cpu,
    Started,
    Tty,
    Time,
    Command,
    Name,
    State,
    Rss,
    Size,
}

/// Names of columns as `-o` takes them, with their titles.
const NAMES: &[(&str, &str, Column)] = &[
    ("user", "USER", Column::User),
    ("euser", "EUSER", Column::User),
    ("uid", "UID", Column::Uid),
    ("pid", "PID", Column::Pid),
    ("ppid", "PPID", Column::Ppid),
    ("stime", "STIME", Column::Started),
    ("tty", "TT", Column::Tty),
    ("time", "TIME", Column::Time),
    ("args", "COMMAND", Column::Command),
    ("cmd", "CMD", Column::Command),
    ("command", "COMMAND", Column::Command),
    ("comm", "COMMAND", Column::Name),
    ("stat", "STAT", Column::State),
    ("s", "S", Column::State),
    ("rss", "RSS", Column::Rss),
    ("vsz", "VSZ", Column::Size),
];

/// The columns that are asked for, if all of them are known here.
fn columns(words: &[&str]) -> Option<Vec<(String, Column)>> {
    let titled = |list: &[(&str, Column)]| list.iter().map(|(title, c)| ((*title).to_owned(), *c)).collect();
    let list = match words {
        [] | ["-ef" | "-e" | "ef" | "-f"] => {
            return Some(titled(&[
                ("UID", Column::User),
                ("PID", Column::Pid),
                ("PPID", Column::Ppid),
                ("C", Column::Cpu),
                ("STIME", Column::Started),
                ("TTY", Column::Tty),
                ("TIME", Column::Time),
                ("CMD", Column::Command),
            ]));
        }
        ["-o" | "-eo", list] => *list,
        [one] => one.strip_prefix("-eo").or_else(|| one.strip_prefix("-o"))?,
        _ => return None,
    };
    let found: Option<Vec<(String, Column)>> = list
        .split(',')
        .map(|name| {
            NAMES
                .iter()
                .find(|(known, ..)| *known == name)
                .map(|(_, title, column)| ((*title).to_owned(), *column))
        })
        .collect();
    found.filter(|found| !found.is_empty())
}

type Table = (Vec<String>, Vec<Vec<String>>);

fn table(columns: &[(String, Column)], pids: &[i32]) -> Table {
    let clock = Clock::now();
    let names = passwd();
    let mut pids = pids.to_vec();
    pids.sort_unstable();
    let processes = pids
        .iter()
        .filter_map(|pid| Process::read(*pid))
        .map(|process| columns.iter().map(|(_, column)| process.show(*column, &clock, &names)).collect())
        .collect();
    (columns.iter().map(|(title, _)| title.clone()).collect(), processes)
}

/// The host's moments in the kernel's ticks.
struct Clock {
    ticks: u64,
    booted: i64,
    now: i64,
}

impl Clock {
    fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let booted = stat.lines().find_map(|line| line.strip_prefix("btime "));
        Self {
            ticks: rustix::param::clock_ticks_per_second().max(1),
            booted: booted.and_then(|text| text.trim().parse().ok()).unwrap_or_default(),
            now: jiff::Timestamp::now().as_second(),
        }
    }
}

/// The host's user names by id.
fn passwd() -> HashMap<u32, String> {
    let text = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let mut names = HashMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(Ok(uid))) = (fields.next(), fields.nth(1).map(str::parse)) {
            names.entry(uid).or_insert_with(|| name.to_owned());
        }
    }
    names
}

/// What `/proc/PID` says (proc(5)).
struct Process {
    pid: i32,
    ppid: i32,
    uid: u32,
    name: String,
    command: String,
    state: String,
    tty: u32,
    /// Ticks of CPU, and the tick of the start after the boot.
    used: u64,
    start: u64,
    /// KiB.
    rss: u64,
    size: u64,
}

impl Process {
    /// `None` when it is gone.
    fn read(pid: i32) -> Option<Self> {
        let file = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).ok();
        let stat = String::from_utf8_lossy(&file("stat")?).into_owned();
        let (before, after) = stat.rsplit_once(')')?;
        let name = before.split_once('(')?.1.to_owned();
        let fields: Vec<&str> = after.split_whitespace().collect();
        let number = |at: usize| fields.get(at).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
        let status = String::from_utf8_lossy(&file("status")?).into_owned();
        let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        let first = |name: &str| line(name).split_whitespace().next().unwrap_or_default().to_owned();
        let words = file("cmdline").unwrap_or_default();
        let words = String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ");
        Some(Self {
            pid,
            ppid: fields.get(1)?.parse().ok()?,
            uid: line("Uid:").split_whitespace().nth(1)?.parse().ok()?,
            command: if words.is_empty() { format!("[{name}]") } else { words },
            name,
            state: (*fields.first()?).to_owned(),
            tty: number(4) as u32,
            used: number(11) + number(12),
            start: number(19),
            rss: first("VmRSS:").parse().unwrap_or_default(),
            size: first("VmSize:").parse().unwrap_or_default(),
        })
    }

    fn show(&self, column: Column, clock: &Clock, names: &HashMap<u32, String>) -> String {
        let started = clock.booted + (self.start / clock.ticks) as i64;
        match column {
            Column::User => names.get(&self.uid).cloned().unwrap_or_else(|| self.uid.to_string()),
            Column::Uid => self.uid.to_string(),
            Column::Pid => self.pid.to_string(),
            Column::Ppid => self.ppid.to_string(),
            Column::Cpu => {
                let age = u64::try_from(clock.now - started).unwrap_or_default();
                (self.used * 100 / clock.ticks).checked_div(age).unwrap_or_default().min(99).to_string()
            }
            Column::Started => {
                let time = jiff::Timestamp::from_second(started).unwrap_or_default();
                let time = time.to_zoned(jiff::tz::TimeZone::system());
                let today = clock.now - started < 24 * 3600;
                time.strftime(if today { "%H:%M" } else { "%b%d" }).to_string()
            }
            Column::Tty => terminal(self.tty),
            Column::Time => {
                let seconds = self.used / clock.ticks;
                format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
            }
            Column::Command => self.command.clone(),
            Column::Name => self.name.clone(),
            Column::State => self.state.clone(),
            Column::Rss => self.rss.to_string(),
            Column::Size => self.size.to_string(),
        }
    }
}

/// A terminal's name by its device number: a pseudo-terminal's, a console's, or none.
fn terminal(device: u32) -> String {
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00);
    match (major, minor) {
        (0, 0) => "?".to_owned(),
        (136..=143, minor) => format!("pts/{}", (major - 136) * 256 + minor),
        (4, minor) if minor < 64 => format!("tty{minor}"),
        (4, minor) => format!("ttyS{}", minor - 64),
        _ => "?".to_owned(),
    }
}

async fn ps(words: &[&str]) -> Result<String> {
    let output = tokio::process::Command::new("ps").args(words).env("LC_ALL", "C").output().await.map_err(
        |error| {
            Error::internal(
                "error running ps: only -ef and -o with common columns work without it on the host",
            )
            .because(error)
        },
    )?;
    if !output.status.success() {
        return Err(Error::invalid(format!(
            "error running ps: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The titles, and the lines whose PID is one of `pids`.
fn select(output: &str, pids: &[i32]) -> Result<Table> {
    let mut lines = output.lines();
    let titles: Vec<String> =
        lines.next().unwrap_or_default().split_whitespace().map(str::to_owned).collect();
    let at = titles
        .iter()
        .position(|title| title == "PID")
        .ok_or_else(|| Error::invalid("Couldn't find PID field in ps output"))?;
    let processes = lines
        .filter_map(|line| {
            let mut fields: Vec<String> = Vec::new();
            let mut rest = line.trim_start();
            // The last column, the command, holds spaces.
            while fields.len() + 1 < titles.len() {
                let end = rest.find(char::is_whitespace)?;
                fields.push(rest[..end].to_owned());
                rest = rest[end..].trim_start();
            }
            fields.push(rest.trim_end().to_owned());
            let pid: i32 = fields[at].parse().ok()?;
            pids.contains(&pid).then_some(fields)
        })
        .collect();
    Ok((titles, processes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_containers_lines_are_kept() {
        let output = "UID   PID  CMD\nroot  1  /sbin/init splash\nroot  42  sleep 100 s\n";
        let (titles, processes) = select(output, &[42]).unwrap();
        assert_eq!(titles, ["UID", "PID", "CMD"]);
        assert_eq!(processes, [["root", "42", "sleep 100 s"]]);
        assert!(select("A B\n", &[]).is_err());
    }

    #[test]
    fn this_process_is_shown_without_ps() {
        let own = i32::try_from(std::process::id()).unwrap();
        let (titles, processes) = table(&columns(&[]).unwrap(), &[own, i32::MAX]);
        assert_eq!(titles, ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
        assert_eq!(processes.len(), 1);
        assert_eq!(processes[0][1], own.to_string());
        assert!(!processes[0][7].is_empty());
        assert_eq!(columns(&["-o", "pid,comm"]).unwrap().len(), 2);
        assert!(columns(&["aux"]).is_none() && columns(&["-o", "pid,weird"]).is_none());
    }

    #[test]
    fn terminals_by_device_number() {
        assert_eq!(terminal(0), "?");
        assert_eq!(terminal(136 << 8 | 5), "pts/5");
        assert_eq!(terminal(4 << 8 | 1), "tty1");
    }
}
