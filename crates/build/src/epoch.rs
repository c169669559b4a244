//! `SOURCE_DATE_EPOCH`: a number of seconds, or the name of a context, or of a stage that is one source from elsewhere,
//! whose time is meant.
//!
//! A repository's time is its commit's; that of a download what its server says, else the latest of the archive's
//! entries. A folder of the client's has none, and leaves the argument unset, as with BuildKit.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::sync::Arc;

use crate::access::Secrets;
use crate::convert::{Options, global_default, only_source, stage_by_name};
use crate::dockerfile::Dockerfile;
use crate::error::{Context as _, Result, invalid};
use crate::graph::{NamedContext, Op};
use crate::{Builder, Request, source};

const NAME: &str = "SOURCE_DATE_EPOCH";

/// The argument's number, if it is given.
pub(crate) fn given(options: &Options) -> Result<Option<i64>> {
    match options.build_args.get(NAME) {
        Some(Some(text)) if !text.is_empty() => text.parse().map(Some).map_err(|_bad| wrong(text)),
        _ => Ok(None),
    }
}

fn wrong(text: &str) -> crate::Error {
    invalid(format!(
        "{NAME}={text}: seconds since 1970, \"context\", or the name of a context or of a stage is expected"
    ))
}

/// What may have a time of its own.
enum Dated<'u> {
    /// A context's URL.
    Context(&'u str),
    /// What a stage adds.
    Source(Op),
}

impl Builder {
    /// Puts a number in the place of a context's name, and what the Dockerfile says in that of nothing.
    pub(crate) async fn settle_epoch(
        &self,
        request: &mut Request,
        file: &Dockerfile,
        main: Option<i64>,
        id: &str,
    ) -> Result<()> {
        let options = &request.options;
        let text = match options.build_args.get(NAME) {
            Some(Some(text)) => text.clone(),
            _ => global_default(file, options, NAME).unwrap_or_default(),
        };
        if text.is_empty() || text.parse::<i64>().is_ok() {
            if !text.is_empty() {
                request.options.build_args.insert(NAME.to_owned(), Some(text));
            }
            return Ok(());
        }
        let secrets = Secrets::new(Arc::new(request.secrets.clone()), request.session.clone());
        let time = match options.contexts.get(&text) {
            Some(NamedContext::Remote(url)) => self.time_of(&secrets, &Dated::Context(url), id).await?,
            Some(NamedContext::Local(_)) => None,
            Some(NamedContext::Image(_)) => {
                return Err(invalid(format!(
                    "{NAME}={text}: an image has no time of its own: a repository or an archive's URL is expected"
                )));
            }
            None if text == "context" => main,
            None => match stage_by_name(file, &text, file.stages.len()) {
                None => return Err(wrong(&text)),
                Some(number) => {
                    let found = only_source(file, options, number);
                    let source = found.map_err(|why| invalid(format!("{NAME}={text}: {why}")))?;
                    self.time_of(&secrets, &Dated::Source(source), id).await?
                }
            },
        };
        let args = &mut request.options.build_args;
        match time {
            Some(seconds) => args.insert(NAME.to_owned(), Some(seconds.to_string())),
            None => args.remove(NAME),
        };
        Ok(())
    }

    async fn time_of(&self, secrets: &Secrets, what: &Dated<'_>, id: &str) -> Result<Option<i64>> {
        // Its name begins with the build's id, so that it goes with the build.
        let dir = self.solver().tmp.join(format!("{id}-epoch"));
        let made = fs::DirBuilder::new().mode(0o700).create(&dir);
        made.doing(|| format!("create {}", dir.display()))?;
        let place = dir.join("files");
        let found = match what {
            Dated::Context(url) => source::time_of(self.solver(), url, secrets, &place).await,
            Dated::Source(op) => source::time_of_source(self.solver(), op, secrets, &place).await,
        };
        crate::snapshot::remove_tree(&dir);
        found
    }
}
