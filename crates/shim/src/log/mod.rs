//! The container's log in docker's `json-file` format: one JSON object a line with `log`, `stream` and `time`.
//!
//! Invariant: every byte of output is in the log, in order per stream. Output is cut into lines; a line longer than
//! 16 KiB, and a last line without a newline, become pieces whose `log` does not end in a newline, as docker writes them.
//!
//! JSON is text and output need not be: a byte that is not part of valid UTF-8 is written as the escape of a lone
//! surrogate, `\udc80` to `\udcff`. Other readers show a replacement character (which is what docker itself writes), and
//! [`Line::parse`] gives the byte back.

mod compress;
mod file;
mod line;
mod sink;

pub use compress::FileId;
pub(crate) use file::LogFile;
pub use line::{Line, Source};
pub use sink::reach;
