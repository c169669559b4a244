//! Signals to containers: stop, kill, restart, pause and unpause, and the terminal's size.

use std::sync::Arc;
use std::time::Duration;

use brigantine_shim::ConsoleSize;

use super::wait::register;
use super::{Condition, Container, Containers, Live, ShimError, Status};
use crate::db::Durability;
use crate::{Error, Result};

/// Seconds between the stop signal and SIGKILL when nobody says otherwise.
const STOP_TIMEOUT: i64 = 10;
/// How long a process that was sent SIGKILL may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
const SIGKILL: i32 = 9;

const NAMES: &[(&str, i32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("UNUSED", 31),
];

/// A signal by name (`TERM`, `SIGTERM`, `RTMIN+3`) or number.
pub(super) fn parse_signal(text: &str) -> Result<i32> {
    let wrong = || Error::invalid(format!("invalid signal: {text}"));
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(wrong()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let realtime = |rest: &str, base: i32, sign: i32| -> Option<i32> {
        let offset = if rest.is_empty() { 0 } else { rest[1..].parse::<i32>().ok()? };
        let fits = rest.is_empty() || rest.starts_with(if sign > 0 { '+' } else { '-' });
        (fits && (0..=30).contains(&offset)).then_some(base + sign * offset)
    };
    name.strip_prefix("RTMIN")
        .and_then(|rest| realtime(rest, 34, 1))
        .or_else(|| name.strip_prefix("RTMAX").and_then(|rest| realtime(rest, 64, -1)))
        .ok_or_else(wrong)
}

impl Container {
    fn stop_signal(&self) -> i32 {
        let named = self.with(|inner| inner.record.config.stop_signal.clone());
        named.and_then(|signal| parse_signal(&signal).ok()).unwrap_or(15)
    }

    fn stop_timeout(&self) -> i64 {
        self.with(|inner| inner.record.config.stop_timeout).unwrap_or(STOP_TIMEOUT)
    }
}

impl Containers {
    /// Stops a container: its signal, then after `timeout` seconds (negative: never) SIGKILL. 304 if it does not run.
    pub async fn stop(&self, reference: &str, timeout: Option<i64>, signal: Option<&str>) -> Result<()> {
        let container = self.find(reference)?;
        let signal = signal.filter(|signal| !signal.is_empty()).map(parse_signal).transpose()?;
        if self.cancel_restart(&container) {
            self.remember_stop(&container).await?;
            self.publish(&container, "stop", &[]);
            return Ok(());
        }
        let Some(live) = container.live() else {
            return Err(Error::not_modified(format!("container {} is not running", container.id)));
        };
        self.stop_live(&container, &live, timeout, signal).await?;
        self.publish(&container, "stop", &[]);
        Ok(())
    }

    /// Ends the wait for a restart by policy.
    pub(super) fn cancel_restart(&self, container: &Container) -> bool {
        let cancelled = container.with(|inner| {
            if inner.record.state.status != Status::Restarting || inner.live.is_some() {
                return false;
            }
            drop(inner.restart.cancel.take());
            inner.record.state.status = Status::Exited;
            inner.wake(&[Condition::NotRunning]);
            true
        });
        if cancelled {
            self.note(container);
        }
        cancelled
    }

    /// `unless-stopped` has to know about it after a reboot.
    async fn remember_stop(&self, container: &Container) -> Result<()> {
        let changed = container.with(|inner| {
            inner.stop_requested = true;
            !std::mem::replace(&mut inner.record.stopped_by_request, true)
        });
        let matters = container.with(|inner| {
            inner
                .record
                .host_config
                .restart_policy
                .as_ref()
                .and_then(|policy| policy.name)
                .is_some_and(|name| name == bollard_stubs::models::RestartPolicyNameEnum::UNLESS_STOPPED)
        });
        if changed && matters { self.persist(container, Durability::Synced).await } else { Ok(()) }
    }

    pub(super) async fn stop_live(
        &self,
        container: &Container,
        live: &Arc<Live>,
        timeout: Option<i64>,
        signal: Option<i32>,
    ) -> Result<()> {
        let gone = register(container, Condition::NotRunning);
        self.remember_stop(container).await?;
        let signal = signal.unwrap_or_else(|| container.stop_signal());
        let timeout = timeout.unwrap_or_else(|| container.stop_timeout());
        self.signal(container, live, signal).await?;
        if container.status() == Status::Paused {
            self.thaw(container, live).await?;
        }
        let gone = gone.done();
        tokio::pin!(gone);
        if timeout < 0 {
            gone.await?;
            return Ok(());
        }
        // A signal that has no effect is not waited for.
        let hears = {
            let (pid, own) = (live.pid, container.with(|inner| is_init(&inner.record)));
            std::fs::read_to_string(format!("/proc/{pid}/status"))
                .map_or(true, |status| hears(&status, signal, own))
        };
        let patience = if hears { Duration::from_secs(timeout.unsigned_abs()) } else { Duration::ZERO };
        if let Ok(ended) = tokio::time::timeout(patience, &mut gone).await {
            ended?;
            return Ok(());
        }
        self.signal(container, live, SIGKILL).await?;
        match tokio::time::timeout(KILL_TIMEOUT, gone).await {
            Ok(ended) => ended.map(drop),
            Err(_elapsed) => Err(Error::internal(format!(
                "container {} is still there {} s after SIGKILL: its process cannot be interrupted",
                container.id,
                KILL_TIMEOUT.as_secs()
            ))),
        }
    }

    /// Sends a signal and tells of it; a process that has just ended is no failure.
    async fn signal(&self, container: &Container, live: &Arc<Live>, signal: i32) -> Result<()> {
        match live.ask(move |client| client.kill(signal, false)).await {
            Ok(()) => {}
            Err(error) if error.is_gone() => return Ok(()),
            Err(error) => {
                return Err(Error::internal(format!("send signal {signal} to container {}", container.id))
                    .because(error));
            }
        }
        self.publish(container, "kill", &[("signal", signal.to_string())]);
        Ok(())
    }

    /// Sends a signal; SIGKILL also waits for the end.
    pub async fn kill(&self, reference: &str, signal: Option<&str>) -> Result<()> {
        let container = self.find(reference)?;
        let signal = signal.filter(|signal| !signal.is_empty()).map_or(Ok(SIGKILL), parse_signal)?;
        let Some(live) = container.live() else {
            return Err(Error::conflict(format!(
                "cannot kill container: {reference}: container {} is not running",
                container.id
            )));
        };
        if signal == SIGKILL || signal == container.stop_signal() {
            self.remember_stop(&container).await?;
        }
        if signal != SIGKILL {
            return self.signal(&container, &live, signal).await;
        }
        self.kill_live(&container, &live).await
    }

    pub(super) async fn kill_live(&self, container: &Container, live: &Arc<Live>) -> Result<()> {
        let gone = register(container, Condition::NotRunning);
        self.signal(container, live, SIGKILL).await?;
        match tokio::time::timeout(KILL_TIMEOUT, gone.done()).await {
            Ok(ended) => ended.map(drop),
            Err(_elapsed) => Err(Error::internal(format!(
                "container {} is still there {} s after SIGKILL: its process cannot be interrupted",
                container.id,
                KILL_TIMEOUT.as_secs()
            ))),
        }
    }

    /// Stops the container if it runs, and starts it.
    pub async fn restart(
        self: &Arc<Self>,
        reference: &str,
        timeout: Option<i64>,
        signal: Option<&str>,
    ) -> Result<()> {
        let container = self.find(reference)?;
        let signal = signal.filter(|signal| !signal.is_empty()).map(parse_signal).transpose()?;
        container.with(|inner| inner.restarting_by_request = true);
        let outcome = self.restart_container(&container, timeout, signal).await;
        container.with(|inner| inner.restarting_by_request = false);
        outcome?;
        self.publish(&container, "restart", &[]);
        Ok(())
    }

    async fn restart_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        timeout: Option<i64>,
        signal: Option<i32>,
    ) -> Result<()> {
        self.cancel_restart(container);
        if let Some(live) = container.live() {
            self.stop_live(container, &live, timeout, signal).await?;
            self.publish(container, "stop", &[]);
        }
        // The end of the run holds this lock until everything of it is cleaned up.
        let _lifecycle = container.lifecycle.lock().await;
        match self.start_locked(container).await {
            Err(error) if error.class() == crate::Class::NotModified => Ok(()),
            other => other,
        }
    }

    pub async fn pause(&self, reference: &str) -> Result<()> {
        let container = self.find(reference)?;
        let _lifecycle = container.lifecycle.lock().await;
        let live = container.running()?;
        match container.status() {
            Status::Paused => {
                return Err(Error::conflict(format!("container {} is already paused", container.id)));
            }
            Status::Restarting => {
                return Err(Error::conflict(format!(
                    "container {} is restarting, wait until the container is running",
                    container.id
                )));
            }
            _ => {}
        }
        live.ask(brigantine_shim::Client::pause).await.map_err(|error| failed("pause", &container, error))?;
        container.with(|inner| inner.record.state.status = Status::Paused);
        self.note(&container);
        self.publish(&container, "pause", &[]);
        Ok(())
    }

    pub async fn unpause(&self, reference: &str) -> Result<()> {
        let container = self.find(reference)?;
        let _lifecycle = container.lifecycle.lock().await;
        let live = container.live().filter(|_| container.status() == Status::Paused);
        // Docker's daemon calls this an internal error, which it is not.
        let live =
            live.ok_or_else(|| Error::conflict(format!("container {} is not paused", container.id)))?;
        self.thaw(&container, &live).await
    }

    async fn thaw(&self, container: &Container, live: &Arc<Live>) -> Result<()> {
        match live.ask(brigantine_shim::Client::resume).await {
            Ok(()) => {}
            Err(error) if error.is_gone() => return Ok(()),
            Err(error) => return Err(failed("unpause", container, error)),
        }
        container.with(|inner| {
            if inner.record.state.status == Status::Paused {
                inner.record.state.status = Status::Running;
            }
        });
        self.note(container);
        self.publish(container, "unpause", &[]);
        Ok(())
    }

    /// Sets the size of a running container's terminal.
    pub async fn resize(&self, reference: &str, height: u16, width: u16) -> Result<()> {
        let container = self.find(reference)?;
        let live = container.running()?;
        live.ask(move |client| client.resize(ConsoleSize { height, width }))
            .await
            .map_err(|error| failed("resize", &container, error))?;
        self.publish(&container, "resize", &[("height", height.to_string()), ("width", width.to_string())]);
        Ok(())
    }
}

/// Whether the container's first process is the init of its process id namespace.
fn is_init(record: &super::Record) -> bool {
    !matches!(record.host_config.pid_mode.as_deref(), Some(mode) if mode == "host" || mode.starts_with("container:"))
}

/// Whether a signal does anything to a process with this `/proc/PID/status` (proc(5)): it is caught, or blocked and may
/// be taken by `sigwait` or a signalfd, or its default action is. That of most is nothing for the init of a process id
/// namespace (`pid_namespaces(7)`).
fn hears(status: &str, signal: i32, is_init: bool) -> bool {
    if signal == SIGKILL {
        return true;
    }
    let in_set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let set = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        set.is_some_and(|set| set & (1 << (signal - 1)) != 0)
    };
    if in_set("SigCgt:") || in_set("SigBlk:") {
        return true;
    }
    !(is_init || in_set("SigIgn:"))
}

/// The shim's refusal, or the 409 of a container that has just ended.
fn failed(what: &str, container: &Container, error: ShimError) -> Error {
    if error.is_gone() {
        return Error::conflict(format!("container {} is not running", container.id));
    }
    Error::internal(format!("cannot {what} container {}", container.id)).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_without_effect_is_known() {
        let status =
            "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000001\nSigCgt:\t0000000000004000\n";
        assert!(hears(status, 15, true), "SIGTERM is caught");
        assert!(!hears(status, 2, true), "an init has no default action");
        assert!(hears(status, 2, false));
        assert!(!hears(status, 1, false), "SIGHUP is ignored");
        assert!(hears("SigBlk:\t0000000000004000\n", 15, true), "blocked: a signalfd may take it");
    }

    #[test]
    fn signals_by_any_name() {
        for (text, number) in [
            ("TERM", 15),
            ("sigterm", 15),
            ("SIGKILL", 9),
            ("9", 9),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(parse_signal(text).unwrap(), number, "{text}");
        }
        for text in ["", "0", "65", "SIGNOPE", "RTMIN-1", "RTMIN+x", "-9"] {
            assert_eq!(parse_signal(text).unwrap_err().to_string(), format!("invalid signal: {text}"));
        }
    }
}
