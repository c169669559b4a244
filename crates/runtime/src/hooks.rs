//! Hooks: programs of the host's choosing around a container's life, with its state on stdin.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use brigantine_sys::signals;

use crate::error::{Error, Kind};
use crate::spec::{Hook, Hooks};

/// What the kinds of hooks that need the container halfway are called.
pub(crate) fn any_before_pivot(hooks: &Hooks) -> bool {
    let prestart = hooks.prestart();
    [prestart, hooks.create_runtime(), hooks.create_container()]
        .iter()
        .any(|list| list.as_ref().is_some_and(|l| !l.is_empty()))
}

/// Runs hooks one after the other in the caller's namespaces; the first that fails ends it.
pub fn run(kind: &str, hooks: Option<&Vec<Hook>>, state: &[u8], bundle: Option<&Path>) -> Result<(), Error> {
    for hook in hooks.into_iter().flatten() {
        run_one(kind, hook, state, bundle)?;
    }
    Ok(())
}

fn run_one(kind: &str, hook: &Hook, state: &[u8], bundle: Option<&Path>) -> Result<(), Error> {
    let path = hook.path();
    let what = || format!("{kind} hook {:?}", path.display());
    if !path.is_absolute() {
        return Err(Error::invalid(format!("{}: the path is not absolute", what())));
    }
    let mut command = Command::new(path);
    if let Some((name, rest)) = hook.args().as_ref().and_then(|a| a.split_first()) {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    if let Some(bundle) = bundle {
        command.current_dir(bundle);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    // The caller may have blocked signals to hand them on to the container.
    signals::unblock_in(&mut command);
    let mut child = command.spawn().map_err(|e| Error::os(what(), e))?;
    if let Some(mut stdin) = child.stdin.take()
        && let Err(e) = stdin.write_all(state)
        && e.kind() != std::io::ErrorKind::BrokenPipe
    {
        drop((child.kill(), child.wait()));
        return Err(Error::os(format!("{}: handing over the state", what()), e));
    }
    let deadline = hook.timeout().map(|s| Instant::now() + Duration::from_secs(s.max(0).unsigned_abs()));
    let status = loop {
        let status = match deadline {
            None => Some(child.wait().map_err(|e| Error::os(what(), e))?),
            Some(_) => child.try_wait().map_err(|e| Error::os(what(), e))?,
        };
        if let Some(status) = status {
            break status;
        }
        if deadline.is_some_and(|d| Instant::now() >= d) {
            drop((child.kill(), child.wait()));
            return Err(Error::new(Kind::Os, format!("{}: timed out", what())));
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        use std::io::Read;
        // What it said is an extra; whatever cannot be read is not worth another error.
        drop(stderr.take(4096).read_to_string(&mut said));
    }
    let said = said.trim().replace('\n', "; ");
    Err(Error::new(
        Kind::Os,
        format!("{}: {status}{}{said}", what(), if said.is_empty() { "" } else { ": " }),
    ))
}
