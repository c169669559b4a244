//! What stages stand on and names lead to: images, other stages, contexts.

use std::collections::{BTreeMap, BTreeSet};

use brigantine_image::{ImageConfig, Platform};

use super::dispatch::{Conversion, StageError};
use super::state::State;
use super::{Base, Resolver, stage_by_name};
use crate::dockerfile::{Fault, Rule, Span, Warning};
use crate::graph::{Action, How, NamedContext, Op, Vertex, VertexId};

/// The search path of images that set none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Conversion<'_> {
    pub(super) async fn image(
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
            Some(NamedContext::Local(_) | NamedContext::Remote(_)) => return Ok(self.context(name, span)),
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

    pub(super) fn scratch(&mut self, span: Span) -> VertexId {
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

    /// What a stage begins with.
    pub(super) async fn base(
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
            scans: BTreeMap::new(),
            history: Vec::new(),
            cmd_set: false,
            workdir_set: false,
            no_cache,
            label: label.to_owned(),
            total: 0,
            done: 0,
        };
        match named {
            Some(NamedContext::Local(_) | NamedContext::Remote(_)) => {
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
}
