//! Build contexts that are kept between builds of the same folder, so that only what changed is sent (by a client's
//! session) or written (of an archive).
//!
//! Invariant: a kept context belongs to one build at a time; a second one of the same folder gets one of its own.

mod archive;
mod index;
mod write;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use brigantine_session::{Session, Wanted};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

pub(crate) use archive::{Former, receive_archive};
pub(crate) use write::{Received, receive};

use crate::building::Scratch;
use crate::convert::Plan;
use crate::error::{Context as _, Result, invalid};
use crate::graph::{Action, Op};
use crate::hashes::Hashes;
use crate::pattern::{Ignore, clean, has_wildcard};
use crate::snapshot::{disk_usage, remove_tree};
use crate::solver::blocking;
use crate::source::{Source, ignore_rules, read_dockerfile};
use crate::tree::Tree;
use crate::{Event, Side, send};

/// Contexts of one folder that are kept when several builds of it ran at once: so many of the next ones that run at once
/// are sent what differs. Each build has one to itself, because what is sent changes it in place, and none can wait for
/// another's to be whole: its client may be slow, or silent. Further builds are sent everything, every time.
const KEPT: u32 = 8;
/// How long a context is kept without a build.
const LASTING: Duration = Duration::from_hours(7 * 24);
/// The most bytes of a Dockerfile and its ignore file.
const MOST_TEXT: u64 = 2 * (crate::dockerfile::MOST as u64 + 1);
/// What clients call the main context.
const MAIN: &str = "context";
const IGNORE: &str = ".dockerignore";
/// How often progress is told.
const PACE: Duration = Duration::from_millis(100);

/// The kept contexts of a builder.
#[derive(Debug)]
pub(crate) struct Contexts {
    dir: PathBuf,
    in_use: Mutex<HashSet<String>>,
}

/// A kept context as people see it.
#[derive(Debug)]
pub(crate) struct KeptContext {
    pub id: String,
    pub in_use: bool,
    /// Bytes on disk.
    pub size: u64,
    /// Nanoseconds since the epoch.
    pub used: i64,
}

/// A context that a build has for itself.
#[derive(Debug)]
pub(crate) struct Taken {
    contexts: Arc<Contexts>,
    name: String,
    keep: bool,
}

impl Contexts {
    pub fn new(dir: PathBuf) -> Arc<Self> {
        Arc::new(Self { dir, in_use: Mutex::default() })
    }

    fn in_use(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for the folder of that key; without a key it lasts as long as it is held. Blocks.
    pub fn take(self: &Arc<Self>, key: &str) -> Result<Taken> {
        let taken = {
            let mut in_use = self.in_use();
            let mut number = 0;
            loop {
                let name = match key {
                    "" => crate::ids::new(),
                    key => format!("{}-{number}", &hex::encode(Sha256::digest(key))[..32]),
                };
                if in_use.insert(name.clone()) {
                    let keep = !key.is_empty() && number < KEPT;
                    break Taken { contexts: Arc::clone(self), name, keep };
                }
                number += 1;
            }
        };
        let dir = taken.dir();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .doing(|| format!("create {}", dir.display()))?;
        // Its time tells when it was last used.
        let now = fs::File::open(&dir).and_then(|dir| dir.set_modified(std::time::SystemTime::now()));
        now.doing(|| format!("use {}", dir.display()))?;
        Ok(taken)
    }

    /// All that are kept. Blocks.
    pub fn list(&self) -> Vec<KeptContext> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Vec::new() };
        let listed = entries.flatten().filter_map(|entry| {
            let id = entry.file_name().to_string_lossy().into_owned();
            let metadata = entry.metadata().ok()?;
            let used = metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
            Some(KeptContext {
                in_use: self.in_use().contains(&id),
                size: disk_usage(&entry.path()),
                used,
                id,
            })
        });
        listed.collect()
    }

    /// Removes one that no build uses: the bytes given back. Blocks.
    pub fn remove(&self, id: &str) -> u64 {
        // Taken while it is removed, so that no build begins with half of it.
        if id.contains('/') || !self.in_use().insert(id.to_owned()) {
            return 0;
        }
        let dir = self.dir.join(id);
        let size = disk_usage(&dir);
        remove_tree(&dir);
        self.in_use().remove(id);
        size
    }

    /// Removes what is old, and what a daemon that was killed had only for a build. Blocks.
    pub fn sweep(&self) {
        let before = std::time::SystemTime::now() - LASTING;
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        for entry in entries.flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            let number = id.rsplit_once('-').and_then(|(_, number)| number.parse().ok());
            let kept = number.is_some_and(|number: u32| number < KEPT);
            let used = entry.metadata().and_then(|metadata| metadata.modified());
            if !kept || used.is_ok_and(|used| used < before) {
                self.remove(&id);
            }
        }
    }
}

impl Taken {
    fn dir(&self) -> PathBuf {
        self.contexts.dir.join(&self.name)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if !self.keep {
            remove_tree(&self.dir());
        }
        self.contexts.in_use().remove(&self.name);
    }
}

/// Receives a folder into `dir`, telling how far it is. What `dir` belongs to is kept for as long as it is written to,
/// which may be longer than anybody waits.
async fn receive_telling(
    session: &Arc<Session>,
    wanted: &Wanted<'_>,
    (dir, kept): (PathBuf, impl Send + 'static),
    most: u64,
    name: &str,
    events: &mpsc::Sender<Event>,
) -> Result<Received> {
    let receiver = session.files(wanted)?;
    let (teller, side) = (events.clone(), name.to_owned());
    let part = format!("transferring {}:", wanted.folder);
    let what = part.clone();
    let received = blocking(move || {
        let mut last = Instant::now();
        let received = receive(&dir, receiver, most, |bytes| {
            if last.elapsed() >= PACE {
                last = Instant::now();
                let news = count(&what, bytes, false);
                // The next count makes it obsolete.
                if teller.try_send(Event::Side { name: side.clone(), news }).is_err() {
                    tracing::trace!("a transfer's progress was skipped");
                }
            }
        });
        drop(kept);
        received
    })
    .await?;
    send(events, Event::Side { name: name.to_owned(), news: count(&part, received.bytes, true) }).await;
    Ok(received)
}

fn count(what: &str, current: u64, done: bool) -> Side {
    Side::Count { what: what.to_owned(), current, total: None, done }
}

/// The Dockerfile and what the context shall not show, from the client's folders.
pub(crate) async fn texts(
    session: &Arc<Session>,
    scratch: &Arc<Scratch>,
    dockerfile: &str,
    hashes: &Arc<Hashes>,
    events: &mpsc::Sender<Event>,
) -> Result<Source> {
    let name = if dockerfile.is_empty() { "Dockerfile" } else { dockerfile };
    let side = format!("[internal] load build definition from {name}");
    let plain = clean(name);
    let follow = vec![plain.clone(), format!("{plain}.dockerignore"), "dockerfile".to_owned()];
    let dir = scratch.dir.join("definition");
    let loaded = crate::beside(events, &side, async {
        let wanted = Wanted { folder: "dockerfile", follow, ..Wanted::default() };
        receive_telling(session, &wanted, (dir.clone(), Arc::clone(scratch)), MOST_TEXT, &side, events)
            .await?;
        let (hashes, name) = (Arc::clone(hashes), name.to_owned());
        blocking(move || {
            let tree = folder(&dir, hashes)?;
            let (text, name) = read_dockerfile(&tree, &name)?;
            let own = tree.read(&format!("{}.dockerignore", clean(&name)))?;
            Ok((text, name, own))
        })
        .await
    });
    let (text, name, own) = loaded.await?;
    let side = "[internal] load .dockerignore";
    let rules = crate::beside(events, side, async {
        if let Some(own) = own {
            return Ok(Some((own, format!("{name}.dockerignore"))));
        }
        rules(session, MAIN, scratch, hashes, side, events).await
    });
    let ignore = ignore_rules(rules.await?)?;
    Ok(Source { tree: None, ignore, text, name, taken: None, time: None })
}

/// The text of a folder's own ignore file, with its name.
async fn rules(
    session: &Arc<Session>,
    from: &str,
    scratch: &Arc<Scratch>,
    hashes: &Arc<Hashes>,
    side: &str,
    events: &mpsc::Sender<Event>,
) -> Result<Option<(Vec<u8>, String)>> {
    let dir = scratch.dir.join(format!("ignore-{}", crate::ids::new()));
    let wanted = Wanted { folder: from, follow: vec![IGNORE.to_owned()], ..Wanted::default() };
    receive_telling(session, &wanted, (dir.clone(), Arc::clone(scratch)), MOST_TEXT, side, events).await?;
    let hashes = Arc::clone(hashes);
    blocking(move || Ok(folder(&dir, hashes)?.read(IGNORE)?.map(|text| (text, IGNORE.to_owned())))).await
}

fn folder(dir: &Path, hashes: Arc<Hashes>) -> Result<Tree> {
    Ok(Tree::folder(crate::tree::open_dir(&dir.join("files"))?, Ignore::default(), hashes))
}

/// A context of a client's session: its name in the build, which is empty for the main one, and in the session.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lent<'l> {
    pub name: &'l str,
    pub folder: &'l str,
}

impl Lent<'_> {
    /// The main context.
    pub const MAIN: Self = Self { name: "", folder: MAIN };
}

/// What a session's contexts are received with.
pub(crate) struct Receiving<'r> {
    pub session: &'r Arc<Session>,
    pub contexts: &'r Arc<Contexts>,
    pub plan: &'r Plan,
    pub hashes: &'r Arc<Hashes>,
    pub events: &'r mpsc::Sender<Event>,
    /// A place for what is needed only now.
    pub scratch: &'r Arc<Scratch>,
}

impl Receiving<'_> {
    /// The files of a context, as far as the plan uses them; held for as long as the build may look at them. What it
    /// does not show stands in its own ignore file, unless it is given.
    pub async fn context(
        &self,
        lent: Lent<'_>,
        ignore: Option<&Ignore>,
    ) -> Result<Option<(Tree, Arc<Taken>)>> {
        let Self { session, contexts, hashes, events, .. } = *self;
        let Some(used) = Used::of(self.plan, lent.name) else { return Ok(None) };
        let side = match lent.name {
            "" => "[internal] load build context".to_owned(),
            name => format!("[context {name}] load from client"),
        };
        let received = crate::beside(events, &side, async {
            let ignore = if let Some(ignore) = ignore {
                ignore.clone()
            } else {
                ignore_rules(rules(session, lent.folder, self.scratch, hashes, &side, events).await?)
                    .map_err(|error| invalid(format!("the context {}: {error}", lent.name)))?
            };
            let key = match (session.shared_key(), lent.name) {
                ("", _) => String::new(),
                (key, "") => format!("context:{key}"),
                (key, name) => format!("context:{key}:{name}"),
            };
            let all = Arc::clone(contexts);
            let taken = blocking(move || {
                all.sweep();
                all.take(&key).map(Arc::new)
            })
            .await?;
            let Used { follow, patterns } = used;
            let wanted = Wanted { folder: lent.folder, follow, patterns, exclude: ignore.patterns() };
            let received =
                receive_telling(session, &wanted, (taken.dir(), Arc::clone(&taken)), u64::MAX, &side, events)
                    .await?;
            Ok((taken, received, ignore))
        });
        let (taken, Received { hashes: known, bytes }, ignore) = received.await?;
        tracing::debug!(name = lent.name, bytes, "received a build context");
        let root = crate::tree::open_dir(&taken.dir().join("files"))?;
        let tree = Tree::folder(root, ignore, Arc::clone(hashes)).with_known(known);
        Ok(Some((tree, taken)))
    }
}

/// The paths of a context that a plan uses; none is everything.
#[derive(Debug, Default)]
struct Used {
    /// Without wildcards, which clients match each in its own way: the directories with them.
    follow: Vec<String>,
    /// With wildcards.
    patterns: Vec<String>,
}

impl Used {
    /// `None` when the plan does not use the context.
    fn of(plan: &Plan, context: &str) -> Option<Self> {
        let graph = &plan.graph;
        let is_it = |op: &Op| matches!(op, Op::Context { name } if name == context);
        if !graph.vertices.iter().any(|vertex| is_it(&vertex.op)) {
            return None;
        }
        let mut patterns = Vec::new();
        for vertex in &graph.vertices {
            let from =
                |input: usize| vertex.inputs.get(input).is_some_and(|&input| is_it(&graph.get(input).op));
            match &vertex.op {
                Op::Files(actions) => {
                    for action in actions {
                        if let Action::Copy { input, sources, .. } = action
                            && from(*input)
                        {
                            patterns.extend(sources.iter().map(|source| clean(source)));
                        }
                    }
                }
                Op::Run(run) => {
                    let mounts = run.mounts.iter().filter(|mount| mount.input.is_some_and(from));
                    // There a wildcard is a character like any other.
                    patterns.extend(mounts.map(|mount| without_wildcards(clean(&mount.source))));
                }
                _ => {}
            }
        }
        let follow = patterns.iter().cloned().map(without_wildcards).collect();
        let unlike = |mut all: Vec<String>| {
            all.sort();
            all.dedup();
            if all.iter().any(String::is_empty) { Vec::new() } else { all }
        };
        Some(Self { follow: unlike(follow), patterns: unlike(patterns) })
    }
}

/// The directory above all of a path's wildcards.
fn without_wildcards(mut path: String) -> String {
    while has_wildcard(&path) {
        path = path.rsplit_once('/').map(|(dir, _)| dir.to_owned()).unwrap_or_default();
    }
    path
}

/// A context that a client uploads under a name of its own (`http://buildkit-session/…`).
pub(crate) fn upload(session: &Arc<Session>, url: &str) -> Result<Upload> {
    let bad = || invalid(format!("{url} is not the address of an upload"));
    let rest = url.strip_prefix(UPLOADS).ok_or_else(bad)?;
    let pieces = session.upload("buildkit-session", &format!("/{rest}"))?;
    Ok(Upload { pieces, current: bytes::Bytes::new() })
}

/// What the addresses of uploads begin with.
pub(crate) const UPLOADS: &str = "http://buildkit-session/";

/// The bytes of an upload. Reading blocks.
#[derive(Debug)]
pub(crate) struct Upload {
    pieces: mpsc::Receiver<brigantine_session::Result<bytes::Bytes>>,
    current: bytes::Bytes,
}

impl std::io::Read for Upload {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                None => return Ok(0),
                Some(piece) => self.current = piece.map_err(std::io::Error::other)?,
            }
        }
        let n = buf.len().min(self.current.len());
        buf[..n].copy_from_slice(&self.current.split_to(n));
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_at_once_find_what_was_kept_for_as_many() {
        let dir = tempfile::tempdir().unwrap();
        let contexts = Contexts::new(dir.path().to_owned());
        let take = |count: u32| (0..count).map(|_| contexts.take("a folder").unwrap()).collect::<Vec<_>>();
        for taken in take(9) {
            fs::write(taken.dir().join("index"), "").unwrap();
        }
        contexts.sweep();
        let again = take(9);
        let known: Vec<_> = again.iter().map(|taken| taken.dir().join("index").exists()).collect();
        let (last, others) = known.split_last().unwrap();
        assert!(others.iter().all(|known| *known) && !last, "{known:?}");
        drop(again);
        let other = contexts.take("another folder").unwrap();
        assert!(!other.dir().join("index").exists());
        assert_eq!(contexts.list().iter().filter(|kept| kept.in_use).count(), 1);
    }
}
