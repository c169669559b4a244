//! The runtime's one error: what was being done, to what, why it failed, in one line.
//!
//! Serialisable, so that the shim can hand it on unchanged.

use std::fmt::{self, Display};

use serde::{Deserialize, Serialize};

/// What a caller would handle differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The program to execute does not exist (docker: exit status 127).
    NotFound,
    /// The program exists but may not be executed (docker: exit status 126).
    PermissionDenied,
    /// The program is not something this kernel can execute: wrong architecture, missing loader.
    NotExecutable,
    /// The spec asks for something that this runtime or this kernel does not have.
    Unsupported,
    /// The spec contradicts itself or names something malformed.
    Invalid,
    /// The container is not in a state that allows the operation.
    State,
    /// A system call failed.
    Os,
}

/// A failure of the runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    kind: Kind,
    message: String,
    errno: Option<i32>,
}

impl Error {
    /// An error whose whole text is `message`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: one_line(message.into()), errno: None }
    }

    /// The spec is wrong: `message` says where.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// The spec is right, but this cannot be done here.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, message)
    }

    /// A system call failed while doing `step`, e.g. `mounting tmpfs at "/dev"`.
    pub fn os(step: impl Display, cause: impl Into<std::io::Error>) -> Self {
        let cause = cause.into();
        let errno = cause.raw_os_error();
        let text = match errno {
            Some(raw) => describe_errno(raw),
            None => cause.to_string(),
        };
        Self { kind: Kind::Os, message: one_line(format!("{step}: {text}")), errno }
    }

    #[must_use]
    pub(crate) fn with_errno(mut self, errno: i32) -> Self {
        self.errno = Some(errno);
        self
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The system's error number, where a system call was the cause.
    pub fn errno(&self) -> Option<i32> {
        self.errno
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// What a spec says may be part of an error; its line ends and other control characters must not be those of a log.
fn one_line(message: String) -> String {
    if !message.contains(char::is_control) {
        return message;
    }
    let mut line = String::with_capacity(message.len() + 8);
    for letter in message.chars() {
        if letter.is_control() {
            line.extend(letter.escape_default());
        } else {
            line.push(letter);
        }
    }
    line
}

/// The C library's words for an error number, in lower case and without the number, as runc and
/// docker print them and their users match on.
pub(crate) fn describe_errno(raw: i32) -> String {
    let text = std::io::Error::from_raw_os_error(raw).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => format!("error {raw}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line() {
        let e = Error::invalid("unknown variant `\n\u{1b}[1mnetwork`, ü");
        assert_eq!(e.to_string(), "unknown variant `\\n\\u{1b}[1mnetwork`, ü");
        assert_eq!(Error::os("a\nb", rustix::io::Errno::PERM).to_string(), "a\\nb: operation not permitted");
    }

    #[test]
    fn os_errors_read_like_runcs() {
        let e = Error::os("opening \"/x\"", rustix::io::Errno::NOENT);
        assert_eq!(e.to_string(), "opening \"/x\": no such file or directory");
        assert_eq!(e.errno(), Some(libc::ENOENT));
    }
}
