//! The container's end: reaping, draining, the durable record, cleaning up, telling, lingering.
//!
//! The order is fixed: reap; kill what is left in the control group; drain the output into the log; put the record in its
//! place; remove the control group; tell; sync the record. So whoever is told finds a complete log, a record and no
//! control group. Syncing takes milliseconds that nobody has to wait for: a daemon that listens keeps its own durable
//! record before it tells others, and without one nobody is told. The monitor does not go, and no release is answered,
//! before the record is synced.

use std::time::{Duration, Instant};

use rustix::process::{WaitOptions, WaitStatus, wait};

use super::{Monitor, Wants};
use crate::protocol::{Event, Failure, FailureKind};
use crate::record::{self, Durability, ExitRecord};
use crate::time::Timestamp;

/// How long an ended process's streams may be held open by somebody else before they are given up.
pub(super) const FOREIGN_HOLD: Duration = Duration::from_millis(500);

/// How long removing the control group is tried in all, and how often.
const CLEANUP: Duration = Duration::from_secs(10);
const CLEANUP_STEP: Duration = Duration::from_millis(10);

/// How a process ended.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub(super) exit_code: i32,
    pub(super) signal: Option<i32>,
    pub(super) at: Timestamp,
}

impl Ended {
    fn new(status: WaitStatus) -> Self {
        let signal = status.terminating_signal();
        let exit_code = signal.map_or_else(|| status.exit_status().unwrap_or(255), |s| 128 + s);
        Self { exit_code, signal, at: Timestamp::now() }
    }
}

/// Where a container that has ended is.
pub(super) enum Ending {
    /// Its streams, or those of execs, are held open, or execs have not been reaped.
    Draining { ended: Ended, deadline: Instant },
    /// The record is written; processes that do not die keep the control group.
    Cleaning { record: ExitRecord, next: Instant, deadline: Instant },
    /// Everything is told. Waits for [`crate::Client::release`] while a daemon is there.
    Lingering { record: ExitRecord },
}

impl Ending {
    pub(super) fn wants(&self, wants: &mut Wants<'_>) {
        match self {
            Self::Draining { deadline, .. } => wants.wake_at(*deadline),
            Self::Cleaning { next, .. } => wants.wake_at(*next),
            Self::Lingering { .. } => {}
        }
    }
}

impl Monitor {
    /// How the container ended, once that is on record.
    pub(super) fn exit_record(&self) -> Option<&ExitRecord> {
        match &self.ending {
            Some(Ending::Lingering { record } | Ending::Cleaning { record, .. }) => Some(record),
            _ => None,
        }
    }

    pub(super) fn on_signals(&mut self) {
        // Anything but SIGCHLD asks the monitor to end, which is not its own decision: it ends with its container.
        while let Ok(Some(_)) = self.signals.take() {}
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get();
            let ended = Ended::new(status);
            if pid == self.container.pid() && self.ending.is_none() {
                self.on_ended(ended);
            } else {
                // Neither: an orphan of a container that shares the host's process ids.
                self.execs.on_reaped(pid, &ended);
            }
        }
    }

    fn on_ended(&mut self, ended: Ended) {
        self.count_oom_kills();
        // With a process id namespace of its own the container is empty by now; otherwise others may be left. A frozen
        // one cannot die.
        if self.cgroup.procs().is_ok_and(|procs| !procs.is_empty())
            && (self.cgroup.kill_all().is_err() || self.paused)
        {
            self.paused = self.cgroup.thaw().is_err();
        }
        self.relay.drain();
        self.ending = Some(Ending::Draining { ended, deadline: Instant::now() + FOREIGN_HOLD });
    }

    pub(super) fn settle_end(&mut self, now: Instant) {
        match self.ending.take() {
            Some(Ending::Draining { ended, deadline }) => {
                let waiting = !self.relay.is_drained() || self.execs.any_untold();
                self.ending = if waiting && now < deadline {
                    Some(Ending::Draining { ended, deadline })
                } else {
                    self.relay.abandon(self.log.as_mut());
                    let record = self.write_record(ended);
                    Some(Ending::Cleaning { record, next: now, deadline: now + CLEANUP })
                };
                self.clean(now);
            }
            other => {
                self.ending = other;
                self.clean(now);
            }
        }
        if matches!(self.ending, Some(Ending::Lingering { .. }))
            && self.subscribers.is_empty()
            && !self.relay.is_viewed()
            && !self.execs.any_viewed()
        {
            self.home.leave();
            self.finished = true;
        }
    }

    fn write_record(&mut self, ended: Ended) -> ExitRecord {
        let record = ExitRecord {
            exit_code: ended.exit_code,
            signal: ended.signal,
            oom_killed: self.oom_kills > 0,
            container_pid: self.container.pid(),
            started_at: self.started_at.clone(),
            finished_at: ended.at,
            monitor_lost: false,
        };
        if let Err(_unwritten) = record::write(&self.home.exit_path, &record, Durability::Visible) {
            // A full disk must not keep the daemon from being told; it keeps a record of its own.
        }
        record
    }

    /// Remove the control group, and tell when it is gone.
    fn clean(&mut self, now: Instant) {
        let Some(Ending::Cleaning { record, next, deadline }) = &mut self.ending else { return };
        if now < *next {
            return;
        }
        self.oom = None;
        self.container.delete();
        if self.cgroup.delete().is_err() && now < *deadline {
            *next = now + CLEANUP_STEP;
            return;
        }
        let record = record.clone();
        self.relay.end(None);
        self.publish(&Event::Exited(record.clone()));
        if self.home.durable_exit
            && let Err(_unsynced) = record::sync(&self.home.exit_path)
        {
            // Everybody but the disk knows.
        }
        self.ending = Some(Ending::Lingering { record });
    }

    /// The daemon has taken notice: nothing is needed any more.
    pub(super) fn release(&mut self) -> Result<(), Failure> {
        if !matches!(self.ending, Some(Ending::Lingering { .. })) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("container {} is running", self.home.id),
            ));
        }
        // What clients have not taken is still theirs; their streams end by themselves.
        self.home.remove();
        self.subscribers.clear();
        Ok(())
    }
}
