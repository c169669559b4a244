//! Groups that belong to systemd: a transient scope per container, asked for over D-Bus. systemd keeps
//! what it is told when it reloads, so limits go to it as properties and to the group's files as well.

mod bus;
mod properties;

use std::os::fd::{AsFd, OwnedFd};

use brigantine_sys::spawn;
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind};
use crate::spec::LinuxResources;
use bus::{Bus, Value, Writer};

const SYSTEMD: (&str, &str, &str) =
    ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager");

/// A container's unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Unit {
    name: String,
    slice: String,
    /// Of the user's own manager.
    user: bool,
}

/// Keeps a new scope, which cannot be without a process, until the container's is in it.
#[derive(Debug)]
pub(crate) struct Placeholder {
    pub pid: i32,
    pidfd: OwnedFd,
    _pipe: OwnedFd,
}

impl Placeholder {
    fn new() -> Result<Self, Error> {
        let failed = |e| Error::os("making a process for the scope", e);
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(failed)?;
        let mut write = Some(write);
        let child = spawn::clone(0, None, || {
            drop(write.take());
            // It ends with its maker at the latest.
            rustix::io::read(&read, &mut [0_u8; 1]).map_or(1, |_| 0)
        })
        .map_err(failed)?;
        let pipe = write.ok_or_else(|| failed(rustix::io::Errno::BADF))?;
        Ok(Self { pid: child.pid, pidfd: child.pidfd, _pipe: pipe })
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        // Gone already or going: both are what is wanted.
        pidfd_send_signal(&self.pidfd, Signal::KILL).ok();
        while let Err(rustix::io::Errno::INTR) =
            waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED)
        {}
    }
}

fn is_slice(name: &str) -> bool {
    name.strip_suffix(".slice").is_some()
}

impl Unit {
    /// From `slice:prefix:name`, as containers' specs have it for this driver.
    pub fn parse(path: Option<&str>, id: &str, user: bool) -> Result<Self, Error> {
        let default = if user { "user.slice" } else { "system.slice" };
        let path = path.filter(|p| !p.is_empty());
        let (slice, prefix, name) = match path.map(|p| p.split(':').collect::<Vec<_>>()).as_deref() {
            None => ("", "brigantine", id),
            Some(&[slice, prefix, name]) => (slice, prefix, name),
            Some(_) => {
                return Err(Error::invalid(format!(
                    "cgroupsPath {:?} is not of the form slice:prefix:name, which the systemd driver needs",
                    path.unwrap_or_default()
                )));
            }
        };
        let slice = if slice.is_empty() { default } else { slice };
        let plain = |text: &str| {
            let letters = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
            !text.is_empty() && text.len() < 250 && text.chars().all(letters)
        };
        if !plain(slice)
            || !is_slice(slice)
            || slice.contains("--")
            || slice.starts_with('-') && slice != "-.slice"
        {
            return Err(Error::invalid(format!("{slice:?} is not the name of a slice")));
        }
        let name = match name {
            name if is_slice(name) => name.to_owned(),
            name if prefix.is_empty() => format!("{name}.scope"),
            name => format!("{prefix}-{name}.scope"),
        };
        if !plain(&name) {
            return Err(Error::invalid(format!("{name:?} is not a unit's name")));
        }
        Ok(Self { name, slice: slice.to_owned(), user })
    }

    fn bus(&self) -> Result<Bus, Error> {
        let given = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let address = if self.user {
            given("DBUS_SESSION_BUS_ADDRESS")
                .or_else(|| given("XDG_RUNTIME_DIR").map(|dir| format!("{dir}/bus")))
                .ok_or_else(|| {
                    Error::unsupported(
                        "the systemd cgroup driver needs the user's message bus: neither DBUS_SESSION_BUS_ADDRESS \
                         nor XDG_RUNTIME_DIR is set",
                    )
                })?
        } else {
            given("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_else(|| "/run/dbus/system_bus_socket".to_owned())
        };
        let mut bus = Bus::connect(&address)?;
        // Signals of jobs come to subscribers only.
        let rule = "type='signal',interface='org.freedesktop.systemd1.Manager',member='JobRemoved'";
        let own = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus");
        let mut body = Writer::default();
        body.text(rule);
        let refused = |what: &'static str| move |r: bus::Refusal| r.into_error(what);
        bus.call(own, "AddMatch", "s", &body)?.map_err(refused("listening to systemd"))?;
        match bus.call(SYSTEMD, "Subscribe", "", &Writer::default())? {
            Err(r) if !r.name.ends_with("AlreadySubscribed") => Err(r.into_error("listening to systemd")),
            _ => Ok(bus),
        }
    }

    /// Starts the unit with a process of ours in it. `annotations`: those of the spec, some of which are
    /// properties.
    pub fn start(
        &self,
        description: &str,
        resources: Option<&LinuxResources>,
        annotations: &[(String, String)],
        unified: bool,
    ) -> Result<Placeholder, Error> {
        let placeholder = Placeholder::new()?;
        let mut bus = self.bus()?;
        let mut all = vec![
            ("Description".to_owned(), Value::Text(description.to_owned())),
            ("Slice".to_owned(), Value::Text(self.slice.clone())),
            ("Delegate".to_owned(), Value::Bool(true)),
            ("DefaultDependencies".to_owned(), Value::Bool(false)),
            ("PIDs".to_owned(), Value::Numbers(vec![placeholder.pid as u32])),
        ];
        let io = if unified { "IOAccounting" } else { "BlockIOAccounting" };
        for name in ["MemoryAccounting", "CPUAccounting", "TasksAccounting", io] {
            all.push((name.to_owned(), Value::Bool(true)));
        }
        if let Some(resources) = resources {
            all.extend(properties::of_resources(resources, unified)?);
        }
        for (name, value) in annotations {
            if let Some(name) = name.strip_prefix("org.systemd.property.") {
                all.push(properties::of_annotation(name, value)?);
            }
        }
        let what = || format!("starting unit {:?}", self.name);
        let mut again = true;
        let job = loop {
            let mut body = Writer::default();
            body.text(&self.name).text("replace").properties(&all).no_structures();
            match bus.call(SYSTEMD, "StartTransientUnit", "ssa(sv)a(sa(sv))", &body)? {
                Ok(job) => break job,
                // One that failed is kept in memory until somebody lets it go.
                Err(r) if again && r.name == "org.freedesktop.systemd1.UnitExists" => {
                    again = false;
                    self.reset(&mut bus)?;
                }
                Err(r) => return Err(r.into_error(what())),
            }
        };
        match bus.job(&job)?.as_str() {
            "done" => Ok(placeholder),
            other => Err(Error::new(Kind::Os, format!("{}: its job ended with {other:?}", what()))),
        }
    }

    fn reset(&self, bus: &mut Bus) -> Result<(), Error> {
        let mut body = Writer::default();
        body.text(&self.name);
        // A unit that is gone has nothing to reset.
        bus.call(SYSTEMD, "ResetFailedUnit", "s", &body).map(|_| ())
    }

    /// Has the manager move a process into the unit, where the caller itself may not.
    pub fn attach(&self, pid: i32) -> Result<(), Error> {
        let mut body = Writer::default();
        body.text(&self.name).text("").numbers(&[pid as u32]);
        let done = self.bus()?.call(SYSTEMD, "AttachProcessesToUnit", "ssau", &body)?;
        done.map(drop)
            .map_err(|r| r.into_error(format!("moving the container's process into {:?}", self.name)))
    }

    pub fn is_users(&self) -> bool {
        self.user
    }

    pub fn update(&self, resources: &LinuxResources, unified: bool) -> Result<(), Error> {
        let all = properties::of_resources(resources, unified)?;
        if all.is_empty() {
            return Ok(());
        }
        let mut body = Writer::default();
        body.text(&self.name).bool(true).properties(&all);
        let done = self.bus()?.call(SYSTEMD, "SetUnitProperties", "sba(sv)", &body)?;
        done.map(drop).map_err(|r| r.into_error(format!("changing unit {:?}", self.name)))
    }

    /// Stops the unit and has it forgotten; one that is gone is no error.
    pub fn stop(&self) -> Result<(), Error> {
        let mut bus = self.bus()?;
        let mut body = Writer::default();
        body.text(&self.name).text("replace");
        match bus.call(SYSTEMD, "StopUnit", "ss", &body)? {
            Ok(job) => drop(bus.job(&job)?),
            Err(r) if r.name == "org.freedesktop.systemd1.NoSuchUnit" => {}
            Err(r) => return Err(r.into_error(format!("stopping unit {:?}", self.name))),
        }
        self.reset(&mut bus)
    }
}

/// Where in the hierarchies systemd put a process: the unified one, or its own of version 1.
pub(super) fn path_of(pid: i32) -> Result<String, Error> {
    let file = format!("/proc/{pid}/cgroup");
    let text = std::fs::read_to_string(&file).map_err(|e| Error::os(format!("reading {file}"), e))?;
    let find = |wanted: &str| {
        text.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, name, path) = (fields.next()?, fields.next()?, fields.next()?);
            let fits = if wanted.is_empty() { number == "0" } else { name == wanted };
            fits.then(|| path.to_owned())
        })
    };
    find("name=systemd")
        .or_else(|| find(""))
        .filter(|path| path != "/")
        .ok_or_else(|| Error::new(Kind::Os, "systemd gave the container no cgroup"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_named_as_runc_names_them() {
        let unit = |path: &str| Unit::parse(Some(path), "id", false).map(|u| (u.slice, u.name));
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(unit("machine.slice:libpod:abc").unwrap(), pair("machine.slice", "libpod-abc.scope"));
        assert_eq!(unit(":runc:abc").unwrap(), pair("system.slice", "runc-abc.scope"));
        assert_eq!(unit("a-b.slice::abc").unwrap(), pair("a-b.slice", "abc.scope"));
        assert_eq!(unit("-.slice:p:n").unwrap(), pair("-.slice", "p-n.scope"));
        assert_eq!(unit("").unwrap(), pair("system.slice", "brigantine-id.scope"));
        for bad in ["/a/b", "a:b", "x:y:z", "a--b.slice:p:n", "a.slice:p:n/m", "../a.slice:p:n"] {
            assert!(unit(bad).is_err(), "{bad}");
        }
        assert_eq!(Unit::parse(None, "id", true).unwrap().slice, "user.slice");
    }
}
