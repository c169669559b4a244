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

/// What our client calls a Dockerfile that is not in the context with which it is sent.
pub const OUTSIDE: &str = ".dockerfile.outside";

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
}

async fn load(solver: &Arc<Solver>, source: ContextSource, wanted: Wanted<'_>) -> Result<Option<Loaded>> {
    let Wanted { dir, dockerfile, secrets, keep_git, key } = wanted;
    let make = |dir: &Path| {
        fs::DirBuilder::new().mode(0o700).create(dir).doing(|| format!("create {}", dir.display()))
    };
    match source {
        ContextSource::Nothing | ContextSource::Session(_) => Ok(None),
        ContextSource::Folder(path) => {
            Ok(Some(Loaded { path, hashes: HashMap::new(), text: None, ignored: true, taken: None }))
        }
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
            let taken = Some(Arc::new(taken));
            Ok(Some(Loaded { path, hashes: unpacked.hashes, text: None, ignored: true, taken }))
        }
        ContextSource::Upload(session, url) => {
            make(dir)?;
            let (upload, target) = (crate::received::upload(&session, &url)?, dir.to_owned());
            let dockerfile = dockerfile.to_owned();
            let unpacked =
                blocking(move || crate::context::unpack(upload, &target, &dockerfile, None)).await?;
            Ok(Some(Loaded {
                path: dir.to_owned(),
                hashes: unpacked.hashes,
                text: None,
                ignored: true,
                taken: None,
            }))
        }
        ContextSource::Remote(url) => {
            if let mut op @ Op::Git { .. } = crate::remote::source(&url) {
                if let Op::Git { keep_git_dir, .. } = &mut op {
                    *keep_git_dir |= keep_git;
                }
                crate::remote::checkout(&op, secrets, dir).await?;
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
                Ok(Some(Loaded { path, hashes: HashMap::new(), text: None, ignored: false, taken: None }))
            } else {
                make(dir)?;
                let file = dir.with_extension("download");
                solver.downloads.fetch(&url, None, secrets, &file).await?;
                let (target, from) = (dir.to_owned(), file.clone());
                let loaded = blocking(move || {
                    let open = || fs::File::open(&from).doing(|| format!("open {}", from.display()));
                    if crate::compression::is_archive(open()?).doing(|| format!("read {}", from.display()))? {
                        let unpacked = crate::context::unpack(open()?, &target, "", None)?;
                        return Ok(Loaded {
                            path: target,
                            hashes: unpacked.hashes,
                            text: None,
                            ignored: false,
                            taken: None,
                        });
                    }
                    let mut text = String::new();
                    open()?.take(crate::dockerfile::MOST as u64 + 1).read_to_string(&mut text).map_err(
                        |_bad| invalid("the remote context is neither a tar archive nor a Dockerfile"),
                    )?;
                    Ok(Loaded {
                        path: target,
                        hashes: HashMap::new(),
                        text: Some(text),
                        ignored: false,
                        taken: None,
                    })
                })
                .await;
                fs::remove_file(&file).doing(|| format!("remove {}", file.display()))?;
                loaded.map(Some)
            }
        }
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
        return Ok(Source { tree, ignore: Ignore::default(), text, name, taken: loaded.taken });
    }
    let own = format!("{}.dockerignore", crate::pattern::clean(&name));
    let rules = match whole.read(&own)? {
        Some(rules) => Some((rules, own)),
        None => whole.read(".dockerignore")?.map(|rules| (rules, ".dockerignore".to_owned())),
    };
    let ignore = ignore_rules(rules)?;
    if name == OUTSIDE {
        // It came with the context, and is no part of it.
        for name in [OUTSIDE.to_owned(), format!("{OUTSIDE}.dockerignore")] {
            let path = loaded.path.join(name);
            if path.exists() {
                fs::remove_file(&path).doing(|| format!("remove {}", path.display()))?;
            }
        }
    }
    let tree = Tree::folder(open()?, ignore.clone(), hashes).with_known(loaded.hashes);
    Ok(Source { tree: Some(tree), ignore, text, name, taken: loaded.taken })
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

/// A named context that is a folder of this machine, without what its own ignore file says. Blocks.
pub(crate) fn named_folder(path: &Path, hashes: Arc<Hashes>) -> Result<Tree> {
    let whole = Tree::folder(crate::tree::open_dir(path)?, Ignore::default(), Arc::clone(&hashes));
    let ignore = match whole.read(".dockerignore")? {
        None => return Ok(whole),
        Some(rules) => Ignore::parse(&String::from_utf8_lossy(&rules)).map_err(invalid)?,
    };
    Ok(Tree::folder(crate::tree::open_dir(path)?, ignore, hashes))
}
