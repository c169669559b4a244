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

/// Contexts of one folder that are kept when several builds of it ran at once.
const KEPT: u32 = 2;
/// How long a context is kept without a build.
const LASTING: Duration = Duration::from_hours(7 * 24);
/// The most bytes of a Dockerfile and its ignore file.
const MOST_TEXT: u64 = 2 * (crate::dockerfile::MOST as u64 + 1);
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
        let wanted = Wanted { folder: "dockerfile", follow, exclude: Vec::new() };
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
    let side = "[internal] load .dockerignore".to_owned();
    let dir = scratch.dir.join("ignore");
    let rules = crate::beside(events, &side, async {
        if let Some(own) = own {
            return Ok(Some((own, format!("{name}.dockerignore"))));
        }
        let wanted =
            Wanted { folder: "context", follow: vec![".dockerignore".to_owned()], exclude: Vec::new() };
        receive_telling(session, &wanted, (dir.clone(), Arc::clone(scratch)), MOST_TEXT, &side, events)
            .await?;
        let hashes = Arc::clone(hashes);
        blocking(move || {
            Ok(folder(&dir, hashes)?.read(".dockerignore")?.map(|it| (it, ".dockerignore".to_owned())))
        })
        .await
    });
    let ignore = ignore_rules(rules.await?)?;
    Ok(Source { tree: None, ignore, text, name, taken: None })
}

fn folder(dir: &Path, hashes: Arc<Hashes>) -> Result<Tree> {
    Ok(Tree::folder(crate::tree::open_dir(&dir.join("files"))?, Ignore::default(), hashes))
}

/// The main context's files, as far as the plan uses them; held for as long as the build may look at them.
pub(crate) async fn context(
    session: &Arc<Session>,
    contexts: &Arc<Contexts>,
    plan: &Plan,
    ignore: &Ignore,
    hashes: &Arc<Hashes>,
    events: &mpsc::Sender<Event>,
) -> Result<Option<(Tree, Arc<Taken>)>> {
    let Some(follow) = used(plan) else { return Ok(None) };
    let side = "[internal] load build context";
    let received = crate::beside(events, side, async {
        let key = match session.shared_key() {
            "" => String::new(),
            key => format!("context:{key}"),
        };
        let all = Arc::clone(contexts);
        let taken = blocking(move || {
            all.sweep();
            all.take(&key).map(Arc::new)
        })
        .await?;
        let wanted = Wanted { folder: "context", follow, exclude: ignore.patterns() };
        let received =
            receive_telling(session, &wanted, (taken.dir(), Arc::clone(&taken)), u64::MAX, side, events)
                .await?;
        Ok((taken, received))
    });
    let (taken, Received { hashes: known, bytes }) = received.await?;
    tracing::debug!(bytes, "received a build context");
    let root = crate::tree::open_dir(&taken.dir().join("files"))?;
    let tree = Tree::folder(root, ignore.clone(), Arc::clone(hashes)).with_known(known);
    Ok(Some((tree, taken)))
}

/// The paths of the main context that the plan uses; none is everything. `None` when it uses no context.
fn used(plan: &Plan) -> Option<Vec<String>> {
    let graph = &plan.graph;
    let is_context =
        |id: &crate::graph::VertexId| matches!(&graph.get(*id).op, Op::Context { name } if name.is_empty());
    let mut paths: Vec<&str> = Vec::new();
    let mut any = false;
    for vertex in &graph.vertices {
        any |= matches!(&vertex.op, Op::Context { name } if name.is_empty());
        let from = |input: usize| vertex.inputs.get(input).is_some_and(is_context);
        match &vertex.op {
            Op::Files(actions) => {
                for action in actions {
                    if let Action::Copy { input, sources, .. } = action
                        && from(*input)
                    {
                        paths.extend(sources.iter().map(String::as_str));
                    }
                }
            }
            Op::Run(run) => {
                paths.extend(
                    run.mounts
                        .iter()
                        .filter(|mount| mount.input.is_some_and(from))
                        .map(|mount| mount.source.as_str()),
                );
            }
            _ => {}
        }
    }
    if !any {
        return None;
    }
    let mut follow = Vec::new();
    for path in paths {
        let mut path = clean(path);
        // Clients match wildcards each in its own way: its directory is asked for.
        while has_wildcard(&path) {
            path = path.rsplit_once('/').map(|(dir, _)| dir.to_owned()).unwrap_or_default();
        }
        if path.is_empty() {
            return Some(Vec::new());
        }
        follow.push(path);
    }
    follow.sort();
    follow.dedup();
    Some(follow)
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
