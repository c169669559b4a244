//! A Dockerfile to a graph and an image's configuration, stage by stage.
//!
//! Invariant: only stages that the target needs are looked at; an image that only others need is not even resolved.

mod base;
mod copy;
mod dispatch;
mod instruct;
mod only;
pub(crate) mod outline;
mod platforms;
mod reach;
mod run;
mod scans;
mod state;
mod text;
mod vars;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;

use brigantine_image::{ImageConfig, Platform};

pub(crate) use only::only_source;
pub use platforms::convert_all;
pub(crate) use vars::global_default;

use crate::dockerfile::{Checks, Command, Dockerfile, Fault, Span, Warning};
use crate::error::{Error, Result, invalid};
use crate::graph::{Graph, Limits, NamedContext, NamedContexts, VertexId};
use crate::pattern::Ignore;
use crate::wanted::Export;

/// What decides about a build beside its Dockerfile.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub target: Option<String>,
    pub build_args: BTreeMap<String, Option<String>>,
    pub labels: BTreeMap<String, String>,
    pub platform: Option<Platform>,
    /// Further platforms besides that one: the result is an index.
    pub more_platforms: Vec<Platform>,
    pub no_cache: bool,
    /// Stages (names or numbers) that are run again.
    pub no_cache_filter: Vec<String>,
    pub contexts: NamedContexts,
    /// The network of RUN steps that name none.
    pub network: String,
    pub hosts: Vec<String>,
    pub shm_size: Option<i64>,
    pub limits: Limits,
    /// RUN steps may ask for `--security=insecure`.
    pub allow_insecure: bool,
    /// What is wanted of the result.
    pub export: Export,
}

/// An image that a FROM or a `--from` names.
#[derive(Debug, Clone)]
pub struct Base {
    pub config: ImageConfig,
    /// Bottom first.
    pub diff_ids: Vec<String>,
}

/// Finds images; those that are not here are pulled.
pub trait Resolver: Send + Sync {
    fn resolve<'a>(
        &'a self,
        name: &'a str,
        platform: &'a Platform,
    ) -> Pin<Box<dyn Future<Output = Result<Base>> + Send + 'a>>;
}

/// One line of the image's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryItem {
    pub created_by: String,
    /// The operation that made its layer, if it makes one.
    pub vertex: Option<VertexId>,
    pub comment: String,
    pub author: Option<String>,
}

/// One instruction, as a classic client counts them.
#[derive(Debug, Clone)]
pub struct Step {
    /// As it is written.
    pub text: String,
    pub vertex: Option<VertexId>,
    /// It is the last of its stage.
    pub ends_stage: bool,
    /// How many ONBUILD triggers a FROM brought.
    pub triggers: usize,
}

/// What is to be solved, and what the result is to look like.
#[derive(Debug, Clone)]
pub struct Plan {
    pub graph: Graph,
    pub target: VertexId,
    /// The configuration without layers and history of its own.
    pub config: ImageConfig,
    /// The base image's layers come first.
    pub history: Vec<HistoryItem>,
    /// Further file systems that an SBOM attestation tells of, by name.
    pub scans: BTreeMap<String, VertexId>,
    pub steps: Vec<Step>,
    /// What the build checks have to say.
    pub warnings: Vec<Warning>,
    /// The Dockerfile wants to be refused when there are warnings (`# check=error=true`).
    pub refused: bool,
    /// Build arguments nobody asked for.
    pub unconsumed: Vec<String>,
    /// The Dockerfile's name and text.
    pub name: String,
    pub text: String,
    /// The same for further platforms, in the same graph.
    pub others: Vec<Variant>,
}

impl Plan {
    /// What is wrong with a step, with the lines of the Dockerfile it comes from.
    pub fn excerpt(&self, vertex: VertexId, message: &str) -> String {
        let span = self.graph.get(vertex).span;
        Fault::new(span, message).excerpt(&self.name, &self.text)
    }

    /// What an SBOM attestation tells of beside a platform's result.
    pub fn scans_of(&self, platform: &Platform) -> &BTreeMap<String, VertexId> {
        let other = self.others.iter().find(|other| other.platform == *platform);
        other.map_or(&self.scans, |other| &other.scans)
    }

    /// The same of all platforms.
    pub fn all_scans(&self) -> impl Iterator<Item = VertexId> {
        self.others.iter().map(|other| &other.scans).chain([&self.scans]).flat_map(BTreeMap::values).copied()
    }
}

/// What a plan is to come to on a further platform.
#[derive(Debug, Clone)]
pub struct Variant {
    pub platform: Platform,
    pub target: VertexId,
    pub config: ImageConfig,
    pub history: Vec<HistoryItem>,
    pub scans: BTreeMap<String, VertexId>,
}

/// Makes the plan of a build.
pub async fn convert(
    file: &Dockerfile,
    name: &str,
    text: &str,
    options: &Options,
    ignore: &Ignore,
    resolver: &dyn Resolver,
) -> Result<Plan> {
    let fault = |fault: Fault| Error::fault(fault, name, text);
    frontend(file, options)?;
    let platform = options.platform.clone().unwrap_or_else(Platform::host);
    let globals = vars::globals(file, options, &platform).map_err(fault)?;
    let defaults = vars::globals(file, &Options::default(), &platform).unwrap_or_default();
    let checks = checks(file, options)?;
    let target = reach::target(file, options.target.as_deref()).map_err(fault)?;
    let mut conversion =
        dispatch::Conversion::new(file, options, ignore, platform, [globals, defaults], target);
    // ONBUILD triggers may bring in further stages: those are found when their base is known.
    let wanted = reach::reachable(file, &conversion.globals, options, target).map_err(fault)?;
    conversion.count_globals();
    for number in wanted {
        conversion.stage(number, resolver).await.map_err(|error| match error {
            dispatch::StageError::Fault(found) => fault(found),
            dispatch::StageError::At(span, cause) => {
                let excerpt = Fault::new(span, cause.report()).excerpt(name, text);
                Error::Place { excerpt, cause: Box::new(cause) }
            }
            dispatch::StageError::Error(error) => error,
        })?;
    }
    let mut plan = conversion.finish(&checks).map_err(fault)?;
    (plan.name, plan.text) = (name.to_owned(), text.to_owned());
    Ok(plan)
}

/// The language is the one that is built in: of any other a Dockerfile would be misread.
fn frontend(file: &Dockerfile, options: &Options) -> Result<()> {
    let asked = options.build_args.get("BUILDKIT_SYNTAX").and_then(Option::as_deref);
    let Some(syntax) = asked.or(file.directives.syntax.as_deref()) else { return Ok(()) };
    let image = syntax.split_whitespace().next().unwrap_or_default();
    let image = image.split('@').next().unwrap_or_default();
    let plain = image.strip_prefix("docker.io/").unwrap_or(image);
    let repository = plain.rsplit_once(':').map_or(plain, |(repository, _tag)| repository);
    match repository {
        "" | "dockerfile.v0" | "docker/dockerfile" | "docker/dockerfile-upstream" => Ok(()),
        _ => Err(Error::NotImplemented(format!(
            "the frontend {syntax} is not run: docker/dockerfile is known, which is built in"
        ))),
    }
}

/// Which checks are told: by the request, else by the Dockerfile.
fn checks(file: &Dockerfile, options: &Options) -> Result<Checks> {
    let asked = options.build_args.get("BUILDKIT_DOCKERFILE_CHECK").and_then(Option::as_deref);
    let text = asked.or(file.directives.check.as_deref()).unwrap_or_default();
    Checks::parse(text).map_err(invalid)
}

/// Parses `--build-context name=value` as the frontend names its kinds.
pub fn named_context(value: &str) -> NamedContext {
    if let Some(image) = value.strip_prefix("docker-image://") {
        NamedContext::Image(image.to_owned())
    } else if let Some(folder) = value.strip_prefix("local:") {
        NamedContext::Local(folder.to_owned())
    } else if value.starts_with("http://")
        || value.starts_with("https://")
        || value.starts_with("git://")
        || value.starts_with("git@")
        || value.starts_with("ssh://")
    {
        NamedContext::Remote(value.to_owned())
    } else {
        NamedContext::Local(value.to_owned())
    }
}

/// The stage with this name or number, among the first `before`.
pub(crate) fn stage_by_name(file: &Dockerfile, name: &str, before: usize) -> Option<usize> {
    let lower = name.to_lowercase();
    let named = file.stages[..before].iter().rposition(|stage| stage.name() == Some(lower.as_str()));
    named.or_else(|| name.parse::<usize>().ok().filter(|number| *number < before))
}

/// Only FROM's own fields.
pub(crate) fn from_parts(command: &Command) -> (&str, Option<&str>) {
    match command {
        Command::From { image, platform, .. } => (image, platform.as_deref()),
        _ => ("", None),
    }
}

/// A fault without a place of its own.
pub(crate) fn at(span: Span) -> impl Fn(String) -> Fault {
    move |message| Fault::new(span, message)
}
