//! What follows the end of a container's process, in the promised order: state, `die`, waiters, cleaning up, then
//! removal or a restart by policy.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use bollard_stubs::models::RestartPolicyNameEnum;
use brigantine_shim::{Event, ExitRecord, Found};
use jiff::Timestamp;
use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;

use super::{Condition, Container, Containers, Live, Status};
use crate::Result;

/// The first wait before a restart; each further one is twice as long.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_mins(1);
/// A run of this length makes the next wait the first one again.
const LONG_RUN: Duration = Duration::from_secs(10);
/// No message of a shim is longer.
const MAX_MESSAGE: usize = 1 << 20;

impl Containers {
    /// Follows a shim's events until the container has ended.
    pub(super) fn watch(self: &Arc<Self>, container: Arc<Container>, live: Arc<Live>, events: UnixStream) {
        let containers = Arc::clone(self);
        tokio::spawn(async move {
            let exit = match containers.follow(&container, events).await {
                Ok(Some(exit)) => exit,
                Ok(None) => containers.lost(&container).await,
                Err(error) => {
                    tracing::warn!(container = container.id, %error, "read the monitor's events");
                    containers.lost(&container).await
                }
            };
            containers.ended(&container, &live, exit).await;
        });
    }

    async fn follow(&self, container: &Container, events: UnixStream) -> io::Result<Option<ExitRecord>> {
        events.set_nonblocking(true)?;
        let mut events = tokio::net::UnixStream::from_std(events)?;
        loop {
            let mut length = [0_u8; 4];
            match events.read_exact(&mut length).await {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            }
            let length = u32::from_be_bytes(length) as usize;
            if length > MAX_MESSAGE {
                return Err(io::Error::other(format!("a message of {length} bytes")));
            }
            let mut body = vec![0; length];
            events.read_exact(&mut body).await?;
            match Event::decode(&body)? {
                Event::Exited(exit) => return Ok(Some(exit)),
                Event::ExecExited(record) => self.exec_ended(container, &record),
                Event::Oom => {
                    container.with(|inner| inner.record.state.oom_killed = true);
                    self.publish(container, "oom", &[]);
                }
            }
        }
    }

    /// The monitor has gone without a word: what it left, or what is cleaned up after it, says how it ended.
    async fn lost(&self, container: &Container) -> ExitRecord {
        let (dir, exit_path) = (self.run_dir(&container.id), self.exit_path(&container.id));
        let found = tokio::task::spawn_blocking(move || brigantine_shim::find(&dir, &exit_path)).await;
        match found {
            Ok(Ok(Found::Exited(exit))) => return exit,
            Ok(Ok(Found::Monitored(_) | Found::Nothing)) => {
                tracing::error!(container = container.id, "the container's monitor broke off its events");
            }
            Ok(Err(error)) => {
                tracing::error!(container = container.id, %error, "clean up after a lost monitor");
            }
            Err(error) => tracing::error!(container = container.id, %error, "clean up after a lost monitor"),
        }
        let now = brigantine_shim::Timestamp::now();
        ExitRecord {
            exit_code: 137,
            signal: Some(9),
            oom_killed: false,
            container_pid: 0,
            started_at: now.clone(),
            finished_at: now,
            monitor_lost: true,
        }
    }

    /// Everything that follows an exit.
    async fn ended(self: &Arc<Self>, container: &Arc<Container>, live: &Arc<Live>, exit: ExitRecord) {
        let _lifecycle = container.lifecycle.lock().await;
        Self::end_health_checks(container);
        let finished = exit.finished_at.as_str().parse().unwrap_or_else(|_unreadable| Timestamp::now());
        let restart = container.with(|inner| {
            inner.live = None;
            let state = &mut inner.record.state;
            state.pid = 0;
            state.exit_code = exit.exit_code;
            state.oom_killed |= exit.oom_killed;
            state.finished_at = Some(finished);
            let restart = inner.next_restart(exit.exit_code, live.started_at);
            inner.record.state.status = if restart.is_some() { Status::Restarting } else { Status::Exited };
            restart
        });
        self.note(container);
        let ran = std::time::Duration::try_from(finished.duration_since(live.started_at)).unwrap_or_default();
        self.publish(
            container,
            "die",
            &[("exitCode", exit.exit_code.to_string()), ("execDuration", ran.as_secs().to_string())],
        );
        container.with(|inner| inner.wake(&[Condition::NotRunning, Condition::NextExit]));
        self.clean_up(container, live).await;
        self.forget_execs(&container.id);
        if let Some(delay) = restart {
            self.restart_later(container, delay);
            return;
        }
        let remove = container.with(|inner| inner.record.auto_remove() && !inner.restarting_by_request);
        if remove && let Err(error) = self.remove_locked(container, true).await {
            tracing::warn!(
                container = container.id,
                error = error.report(),
                "remove a container that has ended"
            );
        }
    }

    /// Gives back what the run had: firewall elements, addresses, the monitor with its control group.
    pub(super) async fn clean_up(&self, container: &Container, live: &Arc<Live>) {
        let (plumbing, live, id, dir) =
            (self.networks.plumbing(), Arc::clone(live), container.id.clone(), self.run_dir(&container.id));
        self.give_addresses_back(&live);
        let volumes = Arc::clone(&self.volumes);
        for (network, endpoint) in &live.sandbox().endpoints {
            self.network_event(container, "disconnect", network, endpoint);
        }
        self.volumes.tell_use("unmount", &container.id, &container.record().mounts);
        let done = tokio::task::spawn_blocking(move || {
            if super::names::is_helped(&live) {
                plumbing.forget(&id);
            }
            if let Err(error) = plumbing.disconnect(&id) {
                tracing::warn!(container = id, error = error.report(), "disconnect the network");
            }
            use brigantine_shim::ClientError;
            match live.client.release() {
                Ok(()) => {}
                // It had nobody to wait for any more and left by itself.
                Err(error @ (ClientError::Unreachable { .. } | ClientError::Broken { .. })) => {
                    tracing::debug!(container = id, %error, "the container's monitor has left");
                }
                Err(error) => tracing::warn!(container = id, %error, "release the container's monitor"),
            }
            volumes.unmount_for(&id);
            super::borrowed::unmount_all(&dir);
            if let Err(error) = crate::volumes::remove_tree(&dir) {
                tracing::warn!(container = id, error = error.report(), "remove the monitor's directory");
            }
        })
        .await;
        if let Err(error) = done {
            tracing::error!(container = container.id, %error, "clean up after a container");
        }
    }

    pub(super) fn give_addresses_back(&self, live: &Live) {
        let sandbox = live.sandbox();
        let Some(attachment) = &sandbox.attachment else { return };
        for (network, interface) in sandbox.networks.iter().zip(&attachment.interfaces) {
            if let Ok(network) = self.networks.find(network) {
                for net in &interface.addresses {
                    self.networks.give_address_back(&network.id, net.addr());
                }
            }
        }
    }

    /// Starts the container again after `delay`, unless somebody stops, starts or removes it first.
    fn restart_later(self: &Arc<Self>, container: &Arc<Container>, delay: Duration) {
        let (cancel, cancelled) = oneshot::channel();
        container.with(|inner| inner.restart.cancel = Some(cancel));
        let (containers, container) = (Arc::clone(self), Arc::clone(container));
        tokio::spawn(async move {
            tokio::select! {
                _ = cancelled => return,
                () = tokio::time::sleep(delay) => {}
            }
            if let Err(error) = containers.restart_now(&container).await {
                tracing::warn!(container = container.id, error = error.report(), "restart by policy");
            }
        });
    }

    async fn restart_now(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let _lifecycle = container.lifecycle.lock().await;
        let still = container.with(|inner| {
            let still = inner.record.state.status == Status::Restarting && inner.restart.cancel.is_some();
            if still {
                inner.record.restart_count += 1;
            }
            still
        });
        if still { self.start_locked(container).await } else { Ok(()) }
    }
}

impl super::Inner {
    /// How long to wait before the policy's next start; `None` for no restart.
    fn next_restart(&mut self, exit_code: i32, started_at: Timestamp) -> Option<Duration> {
        if self.stop_requested {
            self.restart.delay = Duration::ZERO;
            return None;
        }
        let policy = self.record.host_config.restart_policy.as_ref()?;
        let wanted = match policy.name? {
            RestartPolicyNameEnum::ALWAYS | RestartPolicyNameEnum::UNLESS_STOPPED => true,
            RestartPolicyNameEnum::ON_FAILURE => {
                let most = policy.maximum_retry_count.unwrap_or_default();
                exit_code != 0 && (most == 0 || self.restart.failures < most)
            }
            RestartPolicyNameEnum::EMPTY | RestartPolicyNameEnum::NO => false,
        };
        if !wanted {
            self.restart.failures = 0;
            return None;
        }
        self.restart.failures = if exit_code == 0 { 0 } else { self.restart.failures + 1 };
        let ran = Duration::try_from(Timestamp::now().duration_since(started_at)).unwrap_or_default();
        self.restart.delay = if ran >= LONG_RUN || self.restart.delay.is_zero() {
            FIRST_DELAY
        } else {
            (self.restart.delay * 2).min(LONGEST_DELAY)
        };
        Some(self.restart.delay)
    }
}
