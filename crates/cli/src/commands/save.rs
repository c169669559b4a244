//! `brig save`.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use http_body_util::BodyExt;
use hyper::body::Incoming;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::{output, terminal};

pub static COMMAND: Command = Command {
    name: "save",
    usage: "[OPTIONS] IMAGE [IMAGE...]",
    about: "Write one or more images to an archive",
    flags: &[
        Flag::text("compression", "Compress the archive: gzip or zstd (both with :LEVEL)").default("none"),
        Flag::text("output", "Write to this file instead of standard output").short('o'),
        Flag::list("platform", "Save only this platform's variant"),
    ],
    operands: Operands::AtLeast(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let target = matches.optional("output");
    if target.is_none() && terminal::stdout_is_terminal() {
        return Err(Fault::said("cowardly refusing to save to a terminal. Use the -o flag or redirect"));
    }
    let mut ask = context.client.get("/images/get");
    for name in matches.operands() {
        ask = ask.query("names", name);
    }
    for platform in matches.list("platform") {
        ask = ask.query("platform", platform);
    }
    let body = ask.maybe("compression", matches.optional("compression")).send().await?.into_stream();
    into_file_or_stdout(body, target).await
}

/// Writes an answer's bytes to a file, which appears under its name only when it is whole, or to standard output.
pub async fn into_file_or_stdout(mut body: Incoming, target: Option<&str>) -> Outcome {
    let mut file = target.map(|path| Sink::open(path).map(|sink| (sink, path))).transpose()?;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Fault::said(format!("the engine's answer broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        match &mut file {
            Some((sink, path)) => {
                sink.file().write_all(&data).map_err(Fault::io(format_args!("writing {path}")))?;
            }
            None => output::write_bytes(&data),
        }
    }
    file.map_or(Ok(()), |(sink, path)| sink.finish(path))
}

/// What is written to.
pub enum Sink {
    /// Takes its place when it is whole.
    New(tempfile::NamedTempFile),
    /// A device, a pipe: what is there stays, and is written to.
    There(File),
}

impl Sink {
    pub fn open(path: &str) -> Outcome<Self> {
        if fs::metadata(path).is_ok_and(|there| !there.is_file() && !there.is_dir()) {
            let opened = fs::OpenOptions::new().write(true).open(path);
            return opened.map(Self::There).map_err(Fault::io(format_args!("opening {path}")));
        }
        let dir = Path::new(path).parent().filter(|dir| !dir.as_os_str().is_empty());
        let made = tempfile::NamedTempFile::new_in(dir.unwrap_or_else(|| Path::new(".")));
        made.map(Self::New).map_err(Fault::io(format_args!("creating {path}")))
    }

    pub fn file(&mut self) -> &mut File {
        match self {
            Self::New(file) => file.as_file_mut(),
            Self::There(file) => file,
        }
    }

    pub fn finish(self, path: &str) -> Outcome {
        let Self::New(file) = self else { return Ok(()) };
        file.persist(path)
            .map(drop)
            .map_err(|error| Fault::said(format!("writing {path}: {}", output::os_text(&error.error))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::os::unix::fs::FileTypeExt as _;

    #[test]
    fn what_is_no_file_stays_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let name = pipe.to_str().unwrap().to_owned();
        let reader = std::thread::spawn({
            let name = name.clone();
            move || {
                let mut said = String::new();
                File::open(name).unwrap().read_to_string(&mut said).unwrap();
                said
            }
        });
        let mut sink = Sink::open(&name).ok().unwrap();
        sink.file().write_all(b"layers").unwrap();
        assert!(sink.finish(&name).is_ok());
        assert_eq!(reader.join().unwrap(), "layers");
        assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());

        let file = dir.path().join("file");
        let name = file.to_str().unwrap();
        let mut sink = Sink::open(name).ok().unwrap();
        sink.file().write_all(b"layers").unwrap();
        assert!(!file.exists());
        assert!(sink.finish(name).is_ok());
        assert_eq!(fs::read(&file).unwrap(), b"layers");
    }
}
