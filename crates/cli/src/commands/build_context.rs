//! Contexts of `brig build`: the folder, which a session lends to the engine for as long as the build runs, and those with
//! names (`--build-context`), lent likewise or sent as an archive.
//!
//! Invariant: nothing outside of a folder is lent, nor what the engine's rules leave out.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigantine_build::LentFolder;
use brigantine_build::dockerfile::MOST;
use brigantine_image::Digest;
use brigantine_session::{Asked, Entry, Folder, Kind};
use tokio::task::JoinHandle;

use crate::client::Body;
use crate::commands::{build_layout, upload};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;

const DOCKERFILE: &str = "Dockerfile";

/// Folders by the names that the session has for them.
pub type Sources = BTreeMap<String, Arc<dyn Folder>>;

/// The main context.
pub enum Main {
    /// The engine fetches it.
    Remote(String),
    /// An archive, or a Dockerfile, on standard input.
    Stdin,
    Folder(Local),
}

impl Main {
    pub fn new(place: &str, file: &str) -> Outcome<Self> {
        if is_remote(place) {
            Ok(Self::Remote(place.to_owned()))
        } else if place == "-" {
            Ok(Self::Stdin)
        } else {
            Local::new(place, file).map(Self::Folder)
        }
    }

    /// Adds to what a session lends, which has this key.
    pub fn lend(&self, sources: &mut Sources) -> Outcome<Option<String>> {
        let Self::Folder(local) = self else { return Ok(None) };
        local.lend(sources)?;
        Ok(Some(local.shared_key()))
    }
}

fn is_remote(place: &str) -> bool {
    ["http://", "https://", "git://", "git@", "ssh://"].iter().any(|scheme| place.starts_with(scheme))
}

/// An archive that is made while it is sent.
pub struct Sending {
    packed: JoinHandle<io::Result<()>>,
    place: String,
}

impl Sending {
    /// Begins; `write` makes the archive.
    pub fn begin(
        place: &str,
        write: impl FnOnce(UnixStream) -> io::Result<()> + Send + 'static,
    ) -> Outcome<(Self, Body)> {
        let failed = || Fault::io(format!("read the context {place}"));
        let (ours, theirs) = UnixStream::pair().map_err(failed())?;
        theirs.set_nonblocking(true).map_err(failed())?;
        let stream = tokio::net::UnixStream::from_std(theirs).map_err(failed())?;
        let packed = tokio::task::spawn_blocking(move || write(ours));
        Ok((Self { packed, place: place.to_owned() }, upload::body(stream)))
    }

    /// What went wrong in making it.
    pub async fn end(self) -> Outcome {
        let place = &self.place;
        match self.packed.await {
            Ok(Ok(())) => Ok(()),
            // The engine may answer, and close, before it has read everything.
            Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Ok(Err(error)) => Err(Fault::io(format!("read the context {place}"))(error)),
            Err(error) => Err(Fault::said(format!("read the context {place}: {error}"))),
        }
    }
}

/// A context with a name.
pub struct Named {
    pub name: String,
    /// How the request names it.
    pub value: String,
    what: What,
}

enum What {
    /// The engine finds it.
    Elsewhere,
    Folder(String, Arc<LentFolder>),
    /// It is sent under this id.
    Layout(String, build_layout::Chosen),
}

impl Named {
    /// `NAME=VALUE`; the number is another one for each.
    pub fn parse(text: &str, number: usize) -> Outcome<Self> {
        let wrong = |why: &str| Fault::said(format!("--build-context {text}: {why}"));
        let (name, value) = text.split_once('=').ok_or_else(|| wrong("NAME=VALUE is expected"))?;
        if name.is_empty() || value.is_empty() {
            return Err(wrong("NAME=VALUE is expected"));
        }
        let (name, value) = (name.to_owned(), value.to_owned());
        if is_remote(&value) || value.starts_with("docker-image://") {
            return Ok(Self { name, value, what: What::Elsewhere });
        }
        if value.starts_with("target:") || value.starts_with("input:") {
            return Err(wrong("targets of other builds are known to bake only, which is not built"));
        }
        if let Some(layout) = value.strip_prefix("oci-layout://") {
            let id = new_id()?;
            let chosen = build_layout::Chosen::find(layout)?;
            let value = format!("oci-layout:upload-request:{id}");
            return Ok(Self { name, value, what: What::Layout(id, chosen) });
        }
        let root = std::fs::canonicalize(&value).map_err(|error| wrong(&output::os_text(&error)))?;
        if !root.is_dir() {
            return Err(wrong("it is not a directory"));
        }
        let folder = format!("named-{number}");
        Ok(Self { name, value: format!("local:{folder}"), what: What::Folder(folder, open(&root)?) })
    }

    /// Adds to what a session lends.
    pub fn lend(&self, sources: &mut Sources) {
        if let What::Folder(name, folder) = &self.what {
            sources.insert(name.clone(), Arc::clone(folder) as _);
        }
    }

    /// It is named only: nothing of it is looked at.
    pub fn keep(&mut self) {
        self.what = What::Elsewhere;
    }

    /// Sends it, if there is something to send. Ends when the engine is done with it; what the engine has to say of it,
    /// it says of the build.
    pub async fn send(self, context: &Context) -> Outcome {
        let What::Layout(id, chosen) = self.what else { return Ok(()) };
        let place = self.name;
        let (sending, body) = Sending::begin(&place, move |output| chosen.write(output))?;
        let ask = context.client.post("/build").query("buildid", &format!("upload-request:{id}"));
        let answered = ask.stream(body, "application/x-tar").done().await;
        tracing::debug!(place, ok = answered.is_ok(), "sent a named context");
        sending.end().await
    }
}

/// A new id, which nobody else can guess.
pub fn new_id() -> Outcome<String> {
    let mut random = [0_u8; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Fault::said(format!("make a new id: {error}")))?;
    Ok(format!("{:032x}", u128::from_be_bytes(random)))
}

/// A context folder and its Dockerfile.
pub struct Local {
    root: PathBuf,
    /// The Dockerfile's name, in the context or by itself.
    pub dockerfile: String,
    /// A Dockerfile that is not in the context, and the list beside it of what its builds leave out.
    outside: Option<Texts>,
}

impl Local {
    fn new(place: &str, file: &str) -> Outcome<Self> {
        let fault =
            |what: &str, error: &io::Error| Fault::said(format!("{what}: {}", output::os_text(error)));
        let root = std::fs::canonicalize(place)
            .map_err(|error| fault(&format!("unable to prepare context: path \"{place}\""), &error))?;
        if !root.is_dir() {
            return Err(Fault::said(format!("unable to prepare context: \"{place}\" is not a directory")));
        }
        let limited = |from: &mut dyn Read, what: &str| {
            let mut text = Vec::new();
            let read = from.take(MOST as u64 + 1).read_to_end(&mut text);
            read.map(|_| text).map_err(|error| fault(what, &error))
        };
        let (dockerfile, outside) = match file {
            "" => (DOCKERFILE.to_owned(), None),
            "-" => {
                let text = limited(&mut io::stdin(), "read the Dockerfile")?;
                (DOCKERFILE.to_owned(), Some(Texts::of(DOCKERFILE, text, None)))
            }
            file => {
                let what = format!("read {file}");
                let path = std::fs::canonicalize(file).map_err(|error| fault(&what, &error))?;
                if let Ok(inside) = path.strip_prefix(&root) {
                    (inside.to_string_lossy().into_owned(), None)
                } else {
                    let mut from = std::fs::File::open(&path).map_err(|error| fault(&what, &error))?;
                    let text = limited(&mut from, &what)?;
                    let rules = std::fs::read(format!("{file}.dockerignore")).ok();
                    let name = Path::new(file).file_name().map(OsStr::to_string_lossy);
                    let name = name.unwrap_or(DOCKERFILE.into()).into_owned();
                    (name.clone(), Some(Texts::of(&name, text, rules)))
                }
            }
        };
        let length = match &outside {
            Some(texts) => texts.longest(),
            None => std::fs::metadata(root.join(&dockerfile)).map_or(0, |found| found.len()),
        };
        if length > MOST as u64 {
            return Err(Fault::said(format!(
                "the Dockerfile is {length} bytes long: at most {MOST} are read"
            )));
        }
        Ok(Self { root, dockerfile, outside })
    }

    /// Adds its folders to those that a session lends.
    fn lend(&self, sources: &mut Sources) -> Outcome {
        let folder = open(&self.root)?;
        let dockerfile: Arc<dyn Folder> = match &self.outside {
            Some(texts) => Arc::new(texts.clone()),
            None => Arc::clone(&folder) as _,
        };
        sources.insert("context".to_owned(), folder);
        sources.insert("dockerfile".to_owned(), dockerfile);
        Ok(())
    }

    /// What builds of the same files have in common: this machine, user, folder and Dockerfile.
    fn shared_key(&self) -> String {
        let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
        let user = rustix::process::getuid().as_raw();
        let all = format!("{}\0{user}\0{}\0{}", machine.trim(), self.root.display(), self.dockerfile);
        Digest::sha256(all.as_bytes()).to_string()
    }
}

fn open(root: &Path) -> Outcome<Arc<LentFolder>> {
    LentFolder::open(root).map(Arc::new).map_err(Fault::io(root.display()))
}

/// Files that are in no folder of their own.
#[derive(Clone)]
struct Texts(BTreeMap<String, Vec<u8>>);

impl Texts {
    fn of(name: &str, text: Vec<u8>, rules: Option<Vec<u8>>) -> Self {
        let rules = rules.map(|rules| (format!("{name}.dockerignore"), rules));
        Self(std::iter::once((name.to_owned(), text)).chain(rules).collect())
    }

    fn longest(&self) -> u64 {
        self.0.values().map(|text| text.len() as u64).max().unwrap_or_default()
    }
}

impl Folder for Texts {
    fn list(&self, _asked: &Asked, listed: &mut dyn FnMut(Entry) -> bool) -> io::Result<()> {
        for (name, text) in &self.0 {
            let (path, kind) = (name.clone().into_bytes(), Kind::File { size: text.len() as u64 });
            let entry = Entry { path, kind, mode: 0o644, uid: 0, gid: 0, mtime: 0, state: 0 };
            if !listed(entry) {
                break;
            }
        }
        Ok(())
    }

    fn open(&self, path: &[u8]) -> io::Result<Box<dyn Read>> {
        let found = std::str::from_utf8(path).ok().and_then(|name| self.0.get(name));
        let text = found.ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(io::Cursor::new(text.clone())))
    }
}
