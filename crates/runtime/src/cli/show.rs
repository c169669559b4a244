//! `list` and `ps`.

use std::fs;
use std::process::Command;

use super::options::Options;
use super::record::{Dir, State};
use super::{Global, commands, print};
use crate::error::{Error, Kind};

pub(super) fn list(global: &Global, options: &Options) -> Result<(), Error> {
    let root = global.root();
    let entries = match fs::read_dir(&root) {
        Ok(entries) => entries.flatten().collect(),
        // Nothing has been made yet; a place that somebody names must be there.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !global.root_is_given() => Vec::new(),
        Err(e) => return Err(Error::os(format!("reading {}", root.display()), e)),
    };
    let mut records = Vec::new();
    for entry in entries {
        let name = entry.file_name();
        let Some(id) = name.to_str() else { continue };
        let dir = Dir::new(&root, id);
        // One that is being made or removed right now is not listed.
        if let Ok(record) = dir.load(id) {
            records.push((dir, record));
        }
    }
    records.sort_by(|(_, a), (_, b)| a.id.cmp(&b.id));
    if options.has("quiet") {
        let ids: Vec<&str> = records.iter().map(|(_, record)| record.id.as_str()).collect();
        return if ids.is_empty() { Ok(()) } else { print(&ids.join("\n")) };
    }
    let states: Vec<State<'_>> = records.iter().map(|(dir, record)| record.state(dir)).collect();
    match options.text("format") {
        Some("json") => {
            let text = serde_json::to_string(&states);
            print(&text.map_err(|e| Error::os("writing JSON", std::io::Error::from(e)))?)
        }
        None | Some("table") => {
            let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
            rows.extend(states.iter().map(|s| {
                let bundle = s.bundle.display().to_string();
                [s.id, &s.pid.to_string(), s.status, &bundle, s.created, &s.owner].map(str::to_owned)
            }));
            let widths: Vec<usize> =
                (0..6).map(|c| rows.iter().map(|r| r[c].len()).max().unwrap_or(0).max(9)).collect();
            let line = |row: &[String; 6]| {
                let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
                cells.collect::<Vec<_>>().join("   ").trim_end().to_owned()
            };
            print(&rows.iter().map(line).collect::<Vec<_>>().join("\n"))
        }
        Some(other) => Err(Error::invalid(format!("format {other:?} is not table or json"))),
    }
}

/// With a table, the host's `ps` says what it knows of the container's processes.
pub(super) fn ps(global: &Global, options: &Options) -> Result<(), Error> {
    let (_, record) = commands::open(global, options.id()?)?;
    let pids = record.processes()?;
    match options.text("format") {
        Some("json") => return print(&serde_json::Value::from(pids).to_string()),
        None | Some("table") => {}
        Some(other) => return Err(Error::invalid(format!("format {other:?} is not table or json"))),
    }
    let args = options.words.get(1..).unwrap_or_default();
    let mut command = Command::new("ps");
    if args.is_empty() {
        command.arg("-ef")
    } else {
        command.args(args)
    };
    let done = match command.output() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && args.is_empty() => return own_table(&pids),
        other => other.map_err(|e| Error::os("executing ps", e))?,
    };
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; ");
        return Err(Error::new(Kind::Os, format!("ps: {}: {said}", done.status)));
    }
    let text = String::from_utf8_lossy(&done.stdout);
    let mut lines = text.lines();
    let head = lines.next().unwrap_or_default();
    let column = head.split_whitespace().position(|word| word == "PID");
    let column = column.ok_or_else(|| Error::invalid("ps: its table has no PID column"))?;
    let ours = |line: &&str| {
        let number = line.split_whitespace().nth(column).and_then(|word| word.parse().ok());
        number.is_some_and(|number| pids.contains(&number))
    };
    let table: Vec<&str> = std::iter::once(head).chain(lines.filter(ours)).collect();
    print(&table.join("\n"))
}

/// For a host without `ps`.
fn own_table(pids: &[i32]) -> Result<(), Error> {
    let mut lines = vec!["PID   CMD".to_owned()];
    for pid in pids {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        lines.push(format!("{pid:<5} {}", command.trim_end()));
    }
    print(&lines.join("\n"))
}
