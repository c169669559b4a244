//! The commands, and those of them that make and end containers.

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use brigantine_sys::signals;
use lexopt::{Arg, Parser, ValueExt};
use rustix::process::{Pid, PidfdFlags};

use super::attend::{attend, ends_within, forwarded};
use super::begun::{Begun, Parsed};
use super::notify::{self, Proxy};
use super::options::{COMMANDS, Command, Options, parse, signal, wrong};
use super::record::{Dir, Record, Status, started, timestamp};
use super::{Cover, Global, criu, events, exec, print, show, template, terminal, update};
use crate::error::{Error, Kind};
use crate::launch::{Created, Launch, Rootfs, Stdio, create_beside, start_waiting};
use crate::spec::{Process, Spec};
use crate::{hooks, seccomp};

/// A dead process is waited for this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// A process may take this long to end before a container is called running.
const ENDING: Duration = Duration::from_millis(100);

pub(super) fn run(global: &mut Global, args: impl IntoIterator<Item = OsString>) -> Result<u8, Error> {
    let mut parser = Parser::from_args(args);
    let name = loop {
        let Some(arg) = parser.next().map_err(wrong)? else {
            return help(None).map(|()| 0);
        };
        match arg {
            Arg::Value(command) => break command.string().map_err(wrong)?,
            Arg::Short('h') | Arg::Long("help") => return help(None).map(|()| 0),
            Arg::Short('v') | Arg::Long("version") => {
                let version = env!("CARGO_PKG_VERSION");
                return print(&format!("brig-runtime version {version}\nspec: {}", crate::OCI_VERSION))
                    .map(|()| 0);
            }
            Arg::Long(option) => {
                let option = option.to_owned();
                if !global.option(&option, &mut parser)? {
                    return Err(wrong(Arg::Long(&option).unexpected()));
                }
            }
            other @ Arg::Short(_) => return Err(wrong(other.unexpected())),
        }
    };
    if name == "help" {
        return help(None).map(|()| 0);
    }
    let Some(command) = COMMANDS.iter().find(|c| c.name == name) else {
        if let Ok(Some(Arg::Short('h') | Arg::Long("help"))) = parser.next() {
            return Err(Error::invalid(format!("No help topic for '{name}'")));
        }
        return Err(Error::invalid(format!("{name:?} is not a command; see brig-runtime --help")));
    };
    global.command = command.name;
    let options = parse(command, &mut parser, |option, parser| global.option(option, parser))?;
    if options.help {
        return help(Some(command)).map(|()| 0);
    }
    let mut executable = None;
    if matches!(command.name, "create" | "run" | "exec" | "restore") {
        // Before anything is opened: what is not open now must not be one of ours later.
        check_preserved(preserved(&options)?)?;
        if matches!(command.name, "exec" | "restore") {
            executable = Cover::find()?.seal()?;
        }
    }
    global.debug(&format!("{name} {:?}", options.words));
    let done = match command.name {
        "create" | "run" => {
            let begun = Begun::begin(&options)?;
            return if command.name == "run" {
                run_command(global, &options, begun)
            } else {
                create_command(global, &options, begun).map(|()| 0)
            };
        }
        "exec" => return exec::run(global, &options, executable),
        "restore" => {
            // What it lets loose is no clone of this process that could be told to.
            if let Some(executable) = &executable {
                executable.apply().map_err(|e| Error::os("protecting the runtime's executable", e))?;
            }
            return criu::restore(global, &options);
        }
        "checkpoint" => criu::checkpoint(global, &options),
        "start" => start_command(global, options.id()?),
        "state" => {
            let (dir, record) = open(global, options.id()?)?;
            let text = serde_json::to_string_pretty(&record.state(&dir));
            print(&text.map_err(|e| Error::os("writing JSON", std::io::Error::from(e)))?)
        }
        "kill" => kill_command(global, &options),
        "delete" => delete_command(global, &options),
        "list" => show::list(global, &options),
        "ps" => show::ps(global, &options),
        "pause" => {
            let (dir, record) = open(global, options.id()?)?;
            need(&record, &dir, &[Status::Running, Status::Created], "paused")?;
            record.cgroup.freeze()
        }
        "resume" => {
            let (dir, record) = open(global, options.id()?)?;
            need(&record, &dir, &[Status::Paused], "resumed")?;
            record.cgroup.thaw()
        }
        "update" => update::run(global, &options),
        "events" => events::run(global, &options),
        "spec" => template::spec(&options),
        "features" => print(&pretty(&template::features())?),
        _ => Err(Error::unsupported(format!("{name} is not built yet"))),
    };
    done.map(|()| 0)
}

fn help(command: Option<&Command>) -> Result<(), Error> {
    let Some(command) = command else {
        let mut all =
            "NAME:\n   brig-runtime - an OCI container runtime\n\nUSAGE:\n   brig-runtime [--root DIR] \
                       [--log FILE] [--log-format text|json] [--debug] [--systemd-cgroup]\n                \
                       [--rootless auto|true|false] COMMAND …\n\nCOMMANDS:"
                .to_owned();
        for command in COMMANDS {
            let line = format!("\n   {:<11} {}", command.name, command.about);
            all.push_str(&line);
        }
        return print(&all);
    };
    let words = match command.words {
        (0, _) => "",
        (_, 1) => " ID",
        (_, 2) => " ID [SIGNAL]",
        _ => " ID [WORD …]",
    };
    let (name, about) = (command.name, command.about);
    let mut all = format!(
        "NAME:\n   brig-runtime {name} - {about}\n\nUSAGE:\n   brig-runtime {name} [OPTION …]{words}\n\nOPTIONS:"
    );
    for flag in command.flags {
        let short = flag.short.map_or_else(|| "    ".to_owned(), |c| format!("-{c}, "));
        let value = flag.value.map_or_else(String::new, |v| format!(" {v}"));
        all.extend(["\n   ", &short, "--", flag.long, &value]);
    }
    print(&all)
}

pub(super) fn pretty(value: &serde_json::Value) -> Result<String, Error> {
    serde_json::to_string_pretty(value).map_err(|e| Error::os("writing JSON", std::io::Error::from(e)))
}

pub(super) fn open(global: &Global, id: &str) -> Result<(Dir, Record), Error> {
    let dir = Dir::new(&global.root(), id);
    let record = dir.load(id)?;
    Ok((dir, record))
}

pub(super) fn need(record: &Record, dir: &Dir, allowed: &[Status], verb: &str) -> Result<(), Error> {
    let status = record.status(dir);
    if allowed.contains(&status) {
        return Ok(());
    }
    Err(Error::new(Kind::State, format!("container {} cannot be {verb}: it is {}", record.id, status.name())))
}

/// How many descriptors from 3 up the process inherits: what is asked for, and what a service manager
/// passed (`sd_listen_fds(3)`).
pub(super) fn preserved(options: &Options) -> Result<u32, Error> {
    Ok(options.number::<u32>("preserve-fds")?.unwrap_or_default() + listen_fds())
}

pub(super) fn listen_fds() -> u32 {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
    let ours = number("LISTEN_PID") == Some(std::process::id());
    number("LISTEN_FDS").filter(|n| ours && *n < 1024).unwrap_or_default()
}

fn check_preserved(count: u32) -> Result<(), Error> {
    for number in 3..3_u32.saturating_add(count) {
        if fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_err() {
            return Err(Error::invalid(format!(
                "descriptor {number} is to be preserved, but it is not open"
            )));
        }
    }
    Ok(())
}

pub(super) fn check_terminal(wanted: bool, detached: bool, options: &Options) -> Result<(), Error> {
    let socket = options.has("console-socket");
    if wanted && detached && !socket {
        return Err(Error::invalid("a detached process with a terminal needs --console-socket"));
    }
    if socket && !wanted {
        return Err(Error::invalid("--console-socket is given, but the container has no terminal"));
    }
    if socket && !detached {
        return Err(Error::invalid(
            "--console-socket is given, but this command stays and has a terminal itself",
        ));
    }
    Ok(())
}

/// The service manager's descriptors are the container's process's now.
fn hand_on_listen_fds(spec: &mut Spec) {
    let count = listen_fds();
    if let Some(process) = spec.process_mut().as_mut().filter(|_| count > 0) {
        let mut env = process.env().clone().unwrap_or_default();
        env.extend([format!("LISTEN_FDS={count}"), "LISTEN_PID=1".to_owned()]);
        process.set_env(Some(env));
    }
}

/// A container with its record and, if nobody else got it, its terminal.
struct Made {
    dir: Dir,
    record: Record,
    created: Created,
    master: Option<OwnedFd>,
}

fn make(global: &Global, options: &Options, begun: Begun, waiting: bool) -> Result<Made, Error> {
    let id = options.id()?;
    let Begun { config, cover, network } = begun;
    let Parsed { bundle, mut spec, text, late_seccomp } = config.parse(global)?;
    let root = spec.root().as_ref().ok_or_else(|| Error::invalid("the spec has no root"))?;
    let rootfs = bundle.join(root.path());
    let wants_terminal = spec.process().as_ref().and_then(Process::terminal).unwrap_or_default();
    let stdio = if wants_terminal { Stdio::Terminal } else { Stdio::Inherit };
    check_terminal(wants_terminal, waiting || options.has("detach"), options)?;
    let root = global.root();
    let dir = Dir::new(&root, id);
    // It may execute this anew: nothing that has to be undone comes before.
    let executable = cover.seal()?;
    dir.claim(&root, id)?;
    let made = (|| {
        hand_on_listen_fds(&mut spec);
        notify::prepare(&dir.notify(), &mut spec)?;
        let spec = Arc::new(spec);
        let mut launch = Launch::new(id, Arc::clone(&spec), Rootfs::Path(rootfs.clone()), stdio);
        if let Some(filter) =
            spec.linux().as_ref().and_then(|l| l.seccomp().as_ref()).filter(|_| global.debug)
        {
            let flags = seccomp::flags(filter)?.unwrap_or_default();
            global.debug(&format!("seccomp filter flags: {flags}"));
        }
        launch.executable = executable;
        launch.late_seccomp = late_seccomp;
        launch.bundle = Some(bundle.clone());
        launch.network = network;
        launch.systemd_cgroup = global.systemd_cgroup;
        launch.rootless = global.is_rootless();
        launch.preserve_fds = preserved(options)?;
        launch.no_pivot = options.has("no-pivot");
        launch.no_new_keyring = options.has("no-new-keyring");
        if waiting {
            launch.start_listener = Some(dir.listen()?);
        }
        // What else there is to do for a container comes before its start.
        launch.at_once = !waiting
            && !wants_terminal
            && !dir.notify().exists()
            && spec.hooks().is_none()
            && !["pid-file", "pidfd-socket"].iter().any(|flag| options.has(flag));
        let at_once = launch.at_once;
        let mut record = None;
        let mut created = create_beside(launch, |pid, cgroup| {
            let of_container = Record {
                version: 1,
                id: id.to_owned(),
                pid,
                pid_started: started(pid).map(|(time, _)| time).unwrap_or_default(),
                bundle,
                rootfs,
                created: timestamp(SystemTime::now()),
                cgroup: cgroup.clone(),
                spec,
            };
            dir.prepare(&of_container, text.as_deref())?;
            if at_once {
                dir.publish()?;
            }
            record = Some(of_container);
            Ok(())
        })?;
        let record = record.ok_or_else(|| Error::invalid("the container has no record"))?;
        if !at_once {
            dir.publish()?;
        }
        global.debug(&format!(
            "process {} waits to be started in {}",
            created.pid(),
            created.cgroup().path()
        ));
        let mut master = created.take_terminal();
        if let Some(master) = master.as_ref().filter(|_| options.path("console-socket").is_none()) {
            terminal::plain_lines(master)?;
        }
        if let Some(socket) = options.path("console-socket")
            && let Some(fd) = master.take()
        {
            terminal::hand_over(&socket, fd.as_fd(), b"/dev/ptmx")?;
        }
        if let Some(socket) = options.path("pidfd-socket") {
            terminal::hand_over(&socket, created.pidfd(), b"pidfd")?;
        }
        if let Some(file) = options.path("pid-file") {
            write_pid(&file, created.pid())?;
        }
        Ok((record, created, master))
    })();
    match made {
        Ok((record, created, master)) => Ok(Made { dir, record, created, master }),
        Err(error) => {
            // The first failure is the one to tell.
            drop(dir.remove());
            Err(error)
        }
    }
}

pub(super) fn write_pid(file: &Path, pid: i32) -> Result<(), Error> {
    let mut temporary = file.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, pid.to_string())
        .and_then(|()| fs::rename(&temporary, file))
        .map_err(|e| Error::os(format!("writing {}", file.display()), e))
}

fn create_command(global: &Global, options: &Options, begun: Begun) -> Result<(), Error> {
    make(global, options, begun, true)?.created.detach();
    Ok(())
}

fn start_command(global: &Global, id: &str) -> Result<(), Error> {
    let (dir, record) = open(global, id)?;
    let _lock = dir.lock()?;
    need(&record, &dir, &[Status::Created], "started")?;
    let proxy = Proxy::bind(&dir.notify())?;
    let connection = dir.connect()?;
    start_waiting(connection.as_fd(), &record.spec, record.pid)?;
    fs::remove_file(dir.start_socket()).map_err(|e| Error::os("removing the start socket", e))?;
    after_start(&dir, &record)?;
    match proxy {
        Some(proxy) => proxy.wait_ready(record.pid, record.pidfd()?.as_fd()),
        None => Ok(()),
    }
}

fn after_start(dir: &Dir, record: &Record) -> Result<(), Error> {
    let Some(spec_hooks) = record.spec.hooks() else { return Ok(()) };
    let state = record.state(dir).json()?;
    hooks::run("poststart", spec_hooks.poststart().as_ref(), &state, Some(&record.bundle))
}

fn run_command(global: &Global, options: &Options, begun: Begun) -> Result<u8, Error> {
    let detach = options.has("detach");
    // Blocked before the container exists, so that none is lost; the child resets its own mask.
    let signals = (!detach).then(forwarded).transpose()?;
    let Made { dir, record, mut created, master } = make(global, options, begun, false)?;
    let begun = Proxy::bind(&dir.notify()).and_then(|proxy| {
        created.start()?;
        after_start(&dir, &record)?;
        Ok(proxy)
    });
    let proxy = match begun {
        Ok(proxy) => proxy,
        Err(error) => {
            // The first failure is the one to tell; the process is gone or goes with its creator's claim.
            drop(destroy(&dir, &record));
            return Err(error);
        }
    };
    let Some(signals) = signals else {
        if let Some(proxy) = proxy {
            proxy.wait_ready(record.pid, created.pidfd())?;
        }
        return Ok(0);
    };
    let status = attend(created.pidfd(), master, &signals, proxy.as_ref())?;
    if !options.has("keep") {
        destroy(&dir, &record)?;
    }
    // What is left goes with this process, which ends now.
    std::mem::forget((record, created));
    Ok(status)
}

fn kill_command(global: &Global, options: &Options) -> Result<(), Error> {
    let (dir, record) = open(global, options.id()?)?;
    let number = match options.words.get(1) {
        Some(word) => signal(&word.to_string_lossy())?,
        None => libc::SIGTERM,
    };
    if options.has("all") {
        return record.cgroup.signal_all(number);
    }
    if record.status(&dir) == Status::Stopped {
        if !record.has_own_pids() && !record.cgroup.procs()?.is_empty() {
            // The first is gone, the others are not.
            return record.cgroup.signal_all(number);
        }
        return Err(Error::new(
            Kind::State,
            format!("container {} cannot be killed: container not running", record.id),
        ));
    }
    let failed =
        |e: std::io::Error| Error::os(format!("sending signal {number} to container {}", record.id), e);
    let pid = Pid::from_raw(record.pid).ok_or_else(|| failed(rustix::io::Errno::SRCH.into()))?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
    // The number may have gone to another process between reading the record and opening it.
    if !record.alive() {
        return Err(failed(rustix::io::Errno::SRCH.into()));
    }
    signals::send(pidfd.as_fd(), number).map_err(failed)?;
    if number == libc::SIGKILL {
        if !record.has_own_pids() {
            // The others do not go with the first.
            record.cgroup.signal_all(number)?;
        }
        if record.cgroup.is_frozen().unwrap_or_default() {
            record.cgroup.thaw()?;
        }
    }
    Ok(())
}

fn delete_command(global: &Global, options: &Options) -> Result<(), Error> {
    let id = options.id()?;
    let force = options.has("force");
    let dir = Dir::new(&global.root(), id);
    let record = match dir.load(id) {
        Ok(record) => record,
        Err(e) if force => {
            // A creation that was cut short leaves a directory without a record.
            return if e.kind() == Kind::State { dir.remove() } else { Err(e) };
        }
        Err(e) => return Err(e),
    };
    let _lock = dir.lock()?;
    if !force
        && record.status(&dir) == Status::Running
        && let Ok(process) = record.pidfd()
    {
        // A program that does little ends a moment after its start; whoever deletes it then need not know how soon.
        ends_within(&process, ENDING);
    }
    if !force && record.status(&dir) != Status::Created {
        need(&record, &dir, &[Status::Stopped], "deleted")?;
    }
    destroy(&dir, &record)
}

/// Ends whatever is left of a container, removes it and runs its last hooks; as much as can be done is.
pub(super) fn destroy(dir: &Dir, record: &Record) -> Result<(), Error> {
    if record.alive() {
        let process = record.pidfd()?;
        if record.alive() {
            signals::send(process.as_fd(), libc::SIGKILL)
                .or_else(|e| if e.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(e) })
                .map_err(|e| Error::os(format!("killing container {}", record.id), e))?;
        }
        if record.cgroup.is_frozen().unwrap_or_default() {
            record.cgroup.thaw()?;
        }
        if !ends_within(&process, PATIENCE) {
            return Err(Error::new(Kind::Os, format!("container {} does not die", record.id)));
        }
    }
    if !record.cgroup.delete_unused() {
        if record.cgroup.exists() {
            record.cgroup.kill_all()?;
        }
        record.cgroup.delete()?;
    }
    let mut result = Ok(());
    if let Some(list) = record.spec.hooks().as_ref().and_then(|h| h.poststop().as_ref()) {
        result = hooks::run("poststop", Some(list), &record.state(dir).json()?, Some(&record.bundle));
    }
    dir.remove()?;
    result
}
