//! What is done for a container's process beside it, by whoever makes its network namespace: its groups, before it is
//! there; its filter and its record, while it sets itself up.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use brigantine_sys::netns::{Asked, Coming};
use brigantine_sys::spawn::ns;
use rustix::fs::{Mode, OFlags};

use super::setup::Setup;
use super::spawning::write_proc;
use super::{described, tell_start};
use crate::cgroup::{Cgroup, Making};
use crate::error::Error;
use crate::handover::{Hand, hand_over, send_network};
use crate::netdev;
use crate::plan::{Message, Step};
use crate::seccomp::{self, LateSeccomp};
use crate::spec::Spec;

/// A container's groups, or as much of them as was made, and whether they are complete and handed over.
pub(super) type Made = (Making, Result<(), Error>);

/// What is done by the thread that makes a network namespace, or else by who wants it.
pub(super) enum Work<T> {
    Queued(Asked<T>),
    Mine(Box<dyn FnOnce() -> T + Send>),
}

impl<T: Send + 'static> Work<T> {
    /// The task gets the namespace that was made for the container, if one was.
    fn begin(
        coming: Option<&Coming>,
        task: impl FnOnce(Option<BorrowedFd<'_>>) -> T + Send + 'static,
    ) -> Self {
        match coming {
            Some(coming) => Self::Queued(coming.queue(|made| task(made.as_ref().ok().map(AsFd::as_fd)))),
            None => Self::Mine(Box::new(|| task(None))),
        }
    }

    fn get(self) -> Result<T, Error> {
        match self {
            Self::Queued(asked) => {
                asked.get().ok_or_else(|| Error::invalid("a thread of the runtime's has gone"))
            }
            Self::Mine(task) => Ok(task()),
        }
    }
}

/// Begins to make the groups, before there is a process. It finds its network namespace in `channel` before that.
pub(super) fn make_groups(mut making: Making, coming: Option<&Coming>, channel: &Arc<OwnedFd>) -> Work<Made> {
    let channel = Arc::clone(channel);
    Work::begin(coming, move |network| {
        let sent = network.map_or(Ok(()), |network| send_network((*channel).as_fd(), network));
        let done = sent.and_then(|()| making.finish().map(drop));
        (making, done)
    })
}

/// … and gives the process what it gets of them.
pub(super) fn hand_groups_over(
    groups: Work<Made>,
    hands: Vec<Hand>,
    coming: Option<&Coming>,
    channel: &Arc<OwnedFd>,
) -> Work<Result<Made, Error>> {
    let channel = Arc::clone(channel);
    Work::begin(coming, move |_network| {
        let (making, done) = groups.get()?;
        Ok((making, done.and_then(|()| hand_over(&hands, (*channel).as_fd()))))
    })
}

pub(super) struct Meanwhile<'a, B> {
    pub setup: &'a Setup<'a>,
    /// They are taken from here …
    pub groups: &'a mut Option<Work<Result<Made, Error>>>,
    /// … and stay there.
    pub group: &'a mut Option<Making>,
    pub spec: Arc<Spec>,
    pub net_devices: &'a [netdev::Move],
    pub oom_score: Option<i32>,
    pub filter: Option<(brigantine_sys::seccomp::Writer, Option<LateSeccomp>)>,
    /// The process hears of its group later, after its hooks.
    pub hooks_first: bool,
    pub beside: B,
}

impl<B> Meanwhile<'_, B>
where
    B: FnOnce(i32, &Cgroup) -> Result<(), Error>,
{
    /// In the order in which the process needs it. `network`: what was made for it.
    pub fn run(self, network: Result<Option<&OwnedFd>, Error>) -> Result<(), Error> {
        let (pid, _) = self.setup.process;
        // Whatever fails: a group that the process is in is removed after it has been ended, not here.
        let groups = self.groups.take().ok_or_else(|| Error::invalid("the groups are somebody else's"))?;
        let (making, done) = groups.get()??;
        let cgroup = self.group.insert(making).planned();
        let network = network?;
        if !self.net_devices.is_empty() {
            move_devices(self.setup, self.net_devices, network)?;
        }
        done?;
        cgroup.attach(pid)?;
        if let Some(score) = self.oom_score {
            write_proc(pid, "oom_score_adj", &score.to_string())?;
        }
        if !self.hooks_first {
            self.setup.say(Message::InCgroup)?;
        }
        if let Some((writer, late)) = self.filter {
            write_filter(writer, late, &self.spec)?;
        }
        drop(self.spec);
        (self.beside)(pid, cgroup)?;
        if self.setup.at_once {
            tell_start(self.setup.channel)?;
        }
        Ok(())
    }
}

fn move_devices(setup: &Setup<'_>, devices: &[netdev::Move], made: Option<&OwnedFd>) -> Result<(), Error> {
    let joined = setup.plan.steps.iter().find_map(|step| match step {
        Step::Enter { namespace, bit: ns::NETWORK, .. } => Some(namespace.as_fd()),
        _ => None,
    });
    let path = format!("/proc/{}/ns/net", setup.process.0);
    let own = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::os(format!("opening {path}"), e))?;
    let joined = joined.or(made.map(AsFd::as_fd));
    netdev::apply(devices, joined.unwrap_or(own.as_fd()))
}

/// Compiles the filter, unless that was done before, and gives it to the process.
fn write_filter(
    writer: brigantine_sys::seccomp::Writer,
    late: Option<LateSeccomp>,
    spec: &Spec,
) -> Result<(), Error> {
    let program = match (late, described(spec)) {
        (Some(late), _) => late.program()?,
        (None, Some(described)) => seccomp::compile(described)?,
        (None, None) => None,
    };
    let Some(program) = program else {
        writer.write_none();
        return Ok(());
    };
    writer
        .write(&program.instructions(), program.flags())
        .map_err(|e| Error::os("handing the container's process its seccomp filter", e))
}
