//! Mount entries and root file systems of a spec, compiled to steps; whatever comes from the host
//! is opened here, as a detached tree, before there is a container.

mod groups;
mod options;
mod tree;
mod users;

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use brigantine_sys::mount::{self, Change, attr, propagation};
use rustix::fs::{AtFlags, CWD, FileType};
use rustix::mount::OpenTreeFlags;

use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::handover::Hand;
use crate::launch::Rootfs;
use crate::overlay;
use crate::plan::{FsMount, PathTree, Role, Step, Target, Tree, TreeMount};
use crate::spec::Mount;
use groups::cgroup;
use options::Unnamed;
pub(crate) use options::{Options, parse_propagation};
use tree::tree;
use users::idmap;
pub(crate) use users::{UserMaps, map_ids};

pub(crate) fn c_string(text: impl Into<Vec<u8>>, what: &str) -> Result<CString, Error> {
    let bytes = text.into();
    let shown = String::from_utf8_lossy(&bytes).into_owned();
    CString::new(bytes).map_err(|_unused| Error::invalid(format!("{what} {shown:?}: zero byte")))
}

/// A path of the container as an absolute one, without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut parts = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part),
            // Above the root is the root.
            Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    parts
}

/// An absolute path of the container, relative to its root, without `.` and `..`.
pub(crate) fn target(path: &Path, strict: bool) -> Result<Target, Error> {
    use std::os::unix::ffi::OsStrExt;
    let whole = normal(path);
    let mut parts = whole.strip_prefix("/").unwrap_or(&whole).to_owned();
    if parts.as_os_str().is_empty() {
        parts.push(".");
    }
    if parts.as_os_str().len() > 4000 {
        return Err(Error::invalid(format!("path {} is too long", path.display())));
    }
    Ok(Target { path: c_string(parts.as_os_str().as_bytes(), "path")?, strict })
}

/// The root file system as a tree, and where it is to be attached. `propagation`: as the spec wishes.
pub(crate) fn open_root(
    rootfs: &Rootfs,
    propagation: Option<u64>,
    late: bool,
    user: Option<UserMaps<'_>>,
) -> Result<(Tree, CString), Error> {
    match rootfs {
        Rootfs::Mapped(path) => {
            let (tree, at) = open_root(&Rootfs::Path(path.clone()), propagation, late, None)?;
            let Some(user) = user else { return Ok((tree, at)) };
            // Who is root in there may not go the way to the directory.
            let at = c"/".to_owned();
            let what = || format!("the root file system {:?}", path.display());
            let Tree::Open(fd) = &tree else {
                return Err(Error::unsupported(format!("{}: idmapped mounts need CAP_SYS_ADMIN", what())));
            };
            map_ids(fd.as_fd(), user.namespace()?.as_fd(), false, &what)?;
            Ok((tree, at))
        }
        Rootfs::Path(path) => {
            let what = |e| Error::os(format!("opening the root file system {:?}", path.display()), e);
            let path = std::fs::canonicalize(path).map_err(what)?;
            if !std::fs::metadata(&path).map_err(what)?.is_dir() {
                return Err(Error::invalid(format!(
                    "root file system {:?} is not a directory",
                    path.display()
                )));
            }
            use std::os::unix::ffi::OsStrExt;
            let at = c_string(path.as_os_str().as_bytes(), "root file system")?;
            // What is mounted inside must not travel back to the host, nor come in later, unless it is asked for: a tree
            // made from a shared one is shared with it from the start. A root that is to be shared becomes so when it
            // is one: until then nothing may be mounted on it for others to see, and pivot_root takes no shared one.
            let changes = match propagation {
                Some(propagation::SHARED) => {
                    vec![(Change { propagation: propagation::PRIVATE, ..Change::default() }, false)]
                }
                Some(propagation::SLAVE) => {
                    vec![(Change { propagation: propagation::SLAVE, ..Change::default() }, true)]
                }
                _ => vec![(Change { propagation: propagation::PRIVATE, ..Change::default() }, true)],
            };
            if late {
                return Ok((
                    Tree::Path(Box::new(PathTree { path: at.clone(), recursive: true, changes })),
                    at,
                ));
            }
            let tree = open_tree(&path, true).map_err(|e| what(e.into()))?;
            for (change, recursive) in changes {
                mount::set_attributes(tree.as_fd(), recursive, change, None).map_err(|e| {
                    Error::os(format!("isolating the root file system {:?}", path.display()), e)
                })?;
            }
            Ok((Tree::Open(tree), at))
        }
        Rootfs::Overlay { lower, upper, work, options } => {
            let dirs = overlay::Directories { lower, upper, work };
            let user = match user {
                None => None,
                Some(user) => Some((user, user.root()?)),
            };
            overlay::mount(&dirs, options, user).map(|fd| (Tree::Open(fd), c"/".to_owned()))
        }
    }
}

pub(crate) fn open_tree(path: &Path, recursive: bool) -> Result<OwnedFd, rustix::io::Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(CWD, path, flags)
}

fn is_directory(fd: &OwnedFd) -> Result<bool, Error> {
    let stat = rustix::fs::statat(fd, c"", AtFlags::EMPTY_PATH)
        .map_err(|e| Error::os("reading a mount source", e))?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// A plan in the making.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    pub steps: Vec<Step>,
    /// What must come after devices are made.
    pub afterwards: Vec<Step>,
    /// What the parent is to hand over.
    pub hands: Vec<Hand>,
    entered: bool,
}

impl Draft {
    /// The steps by which the process enters its groups, once: what comes next finds their directories there.
    pub fn enter(&mut self, group: &Cgroup) {
        let dirs = group.entrances();
        if std::mem::replace(&mut self.entered, true) || dirs.is_empty() {
            return;
        }
        self.steps.push(Step::TakeHanded);
        for dir in dirs {
            self.steps.push(Step::JoinCgroup { tasks: self.hands.len(), dir: dir.display().to_string() });
            self.hands.push(Hand::Tasks(dir.to_owned()));
        }
    }
}

/// Whether an entry shows the container's own groups.
pub(crate) fn is_of_groups(entry: &Mount) -> bool {
    matches!(entry.typ().as_deref(), Some("cgroup" | "cgroup2"))
}

/// Whether it matters which of two entries is mounted first.
pub(crate) fn depend(one: &Mount, other: &Mount) -> bool {
    let (one, other) = (normal(one.destination()), normal(other.destination()));
    one.starts_with(&other) || other.starts_with(&one)
}

/// What compiling mounts needs to know about the container.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub bundle: Option<&'a Path>,
    pub cgroup: Option<&'a Cgroup>,
    pub cgroup_namespace: bool,
    /// The caller may not make detached trees: the child, root of its user namespace, does.
    pub late: bool,
    /// The container's own user namespace, for idmapped mounts that have no maps of their own.
    pub user: Option<UserMaps<'a>>,
    /// SELinux' context for new file systems.
    pub label: Option<&'a str>,
    /// The container's root on the host, without links: what lies below it may be mounted by earlier entries.
    pub rootfs: Option<&'a Path>,
}

impl Context<'_> {
    /// A path that begins with the root's own on the host, as one of the container; any other stays.
    fn in_root(&self, path: &Path) -> PathBuf {
        let inner = self.rootfs.and_then(|root| path.strip_prefix(root).ok());
        inner.map_or_else(|| path.to_owned(), |inner| Path::new("/").join(inner))
    }
}

/// Compiles one entry.
pub(crate) fn compile(entry: &Mount, context: &Context<'_>, draft: &mut Draft) -> Result<(), Error> {
    let Draft { steps, afterwards, .. } = draft;
    // Seen from the root, whatever it looks like.
    let destination = &context.in_root(&normal(entry.destination()));
    let words = entry.options().iter().flatten().map(String::as_str);
    let options = Options::parse(words)?;
    let typ = entry.typ().as_deref().unwrap_or_default();
    let shown = destination.display();
    let mapped = |m: &Option<Vec<_>>| m.as_ref().is_some_and(|m| !m.is_empty());
    let own_maps = mapped(entry.uid_mappings()) || mapped(entry.gid_mappings());
    if (own_maps || options.idmap.is_some()) && !(options.bind || typ == "bind") {
        return Err(Error::unsupported(format!(
            "mount {shown}: idmapped mounts are only supported for bind mounts"
        )));
    }
    if options.copy_up && typ != "tmpfs" {
        return Err(Error::invalid(format!("mount {shown}: tmpcopyup is for tmpfs only, this is {typ:?}")));
    }
    // /proc and /sys are what they are called: an image's link must not move them elsewhere.
    let fixed = ["/proc", "/sys"].iter().any(|p| destination == Path::new(p));
    let over_proc = over_proc(destination, typ);
    refuse_forged_proc(destination, entry, options.bind || typ == "bind")?;
    if options.remount && !options.bind {
        let change = Change { set: options.set, clear: options.clear, propagation: 0 };
        steps.push(Step::Change { target: target(destination, fixed)?, change, recursive: false });
        return Ok(());
    }
    if options.bind || typ == "bind" {
        let source = entry
            .source()
            .as_ref()
            .ok_or_else(|| Error::invalid(format!("bind mount at {shown} has no source")))?;
        let source = match context.bundle {
            Some(bundle) if source.is_relative() => bundle.join(source),
            _ => source.clone(),
        };
        let what = || format!("mounting {:?} at {:?}", source.display(), destination.display());
        let unnamed = if context.late || context.user.is_some() { Unnamed::Locked } else { Unnamed::Dropped };
        let mut tree = tree(&source, &options, unnamed, context, &what)?;
        if own_maps || options.idmap.is_some() {
            idmap(entry, &options, context, &mut tree, &what)?;
        }
        let directory = match &tree {
            Tree::Open(fd) => is_directory(fd)?,
            Tree::Path(_) => std::fs::metadata(&source).map_err(|e| Error::os(what(), e))?.is_dir(),
            // Earlier mounts may bring it: the child looks.
            Tree::Inside(_) | Tree::Handed(_) => true,
        };
        steps.push(Step::Attach(TreeMount {
            tree,
            directory,
            target: target(destination, fixed)?,
            source: source.display().to_string(),
            over_proc,
        }));
        return Ok(());
    }
    if is_of_groups(entry) {
        return cgroup(destination, &options, context, draft);
    }
    if typ.is_empty() {
        return Err(Error::invalid(format!("mount at {shown} has no type")));
    }
    let mut parameters = Vec::new();
    if let Some(source) = entry.source() {
        use std::os::unix::ffi::OsStrExt;
        parameters
            .push((c"source".to_owned(), Some(c_string(source.as_os_str().as_bytes(), "mount source")?)));
    }
    for (key, value) in &options.parameters {
        let value = value.as_deref().map(|v| c_string(v, "mount option")).transpose()?;
        parameters.push((c_string(key.as_str(), "mount option")?, value));
    }
    // proc and sysfs have their labels from the policy alone.
    if let Some(label) = context.label.filter(|_| !matches!(typ, "proc" | "sysfs" | "mqueue")) {
        parameters.push((c"context".to_owned(), Some(c_string(label, "mount label")?)));
    }
    let is_dev = destination == Path::new("/dev");
    let mut attributes = options.set;
    if is_dev && attributes & attr::RDONLY != 0 {
        attributes &= !attr::RDONLY;
        let change = Change { set: attr::RDONLY, ..Change::default() };
        afterwards.push(Step::Change { target: target(destination, true)?, change, recursive: false });
    }
    let keep_mode = typ == "tmpfs" && !options.parameters.iter().any(|(k, _)| k == "mode");
    let role = match typ {
        "devpts" => Role::Terminals,
        "proc" if destination == Path::new("/proc") => Role::Proc,
        "sysfs" if destination == Path::new("/sys") => Role::Sys,
        _ if is_dev => Role::Dev,
        _ => Role::None,
    };
    steps.push(Step::Mount(Box::new(FsMount {
        fstype: c_string(typ, "mount type")?,
        parameters,
        attributes: attributes as u32,
        propagation: options.propagation.iter().map(|&(bits, _)| bits).collect(),
        target: target(destination, fixed)?,
        role,
        keep_mode,
        copy_up: options.copy_up,
        over_proc,
    })));
    Ok(())
}

/// Files in /proc that may be covered, as runc has it: they only inform.
const OVER_PROC: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

fn over_proc(destination: &Path, typ: &str) -> bool {
    destination == Path::new("/proc") && typ == "proc"
        || typ == "binfmt_misc"
        || OVER_PROC.iter().any(|p| destination == Path::new(p))
}

/// What is at /proc is a proc file system or nothing: masks and labels in a forgery protect nobody
/// (CVE-2019-16884).
fn refuse_forged_proc(destination: &Path, entry: &Mount, bind: bool) -> Result<(), Error> {
    const PROC_MAGIC: u64 = 0x9fa0;
    if destination != Path::new("/proc") {
        return Ok(());
    }
    let shown = entry.source().as_ref().map(|s| s.display().to_string()).unwrap_or_default();
    let genuine = match (bind, entry.source()) {
        (true, Some(source)) => {
            let stat = rustix::fs::statfs(source)
                .map_err(|e| Error::os(format!("mounting {shown:?} at \"/proc\""), e))?;
            stat.f_type as u64 == PROC_MAGIC
        }
        _ => entry.typ().as_deref() == Some("proc"),
    };
    if genuine {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "mounting {shown:?} at \"/proc\": only a proc file system may be mounted there"
    )))
}

/// Whether a mount is the same in every network namespace.
pub(crate) fn is_of_no_network(entry: &Mount) -> bool {
    let bind = |options: &Vec<String>| options.iter().any(|o| o == "bind" || o == "rbind");
    let typ = entry.typ().as_deref().unwrap_or_default();
    matches!(typ, "bind" | "proc" | "tmpfs" | "devpts" | "mqueue" | "cgroup" | "cgroup2")
        || entry.options().as_ref().is_some_and(bind)
}

/// Where the host's proc and sys file systems are, but those below `root`; what is above comes before what is below.
pub(crate) fn exposed(root: &Path) -> Result<Vec<CString>, Error> {
    let what = "reading /proc/self/mountinfo";
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(|e| Error::os(what, e))?;
    proc_and_sys(&table, root).map(|point| c_string(point, "mount point")).collect()
}

fn proc_and_sys<'a>(table: &'a str, root: &'a Path) -> impl Iterator<Item = String> + 'a {
    table.lines().filter_map(move |line| {
        let (mount, kind) = line.split_once(" - ")?;
        if !kind.starts_with("proc ") && !kind.starts_with("sysfs ") {
            return None;
        }
        let point = mount.split(' ').nth(4)?;
        let point =
            point.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
        (!Path::new(&point).starts_with(root)).then_some(point)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_hosts_proc_and_sys_are_found_wherever_they_are() {
        let table = "\
22 1 0:21 / / rw - ext4 /dev/root rw\n\
23 22 0:22 / /proc rw - proc proc rw\n\
24 22 0:23 / /srv/a\\040b/sys rw shared:1 - sysfs sysfs rw\n\
25 22 0:24 / /c/root/proc rw - proc proc rw\n\
26 22 0:24 / /procs rw - procs none rw\n";
        let found: Vec<String> = proc_and_sys(table, Path::new("/c/root")).collect();
        assert_eq!(found, ["/proc", "/srv/a b/sys"]);
    }

    proptest! {
        #[test]
        fn targets_never_climb(parts in proptest::collection::vec("(\\.\\.|\\.|[a-z]{1,3}|)", 0..12)) {
            let path = PathBuf::from(format!("/{}", parts.join("/")));
            let t = target(&path, false).unwrap();
            let text = t.path.to_str().unwrap();
            prop_assert!(!text.starts_with('/'));
            prop_assert!(!text.split('/').any(|p| p == ".." || p.is_empty()));
        }

        #[test]
        fn options_never_contradict_themselves(words in proptest::collection::vec("r?(ro|rw|nosuid|suid|noatime|relatime|strictatime)", 0..8)) {
            let o = Options::parse(words.iter().map(String::as_str)).unwrap();
            prop_assert_eq!(o.set & o.clear & !attr::ATIME, 0);
            prop_assert_eq!(o.recursive_set & o.recursive_clear & !attr::ATIME, 0);
        }
    }
}
