//! What can go wrong in the client, and the exit status that follows from it.
//!
//! A `Fault` travels to `commands::main`, which alone prints it and alone decides the exit status.

use crate::client::Unreachable;

#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The command line itself is wrong; the usage text follows the message.
    #[error("{text}")]
    Usage { text: String, code: i32 },
    /// The engine answered with an error.
    #[error("Error response from daemon: {message}")]
    Api { status: u16, message: String },
    /// No engine answers.
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    /// A sentence for the user.
    #[error("{0}")]
    Said(String),
    /// A sentence for the user, and the exit status that belongs to it.
    #[error("{text}")]
    Coded { text: String, code: i32 },
    /// Everything worth saying was said; only the exit status is left.
    #[error("exit status {0}")]
    Exit(i32),
}

impl Fault {
    pub fn said(text: impl Into<String>) -> Self {
        Self::Said(text.into())
    }

    pub fn code(&self) -> i32 {
        match self {
            Self::Usage { code, .. } | Self::Coded { code, .. } | Self::Exit(code) => *code,
            Self::Api { .. } | Self::Unreachable(_) | Self::Said(_) => 1,
        }
    }

    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api { status: 404, .. })
    }

    /// Names the object an operating-system error is about.
    pub fn io(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self::Said(format!("{what}: {}", crate::output::os_text(&error)))
    }
}

pub type Outcome<T = ()> = Result<T, Fault>;
