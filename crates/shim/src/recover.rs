//! Finding containers again: what a daemon that starts learns from a monitor's directory, and what is cleaned up when
//! the monitor itself was lost.
//!
//! A living monitor holds a lock on its directory from before it makes the container until it ends. So "nobody
//! listens" is told apart from "starting" and "ending", and cleaning up never races with a monitor.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use brigantine_runtime::Cgroup;
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::client::{Client, ClientError};
use crate::config::Config;
use crate::record::{self, Durability, ExecRecord, ExitRecord, MonitorRecord, RecordError, exec_path};
use crate::time::Timestamp;

/// How long a monitor may be seen starting or ending.
const TRANSITION: Duration = Duration::from_secs(10);

/// What is known of a container from its files.
#[derive(Debug)]
pub enum Found {
    /// Its monitor is there (the container may have ended: ask [`Client::state`] or subscribe).
    Monitored(Client),
    /// It has ended.
    Exited(ExitRecord),
    /// It never ran, or its record was removed.
    Nothing,
}

/// A container's files could not be read or cleaned up.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// A record is unreadable or cannot be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The monitor's directory cannot be used.
    #[error("{action} {}", path.display())]
    Directory {
        /// What was tried.
        action: &'static str,
        /// On which directory.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The monitor lives but does not listen.
    #[error("the monitor in {} is neither reachable nor gone", dir.display())]
    Stuck {
        /// The monitor's directory.
        dir: PathBuf,
    },
    /// What is left of a container whose monitor was lost cannot be removed.
    #[error("remove the control group of container {id}")]
    Cgroup {
        /// The container.
        id: String,
        #[source]
        source: brigantine_runtime::Error,
    },
}

/// Find out what became of the container whose monitor's directory is `dir` and whose exit record is to be at
/// `exit_path`. If the monitor was lost (killed), the container's processes are killed, its control group is removed
/// and an exit record with status 137 is written.
///
/// Records of execs stay in `dir`; see [`exec_record`] and [`clear`].
pub fn find(dir: &Path, exit_path: &Path) -> Result<Found, RecoverError> {
    let give_up = Instant::now() + TRANSITION;
    loop {
        match Client::connect(dir) {
            Ok(client) => return Ok(Found::Monitored(client)),
            Err(ClientError::Unreachable { .. }) => {}
            Err(_) if Instant::now() > give_up => return Err(RecoverError::Stuck { dir: dir.to_owned() }),
            Err(_) => {}
        }
        match lock(dir).map_err(|source| RecoverError::Directory {
            action: "lock",
            path: dir.to_owned(),
            source,
        })? {
            Lock::NoDirectory => {
                return Ok(ExitRecord::read(exit_path)?.map_or(Found::Nothing, Found::Exited));
            }
            Lock::Held => {
                if Instant::now() > give_up {
                    return Err(RecoverError::Stuck { dir: dir.to_owned() });
                }
                sleep(Duration::from_millis(5));
            }
            Lock::Taken(_lock) => return bury(dir, exit_path),
        }
    }
}

/// The record of an exec that has ended, from the directory of a monitor that may be gone.
pub fn exec_record(dir: &Path, id: &str) -> Result<Option<ExecRecord>, RecordError> {
    record::read(&exec_path(dir, id))
}

/// Remove the directory of a monitor that is gone. A directory that is gone is no error.
pub fn clear(dir: &Path) -> Result<(), RecoverError> {
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RecoverError::Directory { action: "remove", path: dir.to_owned(), source })
        }
        _ => Ok(()),
    }
}

enum Lock {
    Taken(File),
    Held,
    NoDirectory,
}

fn lock(dir: &Path) -> io::Result<Lock> {
    let file = match File::open(dir) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Lock::NoDirectory),
        Err(e) => return Err(e),
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock::Taken(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Lock::Held),
        Err(e) => Err(e.into()),
    }
}

/// Clean up after a monitor that is gone, with the directory's lock held.
fn bury(dir: &Path, exit_path: &Path) -> Result<Found, RecoverError> {
    let exit = ExitRecord::read(exit_path)?;
    let Some(monitor) = MonitorRecord::read(dir)? else {
        return Ok(exit.map_or(Found::Nothing, Found::Exited));
    };
    kill_process(monitor.container_pid, monitor.container_start_ticks);
    if let Some(cgroup) = &monitor.cgroup {
        remove_cgroup(cgroup).map_err(|source| RecoverError::Cgroup { id: monitor.id.clone(), source })?;
    }
    let exit = match exit {
        Some(exit) if exit.container_pid == monitor.container_pid => exit,
        _ => {
            let exit = ExitRecord {
                exit_code: 128 + libc::SIGKILL,
                signal: Some(libc::SIGKILL),
                oom_killed: false,
                container_pid: monitor.container_pid,
                started_at: monitor.created_at,
                finished_at: Timestamp::now(),
                monitor_lost: true,
            };
            record::write(exit_path, &exit, Durability::Synced)?;
            exit
        }
    };
    remove_file(&dir.join(record::SOCKET))?;
    remove_file(&dir.join(record::MONITOR))?;
    Ok(Found::Exited(exit))
}

/// Remove what a monitor that died before its verdict may have left.
pub(crate) fn bury_unborn(config: &Config) {
    let Ok(Lock::Taken(_lock)) = lock(&config.dir) else { return };
    if let Ok(Some(monitor)) = MonitorRecord::read(&config.dir) {
        kill_process(monitor.container_pid, monitor.container_start_ticks);
        if let Some(cgroup) = &monitor.cgroup {
            discard(remove_cgroup(cgroup));
        }
    } else if let Some(path) = config.spec.linux().as_ref().and_then(|l| l.cgroups_path().as_ref())
        && let Ok(cgroup) = Cgroup::open(&path.to_string_lossy())
    {
        discard(remove_cgroup(&cgroup));
    }
    discard(fs::remove_dir_all(&config.dir));
}

/// Drop a result on a path that already reports a worse failure.
fn discard<T, E>(result: Result<T, E>) {
    drop(result);
}

fn remove_cgroup(cgroup: &Cgroup) -> Result<(), brigantine_runtime::Error> {
    cgroup.kill_all()?;
    if let Err(e) = cgroup.thaw()
        && cgroup.procs().is_ok_and(|procs| !procs.is_empty())
    {
        return Err(e);
    }
    let give_up = Instant::now() + TRANSITION;
    while cgroup.procs().is_ok_and(|procs| !procs.is_empty()) && Instant::now() < give_up {
        sleep(Duration::from_millis(2));
    }
    cgroup.delete()
}

/// Kill a process if it is still the one that started at `ticks`, and wait until it has ended.
fn kill_process(pid: i32, ticks: u64) {
    let Some(raw) = Pid::from_raw(pid) else { return };
    let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty()) else { return };
    if start_ticks(pid) != Some(ticks) {
        return;
    }
    if pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
        let mut polled = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        discard(rustix::event::poll(&mut polled, Some(&limit)));
    }
}

/// When a process started, in clock ticks since boot.
pub(crate) fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold anything; the fields after its closing parenthesis start with the third.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn remove_file(path: &Path) -> Result<(), RecoverError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RecoverError::Directory { action: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}
