//! Health checks: a command in the container, again and again; its verdict in inspect, lists and events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bollard_stubs::models::{HealthConfig, HostConfig};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{Container, Containers, Inner};
use crate::clock::rfc3339_nano;
use crate::error::Context;
use crate::{Error, Result};

const INTERVAL: Duration = Duration::from_secs(30);
const TIMEOUT: Duration = Duration::from_secs(30);
const START_INTERVAL: Duration = Duration::from_secs(5);
const RETRIES: i64 = 3;
/// Verdicts kept, and bytes of output of each.
const KEPT: usize = 5;
const OUTPUT: usize = 4096;
/// The least an interval may be, in nanoseconds.
const LEAST: i64 = 1_000_000;

/// What is known of a container's health.
#[derive(Debug)]
pub(crate) struct Health {
    status: Status,
    streak: i64,
    log: VecDeque<Value>,
    task: Option<JoinHandle<()>>,
}

/// What of it a restarted daemon goes on with.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    status: Status,
    streak: i64,
    log: VecDeque<Value>,
}

/// The file of it in the monitor's directory: it lives as long as the run.
const FILE: &str = "health.json";

/// The annotation that says what happens to a container that becomes unhealthy.
pub const ON_FAILURE: &str = "brigantine.health-on-failure";

/// What happens to a container that becomes unhealthy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnFailure {
    Nothing,
    Restart,
    Stop,
    Kill,
}

/// Checks what is asked for, or nothing.
pub(super) fn on_failure(host: &HostConfig) -> Result<()> {
    asked(host).map(drop)
}

fn asked(host: &HostConfig) -> Result<OnFailure> {
    let word = host.annotations.as_ref().and_then(|all| all.get(ON_FAILURE)).map(String::as_str);
    Ok(match word {
        None | Some("" | "none") => OnFailure::Nothing,
        Some("restart") => OnFailure::Restart,
        Some("stop") => OnFailure::Stop,
        Some("kill") => OnFailure::Kill,
        Some(other) => {
            return Err(Error::invalid(format!(
                "invalid annotation {ON_FAILURE}={other}: expected none, restart, stop or kill"
            )));
        }
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Starting,
    Healthy,
    Unhealthy,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// The command of a check; `None` when there is none.
fn command(check: &HealthConfig, shell: Option<&[String]>) -> Option<Vec<String>> {
    let test = check.test.as_deref()?;
    match test.first().map(String::as_str)? {
        "CMD" if test.len() > 1 => Some(test[1..].to_vec()),
        "CMD-SHELL" if test.len() > 1 => {
            let mut command = match shell {
                Some(shell) if !shell.is_empty() => shell.to_vec(),
                _ => vec!["/bin/sh".to_owned(), "-c".to_owned()],
            };
            command.push(test[1..].join(" "));
            Some(command)
        }
        _ => None,
    }
}

/// Whether a check names a command that nobody can run.
pub(super) fn is_bad(check: &HealthConfig) -> bool {
    let word = check.test.as_deref().and_then(<[String]>::first).map(String::as_str);
    !matches!(word, None | Some("NONE" | "")) && command(check, None).is_none()
}

/// Checks the times of a request.
pub(super) fn validate(check: &HealthConfig) -> Result<()> {
    for (name, value) in [
        ("Interval", check.interval),
        ("Timeout", check.timeout),
        ("StartPeriod", check.start_period),
        ("StartInterval", check.start_interval),
    ] {
        if value.is_some_and(|value| value != 0 && value < LEAST) {
            return Err(Error::invalid(format!("{name} in Healthcheck cannot be less than 1ms")));
        }
    }
    if check.retries.is_some_and(|retries| retries < 0) {
        return Err(Error::invalid("Retries in Healthcheck cannot be negative"));
    }
    Ok(())
}

fn time(nanos: Option<i64>, default: Duration) -> Duration {
    nanos
        .and_then(|nanos| u64::try_from(nanos).ok())
        .filter(|nanos| *nanos > 0)
        .map_or(default, Duration::from_nanos)
}

impl Inner {
    /// `none` without a check.
    pub(super) fn health_status(&self) -> &'static str {
        self.health.as_ref().map_or("none", |health| health.status.as_str())
    }

    /// `State.Health`; `None` without a check.
    pub(super) fn health_document(&self) -> Option<Value> {
        let health = self.health.as_ref()?;
        Some(json!({ "Status": health.status.as_str(), "FailingStreak": health.streak, "Log": health.log }))
    }
}

impl Containers {
    /// Begins to check a container that has started, or goes on with one that a former daemon has checked.
    pub(super) fn begin_health_checks(self: &Arc<Self>, container: &Arc<Container>) {
        let (check, shell) = container
            .with(|inner| (inner.record.config.healthcheck.clone(), inner.record.config.shell.clone()));
        let Some(check) = check else { return };
        let Some(command) = command(&check, shell.as_deref()) else { return };
        let kept = std::fs::read(self.run_dir(&container.id).join(FILE)).ok();
        let kept = kept.and_then(|text| serde_json::from_slice::<Kept>(&text).ok());
        let kept = kept.unwrap_or(Kept { status: Status::Starting, streak: 0, log: VecDeque::new() });
        let old = container.with(|inner| {
            inner.health.replace(Health {
                status: kept.status,
                streak: kept.streak,
                log: kept.log,
                task: None,
            })
        });
        if let Some(task) = old.and_then(|old| old.task) {
            task.abort();
        }
        let (containers, checked) = (Arc::clone(self), Arc::clone(container));
        let task = tokio::spawn(async move { containers.check_health(checked, check, command).await });
        container.with(|inner| {
            if let Some(health) = &mut inner.health {
                health.task = Some(task);
            }
        });
    }

    /// Leaves a note for the next daemon.
    async fn keep_health(&self, container: &Container) {
        let kept = container.with(|inner| {
            let health = inner.health.as_ref()?;
            let kept = Kept { status: health.status, streak: health.streak, log: health.log.clone() };
            serde_json::to_vec(&kept).ok()
        });
        let Some(text) = kept else { return };
        let dir = self.run_dir(&container.id);
        let written = crate::blocking(move || {
            let (path, new) = (dir.join(FILE), dir.join("health.json.new"));
            let what = || format!("write {}", path.display());
            std::fs::write(&new, text).doing(what)?;
            std::fs::rename(&new, &path).doing(what)
        });
        if let Err(error) = written.await
            && container.live().is_some()
        {
            tracing::warn!(container = container.id, error = error.report(), "note the container's health");
        }
    }

    /// Does to a container that has become unhealthy what it asked for.
    fn react(self: &Arc<Self>, container: &Arc<Container>) {
        let wanted = container.with(|inner| asked(&inner.record.host_config)).unwrap_or(OnFailure::Nothing);
        if wanted == OnFailure::Nothing {
            return;
        }
        tracing::info!(container = container.id, ?wanted, "the container is unhealthy");
        let (containers, container) = (Arc::clone(self), Arc::clone(container));
        // On a task of its own: the end of the run ends the one that checks.
        tokio::spawn(async move {
            let done = match wanted {
                OnFailure::Nothing => Ok(()),
                OnFailure::Restart => containers.restart(&container.id, None, None).await,
                OnFailure::Stop => containers.stop(&container.id, None, None).await,
                OnFailure::Kill => containers.kill_unhealthy(&container).await,
            };
            if let Err(error) = done {
                tracing::warn!(container = container.id, error = error.report(), "react to bad health");
            }
        });
    }

    /// Its restart policy goes on with it.
    async fn kill_unhealthy(&self, container: &Container) -> Result<()> {
        match container.live() {
            Some(live) => self.kill_live(container, &live).await,
            None => Ok(()),
        }
    }

    pub(super) fn end_health_checks(container: &Container) {
        container.with(|inner| {
            if let Some(task) = inner.health.as_mut().and_then(|health| health.task.take()) {
                task.abort();
            }
        });
    }

    async fn check_health(
        self: Arc<Self>,
        container: Arc<Container>,
        check: HealthConfig,
        command: Vec<String>,
    ) {
        let interval = time(check.interval, INTERVAL);
        let patience = time(check.timeout, TIMEOUT);
        let start_period = time(check.start_period, Duration::ZERO);
        let start_interval = time(check.start_interval, START_INTERVAL);
        let retries = check.retries.filter(|retries| *retries > 0).unwrap_or(RETRIES);
        // The start period counts from the start, whoever was watching.
        let started = container.live().map_or_else(Timestamp::now, |live| live.started_at);
        let running_for = || Duration::try_from(Timestamp::now().duration_since(started)).unwrap_or_default();
        loop {
            let starting = container.with(|inner| inner.health_status() == "starting");
            let in_start_period = starting && running_for() < start_period;
            tokio::time::sleep(if in_start_period { start_interval } else { interval }).await;
            if container.live().is_none() {
                return;
            }
            if container.status() == super::Status::Paused {
                continue;
            }
            let start = Timestamp::now();
            let outcome = self.run_probe(&container, command.clone(), OUTPUT, patience).await;
            let (exit_code, output) = match outcome {
                Ok(Some((exit_code, output))) => (exit_code, output),
                Ok(None) => (-1, format!("Health check exceeded timeout ({patience:?})")),
                Err(_) if container.live().is_none() => return,
                Err(error) => (-1, error.report()),
            };
            let changed = container.with(|inner| {
                let health = inner.health.as_mut()?;
                health.log.push_back(json!({
                    "Start": rfc3339_nano(start), "End": rfc3339_nano(Timestamp::now()), "ExitCode": exit_code,
                    "Output": output,
                }));
                if health.log.len() > KEPT {
                    health.log.pop_front();
                }
                let before = health.status;
                if exit_code == 0 {
                    health.streak = 0;
                    health.status = Status::Healthy;
                } else if !(health.status == Status::Starting && running_for() < start_period) {
                    health.streak += 1;
                    if health.streak >= retries {
                        health.status = Status::Unhealthy;
                    }
                }
                (health.status != before).then_some(health.status)
            });
            self.keep_health(&container).await;
            if let Some(status) = changed {
                self.publish(&container, format!("health_status: {}", status.as_str()), &[]);
                if status == Status::Unhealthy {
                    self.react(&container);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(test: &[&str]) -> HealthConfig {
        HealthConfig { test: Some(test.iter().map(|t| (*t).to_owned()).collect()), ..Default::default() }
    }

    #[test]
    fn commands_in_dockers_three_forms() {
        assert_eq!(command(&check(&["CMD", "a", "b"]), None).unwrap(), ["a", "b"]);
        assert_eq!(command(&check(&["CMD-SHELL", "a b"]), None).unwrap(), ["/bin/sh", "-c", "a b"]);
        assert_eq!(command(&check(&["NONE"]), None), None);
        assert!(is_bad(&check(&["WHAT", "x"])) && !is_bad(&check(&["NONE"])));
    }

    #[test]
    fn times_below_a_millisecond_are_refused() {
        let odd = HealthConfig { interval: Some(5), ..Default::default() };
        assert_eq!(
            validate(&odd).unwrap_err().to_string(),
            "Interval in Healthcheck cannot be less than 1ms"
        );
    }
}
