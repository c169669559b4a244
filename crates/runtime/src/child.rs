//! What runs between clone and exec: executes a plan, and nothing else.
//!
//! Invariant: nothing here allocates, locks, logs or panics. Paths inside the root file system are
//! opened with `RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS` and from then on used by descriptor.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use brigantine_sys::mount::{self, Change};
use brigantine_sys::{fd as descriptors, process, spawn};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use crate::handover::MOST;
use crate::plan::{
    Failure, FsMount, InsideTree, Last, MESSAGE_LENGTH, Message, Node, Part, PathTree, Place, Plan, Role,
    Step, Target, Terminal, Tree, TreeMount,
};
use crate::{copy, finish, inside};

/// What a step's own failure is.
pub(crate) type Outcome = Result<(), (Part, Errno)>;

const PROC_MAGIC: u64 = 0x9fa0;
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

/// A directory that is open for one use, or anyway.
enum Directory<'a> {
    Kept(BorrowedFd<'a>),
    Opened(OwnedFd),
}

impl AsFd for Directory<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Kept(fd) => *fd,
            Self::Opened(fd) => fd.as_fd(),
        }
    }
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

    fn open_at(&self, path: &CStr, flags: OFlags, strict: bool) -> Result<OwnedFd, Errno> {
        let Some(root) = &self.root else { return Err(Errno::BADF) };
        let (root, path) = match (&self.proc, &self.sys) {
            (Some(proc), _) if below(path, b"proc").is_some() => (proc, below(path, b"proc").unwrap_or(c".")),
            (_, Some(sys)) if below(path, b"sys").is_some() => (sys, below(path, b"sys").unwrap_or(c".")),
            _ => (root, path),
        };
        let mut resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        if strict {
            resolve |= ResolveFlags::NO_SYMLINKS;
        }
        loop {
            match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // A rename elsewhere at the wrong moment: the kernel asks to try again.
                Err(Errno::AGAIN) => {}
                other => return other,
            }
        }
    }

    fn open(&self, target: &Target, flags: OFlags) -> Result<OwnedFd, (Part, Errno)> {
        self.open_at(&target.path, flags, target.strict).map_err(at(Part::Open))
    }

    /// A place right in a file system that an earlier step made, if that is where `path` leads: as long as it is not
    /// there, nothing can be in its way.
    fn within<'b>(&self, path: &'b CStr) -> Option<(BorrowedFd<'_>, &'b CStr)> {
        let dev = self.dev.as_ref().map(|fd| (fd, &b"dev"[..]));
        let groups = self.groups.as_ref().map(|(at, fd)| (fd, at.to_bytes()));
        let found = [dev, groups].into_iter().flatten().find_map(|(fd, at)| Some((fd, below(path, at)?)));
        found.filter(|(_, name)| !name.to_bytes().contains(&b'/')).map(|(fd, name)| (fd.as_fd(), name))
    }

    /// What is mounted at `path` hides such a file system that is there or below.
    fn cover(&mut self, path: &CStr) {
        let over = |at: &CStr| path == c"." || below(at, path.to_bytes()).is_some();
        if over(c"dev") {
            self.dev = None;
        }
        if self.groups.as_ref().is_some_and(|(at, _)| over(at)) {
            self.groups = None;
        }
    }

    /// Makes a directory right in such a file system; nothing, if something is there already.
    fn fresh<'b>(&self, path: &'b CStr) -> Result<Option<(BorrowedFd<'_>, &'b CStr)>, (Part, Errno)> {
        let Some((dir, name)) = self.within(path) else { return Ok(None) };
        match rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => Ok(Some((dir, name))),
            Err(Errno::EXIST) => Ok(None),
            Err(e) => Err((Part::Create, e)),
        }
    }

    /// Opens a directory for use by descriptor, making it if needed.
    fn directory(&self, target: &Target) -> Result<Directory<'_>, (Part, Errno)> {
        match &self.dev {
            Some(dev) if target.path.to_bytes() == b"dev" => Ok(Directory::Kept(dev.as_fd())),
            _ => self.ensure(target, true).map(Directory::Opened),
        }
    }

    /// Opens `target` (O_PATH), creating it and the directories above it if they are missing.
    fn ensure(&self, target: &Target, directory: bool) -> Result<OwnedFd, (Part, Errno)> {
        self.ensure_path(target.path.as_c_str(), target.strict, directory, 0)
    }

    fn ensure_path(
        &self,
        wanted: &CStr,
        strict: bool,
        directory: bool,
        links: u32,
    ) -> Result<OwnedFd, (Part, Errno)> {
        match self.open_at(wanted, OFlags::PATH, strict) {
            Err(Errno::NOENT) => {}
            other => return other.map_err(at(Part::Open)),
        }
        let mut prefix = [0_u8; 4096];
        let bytes = wanted.to_bytes();
        if bytes.len() >= prefix.len() {
            return Err((Part::Open, Errno::NAMETOOLONG));
        }
        let (mut above, mut start) = self.deepest(bytes, &mut prefix, strict)?;
        // Nothing of what follows can be reached: each part is missing, or a link to what is missing.
        while start < bytes.len() {
            let rest = &bytes[start..];
            let length = rest.iter().position(|&b| b == b'/').unwrap_or(rest.len());
            let end = start + length;
            let last = end == bytes.len();
            if length == 0 {
                start = end + 1;
                continue;
            }
            let path = c_prefix(bytes, end, &mut prefix)?;
            let name = CStr::from_bytes_with_nul(&path.to_bytes_with_nul()[start..])
                .map_err(|_unused| (Part::Open, Errno::INVAL))?;
            let made = if last && !directory {
                let mode = Mode::from_raw_mode(0o644);
                rustix::fs::mknodat(&above, name, FileType::RegularFile, mode, 0)
            } else {
                rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(0o755))
            };
            let there = made == Err(Errno::EXIST);
            if !there {
                made.map_err(at(Part::Create))?;
            }
            above = match self.open_at(path, OFlags::PATH, strict) {
                // A link to nothing: what it leads to is made.
                Err(Errno::NOENT) if there && !strict && links < 40 => {
                    let mut led = [0_u8; 4096];
                    let led = follow(above.as_fd(), name, &bytes[..start], &bytes[end..], &mut led)?;
                    return self.ensure_path(led, strict, directory, links + 1);
                }
                // Its own, or that of another container with the same root, which was quicker.
                other => other.map_err(at(Part::Open))?,
            };
            start = end + 1;
        }
        Ok(above)
    }

    /// The deepest directory on the way to `path` that is there (mostly the last but one), and where in the path
    /// the rest begins.
    fn deepest(
        &self,
        path: &[u8],
        prefix: &mut [u8; 4096],
        strict: bool,
    ) -> Result<(OwnedFd, usize), (Part, Errno)> {
        let mut end = path.len();
        while let Some(cut) = path[..end].iter().rposition(|&b| b == b'/') {
            if cut > 0 {
                match self.open_at(c_prefix(path, cut, prefix)?, OFlags::PATH, strict) {
                    Err(Errno::NOENT) => {}
                    other => return other.map(|fd| (fd, cut + 1)).map_err(at(Part::Open)),
                }
            }
            end = cut;
        }
        let root = rustix::io::fcntl_dupfd_cloexec(self.root()?, 0).map_err(at(Part::Open))?;
        Ok((root, 0))
    }

    fn attach_root(&mut self, tree: &Tree, place: &CStr) -> Outcome {
        let target =
            rustix::fs::open(place, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(at(Part::Open))?;
        self.root = Some(match tree {
            Tree::Open(fd) => rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(at(Part::Open))?,
            Tree::Path(tree) => detach(tree)?,
            Tree::Inside(_) | Tree::Handed(_) => return Err((Part::Outside, Errno::BADF)),
        });
        attach(self.root()?, target.as_fd())
    }

    fn mount(&mut self, m: &'a FsMount) -> Outcome {
        let context = rustix::mount::fsopen(&m.fstype, FsOpenFlags::FSOPEN_CLOEXEC)
            .map_err(|e| (if e == Errno::NODEV { Part::NoFilesystem } else { Part::Prepare }, e))?;
        for (key, value) in &m.parameters {
            match value {
                Some(value) => rustix::mount::fsconfig_set_string(&context, key, value),
                None => rustix::mount::fsconfig_set_flag(&context, key),
            }
            .map_err(at(Part::Parameter))?;
        }
        if m.keep_mode
            && let Ok(covered) = self.open_at(&m.target.path, OFlags::PATH, m.target.strict)
        {
            // As an option, so that it is there to be read, and for a mount that begins read-only.
            let mode = rustix::fs::fstat(&covered).map_err(at(Part::Open))?.st_mode & 0o7777;
            let mut digits = [0_u8; 5];
            rustix::mount::fsconfig_set_string(&context, c"mode", octal(mode, &mut digits))
                .map_err(at(Part::Parameter))?;
        }
        rustix::mount::fsconfig_create(&context).map_err(at(Part::Prepare))?;
        // What is read-only cannot be filled or changed first.
        let later = if m.copy_up { m.attributes & mount::attr::RDONLY as u32 } else { 0 };
        let mounted = rustix::mount::fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::from_bits_retain(m.attributes & !later),
        )
        .map_err(at(Part::Prepare))?;
        if !m.copy_up
            && later == 0
            && let Some((dir, name)) = self.fresh(&m.target.path)?
        {
            attach_in(mounted.as_fd(), dir, name)?;
            return self.mounted(m, mounted);
        }
        let target = self.ensure(&m.target, true)?;
        if !m.over_proc {
            refuse_proc(target.as_fd())?;
        }
        if m.copy_up {
            let from = self
                .open_at(&m.target.path, OFlags::RDONLY | OFlags::DIRECTORY, m.target.strict)
                .map_err(at(Part::CopyUp))?;
            copy::directory(from.as_fd(), mounted.as_fd(), 0).map_err(at(Part::CopyUp))?;
        }
        if later != 0 {
            let change = Change { set: later.into(), ..Change::default() };
            mount::set_attributes(mounted.as_fd(), false, change, None).map_err(at(Part::Attributes))?;
        }
        attach(mounted.as_fd(), target.as_fd())?;
        self.mounted(m, mounted)
    }

    /// The rest of a file system's mount, once it is attached.
    fn mounted(&mut self, m: &'a FsMount, mounted: OwnedFd) -> Outcome {
        for &propagation in &m.propagation {
            let change = Change { propagation, ..Change::default() };
            mount::set_attributes(mounted.as_fd(), false, change, None).map_err(at(Part::Attributes))?;
        }
        self.cover(&m.target.path);
        match m.role {
            Role::None => {}
            Role::Dev => self.dev = Some(mounted),
            Role::Groups => self.groups = Some((&m.target.path, mounted)),
            Role::Terminals => self.terminals = Some(mounted),
            Role::Proc => self.proc = Some(mounted),
            Role::Sys => self.sys = Some(mounted),
        }
        Ok(())
    }

    fn attach(&mut self, m: &TreeMount) -> Outcome {
        if let Tree::Handed(place) = m.tree
            && let Some((dir, name)) = self.fresh(&m.target.path)?
        {
            return attach_in(self.handed(place)?, dir, name);
        }
        let (directory, detached) = match &m.tree {
            Tree::Open(_) | Tree::Handed(_) => (m.directory, None),
            Tree::Path(tree) => (m.directory, Some(detach(tree)?)),
            Tree::Inside(tree) => {
                let detached = self.detach_inside(tree)?;
                let stat = rustix::fs::fstat(&detached).map_err(at(Part::Source))?;
                (FileType::from_raw_mode(stat.st_mode).is_dir(), Some(detached))
            }
        };
        let target = self.ensure(&m.target, directory)?;
        if !m.over_proc {
            refuse_proc(target.as_fd())?;
        }
        match (&m.tree, &detached) {
            (Tree::Open(tree), _) | (_, Some(tree)) => attach(tree.as_fd(), target.as_fd())?,
            (Tree::Handed(place), None) => attach(self.handed(*place)?, target.as_fd())?,
            (_, None) => return Err((Part::Source, Errno::BADF)),
        }
        self.cover(&m.target.path);
        Ok(())
    }

    /// A part of the container's own root, as it is now.
    fn detach_inside(&mut self, tree: &InsideTree) -> Result<OwnedFd, (Part, Errno)> {
        let source =
            self.open_at(&tree.source.path, OFlags::PATH, tree.source.strict).map_err(at(Part::Source))?;
        let detached = clone_tree(source.as_fd(), tree.recursive).map_err(at(Part::Source))?;
        for (change, recursive) in &tree.changes {
            mount::set_attributes(detached.as_fd(), *recursive, *change, None)
                .map_err(at(Part::Attributes))?;
        }
        if tree.ids.is_some() {
            send_with(self.channel, &Message::MapIds(self.at).encode(), detached.as_fd())
                .map_err(at(Part::Source))?;
            self.hear(Message::Mapped).map_err(at(Part::Source))?;
        }
        Ok(detached)
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

    fn readonly(&self, target: &Target) -> Outcome {
        let fd = match self.open(target, OFlags::PATH) {
            Err((_, Errno::NOENT)) => return Ok(()),
            other => other?,
        };
        let tree = clone_tree(fd.as_fd(), true).map_err(at(Part::Prepare))?;
        let change = Change { set: mount::attr::RDONLY, ..Change::default() };
        mount::set_attributes(tree.as_fd(), true, change, None).map_err(at(Part::Attributes))?;
        attach(tree.as_fd(), fd.as_fd())
    }

    fn mask(&mut self, target: &Target) -> Outcome {
        let fd = match self.open(target, OFlags::PATH) {
            Err((_, Errno::NOENT | Errno::NOTDIR)) => return Ok(()),
            other => other?,
        };
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd).map_err(at(Part::Open))?.st_mode);
        if kind == FileType::Directory {
            if let Some(empty) = &self.empty {
                let tree = clone_tree(empty.as_fd(), false).map_err(at(Part::Prepare))?;
                return attach(tree.as_fd(), fd.as_fd());
            }
            let context =
                rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(at(Part::Prepare))?;
            rustix::mount::fsconfig_set_string(&context, c"mode", c"0755").map_err(at(Part::Parameter))?;
            rustix::mount::fsconfig_set_string(&context, c"size", c"4k").map_err(at(Part::Parameter))?;
            rustix::mount::fsconfig_create(&context).map_err(at(Part::Prepare))?;
            let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
                | MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            let mounted = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
                .map_err(at(Part::Prepare))?;
            attach(mounted.as_fd(), fd.as_fd())?;
            self.empty = Some(mounted);
            return Ok(());
        }
        let null = self.null()?;
        let tree = clone_tree(null, false).map_err(at(Part::Prepare))?;
        attach(tree.as_fd(), fd.as_fd())
    }

    /// The container's /dev/null, proven to be it.
    fn null(&mut self) -> Result<BorrowedFd<'_>, (Part, Errno)> {
        if self.null.is_none() {
            let fd = self.open_at(c"dev/null", OFlags::PATH, true).map_err(at(Part::Open))?;
            let stat = rustix::fs::fstat(&fd).map_err(at(Part::Open))?;
            let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
                && stat.st_rdev == rustix::fs::makedev(1, 3);
            if !is_null {
                return Err((Part::NotADevice, Errno::NODEV));
            }
            self.null = Some(fd);
        }
        self.null.as_ref().map(AsFd::as_fd).ok_or((Part::Open, Errno::BADF))
    }

    fn pivot(&mut self, propagation: u64, readonly: bool, moved: Option<&[CString]>) -> Outcome {
        if let Some(exposed) = moved {
            for mounted in exposed {
                hide(mounted)?;
            }
            let slash =
                rustix::fs::open(c"/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(at(Part::Open))?;
            let root = self.root()?;
            rustix::process::fchdir(root).map_err(at(Part::Open))?;
            attach(root, slash.as_fd())?;
            rustix::process::chroot(c".").map_err(at(Part::Whole))?;
            rustix::process::chdir(c"/").map_err(at(Part::Prepare))?;
            return self.finish_root(propagation, readonly);
        }
        let old = rustix::fs::open(c"/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(at(Part::Open))?;
        let root = self.root()?;
        rustix::process::fchdir(root).map_err(at(Part::Open))?;
        rustix::process::pivot_root(c".", c".").map_err(at(Part::Whole))?;
        // The old root now lies over the new one; step onto it and let it go with all below.
        rustix::process::fchdir(&old).map_err(at(Part::Prepare))?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH).map_err(at(Part::Prepare))?;
        rustix::process::chdir(c"/").map_err(at(Part::Prepare))?;
        self.finish_root(propagation, readonly)
    }

    fn finish_root(&self, propagation: u64, readonly: bool) -> Outcome {
        if propagation != 0 {
            let change = Change { propagation, ..Change::default() };
            mount::set_attributes(self.root()?, true, change, None).map_err(at(Part::Attributes))?;
        }
        if readonly {
            let change = Change { set: mount::attr::RDONLY, ..Change::default() };
            mount::set_attributes(self.root()?, false, change, None).map_err(at(Part::Attributes))?;
        }
        Ok(())
    }
}

/// The first `end` bytes of a path as a path of its own.
fn c_prefix<'a>(path: &[u8], end: usize, buffer: &'a mut [u8; 4096]) -> Result<&'a CStr, (Part, Errno)> {
    buffer[..end].copy_from_slice(&path[..end]);
    buffer[end] = 0;
    CStr::from_bytes_with_nul(&buffer[..=end]).map_err(|_unused| (Part::Open, Errno::INVAL))
}

/// The path without its first part, if that is `first`.
fn below<'a>(path: &'a CStr, first: &[u8]) -> Option<&'a CStr> {
    let bytes = path.to_bytes_with_nul();
    let rest = bytes.strip_prefix(first)?;
    match rest {
        [0] => Some(c"."),
        [b'/', inner @ ..] => CStr::from_bytes_with_nul(inner).ok(),
        _ => None,
    }
}

/// Where the link `name` in `dir` (whose path is `above`) leads, with `rest` behind it.
fn follow<'a>(
    dir: BorrowedFd<'_>,
    name: &CStr,
    above: &[u8],
    rest: &[u8],
    buffer: &'a mut [u8; 4096],
) -> Result<&'a CStr, (Part, Errno)> {
    let mut link = [0_u8; 4096];
    let length = rustix::fs::readlinkat_raw(dir, name, &mut link[..]).map_err(at(Part::Create))?;
    let link = link.get(..length).unwrap_or_default();
    let above = if link.first() == Some(&b'/') { &[][..] } else { above };
    let mut end = 0;
    for part in [above, link, rest].into_iter().flat_map(|p| p.split(|b| *b == b'/')) {
        match part {
            b"" | b"." => {}
            // Above the root is the root.
            b".." => end = buffer[..end].iter().rposition(|b| *b == b'/').unwrap_or(0),
            part => {
                let from = end + usize::from(end > 0);
                let Some(room) = buffer.get_mut(from..from + part.len() + 1) else {
                    return Err((Part::Open, Errno::NAMETOOLONG));
                };
                room[..part.len()].copy_from_slice(part);
                if end > 0 {
                    buffer[end] = b'/';
                }
                end = from + part.len();
            }
        }
    }
    if end == 0 {
        return Err((Part::Open, Errno::NOENT));
    }
    buffer[end] = 0;
    CStr::from_bytes_with_nul(&buffer[..=end]).map_err(|_unused| (Part::Open, Errno::INVAL))
}

/// A file system must not hide or be hidden in /proc but where the plan says so: whoever swaps a
/// directory for a link into it would disarm what is written there.
fn refuse_proc(target: BorrowedFd<'_>) -> Outcome {
    let magic = rustix::fs::fstatfs(target).map_err(at(Part::Open))?.f_type as u64;
    if magic == PROC_MAGIC { Err((Part::OnProc, Errno::PERM)) } else { Ok(()) }
}

/// Takes a mount of the host's away, or covers it where it is locked: while any proc or sys file system is seen whole, the
/// kernel lets others be mounted that no mask covers.
fn hide(mounted: &CStr) -> Outcome {
    match rustix::mount::unmount(mounted, UnmountFlags::DETACH) {
        // Gone with one above it.
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::INVAL | Errno::PERM) => {
            let none = rustix::mount::MountFlags::empty();
            rustix::mount::mount(c"tmpfs", mounted, c"tmpfs", none, None::<&CStr>).map_err(at(Part::Prepare))
        }
        Err(e) => Err((Part::Prepare, e)),
    }
}

/// A mode's digits.
fn octal(mode: u32, buffer: &mut [u8; 5]) -> &CStr {
    for (place, digit) in buffer.iter_mut().take(4).enumerate() {
        *digit = b'0' + (mode >> (9 - 3 * place) & 7) as u8;
    }
    buffer[4] = 0;
    CStr::from_bytes_with_nul(buffer).unwrap_or(c"0755")
}

/// A tree that the parent could not detach.
fn detach(tree: &PathTree) -> Result<OwnedFd, (Part, Errno)> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if tree.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let fd = rustix::mount::open_tree(rustix::fs::CWD, &tree.path, flags).map_err(at(Part::Prepare))?;
    for (change, recursive) in &tree.changes {
        mount::set_attributes(fd.as_fd(), *recursive, *change, None).map_err(at(Part::Attributes))?;
    }
    Ok(fd)
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

fn clone_tree(source: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(source, c"", flags)
}

/// The same at a name of a directory that only this process knows.
fn attach_in(tree: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> Outcome {
    rustix::mount::move_mount(tree, c"", dir, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(at(Part::Attach))
}

fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Outcome {
    rustix::mount::move_mount(
        tree,
        c"",
        target,
        c"",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
    .map_err(|errno| {
        // The kernel calls a directory on a file, or the reverse, an invalid argument.
        let directory = |fd| rustix::fs::fstat(fd).map(|s| FileType::from_raw_mode(s.st_mode).is_dir());
        let differ = directory(tree).ok() != directory(target).ok();
        (Part::Attach, if errno == Errno::INVAL && differ { Errno::NOTDIR } else { errno })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_within_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let fd = std::fs::File::open(dir.path()).unwrap();
        for (link, above, rest, leads) in [
            ("/a/b", "x/", "", Some(c"a/b")),
            ("../b", "x/y/", "/c", Some(c"x/b/c")),
            ("../../../b", "x/", "", Some(c"b")),
            ("./b//c/", "", "/d", Some(c"b/c/d")),
            ("/", "x/", "", None),
        ] {
            std::os::unix::fs::symlink(link, dir.path().join("link")).unwrap();
            let mut buffer = [0; 4096];
            let found = follow(fd.as_fd(), c"link", above.as_bytes(), rest.as_bytes(), &mut buffer).ok();
            assert_eq!(found, leads, "{link}");
            std::fs::remove_file(dir.path().join("link")).unwrap();
        }
        assert_eq!(below(c"proc/sys", b"proc"), Some(c"sys"));
        assert_eq!(below(c"proc", b"proc"), Some(c"."));
        assert_eq!(below(c"process", b"proc"), None);
    }

    #[test]
    fn modes_are_octal() {
        for (mode, text) in [(0o7777, c"7777"), (0o710, c"0710"), (0, c"0000")] {
            assert_eq!(octal(mode, &mut [0; 5]), text);
        }
    }
}
