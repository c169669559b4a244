//! One stage at a time: its base, then each instruction's effect on graph, configuration and history.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;

use brigantine_image::model::{Healthcheck as ImageHealthcheck, RootFs};
use brigantine_image::{ImageConfig, Platform, Reference};

use super::copy::Copy;
use super::state::State;
use super::text::{command_words, health_text, is_signal, ports, quoted};
use super::vars::{self, Globals};
use super::{Base, Options, Plan, Resolver, Step, at, from_parts, reach, stage_by_name};
use crate::dockerfile::checks::suggestion;
use crate::dockerfile::{Checks, Command, Dockerfile, Fault, Instruction, Rule, Shell, Span, Warning};
use crate::error::Error;
use crate::graph::{Action, Graph, How, NamedContext, Op, Vertex, VertexId};
use crate::pattern::Ignore;

/// The search path of images that set none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

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
    platform: Platform,
    pub globals: Globals,
    /// The same without the request's build arguments.
    defaults: Globals,
    target: usize,
    pub(super) graph: Graph,
    stages: BTreeMap<usize, State>,
    contexts: BTreeMap<String, VertexId>,
    images: BTreeMap<(String, String), Base>,
    steps: Vec<Step>,
    pub(super) warnings: Vec<Warning>,
    used_args: Vec<String>,
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
                text: instruction.original.clone(),
                vertex: None,
                ends_stage: false,
                triggers: 0,
            });
        }
    }

    async fn image(
        &mut self,
        name: &str,
        platform: &Platform,
        span: Span,
        resolver: &dyn Resolver,
    ) -> Result<Base, StageError> {
        let key = (name.to_owned(), platform.to_string());
        if let Some(base) = self.images.get(&key) {
            return Ok(base.clone());
        }
        let base = resolver.resolve(name, platform).await.map_err(|error| StageError::At(span, error))?;
        self.images.insert(key, base.clone());
        Ok(base)
    }

    pub(super) fn context(&mut self, name: &str, span: Span) -> VertexId {
        if let Some(id) = self.contexts.get(name) {
            return *id;
        }
        let shown = if name.is_empty() {
            "[internal] load build context".to_owned()
        } else {
            format!("[context {name}] load")
        };
        let op = match self.options.contexts.get(name) {
            Some(NamedContext::Remote(url)) => crate::remote::source(url),
            _ => Op::Context { name: name.to_owned() },
        };
        let download = matches!(op, Op::Http { .. });
        let mut vertex = Vertex { op, inputs: Vec::new(), name: shown.clone(), no_cache: false, span };
        if download {
            // An archive from the web stands for what is in it.
            let inputs = vec![self.scratch(span), self.graph.add(vertex)];
            let how = How { unpack: true, ..How::default() };
            let op = Op::Files(vec![Action::Download { input: 1, destination: "/".to_owned(), how }]);
            vertex = Vertex { op, inputs, name: shown, no_cache: false, span };
        }
        let id = self.graph.add(vertex);
        self.contexts.insert(name.to_owned(), id);
        id
    }

    /// What a name in `--from` or `from=` stands for.
    pub(super) async fn named(
        &mut self,
        name: &str,
        stage: usize,
        span: Span,
        resolver: &dyn Resolver,
    ) -> Result<VertexId, StageError> {
        if name.contains('$') {
            return Err(Fault::new(
                span,
                format!(
                    "variables are not filled in in {name:?}: begin a stage with FROM {name}, which fills in \
                     arguments from before the first FROM, and name that"
                ),
            )
            .into());
        }
        match self.options.contexts.get(name).cloned() {
            Some(NamedContext::Image(image)) => {
                let platform = self.platform.clone();
                let base = self.image(&image, &platform, span, resolver).await?;
                return Ok(self.image_vertex(&image, &base, span));
            }
            Some(NamedContext::Local | NamedContext::Remote(_)) => return Ok(self.context(name, span)),
            None => {}
        }
        if let Some(number) = stage_by_name(self.file, name, stage) {
            return match self.stages.get(&number) {
                Some(state) => Ok(state.root),
                None => Err(Fault::new(span, format!("stage \"{name}\" is not built yet here")).into()),
            };
        }
        if name.eq_ignore_ascii_case("scratch") {
            return Ok(self.scratch(span));
        }
        if name.parse::<usize>().is_ok() {
            return Err(Fault::new(
                span,
                format!("invalid from flag value {name}: there is no stage of that number before"),
            )
            .into());
        }
        let later =
            self.file.stages.iter().skip(stage).any(|s| s.name() == Some(name.to_lowercase().as_str()));
        if later {
            return Err(Fault::new(
                span,
                format!("stage \"{name}\" comes later in the Dockerfile: stages can use earlier ones only"),
            )
            .into());
        }
        let platform = self.platform.clone();
        let base = self.image(name, &platform, span, resolver).await?;
        Ok(self.image_vertex(name, &base, span))
    }

    fn scratch(&mut self, span: Span) -> VertexId {
        self.graph.add(Vertex {
            op: Op::Scratch,
            inputs: Vec::new(),
            name: "scratch".to_owned(),
            no_cache: false,
            span,
        })
    }

    fn image_vertex(&mut self, name: &str, base: &Base, span: Span) -> VertexId {
        if base.diff_ids.is_empty() {
            return self.scratch(span);
        }
        self.graph.add(Vertex {
            op: Op::Image { diff_ids: base.diff_ids.clone() },
            inputs: Vec::new(),
            name: format!("FROM {name}"),
            no_cache: false,
            span,
        })
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
                text: instruction.original.clone(),
                vertex: (state.root != before).then_some(state.root),
                ends_stage: index + 1 == count,
                triggers: 0,
            });
        }
        self.stages.insert(number, state);
        Ok(())
    }

    async fn base(
        &mut self,
        number: usize,
        image: &str,
        platform: &Platform,
        label: &str,
        resolver: &dyn Resolver,
    ) -> Result<State, StageError> {
        let span = self.file.stages[number].from.span;
        let filtered =
            |name: &str| self.options.no_cache_filter.iter().any(|wanted| wanted.eq_ignore_ascii_case(name));
        let no_cache = self.options.no_cache || filtered(label) || filtered(&number.to_string());
        let named = self.options.contexts.get(image).cloned();
        if named.is_none()
            && let Some(earlier) =
                stage_by_name(self.file, image, number).filter(|_| image.parse::<usize>().is_err())
        {
            let Some(state) = self.stages.get(&earlier) else {
                return Err(Fault::new(span, format!("stage \"{image}\" is not built yet here")).into());
            };
            let mut state = state.clone();
            state.no_cache = no_cache;
            state.cmd_set = false;
            state.declared.clear();
            label.clone_into(&mut state.label);
            return Ok(state);
        }
        let mut state = State {
            root: VertexId(0),
            config: ImageConfig::default(),
            env: Vec::new(),
            args: Vec::new(),
            later_args: BTreeSet::new(),
            declared: Vec::new(),
            history: Vec::new(),
            cmd_set: false,
            workdir_set: false,
            no_cache,
            label: label.to_owned(),
            total: 0,
            done: 0,
        };
        match named {
            Some(NamedContext::Local | NamedContext::Remote(_)) => {
                // A folder or repository as a base: its files, no configuration.
                let context = self.context(image, span);
                let bottom = self.scratch(span);
                state.root = self.graph.add(Vertex {
                    op: Op::Files(vec![Action::Copy {
                        input: 1,
                        sources: vec!["/".to_owned()],
                        destination: "/".to_owned(),
                        many: false,
                        how: How::default(),
                    }]),
                    inputs: vec![bottom, context],
                    name: format!("[{label}] FROM {image}"),
                    no_cache,
                    span,
                });
            }
            None if image == "scratch" => {
                state.root = self.scratch(span);
                "/".clone_into(&mut state.config.config.working_dir);
            }
            named => {
                let name = match named {
                    Some(NamedContext::Image(name)) => name,
                    _ => image.to_owned(),
                };
                let base = self.image(&name, platform, span, resolver).await?;
                let (os, architecture) = (&base.config.os, &base.config.architecture);
                if !architecture.is_empty()
                    && (os.as_str(), architecture.as_str())
                        != (platform.os.as_str(), platform.architecture.as_str())
                {
                    self.warnings.push(Warning::new(
                        Rule::InvalidBaseImagePlatform,
                        span,
                        format!("the image {name} is for {os}/{architecture}, not for {platform}"),
                    ));
                }
                state.root = self.image_vertex(&name, &base, span);
                state.config = base.config.clone();
            }
        }
        let config = &mut state.config;
        config.os.clone_from(&platform.os);
        if config.architecture.is_empty() {
            config.architecture.clone_from(&platform.architecture);
            config.variant.clone_from(&platform.variant);
        }
        config.docker_version = None;
        config.comment = None;
        state.env = config
            .config
            .env
            .iter()
            .flatten()
            .map(|line| {
                line.split_once('=')
                    .map_or((line.clone(), String::new()), |(n, v)| (n.to_owned(), v.to_owned()))
            })
            .collect();
        if !state.env.iter().any(|(name, _)| name == "PATH") {
            state.set_env("PATH", PATH);
        }
        Ok(state)
    }

    async fn instruction(
        &mut self,
        state: &mut State,
        stage: usize,
        instruction: &Instruction,
        resolver: &dyn Resolver,
    ) -> Result<(), StageError> {
        let span = instruction.span;
        let escape = self.file.directives.escape;
        let variables = state.env_map();
        let shell = Shell::new(escape, &variables);
        let word = |text: &str| shell.word(text).map_err(at(span));
        match &instruction.command {
            Command::From { .. } => {}
            Command::Arg(names) => self.arg(state, names, span)?,
            Command::Env(pairs) => {
                let mut shown = Vec::new();
                for (name, value) in pairs {
                    let (name, value) = (word(name)?, word(value)?);
                    shown.push(format!("{name}={value}"));
                    state.set_env(&name, &value);
                }
                state.record(format!("ENV {}", shown.join(" ")), None);
            }
            Command::Label(pairs) => {
                let mut shown = Vec::new();
                for (name, value) in pairs {
                    let (name, value) = (word(name)?, word(value)?);
                    shown.push(format!("{name}={value}"));
                    state.config.config.labels.insert(name, value);
                }
                state.record(format!("LABEL {}", shown.join(" ")), None);
            }
            Command::Maintainer(text) => {
                state.config.author = Some(text.clone());
                state.record(format!("MAINTAINER {text}"), None);
            }
            Command::Expose(text) => {
                let words = shell.words(text).map_err(at(span))?;
                let mut shown = Vec::new();
                for word in words {
                    for port in ports(&word)
                        .ok_or_else(|| Fault::new(span, format!("invalid containerPort: {word}")))?
                    {
                        shown.push(port.clone());
                        state.config.config.exposed_ports.insert(port);
                    }
                }
                shown.sort();
                state.record(format!("EXPOSE [{}]", shown.join(" ")), None);
            }
            Command::User(text) => {
                let user = word(text)?;
                state.config.config.user.clone_from(&user);
                state.record(format!("USER {user}"), None);
            }
            Command::Volume(paths) => {
                let mut shown = Vec::new();
                for path in paths {
                    let path = word(path)?;
                    if path.is_empty() {
                        return Err(Fault::new(span, "VOLUME specified can not be an empty string").into());
                    }
                    shown.push(path.clone());
                    state.config.config.volumes.insert(path);
                }
                state.record(format!("VOLUME [{}]", shown.join(" ")), None);
            }
            Command::StopSignal(text) => {
                let signal = word(text)?;
                if !is_signal(&signal) {
                    return Err(Fault::new(span, format!("invalid signal: {signal}")).into());
                }
                state.record(format!("STOPSIGNAL {signal}"), None);
                state.config.config.stop_signal = Some(signal);
            }
            Command::Shell(words) => {
                state.record(format!("SHELL [{}]", words.join(" ")), None);
                state.config.config.shell = Some(words.clone());
            }
            Command::Cmd(form) => {
                let words = command_words(form, state);
                state.record(format!("CMD {}", quoted(&words)), None);
                state.config.config.cmd = Some(words);
                state.config.config.args_escaped = true;
                state.cmd_set = true;
            }
            Command::Entrypoint(form) => {
                let words = command_words(form, state);
                state.record(format!("ENTRYPOINT {}", quoted(&words)), None);
                state.config.config.entrypoint = Some(words);
                if !state.cmd_set {
                    state.config.config.cmd = None;
                }
            }
            Command::Healthcheck(check) => {
                state.record(format!("HEALTHCHECK {}", health_text(check)), None);
                state.config.config.healthcheck = Some(ImageHealthcheck {
                    test: Some(check.test.clone()),
                    interval: check.interval.filter(|n| *n != 0),
                    timeout: check.timeout.filter(|n| *n != 0),
                    start_period: check.start_period.filter(|n| *n != 0),
                    start_interval: check.start_interval.filter(|n| *n != 0),
                    retries: check.retries.filter(|n| *n != 0),
                });
            }
            Command::OnBuild(text) => state.config.config.on_build.get_or_insert_default().push(text.clone()),
            Command::Workdir(text) => {
                let path = word(text)?;
                if path.starts_with('/') {
                    state.workdir_set = true;
                } else if !state.workdir_set {
                    self.warnings.push(Warning::new(
                        Rule::WorkdirRelativePath,
                        span,
                        format!("the relative path {path:?} depends on the base image: no absolute WORKDIR comes before it"),
                    ));
                }
                let path = state.absolute(&path);
                let path = if path.len() > 1 { path.trim_end_matches('/').to_owned() } else { path };
                state.config.config.working_dir.clone_from(&path);
                let op = Op::Files(vec![Action::Directory {
                    path: path.clone(),
                    owner: state.config.config.user.clone(),
                }]);
                self.layer(state, op, Vec::new(), &instruction.original, span);
                state.record(format!("WORKDIR {path}"), Some(state.root));
            }
            Command::Run { form, flags, heredocs } => {
                self.run(state, stage, instruction, form, flags, heredocs, resolver).await?;
            }
            Command::Copy { add, sources, destination, flags, heredocs } => {
                let copy = Copy { add: *add, sources, destination, flags, heredocs };
                self.copy(state, stage, instruction, &copy, resolver).await?;
            }
        }
        self.check_variables(state, &shell.unset(), span);
        Ok(())
    }

    /// Remarks on variables that an instruction uses and nothing sets.
    pub(super) fn check_variables(&mut self, state: &State, unset: &[String], span: Span) {
        for name in unset.iter().filter(|name| !state.declared.contains(name)) {
            // The shell's own parameters are no variables of the Dockerfile.
            if !name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
                continue;
            }
            let known = state.env.iter().chain(&state.args).map(|(name, _)| name.as_str());
            let near = suggestion(name, known);
            let message = format!("${name} is used, but neither ARG nor ENV sets it{near}");
            self.warnings.push(Warning::new(Rule::UndefinedVar, span, message));
        }
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

    fn arg(
        &mut self,
        state: &mut State,
        names: &[(String, Option<String>)],
        span: Span,
    ) -> Result<(), Fault> {
        let mut shown = Vec::new();
        for (name, default) in names {
            let variables = state.env_map();
            let shell = Shell::new(self.file.directives.escape, &variables);
            let name = shell.word(name).map_err(at(span))?;
            let default = default.as_deref().map(|text| shell.word(text)).transpose().map_err(at(span))?;
            self.used_args.push(name.clone());
            state.declared.push(name.clone());
            let value = match (self.options.build_args.get(&name), &default) {
                (Some(Some(given)), _) => Some(given.clone()),
                (_, Some(default)) => Some(default.clone()),
                (_, None) => self.globals.values.get(&name).cloned(),
            };
            shown.push(match &value {
                Some(value) => format!("{name}={value}"),
                None => name.clone(),
            });
            if let Some(value) = value {
                state.set_arg(name, value);
            }
        }
        state.record(format!("ARG {}", shown.join(" ")), None);
        Ok(())
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
