//! Further processes in the container: their streams, how they end, and the records of those that have ended.
//!
//! An ended exec has its record on disk before anybody is told, and its streams have been drained before that.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use super::boot::remove_file;
use super::container::Further;
use super::end::{Ended, FOREIGN_HOLD};
use super::relay::{Plumbing, Relay};
use super::{Monitor, Owner, Wants};
use crate::config::{ConsoleSize, ExecConfig};
use crate::frame::Kind;
use crate::protocol::{Event, ExecState, Failure, FailureKind};
use crate::record::{self, Durability, ExecRecord, exec_path};
use crate::time::Timestamp;

/// Ended execs that are remembered; records of older ones are removed.
const REMEMBERED: usize = 128;

/// One further process.
struct Exec {
    key: u32,
    id: String,
    pid: i32,
    pid_in_container: i32,
    pidfd: OwnedFd,
    started_at: Timestamp,
    relay: Relay,
    /// Set when the process has been reaped; the streams may have something left.
    ended: Option<(Ended, Instant)>,
    /// Set when its end has been told; clients may have something left to take.
    told: bool,
}

/// The container's further processes.
#[derive(Default)]
pub(super) struct Execs {
    running: Vec<Exec>,
    ended: VecDeque<ExecState>,
}

impl Execs {
    pub(super) fn wants<'fd>(&'fd self, wants: &mut Wants<'fd>) {
        for exec in &self.running {
            exec.relay.wants(Owner::Exec(exec.key), false, wants);
            if let Some((_, deadline)) = exec.ended.as_ref().filter(|_| !exec.told) {
                wants.wake_at(*deadline);
            }
        }
    }

    pub(super) fn relay(&mut self, key: u32) -> Option<&mut Relay> {
        self.running.iter_mut().find(|e| e.key == key).map(|e| &mut e.relay)
    }

    /// The streams of the exec with this id, if it runs.
    pub(super) fn relay_of(&mut self, id: &str) -> Option<&mut Relay> {
        self.running.iter_mut().find(|e| e.id == id && e.ended.is_none()).map(|e| &mut e.relay)
    }

    /// The process of the exec with this id, if it runs.
    pub(super) fn pidfd(&self, id: &str) -> Option<impl AsFd> {
        self.running.iter().find(|e| e.id == id && e.ended.is_none()).map(|e| &e.pidfd)
    }

    /// Whether processes have not been reaped, or their ends not been told.
    pub(super) fn any_untold(&self) -> bool {
        self.running.iter().any(|e| !e.told)
    }

    /// Whether clients are still to be served.
    pub(super) fn any_viewed(&self) -> bool {
        self.running.iter().any(|e| e.relay.is_viewed())
    }

    pub(super) fn states(&self) -> Vec<ExecState> {
        let running = self.running.iter().filter(|e| !e.told).map(Exec::state);
        running.chain(self.ended.iter().cloned()).collect()
    }

    pub(super) fn state(&self, id: &str) -> Option<ExecState> {
        let running = self.running.iter().find(|e| e.id == id && !e.told).map(Exec::state);
        running.or_else(|| self.ended.iter().find(|e| e.id == id).cloned())
    }

    /// A process has been reaped; whether it was one of these.
    pub(super) fn on_reaped(&mut self, pid: i32, ended: &Ended) -> bool {
        let Some(exec) = self.running.iter_mut().find(|e| e.pid == pid && e.ended.is_none()) else {
            return false;
        };
        exec.relay.drain();
        exec.ended = Some((ended.clone(), Instant::now() + FOREIGN_HOLD));
        true
    }
}

impl Exec {
    fn state(&self) -> ExecState {
        ExecState { id: self.id.clone(), pid: self.pid, pid_in_container: self.pid_in_container, exit: None }
    }
}

impl Monitor {
    /// Start a further process; its key and pid.
    pub(super) fn exec(&mut self, config: ExecConfig) -> Result<(u32, i32), Failure> {
        let ExecConfig { id, mut process, terminal, console_size, stdin, stdout: _, stderr: _ } = config;
        if self.ending.is_some() {
            return Err(Failure::new(
                FailureKind::NotRunning,
                format!("container {} is not running", self.home.id),
            ));
        }
        if self.paused {
            return Err(Failure::new(FailureKind::Conflict, format!("container {} is paused", self.home.id)));
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
        if id.is_empty() || id.len() > 128 || !id.bytes().all(plain) {
            return Err(Failure::new(
                FailureKind::Invalid,
                format!("exec id {id:?}: want 1 to 128 of [a-zA-Z0-9_.-]"),
            ));
        }
        if self.execs.state(&id).is_some() {
            return Err(Failure::new(FailureKind::Conflict, format!("exec {id} exists")));
        }
        process.set_terminal(Some(terminal));
        // Set before the program runs: its first look must not find a terminal of 0 by 0.
        process.set_console_size(console_size.filter(|_| terminal).and_then(ConsoleSize::to_spec));
        if process.oom_score_adj().is_none() {
            // Else the monitor's own would be inherited.
            process.set_oom_score_adj(Some(self.home.oom_score_adj));
        }
        let os = |e: std::io::Error| Failure::new(FailureKind::Os, format!("exec {id}: set up streams: {e}"));
        let (stdio, mut relay) = Plumbing::new(terminal, stdin, true).map_err(os)?.split();
        let started = self.container.exec(Further { id: &id, process, stdio })?;
        let key = self.next_id();
        if let Some(master) = started.terminal
            && let Err(e) = relay.connect_terminal(master, console_size, stdin, true)
        {
            // Without its streams it is of no use; the reaping finds nothing to report.
            if let Err(e) = brigantine_sys::signals::send(started.pidfd.as_fd(), libc::SIGKILL) {
                return Err(os(e));
            }
            return Err(os(e));
        }
        self.execs.running.push(Exec {
            key,
            id,
            pid: started.pid,
            pid_in_container: pid_in_container(started.pid),
            pidfd: started.pidfd,
            started_at: Timestamp::now(),
            relay,
            ended: None,
            told: false,
        });
        Ok((key, started.pid))
    }

    /// Tell the ends of execs whose streams have been drained, and forget those whose clients have been served.
    pub(super) fn settle_execs(&mut self, now: Instant) {
        let mut told = Vec::new();
        for exec in &mut self.execs.running {
            exec.relay.housekeeping(now);
            let Some((ended, deadline)) = exec.ended.as_ref().filter(|_| !exec.told) else { continue };
            if !exec.relay.is_drained() && now < *deadline {
                continue;
            }
            exec.relay.abandon(None);
            let record = ExecRecord {
                id: exec.id.clone(),
                exit_code: ended.exit_code,
                signal: ended.signal,
                pid: exec.pid,
                started_at: exec.started_at.clone(),
                finished_at: ended.at.clone(),
            };
            if let Err(_unwritten) =
                record::write(&exec_path(&self.home.dir, &exec.id), &record, Durability::Visible)
            {
                // Told through the event and the stream all the same; only a daemon that is away misses it.
            }
            let json = serde_json::to_vec(&record).unwrap_or_default();
            exec.relay.end(Some((Kind::ExecExited, &json)));
            exec.told = true;
            let state = ExecState { exit: Some(record.clone()), ..exec.state() };
            told.push((state, record));
        }
        for (state, record) in told {
            self.execs.ended.push_back(state);
            if self.execs.ended.len() > REMEMBERED
                && let Some(oldest) = self.execs.ended.pop_front()
            {
                remove_file(&exec_path(&self.home.dir, &oldest.id));
            }
            self.publish(&Event::ExecExited(record));
        }
        self.execs.running.retain(|e| !e.told || e.relay.is_viewed());
    }

    /// Drop the record of an ended exec.
    pub(super) fn forget_exec(&mut self, id: &str) -> Result<(), Failure> {
        if self.execs.running.iter().any(|e| e.id == id && !e.told) {
            return Err(Failure::new(FailureKind::Conflict, format!("exec {id} is running")));
        }
        let before = self.execs.ended.len();
        self.execs.ended.retain(|e| e.id != id);
        if self.execs.ended.len() == before {
            return Err(no_such_exec(id));
        }
        remove_file(&exec_path(&self.home.dir, id));
        Ok(())
    }
}

/// There is no exec of that id (that runs, if it must).
pub(super) fn no_such_exec(id: &str) -> Failure {
    Failure::new(FailureKind::NoSuchExec, format!("no such exec: {id}"))
}

/// The innermost process id of a process; 0 if it has gone already.
fn pid_in_container(pid: i32) -> i32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:")).unwrap_or_default();
    line.split_ascii_whitespace().next_back().and_then(|p| p.parse().ok()).unwrap_or(0)
}
