//! The tree of commands, and the way from a command line to an exit status.

mod append;
mod append_output;
mod attach;
mod bootstrap;
mod build;
mod build_cache;
mod build_call;
mod build_context;
mod build_layout;
mod build_lend;
mod build_output;
mod build_receive;
mod build_view;
mod builder;
mod builder_cache;
mod check;
mod commit;
mod completion;
mod copy;
mod cp;
mod create;
mod daemon;
mod diff;
mod doctor;
mod events;
mod exec;
mod explore;
mod export;
mod history;
mod images;
mod import;
mod info;
mod inspect;
mod kill;
mod load;
mod login;
mod logs;
mod manifest;
mod network;
mod pause;
mod port;
mod prune;
mod ps;
mod pull;
mod push;
mod registry;
mod rename;
mod restart;
mod rm;
mod rmi;
mod run;
mod save;
mod sbom;
mod search;
mod socket;
mod start;
mod stats;
mod stop;
mod system;
mod tag;
mod top;
mod tree;
mod update;
mod upload;
mod version;
mod volume;
mod wait;

use crate::args::{self, Entry, Flag, Group, Leading, Parsed, Verb};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::{output, terminal};

use tree::ROOT;

/// Options that come before the command.
static GLOBAL: &[Flag] = &[
    Flag::text("config", "Directory of the client's configuration"),
    Flag::text("context", "Accepted, if it is \"default\"").short('c').hidden(),
    Flag::switch("debug", "Say more").short('D'),
    Flag::list("host", "Socket of the engine to talk to").short('H'),
    Flag::text("log-level", "How much to say: debug, info, warn, error, fatal").short('l').default("info"),
    Flag::switch("tls", "Not built yet").hidden(),
    Flag::text("tlscacert", "Not built yet").hidden(),
    Flag::text("tlscert", "Not built yet").hidden(),
    Flag::text("tlskey", "Not built yet").hidden(),
    Flag::switch("tlsverify", "Not built yet").hidden(),
    Flag::switch("version", "Print the client's version").short('v'),
];

/// Runs one command line; the exit status is what is left to say.
pub fn main(argv: &[String]) -> i32 {
    // The daemon runs on a runtime of its own making.
    if argv.first().is_some_and(|word| word == "daemon") {
        return daemon::main(&argv[1..]);
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error_line(&format!("brig: starting: {error}"));
            return 1;
        }
    };
    let result = runtime.block_on(dispatch(argv));
    // A thread may be waiting for input that never comes: it does not hold up the exit.
    runtime.shutdown_background();
    terminal::restore();
    match result {
        Ok(()) => 0,
        Err(fault) => {
            if !matches!(fault, Fault::Exit(_)) {
                output::error_line(&fault.to_string());
            }
            fault.code()
        }
    }
}

async fn dispatch(argv: &[String]) -> Outcome {
    let (given, words) = match args::parse_leading(GLOBAL, argv) {
        Ok(Leading::Help) => {
            output::write(&top_help());
            return Ok(());
        }
        Ok(Leading::Words(given, words)) => (given, words),
        Err(text) => {
            return Err(Fault::Usage {
                text: format!(
                    "{text}\n\nUsage:  brig [OPTIONS] COMMAND [ARG...]\n\nRun 'brig --help' for more information"
                ),
                code: 125,
            });
        }
    };
    let global =
        |name: &str| given.iter().rev().find(|(long, _)| *long == name).map(|(_, value)| value.as_str());
    if global("version") == Some("true") {
        output::line(&format!("Brigantine version {}", env!("CARGO_PKG_VERSION")));
        return Ok(());
    }
    if let Some(flag) =
        ["tls", "tlscacert", "tlscert", "tlskey", "tlsverify"].iter().find(|flag| global(flag).is_some())
    {
        return Err(Fault::said(format!("--{flag}: TLS to a remote engine is not built yet")));
    }
    if let Some(name) = global("context").filter(|name| *name != "default") {
        return Err(Fault::said(format!(
            "context {name:?}: contexts are not built yet; use -H or $BRIG_HOST"
        )));
    }
    let context = Context::new(global("host"), global("config"), global("debug") == Some("true"))?;
    match words.split_first() {
        None => {
            output::write(&top_help());
            Ok(())
        }
        Some((help, rest)) if help == "help" => help_on(rest),
        Some((word, rest)) => descend(&context, &ROOT, "brig", word, rest).await,
    }
}

async fn descend(
    context: &Context,
    mut group: &'static Group,
    path: &str,
    word: &str,
    rest: &[String],
) -> Outcome {
    let mut path = path.to_owned();
    let (mut word, mut rest) = (word, rest);
    loop {
        let Some(entry) = group.entries.iter().find(|entry| entry.answers_to(word)) else {
            return Err(unknown(&path, word, std::ptr::eq(group, &raw const ROOT)));
        };
        path = format!("{path} {word}");
        match entry {
            Entry::Absent(name, _) => {
                return Err(Fault::said(format!(
                    "brig: '{path}' is not built yet: {name} is one of docker's commands that this engine does not have so far (docs/compat.md lists them)"
                )));
            }
            Entry::Command(verb) => {
                return match args::parse(verb.command, &path, rest)? {
                    Parsed::Help => {
                        output::write(&args::command_help(verb.command, &path, &paths_of(verb)));
                        Ok(())
                    }
                    Parsed::Run(matches) => (verb.command.run)(context, matches).await,
                };
            }
            Entry::Group(inner) => {
                group = inner;
                match rest.split_first() {
                    None => {
                        output::write(&args::group_help(inner, &path));
                        return Ok(());
                    }
                    Some((flag, _)) if flag == "--help" || flag == "-h" => {
                        output::write(&args::group_help(inner, &path));
                        return Ok(());
                    }
                    Some((flag, _)) if flag.starts_with('-') => {
                        return Err(Fault::Usage {
                            text: format!(
                                "unknown flag: {flag}\n\nUsage:  {path} COMMAND\n\nRun '{path} --help' for more information"
                            ),
                            code: 125,
                        });
                    }
                    Some((next, after)) => (word, rest) = (next.as_str(), after),
                }
            }
        }
    }
}

fn unknown(path: &str, word: &str, at_top: bool) -> Fault {
    let usage = if at_top { String::new() } else { format!("\nUsage:  {path} COMMAND\n") };
    let mut near: Vec<&str> = tree::ROOT
        .entries
        .iter()
        .map(Entry::name)
        .filter(|name| at_top && word.len() > 1 && (name.starts_with(word) || distance(name, word) < 2))
        .collect();
    near.sort_unstable();
    let hint =
        if near.is_empty() { String::new() } else { format!("\nDid you mean: {}?\n", near.join(", ")) };
    Fault::Usage {
        text: format!(
            "brig: unknown command: {path} {word}\n{usage}{hint}\nRun '{path} --help' for more information"
        ),
        code: 1,
    }
}

/// Edits between two words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

fn help_on(words: &[String]) -> Outcome {
    let mut group: &'static Group = &ROOT;
    let mut path = "brig".to_owned();
    for word in words {
        let Some(entry) = group.entries.iter().find(|entry| entry.answers_to(word)) else {
            return Err(unknown(&path, word, false));
        };
        path = format!("{path} {word}");
        match entry {
            Entry::Group(inner) => group = inner,
            Entry::Command(verb) => {
                output::write(&args::command_help(verb.command, &path, &paths_of(verb)));
                return Ok(());
            }
            Entry::Absent(..) => {
                output::line(&format!("'{path}' is not built yet"));
                return Ok(());
            }
        }
    }
    output::write(&if words.is_empty() { top_help() } else { args::group_help(group, &path) });
    Ok(())
}

/// Every way to call the same command.
fn paths_of(verb: &Verb) -> Vec<String> {
    fn walk(group: &Group, path: &str, verb: &Verb, found: &mut Vec<String>) {
        for entry in group.entries {
            match entry {
                Entry::Group(inner) => walk(inner, &format!("{path} {}", inner.name), verb, found),
                Entry::Command(other) if std::ptr::eq(other.command, verb.command) => {
                    found.push(format!("{path} {}", other.name));
                    found.extend(other.aliases.iter().map(|alias| format!("{path} {alias}")));
                }
                _ => {}
            }
        }
    }
    let mut found = Vec::new();
    walk(&ROOT, "brig", verb, &mut found);
    found.sort_by_key(|path| std::cmp::Reverse(path.matches(' ').count()));
    found
}

const COMMON: &[&str] =
    &["run", "exec", "ps", "pull", "push", "images", "login", "logout", "version", "info", "daemon"];

fn top_help() -> String {
    let mut out = "Usage:  brig [OPTIONS] COMMAND\n\nContainers, images and their engine, in one program\n\nCommon Commands:\n".to_owned();
    let find = |name: &&str| ROOT.entries.iter().find(|entry| entry.name() == *name);
    args::list_entries(&mut out, &COMMON.iter().filter_map(find).collect::<Vec<_>>());
    let sorted = |wanted: fn(&Entry) -> bool| {
        let mut some: Vec<&Entry> =
            ROOT.entries.iter().filter(|e| wanted(e) && !COMMON.contains(&e.name())).collect();
        some.sort_by_key(|entry| entry.name());
        some
    };
    out.push_str("\nManagement Commands:\n");
    args::list_entries(&mut out, &sorted(|entry| matches!(entry, Entry::Group(_))));
    out.push_str("\nCommands:\n");
    args::list_entries(&mut out, &sorted(|entry| matches!(entry, Entry::Command(_))));
    out.push_str("\nGlobal Options:\n");
    out.push_str(&args::flags_help(GLOBAL));
    out.push_str("\nRun 'brig COMMAND --help' for more information on a command.\n");
    out
}

/// Does something to each named object: prints the names that worked, then what went wrong with the others.
async fn for_each(names: &[String], action: impl AsyncFn(&str) -> Outcome) -> Outcome {
    let mut faults = Vec::new();
    for name in names {
        match action(name).await {
            Ok(()) => output::line(name),
            Err(fault @ Fault::Unreachable(_)) => return Err(fault),
            Err(fault) => faults.push(fault),
        }
    }
    all_well(&faults)
}

/// Says each fault; exit status 1 when there was one.
fn all_well(faults: &[Fault]) -> Outcome {
    for fault in faults {
        output::error_line(&fault.to_string());
    }
    if faults.is_empty() { Ok(()) } else { Err(Fault::Exit(1)) }
}

/// `/containers/{name}{rest}`.
fn container_path(name: &str, rest: &str) -> String {
    format!("/containers/{}{rest}", crate::client::encode(name))
}

/// The format a list is shown in: the flag, else the configuration's.
fn chosen_format(context: &Context, flag: &str, key: &str) -> Outcome<String> {
    if !flag.is_empty() {
        return Ok(flag.to_owned());
    }
    Ok(context.config()?.text(key).unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commands(group: &'static Group, out: &mut Vec<&'static args::Command>) {
        for entry in group.entries {
            match entry {
                Entry::Group(inner) => commands(inner, out),
                Entry::Command(verb) => out.push(verb.command),
                Entry::Absent(..) => {}
            }
        }
    }

    #[test]
    fn no_command_has_a_flag_twice() {
        let mut all = Vec::new();
        commands(&ROOT, &mut all);
        for command in all {
            for (index, flag) in command.flags.iter().enumerate() {
                for other in &command.flags[index + 1..] {
                    assert_ne!(flag.long, other.long, "{}", command.name);
                    assert!(
                        flag.short.is_none() || flag.short != other.short,
                        "{} -{:?}",
                        command.name,
                        flag.short
                    );
                }
            }
        }
    }

    #[test]
    fn every_name_is_there_once() {
        fn check(group: &Group) {
            let mut names: Vec<&str> = group.entries.iter().map(Entry::name).collect();
            names.sort_unstable();
            let count = names.len();
            names.dedup();
            assert_eq!(names.len(), count, "{}", group.name);
            for entry in group.entries {
                if let Entry::Group(inner) = entry {
                    check(inner);
                }
            }
        }
        check(&ROOT);
    }

    #[test]
    fn help_texts() {
        insta::assert_snapshot!("help", top_help());
        let ps = ROOT.entries.iter().find(|entry| entry.name() == "ps").unwrap();
        let Entry::Command(verb) = ps else { panic!("ps is a command") };
        insta::assert_snapshot!("help_ps", args::command_help(verb.command, "brig ps", &paths_of(verb)));
    }
}
