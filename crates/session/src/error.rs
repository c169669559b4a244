//! Why a client's session did not give what was asked for.

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The session was opened without this service.
    #[error("the client offers no {0}")]
    NotOffered(&'static str),
    /// The client has no such thing.
    #[error("{what}: {message}")]
    NotFound { what: String, message: String },
    #[error("{what}: the client answered: {message}")]
    Refused { what: String, message: String },
    #[error("{what}: the client did not answer within {seconds} seconds")]
    Silent { what: String, seconds: u64 },
    #[error("the client's session has ended")]
    Ended,
    /// What came is not what the protocol allows.
    #[error("what the client sent is not valid: {0}")]
    Protocol(String),
    #[error("no session {0:?} is open")]
    Unknown(String),
    #[error("a session {0:?} is open already")]
    Taken(String),
    #[error("{0} sessions are open: no further one is taken")]
    TooMany(usize),
    #[error("{0}")]
    Introduction(String),
    /// Reading what is sent.
    #[error("{0}")]
    Local(String),
}

impl Error {
    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self::Protocol(message.into())
    }
}
