//! What is read and begun before anything else of a container.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};

use brigantine_sys::netns::Coming;
use serde_json::value::RawValue;

use super::options::Options;
use super::{Cover, Global, lenient};
use crate::cgroup::Cgroup;
use crate::compile::privileged;
use crate::error::Error;
use crate::identity;
use crate::launch::{LateSeccomp, is_network_apart};
use crate::spec::{LinuxNamespace, Spec};

/// A bundle's `config.json`, as it is in the file, and what was looked for before all else of it.
pub(super) struct Config {
    pub bundle: PathBuf,
    bytes: Vec<u8>,
    namespaces: Vec<LinuxNamespace>,
    /// The seccomp section.
    seccomp: Option<Range<usize>>,
}

impl Config {
    fn read(options: &Options) -> Result<Self, Error> {
        #[derive(Default, serde::Deserialize)]
        struct Glance<'a> {
            #[serde(borrow)]
            linux: Linux<'a>,
        }
        #[derive(Default, serde::Deserialize)]
        struct Linux<'a> {
            #[serde(default)]
            namespaces: Vec<LinuxNamespace>,
            #[serde(borrow, default)]
            seccomp: Option<&'a RawValue>,
        }
        let bundle = options.path("bundle").unwrap_or_else(|| PathBuf::from("."));
        let bundle = fs::canonicalize(&bundle)
            .map_err(|e| Error::os(format!("opening bundle {}", bundle.display()), e))?;
        let bytes = read_config(&bundle)?;
        // Whatever is wrong with it is told later.
        let Glance { linux } = serde_json::from_slice(&bytes).unwrap_or_default();
        let namespaces = linux.namespaces;
        let seccomp = linux.seccomp.map(|part| {
            let start = part.get().as_ptr().addr() - bytes.as_ptr().addr();
            start..start + part.get().len()
        });
        Ok(Self { bundle, bytes, namespaces, seccomp })
    }

    /// All of it; or all but a long part that can be read later.
    pub fn parse(&self, global: &Global) -> Result<(Spec, Option<LateSeccomp>), Error> {
        if let Some(part) = self.seccomp.clone().filter(|_| !global.debug)
            && let Ok(text) = std::str::from_utf8(&self.bytes[part.clone()])
            && let Some(late) = LateSeccomp::new(text, self.bundle.join("config.json"))
        {
            let rest = [&self.bytes[..part.start], b"null", &self.bytes[part.end..]].concat();
            // If anything is wrong with it, the whole tells where.
            if let Ok(spec) = parse_config(&self.bundle, &rest, global) {
                return Ok((spec, Some(late)));
            }
        }
        parse_config(&self.bundle, &self.bytes, global).map(|spec| (spec, None))
    }
}

fn read_config(bundle: &Path) -> Result<Vec<u8>, Error> {
    const LIMIT: u64 = 16 << 20;
    let file = bundle.join("config.json");
    let what = || format!("reading {}", file.display());
    let size = fs::metadata(&file).map_err(|e| Error::os(what(), e))?.len();
    if size > LIMIT {
        return Err(Error::invalid(format!("{}: {size} bytes are too many", what())));
    }
    fs::read(&file).map_err(|e| Error::os(what(), e))
}

pub(super) fn load_spec(bundle: &Path, global: &Global) -> Result<Spec, Error> {
    parse_config(bundle, &read_config(bundle)?, global)
}

fn parse_config(bundle: &Path, bytes: &[u8], global: &Global) -> Result<Spec, Error> {
    let what = || format!("reading {}", bundle.join("config.json").display());
    let spec = lenient::spec(bytes, global).map_err(|e| Error::invalid(format!("{}: {e}", what())))?;
    let version = spec.version();
    let numbers = version.split(['-', '+']).next().unwrap_or_default().split('.');
    if numbers.clone().count() != 3 || !numbers.clone().all(|n| n.parse::<u32>().is_ok()) {
        return Err(Error::invalid(format!(
            "{}: ociVersion {version:?} is not a version like 1.2.0",
            what()
        )));
    }
    for name in spec.process().iter().flat_map(identity::unraised) {
        let why = "it is not permitted and inheritable as well";
        global.write(&format!("can't raise ambient capability {name}: {why}"), "warning");
    }
    Ok(spec)
}

/// What was begun before anything else of a container.
pub(super) struct Begun {
    pub config: Config,
    pub cover: Beside<Cover>,
    pub network: Option<Coming>,
}

impl Begun {
    /// What takes longest, the executable's cover and the network namespace, is made on a thread of its own meanwhile.
    pub fn begin(options: &Options) -> Result<Self, Error> {
        let (found, cover) = sync_channel(1);
        let (wish, wanted) = sync_channel(1);
        let work = move || {
            // Whoever is not there any more does not need them.
            let there = found.send(Cover::find()).is_ok();
            // Which hierarchies there are, is asked for next; an error is told then.
            Cgroup::version_2_alone().ok();
            there && wanted.recv() == Ok(true)
        };
        let thread = privileged().then(|| Coming::begin_after(work));
        let config = Config::read(options)?;
        let Some(Ok(coming)) = thread else {
            return Ok(Self { config, cover: Beside::Done(Cover::find()?), network: None });
        };
        let wants = is_network_apart(&config.namespaces);
        wish.send(wants).ok();
        Ok(Self { config, cover: Beside::Coming(cover), network: wants.then_some(coming) })
    }
}

/// What is made on another thread.
pub(super) enum Beside<T> {
    Done(T),
    Coming(Receiver<Result<T, Error>>),
}

impl<T> Beside<T> {
    pub fn get(self) -> Result<T, Error> {
        match self {
            Self::Done(done) => Ok(done),
            Self::Coming(coming) => {
                coming.recv().map_err(|_gone| Error::invalid("a thread of the runtime's has gone"))?
            }
        }
    }
}
