//! What one instruction does to graph, configuration and history.

use brigantine_image::model::Healthcheck as ImageHealthcheck;

use super::copy::Copy;
use super::dispatch::{Conversion, StageError};
use super::scans::is_scan;
use super::state::State;
use super::text::{command_words, health_text, is_signal, ports, quoted};
use super::{Resolver, at};
use crate::dockerfile::checks::suggestion;
use crate::dockerfile::{Command, Fault, Instruction, Rule, Shell, Span, Warning};
use crate::graph::{Action, Op};

impl Conversion<'_> {
    pub(super) async fn instruction(
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
            if is_scan(&name) {
                state.scans.extend(value.map(|value| (name, (value, span))));
                continue;
            }
            state.declared.push(name.clone());
            if let Some(value) = value {
                state.set_arg(name, value);
            }
        }
        state.record(format!("ARG {}", shown.join(" ")), None);
        Ok(())
    }
}
