//! A build's definition: the Dockerfile as it comes with a request, before anything is resolved; and what can be told
//! of it alone.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::sync::Arc;

use brigantine_image::Reference;
use brigantine_registry::redacted;
use brigantine_session::Session;
use tokio::sync::mpsc;

use crate::access::Secrets;
use crate::building::Scratch;
use crate::convert::outline::{self, Outline, Targets};
use crate::dockerfile::{self, Dockerfile};
use crate::error::{Context as _, Error, Result};
use crate::source::{self, Source, Wanted};
use crate::{Builder, ContextSource, Event, Request, ids, received};

/// What a request brought.
pub(crate) struct Definition {
    pub source: Source,
    /// Where the context is to be asked for.
    pub sent_for: Option<Arc<Session>>,
    pub scratch: Arc<Scratch>,
}

impl Builder {
    /// Takes in the Dockerfile, and the context unless that is to be asked for when it is known what is used of it.
    pub(crate) async fn definition(
        &self,
        request: &mut Request,
        events: &mpsc::Sender<Event>,
    ) -> Result<Definition> {
        let id = ids::new();
        let solver = &self.solver;
        let scratch = Scratch { dir: solver.tmp.join(&id), id: id.clone(), tmp: solver.tmp.clone() };
        let scratch = Arc::new(scratch);
        let context = std::mem::replace(&mut request.context, ContextSource::Nothing);
        let dockerfile = std::mem::take(&mut request.dockerfile);
        let given = request.dockerfile_text.take();
        let mut sent_for = None;
        let source = match context {
            ContextSource::Session(session) => {
                fs::DirBuilder::new()
                    .mode(0o700)
                    .create(&scratch.dir)
                    .doing(|| format!("create {}", scratch.dir.display()))?;
                let hashes = &solver.hashes;
                let texts = received::texts(&session, &scratch, &dockerfile, hashes, events).await?;
                sent_for = Some(session);
                texts
            }
            context => {
                let dir = &scratch.dir;
                let shown = Arc::new(request.secrets.clone());
                let secrets = &Secrets::new(shown, request.session.clone());
                let keep = request
                    .options
                    .build_args
                    .get("BUILDKIT_CONTEXT_KEEP_GIT_DIR")
                    .and_then(Option::as_deref);
                let wanted = Wanted {
                    dir,
                    dockerfile: &dockerfile,
                    secrets,
                    keep_git: matches!(keep, Some("1" | "true")),
                    key: &kept_as(&request.tags),
                };
                let side = match &context {
                    ContextSource::Remote(url) => {
                        Some(format!("[internal] load remote build context {}", redacted(url)))
                    }
                    _ => None,
                };
                let loading = source::source(solver, context, wanted, given);
                match side {
                    Some(side) => crate::beside(events, &side, loading).await?,
                    None => loading.await?,
                }
            }
        };
        Ok(Definition { source, sent_for, scratch })
    }

    /// The stages that a Dockerfile has.
    pub async fn targets(&self, request: Request, events: mpsc::Sender<Event>) -> Result<Targets> {
        self.told(request, &events, outline::targets).await
    }

    /// What the target of a request takes.
    pub async fn outline(&self, request: Request, events: mpsc::Sender<Event>) -> Result<Outline> {
        self.told(request, &events, outline::outline).await
    }

    async fn told<T>(
        &self,
        mut request: Request,
        events: &mpsc::Sender<Event>,
        tell: impl Fn(&Dockerfile, &str, &crate::Options) -> Result<T, dockerfile::Fault>,
    ) -> Result<T> {
        let Definition { source, .. } = self.definition(&mut request, events).await?;
        let fault = |fault| Error::fault(fault, &source.name, &source.text);
        let file = dockerfile::parse(&source.text).map_err(fault)?;
        tell(&file, &source.text, &request.options).map_err(fault)
    }
}

/// What an archive's files are kept under until the next one: whoever builds for the same repositories is likely to send
/// much the same, and one who gives each build a tag of its own shall not fill the disk. Without a name they are not kept.
fn kept_as(tags: &[Reference]) -> String {
    let mut names: Vec<String> = tags.iter().map(Reference::repository).collect();
    names.sort();
    names.dedup();
    names.join(",")
}
