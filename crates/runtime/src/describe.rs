//! Words for a failure that the child reported by its place in the plan.

use crate::error::{Error, Kind, describe_errno};
use crate::plan::{Failure, HookFailure, HookPlan, Last, Part, Place, Plan, ProcessPlan, Step};
use crate::{binary, hooks};

/// What the last part of a plan was about; enough to describe a failure there.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    pub program: String,
    pub candidates: Vec<String>,
    pub searched: bool,
    pub cwd: String,
    pub uid: u32,
    pub gid: u32,
    pub limits: Vec<String>,
    pub start_hooks: Vec<String>,
    pub labels: Vec<String>,
    /// A filter is loaded before the program is executed; it may end the process before it can say anything.
    pub filtered: bool,
}

impl Subject {
    pub fn of(plan: &Plan) -> Self {
        Self::of_process(&plan.process)
    }

    pub fn of_process(p: &ProcessPlan) -> Self {
        let limit = |(_, limit, name): &(_, rustix::process::Rlimit, &str)| {
            let value = limit.maximum.map_or_else(|| "unlimited".to_owned(), |n| n.to_string());
            format!("{name} (hard limit {value})")
        };
        Self {
            program: p.program.clone(),
            candidates: p.candidates.iter().map(|c| c.to_string_lossy().into_owned()).collect(),
            searched: p.searched,
            cwd: p.cwd.to_string_lossy().into_owned(),
            uid: p.uid.as_raw(),
            gid: p.gid.as_raw(),
            limits: p.rlimits.iter().map(limit).collect(),
            start_hooks: p.start_hooks.iter().map(hook_name).collect(),
            labels: p.labels.iter().map(|(_, text)| label_name(text)).collect(),
            filtered: p.seccomp.is_some(),
        }
    }
}

/// What is written for a label, in words: AppArmor's is a command.
fn label_name(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    match text.strip_prefix("exec ") {
        Some(profile) => format!("AppArmor profile {profile:?}"),
        None => format!("SELinux label {text:?}"),
    }
}

fn hook_name(hook: &HookPlan) -> String {
    hooks::name(hook.kind, hook.index, std::path::Path::new(&*hook.path.to_string_lossy()))
}

/// A signal that ended a program, in the words that shells and Go's programs have for it.
fn signal_name(number: i32) -> String {
    let name = match number {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGPIPE => "broken pipe",
        libc::SIGTERM => "terminated",
        libc::SIGSYS => "bad system call",
        other => return other.to_string(),
    };
    name.to_owned()
}

fn hook_failed(name: &str, code: i32, said: &str) -> Error {
    let said = if said.is_empty() { String::new() } else { format!(": {said}") };
    let how = match HookFailure::decode(code) {
        HookFailure::Os(errno) => {
            return Error::os(name, std::io::Error::from_raw_os_error(errno));
        }
        HookFailure::Exit(status) => format!("exit status: {status}"),
        HookFailure::Signal(signal) => format!("signal: {}", signal_name(signal)),
        HookFailure::TimedOut => "timed out".to_owned(),
    };
    Error::new(Kind::Os, format!("{name}: {how}{said}"))
}

/// Descriptions of all steps, taken before the plan is gone.
pub(crate) fn step(step: &Step, part: Part) -> String {
    let detail = match part {
        Part::Whole | Part::Attach => "",
        Part::Open => " (opening the path)",
        Part::Create => " (creating the mount point or file)",
        Part::Prepare => " (preparing)",
        Part::Parameter => " (setting an option)",
        Part::Attributes => " (setting attributes)",
        Part::Owner => " (setting owner or mode)",
        Part::OnProc => " (the path leads into /proc)",
        Part::Outside => " (there is no root file system yet)",
        Part::NotADevice => " (something else is in its place)",
        Part::CopyUp => " (copying what is there into it)",
        Part::Source => " (opening the source)",
        Part::Hook | Part::NoFilesystem => "",
    };
    let what = match step {
        Step::Enter { name, .. } => format!("entering the {name} namespace"),
        Step::EnterNetwork => "entering the net namespace".to_owned(),
        Step::EnterAll { .. } => "entering the container's namespaces".to_owned(),
        Step::BecomeRoot => "becoming root of the user namespace".to_owned(),
        Step::Session => "starting a session".to_owned(),
        Step::TakeHanded => "waiting for the container's cgroups".to_owned(),
        Step::JoinCgroup { dir, .. } => format!("entering cgroup {dir}"),
        Step::AwaitCgroup { .. } => "entering the cgroup namespace".to_owned(),
        Step::AwaitHooks => "waiting for hooks".to_owned(),
        Step::Hostname(name) => format!("setting the hostname {:?}", String::from_utf8_lossy(name)),
        Step::Domainname(name) => format!("setting the domain name {:?}", String::from_utf8_lossy(name)),
        Step::CutPropagation => "isolating the mount namespace".to_owned(),
        Step::AttachRoot { .. } => "attaching the root file system".to_owned(),
        Step::TimeOffsets(_) => "making a time namespace with offsets".to_owned(),
        Step::Affinity { .. } => "setting the processors to run on".to_owned(),
        Step::Hook(hook) => hook_name(hook),
        Step::Mount(m) if part == Part::NoFilesystem => {
            format!(
                "mounting {} at {:?}: this kernel has no such file system",
                m.fstype.to_string_lossy(),
                m.target.shown()
            )
        }
        Step::Mount(m) => format!("mounting {} at {:?}", m.fstype.to_string_lossy(), m.target.shown()),
        Step::Attach(m) => format!("mounting {:?} at {:?}", m.source, m.target.shown()),
        Step::Change { target, .. } => format!("changing the mount at {:?}", target.shown()),
        Step::Node(n) => format!("making device {}/{}", n.dir.shown(), n.name.to_string_lossy()),
        Step::Symlink { dir, name, .. } => format!("linking {}/{}", dir.shown(), name.to_string_lossy()),
        Step::Terminal(_) => "opening a terminal".to_owned(),
        Step::Sysctl { key, value, .. } => {
            format!("setting sysctl {key} to {:?}", String::from_utf8_lossy(value))
        }
        Step::Readonly(t) => format!("making {:?} read-only", t.shown()),
        Step::Mask(t) => format!("masking {:?}", t.shown()),
        Step::PivotRoot { .. } => "changing the root file system".to_owned(),
        Step::FindTerminals => "opening the container's /dev/pts".to_owned(),
    };
    format!("{what}{detail}")
}

/// The error for a failure in the last part.
fn last(subject: &Subject, last: Last, index: u16, errno: i32, told: &[u8]) -> Error {
    let why = (last == Last::Exec).then(|| binary::words(told, errno)).flatten();
    let cause = describe_errno(errno);
    let program = &subject.program;
    let found = subject.candidates.get(usize::from(index)).unwrap_or(program);
    let os = |text: String| Error::new(Kind::Os, format!("{text}: {cause}"));
    let error = match last {
        Last::NotFound if subject.searched => {
            Error::new(Kind::NotFound, format!("exec: {program:?}: executable file not found in $PATH"))
        }
        Last::NotFound => Error::new(Kind::NotFound, format!("exec: {program:?}: stat {program}: {cause}")),
        Last::NotExecutable => Error::new(Kind::PermissionDenied, format!("exec: {program:?}: {cause}")),
        Last::IsDirectory => Error::new(Kind::PermissionDenied, format!("exec: {program:?}: is a directory")),
        Last::Exec => match errno {
            libc::ENOEXEC => {
                let why = why
                    .unwrap_or_else(|| "a program for another architecture, or a script without #!".into());
                Error::new(Kind::NotExecutable, format!("exec {found}: exec format error: {why}"))
            }
            libc::ENOENT => {
                let why = why.unwrap_or_else(|| "the loader or interpreter it names is missing".into());
                Error::new(Kind::NotFound, format!("exec {found}: no such file or directory: {why}"))
            }
            libc::EACCES | libc::EPERM => {
                Error::new(Kind::PermissionDenied, format!("exec {found}: {cause}"))
            }
            _ => os(format!("exec {found}")),
        },
        Last::Stdio => os("setting up standard streams".into()),
        Last::Keyring => os("creating a session keyring".into()),
        Last::Rlimit => {
            let limit = subject.limits.get(usize::from(index)).map_or("a resource limit", String::as_str);
            let hint =
                if errno == libc::EPERM { " (raising a hard limit needs CAP_SYS_RESOURCE)" } else { "" };
            Error::new(Kind::Os, format!("setting {limit}: {cause}{hint}"))
        }
        Last::Label => {
            let label = subject.labels.get(usize::from(index)).map_or("a security label", String::as_str);
            // The kernel's word for a profile that was never loaded.
            let hint = if errno == libc::ENOENT { " (is it loaded?)" } else { "" };
            os(format!("applying {label}{hint}"))
        }
        Last::Personality => os("setting the personality".into()),
        Last::Scheduling if errno == libc::EPERM => os(
            "setting the scheduling policy (the process scheduler can't be used together with AllowedCPUs: \
             SCHED_DEADLINE needs every processor; others need CAP_SYS_NICE)"
                .into(),
        ),
        Last::Scheduling => os("setting the scheduling policy".into()),
        Last::IoPriority => os("setting the I/O priority".into()),
        Last::Bounding => os(format!("dropping capability {index} from the bounding set")),
        Last::Groups => os("setting supplementary groups".into()),
        Last::Gid => os(format!("setting group id {}", subject.gid)),
        Last::Uid => os(format!("setting user id {}", subject.uid)),
        Last::Capabilities => os("setting capabilities".into()),
        Last::Ambient => os(format!("raising ambient capability {index}")),
        Last::NoNewPrivileges => os("setting no_new_privs".into()),
        Last::ParentDeath => os("tying the process to its parent".into()),
        Last::Cwd => os(format!("entering the working directory {:?}", subject.cwd)),
        Last::CwdOutside => Error::new(
            Kind::PermissionDenied,
            format!("the working directory {:?} is outside the container's root", subject.cwd),
        ),
        Last::Seccomp => os("loading the seccomp filter".into()),
        Last::Descriptors => os("closing descriptors".into()),
        Last::Channel => os("talking to the runtime".into()),
        Last::MemoryPolicy => os("setting the memory policy".into()),
        Last::Executable => os("taking the runtime's own executable out of reach".into()),
        Last::StartHook => {
            let name =
                subject.start_hooks.get(usize::from(index)).map_or("startContainer hook", String::as_str);
            return hook_failed(name, errno, &hooks::one_line(told));
        }
    };
    error.with_errno(errno)
}

/// The error for any failure of a plan.
pub(crate) fn failure(steps: &[Step], subject: &Subject, failure: Failure) -> Error {
    failure_told(steps, subject, failure, &[])
}

/// With what the child told of the program besides.
pub(crate) fn failure_told(steps: &[Step], subject: &Subject, failure: Failure, told: &[u8]) -> Error {
    match failure.place {
        Place::Last(place, index) => last(subject, place, index, failure.errno, told),
        Place::Step(index, Part::Hook) => match steps.get(usize::from(index)) {
            Some(Step::Hook(hook)) => {
                let said = hook.said.as_ref().map(hooks::words).unwrap_or_default();
                hook_failed(&hook_name(hook), failure.errno, &said)
            }
            _ => hook_failed("hook", failure.errno, ""),
        },
        Place::Step(index, Part::Open)
            if failure.errno == libc::ELOOP
                && matches!(steps.get(usize::from(index)), Some(Step::Mount(m)) if m.target.strict) =>
        {
            let what = steps.get(usize::from(index)).map_or_else(String::new, |s| step(s, Part::Whole));
            Error::invalid(format!("{what}: must be mounted on ordinary directory, not on a symbolic link"))
                .with_errno(failure.errno)
        }
        Place::Step(index, part) => {
            let what =
                steps.get(usize::from(index)).map_or_else(|| "setting up".to_owned(), |s| step(s, part));
            Error::os(what, std::io::Error::from_raw_os_error(failure.errno))
        }
    }
}
