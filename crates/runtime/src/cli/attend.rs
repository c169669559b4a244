//! Staying with a process in the foreground: signals, terminal, notifications, exit status.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use brigantine_sys::signals::{self, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use super::notify::Proxy;
use super::terminal::Joined;
use crate::error::Error;

/// Blocks what is handed on to the process; before it exists, so that none is lost.
pub(crate) fn forwarded() -> Result<SignalFd, Error> {
    let all = [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGTERM,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGCONT,
        libc::SIGALRM,
        libc::SIGWINCH,
    ];
    SignalFd::block(&all).map_err(|e| Error::os("blocking signals", e))
}

/// Waits for a child, handing signals on to it; its exit status, as a shell has it.
pub(crate) fn attend(
    process: BorrowedFd<'_>,
    master: Option<OwnedFd>,
    signals: &SignalFd,
    proxy: Option<&Proxy>,
) -> Result<u8, Error> {
    let failed = |e| Error::os("waiting for the container", e);
    let mut terminal = master.map(Joined::new).transpose()?;
    let mut ended = false;
    loop {
        let mut fds =
            vec![PollFd::from_borrowed_fd(process, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        let proxy_at = proxy.map(|p| {
            fds.push(PollFd::new(p, PollFlags::IN));
            fds.len() - 1
        });
        let terminal_at = terminal.as_ref().map(|t| {
            fds.push(PollFd::new(t, PollFlags::IN));
            if t.input {
                fds.push(PollFd::from_borrowed_fd(rustix::stdio::stdin(), PollFlags::IN));
            }
            fds.len() - 1 - usize::from(t.input)
        });
        // What is still in the terminal of a process that has ended is taken, and no more waited for.
        let soon = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, ended.then_some(&soon)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(failed(e)),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let is = |at: Option<usize>| at.and_then(|at| ready.get(at)) == Some(&true);
        while let Some(number) = signals.take().map_err(|e| Error::os("reading signals", e))? {
            match &terminal {
                Some(terminal) if number == libc::SIGWINCH => terminal.resize(),
                // A process that is gone is met by the next poll.
                _ => drop(signals::send(process, number)),
            }
        }
        if let (true, Some(proxy)) = (is(proxy_at), proxy) {
            proxy.pass_on()?;
        }
        let wrote = is(terminal_at);
        if let Some(open) = &mut terminal {
            if is(terminal_at.map(|at| at + 1)) {
                open.take_input()?;
            }
            if wrote && !open.output()? {
                terminal = None;
            }
        }
        if (ended || is(Some(0))) && (terminal.is_none() || ended && !wrote) {
            drop(terminal);
            let status = waitid(WaitId::PidFd(process), WaitIdOptions::EXITED).map_err(failed)?;
            let code =
                status.and_then(|s| s.exit_status().or_else(|| s.terminating_signal().map(|n| 128 + n)));
            return Ok(code.unwrap_or(255) as u8);
        }
        ended |= is(Some(0));
    }
}

/// Whether a process ends in time.
pub(crate) fn ends_within(process: &OwnedFd, time: std::time::Duration) -> bool {
    let until = std::time::Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.is_ok_and(|n| n > 0),
        }
    }
}
