//! `brig completion`: scripts that complete commands and flags in a shell.

use clap_complete::Shell;

use crate::args::{Command, Entry, Group, Kind, Matches, Operands, runs};
use crate::commands::tree::ROOT;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;

pub static COMMAND: Command = Command {
    name: "completion",
    usage: "bash|zsh|fish|elvish",
    about: "Print a script that completes brig's commands in a shell",
    operands: Operands::Exactly(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(_context: &Context, matches: Matches) -> Outcome {
    let shell = match matches.operand(0) {
        "bash" => Shell::Bash,
        "zsh" => Shell::Zsh,
        "fish" => Shell::Fish,
        "elvish" => Shell::Elvish,
        other => {
            return Err(Fault::said(format!(
                "no completion for the shell {other:?}: use bash, zsh, fish or elvish"
            )));
        }
    };
    let mut tree = group(&ROOT);
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut tree, "brig", &mut script);
    output::write_bytes(&script);
    Ok(())
}

/// The tables as the generator wants them: made here only, because they cost more than a whole run of the client.
fn group(group: &'static Group) -> clap::Command {
    let mut made = clap::Command::new(group.name).about(group.about).disable_help_subcommand(true);
    for entry in group.entries {
        made = match entry {
            Entry::Group(inner) => made.subcommand(self::group(inner)),
            Entry::Command(verb) => {
                let mut command =
                    clap::Command::new(verb.name).about(verb.command.about).disable_help_flag(true);
                for flag in verb.command.flags.iter().filter(|flag| !flag.hidden) {
                    let mut arg = clap::Arg::new(flag.long).long(flag.long).help(flag.help);
                    if let Some(short) = flag.short {
                        arg = arg.short(short);
                    }
                    arg = match flag.kind {
                        Kind::Switch => arg.action(clap::ArgAction::SetTrue),
                        Kind::One(_) => arg.action(clap::ArgAction::Set),
                        Kind::List(_) => arg.action(clap::ArgAction::Append),
                    };
                    command = command.arg(arg);
                }
                made.subcommand(command)
            }
            Entry::Absent(..) => made,
        };
    }
    made
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_tables_are_sound_to_the_generator() {
        super::group(&super::ROOT).debug_assert();
    }
}
