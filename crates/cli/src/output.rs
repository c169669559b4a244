//! The only place that writes to standard output and standard error.
//!
//! A closed pipe ends the process quietly, as it ends any filter; other write errors end it with a sentence.

use std::io::{self, Write};

/// The status a shell shows for a process that SIGPIPE ended.
const PIPE_CLOSED: i32 = 141;

pub fn write(text: &str) {
    write_bytes(text.as_bytes());
}

pub fn write_bytes(bytes: &[u8]) {
    let mut out = io::stdout().lock();
    give_up_on(out.write_all(bytes).and_then(|()| out.flush()));
}

pub fn line(text: &str) {
    let mut out = io::stdout().lock();
    give_up_on(out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()));
}

pub fn error_line(text: &str) {
    let mut err = io::stderr().lock();
    give_up_on(err.write_all(text.as_bytes()).and_then(|()| err.write_all(b"\n")));
}

pub fn error_bytes(bytes: &[u8]) {
    give_up_on(io::stderr().lock().write_all(bytes));
}

/// An operating-system error without Rust's "(os error N)" tail, in lower case.
pub fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    match chars.next() {
        Some(first) if error.raw_os_error().is_some() => first.to_lowercase().chain(chars).collect(),
        _ => text.to_owned(),
    }
}

fn give_up_on(result: io::Result<()>) {
    if let Err(error) = result {
        crate::terminal::restore();
        if error.kind() == io::ErrorKind::BrokenPipe {
            std::process::exit(PIPE_CLOSED);
        }
        // Standard error may be what is broken: there is nobody left to tell.
        if writeln!(io::stderr(), "brig: write: {}", os_text(&error)).is_err() {
            std::process::exit(1);
        }
        std::process::exit(1);
    }
}
