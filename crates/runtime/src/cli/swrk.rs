//! A conversation with criu (`criu swrk`): one request, what criu has to say meanwhile, its answer. The messages are
//! protobuf's, of criu's `rpc.proto`; only the fields that are used are known here.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use brigantine_sys::exec::{StringVector, execve};
use brigantine_sys::spawn::{self, Child, ns};
use brigantine_sys::{fd as descriptors, process};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::cgroup::Cgroup;
use crate::child;
use crate::error::{Error, Kind, describe_errno};
use crate::mounts::c_string;

/// Fields of criu's options, by the names that they have there.
pub(super) mod option {
    pub const IMAGES_DIR_FD: u32 = 1;
    pub const PID: u32 = 2;
    pub const LEAVE_RUNNING: u32 = 3;
    pub const EXT_UNIX_SK: u32 = 4;
    pub const TCP_ESTABLISHED: u32 = 5;
    pub const SHELL_JOB: u32 = 7;
    pub const FILE_LOCKS: u32 = 8;
    pub const LOG_LEVEL: u32 = 9;
    pub const LOG_FILE: u32 = 10;
    pub const PAGE_SERVER: u32 = 11;
    pub const NOTIFY_SCRIPTS: u32 = 12;
    pub const ROOT: u32 = 13;
    pub const PARENT_IMG: u32 = 14;
    pub const TRACK_MEM: u32 = 15;
    pub const AUTO_DEDUP: u32 = 16;
    pub const WORK_DIR_FD: u32 = 17;
    pub const LINK_REMAP: u32 = 18;
    pub const MANAGE_CGROUPS: u32 = 24;
    pub const CG_ROOT: u32 = 25;
    pub const RST_SIBLING: u32 = 26;
    pub const INHERIT_FD: u32 = 27;
    pub const MANAGE_CGROUPS_MODE: u32 = 34;
    pub const EXTERNAL: u32 = 37;
    pub const EMPTY_NS: u32 = 38;
    pub const FREEZE_CGROUP: u32 = 44;
    pub const TCP_SKIP_IN_FLIGHT: u32 = 46;
    pub const LAZY_PAGES: u32 = 48;
    pub const ORPHAN_PTS_MASTER: u32 = 50;
    pub const LSM_PROFILE: u32 = 53;
    pub const LSM_MOUNT_CONTEXT: u32 = 63;
}

/// What is asked for (`criu_req_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    Dump = 1,
    Restore = 2,
    PreDump = 4,
}

impl Task {
    pub fn name(self) -> &'static str {
        match self {
            Self::Dump => "dump",
            Self::Restore => "restore",
            Self::PreDump => "pre-dump",
        }
    }
}

const NOTIFY: u64 = 6;

/// A message in the making.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub fn number(&mut self, field: u32, value: u64) -> &mut Self {
        self.varint(u64::from(field << 3));
        self.varint(value);
        self
    }

    pub fn yes(&mut self, field: u32) -> &mut Self {
        self.number(field, 1)
    }

    /// A descriptor's number, as criu or this process knows it.
    pub fn fd(&mut self, field: u32, fd: &impl AsRawFd) -> &mut Self {
        self.number(field, u64::from(fd.as_raw_fd().cast_unsigned()))
    }

    pub fn bytes(&mut self, field: u32, value: &[u8]) -> &mut Self {
        self.varint(u64::from(field << 3 | 2));
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    pub fn text(&mut self, field: u32, value: &str) -> &mut Self {
        self.bytes(field, value.as_bytes())
    }

    pub fn message(&mut self, field: u32, value: &Self) -> &mut Self {
        self.bytes(field, &value.0)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// A message's fields in order; it ends where the bytes do or make no sense.
fn fields(mut rest: &[u8]) -> impl Iterator<Item = (u32, Value<'_>)> {
    fn varint(rest: &mut &[u8]) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (&byte, tail) = rest.split_first()?;
            *rest = tail;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
    fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
        let (head, tail) = rest.split_at_checked(length)?;
        *rest = tail;
        Some(head)
    }
    std::iter::from_fn(move || {
        let key = varint(&mut rest)?;
        let field = u32::try_from(key >> 3).ok()?;
        let value = match key & 7 {
            0 => Value::Number(varint(&mut rest)?),
            1 => Value::Bytes(take(&mut rest, 8)?),
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                Value::Bytes(take(&mut rest, length)?)
            }
            5 => Value::Bytes(take(&mut rest, 4)?),
            _ => return None,
        };
        Some((field, value))
    })
}

fn number_in(message: &[u8], field: u32) -> Option<u64> {
    fields(message).find_map(|(f, value)| match value {
        Value::Number(number) if f == field => Some(number),
        _ => None,
    })
}

fn bytes_in(message: &[u8], field: u32) -> Option<&[u8]> {
    fields(message).find_map(|(f, value)| match value {
        Value::Bytes(bytes) if f == field => Some(bytes),
        _ => None,
    })
}

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// The restored container's first process, a child of this one.
    pub pid: Option<i32>,
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
}

/// Where a restorer works: it finds the root file system `from` mounted at `at`, in a mount namespace of its own, and what
/// it makes is born in `group`, unless criu is to care for groups itself.
pub(super) struct View<'a> {
    pub from: &'a Path,
    pub at: &'a Path,
    pub group: &'a Cgroup,
    /// The directories of the options, replaced by themselves as that mount namespace has them: criu makes mounts in its
    /// working directory.
    pub dirs: [(&'a Path, &'a mut OwnedFd); 2],
}

/// Has criu do it. `kept`: descriptors that it inherits; `ready`: gets a zero byte when criu begins to serve pages. An error says how criu ended or what it complains of; its log
/// may say more.
pub(super) fn ask(
    program: &Path,
    task: Task,
    options: &Message,
    kept: &[BorrowedFd<'_>],
    ready: Option<OwnedFd>,
    mut view: Option<View<'_>>,
) -> Result<Answer, Error> {
    let failed = |e| Error::os("talking to criu", e);
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(failed)?;
    let child = start(program, theirs.as_fd(), kept, view.as_ref())?;
    drop(theirs);
    let mut request = Message::default();
    request.number(1, task as u64).message(2, options);
    let placed = view.as_mut().map_or(Ok(()), |view| {
        view.group.add(child.pid)?;
        take_over(&ours, view).map_err(|e| Error::os("preparing the mounts that criu sees", e))
    });
    let answer = placed
        .and_then(|()| send(&ours, &request).map_err(failed))
        .and_then(|()| converse(&ours, task, ready));
    drop(ours);
    let ended = loop {
        match waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED) {
            Err(Errno::INTR) => {}
            other => break other.map_err(|e| Error::os("waiting for criu", e))?,
        }
    };
    match (answer, ended.map(|s| (s.exit_status(), s.terminating_signal()))) {
        (Ok(Some(answer)), _) => Ok(answer),
        (Err(error), _) => Err(error),
        (Ok(None), Some((Some(127), _))) => {
            Err(Error::new(Kind::Os, format!("executing criu: {} cannot be executed", program.display())))
        }
        (Ok(None), Some((Some(code), _))) => Err(Error::new(Kind::Os, format!("exit status: {code}"))),
        (Ok(None), Some((_, Some(signal)))) => Err(Error::new(Kind::Os, format!("signal: {signal}"))),
        (Ok(None), _) => Err(Error::new(Kind::Os, "it ended")),
    }
}

/// The directories as the child has opened them.
fn take_over(socket: &OwnedFd, view: &mut View<'_>) -> Result<(), Errno> {
    for (_, dir) in &mut view.dirs {
        let (_, fd) = receive(socket, &mut [0])?;
        rustix::io::dup3(&fd.ok_or(Errno::PIPE)?, dir, rustix::io::DupFlags::CLOEXEC)?;
    }
    Ok(())
}

fn send(socket: &OwnedFd, message: &Message) -> Result<(), Errno> {
    match rustix::net::send(socket, &message.0, SendFlags::NOSIGNAL) {
        // It has ended already: how, its exit says.
        Ok(_) | Err(Errno::PIPE) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Nothing if criu ends without an answer.
fn converse(socket: &OwnedFd, task: Task, mut ready: Option<OwnedFd>) -> Result<Option<Answer>, Error> {
    let failed = |e| Error::os("talking to criu", e);
    let mut answer = Answer::default();
    let mut buffer = vec![0_u8; 64 << 10];
    loop {
        let (length, fd) = receive(socket, &mut buffer).map_err(failed)?;
        let said = &buffer[..length];
        if said.is_empty() {
            return Ok(None);
        }
        if number_in(said, 1) == Some(NOTIFY) {
            let script = bytes_in(said, 5).and_then(|notice| bytes_in(notice, 1));
            match script {
                Some(b"orphan-pts-master") => answer.terminal = fd,
                Some(b"status-ready") => {
                    if let Some(ready) = ready.take() {
                        rustix::io::write(&ready, &[0])
                            .map_err(|e| Error::os("writing to --status-fd", e))?;
                    }
                }
                _ => {}
            }
            let mut go_on = Message::default();
            send(socket, go_on.number(1, NOTIFY).yes(3)).map_err(failed)?;
            continue;
        }
        if number_in(said, 2) != Some(1) {
            // Its words for it are in the log; the first of them, which come along, may be about something harmless.
            let errno = number_in(said, 7).map(|errno| describe_errno(errno as i32));
            return Err(Error::new(Kind::Os, errno.unwrap_or_else(|| "it failed".to_owned())));
        }
        let pid = bytes_in(said, 4).and_then(|restored| number_in(restored, 1));
        answer.pid = pid.and_then(|pid| i32::try_from(pid).ok());
        if task == Task::Restore && answer.pid.is_none() {
            return Err(Error::new(Kind::Os, "it names no process"));
        }
        return Ok(Some(answer));
    }
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let length = loop {
        let mut data = [std::io::IoSliceMut::new(buffer)];
        match rustix::net::recvmsg(socket, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received.bytes,
            Err(Errno::INTR) => {}
            // It ended without having read everything.
            Err(Errno::CONNRESET) => break 0,
            Err(e) => return Err(e),
        }
    };
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((length, fd))
}

fn start(
    program: &Path,
    socket: BorrowedFd<'_>,
    kept: &[BorrowedFd<'_>],
    view: Option<&View<'_>>,
) -> Result<Child, Error> {
    let path = |path: &Path| c_string(path.as_os_str().as_bytes(), "path");
    let program = path(program)?;
    let view = view
        .map(|view| {
            let [(images, _), (work, _)] = &view.dirs;
            Ok::<_, Error>((path(view.from)?, path(view.at)?, [path(images)?, path(work)?]))
        })
        .transpose()?;
    let number = c_string(socket.as_raw_fd().to_string(), "number")?;
    let argv = StringVector::new(vec![c"criu".to_owned(), c"swrk".to_owned(), number]);
    let mut env: Vec<CString> = Vec::new();
    for (name, value) in std::env::vars_os() {
        env.push(c_string([name.as_bytes(), b"=", value.as_bytes()].concat(), "environment variable")?);
    }
    let envp = StringVector::new(env);
    spawn::clone(if view.is_some() { ns::MOUNT } else { 0 }, None, || {
        process::reset_signals();
        let prepared = (|| {
            if let Some((from, at, dirs)) = &view {
                use rustix::mount::MountPropagationFlags as Flags;
                rustix::mount::mount_change(c"/", Flags::DOWNSTREAM | Flags::REC)?;
                let flags = OpenTreeFlags::OPEN_TREE_CLONE
                    | OpenTreeFlags::OPEN_TREE_CLOEXEC
                    | OpenTreeFlags::AT_RECURSIVE;
                let tree = rustix::mount::open_tree(rustix::fs::CWD, from, flags)?;
                let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                rustix::mount::move_mount(&tree, c"", rustix::fs::CWD, at, empty)?;
                for dir in dirs {
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
                    child::send_with(socket, &[0], dir.as_fd())?;
                }
            }
            for fd in kept.iter().chain([&socket]) {
                descriptors::keep_on_exec(fd.as_raw_fd())?;
            }
            Ok::<(), Errno>(())
        })();
        match prepared {
            Ok(()) => {
                execve(&program, &argv, &envp);
                127
            }
            Err(_) => 126,
        }
    })
    .map_err(|e| Error::os("starting criu", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_are_protobufs() {
        let mut inner = Message::default();
        inner.text(1, "ab").number(2, 300);
        let mut outer = Message::default();
        outer.number(1, 6).message(5, &inner).yes(50);
        // From the encoding's documentation: keys are field << 3 | kind, numbers come in groups of seven bits.
        assert_eq!(outer.0, [8, 6, 0x2a, 7, 0x0a, 2, b'a', b'b', 0x10, 0xac, 2, 0x90, 3, 1]);
        assert_eq!(number_in(&outer.0, 1), Some(6));
        assert_eq!(bytes_in(&outer.0, 5).and_then(|m| number_in(m, 2)), Some(300));
        assert_eq!(number_in(&outer.0, 50), Some(1));
        assert_eq!((number_in(&outer.0, 5), bytes_in(&outer.0, 1)), (None, None));
    }

    proptest! {
        #[test]
        fn any_bytes_have_an_end(bytes: Vec<u8>) {
            let length = fields(&bytes).map(|(_, value)| match value {
                Value::Number(_) => 1,
                Value::Bytes(bytes) => bytes.len(),
            }).sum::<usize>();
            prop_assert!(length <= bytes.len());
        }
    }
}
