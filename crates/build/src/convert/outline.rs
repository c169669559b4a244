//! What a Dockerfile offers to those who build it: its targets, and what one of them takes. Nothing is resolved.
//!
//! The shapes are those of the frontend's subrequests `frontend.targets` and `frontend.outline` (moby/buildkit,
//! `frontend/subrequests`).

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brigantine_image::Platform;
use serde::Serialize;

use super::{Options, at, from_parts, reach, vars};
use crate::dockerfile::{
    Command, Dockerfile, Fault, Instruction, Mount, MountKind, Shell, Span, description,
};

/// The stages that can be built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Targets {
    pub targets: Vec<Target>,
    /// The Dockerfile's text in base64.
    pub sources: Vec<String>,
}

/// A stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Target {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// It is what is built when none is named.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub default: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub base: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub platform: String,
    pub location: Location,
}

/// What a target takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outline {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<Argument>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<Wanted>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ssh: Vec<Wanted>,
    /// The Dockerfile's text in base64.
    pub sources: Vec<String>,
}

/// A build argument.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Argument {
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// What it is without being given, or what it is given.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub value: String,
    pub location: Location,
}

/// A secret or an ssh agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Wanted {
    pub name: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub required: bool,
    pub location: Location,
}

/// Where in the Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Location {
    pub ranges: Vec<Range>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Range {
    pub start: Position,
    pub end: Position,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Position {
    /// From 1.
    pub line: usize,
}

impl From<Span> for Location {
    fn from(span: Span) -> Self {
        let (start, end) = (Position { line: span.first }, Position { line: span.last });
        Self { ranges: vec![Range { start, end }] }
    }
}

/// The stages, each with what its FROM says.
pub(crate) fn targets(file: &Dockerfile, text: &str, options: &Options) -> Result<Targets, Fault> {
    let host = options.platform.clone().unwrap_or_else(Platform::host);
    let globals = vars::globals(file, options, &host)?;
    let chosen = reach::target(file, options.target.as_deref())?;
    let mut targets = Vec::new();
    for stage in &file.stages {
        let span = stage.from.span;
        let shell = Shell::new(file.directives.escape, &globals.values);
        let (base, platform) = from_parts(&stage.from.command);
        let platform = platform.map(|text| shell.word(text)).transpose().map_err(at(span))?;
        targets.push(Target {
            name: stage.name().unwrap_or_default().to_owned(),
            default: stage.number == chosen,
            description: stage.name().and_then(|name| description(text, span, name)).unwrap_or_default(),
            base: shell.word(base).map_err(at(span))?,
            platform: platform.unwrap_or_default(),
            location: span.into(),
        });
    }
    Ok(Targets { targets, sources: vec![STANDARD.encode(text)] })
}

/// What the chosen target and the stages it needs take.
pub(crate) fn outline(file: &Dockerfile, text: &str, options: &Options) -> Result<Outline, Fault> {
    let host = options.platform.clone().unwrap_or_else(Platform::host);
    let globals = vars::globals(file, options, &host)?;
    let chosen = reach::target(file, options.target.as_deref())?;
    let stages = reach::reachable(file, &globals, options, chosen)?;
    let mut found = Found {
        file,
        text,
        globals: &globals,
        options,
        args: Vec::new(),
        secrets: Vec::new(),
        ssh: Vec::new(),
    };
    let mut asked = BTreeSet::new();
    for number in stages {
        let stage = &file.stages[number];
        let shell = Shell::new(file.directives.escape, &globals.values);
        let (base, platform) = from_parts(&stage.from.command);
        for word in [Some(base), platform].into_iter().flatten() {
            shell.word(word).map_err(at(stage.from.span))?;
        }
        asked.extend(shell.used());
        let mut values = BTreeMap::new();
        for instruction in &stage.instructions {
            found.instruction(instruction, &mut values)?;
        }
    }
    found.globals(asked)?;
    let stage = &file.stages[chosen];
    let name = stage.name().unwrap_or_default();
    let Found { mut args, secrets, ssh, .. } = found;
    args.sort_by_key(|arg| arg.location.ranges.first().map(|range| range.start.line));
    Ok(Outline {
        name: name.to_owned(),
        description: description(text, stage.from.span, name).unwrap_or_default(),
        args,
        secrets,
        ssh,
        sources: vec![STANDARD.encode(text)],
    })
}

/// What was found so far, each name once.
struct Found<'f> {
    file: &'f Dockerfile,
    text: &'f str,
    globals: &'f vars::Globals,
    options: &'f Options,
    args: Vec<Argument>,
    secrets: Vec<Wanted>,
    ssh: Vec<Wanted>,
}

impl Found<'_> {
    fn instruction(
        &mut self,
        instruction: &Instruction,
        values: &mut BTreeMap<String, String>,
    ) -> Result<(), Fault> {
        let span = instruction.span;
        match &instruction.command {
            Command::Arg(names) => {
                for (name, default) in names {
                    let shell = Shell::new(self.file.directives.escape, values);
                    let name = shell.word(name).map_err(at(span))?;
                    let default =
                        default.as_deref().map(|text| shell.word(text)).transpose().map_err(at(span))?;
                    let given = self.options.build_args.get(&name).cloned().flatten();
                    let value = given.or(default).or_else(|| self.globals.values.get(&name).cloned());
                    values.extend(value.clone().map(|value| (name.clone(), value)));
                    let description = description(self.text, span, &name).or_else(|| self.global(&name));
                    self.add(Argument {
                        name,
                        description: description.unwrap_or_default(),
                        value: value.unwrap_or_default(),
                        location: span.into(),
                    });
                }
            }
            Command::Run { flags, .. } => {
                for text in &flags.mounts {
                    let shell = Shell::new(self.file.directives.escape, values);
                    let mount = Mount::parse(text, &|value| shell.word(value)).map_err(at(span))?;
                    self.mount(&mount, span);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn mount(&mut self, mount: &Mount, span: Span) {
        let (list, otherwise) = match mount.kind {
            MountKind::Secret => (&mut self.secrets, mount.source.as_deref().or(mount.target.as_deref())),
            MountKind::Ssh => (&mut self.ssh, Some("default")),
            MountKind::Bind | MountKind::Cache | MountKind::Tmpfs => return,
        };
        let Some(name) = mount.id.as_deref().or(otherwise.map(crate::tree::last)) else { return };
        match list.iter_mut().find(|known| known.name == name) {
            Some(known) => known.required |= mount.required,
            None => {
                list.push(Wanted { name: name.to_owned(), required: mount.required, location: span.into() });
            }
        }
    }

    fn add(&mut self, arg: Argument) {
        if !self.args.iter().any(|known| known.name == arg.name) {
            self.args.push(arg);
        }
    }

    /// What the comment above a global argument says.
    fn global(&self, name: &str) -> Option<String> {
        let declared = |instruction: &&Instruction| match &instruction.command {
            Command::Arg(names) => names.iter().any(|(known, _)| known == name),
            _ => false,
        };
        description(self.text, self.file.globals.iter().find(declared)?.span, name)
    }

    /// The global arguments that FROM uses, and those that are used in them.
    fn globals(&mut self, mut asked: BTreeSet<String>) -> Result<(), Fault> {
        for instruction in self.file.globals.iter().rev() {
            let Command::Arg(names) = &instruction.command else { continue };
            for (name, default) in names.iter().rev() {
                if !asked.contains(name) {
                    continue;
                }
                let shell = Shell::new(self.file.directives.escape, &self.globals.values);
                if let Some(text) = default {
                    shell.word(text).map_err(at(instruction.span))?;
                    asked.extend(shell.used());
                }
                self.add(Argument {
                    name: name.clone(),
                    description: description(self.text, instruction.span, name).unwrap_or_default(),
                    value: self.globals.values.get(name).cloned().unwrap_or_default(),
                    location: instruction.span.into(),
                });
            }
        }
        Ok(())
    }
}
