//! What is done for a container's process while that sets itself up, by whoever made its network namespace: its groups,
//! its filter, its record.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use brigantine_sys::spawn::ns;
use rustix::fs::{Mode, OFlags};

use super::setup::Setup;
use super::spawning::write_proc;
use super::{LateSeccomp, described, tell_start};
use crate::cgroup::{Cgroup, Making};
use crate::error::Error;
use crate::handover::{Hand, hand_over, send_network};
use crate::plan::{Message, Step};
use crate::spec::{LinuxSeccomp, Spec};
use crate::{netdev, seccomp};

pub(super) struct Meanwhile<'a, B> {
    pub setup: &'a Setup<'a>,
    pub group: &'a mut Making,
    pub spec: Arc<Spec>,
    pub net_devices: &'a [netdev::Move],
    pub hands: &'a [Hand],
    pub oom_score: Option<i32>,
    pub filter: Option<(brigantine_sys::seccomp::Writer, Option<LateSeccomp>)>,
    /// The process hears of its group later, after its hooks.
    pub hooks_first: bool,
    pub beside: B,
}

impl<B> Meanwhile<'_, B>
where
    B: FnOnce(i32, &Cgroup, Option<LinuxSeccomp>) -> Result<(), Error>,
{
    /// In the order in which the process needs it. `network`: what was made for it.
    pub fn run(mut self, network: Option<OwnedFd>) -> Result<(), Error> {
        let (pid, _) = self.setup.process;
        if let Some(network) = &network {
            send_network(self.setup.channel, network.as_fd())?;
        }
        if !self.net_devices.is_empty() {
            self.move_devices(network.as_ref())?;
        }
        let cgroup = self.group.finish()?;
        hand_over(self.hands, self.setup.channel)?;
        cgroup.attach(pid)?;
        if let Some(score) = self.oom_score {
            write_proc(pid, "oom_score_adj", &score.to_string())?;
        }
        if !self.hooks_first {
            self.setup.say(Message::InCgroup)?;
        }
        let read = match self.filter.take() {
            Some((writer, late)) => write_filter(writer, late, &self.spec)?,
            None => None,
        };
        drop(self.spec);
        (self.beside)(pid, cgroup, read)?;
        if self.setup.at_once {
            tell_start(self.setup.channel)?;
        }
        Ok(())
    }

    fn move_devices(&self, made: Option<&OwnedFd>) -> Result<(), Error> {
        let joined = self.setup.plan.steps.iter().find_map(|step| match step {
            Step::Enter { namespace, bit: ns::NETWORK, .. } => Some(namespace.as_fd()),
            _ => None,
        });
        let path = format!("/proc/{}/ns/net", self.setup.process.0);
        let own = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::os(format!("opening {path}"), e))?;
        let joined = joined.or(made.map(AsFd::as_fd));
        netdev::apply(self.net_devices, joined.unwrap_or(own.as_fd()))
    }
}

/// Compiles the filter and gives it to the process; the answer is what had to be read for that.
fn write_filter(
    writer: brigantine_sys::seccomp::Writer,
    late: Option<LateSeccomp>,
    spec: &Spec,
) -> Result<Option<LinuxSeccomp>, Error> {
    let read = late.map(|late| late.read()).transpose()?;
    let program = match read.as_ref().or_else(|| described(spec)) {
        Some(described) => seccomp::compile(described)?,
        None => None,
    };
    match program {
        Some(program) => writer
            .write(&program.instructions(), program.flags())
            .map_err(|e| Error::os("handing the container's process its seccomp filter", e))?,
        None => writer.write_none(),
    }
    Ok(read)
}
