//! Health checks: a command in the container, again and again; its verdict in inspect, lists and events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bollard_stubs::models::HealthConfig;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{Container, Containers, Inner};
use crate::clock::rfc3339_nano;
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    pub(super) fn begin_health_checks(self: &Arc<Self>, container: &Arc<Container>) {
        let (check, shell) = container
            .with(|inner| (inner.record.config.healthcheck.clone(), inner.record.config.shell.clone()));
        let Some(check) = check else { return };
        let Some(command) = command(&check, shell.as_deref()) else { return };
        let (containers, checked) = (Arc::clone(self), Arc::clone(container));
        let task = tokio::spawn(async move { containers.check_health(checked, check, command).await });
        container.with(|inner| {
            let old = inner.health.replace(Health {
                status: Status::Starting,
                streak: 0,
                log: VecDeque::new(),
                task: Some(task),
            });
            if let Some(task) = old.and_then(|old| old.task) {
                task.abort();
            }
        });
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
        let begun = tokio::time::Instant::now();
        loop {
            let starting = container.with(|inner| inner.health_status() == "starting");
            let in_start_period = starting && begun.elapsed() < start_period;
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
                } else if !(health.status == Status::Starting && begun.elapsed() < start_period) {
                    health.streak += 1;
                    if health.streak >= retries {
                        health.status = Status::Unhealthy;
                    }
                }
                (health.status != before).then_some(health.status)
            });
            if let Some(status) = changed {
                self.publish(&container, format!("health_status: {}", status.as_str()), &[]);
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
