//! Hooks: programs of the host's choosing around a container's life, with its state on stdin.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use brigantine_sys::exec::StringVector;
use brigantine_sys::signals;
use rustix::fs::MemfdFlags;

use crate::error::{Error, Kind};
use crate::mounts::c_string;
use crate::plan::HookPlan;
use crate::spec::{Hook, Hooks, Spec};

/// Whether hooks want to see the container halfway.
pub(crate) fn any_before_pivot(hooks: &Hooks) -> bool {
    [hooks.prestart(), hooks.create_runtime()].iter().any(|list| list.as_ref().is_some_and(|l| !l.is_empty()))
}

/// A container's state as hooks and listeners see it. `pid`: none before there is a process.
pub fn state(
    id: &str,
    status: &str,
    pid: Option<i32>,
    bundle: Option<&Path>,
    spec: &Spec,
) -> serde_json::Value {
    let mut state = serde_json::json!({
        "ociVersion": crate::OCI_VERSION,
        "id": id,
        "status": status,
        "bundle": bundle.unwrap_or(Path::new("")),
        "annotations": spec.annotations().clone().unwrap_or_default(),
    });
    if let (Some(pid), Some(fields)) = (pid, state.as_object_mut()) {
        fields.insert("pid".to_owned(), pid.into());
    }
    state
}

/// Hooks for the container's process to run itself; `state` is without its number.
pub(crate) fn compile(
    kind: &'static str,
    hooks: Option<&Vec<Hook>>,
    state: &serde_json::Value,
) -> Result<Vec<HookPlan>, Error> {
    hooks
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(index, hook)| compile_one(kind, index, hook, state))
        .collect()
}

/// What a hook is called in errors, as runc calls it.
pub(crate) fn name(kind: &str, index: usize, path: &Path) -> String {
    format!("error running {kind} hook #{index}: {:?}", path.display())
}

fn compile_one(
    kind: &'static str,
    index: usize,
    hook: &Hook,
    state: &serde_json::Value,
) -> Result<HookPlan, Error> {
    use std::os::unix::ffi::OsStrExt;
    let deadline = check(kind, index, hook)?;
    let path = c_string(hook.path().as_os_str().as_bytes(), "hook")?;
    let strings = |list: Vec<&str>| {
        list.into_iter().map(|text| c_string(text, "hook argument")).collect::<Result<Vec<_>, _>>()
    };
    let args = hook.args().iter().flatten().map(String::as_str).collect::<Vec<_>>();
    let argv = if args.is_empty() { vec![path.clone()] } else { strings(args)? };
    let envp = match hook.env() {
        Some(env) => Some(StringVector::new(strings(env.iter().map(String::as_str).collect())?)),
        // What the program will have; before that there is nothing to inherit.
        None if kind == "startContainer" => None,
        None => Some(StringVector::new(Vec::new())),
    };
    let said = memory_file()?;
    let text = state.to_string();
    let open = text.trim_end_matches('}');
    Ok(HookPlan {
        kind,
        index,
        path,
        argv: StringVector::new(argv),
        envp,
        timeout: deadline.map(|d| d.as_millis() as u64),
        state: (format!("{open},\"pid\":").into_bytes(), b"}".to_vec()),
        said: Some(said),
    })
}

fn memory_file() -> Result<OwnedFd, Error> {
    rustix::fs::memfd_create(c"hook", MemfdFlags::CLOEXEC)
        .map_err(|e| Error::os("opening a memory file for a hook's output", e))
}

/// The time a hook may take.
fn check(kind: &str, index: usize, hook: &Hook) -> Result<Option<Duration>, Error> {
    let what = || name(kind, index, hook.path());
    if !hook.path().is_absolute() {
        return Err(Error::invalid(format!("{}: the path is not absolute", what())));
    }
    match hook.timeout() {
        None => Ok(None),
        Some(seconds) if seconds > 0 => Ok(Some(Duration::from_secs(seconds.unsigned_abs()))),
        Some(seconds) => Err(Error::invalid(format!("{}: a timeout of {seconds} seconds", what()))),
    }
}

/// Refuses what can only be found wrong later otherwise.
pub(crate) fn check_all(hooks: &Hooks) -> Result<(), Error> {
    for (kind, list) in [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ] {
        for (index, hook) in list.iter().flatten().enumerate() {
            check(kind, index, hook)?;
        }
    }
    Ok(())
}

/// Runs hooks one after the other in the caller's namespaces; the first that fails ends it.
pub fn run(kind: &str, hooks: Option<&Vec<Hook>>, state: &[u8], bundle: Option<&Path>) -> Result<(), Error> {
    for (index, hook) in hooks.into_iter().flatten().enumerate() {
        run_one(kind, index, hook, state, bundle)?;
    }
    Ok(())
}

fn run_one(kind: &str, index: usize, hook: &Hook, state: &[u8], bundle: Option<&Path>) -> Result<(), Error> {
    let path = hook.path();
    let what = || name(kind, index, path);
    let deadline = check(kind, index, hook)?.map(|time| Instant::now() + time);
    let mut command = Command::new(path);
    if let Some((name, rest)) = hook.args().as_ref().and_then(|a| a.split_first()) {
        command.arg0(name).args(rest);
    }
    // One that has no environment of its own has its caller's.
    if hook.env().is_some() {
        command.env_clear();
    }
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    if let Some(bundle) = bundle {
        command.current_dir(bundle);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    // A file, not a pipe: nobody reads while the hook runs, and one that says much must not block.
    let said = std::fs::File::from(memory_file()?);
    let copy = said.try_clone().map_err(|e| Error::os(what(), e))?;
    command.stderr(Stdio::from(copy));
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
    let said = words(&said);
    Err(Error::new(
        Kind::Os,
        format!("{}: {status}{}{said}", what(), if said.is_empty() { "" } else { ": " }),
    ))
}

/// What a hook said on stderr, in one line.
pub(crate) fn words(said: &impl std::os::fd::AsFd) -> String {
    let mut buffer = [0_u8; 4096];
    // What it said is an extra; what cannot be read is not worth another error.
    let length = rustix::io::pread(said, &mut buffer, 0).unwrap_or_default();
    one_line(&buffer[..length])
}

pub(crate) fn one_line(said: &[u8]) -> String {
    String::from_utf8_lossy(said).trim().replace('\n', "; ")
}
