//! The user's terminal: its size, raw mode, and putting it back on every way out.
//!
//! Raw mode is undone when its guard drops, by the panic hook, by `restore` before any early exit, and by the signal
//! watch that commands with a raw terminal run.

use std::io;
use std::sync::Mutex;

use crate::fault::{Fault, Outcome};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

pub fn stdin_is_terminal() -> bool {
    isatty(io::stdin())
}

pub fn stdout_is_terminal() -> bool {
    isatty(io::stdout())
}

pub fn stderr_is_terminal() -> bool {
    isatty(io::stderr())
}

/// Height and width of the terminal on standard output.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Raw mode for as long as this lives.
#[derive(Debug)]
pub struct Raw(());

impl Raw {
    /// Raw mode, if the command has use for it.
    pub fn enter_if(wanted: bool) -> Outcome<Option<Self>> {
        if !wanted {
            return Ok(None);
        }
        Self::enter().map(Some).map_err(Fault::io("setting the terminal to raw mode"))
    }

    fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        let first = {
            let mut saved = SAVED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let first = saved.is_none();
            saved.get_or_insert(before);
            first
        };
        if first {
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                hook(info);
            }));
        }
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was found, if it was changed.
pub fn restore() {
    let Ok(mut saved) = SAVED.try_lock() else { return };
    if let Some(before) = saved.take()
        && let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &before)
    {
        // The terminal may be gone already: nothing is left to put back then.
        debug_assert!(error != rustix::io::Errno::INVAL, "the saved settings are the terminal's own");
    }
}

/// Reads a line without showing it.
pub fn read_secret(prompt: &str) -> io::Result<String> {
    use rustix::termios::LocalModes;
    crate::output::error_bytes(prompt.as_bytes());
    let before = tcgetattr(io::stdin())?;
    let mut silent = before.clone();
    silent.local_modes.remove(LocalModes::ECHO);
    tcsetattr(io::stdin(), OptionalActions::Now, &silent)?;
    let mut line = String::new();
    let read = io::stdin().read_line(&mut line);
    tcsetattr(io::stdin(), OptionalActions::Now, &before)?;
    crate::output::error_line("");
    read?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// The bytes that `--detach-keys` stands for: letters, and `ctrl-` with a letter or one of `@ ^ [ , _ \ ]`.
pub fn parse_detach_keys(text: &str) -> Result<Vec<u8>, String> {
    let unknown = |key: &str| format!("invalid detach keys ({text}): Unknown character: '{key}'");
    text.split(',')
        .map(|key| match key.strip_prefix("ctrl-") {
            Some(rest) => match rest.as_bytes() {
                [letter @ (b'a'..=b'z')] => Ok(letter - b'a' + 1),
                [b'@'] => Ok(0),
                [b'['] => Ok(27),
                [b'\\'] => Ok(28),
                [b']'] => Ok(29),
                [b'^'] => Ok(30),
                [b'_'] => Ok(31),
                _ => Err(unknown(key)),
            },
            None => match key.as_bytes() {
                [byte] => Ok(*byte),
                _ => Err(unknown(key)),
            },
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_parse() {
        assert_eq!(parse_detach_keys("ctrl-p,ctrl-q").unwrap(), [16, 17]);
        assert_eq!(parse_detach_keys("ctrl-@,a,ctrl-\\").unwrap(), [0, b'a', 28]);
        assert!(parse_detach_keys("ctrl-pp").unwrap_err().contains("ctrl-pp"));
    }
}
