//! COPY and ADD: sources of the context, of stages, images, the web and repositories, and heredocs.

use brigantine_registry::redacted;

use super::dispatch::{Conversion, StageError};
use super::state::State;
use super::{Resolver, at};
use crate::dockerfile::{Fault, Flags, Heredoc, Instruction, Rule, Shell, Span, Warning};
use crate::graph::{Action, How, Op, Vertex};
use crate::pattern::{clean, has_wildcard};

/// The parts of a COPY or ADD.
pub(super) struct Copy<'i> {
    pub add: bool,
    pub sources: &'i [String],
    pub destination: &'i str,
    pub flags: &'i Flags,
    pub heredocs: &'i [Heredoc],
}

impl Conversion<'_> {
    pub(super) async fn copy(
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
            crate::chmod::Chmod::parse(chmod).map_err(|error| Fault::new(span, error.to_string()))?;
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
        if flags.from.is_none() {
            self.check_ignored(&sources, span);
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
                format!("source can't be a URL for COPY: {} (ADD takes URLs)", redacted(source)),
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
        self.check_variables(state, &shell.unset(), span);
        let mut shown = vec![if copy.add { "ADD" } else { "COPY" }.to_owned()];
        shown.extend(how.owner.iter().map(|owner| format!("--chown={owner}")));
        shown.extend(how.chmod.iter().map(|mode| format!("--chmod={mode}")));
        shown.extend(sources.iter().map(|source| redacted(source).into_owned()));
        shown.extend(copy.heredocs.iter().map(|heredoc| format!("<<{}", heredoc.name)));
        shown.push(written);
        shown.push("# buildkit".to_owned());
        self.layer(state, Op::Files(actions), inputs, &instruction.original, span);
        state.record(shown.join(" "), Some(state.root));
        Ok(())
    }
    /// Remarks on files of the context that its ignore file leaves out.
    fn check_ignored(&mut self, sources: &[String], span: Span) {
        for source in sources {
            let path = clean(source);
            if path.is_empty() || has_wildcard(&path) || crate::remote::is_remote(source) {
                continue;
            }
            if self.ignore.excludes(&path) && !self.ignore.may_take_again_below(&path) {
                self.warnings.push(Warning::new(
                    Rule::CopyIgnoredFile,
                    span,
                    format!("{source:?} is left out of the context by .dockerignore"),
                ));
            }
        }
    }
}
