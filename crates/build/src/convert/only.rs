//! Stages that are a source from elsewhere and nothing else.

use std::collections::BTreeMap;

use brigantine_image::Platform;
use brigantine_registry::redacted;

use super::{Options, from_parts, vars};
use crate::dockerfile::{Command, Dockerfile, Shell};
use crate::graph::Op;
use crate::remote;

/// The source of a stage that is `FROM scratch` with one ADD of a URL or repository, and ARGs for it.
pub(crate) fn only_source(file: &Dockerfile, options: &Options, number: usize) -> Result<Op, String> {
    let stage = &file.stages[number];
    let escape = file.directives.escape;
    let platform = options.platform.clone().unwrap_or_else(Platform::host);
    let globals = vars::globals(file, options, &platform).map_err(|fault| fault.message)?.values;
    let (base, _) = from_parts(&stage.from.command);
    if Shell::new(escape, &globals).word(base)? != "scratch" {
        return Err("the stage is not FROM scratch: its image has no time of its own".to_owned());
    }
    let mut values = BTreeMap::new();
    let mut found = None;
    for instruction in &stage.instructions {
        match &instruction.command {
            Command::Arg(names) => {
                for (name, default) in names {
                    let shell = Shell::new(escape, &values);
                    let name = shell.word(name)?;
                    let value = match (options.build_args.get(&name), default) {
                        (Some(Some(given)), _) => Some(given.clone()),
                        (_, Some(text)) => Some(shell.word(text)?),
                        (_, None) => globals.get(&name).cloned(),
                    };
                    values.extend(value.map(|value| (name, value)));
                }
            }
            Command::Copy { add: true, sources, flags, heredocs, .. } if found.is_none() => {
                let shell = Shell::new(escape, &values);
                let sources =
                    sources.iter().map(|source| shell.word(source)).collect::<Result<Vec<_>, _>>()?;
                let [source] = &sources[..] else { return Err(wrong(&instruction.original)) };
                if !heredocs.is_empty() || !remote::is_remote(source) {
                    return Err(wrong(&instruction.original));
                }
                let checksum = flags.checksum.as_deref().map(|text| shell.word(text)).transpose()?;
                let mut op = remote::source(source);
                remote::with_flags(&mut op, checksum, flags.keep_git_dir)?;
                found = Some(op);
            }
            _ => return Err(wrong(&instruction.original)),
        }
    }
    found.ok_or_else(|| "the stage has no ADD of a URL or a repository".to_owned())
}

fn wrong(instruction: &str) -> String {
    format!(
        "the stage is to have one ADD of a URL or a repository, beside ARGs, and not {:?}",
        redacted(instruction)
    )
}
