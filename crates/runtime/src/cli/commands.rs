//! The commands.

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use brigantine_sys::signals::{self, SignalFd};
use lexopt::{Arg, Parser, ValueExt};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, waitid};

use super::options::{Options, parse, signal, wrong};
use super::record::{Dir, Record, Status, started, timestamp};
use super::{Global, print, seal, terminal};
use crate::error::{Error, Kind};
use crate::launch::{Created, ExecRequest, Launch, Rootfs, Stdio, create, exec, start_waiting};
use crate::spec::{Capability, LinuxResources, Process, Spec};
use crate::{hooks, profile, seccomp};

const HELP: &str = "brig-runtime: an OCI container runtime

Usage: brig-runtime [--root DIR] [--log FILE] [--log-format text|json] COMMAND …

Commands:
  create    make a container from a bundle, up to its program's start
  start     start the program of a created container
  run       create and start
  state     print a container's state
  kill      send a signal
  delete    remove a stopped container (--force: kill it first)
  exec      run another program in a container
  list      list containers
  ps        list a container's processes
  pause     stop all of a container's processes
  resume    let them go on
  update    change limits (-r FILE)
  events    print statistics (--stats)
  spec      write a config.json to start from
  features  print what this runtime can do";

pub(super) fn run(global: &mut Global, args: impl IntoIterator<Item = OsString>) -> Result<u8, Error> {
    let mut parser = Parser::from_args(args);
    let command = loop {
        let Some(arg) = parser.next().map_err(wrong)? else {
            print(HELP)?;
            return Ok(0);
        };
        let text = |p: &mut Parser| p.value().and_then(ValueExt::string).map_err(wrong);
        match arg {
            Arg::Value(command) => break command.string().map_err(wrong)?,
            Arg::Long("root") => global.root = text(&mut parser)?.into(),
            Arg::Long("log") => global.log = Some(text(&mut parser)?.into()),
            Arg::Long("log-format") => {
                global.log_json = match text(&mut parser)?.as_str() {
                    "json" => true,
                    "text" => false,
                    other => return Err(Error::invalid(format!("log format {other:?} is not text or json"))),
                };
            }
            Arg::Long("systemd-cgroup") => global.systemd_cgroup = true,
            Arg::Long("debug") => {}
            Arg::Long("rootless" | "criu") => drop(text(&mut parser)?),
            Arg::Short('h') | Arg::Long("help") => {
                print(HELP)?;
                return Ok(0);
            }
            Arg::Short('v') | Arg::Long("version") => {
                print(&format!("brig-runtime version {}\nspec: 1.2.0", env!("CARGO_PKG_VERSION")))?;
                return Ok(0);
            }
            other => return Err(wrong(other.unexpected())),
        }
    };
    let options = parse(&command, &mut parser)?;
    if matches!(command.as_str(), "create" | "run" | "exec") {
        seal()?;
    }
    match command.as_str() {
        "create" => create_command(global, &options).map(|()| 0),
        "run" => run_command(global, &options),
        "start" => start_command(global, options.id()?).map(|()| 0),
        "state" => {
            let (dir, record) = open(global, options.id()?)?;
            let state = record.state(&dir);
            print(&pretty(&state)?).map(|()| 0)
        }
        "kill" => kill_command(global, &options).map(|()| 0),
        "delete" => delete_command(global, &options).map(|()| 0),
        "exec" => exec_command(global, &options),
        "list" => list_command(global, &options).map(|()| 0),
        "ps" => ps_command(global, &options).map(|()| 0),
        "pause" => {
            let (dir, record) = open(global, options.id()?)?;
            need(&record, &dir, &[Status::Running, Status::Created], "paused")?;
            record.cgroup.freeze().map(|()| 0)
        }
        "resume" => {
            let (dir, record) = open(global, options.id()?)?;
            need(&record, &dir, &[Status::Paused], "resumed")?;
            record.cgroup.thaw().map(|()| 0)
        }
        "update" => update_command(global, &options).map(|()| 0),
        "events" if options.stats => {
            let (_, record) = open(global, options.id()?)?;
            let stats = record.cgroup.stats()?;
            print(&serde_json::json!({"type": "stats", "id": record.id, "data": stats}).to_string())
                .map(|()| 0)
        }
        "events" => Err(Error::unsupported("events without --stats are not built yet")),
        "spec" => spec_command(&options).map(|()| 0),
        "features" => print(&pretty(&features())?).map(|()| 0),
        "checkpoint" | "restore" => Err(Error::unsupported(format!("{command} is not built yet"))),
        "help" => print(HELP).map(|()| 0),
        other => Err(Error::invalid(format!("{other:?} is not a command; see brig-runtime --help"))),
    }
}

fn pretty(value: &serde_json::Value) -> Result<String, Error> {
    serde_json::to_string_pretty(value).map_err(|e| Error::os("writing JSON", std::io::Error::from(e)))
}

fn open(global: &Global, id: &str) -> Result<(Dir, Record), Error> {
    let dir = Dir::new(&global.root, id);
    let record = dir.load(id)?;
    Ok((dir, record))
}

fn need(record: &Record, dir: &Dir, allowed: &[Status], verb: &str) -> Result<(), Error> {
    let status = record.status(dir);
    if allowed.contains(&status) {
        return Ok(());
    }
    Err(Error::new(Kind::State, format!("container {} cannot be {verb}: it is {}", record.id, status.name())))
}

fn load_spec(bundle: &Path) -> Result<Spec, Error> {
    const LIMIT: u64 = 16 << 20;
    let file = bundle.join("config.json");
    let what = || format!("reading {}", file.display());
    let size = fs::metadata(&file).map_err(|e| Error::os(what(), e))?.len();
    if size > LIMIT {
        return Err(Error::invalid(format!("{}: {size} bytes are too many", what())));
    }
    let bytes = fs::read(&file).map_err(|e| Error::os(what(), e))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("{}: {e}", what())))
}

fn make(global: &Global, options: &Options, waiting: bool) -> Result<(Dir, Created, Option<OwnedFd>), Error> {
    let id = options.id()?;
    let bundle = options.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    let bundle = fs::canonicalize(&bundle)
        .map_err(|e| Error::os(format!("opening bundle {}", bundle.display()), e))?;
    let spec = load_spec(&bundle)?;
    let root = spec.root().as_ref().ok_or_else(|| Error::invalid("the spec has no root"))?;
    let rootfs = bundle.join(root.path());
    let wants_terminal = spec.process().as_ref().and_then(Process::terminal).unwrap_or_default();
    let stdio = if wants_terminal { Stdio::Terminal } else { Stdio::Inherit };
    if wants_terminal && (waiting || options.detach) && options.console_socket.is_none() {
        return Err(Error::invalid("a detached container with a terminal needs --console-socket"));
    }
    if !wants_terminal && options.console_socket.is_some() {
        return Err(Error::invalid("--console-socket is given, but the container has no terminal"));
    }
    let dir = Dir::new(&global.root, id);
    dir.claim(&global.root, id)?;
    let made = (|| {
        let mut launch = Launch::new(id, spec.clone(), Rootfs::Path(rootfs.clone()), stdio);
        launch.bundle = Some(bundle.clone());
        launch.systemd_cgroup = global.systemd_cgroup;
        launch.preserve_fds = options.preserve_fds;
        if waiting {
            launch.start_listener = Some(dir.listen()?);
        }
        let mut created = create(launch)?;
        let record = Record {
            version: 1,
            id: id.to_owned(),
            pid: created.pid(),
            pid_started: started(created.pid()).map(|(time, _)| time).unwrap_or_default(),
            bundle,
            rootfs,
            created: timestamp(SystemTime::now()),
            cgroup: created.cgroup().clone(),
            spec,
        };
        dir.save(&record)?;
        let mut master = created.take_terminal();
        if let Some(socket) = &options.console_socket
            && let Some(fd) = master.take()
        {
            terminal::hand_over(socket, fd.as_fd())?;
        }
        if let Some(file) = &options.pid_file {
            write_pid(file, created.pid())?;
        }
        Ok((created, master))
    })();
    match made {
        Ok((created, master)) => Ok((dir, created, master)),
        Err(error) => {
            // The first failure is the one to tell.
            drop(dir.remove());
            Err(error)
        }
    }
}

fn write_pid(file: &Path, pid: i32) -> Result<(), Error> {
    let mut temporary = file.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, pid.to_string())
        .and_then(|()| fs::rename(&temporary, file))
        .map_err(|e| Error::os(format!("writing {}", file.display()), e))
}

fn create_command(global: &Global, options: &Options) -> Result<(), Error> {
    let (_, created, _) = make(global, options, true)?;
    created.detach();
    Ok(())
}

fn start_command(global: &Global, id: &str) -> Result<(), Error> {
    let (dir, record) = open(global, id)?;
    let _lock = dir.lock()?;
    need(&record, &dir, &[Status::Created], "started")?;
    let process = record.spec.process().as_ref().ok_or_else(|| Error::invalid("the spec has no process"))?;
    let connection = dir.connect()?;
    start_waiting(connection.as_fd(), process)?;
    fs::remove_file(dir.start_socket()).map_err(|e| Error::os("removing the start socket", e))?;
    after_start(&dir, &record)
}

fn after_start(dir: &Dir, record: &Record) -> Result<(), Error> {
    let Some(spec_hooks) = record.spec.hooks() else { return Ok(()) };
    let state = record.state(dir).to_string().into_bytes();
    hooks::run("poststart", spec_hooks.poststart().as_ref(), &state, Some(&record.bundle))
}

fn run_command(global: &Global, options: &Options) -> Result<u8, Error> {
    // Blocked before the container exists, so that none is lost; the child resets its own mask.
    let signals = (!options.detach).then(forwarded).transpose()?;
    let (dir, mut created, master) = make(global, options, false)?;
    if let Err(error) = created.start() {
        drop(created);
        dir.remove()?;
        return Err(error);
    }
    let record = dir.load(options.id()?)?;
    after_start(&dir, &record)?;
    let Some(signals) = signals else { return Ok(0) };
    let status = attend(created.pidfd(), master.as_ref(), &signals)?;
    if !options.keep {
        destroy(&dir, &record)?;
    }
    Ok(status)
}

fn forwarded() -> Result<SignalFd, Error> {
    let all = [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGTERM,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGCONT,
        libc::SIGALRM,
        libc::SIGWINCH,
    ];
    SignalFd::block(&all).map_err(|e| Error::os("blocking signals", e))
}

/// Waits for a child in the foreground, handing signals on to it.
fn attend(
    process: std::os::fd::BorrowedFd<'_>,
    master: Option<&OwnedFd>,
    signals: &SignalFd,
) -> Result<u8, Error> {
    if let Some(master) = master {
        terminal::join(master, process)?;
    }
    loop {
        let mut fds = [PollFd::from_borrowed_fd(process, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::os("waiting for the container", e)),
        }
        if !fds[0].revents().is_empty() {
            let status = waitid(WaitId::PidFd(process), WaitIdOptions::EXITED)
                .map_err(|e| Error::os("waiting for the container", e))?;
            let code =
                status.and_then(|s| s.exit_status().or_else(|| s.terminating_signal().map(|n| 128 + n)));
            return Ok(code.unwrap_or(255) as u8);
        }
        while let Some(number) = signals.take().map_err(|e| Error::os("reading signals", e))? {
            // A process that is gone is met by the next poll.
            signals::send(process, number).ok();
        }
    }
}

fn kill_command(global: &Global, options: &Options) -> Result<(), Error> {
    let (dir, record) = open(global, options.id()?)?;
    let number = match options.words.get(1).and_then(|w| w.to_str()) {
        Some(text) => signal(text)?,
        None => libc::SIGTERM,
    };
    if options.all {
        return record.cgroup.signal_all(number);
    }
    need(&record, &dir, &[Status::Created, Status::Running, Status::Paused], "killed")?;
    let failed =
        |e: std::io::Error| Error::os(format!("sending signal {number} to container {}", record.id), e);
    let pid = Pid::from_raw(record.pid).ok_or_else(|| failed(rustix::io::Errno::SRCH.into()))?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
    // The number may have gone to another process between reading the record and opening it.
    if !record.alive() {
        return Err(failed(rustix::io::Errno::SRCH.into()));
    }
    signals::send(pidfd.as_fd(), number).map_err(failed)?;
    if number == libc::SIGKILL && record.cgroup.is_frozen().unwrap_or_default() {
        record.cgroup.thaw()?;
    }
    Ok(())
}

fn delete_command(global: &Global, options: &Options) -> Result<(), Error> {
    let id = options.id()?;
    let dir = Dir::new(&global.root, id);
    let record = match dir.load(id) {
        Ok(record) => record,
        Err(e) if options.force => {
            // A creation that was cut short leaves a directory without a record.
            return if e.kind() == Kind::State { dir.remove() } else { Err(e) };
        }
        Err(e) => return Err(e),
    };
    let _lock = dir.lock()?;
    if !options.force {
        let status = record.status(&dir);
        if status == Status::Created {
            record.cgroup.kill_all()?;
        } else {
            need(&record, &dir, &[Status::Stopped], "deleted")?;
        }
    }
    destroy(&dir, &record)
}

fn destroy(dir: &Dir, record: &Record) -> Result<(), Error> {
    if record.cgroup.exists() {
        record.cgroup.kill_all()?;
    }
    record.cgroup.delete()?;
    let poststop = record.spec.hooks().as_ref().and_then(|h| h.poststop().as_ref());
    let state = record.state(dir).to_string().into_bytes();
    let result = hooks::run("poststop", poststop, &state, Some(&record.bundle));
    dir.remove()?;
    result
}

fn exec_command(global: &Global, options: &Options) -> Result<u8, Error> {
    let (dir, record) = open(global, options.id()?)?;
    if !options.ignore_paused {
        need(&record, &dir, &[Status::Running, Status::Created], "entered")?;
    }
    let process = exec_process(&record, options)?;
    let wants_terminal = process.terminal().unwrap_or_default();
    if wants_terminal && options.detach && options.console_socket.is_none() {
        return Err(Error::invalid("a detached process with a terminal needs --console-socket"));
    }
    let filter = record.spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let signals = (!options.detach).then(forwarded).transpose()?;
    let mut done = exec(ExecRequest {
        process,
        stdio: if wants_terminal { Stdio::Terminal } else { Stdio::Inherit },
        pid: record.pid,
        cgroup: Some(record.cgroup.clone()),
        seccomp: filter.map(seccomp::compile).transpose()?.flatten(),
        die_with_parent: false,
        preserve_fds: options.preserve_fds,
    })?;
    if let Some(file) = &options.pid_file {
        write_pid(file, done.pid)?;
    }
    let mut master = done.terminal.take();
    if let Some(socket) = &options.console_socket
        && let Some(fd) = master.take()
    {
        terminal::hand_over(socket, fd.as_fd())?;
    }
    match signals {
        Some(signals) => attend(done.pidfd.as_fd(), master.as_ref(), &signals),
        None => Ok(0),
    }
}

fn exec_process(record: &Record, options: &Options) -> Result<Process, Error> {
    if let Some(file) = &options.process {
        let what = || format!("reading {}", file.display());
        let bytes = fs::read(file).map_err(|e| Error::os(what(), e))?;
        return serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("{}: {e}", what())));
    }
    let base = record.spec.process().clone();
    let mut process = base.ok_or_else(|| Error::invalid("the container's spec has no process"))?;
    let args = options.words.get(1..).unwrap_or_default();
    let args = args.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>();
    if args.is_empty() {
        return Err(Error::invalid("exec: a program is needed"));
    }
    process.set_args(Some(args)).set_terminal(Some(options.tty));
    if let Some(cwd) = &options.cwd {
        process.set_cwd(cwd.clone());
    }
    if !options.env.is_empty() {
        let mut env = process.env().clone().unwrap_or_default();
        env.extend(options.env.iter().cloned());
        process.set_env(Some(env));
    }
    if let Some(user) = &options.user {
        let (uid, gid) = user.split_once(':').map_or((user.as_str(), None), |(u, g)| (u, Some(g)));
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
    if !options.additional_gids.is_empty() {
        let mut user = process.user().clone();
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        gids.extend(&options.additional_gids);
        user.set_additional_gids(Some(gids));
        process.set_user(user);
    }
    if options.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(profile) = &options.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if !options.caps.is_empty() {
        let mut capabilities = process.capabilities().clone().unwrap_or_default();
        for name in &options.caps {
            let value = serde_json::Value::from(name.as_str());
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
        }
        process.set_capabilities(Some(capabilities));
    }
    Ok(process)
}

fn list_command(global: &Global, options: &Options) -> Result<(), Error> {
    let mut states = Vec::new();
    let entries = match fs::read_dir(&global.root) {
        Ok(entries) => entries.flatten().collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(Error::os(format!("reading {}", global.root.display()), e)),
    };
    for entry in entries {
        let name = entry.file_name();
        let Some(id) = name.to_str() else { continue };
        let dir = Dir::new(&global.root, id);
        // One that is being made or removed right now is not listed.
        if let Ok(record) = dir.load(id) {
            states.push(record.state(&dir));
        }
    }
    let field = |state: &serde_json::Value, key: &str| match &state[key] {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    states.sort_by_key(|s| field(s, "id"));
    if options.quiet {
        let ids: Vec<String> = states.iter().map(|s| field(s, "id")).collect();
        return if ids.is_empty() { Ok(()) } else { print(&ids.join("\n")) };
    }
    match options.format.as_deref() {
        Some("json") => print(&serde_json::Value::from(states).to_string()),
        None | Some("table") => {
            let columns = ["id", "pid", "status", "bundle", "created"];
            let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED"].map(str::to_owned)];
            rows.extend(states.iter().map(|s| columns.map(|c| field(s, c))));
            let widths: Vec<usize> =
                (0..5).map(|c| rows.iter().map(|r| r[c].len()).max().unwrap_or(0)).collect();
            let line = |row: &[String; 5]| {
                let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
                cells.collect::<Vec<_>>().join("   ").trim_end().to_owned()
            };
            print(&rows.iter().map(line).collect::<Vec<_>>().join("\n"))
        }
        Some(other) => Err(Error::invalid(format!("format {other:?} is not table or json"))),
    }
}

fn ps_command(global: &Global, options: &Options) -> Result<(), Error> {
    let (_, record) = open(global, options.id()?)?;
    let pids = record.cgroup.procs()?;
    if options.format.as_deref() == Some("json") {
        return print(&serde_json::Value::from(pids).to_string());
    }
    let mut lines = vec!["PID   CMD".to_owned()];
    for pid in pids {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        lines.push(format!("{pid:<5} {}", command.trim_end()));
    }
    print(&lines.join("\n"))
}

fn update_command(global: &Global, options: &Options) -> Result<(), Error> {
    let (_, record) = open(global, options.id()?)?;
    let Some(file) = &options.resources else {
        return Err(Error::unsupported("update needs -r FILE; single flags are not built yet"));
    };
    let what = || format!("reading {}", file.display());
    let bytes = if file == Path::new("-") {
        let mut bytes = Vec::new();
        use std::io::Read;
        std::io::stdin().take(1 << 20).read_to_end(&mut bytes).map_err(|e| Error::os(what(), e))?;
        bytes
    } else {
        fs::read(file).map_err(|e| Error::os(what(), e))?
    };
    let resources: LinuxResources =
        serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("{}: {e}", what())))?;
    record.cgroup.update(&resources)
}

fn spec_command(options: &Options) -> Result<(), Error> {
    let dir = options.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    let file = dir.join("config.json");
    if file.exists() {
        return Err(Error::new(Kind::State, format!("{} exists; remove it first", file.display())));
    }
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let spec = serde_json::json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "brig",
        "mounts": profile::mounts(65_536 << 10),
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": profile::masked_paths(),
            "readonlyPaths": profile::readonly_paths(),
        },
    });
    fs::write(&file, pretty(&spec)?).map_err(|e| Error::os(format!("writing {}", file.display()), e))
}

fn features() -> serde_json::Value {
    let capabilities: Vec<Capability> = profile::all_capabilities();
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "poststart", "poststop"],
        "mountOptions": ["async", "atime", "bind", "defaults", "dev", "diratime", "exec", "noatime", "nodev",
            "nodiratime", "noexec", "nosuid", "nosymfollow", "private", "ratime", "rbind", "rdev", "rdiratime",
            "relatime", "remount", "rexec", "rnoatime", "rnodev", "rnodiratime", "rnoexec", "rnosuid",
            "rnosymfollow", "ro", "rprivate", "rrelatime", "rro", "rrw", "rshared", "rslave", "rstrictatime",
            "rsuid", "rsymfollow", "runbindable", "rw", "shared", "slave", "strictatime", "suid", "symfollow",
            "unbindable"],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "capabilities": capabilities,
            "cgroup": {"v1": true, "v2": true, "systemd": false, "systemdUser": false, "rdma": true},
            "seccomp": {
                "enabled": true,
                "actions": ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"],
                "operators": ["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"],
                "archs": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM", "SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
        },
    })
}
