//! One stage at a time: its base, then each instruction in turn.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;

use brigantine_image::model::RootFs;
use brigantine_image::{Platform, Reference};
use brigantine_registry::redacted;

use super::state::State;
use super::vars::{self, Globals};
use super::{Base, Options, Plan, Resolver, Step, at, from_parts, reach, stage_by_name};
use crate::dockerfile::checks::suggestion;
use crate::dockerfile::{Checks, Command, Dockerfile, Fault, Instruction, Rule, Shell, Span, Warning};
use crate::error::Error;
use crate::graph::{Graph, Op, Vertex, VertexId};
use crate::pattern::Ignore;

/// A stage could not be converted.
pub(super) enum StageError {
    Fault(Fault),
    /// What a place in the Dockerfile asks for is not to be had.
    At(Span, Error),
    Error(Error),
}

impl From<Fault> for StageError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Error> for StageError {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// A Dockerfile on its way to a plan.
pub(super) struct Conversion<'f> {
    pub(super) file: &'f Dockerfile,
    pub(super) options: &'f Options,
    /// What the main context does not show.
    pub(super) ignore: &'f Ignore,
    pub(super) platform: Platform,
    pub globals: Globals,
    /// The same without the request's build arguments.
    defaults: Globals,
    pub(super) target: usize,
    pub(super) graph: Graph,
    pub(super) stages: BTreeMap<usize, State>,
    pub(super) contexts: BTreeMap<String, VertexId>,
    pub(super) images: BTreeMap<(String, String), Base>,
    steps: Vec<Step>,
    pub(super) warnings: Vec<Warning>,
    pub(super) used_args: Vec<String>,
}

impl<'f> Conversion<'f> {
    pub fn new(
        file: &'f Dockerfile,
        options: &'f Options,
        ignore: &'f Ignore,
        platform: Platform,
        [globals, defaults]: [Globals; 2],
        target: usize,
    ) -> Self {
        Self {
            used_args: globals.declared.clone(),
            warnings: file.warnings.clone(),
            file,
            options,
            ignore,
            platform,
            globals,
            defaults,
            target,
            graph: Graph::default(),
            stages: BTreeMap::new(),
            contexts: BTreeMap::new(),
            images: BTreeMap::new(),
            steps: Vec::new(),
        }
    }

    /// ARGs before the first FROM are steps as well.
    pub fn count_globals(&mut self) {
        for instruction in &self.file.globals {
            self.steps.push(Step {
                text: redacted(&instruction.original).into_owned(),
                vertex: None,
                ends_stage: false,
                triggers: 0,
            });
        }
    }

    /// Converts one stage, unless it is.
    pub fn stage<'s>(
        &'s mut self,
        number: usize,
        resolver: &'s dyn Resolver,
    ) -> Pin<Box<dyn Future<Output = Result<(), StageError>> + Send + 's>> {
        Box::pin(self.convert_stage(number, resolver))
    }

    async fn convert_stage(&mut self, number: usize, resolver: &dyn Resolver) -> Result<(), StageError> {
        if self.stages.contains_key(&number) {
            return Ok(());
        }
        let stage = &self.file.stages[number];
        let span = stage.from.span;
        let (image, platform) = from_parts(&stage.from.command);
        let shell = Shell::new(self.file.directives.escape, &self.globals.values);
        let image = shell.word(image).map_err(at(span))?;
        let platform = platform.map(|text| shell.word(text)).transpose().map_err(at(span))?;
        let unset = shell.unset();
        self.check_from(number, &unset);
        if image.is_empty() {
            let (written, _) = from_parts(&stage.from.command);
            return Err(Fault::new(span, format!("base name ({written}) should not be blank")).into());
        }
        let platform = match platform.as_deref().filter(|text| !text.is_empty()) {
            None => self.platform.clone(),
            Some(text) => text
                .parse()
                .map_err(|error| Fault::new(span, format!("failed to parse platform {text}: {error}")))?,
        };
        let label = stage.name().map_or_else(
            || if self.file.stages.len() == 1 { String::new() } else { format!("stage-{number}") },
            str::to_owned,
        );
        let mut state = self.base(number, &image, &platform, &label, resolver).await?;
        let triggers = state.config.config.on_build.take().unwrap_or_default();
        let mut instructions = Vec::new();
        let mut more = Vec::new();
        for trigger in &triggers {
            let parsed = trigger_instruction(trigger, span, self.file.directives.escape)?;
            for from in reach::sources(&parsed.command) {
                more.extend(stage_by_name(self.file, &from, number).filter(|n| !self.stages.contains_key(n)));
            }
            instructions.push(parsed);
        }
        instructions.extend(stage.instructions.iter().cloned());
        // Stages that only a trigger asks for are made first.
        for earlier in more {
            for needed in reach::reachable(self.file, &self.globals, self.options, earlier)? {
                self.stage(needed, resolver).await?;
            }
        }
        state.total = 1 + instructions.iter().filter(|i| makes_layer(&i.command)).count();
        state.done = 1;
        self.steps.push(Step {
            text: stage.from.original.clone(),
            vertex: Some(state.root),
            ends_stage: instructions.is_empty(),
            triggers: triggers.len(),
        });
        let count = instructions.len();
        for (index, instruction) in instructions.iter().enumerate() {
            let before = state.root;
            self.instruction(&mut state, number, instruction, resolver).await?;
            self.steps.push(Step {
                text: redacted(&instruction.original).into_owned(),
                vertex: (state.root != before).then_some(state.root),
                ends_stage: index + 1 == count,
                triggers: 0,
            });
        }
        self.stages.insert(number, state);
        Ok(())
    }

    /// Remarks on the variables of a FROM.
    fn check_from(&mut self, number: usize, unset: &[String]) {
        let from = &self.file.stages[number].from;
        let span = from.span;
        for name in unset.iter().filter(|name| !self.globals.declared.contains(name)) {
            let near = suggestion(name, self.globals.values.keys().map(String::as_str));
            let message = format!("FROM uses ${name}, but no ARG before the first FROM declares it{near}");
            self.warnings.push(Warning::new(Rule::UndefinedArgInFrom, span, message));
        }
        let (written, _) = from_parts(&from.command);
        if !written.contains('$') {
            return;
        }
        let by_default = Shell::new(self.file.directives.escape, &self.defaults.values).word(written);
        let Ok(name) = by_default else { return };
        let named = name == "scratch" || stage_by_name(self.file, &name, number).is_some();
        if !named && name.parse::<Reference>().is_err() {
            self.warnings.push(Warning::new(
                Rule::InvalidDefaultArgInFrom,
                span,
                format!("without build arguments {written} is {name:?}, which is no image's name: give the ARG a default"),
            ));
        }
    }

    /// Puts an operation on top of the stage.
    pub(super) fn layer(
        &mut self,
        state: &mut State,
        op: Op,
        mut inputs: Vec<VertexId>,
        text: &str,
        span: Span,
    ) {
        state.done += 1;
        let label = if state.label.is_empty() { String::new() } else { format!("{} ", state.label) };
        let name = format!("[{label}{}/{}] {text}", state.done, state.total);
        inputs.insert(0, state.root);
        state.root = self.graph.add(Vertex { op, inputs, name, no_cache: state.no_cache, span });
    }

    pub fn finish(mut self, checks: &Checks) -> Result<Plan, Fault> {
        let scans = self.scans()?;
        let warnings = checks.select(self.file, std::mem::take(&mut self.warnings));
        let Some(mut state) = self.stages.remove(&self.target) else {
            return Err(Fault::new(Span::default(), "the target stage was not made"));
        };
        state.config.config.labels.extend(self.options.labels.clone());
        state.config.rootfs = RootFs::default();
        Ok(Plan {
            graph: self.graph,
            target: state.root,
            config: state.config,
            history: state.history,
            scans,
            steps: self.steps,
            refused: checks.error && !warnings.is_empty(),
            warnings,
            unconsumed: vars::unconsumed(self.options, &self.used_args),
            name: String::new(),
            text: String::new(),
            others: Vec::new(),
        })
    }
}

fn makes_layer(command: &Command) -> bool {
    matches!(command, Command::Run { .. } | Command::Copy { .. } | Command::Workdir(_))
}

fn trigger_instruction(text: &str, span: Span, escape: char) -> Result<Instruction, Fault> {
    // The escape directive is the file's own: the trigger is parsed as a file with one more line.
    let head = if escape == '`' { "# escape=`\n" } else { "" };
    let wrong = |fault: Fault| {
        Fault::new(span, format!("ONBUILD trigger {text:?} of the base image: {}", fault.message))
    };
    let file = crate::dockerfile::parse(&format!("{head}FROM x\n{text}")).map_err(wrong)?;
    let instruction = file.stages.into_iter().next().and_then(|stage| stage.instructions.into_iter().next());
    let mut instruction =
        instruction.ok_or_else(|| Fault::new(span, format!("ONBUILD trigger {text:?} is empty")))?;
    instruction.span = span;
    Ok(instruction)
}
