//! What runs between clone and exec: executes a plan, and nothing else.
//!
//! Invariant: nothing here allocates, locks, logs or panics. Paths inside the root file system are
//! opened with `RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS` and from then on used by descriptor.

mod mounting;
mod paths;

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use brigantine_sys::mount;
use brigantine_sys::{fd as descriptors, process, spawn};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::MountPropagationFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use crate::handover::MOST;
use crate::plan::{Failure, Last, MESSAGE_LENGTH, Message, Node, Part, Place, Plan, Step, Terminal};
use crate::{finish, inside};
use mounting::{attach, clone_tree};

/// What a step's own failure is.
pub(crate) type Outcome = Result<(), (Part, Errno)>;

const DEVPTS_MAGIC: u64 = 0x1cd1;

/// What earlier steps leave for later ones.
struct Stage<'a> {
    channel: BorrowedFd<'a>,
    /// The place of the step that is carried out.
    at: u16,
    /// What the parent has said already, while something else was waited for.
    heard: Heard,
    /// What the parent has handed over, each in its place ([`crate::handover`]).
    handed: [Option<OwnedFd>; MOST],
    network: Option<OwnedFd>,
    root: Option<OwnedFd>,
    dev: Option<OwnedFd>,
    /// Where the groups of version 1 are mounted, and the file system that was made for their mount points.
    groups: Option<(&'a CStr, OwnedFd)>,
    /// What is mounted at /proc and /sys: whoever moves those directories away moves nothing here.
    proc: Option<OwnedFd>,
    sys: Option<OwnedFd>,
    terminals: Option<OwnedFd>,
    /// An empty read-only directory, attached once, to be cloned.
    empty: Option<OwnedFd>,
    null: Option<OwnedFd>,
}

/// What the parent says unasked, in an order that the plan need not know.
#[derive(Debug, Default)]
struct Heard {
    mapped: bool,
    in_cgroup: bool,
    handed: bool,
    network: bool,
    start: bool,
}

impl Heard {
    fn of(&mut self, message: Message) -> Option<&mut bool> {
        match message {
            Message::Mapped => Some(&mut self.mapped),
            Message::InCgroup => Some(&mut self.in_cgroup),
            Message::Handed => Some(&mut self.handed),
            Message::Network => Some(&mut self.network),
            Message::Start => Some(&mut self.start),
            _ => None,
        }
    }
}

/// The child's whole life before its program; the result is its exit status.
pub(crate) fn run(plan: &mut Plan, channel: BorrowedFd<'_>) -> i32 {
    process::reset_signals();
    if plan.hide {
        // Processes of the container that is entered must not trace or read this one.
        if rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable).is_err() {
            return 127;
        }
    }
    if let Some(executable) = &plan.executable
        && let Err(e) = executable.apply()
    {
        return fail(channel, Place::Last(Last::Executable, 0), e);
    }
    rustix::process::umask(Mode::empty());
    if let Some(processors) = &plan.processors {
        // Where that may not be, it takes longer.
        rustix::thread::sched_setaffinity(None, processors).ok();
    }
    let mut stage = Stage {
        channel,
        at: 0,
        heard: Heard::default(),
        handed: [const { None }; MOST],
        network: None,
        root: None,
        dev: None,
        groups: None,
        proc: None,
        sys: None,
        terminals: None,
        empty: None,
        null: None,
    };
    if plan.process.die_with_parent
        && let Err(e) = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
    {
        return fail(channel, Place::Last(Last::ParentDeath, 0), e);
    }
    for (index, step) in plan.steps.iter().enumerate() {
        stage.at = index as u16;
        if let Err((part, errno)) = stage.execute(step, plan) {
            return fail(channel, Place::Step(index as u16, part), errno);
        }
    }
    // Its descriptors are closed in one call with all others that are not needed any more.
    let may_start = stage.may_start();
    std::mem::forget(stage);
    finish::run(plan, channel, may_start)
}

/// Tells the parent; the exit status is docker's for "could not start".
pub(crate) fn fail(channel: BorrowedFd<'_>, place: Place, errno: Errno) -> i32 {
    let message = Message::Failed(Failure { place, errno: errno.raw_os_error() });
    // If nobody listens any more, nobody wants to know.
    match send(channel, message) {
        Ok(()) | Err(_) => 127,
    }
}

pub(crate) fn send(channel: BorrowedFd<'_>, message: Message) -> Result<(), Errno> {
    rustix::net::send(channel, &message.encode(), SendFlags::NOSIGNAL).map(|_| ())
}

/// A process in between tells of the container's process; the result is its exit status.
pub(crate) fn send_process(channel: BorrowedFd<'_>, pid: i32, pidfd: BorrowedFd<'_>) -> i32 {
    let p = pid.to_le_bytes();
    match send_with(channel, &[0, 0, 0, 0, p[0], p[1], p[2], p[3]], pidfd) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

/// … or of what it could not enter.
pub(crate) fn send_refusal(channel: BorrowedFd<'_>, place: u8, errno: Errno) -> i32 {
    let e = errno.raw_os_error().to_le_bytes();
    match rustix::net::send(channel, &[0, place, 0, 0, e[0], e[1], e[2], e[3]], SendFlags::NOSIGNAL) {
        Ok(_) | Err(_) => 1,
    }
}

pub(crate) fn send_with(channel: BorrowedFd<'_>, bytes: &[u8], fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::NOBUFS);
    }
    let data = [std::io::IoSlice::new(bytes)];
    rustix::net::sendmsg(channel, &data, &mut control, SendFlags::NOSIGNAL).map(|_| ())
}

/// Waits for one particular message; an end of the channel is the parent's death.
pub(crate) fn expect(channel: BorrowedFd<'_>, wanted: Message) -> Result<(), Errno> {
    let mut buffer = [0_u8; MESSAGE_LENGTH];
    loop {
        let message = match rustix::net::recv(channel, &mut buffer[..], RecvFlags::empty()) {
            Ok((0, _)) => return Err(Errno::PIPE),
            Ok((length, _)) => buffer.get(..length).and_then(Message::decode),
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e),
        };
        return if message == Some(wanted) { Ok(()) } else { Err(Errno::PROTO) };
    }
}

fn at(part: Part) -> impl Fn(Errno) -> (Part, Errno) {
    move |errno| (part, errno)
}

impl<'a> Stage<'a> {
    fn execute(&mut self, step: &'a Step, plan: &Plan) -> Outcome {
        let whole = at(Part::Whole);
        match step {
            Step::Enter { namespace, bit, .. } => spawn::setns(namespace.as_fd(), *bit).map_err(whole),
            Step::EnterNetwork => {
                self.hear(Message::Network).map_err(at(Part::Prepare))?;
                let namespace = self.network.as_ref().ok_or((Part::Prepare, Errno::BADF))?;
                spawn::setns(namespace.as_fd(), spawn::ns::NETWORK).map_err(whole)
            }
            Step::EnterAll { pidfd, bits } => spawn::setns(pidfd.as_fd(), *bits).map_err(whole),
            Step::BecomeRoot => {
                self.hear(Message::Mapped).map_err(at(Part::Prepare))?;
                let (gid, uid) = (rustix::process::Gid::ROOT, rustix::process::Uid::ROOT);
                rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(&whole)?;
                rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(whole)
            }
            Step::Session => rustix::process::setsid().map(|_| ()).map_err(whole),
            // Not by number: a single thread that moves itself needs no lock on all forks and exits of the
            // machine, for which the kernel would first wait several milliseconds (an RCU grace period).
            Step::JoinCgroup { tasks, .. } => {
                rustix::io::write(self.handed(*tasks)?, b"0").map(|_| ()).map_err(whole)
            }
            Step::TakeHanded => self.hear(Message::Handed).map_err(whole),
            Step::AwaitCgroup { new_namespace } => {
                self.hear(Message::InCgroup).map_err(at(Part::Prepare))?;
                if *new_namespace { spawn::unshare(spawn::ns::CGROUP).map_err(whole) } else { Ok(()) }
            }
            Step::AwaitHooks => {
                send(self.channel, Message::Mounted).map_err(&whole)?;
                self.hear(Message::HooksDone).map_err(whole)
            }
            Step::Hostname(name) => rustix::system::sethostname(name).map_err(whole),
            Step::Domainname(name) => rustix::system::setdomainname(name).map_err(whole),
            Step::CutPropagation => rustix::mount::mount_change(
                c"/",
                MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
            )
            .map_err(whole),
            Step::AttachRoot { tree, at } => self.attach_root(tree, at),
            Step::TimeOffsets(lines) => time_offsets(plan.proc.as_fd(), lines),
            Step::Affinity { mask, tried } => match process::set_affinity(mask) {
                Err(e) if !tried => Err((Part::Whole, e)),
                _ => Ok(()),
            },
            Step::Hook(hook) => {
                // Its working directory is the container's root, which it cannot name.
                inside::run(hook, Some(self.root()?), &plan.process.envp)
                    .map_err(|failure| (Part::Hook, Errno::from_raw_os_error(failure.encode())))
            }
            Step::Mount(mount) => self.mount(mount),
            Step::Attach(tree) => self.attach(tree),
            Step::Change { target, change, recursive } => {
                let fd = self.open(target, OFlags::PATH)?;
                mount::set_attributes(fd.as_fd(), *recursive, *change, None).map_err(whole)
            }
            Step::Node(node) => self.node(node),
            Step::Symlink { target, dir, name, replace } => {
                let dir = self.directory(dir)?;
                if *replace {
                    match rustix::fs::unlinkat(&dir, name, AtFlags::empty()) {
                        Ok(()) | Err(Errno::NOENT) => {}
                        Err(e) => return Err((Part::Prepare, e)),
                    }
                }
                match rustix::fs::symlinkat(target, &dir, name) {
                    Ok(()) | Err(Errno::EXIST) => Ok(()),
                    Err(e) => Err((Part::Whole, e)),
                }
            }
            Step::Terminal(terminal) => self.terminal(terminal),
            Step::Sysctl { path, value, .. } => {
                let fd =
                    rustix::fs::openat(&plan.proc, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                        .map_err(at(Part::Open))?;
                rustix::io::write(&fd, value).map(|_| ()).map_err(whole)
            }
            Step::Readonly(target) => self.readonly(target),
            Step::Mask(target) => self.mask(target),
            Step::PivotRoot { propagation, readonly, moved } => {
                self.pivot(*propagation, *readonly, moved.as_deref())
            }
            Step::FindTerminals => {
                let root = rustix::fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                    .map_err(at(Part::Open))?;
                let fd = rustix::fs::openat2(
                    &root,
                    c"dev/pts",
                    OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                    Mode::empty(),
                    ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS,
                )
                .map_err(at(Part::Open))?;
                self.root = Some(root);
                self.terminals = Some(fd);
                Ok(())
            }
        }
    }

    /// Waits for one particular message, and keeps what else the parent says meanwhile.
    fn hear(&mut self, wanted: Message) -> Result<(), Errno> {
        if let Some(heard) = self.heard.of(wanted)
            && std::mem::take(heard)
        {
            return Ok(());
        }
        loop {
            let message = self.receive()?;
            if message == wanted {
                return Ok(());
            }
            *self.heard.of(message).ok_or(Errno::PROTO)? = true;
        }
    }

    /// Whether the parent has said already that the program may start.
    fn may_start(&self) -> bool {
        let mut bytes = [0_u8; MESSAGE_LENGTH];
        self.heard.start
            || matches!(rustix::net::recv(self.channel, &mut bytes[..], RecvFlags::DONTWAIT), Ok((length, _))
                if bytes.get(..length).and_then(Message::decode) == Some(Message::Start))
    }

    /// The parent's next message; the descriptors that come with it are what is handed over.
    fn receive(&mut self) -> Result<Message, Errno> {
        let mut bytes = [0_u8; MESSAGE_LENGTH];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let length = loop {
            let mut data = [std::io::IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(self.channel, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) if received.bytes == 0 => return Err(Errno::PIPE),
                Ok(received) => break received.bytes,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        };
        let said = bytes.get(..length).and_then(Message::decode).ok_or(Errno::PROTO)?;
        for message in control.drain() {
            let RecvAncillaryMessage::ScmRights(mut fds) = message else { continue };
            if said == Message::Network {
                self.network = fds.next();
                continue;
            }
            for (place, fd) in self.handed.iter_mut().zip(fds) {
                *place = Some(fd);
            }
        }
        Ok(said)
    }

    fn handed(&self, place: usize) -> Result<BorrowedFd<'_>, (Part, Errno)> {
        let fd = self.handed.get(place).and_then(Option::as_ref);
        fd.map(AsFd::as_fd).ok_or((Part::Source, Errno::BADF))
    }

    fn root(&self) -> Result<BorrowedFd<'_>, (Part, Errno)> {
        self.root.as_ref().map(AsFd::as_fd).ok_or((Part::Outside, Errno::BADF))
    }

    fn node(&self, node: &Node) -> Outcome {
        let dir = self.directory(&node.dir)?;
        let kind = FileType::from_raw_mode(node.mode);
        let mode = Mode::from_raw_mode(node.mode & 0o7777);
        match rustix::fs::mknodat(&dir, &node.name, kind, mode, node.device) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                // What is there must be the very device, not something of the image's choice.
                let there = rustix::fs::statat(&dir, &node.name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(at(Part::Open))?;
                let same = FileType::from_raw_mode(there.st_mode) == kind && there.st_rdev == node.device;
                return if same { Ok(()) } else { Err((Part::NotADevice, Errno::EXIST)) };
            }
            Err(e) => return Err((Part::Create, e)),
        }
        if let Some((uid, gid)) = node.owner {
            rustix::fs::chownat(&dir, &node.name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(at(Part::Owner))?;
        }
        Ok(())
    }

    fn terminal(&self, terminal: &Terminal) -> Outcome {
        let Some(terminals) = &self.terminals else { return Err((Part::Prepare, Errno::NOTTY)) };
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let master = rustix::fs::openat(terminals, c"ptmx", flags, Mode::empty()).map_err(at(Part::Open))?;
        let magic = rustix::fs::fstatfs(&master).map_err(at(Part::Open))?.f_type as u64;
        if magic != DEVPTS_MAGIC {
            return Err((Part::NotADevice, Errno::NOTTY));
        }
        rustix::pty::unlockpt(&master).map_err(at(Part::Prepare))?;
        let peer_flags = rustix::pty::OpenptFlags::RDWR
            | rustix::pty::OpenptFlags::NOCTTY
            | rustix::pty::OpenptFlags::CLOEXEC;
        let peer = rustix::pty::ioctl_tiocgptpeer(&master, peer_flags).map_err(at(Part::Prepare))?;
        rustix::fs::fchown(&peer, Some(terminal.owner), None).map_err(at(Part::Owner))?;
        if let Some((rows, columns)) = terminal.size {
            let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            rustix::termios::tcsetwinsize(&master, size).map_err(at(Part::Attributes))?;
        }
        if let Some(console) = &terminal.console {
            let target = self.ensure(console, false)?;
            let tree = clone_tree(peer.as_fd(), false).map_err(at(Part::Attach))?;
            attach(tree.as_fd(), target.as_fd())?;
        }
        for number in 0..=2 {
            descriptors::become_stdio(peer.as_fd(), number).map_err(at(Part::Whole))?;
        }
        rustix::process::ioctl_tiocsctty(&peer).map_err(at(Part::Whole))?;
        send_with(self.channel, &Message::Terminal.encode(), master.as_fd()).map_err(at(Part::Whole))
    }
}

/// Makes a time namespace, sets its clocks while nobody is in it, and enters it.
fn time_offsets(proc: BorrowedFd<'_>, lines: &[u8]) -> Outcome {
    spawn::unshare(spawn::ns::TIME).map_err(at(Part::Create))?;
    let file = match open_offsets(proc) {
        // Root of a user namespace is a stranger to the files of a process that has changed its ids, as long as that
        // process may not be looked into.
        Err(Errno::ACCESS) => {
            use rustix::process::{DumpableBehavior, set_dumpable_behavior};
            set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(at(Part::Open))?;
            let file = open_offsets(proc);
            set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(at(Part::Open))?;
            file
        }
        other => other,
    }
    .map_err(at(Part::Open))?;
    rustix::io::write(&file, lines).map_err(at(Part::Parameter))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace = rustix::fs::openat(proc, c"self/ns/time_for_children", flags, Mode::empty())
        .map_err(at(Part::Open))?;
    spawn::setns(namespace.as_fd(), spawn::ns::TIME).map_err(at(Part::Whole))
}

fn open_offsets(proc: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(proc, c"self/timens_offsets", flags, Mode::empty())
}
