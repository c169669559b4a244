//! What is remembered of a container between invocations.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Deserializer, Serialize};

use crate::cgroup::Cgroup;
use crate::error::{Error, Kind};
use crate::spec::Spec;

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Record {
    pub version: u32,
    pub id: String,
    pub pid: i32,
    /// In clock ticks since boot: tells this process from a later one with its number.
    pub pid_started: u64,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub created: String,
    pub cgroup: Cgroup,
    #[serde(deserialize_with = "shared")]
    pub spec: Arc<Spec>,
}

/// A spec that others hold as well.
fn shared<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<Spec>, D::Error> {
    Spec::deserialize(from).map(Arc::new)
}

/// A record but for its spec.
#[derive(Serialize)]
struct Head<'a> {
    version: u32,
    id: &'a str,
    pid: i32,
    pid_started: u64,
    bundle: &'a Path,
    rootfs: &'a Path,
    created: &'a str,
    cgroup: &'a Cgroup,
}

impl Record {
    /// As JSON. `text`: its spec, to the letter.
    fn to_json(&self, text: Option<&[u8]>) -> Result<Vec<u8>, serde_json::Error> {
        let Self { version, id, pid, pid_started, bundle, rootfs, created, cgroup, spec } = self;
        let (version, pid, pid_started) = (*version, *pid, *pid_started);
        let mut json =
            serde_json::to_vec(&Head { version, id, pid, pid_started, bundle, rootfs, created, cgroup })?;
        // One field more.
        json.pop();
        json.extend(b",\"spec\":");
        match text {
            Some(text) => json.extend(text),
            None => serde_json::to_writer(&mut json, spec.as_ref())?,
        }
        json.push(b'}');
        Ok(json)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// A container's directory below the root.
#[derive(Debug)]
pub(crate) struct Dir {
    pub path: PathBuf,
}

impl Dir {
    pub fn new(root: &Path, id: &str) -> Self {
        Self { path: root.join(id) }
    }

    /// Takes the id; an id in use is refused.
    pub fn claim(&self, root: &Path, id: &str) -> Result<(), Error> {
        let failed = |path: &Path, e: io::Error| {
            let alone = e.kind() == io::ErrorKind::PermissionDenied && !rustix::process::geteuid().is_root();
            let hint = if alone { " (set XDG_RUNTIME_DIR or --root to a directory of yours)" } else { "" };
            Error::os(format!("creating {}{hint}", path.display()), e)
        };
        fs::create_dir_all(root).map_err(|e| failed(root, e))?;
        match rustix::fs::mkdir(&self.path, Mode::from_raw_mode(0o700)) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::EXIST) => {
                Err(Error::new(Kind::State, format!("container with given ID already exists: {id}")))
            }
            Err(e) => Err(failed(&self.path, e.into())),
        }
    }

    pub fn remove(&self) -> Result<(), Error> {
        // Mostly there is one file only, or it has been taken away already.
        drop(fs::remove_file(self.path.join("state.json")));
        if fs::remove_dir(&self.path).is_ok() {
            return Ok(());
        }
        match fs::remove_dir_all(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Error::os(format!("removing {}", self.path.display()), e))
            }
            _ => Ok(()),
        }
    }

    pub fn load(&self, id: &str) -> Result<Record, Error> {
        let file = self.path.join("state.json");
        let bytes = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Error::new(Kind::State, format!("container does not exist: {id}")));
            }
            Err(e) => return Err(Error::os(format!("reading {}", file.display()), e)),
        };
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::new(Kind::State, format!("reading {}: {e}", file.display())))
    }

    /// Temporary file, then rename: a reader sees the old record or the new one. The directory is in
    /// memory; there is nothing to sync.
    pub fn save(&self, record: &Record) -> Result<(), Error> {
        self.prepare(record, None)?;
        self.publish()
    }

    /// The first half of [`Self::save`]: nobody sees it yet. `text`: what the spec was read from, if it is all of that.
    pub fn prepare(&self, record: &Record, text: Option<&[u8]>) -> Result<(), Error> {
        let temporary = self.path.join("state.json.new");
        let what = || format!("writing {}", temporary.display());
        let bytes = record.to_json(text).map_err(|e| Error::os(what(), io::Error::from(e)))?;
        fs::write(&temporary, bytes).map_err(|e| Error::os(what(), e))
    }

    /// The second half.
    pub fn publish(&self) -> Result<(), Error> {
        let file = self.path.join("state.json");
        fs::rename(self.path.join("state.json.new"), &file)
            .map_err(|e| Error::os(format!("writing {}", file.display()), e))
    }

    /// One command at a time changes a container.
    pub fn lock(&self) -> Result<OwnedFd, Error> {
        let what = || format!("locking {}", self.path.display());
        let fd =
            rustix::fs::open(&self.path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| Error::os(what(), e))?;
        rustix::fs::flock(&fd, FlockOperation::LockExclusive).map_err(|e| Error::os(what(), e))?;
        Ok(fd)
    }

    /// Where the container's notification socket is (see `notify`).
    pub fn notify(&self) -> PathBuf {
        self.path.join("notify")
    }

    /// Who made the container.
    fn owner(&self) -> String {
        use std::os::unix::fs::MetadataExt;
        let Ok(uid) = fs::metadata(&self.path).map(|m| m.uid()) else { return String::new() };
        let table = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let named = table.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
        });
        named.unwrap_or_else(|| format!("#{uid}"))
    }

    pub fn start_socket(&self) -> PathBuf {
        self.path.join("start.sock")
    }

    /// A socket address must be short; a path through a descriptor always is.
    fn start_address(&self) -> Result<(OwnedFd, SocketAddrUnix), Error> {
        let what = || format!("opening {}", self.path.display());
        let dir = rustix::fs::openat(
            CWD,
            &self.path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| Error::os(what(), e))?;
        let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/start.sock", dir.as_raw_fd()))
            .map_err(|e| Error::os(what(), e))?;
        Ok((dir, address))
    }

    fn socket() -> Result<OwnedFd, Error> {
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|e| Error::os("opening the start socket", e))
    }

    pub fn listen(&self) -> Result<OwnedFd, Error> {
        let (_dir, address) = self.start_address()?;
        let socket = Self::socket()?;
        rustix::net::bind(&socket, &address).map_err(|e| Error::os("binding the start socket", e))?;
        rustix::net::listen(&socket, 4).map_err(|e| Error::os("listening on the start socket", e))?;
        Ok(socket)
    }

    pub fn connect(&self) -> Result<OwnedFd, Error> {
        let (_dir, address) = self.start_address()?;
        let socket = Self::socket()?;
        rustix::net::connect(&socket, &address)
            .map_err(|e| Error::os("connecting to the container's start socket", e))?;
        Ok(socket)
    }
}

impl Record {
    pub fn alive(&self) -> bool {
        started(self.pid).is_some_and(|(time, dead)| time == self.pid_started && !dead)
    }

    pub fn pidfd(&self) -> Result<OwnedFd, Error> {
        let failed = |e| Error::os(format!("opening the process of container {}", self.id), e);
        let pid = rustix::process::Pid::from_raw(self.pid).ok_or_else(|| failed(rustix::io::Errno::SRCH))?;
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).map_err(failed)
    }

    /// Whether its processes go with their first.
    pub fn has_own_pids(&self) -> bool {
        let list = self.spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
        list.into_iter().flatten().any(|n| {
            n.typ() == crate::spec::LinuxNamespaceType::Pid
                && n.path().as_ref().is_none_or(|p| p.as_os_str().is_empty())
        })
    }

    /// Its processes, in the caller's PID namespace.
    pub fn processes(&self) -> Result<Vec<i32>, Error> {
        let pids = self.cgroup.procs()?;
        // Without a group of its own, the first is what is known.
        Ok(if pids.is_empty() && self.alive() { vec![self.pid] } else { pids })
    }

    pub fn status(&self, dir: &Dir) -> Status {
        if !self.alive() {
            Status::Stopped
        } else if dir.start_socket().exists() {
            Status::Created
        } else if self.cgroup.is_frozen().unwrap_or_default() {
            Status::Paused
        } else {
            Status::Running
        }
    }

    /// The state as runtime-spec and runc give it.
    pub fn state(&self, dir: &Dir) -> State<'_> {
        let status = self.status(dir);
        State {
            oci_version: crate::OCI_VERSION,
            id: &self.id,
            pid: if status == Status::Stopped { 0 } else { self.pid },
            status: status.name(),
            bundle: &self.bundle,
            rootfs: &self.rootfs,
            created: &self.created,
            owner: dir.owner(),
            annotations: self.spec.annotations().as_ref(),
        }
    }
}

/// In runc's order: people read it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State<'a> {
    oci_version: &'static str,
    pub id: &'a str,
    pub pid: i32,
    pub status: &'static str,
    pub bundle: &'a Path,
    rootfs: &'a Path,
    pub created: &'a str,
    pub owner: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<&'a std::collections::HashMap<String, String>>,
}

impl State<'_> {
    pub fn json(&self) -> Result<Vec<u8>, Error> {
        serde_json::to_vec(self).map_err(|e| Error::os("writing a container's state", io::Error::from(e)))
    }
}

/// A process's start time, and whether it is only waiting to be reaped.
pub(crate) fn started(pid: i32) -> Option<(u64, bool)> {
    started_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The same, of a table of proc_pid_stat(5).
fn started_in(text: &str) -> Option<(u64, bool)> {
    // The name is in parentheses and may hold anything.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let dead = matches!(*fields.first()?, "Z" | "X");
    Some((fields.get(19)?.parse().ok()?, dead))
}

/// RFC 3339, UTC, with nanoseconds.
pub(crate) fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, rest) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Civil date from days, counted in years that begin in March.
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", since.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    #[test]
    fn times_are_rfc_3339() {
        let at = |s| timestamp(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(at(1_767_225_599), "2025-12-31T23:59:59.000000000Z");
    }

    proptest! {
        #[test]
        fn a_name_cannot_pass_for_what_follows_it(name in ".{0,15}", time: u64, state in "[RSDZXTt]") {
            let zeros = vec!["0"; 18].join(" ");
            let found = started_in(&format!("7 ({name}) {state} {zeros} {time} 4096\n"));
            prop_assert_eq!(found, Some((time, state == "Z" || state == "X")));
        }

        #[test]
        fn any_table_is_read_or_not(text in any::<String>()) {
            prop_assert!(started_in(&text).is_none_or(|_| text.contains(')')));
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let text = r#"{"ociVersion": "1.2.0", "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}},
            "annotations": {"a": "\u0062"}}"#;
        let cgroup = serde_json::from_value(serde_json::json!({"path": "/a", "v1": [], "v2": null}));
        let record = Record {
            version: 1,
            id: "one".to_owned(),
            pid: 7,
            pid_started: 1 << 40,
            bundle: "/b/\"b".into(),
            rootfs: "/r".into(),
            created: "now".to_owned(),
            cgroup: cgroup.unwrap(),
            spec: Arc::new(serde_json::from_str(text).unwrap()),
        };
        for written in [Some(text.as_bytes()), None] {
            let read: Record = serde_json::from_slice(&record.to_json(written).unwrap()).unwrap();
            assert_eq!(format!("{read:?}"), format!("{record:?}"));
        }
    }

    #[test]
    fn the_own_process_is_alive() {
        let (_, dead) = started(std::process::id() as i32).unwrap();
        assert!(!dead);
        assert!(started(-1).is_none());
    }
}
