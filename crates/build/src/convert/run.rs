//! RUN: its command, mounts, network and what it runs in.

use brigantine_image::Platform;

use super::dispatch::{Conversion, StageError};
use super::state::State;
use super::{Resolver, at, vars};
use crate::dockerfile::{Fault, Flags, Form, Heredoc, Instruction, Mount, MountKind, Shell};
use crate::error::Error;
use crate::graph::{Around, Op, Run, RunMount};
use crate::pattern::clean;

impl Conversion<'_> {
    #[expect(clippy::too_many_arguments, reason = "the parts of one instruction")]
    pub(super) async fn run(
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
        let env = state.program_env();
        let history = state.declared_args();
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
            foreign: Some(state.config.platform().normalised())
                .filter(|platform| *platform != Platform::host())
                .map(|platform| platform.to_string()),
        }));
        self.layer(state, op, inputs, &instruction.original, span);
        state.record(created_by, Some(state.root));
        Ok(())
    }
}

/// `<<EOF` and nothing else.
fn is_only_heredoc(text: &str) -> bool {
    let text = text.trim();
    text.trim_start_matches(|c: char| c.is_ascii_digit()).starts_with("<<")
        && !text.contains(char::is_whitespace)
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
