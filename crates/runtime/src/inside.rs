//! Hooks that run in the container's own namespaces, started by its process itself. Same invariant
//! as `child`: nothing here allocates, locks, logs or panics.

use std::os::fd::{AsFd, BorrowedFd};

use brigantine_sys::exec::{StringVector, execve};
use brigantine_sys::{fd as descriptors, spawn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use crate::plan::{HookFailure, HookPlan};

/// What a hook's process exits with if its program cannot be executed; the error number is added.
const NOT_EXECUTED: i32 = 0;

/// Runs one hook to its end, in `dir` if one is given; `env` is for one that has no environment of its own.
pub(crate) fn run(
    hook: &HookPlan,
    dir: Option<BorrowedFd<'_>>,
    env: &StringVector,
) -> Result<(), HookFailure> {
    let os = |e: Errno| HookFailure::Os(e.raw_os_error());
    // A memory file rather than a pipe: a hook need not read its state.
    let state = rustix::fs::memfd_create(c"state", MemfdFlags::CLOEXEC).map_err(os)?;
    let mut digits = [0_u8; 20];
    write_all(state.as_fd(), &hook.state.0).map_err(os)?;
    write_all(state.as_fd(), number(rustix::process::getpid().as_raw_nonzero().get(), &mut digits))
        .map_err(os)?;
    write_all(state.as_fd(), &hook.state.1).map_err(os)?;
    rustix::fs::seek(&state, SeekFrom::Start(0)).map_err(os)?;
    // The error number of a failed exec comes back through memory that both share.
    let failed = rustix::fs::memfd_create(c"errno", MemfdFlags::CLOEXEC).map_err(os)?;
    let child = spawn::clone(0, None, || {
        let errno = become_hook(hook, state.as_fd(), dir, env);
        match rustix::io::pwrite(&failed, &errno.raw_os_error().to_le_bytes(), 0) {
            Ok(_) | Err(_) => NOT_EXECUTED,
        }
    })
    .map_err(os)?;
    if let Some(milliseconds) = hook.timeout
        && !ends_within(child.pidfd.as_fd(), milliseconds).map_err(os)?
    {
        // Either it is gone now, or it dies; both are waited for.
        pidfd_send_signal(&child.pidfd, Signal::KILL).ok();
        waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED).ok();
        return Err(HookFailure::TimedOut);
    }
    let status = loop {
        match waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED) {
            Err(Errno::INTR) => {}
            other => break other.map_err(os)?,
        }
    };
    let mut errno = [0_u8; 4];
    if rustix::io::pread(&failed, &mut errno, 0) == Ok(4) {
        return Err(HookFailure::Os(i32::from_le_bytes(errno)));
    }
    match status.map(|s| (s.exit_status(), s.terminating_signal())) {
        Some((Some(0), _)) => Ok(()),
        Some((Some(code), _)) => Err(HookFailure::Exit(code)),
        Some((_, Some(signal))) => Err(HookFailure::Signal(signal)),
        _ => Err(HookFailure::Exit(255)),
    }
}

/// The hook's process; returns only with what kept it from its program.
fn become_hook(
    hook: &HookPlan,
    state: BorrowedFd<'_>,
    dir: Option<BorrowedFd<'_>>,
    env: &StringVector,
) -> Errno {
    let attempt = || {
        if let Some(dir) = dir {
            rustix::process::fchdir(dir)?;
        }
        descriptors::close_on_exec_from(3)?;
        descriptors::become_stdio(state, 0)?;
        let null = rustix::fs::open(c"/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        match (&hook.said, &null) {
            (Some(said), _) => descriptors::become_stdio(said.as_fd(), 2)?,
            (None, Ok(null)) => descriptors::become_stdio(null.as_fd(), 2)?,
            // Without a /dev/null it keeps the container's.
            (None, Err(_)) => {}
        }
        if let Ok(null) = &null {
            descriptors::become_stdio(null.as_fd(), 1)?;
        }
        Ok(())
    };
    match attempt() {
        Ok(()) => execve(&hook.path, &hook.argv, hook.envp.as_ref().unwrap_or(env)),
        Err(e) => e,
    }
}

fn ends_within(process: BorrowedFd<'_>, milliseconds: u64) -> Result<bool, Errno> {
    let timeout =
        Timespec { tv_sec: (milliseconds / 1000) as i64, tv_nsec: (milliseconds % 1000 * 1_000_000) as i64 };
    let mut fds = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    // Every signal has its default action here: none interrupts this and lets the process live.
    Ok(poll(&mut fds, Some(&timeout))? > 0)
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let written = rustix::io::write(fd, bytes)?;
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}

/// A positive number's decimal digits.
fn number(value: i32, buffer: &mut [u8; 20]) -> &[u8] {
    let mut rest = value.unsigned_abs();
    let mut at = buffer.len();
    loop {
        at -= 1;
        buffer[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            return &buffer[at..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_are_decimal() {
        for n in [1, 10, 407, i32::MAX] {
            assert_eq!(number(n, &mut [0; 20]), n.to_string().as_bytes());
        }
    }
}
