//! Help texts from the tables, laid out as docker lays out its own.

use super::{Command, Entry, Flag, Group, Kind};
use std::fmt::Write as _;

/// Docker wraps the help text of flags at this column when no terminal says otherwise.
const WIDTH: usize = 80;

pub fn usage_line(command: &Command, path: &str) -> String {
    if command.usage.is_empty() { path.to_owned() } else { format!("{path} {}", command.usage) }
}

/// How messages name a flag: `-m, --memory`.
pub fn flag_names(flag: &Flag) -> String {
    match flag.short {
        Some(short) => format!("-{short}, --{}", flag.long),
        None => format!("--{}", flag.long),
    }
}

pub fn command_help(command: &Command, path: &str, other_paths: &[String]) -> String {
    let mut out = format!("Usage:  {}\n\n{}\n", usage_line(command, path), command.about);
    if other_paths.len() > 1 {
        writeln!(out, "\nAliases:\n  {}", other_paths.join(", ")).unwrap_or_default();
    }
    if command.flags.iter().any(|f| !f.hidden) {
        out.push_str("\nOptions:\n");
        out.push_str(&flags_help(command.flags));
    }
    out
}

pub fn group_help(group: &Group, path: &str) -> String {
    let mut out = format!("Usage:  {path} COMMAND\n\n{}\n\nCommands:\n", group.about);
    let mut entries: Vec<&Entry> = group.entries.iter().filter(|e| !matches!(e, Entry::Absent(..))).collect();
    entries.sort_by_key(|e| e.name());
    list_entries(&mut out, &entries);
    writeln!(out, "\nRun '{path} COMMAND --help' for more information on a command.").unwrap_or_default();
    out
}

/// `  name   what it does`, names padded alike.
pub fn list_entries(out: &mut String, entries: &[&Entry]) {
    let width = entries.iter().map(|e| e.name().len()).max().unwrap_or(0).max(11);
    for entry in entries {
        writeln!(out, "  {:width$} {}", entry.name(), entry.about()).unwrap_or_default();
    }
}

pub fn flags_help(flags: &[Flag]) -> String {
    let mut shown: Vec<&Flag> = flags.iter().filter(|f| !f.hidden).collect();
    shown.sort_by_key(|f| f.long);
    let left: Vec<String> = shown
        .iter()
        .map(|f| {
            let short = f.short.map_or_else(|| "      ".to_owned(), |s| format!("  -{s}, "));
            let kind = match f.kind {
                Kind::Switch => String::new(),
                Kind::One(name) | Kind::List(name) => format!(" {name}"),
            };
            format!("{short}--{}{kind}", f.long)
        })
        .collect();
    let column = left.iter().map(String::len).max().unwrap_or(0) + 3;
    let mut out = String::new();
    for (flag, left) in shown.iter().zip(&left) {
        let mut text = flag.help.to_owned();
        if !flag.default.is_empty() {
            match flag.kind {
                Kind::One("string") => write!(text, " (default \"{}\")", flag.default),
                _ => write!(text, " (default {})", flag.default),
            }
            .unwrap_or_default();
        }
        write!(out, "{left:column$}").unwrap_or_default();
        for (index, piece) in wrap(&text, WIDTH.saturating_sub(column).max(24)).iter().enumerate() {
            if index > 0 {
                write!(out, "{:column$}", "").unwrap_or_default();
            }
            out.push_str(piece);
            out.push('\n');
        }
    }
    out
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.len() - 1;
        let line = &mut lines[last];
        if line.is_empty() {
            line.push_str(word);
        } else if line.len() + 1 + word.len() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}
