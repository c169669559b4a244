//! Contexts of `brig build`: the folder that is sent without what its ignore file says, and those with names
//! (`--build-context`), each sent as an archive of its own.
//!
//! Invariant: nothing outside of a folder is sent, links are sent as links, and devices, pipes and sockets are not.

use std::io::{self, Read as _, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use brigantine_build::dockerfile::MOST;
use brigantine_build::{Ignore, OUTSIDE};
use tokio::task::JoinHandle;

use crate::client::Body;
use crate::commands::{build_layout, upload};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;

/// The main context.
pub enum Main {
    /// The engine fetches it.
    Remote(String),
    /// An archive, or a Dockerfile, on standard input.
    Stdin,
    Folder(Packing),
}

impl Main {
    pub fn new(place: &str, file: &str) -> Outcome<Self> {
        if is_remote(place) {
            Ok(Self::Remote(place.to_owned()))
        } else if place == "-" {
            Ok(Self::Stdin)
        } else {
            Packing::new(place, file).map(Self::Folder)
        }
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
    sent: Option<Sent>,
}

/// What is sent of it, under which id.
struct Sent {
    id: String,
    place: String,
    what: What,
}

enum What {
    Folder(Packing),
    Layout(build_layout::Chosen),
}

impl Named {
    /// `NAME=VALUE`.
    pub fn parse(text: &str) -> Outcome<Self> {
        let wrong = |why: &str| Fault::said(format!("--build-context {text}: {why}"));
        let (name, value) = text.split_once('=').ok_or_else(|| wrong("NAME=VALUE is expected"))?;
        if name.is_empty() || value.is_empty() {
            return Err(wrong("NAME=VALUE is expected"));
        }
        let (name, value) = (name.to_owned(), value.to_owned());
        if is_remote(&value) || value.starts_with("docker-image://") {
            return Ok(Self { name, value, sent: None });
        }
        if value.starts_with("target:") || value.starts_with("input:") {
            return Err(wrong("targets of other builds are known to bake only, which is not built"));
        }
        let id = new_id()?;
        if let Some(layout) = value.strip_prefix("oci-layout://") {
            let what = What::Layout(build_layout::Chosen::find(layout)?);
            let value = format!("oci-layout:upload-request:{id}");
            return Ok(Self { name, value, sent: Some(Sent { id, place: layout.to_owned(), what }) });
        }
        let packing = Packing::named(&value).map_err(|fault| wrong(&fault.to_string()))?;
        let what = What::Folder(packing);
        Ok(Self { name, value: format!("upload-request:{id}"), sent: Some(Sent { id, place: value, what }) })
    }

    /// It is named only: nothing of it is looked at.
    pub fn keep(&mut self) {
        self.sent = None;
    }

    /// Sends it, if there is something to send. Ends when the engine is done with it; what the engine has to say of it,
    /// it says of the build.
    pub async fn send(self, context: &Context) -> Outcome {
        let Some(Sent { id, place, what }) = self.sent else { return Ok(()) };
        let (sending, body) = Sending::begin(&place, move |output| match what {
            What::Folder(packing) => packing.write(output),
            What::Layout(chosen) => chosen.write(output),
        })?;
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

/// A context folder to be sent.
pub struct Packing {
    root: PathBuf,
    /// The Dockerfile's name within what is sent; empty where there is none.
    pub dockerfile: String,
    /// A Dockerfile that is not in the context.
    outside: Option<Outside>,
    ignore: Ignore,
    /// Only what is needed to tell something of the Dockerfile.
    only_needed: bool,
}

/// A Dockerfile that is not in the context, and the list beside it of what its builds leave out.
struct Outside {
    text: Vec<u8>,
    rules: Option<String>,
}

impl Packing {
    fn new(place: &str, file: &str) -> Outcome<Self> {
        let fault =
            |what: &str, error: &io::Error| Fault::said(format!("{what}: {}", output::os_text(error)));
        let root = std::fs::canonicalize(place)
            .map_err(|error| fault(&format!("unable to prepare context: path \"{place}\""), &error))?;
        if !root.is_dir() {
            return Err(Fault::said(format!("unable to prepare context: \"{place}\" is not a directory")));
        }
        let (dockerfile, outside) = match file {
            "" => ("Dockerfile".to_owned(), None),
            "-" => {
                let mut text = Vec::new();
                io::stdin()
                    .take(MOST as u64 + 1)
                    .read_to_end(&mut text)
                    .map_err(|error| fault("read the Dockerfile", &error))?;
                (OUTSIDE.to_owned(), Some(text))
            }
            file => {
                let path =
                    std::fs::canonicalize(file).map_err(|error| fault(&format!("read {file}"), &error))?;
                if let Ok(inside) = path.strip_prefix(&root) {
                    (inside.to_string_lossy().into_owned(), None)
                } else {
                    let mut text = Vec::new();
                    std::fs::File::open(&path)
                        .and_then(|from| from.take(MOST as u64 + 1).read_to_end(&mut text))
                        .map_err(|error| fault(&format!("read {file}"), &error))?;
                    (OUTSIDE.to_owned(), Some(text))
                }
            }
        };
        let length = match &outside {
            Some(text) => text.len() as u64,
            None => std::fs::metadata(root.join(&dockerfile)).map_or(0, |found| found.len()),
        };
        if length > MOST as u64 {
            return Err(Fault::said(format!(
                "the Dockerfile is {length} bytes long: at most {MOST} are read"
            )));
        }
        // The list of a Dockerfile from elsewhere lies beside that, and is sent as that is.
        let own = match file {
            "" => root.join("Dockerfile.dockerignore"),
            file => PathBuf::from(format!("{file}.dockerignore")),
        };
        let own = std::fs::read_to_string(own);
        let outside = outside.map(|text| Outside { text, rules: own.as_ref().ok().cloned() });
        let rules = own.or_else(|_| std::fs::read_to_string(root.join(".dockerignore")));
        let ignore = match rules {
            Ok(rules) => {
                Ignore::parse(&rules).map_err(|error| Fault::said(format!(".dockerignore: {error}")))?
            }
            Err(_) => Ignore::default(),
        };
        Ok(Self { root, dockerfile, outside, ignore, only_needed: false })
    }

    /// A folder without a Dockerfile of its own.
    fn named(place: &str) -> Outcome<Self> {
        let root = std::fs::canonicalize(place).map_err(Fault::io(place))?;
        if !root.is_dir() {
            return Err(Fault::said(format!("{place} is not a directory")));
        }
        let ignore = match std::fs::read_to_string(root.join(".dockerignore")) {
            Ok(rules) => Ignore::parse(&rules)
                .map_err(|error| Fault::said(format!("{place}/.dockerignore: {error}")))?,
            Err(_) => Ignore::default(),
        };
        Ok(Self { root, dockerfile: String::new(), outside: None, ignore, only_needed: false })
    }

    /// The folder, for people.
    pub fn place(&self) -> String {
        self.root.display().to_string()
    }

    /// Leaves out all but the Dockerfile and its ignore file.
    pub fn only_needed(self) -> Self {
        Self { only_needed: true, ..self }
    }

    /// The engine needs these, whatever the rules say.
    fn needed(&self, path: &str) -> bool {
        (path == self.dockerfile && !path.is_empty())
            || path == ".dockerignore"
            || path.strip_suffix(".dockerignore").is_some_and(|base| base == self.dockerfile)
            || (self.dockerfile == "Dockerfile" && path == "dockerfile")
    }

    pub fn write(&self, output: impl Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(io::BufWriter::with_capacity(256 << 10, output));
        archive.follow_symlinks(false);
        archive.sparse(false);
        if let Some(Outside { text, rules }) = &self.outside {
            let rules =
                rules.as_ref().map(|rules| (format!("{}.dockerignore", self.dockerfile), rules.as_bytes()));
            for (name, text) in std::iter::once((self.dockerfile.clone(), &text[..])).chain(rules) {
                let mut header = tar::Header::new_gnu();
                header.set_mode(0o644);
                header.set_size(text.len() as u64);
                archive.append_data(&mut header, name, text)?;
            }
        }
        self.folder(&mut archive, Path::new(""))?;
        archive.into_inner()?.flush()
    }

    fn folder(&self, archive: &mut tar::Builder<impl Write>, dir: &Path) -> io::Result<()> {
        let mut names: Vec<_> = std::fs::read_dir(self.root.join(dir))?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<_>>()?;
        names.sort();
        for name in names {
            let path = dir.join(name);
            let text = path.to_string_lossy().into_owned();
            let full = self.root.join(&path);
            // Files of a folder that is worked in come and go.
            let Ok(metadata) = std::fs::symlink_metadata(&full) else { continue };
            let out = (self.only_needed || self.ignore.excludes(&text)) && !self.needed(&text);
            if metadata.is_dir() {
                if !out {
                    archive.append_dir(&path, &full)?;
                }
                if !out
                    || (self.ignore.may_take_again_below(&text) && !self.only_needed)
                    || self.dockerfile.starts_with(&format!("{text}/"))
                {
                    self.folder(archive, &path)?;
                }
            } else if !out && (metadata.is_file() || metadata.is_symlink()) {
                archive.append_path_with_name(&full, &path)?;
            }
        }
        Ok(())
    }
}
