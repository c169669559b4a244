//! What is read and begun before anything else of a container.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use brigantine_sys::netns::Coming;
use serde_json::value::RawValue;

use super::options::Options;
use super::{Cover, Global, commands, lenient, notify};
use crate::cgroup::Cgroup;
use crate::compile::privileged;
use crate::error::Error;
use crate::identity;
use crate::launch::is_network_apart;
use crate::seccomp::LateSeccomp;
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
    pub fn parse(self, global: &Global) -> Result<Parsed, Error> {
        let Self { bundle, bytes, seccomp, .. } = self;
        // What this process adds to the spec is not in the file.
        let as_it_is = !global.debug && commands::listen_fds() == 0 && !notify::is_wanted();
        if let Some(part) = seccomp.filter(|_| as_it_is)
            && let Ok(text) = std::str::from_utf8(&bytes[part.clone()])
            && let Some(late) = LateSeccomp::new(text, bundle.join("config.json"), &global.root())
        {
            let rest = [&bytes[..part.start], b"null", &bytes[part.end..]].concat();
            // If anything is wrong with it, the whole tells where.
            if let Ok((spec, true)) = parse_config(&bundle, &rest, global) {
                return Ok(Parsed { bundle, spec, text: Some(bytes), late_seccomp: Some(late) });
            }
        }
        let (spec, plain) = parse_config(&bundle, &bytes, global)?;
        Ok(Parsed { bundle, spec, text: (plain && as_it_is).then_some(bytes), late_seccomp: None })
    }
}

/// What a bundle's `config.json` says.
pub(super) struct Parsed {
    pub bundle: PathBuf,
    pub spec: Spec,
    /// All of it to the letter, if that says the same to whoever reads it again.
    pub text: Option<Vec<u8>>,
    /// What the spec lacks.
    pub late_seccomp: Option<LateSeccomp>,
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
    parse_config(bundle, &read_config(bundle)?, global).map(|(spec, _)| spec)
}

/// And whether nothing in it had to be forgiven.
fn parse_config(bundle: &Path, bytes: &[u8], global: &Global) -> Result<(Spec, bool), Error> {
    let what = || format!("reading {}", bundle.join("config.json").display());
    let (spec, plain) =
        lenient::spec(bytes, global).map_err(|e| Error::invalid(format!("{}: {e}", what())))?;
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
    Ok((spec, plain))
}

/// What was begun before anything else of a container.
pub(super) struct Begun {
    pub config: Config,
    pub cover: Cover,
    pub network: Option<Coming>,
}

impl Begun {
    /// What takes longest, the network namespace, is made on a thread of its own meanwhile.
    pub fn begin(options: &Options) -> Result<Self, Error> {
        let (wish, wanted) = sync_channel(1);
        let work = move || {
            // Which hierarchies there are, is asked for soon; an error is told then.
            Cgroup::version_2_alone().ok();
            wanted.recv() == Ok(true)
        };
        let thread = privileged().then(|| Coming::begin_after(work));
        let config = Config::read(options);
        let wants = config.as_ref().is_ok_and(|config| is_network_apart(&config.namespaces));
        // Whoever waits for the thread waits for it to hear this.
        wish.send(wants).ok();
        let network = thread.and_then(Result::ok).filter(|_| wants);
        Ok(Self { config: config?, cover: Cover::find()?, network })
    }
}
