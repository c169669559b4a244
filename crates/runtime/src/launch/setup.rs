//! The parent's side of a process's setting itself up: what it says, and what became of it.

use std::fs::File;
use std::io::Read as _;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use super::lost;
use crate::describe::{self, Subject};
use crate::error::{Error, Kind};
use crate::finish::TOLD;
use crate::listener::Listener;
use crate::plan::{Failure, Last, MESSAGE_LENGTH, Message, Part, Place, Plan, Step, Tree, TreeMount};
use crate::{child, mounts};

/// The parent's side of a child's setting up.
pub(super) struct Setup<'a> {
    pub channel: BorrowedFd<'a>,
    pub plan: &'a Plan,
    pub subject: &'a Subject,
    pub process: (i32, BorrowedFd<'a>),
    /// Who gets the filter's descriptor before the gate.
    pub listener: Option<&'a Listener>,
    pub terminal: Option<OwnedFd>,
    /// The process was told to start already: it goes on until its program is executed.
    pub at_once: bool,
}

impl Setup<'_> {
    pub(super) fn say(&self, message: Message) -> Result<(), Error> {
        child::send(self.channel, message).map_err(|e| Error::os("talking to the container's process", e))
    }

    pub(super) fn until_ready(
        &mut self,
        mut on_mounted: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error> {
        loop {
            match receive(self.channel)? {
                (Some(Message::Ready), _) if self.at_once => {}
                (Some(Message::Ready), _) => return Ok(()),
                (None, _)
                    if self.at_once
                        && table(self.process.0).and_then(|table| executed(&table)) != Some(false) =>
                {
                    return Ok(());
                }
                (None, _) if self.at_once && self.is_silenced() => return Err(silenced(self.subject)),
                (Some(Message::Terminal), Some(fd)) => self.terminal = Some(fd),
                (Some(Message::MapIds(step)), Some(tree)) => {
                    self.map_ids(step, tree.as_fd())?;
                    self.say(Message::Mapped)?;
                }
                (Some(Message::Mounted), _) => {
                    on_mounted()?;
                    self.say(Message::HooksDone)?;
                    self.say(Message::InCgroup)?;
                }
                (Some(Message::Listener(fd)), _) => {
                    let Some(listener) = self.listener else { return Err(lost(rustix::io::Errno::PROTO)) };
                    listener.hand_over(self.process.0, self.process.1, fd)?;
                    self.say(Message::HooksDone)?;
                }
                (Some(Message::Failed(failure)), _) => {
                    let steps = &self.plan.steps;
                    return Err(failed_with_more(self.channel, steps, self.subject, failure));
                }
                (None, _) if self.listener.is_some() => {
                    return Err(Error::new(
                        Kind::Os,
                        "the container's process died before it handed its seccomp listener over (does its filter allow \
                         what is needed for that?)",
                    ));
                }
                (None, _) => {
                    return Err(Error::new(
                        Kind::Os,
                        "the container's process died while being set up (killed; is its memory limit too low?)",
                    ));
                }
                (Some(_), _) => {
                    return Err(Error::os("talking to the container's process", rustix::io::Errno::PROTO));
                }
            }
        }
    }

    /// Whether a process that has ended without a word may have been kept from speaking by its filter.
    pub(super) fn is_silenced(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let ended = waitid(WaitId::PidFd(self.process.1), options).ok().flatten();
        self.subject.filtered && ended.is_none_or(|status| status.terminating_signal() != Some(libc::SIGKILL))
    }

    /// Maps the ids of a tree that the child has detached.
    pub(super) fn map_ids(&self, step: u16, tree: BorrowedFd<'_>) -> Result<(), Error> {
        let asked = self.plan.steps.get(usize::from(step)).and_then(|step| match step {
            Step::Attach(TreeMount { tree: Tree::Inside(inside), .. }) => Some((step, inside.ids.as_ref()?)),
            _ => None,
        });
        let Some((step, (namespace, recursive))) = asked else {
            return Err(Error::os("talking to the container's process", rustix::io::Errno::PROTO));
        };
        mounts::map_ids(tree, namespace.as_fd(), *recursive, &|| describe::step(step, Part::Whole))
    }

    /// If the child has already reported a failure of its own, that is the cause.
    pub(super) fn better(&self, error: Error) -> Error {
        if !matches!(error.errno(), Some(libc::EPIPE | libc::ESRCH | libc::ECONNRESET)) {
            return error;
        }
        while let Ok((Some(message), _)) = receive(self.channel) {
            if let Message::Failed(failure) = message {
                return describe::failure(&self.plan.steps, self.subject, failure);
            }
        }
        error
    }
}

/// One message and perhaps a descriptor; no message is the end of the channel.
pub(super) fn receive(channel: BorrowedFd<'_>) -> Result<(Option<Message>, Option<OwnedFd>), Error> {
    let mut bytes = [0_u8; MESSAGE_LENGTH];
    let (length, fd) = receive_raw(channel, &mut bytes)?;
    if length == 0 {
        return Ok((None, fd));
    }
    let message = bytes.get(..length).and_then(Message::decode);
    let message =
        message.ok_or_else(|| Error::os("hearing from the container's process", rustix::io::Errno::PROTO))?;
    Ok((Some(message), fd))
}

pub(super) fn receive_raw(
    channel: BorrowedFd<'_>,
    bytes: &mut [u8; MESSAGE_LENGTH],
) -> Result<(usize, Option<OwnedFd>), Error> {
    let failed = |e| Error::os("hearing from the container's process", e);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut reset = false;
    let length = loop {
        let mut data = [std::io::IoSliceMut::new(bytes)];
        match rustix::net::recvmsg(channel, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received.bytes,
            Err(rustix::io::Errno::INTR) => {}
            // The process ended without having read everything. The kernel says so once, before
            // what the process had still to say.
            Err(rustix::io::Errno::CONNRESET) if !reset => reset = true,
            Err(rustix::io::Errno::CONNRESET) => break 0,
            Err(e) => return Err(failed(e)),
        }
    };
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last();
        }
    }
    Ok((length, fd))
}

pub(super) fn silenced(subject: &Subject) -> Error {
    let program = &subject.program;
    Error::new(
        Kind::Os,
        format!(
            "exec {program:?}: the process was ended before its program was executed: its seccomp filter does not \
             allow what is needed for that (execve at least)"
        ),
    )
}

/// A process that could not execute its program says what that lacks, or what a hook said, and ends.
pub(super) fn failed_with_more(
    channel: BorrowedFd<'_>,
    steps: &[Step],
    subject: &Subject,
    failure: Failure,
) -> Error {
    let mut told = [0_u8; TOLD];
    let tells = matches!(failure.place, Place::Last(Last::Exec | Last::StartHook, _));
    let length = match tells.then(|| rustix::net::recv(channel, &mut told[..], RecvFlags::empty())) {
        Some(Ok((length, _))) => length.min(told.len()),
        _ => 0,
    };
    describe::failure_told(steps, subject, failure, &told[..length])
}

/// What the kernel tells of a process, as long as it has not been reaped.
pub(super) fn table(pid: i32) -> Option<File> {
    File::open(format!("/proc/{pid}/stat")).ok()
}

/// Whether a process has executed a program since it was cloned (`PF_FORKNOEXEC` in field 9 of proc_pid_stat(5));
/// nobody knows of one that has been reaped.
pub(super) fn executed(mut table: &File) -> Option<bool> {
    const PF_FORKNOEXEC: u64 = 0x40;
    let mut text = String::new();
    table.read_to_string(&mut text).ok()?;
    // The name is in parentheses and may hold anything.
    let flags: u64 = text.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse().ok()?;
    Some(flags & PF_FORKNOEXEC == 0)
}
