//! A build's sources: the main context and the Dockerfile, from wherever they come.
//!
//! Invariant: nothing of the client's is followed out of its folder; what is left out by the ignore file is seen by
//! nobody but the frontend (the Dockerfile itself).

use std::collections::HashMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::ContextSource;
use crate::access::Secrets;
use crate::error::{Context as _, Result, invalid};
use crate::graph::Op;
use crate::hashes::Hashes;
use crate::pattern::Ignore;
use crate::received::Taken;
use crate::solver::{Solver, blocking};
use crate::tree::Tree;

/// What a build is made from.
pub(crate) struct Source {
    /// The main context, if one came.
    pub tree: Option<Tree>,
    /// What it does not show.
    pub ignore: Ignore,
    /// The Dockerfile.
    pub text: String,
    /// Its name, for faults.
    pub name: String,
    /// A kept context, which nobody else may change meanwhile.
    pub taken: Option<Arc<Taken>>,
    /// When the context was made, in seconds since the epoch, if it comes from elsewhere.
    pub time: Option<i64>,
}

/// What is wanted of a context.
pub(crate) struct Wanted<'a> {
    /// Where it goes, if it is not kept.
    pub dir: &'a Path,
    pub dockerfile: &'a str,
    pub secrets: &'a Secrets,
    /// A repository's own files stay in a checkout.
    pub keep_git: bool,
    /// What an archive's files are kept under.
    pub key: &'a str,
}

/// Brings the context to its place, or finds it where it is, and reads the Dockerfile.
pub(crate) async fn source(
    solver: &Arc<Solver>,
    context: ContextSource,
    wanted: Wanted<'_>,
    text: Option<String>,
) -> Result<Source> {
    let dockerfile = wanted.dockerfile.to_owned();
    let loaded = load(solver, context, wanted).await?;
    let hashes = Arc::clone(&solver.hashes);
    blocking(move || look(loaded, &dockerfile, text, hashes)).await
}

/// A context's folder with what is known of it.
struct Loaded {
    path: PathBuf,
    hashes: HashMap<Vec<u8>, [u8; 32]>,
    /// A remote Dockerfile rather than a context.
    text: Option<String>,
    ignored: bool,
    taken: Option<Arc<Taken>>,
    time: Option<i64>,
}

impl Loaded {
    fn of(path: PathBuf) -> Self {
        Self { path, hashes: HashMap::new(), text: None, ignored: true, taken: None, time: None }
    }
}

async fn load(solver: &Arc<Solver>, source: ContextSource, wanted: Wanted<'_>) -> Result<Option<Loaded>> {
    let Wanted { dir, dockerfile, secrets, keep_git, key } = wanted;
    let make = |dir: &Path| {
        fs::DirBuilder::new().mode(0o700).create(dir).doing(|| format!("create {}", dir.display()))
    };
    match source {
        ContextSource::Nothing | ContextSource::Session(_) => Ok(None),
        ContextSource::Folder(path) => Ok(Some(Loaded::of(path))),
        ContextSource::Archive(source) => {
            let (contexts, dockerfile) = (Arc::clone(&solver.contexts), dockerfile.to_owned());
            let key = if key.is_empty() { String::new() } else { format!("archive:{dockerfile}:{key}") };
            let (taken, path, unpacked) = blocking(move || {
                contexts.sweep();
                let taken = contexts.take(&key)?;
                let (path, unpacked) = crate::received::receive_archive(source, &taken, &dockerfile)?;
                Ok((taken, path, unpacked))
            })
            .await?;
            tracing::debug!(bytes = unpacked.bytes, "unpacked a build context");
            Ok(Some(Loaded { hashes: unpacked.hashes, taken: Some(Arc::new(taken)), ..Loaded::of(path) }))
        }
        ContextSource::Upload(session, url) => {
            make(dir)?;
            let (upload, target) = (crate::received::upload(&session, &url)?, dir.to_owned());
            let dockerfile = dockerfile.to_owned();
            let unpacked =
                blocking(move || crate::context::unpack(upload, &target, &dockerfile, None)).await?;
            Ok(Some(Loaded { hashes: unpacked.hashes, ..Loaded::of(dir.to_owned()) }))
        }
        ContextSource::Remote(url) => {
            if let mut op @ Op::Git { .. } = crate::remote::source(&url) {
                if let Op::Git { keep_git_dir, .. } = &mut op {
                    *keep_git_dir |= keep_git;
                }
                let time = Some(crate::remote::checkout(&op, secrets, dir).await?.time);
                let Op::Git { subdir, .. } = &op else { return Err(invalid("not a git source")) };
                let path = if subdir.is_empty() {
                    dir.to_owned()
                } else {
                    let root = Tree::folder(
                        crate::tree::open_dir(dir)?,
                        Ignore::default(),
                        Arc::clone(&solver.hashes),
                    );
                    dir.join(crate::run::resolve_source(&root, subdir)?)
                };
                Ok(Some(Loaded { ignored: false, time, ..Loaded::of(path) }))
            } else {
                make(dir)?;
                let file = dir.with_extension("download");
                let modified = solver.downloads.fetch(&url, None, secrets, &file).await?.modified;
                let (target, from) = (dir.to_owned(), file.clone());
                let loaded = blocking(move || {
                    let open = || fs::File::open(&from).doing(|| format!("open {}", from.display()));
                    if crate::compression::is_archive(open()?).doing(|| format!("read {}", from.display()))? {
                        let unpacked = crate::context::unpack(open()?, &target, "", None)?;
                        let time = modified.or(unpacked.latest);
                        let hashes = unpacked.hashes;
                        return Ok(Loaded { hashes, ignored: false, time, ..Loaded::of(target) });
                    }
                    let mut text = String::new();
                    open()?.take(crate::dockerfile::MOST as u64 + 1).read_to_string(&mut text).map_err(
                        |_bad| invalid("the remote context is neither a tar archive nor a Dockerfile"),
                    )?;
                    let text = Some(text);
                    Ok(Loaded { text, ignored: false, time: modified, ..Loaded::of(target) })
                })
                .await;
                fs::remove_file(&file).doing(|| format!("remove {}", file.display()))?;
                loaded.map(Some)
            }
        }
    }
}

/// When what a URL leads to was made, in seconds since the epoch. It is brought to `dir`, which is not there yet.
pub(crate) async fn time_of(
    solver: &Arc<Solver>,
    url: &str,
    secrets: &Secrets,
    dir: &Path,
) -> Result<Option<i64>> {
    let wanted = Wanted { dir, dockerfile: "", secrets, keep_git: false, key: "" };
    let loaded = load(solver, ContextSource::Remote(url.to_owned()), wanted).await?;
    Ok(loaded.and_then(|loaded| loaded.time))
}

/// When a source of ADD was made, in seconds since the epoch. It is brought to `place`, which is not there yet.
pub(crate) async fn time_of_source(
    solver: &Solver,
    source: &Op,
    secrets: &Secrets,
    place: &Path,
) -> Result<Option<i64>> {
    match source {
        Op::Http { url, checksum, .. } => {
            Ok(solver.downloads.fetch(url, checksum.as_deref(), secrets, place).await?.modified)
        }
        other => Ok(Some(crate::remote::checkout(other, secrets, place).await?.time)),
    }
}

/// What was loaded, looked into. Blocks.
fn look(
    loaded: Option<Loaded>,
    dockerfile: &str,
    given: Option<String>,
    hashes: Arc<Hashes>,
) -> Result<Source> {
    let name = if dockerfile.is_empty() { "Dockerfile" } else { dockerfile };
    let Some(loaded) = loaded else {
        let text = given.ok_or_else(|| invalid("neither a build context nor a Dockerfile was sent"))?;
        return Ok(Source {
            tree: None,
            ignore: Ignore::default(),
            text,
            name: name.to_owned(),
            taken: None,
            time: None,
        });
    };
    let open = || crate::tree::open_dir(&loaded.path);
    let whole = Tree::folder(open()?, Ignore::default(), Arc::clone(&hashes));
    let (text, name) = match given.or(loaded.text) {
        Some(text) => (text, name.to_owned()),
        None => read_dockerfile(&whole, name)?,
    };
    if !loaded.ignored {
        let tree = Some(whole.with_known(loaded.hashes));
        let (taken, time) = (loaded.taken, loaded.time);
        return Ok(Source { tree, ignore: Ignore::default(), text, name, taken, time });
    }
    let own = format!("{}.dockerignore", crate::pattern::clean(&name));
    let rules = match whole.read(&own)? {
        Some(rules) => Some((rules, own)),
        None => whole.read(".dockerignore")?.map(|rules| (rules, ".dockerignore".to_owned())),
    };
    let ignore = ignore_rules(rules)?;
    let tree = Tree::folder(open()?, ignore.clone(), hashes).with_known(loaded.hashes);
    Ok(Source { tree: Some(tree), ignore, text, name, taken: loaded.taken, time: loaded.time })
}

/// An ignore file's text, with its name for errors, as rules.
pub(crate) fn ignore_rules(found: Option<(Vec<u8>, String)>) -> Result<Ignore> {
    match found {
        None => Ok(Ignore::default()),
        Some((rules, from)) => Ignore::parse(&String::from_utf8_lossy(&rules))
            .map_err(|error| invalid(format!("{from}: {error}"))),
    }
}

/// The Dockerfile of that name and the name it was found under. Blocks.
pub(crate) fn read_dockerfile(tree: &Tree, name: &str) -> Result<(String, String)> {
    if name.split('/').any(|part| part == "..") && crate::pattern::clean(name).is_empty()
        || name.starts_with("../")
    {
        return Err(invalid(format!("forbidden path outside the build context: {name}")));
    }
    let path = crate::pattern::clean(name);
    let lower = (path == "Dockerfile").then_some("dockerfile");
    for candidate in std::iter::once(path.as_str()).chain(lower) {
        if let Some(raw) = tree.read(candidate)? {
            let text =
                String::from_utf8(raw).map_err(|_bad| invalid(format!("{candidate} is not valid UTF-8")))?;
            return Ok((text, candidate.to_owned()));
        }
    }
    Err(invalid(format!("Cannot locate specified Dockerfile: {name}")))
}
