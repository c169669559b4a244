//! One stage at a time: its base, then each instruction's effect on graph, configuration and history.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;

use brigantine_image::model::{Healthcheck as ImageHealthcheck, RootFs};
use brigantine_image::{ImageConfig, Platform};

use super::vars::{self, Globals};
use super::{Base, HistoryItem, Options, Plan, Resolver, Step, at, from_parts, reach, stage_by_name};
use crate::dockerfile::instruction::Healthcheck;
use crate::dockerfile::{
    Command, Dockerfile, Fault, Flags, Form, Heredoc, Instruction, Mount, MountKind, Shell, Span, Warning,
};
use crate::error::Error;
use crate::graph::{Action, Around, Graph, How, NamedContext, Op, Run, RunMount, Vertex, VertexId};
use crate::pattern::clean;

/// The search path of images that set none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What history says made a step.
const COMMENT: &str = "buildkit.dockerfile.v0";

/// A stage could not be converted.
pub(super) enum StageError {
    Fault(Fault),
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

/// A stage as far as it has come.
#[derive(Debug, Clone)]
struct State {
    root: VertexId,
    config: ImageConfig,
    env: Vec<(String, String)>,
    /// Declared arguments with a value, in order.
    args: Vec<(String, String)>,
    history: Vec<HistoryItem>,
    cmd_set: bool,
    no_cache: bool,
    label: String,
    /// What the label's counter counts to.
    total: usize,
    done: usize,
}

impl State {
    fn env_map(&self) -> BTreeMap<String, String> {
        let mut map: BTreeMap<String, String> = self.args.iter().cloned().collect();
        map.extend(self.env.iter().cloned());
        map
    }

    fn shell(&self) -> Vec<String> {
        self.config.config.shell.clone().unwrap_or_else(|| vec!["/bin/sh".to_owned(), "-c".to_owned()])
    }

    fn set_env(&mut self, name: &str, value: &str) {
        match self.env.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => value.clone_into(known),
            None => self.env.push((name.to_owned(), value.to_owned())),
        }
        self.config.config.env =
            Some(self.env.iter().map(|(name, value)| format!("{name}={value}")).collect());
    }

    fn record(&mut self, created_by: String, vertex: Option<VertexId>) {
        self.history.push(HistoryItem { created_by, vertex, comment: COMMENT.to_owned(), author: None });
    }

    /// `cwd` joined with a path that may be relative.
    fn absolute(&self, path: &str) -> String {
        let cwd = &self.config.config.working_dir;
        let absolute = if path.starts_with('/') {
            format!("/{}", clean(path))
        } else {
            format!("/{}", clean(&format!("{cwd}/{path}")))
        };
        if (path.ends_with('/') || path.ends_with("/.") || path == ".") && absolute != "/" {
            format!("{absolute}/")
        } else {
            absolute
        }
    }
}

/// A Dockerfile on its way to a plan.
pub(super) struct Conversion<'f> {
    file: &'f Dockerfile,
    options: &'f Options,
    platform: Platform,
    pub globals: Globals,
    target: usize,
    graph: Graph,
    stages: BTreeMap<usize, State>,
    contexts: BTreeMap<String, VertexId>,
    images: BTreeMap<(String, String), Base>,
    steps: Vec<Step>,
    warnings: Vec<Warning>,
    used_args: Vec<String>,
}

impl<'f> Conversion<'f> {
    pub fn new(
        file: &'f Dockerfile,
        options: &'f Options,
        platform: Platform,
        globals: Globals,
        target: usize,
    ) -> Self {
        Self {
            used_args: globals.declared.clone(),
            warnings: file.warnings.clone(),
            file,
            options,
            platform,
            globals,
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
        resolver: &dyn Resolver,
    ) -> Result<Base, Error> {
        let key = (name.to_owned(), platform.to_string());
        if let Some(base) = self.images.get(&key) {
            return Ok(base.clone());
        }
        let base = resolver.resolve(name, platform).await?;
        self.images.insert(key, base.clone());
        Ok(base)
    }

    fn context(&mut self, name: &str, span: Span) -> VertexId {
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
        let id = self.graph.add(Vertex { op, inputs: Vec::new(), name: shown, no_cache: false, span });
        self.contexts.insert(name.to_owned(), id);
        id
    }

    /// What a name in `--from` or `from=` stands for.
    async fn named(
        &mut self,
        name: &str,
        stage: usize,
        span: Span,
        resolver: &dyn Resolver,
    ) -> Result<VertexId, StageError> {
        match self.options.contexts.get(name).cloned() {
            Some(NamedContext::Image(image)) => {
                let platform = self.platform.clone();
                let base = self.image(&image, &platform, resolver).await?;
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
        let base = self.image(name, &platform, resolver).await?;
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
            label.clone_into(&mut state.label);
            return Ok(state);
        }
        let mut state = State {
            root: VertexId(0),
            config: ImageConfig::default(),
            env: Vec::new(),
            args: Vec::new(),
            history: Vec::new(),
            cmd_set: false,
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
            None if image == "scratch" => state.root = self.scratch(span),
            named => {
                let name = match named {
                    Some(NamedContext::Image(name)) => name,
                    _ => image.to_owned(),
                };
                let base = self.image(&name, platform, resolver).await?;
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
        Ok(())
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
            let value = match (self.options.build_args.get(&name), &default) {
                (Some(Some(given)), _) => Some(given.clone()),
                (_, Some(default)) => Some(default.clone()),
                (_, None) => self.globals.values.get(&name).cloned(),
            };
            shown.push(match &value {
                Some(value) => format!("{name}={value}"),
                None => name.clone(),
            });
            state.args.retain(|(known, _)| *known != name);
            if let Some(value) = value {
                state.args.push((name, value));
            }
        }
        state.record(format!("ARG {}", shown.join(" ")), None);
        Ok(())
    }

    /// Puts an operation on top of the stage.
    fn layer(&mut self, state: &mut State, op: Op, mut inputs: Vec<VertexId>, text: &str, span: Span) {
        state.done += 1;
        let label = if state.label.is_empty() { String::new() } else { format!("{} ", state.label) };
        let name = format!("[{label}{}/{}] {text}", state.done, state.total);
        inputs.insert(0, state.root);
        state.root = self.graph.add(Vertex { op, inputs, name, no_cache: state.no_cache, span });
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one instruction")]
    async fn run(
        &mut self,
        state: &mut State,
        stage: usize,
        instruction: &Instruction,
        form: &Form,
        flags: &Flags,
        heredocs: &[Heredoc],
        resolver: &dyn Resolver,
    ) -> Result<(), StageError> {
        let span = instruction.span;
        let variables = state.env_map();
        let mut scripts = Vec::new();
        let args = match form {
            Form::Exec(words) => words.clone(),
            Form::Shell(text) => {
                let mut text = text.clone();
                let mut words = state.shell();
                match heredocs {
                    [only] if is_only_heredoc(&text) => {
                        if only.content.starts_with("#!") {
                            scripts.push((only.name.clone(), only.content.clone()));
                            words = vec![format!("/dev/pipes/{}", only.name)];
                        } else {
                            words.push(only.content.clone());
                        }
                    }
                    heredocs => {
                        for heredoc in heredocs {
                            text.push('\n');
                            text.push_str(&heredoc.content);
                            text.push_str(&heredoc.name);
                        }
                        words.push(text);
                    }
                }
                words
            }
        };
        let mut inputs = Vec::new();
        let mut mounts = Vec::new();
        let mut agents = 0;
        for text in &flags.mounts {
            let shell = Shell::new(self.file.directives.escape, &variables);
            let mount = Mount::parse(text, &|value| shell.word(value)).map_err(at(span))?;
            let input = match &mount.from {
                Some(from) => Some(self.named(from, stage, span, resolver).await?),
                None if mount.kind == MountKind::Bind => Some(self.context("", span)),
                None => None,
            };
            let input = input.map(|id| {
                inputs.push(id);
                inputs.len()
            });
            mounts.push(run_mount(state, &mount, input, &mut agents).map_err(at(span))?);
        }
        let insecure = match flags.security.as_deref() {
            None | Some("sandbox") => false,
            Some("insecure") if self.options.allow_insecure => true,
            Some("insecure") => {
                return Err(Fault::new(span, "--security=insecure is not allowed: the build must be started with --allow security.insecure").into());
            }
            Some(other) => return Err(Fault::new(span, format!("unsupported security mode: {other}")).into()),
        };
        let network = match flags.network.as_deref() {
            None | Some("default") => {
                if self.options.network.is_empty() {
                    "default".to_owned()
                } else {
                    self.options.network.clone()
                }
            }
            Some(mode @ ("none" | "host")) => mode.to_owned(),
            Some(other) => return Err(Fault::new(span, format!("unsupported network mode: {other}")).into()),
        };
        if let Some(device) = flags.devices.first() {
            return Err(Error::NotImplemented(format!(
                "RUN --device={device} is not built: devices cannot be given to a build step"
            ))
            .into());
        }
        let env_names: Vec<&String> = state.env.iter().map(|(name, _)| name).collect();
        let given: Vec<String> = state
            .args
            .iter()
            .filter(|(name, _)| !env_names.contains(&name))
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let mut env: Vec<String> = state.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        env.extend(given.iter().cloned());
        let mut history = given.clone();
        history.retain(|line| !vars::PROXIES.iter().any(|proxy| line.starts_with(&format!("{proxy}="))));
        let prefix = if history.is_empty() {
            String::new()
        } else {
            format!("|{} {} ", history.len(), history.join(" "))
        };
        let created_by = format!("RUN {prefix}{} # buildkit", args.join(" "));
        let proxy = vars::proxies(self.options)
            .into_iter()
            .filter(|line| {
                !state.args.iter().chain(&state.env).any(|(name, _)| line.starts_with(&format!("{name}=")))
            })
            .collect();
        let hostname = match self.options.build_args.get("BUILDKIT_SANDBOX_HOSTNAME") {
            Some(Some(name)) => name.clone(),
            _ => "buildkitsandbox".to_owned(),
        };
        let op = Op::Run(Box::new(Run {
            around: Around {
                proxy,
                hosts: self.options.hosts.clone(),
                hostname,
                shm_size: self.options.shm_size,
                limits: self.options.limits.clone(),
                shown: args.join(" "),
            },
            args,
            env,
            cwd: if state.config.config.working_dir.is_empty() {
                "/".to_owned()
            } else {
                state.config.config.working_dir.clone()
            },
            user: state.config.config.user.clone(),
            network,
            insecure,
            mounts,
            scripts,
        }));
        self.layer(state, op, inputs, &instruction.original, span);
        state.record(created_by, Some(state.root));
        Ok(())
    }

    async fn copy(
        &mut self,
        state: &mut State,
        stage: usize,
        instruction: &Instruction,
        copy: &Copy<'_>,
        resolver: &dyn Resolver,
    ) -> Result<(), StageError> {
        let span = instruction.span;
        let variables = state.env_map();
        let escape = self.file.directives.escape;
        let shell = Shell::new(escape, &variables);
        let word = |text: &str| shell.word(text).map_err(at(span));
        let flags = copy.flags;
        let written = word(copy.destination)?;
        let destination = state.absolute(&written);
        let sources = copy.sources.iter().map(|source| word(source)).collect::<Result<Vec<_>, _>>()?;
        let how = How {
            owner: flags.chown.as_deref().map(word).transpose()?,
            chmod: flags.chmod.as_deref().map(word).transpose()?,
            parents: flags.parents,
            exclude: flags.exclude.clone(),
            unpack: false,
            link: flags.link,
        };
        if let Some(chmod) = &how.chmod {
            crate::write::Chmod::parse(chmod).map_err(|error| Fault::new(span, error.to_string()))?;
        }
        let many = sources.len() + copy.heredocs.len() > 1;
        if many && !destination.ends_with('/') {
            let keyword = if copy.add { "ADD" } else { "COPY" };
            return Err(Fault::new(
                span,
                format!("When using {keyword} with more than one source file, the destination must be a directory and end with a /"),
            )
            .into());
        }
        let mut inputs = Vec::new();
        let mut actions = Vec::new();
        let (remote, local): (Vec<String>, Vec<String>) =
            sources.iter().cloned().partition(|source| crate::remote::is_remote(source));
        if !copy.add
            && let Some(source) = remote.first()
        {
            return Err(Fault::new(
                span,
                format!("source can't be a URL for COPY: {source} (ADD takes URLs)"),
            )
            .into());
        }
        if flags.checksum.is_some() && (remote.len() != 1 || many) {
            return Err(Fault::new(span, "checksum can only be specified for one HTTP or git source").into());
        }
        for source in remote {
            let checksum = flags.checksum.as_deref().map(word).transpose()?;
            let mut op = crate::remote::source(&source);
            crate::remote::with_flags(&mut op, checksum, flags.keep_git_dir).map_err(at(span))?;
            let git = matches!(op, Op::Git { .. });
            let id = self.graph.add(Vertex {
                op,
                inputs: Vec::new(),
                name: source.clone(),
                no_cache: false,
                span,
            });
            inputs.push(id);
            let input = inputs.len();
            let mut how = how.clone();
            actions.push(if git {
                Action::Copy {
                    input,
                    sources: vec!["/".to_owned()],
                    destination: destination.clone(),
                    many: false,
                    how,
                }
            } else {
                how.unpack = flags.unpack.unwrap_or(false);
                Action::Download { input, destination: destination.clone(), how }
            });
        }
        if !local.is_empty() {
            let id = match &flags.from {
                Some(from) => self.named(from, stage, span, resolver).await?,
                None => self.context("", span),
            };
            inputs.push(id);
            let mut how = how.clone();
            how.unpack = copy.add && flags.unpack != Some(false);
            actions.push(Action::Copy {
                input: inputs.len(),
                sources: local,
                destination: destination.clone(),
                many,
                how,
            });
        }
        for heredoc in copy.heredocs {
            let data = if heredoc.expand {
                Shell::new(escape, &variables).raw().word(&heredoc.content).map_err(at(span))?
            } else {
                heredoc.content.clone()
            };
            actions.push(Action::Text {
                name: heredoc.name.clone(),
                data,
                destination: destination.clone(),
                how: how.clone(),
            });
        }
        let mut shown = vec![if copy.add { "ADD" } else { "COPY" }.to_owned()];
        shown.extend(how.owner.iter().map(|owner| format!("--chown={owner}")));
        shown.extend(how.chmod.iter().map(|mode| format!("--chmod={mode}")));
        shown.extend(sources);
        shown.extend(copy.heredocs.iter().map(|heredoc| format!("<<{}", heredoc.name)));
        shown.push(written);
        shown.push("# buildkit".to_owned());
        self.layer(state, Op::Files(actions), inputs, &instruction.original, span);
        state.record(shown.join(" "), Some(state.root));
        Ok(())
    }

    pub fn finish(mut self) -> Result<Plan, Fault> {
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
            warnings: self.warnings,
            unconsumed: vars::unconsumed(self.options, &self.used_args),
        })
    }
}

/// The parts of a COPY or ADD.
struct Copy<'i> {
    add: bool,
    sources: &'i [String],
    destination: &'i str,
    flags: &'i Flags,
    heredocs: &'i [Heredoc],
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

/// `<<EOF` and nothing else.
fn is_only_heredoc(text: &str) -> bool {
    let text = text.trim();
    text.trim_start_matches(|c: char| c.is_ascii_digit()).starts_with("<<")
        && !text.contains(char::is_whitespace)
}

fn command_words(form: &Form, state: &State) -> Vec<String> {
    match form {
        Form::Exec(words) => words.clone(),
        Form::Shell(text) if text.is_empty() => Vec::new(),
        Form::Shell(text) => {
            let mut words = state.shell();
            words.push(text.clone());
            words
        }
    }
}

/// `["a" "b"]`, as history has it.
fn quoted(words: &[String]) -> String {
    let words: Vec<String> =
        words.iter().map(|word| serde_json::to_string(word).unwrap_or_default()).collect();
    format!("[{}]", words.join(" "))
}

fn health_text(check: &Healthcheck) -> String {
    let duration = |nanos: Option<i64>| go_duration(nanos.unwrap_or_default());
    format!(
        "&{{{} {:?} {:?} {:?} {:?} {}}}",
        quoted(&check.test),
        duration(check.interval),
        duration(check.timeout),
        duration(check.start_period),
        duration(check.start_interval),
        check.retries.map_or_else(|| "'\\x00'".to_owned(), |retries| format!("'\\x{retries:02x}'")),
    )
}

/// `1m30s`.
fn go_duration(nanos: i64) -> String {
    if nanos == 0 {
        return "0s".to_owned();
    }
    let seconds = nanos as f64 / 1e9;
    if seconds < 1.0 {
        return format!("{}ms", nanos as f64 / 1e6);
    }
    let (hours, minutes) = (nanos / 3_600_000_000_000, nanos / 60_000_000_000 % 60);
    let rest = seconds - (nanos / 60_000_000_000 * 60) as f64;
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, minutes) => format!("{minutes}m{rest}s"),
        (hours, minutes) => format!("{hours}h{minutes}m{rest}s"),
    }
}

/// `80`, `80/udp`, `8000-8010/tcp`.
fn ports(text: &str) -> Option<Vec<String>> {
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        return None;
    }
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then(|| (first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

/// A signal by number or name, with or without SIG.
fn is_signal(text: &str) -> bool {
    const NAMES: &[&str] = &[
        "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL",
        "PIPE", "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP",
        "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
    ];
    if let Ok(number) = text.parse::<u32>() {
        return (1..=64).contains(&number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    NAMES.contains(&name)
        || name
            .strip_prefix("RTMIN+")
            .or_else(|| name.strip_prefix("RTMAX-"))
            .is_some_and(|number| number.parse::<u32>().is_ok_and(|number| number <= 15))
        || matches!(name, "RTMIN" | "RTMAX")
}

fn run_mount(
    state: &State,
    mount: &Mount,
    input: Option<usize>,
    agents: &mut usize,
) -> Result<RunMount, String> {
    let target = match (&mount.target, mount.kind) {
        (Some(target), _) if !target.is_empty() => state.absolute(target),
        (_, MountKind::Secret) if mount.env.is_some() => String::new(),
        (_, MountKind::Secret) => {
            let id = mount.id.as_deref().or(mount.source.as_deref()).unwrap_or_default();
            if id.is_empty() {
                return Err("a secret mount needs an id or a target".to_owned());
            }
            format!("/run/secrets/{}", crate::tree::last(id))
        }
        (_, MountKind::Ssh) => {
            let target = format!("/run/buildkit/ssh_agent.{agents}");
            *agents += 1;
            target
        }
        _ => return Err(format!("mount type '{}' needs target=", mount.kind.as_str())),
    };
    let target = if target.len() > 1 { target.trim_end_matches('/').to_owned() } else { target };
    if target == "/" {
        return Err("invalid mount target \"/\"".to_owned());
    }
    let id = match mount.kind {
        MountKind::Cache => mount.id.clone().unwrap_or_else(|| target.clone()),
        MountKind::Secret => mount
            .id
            .clone()
            .or_else(|| mount.source.clone())
            .unwrap_or_else(|| crate::tree::last(&target).to_owned()),
        MountKind::Ssh => mount.id.clone().unwrap_or_else(|| "default".to_owned()),
        MountKind::Bind | MountKind::Tmpfs => String::new(),
    };
    Ok(RunMount {
        kind: mount.kind,
        input,
        source: clean(mount.source.as_deref().unwrap_or_default()),
        read_only: mount.read_only.unwrap_or(mount.kind == MountKind::Bind),
        id,
        sharing: mount.sharing.clone(),
        size: mount.size,
        mode: mount.mode,
        uid: mount.uid.unwrap_or_default(),
        gid: mount.gid.unwrap_or_default(),
        required: mount.required,
        env: mount.env.clone(),
        target,
    })
}
