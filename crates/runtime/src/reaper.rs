//! The `--init` process: forwards signals, reaps, exits with its child's status.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use brigantine_sys::signals::{self, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, WaitOptions};

/// Signals that mean a fault of this process itself are not for the child.
const OWN: &[i32] = &[
    libc::SIGKILL,
    libc::SIGSTOP,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGSYS,
];

/// `args`: the program and its arguments (after `init --`).
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let mut args = args.into_iter();
    let Some(program) = args.next() else {
        complain("no program is given");
        return 125;
    };
    match supervise(&program, args) {
        Ok(status) => status,
        Err((status, text)) => {
            complain(&text);
            status
        }
    }
}

fn complain(text: &str) {
    // With no stderr there is nobody to tell.
    if writeln!(std::io::stderr(), "init: {text}").is_err() {}
}

fn supervise(program: &OsString, args: impl Iterator<Item = OsString>) -> Result<u8, (u8, String)> {
    let all = (1..=31).chain(34..=64).filter(|s| !OWN.contains(s)).collect::<Vec<_>>();
    let signals = SignalFd::block(&all).map_err(|e| (125, format!("blocking signals: {e}")))?;
    let mut command = Command::new(program);
    command.args(args).process_group(0);
    signals::unblock_in(&mut command);
    let child = command.spawn().map_err(|e| {
        let status = if e.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 };
        (status, format!("{}: {e}", program.display()))
    })?;
    let pid = Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .map_err(|e| (125, format!("opening the child: {e}")))?;
    // On a terminal the child's group is the one that reads; elsewhere there is none to set.
    rustix::termios::tcsetpgrp(rustix::stdio::stdin(), pid).ok();
    loop {
        let mut fds = [PollFd::new(&signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err((125, format!("waiting for signals: {e}"))),
        }
        while let Some(signal) = signals.take().map_err(|e| (125, format!("reading signals: {e}")))? {
            match signal {
                libc::SIGCHLD => {}
                // Only for a terminal's reader; the child gets its own from the kernel.
                libc::SIGTTIN | libc::SIGTTOU => {}
                signal => {
                    // A child that is just gone is met by the next reaping.
                    signals::send(pidfd.as_fd(), signal).ok();
                }
            }
        }
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((gone, status))) if gone == pid => {
                    let code = status.exit_status().or_else(|| status.terminating_signal().map(|s| 128 + s));
                    return Ok(code.unwrap_or(125) as u8);
                }
                Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
                Ok(None) | Err(_) => break,
            }
        }
    }
}
