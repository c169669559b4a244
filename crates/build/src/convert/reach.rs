//! Which stages a target needs.

use std::collections::BTreeSet;

use super::vars::Globals;
use super::{Options, at, from_parts, stage_by_name};
use crate::dockerfile::mount::csv;
use crate::dockerfile::{Command, Dockerfile, Fault, Shell, Span};

/// The stage to build: the named one, else the last.
pub(super) fn target(file: &Dockerfile, name: Option<&str>) -> Result<usize, Fault> {
    let last = file.stages.len() - 1;
    match name.filter(|name| !name.is_empty()) {
        None => Ok(last),
        Some(name) => stage_by_name(file, name, file.stages.len()).ok_or_else(|| {
            let known: Vec<&str> = file.stages.iter().filter_map(|stage| stage.name()).collect();
            let span = Span { first: 1, last: 1, column: 1 };
            let list =
                if known.is_empty() { String::new() } else { format!(" (stages: {})", known.join(", ")) };
            Fault::new(span, format!("target stage \"{name}\" could not be found{list}"))
        }),
    }
}

/// The stages that `target` needs, itself among them.
pub(super) fn reachable(
    file: &Dockerfile,
    globals: &Globals,
    options: &Options,
    target: usize,
) -> Result<BTreeSet<usize>, Fault> {
    let mut found = BTreeSet::new();
    let mut todo = vec![target];
    while let Some(number) = todo.pop() {
        if !found.insert(number) {
            continue;
        }
        let stage = &file.stages[number];
        let shell = Shell::new(file.directives.escape, &globals.values);
        let (image, _) = from_parts(&stage.from.command);
        let image = shell.word(image).map_err(at(stage.from.span))?;
        if !options.contexts.contains_key(&image) {
            todo.extend(stage_by_name(file, &image, number).filter(|_| image.parse::<usize>().is_err()));
        }
        for instruction in &stage.instructions {
            for from in sources(&instruction.command) {
                if !options.contexts.contains_key(&from) {
                    todo.extend(stage_by_name(file, &from, number));
                    // Of itself or of a later stage: a circle.
                    let itself = stage.name() == Some(from.to_lowercase().as_str());
                    if itself && stage_by_name(file, &from, number).is_none() {
                        return Err(Fault::new(
                            instruction.span,
                            format!("circular dependency: stage \"{from}\" copies from itself"),
                        ));
                    }
                }
            }
        }
    }
    Ok(found)
}

/// What an instruction takes from elsewhere, by name.
pub(super) fn sources(command: &Command) -> Vec<String> {
    match command {
        Command::Copy { flags, .. } => flags.from.iter().cloned().collect(),
        Command::Run { flags, .. } => flags
            .mounts
            .iter()
            .filter_map(|mount| {
                let fields = csv(mount).ok()?;
                let from = fields.iter().find_map(|field| {
                    field.split_once('=').filter(|(key, _)| key.trim().eq_ignore_ascii_case("from"))
                });
                from.map(|(_, name)| name.to_owned())
            })
            .collect(),
        _ => Vec::new(),
    }
}
