//! The engine's one error type: a class that decides what a caller does, and one line that says what, which, why.
//!
//! `Display` gives the engine's own sentence and never repeats its source; [`Error::report`] joins the chain.

use std::fmt;

/// What kind of failure this is; the API maps it to a status, the command line to an exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// The named object does not exist.
    NotFound,
    /// The object exists but its state forbids the call.
    Conflict,
    /// The request itself is wrong.
    InvalidParameter,
    /// The object is already as asked.
    NotModified,
    /// The call is understood and refused.
    Forbidden,
    /// Credentials are missing or wrong.
    Unauthorized,
    /// Known to Docker's API, not built here.
    NotImplemented,
    /// Would work at another time.
    Unavailable,
    /// Our fault, or the host's.
    Internal,
}

type Source = Box<dyn std::error::Error + Send + Sync + 'static>;

/// A failed engine call.
#[derive(Debug)]
pub struct Error {
    class: Class,
    message: String,
    source: Option<Source>,
}

macro_rules! constructors {
    ($($name:ident => $class:ident),* $(,)?) => {
        $(
            #[doc = concat!("An error of class [`Class::", stringify!($class), "`].")]
            pub fn $name(message: impl Into<String>) -> Self {
                Self { class: Class::$class, message: message.into(), source: None }
            }
        )*
    };
}

impl Error {
    constructors! {
        not_found => NotFound,
        conflict => Conflict,
        invalid => InvalidParameter,
        not_modified => NotModified,
        forbidden => Forbidden,
        unauthorized => Unauthorized,
        not_implemented => NotImplemented,
        unavailable => Unavailable,
        internal => Internal,
    }

    /// An error of a class that is known at run time only.
    pub fn of(class: Class, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), source: None }
    }

    /// Adds the cause.
    pub fn because(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What kind of failure this is.
    pub fn class(&self) -> Class {
        self.class
    }

    /// The whole chain on one line, as a client is to read it.
    pub fn report(&self) -> String {
        let mut text = self.message.clone();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as &(dyn std::error::Error + 'static))
    }
}

/// Says what the engine was doing when something below it failed.
pub(crate) trait Context<T> {
    /// Wraps the failure as [`Class::Internal`] with a sentence of ours in front.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<Source>> Context<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::internal(what()).because(source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_joins_the_chain_and_display_does_not() {
        let error = Error::internal("open the database /x").because(std::io::Error::other("disk on fire"));
        assert_eq!(error.to_string(), "open the database /x");
        assert_eq!(error.report(), "open the database /x: disk on fire");
        assert_eq!(error.class(), Class::Internal);
    }
}
