//! The compiled plan: everything the child does between clone and exec, as data.
//!
//! A plan holds only owned descriptors, C strings and numbers; executing it (`child`) needs no
//! allocation. A failure names a place in the plan, so only the side that still has the plan
//! needs words for it.

use std::ffi::CString;
use std::os::fd::OwnedFd;

use brigantine_sys::Replacement;
use brigantine_sys::exec::StringVector;
use brigantine_sys::mount::Change;
use brigantine_sys::process::Scheduling;
use brigantine_sys::seccomp::{Instruction, Reader};
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySets, CpuSet};

/// What the child does, in order.
#[derive(Debug)]
pub(crate) struct Plan {
    pub steps: Vec<Step>,
    pub process: ProcessPlan,
    /// Standard descriptors; `None` where a terminal takes their place, or the caller's stay.
    pub stdio: Option<[OwnedFd; 3]>,
    /// What the child runs instead of the caller's executable, before anything else.
    pub executable: Option<Replacement>,
    /// `/proc` of the caller, known to be the real one.
    pub proc: OwnedFd,
    pub gate: Gate,
    pub hide: bool,
    /// Where the child runs while it sets itself up.
    pub processors: Option<CpuSet>,
}

/// What the child waits on before its exec.
#[derive(Debug)]
pub(crate) enum Gate {
    /// The channel to its creator.
    Channel,
    /// Whoever connects here; for a creator that does not stay.
    Listener(OwnedFd),
}

#[derive(Debug)]
pub(crate) enum Step {
    /// Enter one namespace.
    Enter {
        namespace: OwnedFd,
        bit: u64,
        name: &'static str,
    },
    /// Enter the network namespace that the parent makes meanwhile.
    EnterNetwork,
    /// Enter several of a process's namespaces at once.
    EnterAll {
        pidfd: OwnedFd,
        bits: u64,
    },
    /// Become the new user namespace's root, once the parent has written the maps.
    BecomeRoot,
    Session,
    /// Wait until the container's cgroups are there and their descriptors come ([`crate::handover`]).
    TakeHanded,
    /// Enter a cgroup through its list of tasks, which was handed over in this place.
    JoinCgroup {
        tasks: usize,
        dir: String,
    },
    /// Wait until the parent has done its part; then perhaps hide the cgroups above.
    AwaitCgroup {
        new_namespace: bool,
    },
    /// The mounts are there: the parent runs its hooks.
    AwaitHooks,
    Hostname(Vec<u8>),
    Domainname(Vec<u8>),
    /// No mount event of ours reaches the host.
    CutPropagation,
    AttachRoot {
        tree: Tree,
        /// Where it belongs, for who looks from outside; `/` where it has no place of its own.
        at: CString,
    },
    /// A new time namespace with these offsets (lines for `timens_offsets`).
    TimeOffsets(Vec<u8>),
    /// Processors to run on; only tried, if it is nobody's wish.
    Affinity {
        mask: Vec<u64>,
        tried: bool,
    },
    /// A createContainer hook.
    Hook(Box<HookPlan>),
    Mount(Box<FsMount>),
    Attach(TreeMount),
    Change {
        target: Target,
        change: Change,
        recursive: bool,
    },
    Node(Node),
    Symlink {
        target: CString,
        dir: Target,
        name: CString,
        replace: bool,
    },
    Terminal(Terminal),
    Sysctl {
        path: CString,
        value: Vec<u8>,
        key: String,
    },
    Readonly(Target),
    Mask(Target),
    PivotRoot {
        propagation: u64,
        readonly: bool,
        /// Without pivot_root, which an initial ram disk does not have: the host's proc and sys file systems, which then
        /// stay where they are and must be out of reach.
        moved: Option<Vec<CString>>,
    },
    /// Open the devpts of the container just entered.
    FindTerminals,
}

/// A path inside the root file system, relative to it.
#[derive(Debug)]
pub(crate) struct Target {
    /// Without a leading slash; `.` for the root.
    pub path: CString,
    /// Fail if any part is a symbolic link.
    pub strict: bool,
}

impl Target {
    pub fn shown(&self) -> String {
        match self.path.to_string_lossy() {
            path if path == "." => "/".to_owned(),
            path => format!("/{path}"),
        }
    }
}

/// What a mounted file system is needed for later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    None,
    Dev,
    /// What the groups of version 1 are mounted in.
    Groups,
    Terminals,
    Proc,
    Sys,
}

#[derive(Debug)]
pub(crate) struct FsMount {
    pub fstype: CString,
    pub parameters: Vec<(CString, Option<CString>)>,
    pub attributes: u32,
    pub propagation: Vec<u64>,
    pub target: Target,
    pub role: Role,
    /// Give it the mode of the directory that it covers, if there is one.
    pub keep_mode: bool,
    /// Begin with a copy of what it covers.
    pub copy_up: bool,
    /// May cover something in /proc.
    pub over_proc: bool,
}

/// A tree of mounts to be attached.
#[derive(Debug)]
pub(crate) enum Tree {
    /// Detached by the parent, its attributes set.
    Open(OwnedFd),
    /// To be detached by the child, which has privileges that its parent lacks.
    Path(Box<PathTree>),
    /// A part of the container's own root, with what earlier steps have mounted there.
    Inside(Box<InsideTree>),
    /// Handed over by the parent, in this place.
    Handed(usize),
}

#[derive(Debug)]
pub(crate) struct InsideTree {
    pub source: Target,
    pub recursive: bool,
    /// (what, recursively).
    pub changes: Vec<(Change, bool)>,
    /// The user namespace whose maps it gets, and whether recursively: the parent's to do, which has the privileges.
    pub ids: Option<(OwnedFd, bool)>,
}

#[derive(Debug)]
pub(crate) struct PathTree {
    /// On the host.
    pub path: CString,
    pub recursive: bool,
    /// (what, recursively).
    pub changes: Vec<(Change, bool)>,
}

/// A program run inside on somebody else's behalf.
#[derive(Debug)]
pub(crate) struct HookPlan {
    pub kind: &'static str,
    /// Its place among those of its kind.
    pub index: usize,
    pub path: CString,
    pub argv: StringVector,
    /// `None`: the program's own.
    pub envp: Option<StringVector>,
    /// Milliseconds.
    pub timeout: Option<u64>,
    /// The container's state, before and after the number of its process.
    pub state: (Vec<u8>, Vec<u8>),
    /// A memory file that takes what it says on stderr.
    pub said: Option<OwnedFd>,
}

/// `set_mempolicy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemoryPolicy {
    pub mode: i32,
    /// One bit a node.
    pub nodes: Vec<u64>,
}

/// A tree to be attached in the root file system.
#[derive(Debug)]
pub(crate) struct TreeMount {
    pub tree: Tree,
    pub directory: bool,
    pub target: Target,
    pub source: String,
    pub over_proc: bool,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub dir: Target,
    pub name: CString,
    pub mode: u32,
    pub device: u64,
    pub owner: Option<(Uid, Gid)>,
}

#[derive(Debug)]
pub(crate) struct Terminal {
    /// Rows and columns.
    pub size: Option<(u16, u16)>,
    /// Show it as /dev/console.
    pub console: Option<Target>,
    pub owner: Uid,
}

/// A seccomp filter's code.
#[derive(Debug)]
pub(crate) enum Filter {
    Compiled(Vec<Instruction>),
    /// Compiled while the process sets itself up, and there before it is told to start.
    Coming(Reader),
}

/// What the process becomes, after the steps.
#[derive(Debug)]
pub(crate) struct ProcessPlan {
    pub program: String,
    pub candidates: Vec<CString>,
    pub searched: bool,
    pub argv: StringVector,
    pub envp: StringVector,
    pub find_home: bool,
    pub cwd: CString,
    pub make_cwd: bool,
    pub keyring: bool,
    pub own_stdio: bool,
    pub rlimits: Vec<(Resource, Rlimit, &'static str)>,
    /// Security label for the exec: (file below /proc/self, text).
    pub labels: Vec<(CString, Vec<u8>)>,
    pub personality: Option<u64>,
    pub scheduling: Option<Scheduling>,
    pub io_priority: Option<i32>,
    pub memory_policy: Option<MemoryPolicy>,
    pub start_hooks: Vec<HookPlan>,
    pub uid: Uid,
    pub gid: Gid,
    pub groups: Vec<Gid>,
    pub set_groups: bool,
    pub umask: Option<u32>,
    pub drop_bounding: u64,
    pub capabilities: CapabilitySets,
    pub ambient: u64,
    pub no_new_privileges: bool,
    /// With its load flags; those of one that is still coming come with it.
    pub seccomp: Option<(Filter, u32)>,
    /// The filter is loaded, and its listener handed over, before the gate and not after it: whoever answers its
    /// notifications hears of the container while it is created, as with runc.
    pub listened_early: bool,
    pub die_with_parent: bool,
    pub preserve_fds: u32,
}

/// Names for what can fail in the last part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Last {
    Stdio,
    Keyring,
    Rlimit,
    Label,
    Personality,
    Scheduling,
    IoPriority,
    Bounding,
    Groups,
    Gid,
    Uid,
    Capabilities,
    Ambient,
    NoNewPrivileges,
    ParentDeath,
    Cwd,
    CwdOutside,
    NotFound,
    NotExecutable,
    IsDirectory,
    Seccomp,
    Descriptors,
    Exec,
    Channel,
    MemoryPolicy,
    /// The error number is what [`HookFailure`] encodes.
    StartHook,
    /// What comes first of all.
    Executable,
}

const LASTS: &[Last] = &[
    Last::Stdio,
    Last::Keyring,
    Last::Rlimit,
    Last::Label,
    Last::Personality,
    Last::Scheduling,
    Last::IoPriority,
    Last::Bounding,
    Last::Groups,
    Last::Gid,
    Last::Uid,
    Last::Capabilities,
    Last::Ambient,
    Last::NoNewPrivileges,
    Last::ParentDeath,
    Last::Cwd,
    Last::CwdOutside,
    Last::NotFound,
    Last::NotExecutable,
    Last::IsDirectory,
    Last::Seccomp,
    Last::Descriptors,
    Last::Exec,
    Last::Channel,
    Last::MemoryPolicy,
    Last::StartHook,
    Last::Executable,
];

/// What exactly failed within a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Part {
    Whole,
    Open,
    Create,
    Prepare,
    Parameter,
    Attach,
    Attributes,
    Owner,
    OnProc,
    Outside,
    NotADevice,
    CopyUp,
    NoFilesystem,
    /// The error number is what [`HookFailure`] encodes.
    Hook,
    Source,
}

const PARTS: &[Part] = &[
    Part::Whole,
    Part::Open,
    Part::Create,
    Part::Prepare,
    Part::Parameter,
    Part::Attach,
    Part::Attributes,
    Part::Owner,
    Part::OnProc,
    Part::Outside,
    Part::NotADevice,
    Part::CopyUp,
    Part::NoFilesystem,
    Part::Hook,
    Part::Source,
];

/// Where in the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Step(u16, Part),
    Last(Last, u16),
}

/// How a hook failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HookFailure {
    /// It could not be run; an error number.
    Os(i32),
    Exit(i32),
    Signal(i32),
    TimedOut,
}

impl HookFailure {
    /// Within what an error number may be.
    pub fn encode(self) -> i32 {
        match self {
            Self::Os(errno) => errno & 0xff,
            Self::Exit(status) => 0x100 | status & 0xff,
            Self::Signal(signal) => 0x200 | signal & 0xff,
            Self::TimedOut => 0x300,
        }
    }

    pub fn decode(code: i32) -> Self {
        match code >> 8 {
            0 => Self::Os(code),
            1 => Self::Exit(code & 0xff),
            2 => Self::Signal(code & 0xff),
            _ => Self::TimedOut,
        }
    }
}

/// One failure: where, and the error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    pub place: Place,
    pub errno: i32,
}

/// What child and parent say to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    Failed(Failure),
    /// With the master's descriptor.
    Terminal,
    /// The mounts are done; hooks may run.
    Mounted,
    /// Waiting at the gate.
    Ready,
    Mapped,
    InCgroup,
    /// With descriptors: see [`crate::handover`].
    Handed,
    /// With the network namespace of [`Step::EnterNetwork`].
    Network,
    HooksDone,
    Start,
    /// The seccomp listener's descriptor in the child: take it, then say [`Message::HooksDone`].
    Listener(i32),
    /// With the tree of this step ([`InsideTree::ids`]): map its ids, then say [`Message::Mapped`].
    MapIds(u16),
}

pub(crate) const MESSAGE_LENGTH: usize = 8;

impl Message {
    pub fn encode(self) -> [u8; MESSAGE_LENGTH] {
        let simple = |tag| [tag, 0, 0, 0, 0, 0, 0, 0];
        match self {
            Self::Failed(Failure { place, errno }) => {
                let e = errno.to_le_bytes();
                match place {
                    Place::Step(index, part) => {
                        let i = index.to_le_bytes();
                        [1, part as u8, i[0], i[1], e[0], e[1], e[2], e[3]]
                    }
                    Place::Last(last, index) => {
                        let i = index.to_le_bytes();
                        [2, last as u8, i[0], i[1], e[0], e[1], e[2], e[3]]
                    }
                }
            }
            Self::Terminal => simple(3),
            Self::Mounted => simple(4),
            Self::Ready => simple(5),
            Self::Mapped => simple(6),
            Self::InCgroup => simple(7),
            Self::HooksDone => simple(8),
            Self::Start => simple(9),
            Self::Listener(fd) => {
                let f = fd.to_le_bytes();
                [10, 0, 0, 0, f[0], f[1], f[2], f[3]]
            }
            Self::MapIds(step) => {
                let i = step.to_le_bytes();
                [11, 0, i[0], i[1], 0, 0, 0, 0]
            }
            Self::Handed => simple(12),
            Self::Network => simple(13),
        }
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let &[tag, kind, i0, i1, e0, e1, e2, e3] = bytes else { return None };
        let index = u16::from_le_bytes([i0, i1]);
        let errno = i32::from_le_bytes([e0, e1, e2, e3]);
        let failed = |place| Self::Failed(Failure { place, errno });
        Some(match tag {
            1 => failed(Place::Step(index, *PARTS.get(usize::from(kind))?)),
            2 => failed(Place::Last(*LASTS.get(usize::from(kind))?, index)),
            3 => Self::Terminal,
            4 => Self::Mounted,
            5 => Self::Ready,
            6 => Self::Mapped,
            7 => Self::InCgroup,
            8 => Self::HooksDone,
            9 => Self::Start,
            10 => Self::Listener(errno),
            11 => Self::MapIds(index),
            12 => Self::Handed,
            13 => Self::Network,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_channel() {
        for part in PARTS {
            let m = Message::Failed(Failure { place: Place::Step(513, *part), errno: 13 });
            assert_eq!(Message::decode(&m.encode()), Some(m));
        }
        for (number, last) in LASTS.iter().enumerate() {
            assert_eq!(*last as usize, number);
            let m = Message::Failed(Failure { place: Place::Last(*last, 7), errno: 2 });
            assert_eq!(Message::decode(&m.encode()), Some(m));
        }
        for m in [
            Message::Terminal,
            Message::Mounted,
            Message::Ready,
            Message::Start,
            Message::Handed,
            Message::Network,
            Message::Listener(517),
            Message::MapIds(258),
        ] {
            assert_eq!(Message::decode(&m.encode()), Some(m));
        }
        for f in [HookFailure::Os(2), HookFailure::Exit(1), HookFailure::Signal(9), HookFailure::TimedOut] {
            assert_eq!(HookFailure::decode(f.encode()), f);
        }
        assert_eq!(Message::decode(&[99; 8]), None);
        assert_eq!(Message::decode(b""), None);
    }
}
