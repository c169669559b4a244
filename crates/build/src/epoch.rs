//! `SOURCE_DATE_EPOCH`: a number of seconds, or the name of a context whose time is meant.
//!
//! A repository's time is its commit's; that of a download what its server says, else the latest of the archive's
//! entries. A folder of the client's has none, and leaves the argument unset, as with BuildKit.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::sync::Arc;

use crate::access::Secrets;
use crate::convert::{Options, global_default};
use crate::dockerfile::Dockerfile;
use crate::error::{Context as _, Result, invalid};
use crate::graph::NamedContext;
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
    invalid(format!("{NAME}={text}: seconds since 1970, \"context\" or a context's name are expected"))
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
        let time = match options.contexts.get(&text) {
            Some(NamedContext::Remote(url)) => {
                // Its name begins with the build's id, so that it goes with the build.
                let dir = self.solver().tmp.join(format!("{id}-epoch"));
                let made = fs::DirBuilder::new().mode(0o700).create(&dir);
                made.doing(|| format!("create {}", dir.display()))?;
                let secrets = Secrets::new(Arc::new(request.secrets.clone()), request.session.clone());
                let found = source::time_of(self.solver(), url, &secrets, &dir.join("files")).await;
                crate::snapshot::remove_tree(&dir);
                found?
            }
            Some(NamedContext::Local(_)) => None,
            Some(NamedContext::Image(_)) => {
                return Err(invalid(format!(
                    "{NAME}={text}: an image has no time of its own: a repository or an archive's URL is expected"
                )));
            }
            None if text == "context" => main,
            None => return Err(wrong(&text)),
        };
        let args = &mut request.options.build_args;
        match time {
            Some(seconds) => args.insert(NAME.to_owned(), Some(seconds.to_string())),
            None => args.remove(NAME),
        };
        Ok(())
    }
}
