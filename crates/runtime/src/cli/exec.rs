//! `exec`: another program in a container.

use std::fs;
use std::os::fd::AsFd;

use brigantine_sys::Replacement;

use super::attend::{attend, forwarded};
use super::options::Options;
use super::record::{Record, Status};
use super::{Global, commands, lenient, terminal};
use crate::cgroup::Cgroup;
use crate::error::{Error, Kind};
use crate::launch::{Common, ExecRequest, Stdio, exec};
use crate::listener::Listener;
use crate::spec::{Capability, Process};
use crate::{hooks, seccomp};

/// The process's exit status; docker and others take 255 for "could not be run".
pub(super) fn run(global: &Global, options: &Options, executable: Option<Replacement>) -> Result<u8, Error> {
    let (dir, record) = commands::open(global, options.id()?)?;
    if record.status(&dir) != Status::Paused {
        commands::need(&record, &dir, &[Status::Running, Status::Created], "entered")?;
    } else if !options.has("ignore-paused") {
        let id = &record.id;
        return Err(Error::new(
            Kind::State,
            format!(
                "cannot exec in a paused container: {id} is paused (--ignore-paused: start when it goes on)"
            ),
        ));
    }
    let process = process(&record, options, global)?;
    let wants_terminal = process.terminal().unwrap_or_default();
    let detach = options.has("detach");
    commands::check_terminal(wants_terminal, detach, options)?;
    let filter = record.spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let state = hooks::state(
        &record.id,
        record.status(&dir).name(),
        Some(record.pid),
        Some(&record.bundle),
        &record.spec,
    );
    let signals = (!detach).then(forwarded).transpose()?;
    let mut done = exec(ExecRequest {
        process,
        stdio: if wants_terminal { Stdio::Terminal } else { Stdio::Inherit },
        pid: record.pid,
        cgroup: Some(group(&record, options)?),
        seccomp: filter.map(|filter| seccomp::program(filter, &global.root())).transpose()?.flatten(),
        listener: Listener::of(filter, state),
        common: Common::of(&record.spec),
        die_with_parent: false,
        preserve_fds: commands::preserved(options)?,
        executable,
    })?;
    if let Some(file) = options.path("pid-file") {
        commands::write_pid(&file, done.pid)?;
    }
    if let Some(socket) = options.path("pidfd-socket") {
        terminal::hand_over(&socket, done.pidfd.as_fd(), b"pidfd")?;
    }
    let mut master = done.terminal.take();
    if let Some(socket) = options.path("console-socket")
        && let Some(fd) = master.take()
    {
        terminal::hand_over(&socket, fd.as_fd(), b"/dev/ptmx")?;
    }
    match signals {
        Some(signals) => attend(done.pidfd.as_fd(), master, &signals, None),
        None => Ok(0),
    }
}

/// The container's own group, or one below it (`--cgroup`).
fn group(record: &Record, options: &Options) -> Result<Cgroup, Error> {
    let mut below = Vec::new();
    for word in options.all("cgroup") {
        let (controllers, path) = match word.split_once(':') {
            Some((controllers, path)) => (controllers.split(',').map(str::to_owned).collect(), path),
            None => (Vec::new(), word),
        };
        below.push((controllers, path.to_owned()));
    }
    if below.is_empty() { Ok(record.cgroup.clone()) } else { record.cgroup.inner(&below) }
}

fn process(record: &Record, options: &Options, global: &Global) -> Result<Process, Error> {
    if let Some(file) = options.path("process") {
        let what = || format!("reading {}", file.display());
        let bytes = fs::read(&file).map_err(|e| Error::os(what(), e))?;
        return lenient::process(&bytes, global).map_err(|e| Error::invalid(format!("{}: {e}", what())));
    }
    let base = record.spec.process().clone();
    let mut process = base.ok_or_else(|| Error::invalid("the container's spec has no process"))?;
    let args = options.words.get(1..).unwrap_or_default();
    let args = args.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>();
    if args.is_empty() {
        return Err(Error::new(Kind::Invalid, "exec: a program is needed"));
    }
    process.set_args(Some(args)).set_terminal(Some(options.has("tty")));
    if let Some(cwd) = options.path("cwd") {
        process.set_cwd(cwd);
    }
    if options.has("env") {
        let mut env = process.env().clone().unwrap_or_default();
        for word in options.all("env") {
            let (name, _) = word
                .split_once('=')
                .ok_or_else(|| Error::invalid(format!("environment variable {word:?} is not NAME=VALUE")))?;
            env.retain(|e| e.split('=').next() != Some(name));
            env.push(word.to_owned());
        }
        process.set_env(Some(env));
    }
    if let Some(user) = options.text("user") {
        let (uid, gid) = user.split_once(':').map_or((user, None), |(u, g)| (u, Some(g)));
        let number = |t: &str| {
            t.parse::<u32>()
                .map_err(|_unused| Error::invalid(format!("user {user:?} is not of the form UID[:GID]")))
        };
        let mut changed = process.user().clone();
        changed.set_uid(number(uid)?);
        if let Some(gid) = gid {
            changed.set_gid(number(gid)?);
        }
        process.set_user(changed);
    }
    if options.has("additional-gids") {
        let mut user = process.user().clone();
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        for text in options.all("additional-gids").flat_map(|list| list.split(',')) {
            gids.push(
                text.parse().map_err(|_unused| Error::invalid(format!("group {text:?} is not a number")))?,
            );
        }
        user.set_additional_gids(Some(gids));
        process.set_user(user);
    }
    if options.has("no-new-privs") {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(profile) = options.text("apparmor") {
        process.set_apparmor_profile(Some(profile.to_owned()));
    }
    if let Some(label) = options.text("process-label") {
        process.set_selinux_label(Some(label.to_owned()));
    }
    if options.has("cap") {
        let mut capabilities = process.capabilities().clone().unwrap_or_default();
        for name in options.all("cap") {
            let value = serde_json::Value::from(name);
            let capability: Capability = serde_json::from_value(value)
                .map_err(|_unused| Error::invalid(format!("capability {name:?} is not known")))?;
            let mut bounding = capabilities.bounding().clone().unwrap_or_default();
            bounding.insert(capability);
            let mut permitted = capabilities.permitted().clone().unwrap_or_default();
            permitted.insert(capability);
            let mut effective = capabilities.effective().clone().unwrap_or_default();
            effective.insert(capability);
            capabilities
                .set_bounding(Some(bounding))
                .set_permitted(Some(permitted))
                .set_effective(Some(effective));
            // Ambient ones are possible only where something is inheritable at all.
            if capabilities.inheritable().as_ref().is_some_and(|set| !set.is_empty()) {
                let mut ambient = capabilities.ambient().clone().unwrap_or_default();
                ambient.insert(capability);
                capabilities.set_ambient(Some(ambient));
            }
        }
        process.set_capabilities(Some(capabilities));
    }
    Ok(process)
}
