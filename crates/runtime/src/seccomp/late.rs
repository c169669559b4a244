//! A seccomp section that is read and compiled when there is time for it, or not at all where that was done before.

use std::path::{Path, PathBuf};

use super::{Program, compile, kept};
use crate::error::Error;
use crate::spec::LinuxSeccomp;

/// A seccomp section as it is in the file: long, and not needed before everything else of the container. One without a
/// listener, whose spec has none.
#[derive(Debug, Clone)]
pub struct LateSeccomp {
    text: Vec<u8>,
    /// For errors.
    file: PathBuf,
    /// Where compiled filters are kept.
    kept: PathBuf,
}

impl LateSeccomp {
    /// `None` if more of it may have to be known beforehand. `root`: where the runtime's records are.
    pub(crate) fn new(text: &str, file: PathBuf, root: &Path) -> Option<Self> {
        // An escape might hide the word.
        let plain =
            !["\\", "SCMP_ACT_NOTIFY", "listener"].iter().any(|word| text.contains(word)) && text != "null";
        plain.then(|| Self { text: text.as_bytes().to_owned(), file, kept: root.join(kept::DIRECTORY) })
    }

    fn read(&self) -> Result<LinuxSeccomp, Error> {
        serde_json::from_slice(&self.text)
            .map_err(|e| Error::invalid(format!("reading {}: linux.seccomp: {e}", self.file.display())))
    }

    /// What it compiles to, if it filters anything.
    pub(crate) fn program(&self) -> Result<Option<Program>, Error> {
        kept_or_made(&self.kept, &self.text, || compile(&self.read()?))
    }
}

/// What a section compiles to that has been read already, if it filters anything: that of a container in which another
/// program is to be executed. `root`: where the runtime's records are.
pub(crate) fn program(filter: &LinuxSeccomp, root: &Path) -> Result<Option<Program>, Error> {
    match serde_json::to_vec(filter) {
        Ok(text) => kept_or_made(&root.join(kept::DIRECTORY), &text, || compile(filter)),
        Err(_unwritable) => compile(filter),
    }
}

fn kept_or_made(
    dir: &Path,
    text: &[u8],
    make: impl FnOnce() -> Result<Option<Program>, Error>,
) -> Result<Option<Program>, Error> {
    if let Some(program) = kept::find(dir, text) {
        return Ok(Some(program));
    }
    let program = make()?;
    if let Some(program) = &program {
        // If it cannot be kept, the next one takes as long as this.
        kept::keep(dir, text, program).ok();
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_waits_to_be_read_unless_it_may_have_a_listener() {
        let late =
            |text: &str| LateSeccomp::new(text, PathBuf::from("/b/config.json"), Path::new("/nowhere"));
        let read = late(r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#).unwrap().read().unwrap();
        assert_eq!(read.default_action(), crate::spec::LinuxSeccompAction::ScmpActAllow);
        for known_before in [
            "null",
            r#"{"listenerPath": "/l"}"#,
            r#"{"syscalls": [{"names": ["a"], "action": "SCMP_ACT_NOTIFY"}]}"#,
            r#"{"syscalls": [{"names": ["a"], "action": "SCMP_\u0041CT_NOTIFY"}]}"#,
        ] {
            assert!(late(known_before).is_none(), "{known_before}");
        }
        let error = late(r#"{"defaultAction": "SCMP_ACT_JUMP"}"#).unwrap().program().unwrap_err().to_string();
        assert!(
            error.starts_with("reading /b/config.json: linux.seccomp: ") && error.contains("SCMP_ACT_JUMP"),
            "{error}"
        );
    }

    #[test]
    fn the_second_time_nothing_is_compiled() {
        let root = tempfile::tempdir().unwrap();
        let text = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}"#;
        let late = LateSeccomp::new(text, PathBuf::from("/b/config.json"), root.path()).unwrap();
        let compiled = late.program().unwrap().unwrap();
        // What is there is taken without a look at the section: another filter in its place shows it.
        let other: LinuxSeccomp =
            serde_json::from_value(serde_json::json!({"defaultAction": "SCMP_ACT_KILL_PROCESS"})).unwrap();
        let other = compile(&other).unwrap().unwrap();
        assert_ne!(compiled, other);
        kept::keep(&late.kept, &late.text, &other).unwrap();
        assert_eq!(late.program().unwrap().unwrap(), other);
        // One character more is another section.
        let late =
            LateSeccomp::new(&format!("{text} "), PathBuf::from("/b/config.json"), root.path()).unwrap();
        assert_eq!(late.program().unwrap().unwrap(), compiled);
    }
}
