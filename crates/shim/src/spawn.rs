//! Starting a monitor: execute the sealed runtime, hand it its configuration and descriptors, wait for its verdict.
//!
//! The new process gets one descriptor beyond `/dev/null`: a socket as its standard input. Over it go the
//! configuration and, as control messages, all other descriptors, so nothing depends on numbers and nothing else
//! leaks. The standard library starts it with `posix_spawn` (no copy of a large daemon's page tables). It forks once
//! and its first half is reaped here: the monitor is nobody's child and the caller has nothing to reap.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use brigantine_sys::SealedExe;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};

use crate::config::{AttachOptions, Config, Inherited};
use crate::protocol::{self, Birth, Failure};
use crate::recover;
use crate::time::Timestamp;

/// Descriptors per control message (the kernel's own limit is 253).
pub(crate) const FDS_PER_MESSAGE: usize = 128;

/// A monitor whose container runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spawned {
    /// The monitor's process. It is not a child of the caller.
    pub shim_pid: i32,
    /// The container's first process, as the host counts.
    pub container_pid: i32,
    /// When the program was executed.
    pub started_at: Timestamp,
}

/// A container could not be started. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The runtime's verdict; its text and kind are for the user.
    #[error(transparent)]
    Launch(#[from] Failure),
    /// The monitor could not be started or talked to.
    #[error("start a monitor: {action}")]
    Monitor {
        /// Which step.
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// The monitor went away without a verdict (killed, or crashed).
    #[error("the container's monitor died while starting it")]
    Died,
}

/// The first message to a monitor. The descriptors follow in this order: events, netns, attach, layers, held.
#[derive(Serialize)]
struct BootstrapRef<'a> {
    config: &'a Config,
    events: bool,
    netns: bool,
    attach: Vec<&'a AttachOptions>,
    layers: Vec<usize>,
    held: usize,
}

/// The same, as the monitor reads it.
#[derive(Deserialize)]
pub(crate) struct Bootstrap {
    pub(crate) config: Config,
    pub(crate) events: bool,
    pub(crate) netns: bool,
    pub(crate) attach: Vec<AttachOptions>,
    #[serde(default)]
    pub(crate) layers: Vec<usize>,
    pub(crate) held: usize,
}

/// Start a container and its monitor. Returns when the program has been executed in the container, or with the reason
/// why that could not be done; then no process, control group, socket or directory is left.
pub fn spawn(exe: &SealedExe, config: &Config, inherited: Inherited) -> Result<Spawned, SpawnError> {
    let step = |action| move |source: io::Error| SpawnError::Monitor { action, source };
    let (ours, theirs) = UnixStream::pair().map_err(step("make a socket pair"))?;
    let mut first_half = {
        let mut command = Command::new(exe.path());
        command.arg0("brig-shim").arg("shim").arg(&config.id).env_clear();
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map_err(step("execute the runtime"))?
    };
    let sent = send(&ours, config, inherited);
    let reaped = first_half.wait();
    let verdict = protocol::read_message(&ours, protocol::MAX_REPLY);
    let verdict = match verdict {
        Ok(Some(body)) => serde_json::from_slice::<Birth>(&body).map_err(io::Error::from),
        Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(e) => Err(e),
    };
    match verdict {
        Ok(Birth::Started { shim_pid, container_pid, started_at }) => {
            Ok(Spawned { shim_pid, container_pid, started_at })
        }
        Ok(Birth::Failed(failure)) => Err(failure.into()),
        Err(source) => {
            recover::bury_unborn(config);
            sent.map_err(step("hand over the configuration"))?;
            reaped.map_err(step("reap the first half"))?;
            if matches!(source.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) {
                return Err(SpawnError::Died);
            }
            Err(step("read the verdict")(source))
        }
    }
}

fn send(socket: &UnixStream, config: &Config, inherited: Inherited) -> io::Result<()> {
    let bootstrap = BootstrapRef {
        config,
        events: inherited.events.is_some(),
        netns: inherited.netns.is_some(),
        attach: inherited.attach.iter().map(|a| &a.options).collect(),
        layers: inherited.layers.iter().map(|(position, _)| *position).collect(),
        held: inherited.held.len(),
    };
    protocol::write_message(socket, &bootstrap)?;
    let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
    fds.extend(inherited.events.as_ref().map(AsFd::as_fd));
    fds.extend(inherited.netns.as_ref().map(AsFd::as_fd));
    fds.extend(inherited.attach.iter().map(|a| a.stream.as_fd()));
    fds.extend(inherited.layers.iter().map(|(_, mount)| mount.as_fd()));
    fds.extend(inherited.held.iter().map(AsFd::as_fd));
    for chunk in fds.chunks(FDS_PER_MESSAGE) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(chunk)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(socket, &[IoSlice::new(b"f")], &mut control, SendFlags::NOSIGNAL)
        })?;
    }
    Ok(())
}
