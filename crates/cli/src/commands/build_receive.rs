//! Archives that the engine sends while it builds, on their way to folders and files.
//!
//! Invariant: a file appears under its name when its archive is whole and the build was well; what is not needed any
//! more is gone when [`Receiving::finish`] returns.

use std::collections::BTreeMap;
use std::io::{PipeWriter, Write as _};
use std::thread::JoinHandle;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::commands::cp;
use crate::commands::save::Sink;
use crate::fault::{Fault, Outcome};
use crate::output;

/// Pieces that wait for a slow disk.
const BACKLOG: usize = 16;

/// Where the engine's archives go, by their names.
pub type Archives = BTreeMap<String, mpsc::Sender<Bytes>>;

/// Where an archive goes.
pub enum Place {
    Stdout,
    File(Sink, String),
    /// It is unpacked as it comes.
    Folder(PipeWriter, JoinHandle<Outcome>),
}

impl Place {
    /// A folder, which is made if it is not there.
    pub fn folder(dir: &str) -> Outcome<Self> {
        std::fs::create_dir_all(dir).map_err(Fault::io(dir))?;
        let (reader, writer) = std::io::pipe().map_err(Fault::io("making a pipe"))?;
        let dir = dir.to_owned();
        Ok(Self::Folder(writer, std::thread::spawn(move || cp::unpack_into(reader, &dir))))
    }

    /// A file; `None` is standard output.
    pub fn file(path: Option<&str>) -> Outcome<Self> {
        match path {
            None => Ok(Self::Stdout),
            Some(path) => Ok(Self::File(Sink::open(path)?, path.to_owned())),
        }
    }

    fn write(&mut self, data: &[u8]) -> Outcome {
        match self {
            Self::Stdout => {
                output::write_bytes(data);
                Ok(())
            }
            Self::File(sink, path) => {
                sink.file().write_all(data).map_err(Fault::io(format_args!("writing {path}")))
            }
            // That it ended is told by its own error.
            Self::Folder(writer, _) => writer.write_all(data).or(Ok(())),
        }
    }

    /// Nothing more comes.
    fn end(self, well: bool) -> Outcome {
        match self {
            Self::Stdout => Ok(()),
            Self::File(sink, path) if well => sink.finish(&path),
            Self::File(..) => Ok(()),
            Self::Folder(writer, unpacking) => {
                drop(writer);
                let unpacked = unpacking.join();
                let unpacked = unpacked.unwrap_or_else(|_panic| Err(Fault::said("unpacking broke")));
                if well { unpacked } else { Ok(()) }
            }
        }
    }
}

/// What is on its way.
pub struct Receiving(Vec<(&'static str, tokio::task::JoinHandle<Outcome<Arrived>>)>);

/// An archive's places, and whether it came to its end.
struct Arrived(Vec<Place>, bool);

impl Receiving {
    /// Begins to take archives in, each for its places.
    pub fn begin(wanted: [(&'static str, Vec<Place>); 2]) -> (Self, Archives) {
        let (mut all, mut archives) = (Vec::new(), Archives::new());
        for (name, places) in wanted {
            if places.is_empty() {
                continue;
            }
            let (sender, receiver) = mpsc::channel(BACKLOG);
            archives.insert(name.to_owned(), sender);
            all.push((name, tokio::task::spawn_blocking(move || take(receiver, places))));
        }
        (Self(all), archives)
    }

    /// Ends it all; the archives' senders must be gone.
    pub async fn finish(self, well: bool) -> Outcome {
        let mut first = Ok(());
        for (name, taking) in self.0 {
            let ended = match taking.await {
                Ok(Ok(Arrived(places, whole))) => {
                    let put = tokio::task::spawn_blocking(move || {
                        let mut all = places.into_iter().map(|place| place.end(well && whole));
                        all.by_ref().find(Result::is_err).unwrap_or(Ok(())).and(all.collect())
                    });
                    let put = put.await.unwrap_or_else(|error| Err(Fault::said(error.to_string())));
                    match put {
                        Ok(()) if well && !whole => {
                            Err(Fault::said(format!("the engine did not send the {name} to their end")))
                        }
                        put => put,
                    }
                }
                Ok(Err(fault)) => Err(fault),
                Err(error) => Err(Fault::said(format!("receiving the {name}: {error}"))),
            };
            if first.is_ok() {
                first = ended;
            }
        }
        first
    }
}

/// Takes one archive in. An empty piece is its end.
fn take(mut pieces: mpsc::Receiver<Bytes>, mut places: Vec<Place>) -> Outcome<Arrived> {
    while let Some(piece) = pieces.blocking_recv() {
        if piece.is_empty() {
            return Ok(Arrived(places, true));
        }
        for place in &mut places {
            place.write(&piece)?;
        }
    }
    Ok(Arrived(places, false))
}
