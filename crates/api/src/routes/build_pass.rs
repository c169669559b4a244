//! Images that are there for the time of one build: of an OCI layout that is a named context, and a result that only
//! its archive is asked of.
//!
//! Invariant: such an image goes when its build ends, however that ends; one that was there before, or that somebody
//! has given a name meanwhile, stays.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::sync::Arc;

use brigantine_image::{Digest, Image, Platform, Store, archive};
use brigantine_session::Session;

use super::State;
use crate::http::Error;

/// Images that go when this is dropped.
pub struct Passing {
    state: State,
    before: HashSet<Digest>,
    ids: Vec<Digest>,
}

impl Passing {
    /// Begins: what is here now stays. Only if there will be some (`any`) that is looked up.
    pub async fn new(state: &State, any: bool) -> Result<Self, Error> {
        let mut before = HashSet::new();
        if any {
            let list = state.engine.images().with(Store::list).await?;
            before = list.into_iter().map(|image| image.id).collect();
        }
        Ok(Self { state: state.clone(), before, ids: Vec::new() })
    }

    pub fn add(&mut self, id: &Digest) {
        if !self.before.contains(id) {
            self.ids.push(id.clone());
        }
    }

    /// Takes in the layouts, by name; tells each one's image.
    pub async fn layouts(
        &mut self,
        layouts: BTreeMap<String, Box<dyn Read + Send>>,
        platform: Option<&Platform>,
    ) -> Result<BTreeMap<String, Digest>, Error> {
        let mut found = BTreeMap::new();
        for (name, body) in layouts {
            let platform = platform.cloned();
            let load = self.state.engine.images().with(move |store| {
                archive::load_nameless(
                    store,
                    std::io::BufReader::with_capacity(1 << 18, body),
                    platform.as_ref(),
                    &mut |_progress| {},
                )
            });
            let loaded = load.await?;
            self.state.engine.images().forget();
            for one in &loaded {
                self.add(&one.image);
            }
            let [one] = &loaded[..] else {
                return Err(Error::invalid(format!(
                    "the context {name} holds {} images, not one",
                    loaded.len()
                )));
            };
            found.insert(name, one.image.clone());
        }
        Ok(found)
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        let (state, ids) = (self.state.clone(), std::mem::take(&mut self.ids));
        if ids.is_empty() {
            return;
        }
        tokio::spawn(async move {
            let of = state.clone();
            let removed = state.engine.images().with(move |store| {
                for id in &ids {
                    let named = store.image(id).is_ok_and(|image| !image.tags.is_empty());
                    // A container that was made of it meanwhile is a reason to keep it.
                    if !named
                        && let Err(error) =
                            store.remove(id.as_str(), false, true, &of.engine.containers().images_in_use())
                    {
                        tracing::debug!(%error, %id, "a build's image stays");
                    }
                }
                Ok(())
            });
            if let Err(error) = removed.await {
                tracing::warn!(error = error.report(), "remove a build's image");
            }
            state.engine.images().forget();
            state.engine.check_build_cache();
        });
    }
}

/// Sends an image's archive to the client's session, under its names if it has some.
pub async fn send_archive(
    state: &State,
    session: &Arc<Session>,
    image: &Image,
    names: Vec<String>,
) -> Result<(), Error> {
    let names = if names.is_empty() { vec![image.id.to_string()] } else { names };
    let (session, runtime) = (Arc::clone(session), tokio::runtime::Handle::current());
    let sent = state.engine.images().with(move |store| {
        let mut output = match session.archive(&runtime, "image") {
            Ok(output) => output,
            Err(error) => return Ok(Err(error)),
        };
        let saved = archive::save(store, &names, &mut output);
        // Why the client took no more says more than that it did not.
        if let Err(error) = output.finish() {
            return Ok(Err(error));
        }
        saved?;
        Ok(Ok(()))
    });
    sent.await?.map_err(|error| brigantine_engine::Error::from(brigantine_build::Error::from(error)).into())
}
