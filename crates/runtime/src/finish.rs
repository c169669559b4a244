//! The last part of the child: privileges, program, gate, exec. Same invariant as `child`.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use brigantine_sys::exec::execve;
use brigantine_sys::{fd as descriptors, process, seccomp};
use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::child::{expect, fail, send};
use crate::inside;
use crate::plan::{Filter, Gate, Last, Message, Place, Plan, ProcessPlan};

/// The most that is told beyond a failure's message.
pub(crate) const TOLD: usize = 4096;

/// Hooks, channel, gate: more descriptors than these are not kept open for a waiting process.
const MOST_KEPT: usize = 64;

type Outcome<T = ()> = Result<T, (Last, u16, Errno)>;

fn at(last: Last) -> impl Fn(Errno) -> (Last, u16, Errno) {
    move |errno| (last, 0, errno)
}

/// Everything after the file systems; returns only on failure, with the exit status. `may_start`: the parent has said
/// so already.
pub(crate) fn run(plan: &mut Plan, channel: BorrowedFd<'_>, may_start: bool) -> i32 {
    let program = match prepare(plan, channel) {
        Ok(program) => program,
        Err((last, index, errno)) => return fail(channel, Place::Last(last, index), errno),
    };
    if plan.process.listened_early
        && let Err(e) = load_filter(&plan.process, channel)
    {
        return fail(channel, Place::Last(Last::Seccomp, 0), e);
    }
    if !may_start && rustix::process::getpid().is_init() {
        // Whoever ends a container that waits to be started need not know what a first process is spared.
        process::end_by_signals();
    }
    // Whoever has said already that the program may start does not wait for this.
    if !may_start && send(channel, Message::Ready).is_err() {
        return 127;
    }
    let starter = match &plan.gate {
        Gate::Channel if may_start => None,
        Gate::Channel => match expect(channel, Message::Start) {
            Ok(()) => None,
            Err(_) => return 127,
        },
        Gate::Listener(listener) => match await_start(listener.as_fd()) {
            Ok(connection) => Some(connection),
            Err(_) => return 127,
        },
    };
    let channel = starter.as_ref().map_or(channel, AsFd::as_fd);
    let (last, index, errno) = leave(&plan.process, program as u16, channel);
    let status = fail(channel, Place::Last(last, index), errno);
    let p = &plan.process;
    let (path, hook) = (p.candidates.get(program), p.start_hooks.get(usize::from(index)));
    match (last, path, hook.and_then(|hook| hook.said.as_ref())) {
        // What the program would have needed; the kernel's word for it is one number.
        (Last::Exec, Some(path), _) => crate::binary::tell(path, channel),
        (Last::StartHook, _, Some(said)) => tell_said(said, channel),
        _ => {}
    }
    status
}

impl Plan {
    /// The descriptors that are needed from here on, and how many they are.
    fn kept(&self, channel: BorrowedFd<'_>) -> ([u32; MOST_KEPT], usize) {
        let gate = match &self.gate {
            Gate::Channel => None,
            Gate::Listener(listener) => Some(listener.as_fd()),
        };
        let said = self.process.start_hooks.iter().filter_map(|hook| hook.said.as_ref()).map(AsFd::as_fd);
        let mut kept = [0; MOST_KEPT];
        let mut count = 0;
        for (place, fd) in kept.iter_mut().zip([channel].into_iter().chain(gate).chain(said)) {
            *place = fd.as_raw_fd().cast_unsigned();
            count += 1;
        }
        (kept, count)
    }
}

/// What a hook said on stderr, after the message that it failed.
fn tell_said(said: &OwnedFd, channel: BorrowedFd<'_>) {
    let mut buffer = [0_u8; TOLD];
    let length = rustix::io::pread(said, &mut buffer, 0).unwrap_or_default();
    // Whoever does not listen any more does not want to know.
    rustix::net::send(channel, &buffer[..length], rustix::net::SendFlags::NOSIGNAL).ok();
}

/// Accepts connections until one says to start.
fn await_start(listener: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    loop {
        let connection = match rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            other => other?,
        };
        if expect(connection.as_fd(), Message::Start).is_ok() {
            return Ok(connection);
        }
    }
}

/// Up to right before the gate; the result is the program's place among the candidates.
fn prepare(plan: &mut Plan, channel: BorrowedFd<'_>) -> Outcome<usize> {
    let own = plan.kept(channel);
    let p = &mut plan.process;
    if let Some(stdio) = &plan.stdio {
        redirect(stdio)?;
    }
    // A file below the caller's /proc: the container's own may be anything.
    for (index, (file, text)) in p.labels.iter().enumerate() {
        let failed = |errno| (Last::Label, index as u16, errno);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&plan.proc, file, flags, Mode::empty()).map_err(failed)?;
        rustix::io::write(&fd, text).map_err(failed)?;
    }
    // What the plan was made of is used up. It must not count towards the program's limit, nor be there to be found
    // while the container waits to be started.
    let (mut kept, count) = own;
    descriptors::close_all_but(3 + p.preserve_fds, &mut kept[..count]).map_err(at(Last::Descriptors))?;
    if p.keyring {
        match process::join_new_session_keyring() {
            // A kernel without keyrings has nothing to hide.
            Ok(()) | Err(Errno::NOSYS) => {}
            Err(e) => return Err((Last::Keyring, 0, e)),
        }
    }
    for (index, (resource, limit, _)) in p.rlimits.iter().enumerate() {
        rustix::process::setrlimit(*resource, *limit).map_err(|e| (Last::Rlimit, index as u16, e))?;
    }
    if let Some(scheduling) = p.scheduling {
        process::set_scheduling(scheduling).map_err(at(Last::Scheduling))?;
    }
    if let Some(value) = p.io_priority {
        process::set_io_priority(value).map_err(at(Last::IoPriority))?;
    }
    if let Some(policy) = &p.memory_policy {
        process::set_memory_policy(policy.mode, &policy.nodes).map_err(at(Last::MemoryPolicy))?;
    }
    if let Some(domain) = p.personality {
        process::set_personality(domain).map_err(at(Last::Personality))?;
    }
    if p.own_stdio {
        own_stdio(p);
    }
    if p.make_cwd {
        make_cwd(p)?;
    }
    if p.find_home {
        find_home(p);
    }
    // A user may be given a directory that it could not enter by itself; or one that only it can.
    let entered = match enter_cwd(p) {
        Ok(()) => true,
        Err((_, _, Errno::ACCESS | Errno::PERM)) => false,
        Err(e) => return Err(e),
    };
    become_user(p)?;
    if !entered {
        enter_cwd(p)?;
    }
    find_program(p)
}

fn redirect(stdio: &[OwnedFd; 3]) -> Outcome {
    // Sources that are themselves 0, 1 or 2 were moved away when the plan was made.
    for (number, fd) in stdio.iter().enumerate() {
        descriptors::become_stdio(fd.as_fd(), number as i32).map_err(at(Last::Stdio))?;
    }
    Ok(())
}

/// Pipes and terminals must belong to the user, or `/dev/stdout` cannot be opened by it.
fn own_stdio(p: &ProcessPlan) {
    for fd in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        let Ok(stat) = rustix::fs::fstat(fd) else { continue };
        let kind = FileType::from_raw_mode(stat.st_mode);
        let terminal =
            kind == FileType::CharacterDevice && (136..144).contains(&rustix::fs::major(stat.st_rdev));
        if (kind == FileType::Fifo || terminal) && stat.st_uid != p.uid.as_raw() {
            // A descriptor that cannot be given away is still usable as it is.
            rustix::fs::fchown(fd, Some(p.uid), None).ok();
        }
    }
}

/// The working directory is made, with its parents, if the image lacks it.
fn make_cwd(p: &ProcessPlan) -> Outcome {
    if rustix::fs::stat(&p.cwd).is_ok() {
        return Ok(());
    }
    let mut prefix = [0_u8; 4096];
    let bytes = p.cwd.to_bytes();
    if bytes.len() >= prefix.len() {
        return Err((Last::Cwd, 0, Errno::NAMETOOLONG));
    }
    for end in 1..=bytes.len() {
        if end < bytes.len() && bytes[end] != b'/' {
            continue;
        }
        prefix[..end].copy_from_slice(&bytes[..end]);
        prefix[end] = 0;
        let Ok(path) = std::ffi::CStr::from_bytes_with_nul(&prefix[..=end]) else {
            return Err((Last::Cwd, 0, Errno::INVAL));
        };
        match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err((Last::Cwd, 0, e)),
        }
    }
    Ok(())
}

/// HOME from the container's own user table; `/` where it does not say.
fn find_home(p: &mut ProcessPlan) {
    let mut line = [0_u8; 1024];
    let mut length = 0;
    let mut overlong = false;
    let file = rustix::fs::openat2(
        rustix::fs::CWD,
        c"/etc/passwd",
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
        Mode::empty(),
        ResolveFlags::NO_MAGICLINKS,
    );
    if let Ok(file) = file
        && rustix::fs::fstat(&file).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile)
    {
        let mut buffer = [0_u8; 4096];
        // An absurd table is not read to its end.
        for _ in 0..1024 {
            let Ok(count @ 1..) = rustix::io::read(&file, &mut buffer) else { break };
            for &byte in &buffer[..count] {
                if byte != b'\n' {
                    match line.get_mut(length) {
                        Some(slot) => *slot = byte,
                        None => overlong = true,
                    }
                    length = (length + 1).min(line.len());
                    continue;
                }
                let complete = !std::mem::take(&mut overlong);
                let text = &line[..std::mem::take(&mut length)];
                if complete
                    && let Some(home) = home_in(text, p.uid.as_raw())
                    && p.envp.fill(&[b"HOME=", home])
                {
                    return;
                }
            }
        }
        if !overlong
            && let Some(home) = home_in(&line[..length], p.uid.as_raw())
            && p.envp.fill(&[b"HOME=", home])
        {
            return;
        }
    }
    // `/` always fits in the room that was reserved.
    p.envp.fill(&[b"HOME=/"]);
}

/// The home directory in a line of the user table, if the line is that user's.
pub(crate) fn home_in(line: &[u8], uid: u32) -> Option<&[u8]> {
    let mut fields = line.split(|&b| b == b':');
    let number = fields.nth(2)?;
    if number.is_empty() || number.len() > 10 {
        return None;
    }
    let mut value: u64 = 0;
    for &digit in number {
        if !digit.is_ascii_digit() {
            return None;
        }
        value = value * 10 + u64::from(digit - b'0');
    }
    if value != u64::from(uid) {
        return None;
    }
    fields.nth(2).filter(|home| home.first() == Some(&b'/'))
}

fn become_user(p: &ProcessPlan) -> Outcome {
    for number in 0..64_u16 {
        if p.drop_bounding & 1 << number != 0 {
            let one = CapabilitySet::from_bits_retain(1 << number);
            rustix::thread::remove_capability_from_bounding_set(one)
                .map_err(|e| (Last::Bounding, number, e))?;
        }
    }
    rustix::thread::set_keep_capabilities(true).map_err(at(Last::Capabilities))?;
    if p.set_groups {
        rustix::thread::set_thread_groups(&p.groups).map_err(at(Last::Groups))?;
    }
    rustix::thread::set_thread_res_gid(p.gid, p.gid, p.gid).map_err(at(Last::Gid))?;
    rustix::thread::set_thread_res_uid(p.uid, p.uid, p.uid).map_err(at(Last::Uid))?;
    rustix::thread::set_keep_capabilities(false).map_err(at(Last::Capabilities))?;
    if let Some(mask) = p.umask {
        rustix::process::umask(Mode::from_raw_mode(mask));
    } else {
        rustix::process::umask(Mode::from_raw_mode(0o022));
    }
    let mut sets = p.capabilities;
    if p.seccomp.is_some() && !p.no_new_privileges {
        // Loading a filter without no_new_privs needs CAP_SYS_ADMIN. It is kept for that one call:
        // the exec right after it recomputes what is permitted and effective from the bounding,
        // inheritable and ambient sets, none of which has it unless asked for.
        sets.permitted |= CapabilitySet::SYS_ADMIN;
        sets.effective |= CapabilitySet::SYS_ADMIN;
    }
    set_capabilities(sets).map_err(at(Last::Capabilities))?;
    rustix::thread::clear_ambient_capability_set().map_err(at(Last::Ambient))?;
    for number in 0..64_u16 {
        if p.ambient & 1 << number != 0 {
            let one = CapabilitySet::from_bits_retain(1 << number);
            rustix::thread::configure_capability_in_ambient_set(one, true)
                .map_err(|e| (Last::Ambient, number, e))?;
        }
    }
    if p.no_new_privileges {
        rustix::thread::set_no_new_privs(true).map_err(at(Last::NoNewPrivileges))?;
    }
    if p.die_with_parent {
        // A change of user clears it.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(at(Last::ParentDeath))?;
    }
    Ok(())
}

fn set_capabilities(sets: CapabilitySets) -> Result<(), Errno> {
    rustix::thread::set_capabilities(None, sets)
}

/// Enters the working directory and proves that it is below the root: a path through a descriptor
/// that was left open would not be (CVE-2024-21626).
fn enter_cwd(p: &ProcessPlan) -> Outcome {
    let dir = rustix::fs::openat2(
        rustix::fs::CWD,
        &p.cwd,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_MAGICLINKS,
    )
    .map_err(|e| (if e == Errno::LOOP { Last::CwdOutside } else { Last::Cwd }, 0, e))?;
    rustix::process::fchdir(&dir).map_err(at(Last::Cwd))?;
    let mut buffer = [0_u8; 4096];
    match process::current_directory(&mut buffer) {
        Ok(_) if buffer.first() == Some(&b'/') => Ok(()),
        Ok(_) => Err((Last::CwdOutside, 0, Errno::XDEV)),
        Err(e) => Err((Last::CwdOutside, 0, e)),
    }
}

fn find_program(p: &ProcessPlan) -> Outcome<usize> {
    let mut denied = None;
    for (index, candidate) in p.candidates.iter().enumerate() {
        let place = index as u16;
        let stat = match rustix::fs::stat(candidate) {
            Ok(stat) => stat,
            Err(e @ (Errno::NOENT | Errno::NOTDIR)) => {
                if !p.searched {
                    return Err((Last::NotFound, place, e));
                }
                continue;
            }
            Err(e) => {
                if !p.searched {
                    return Err((Last::NotExecutable, place, e));
                }
                denied = Some((Last::NotExecutable, place, e));
                continue;
            }
        };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            if !p.searched {
                return Err((Last::IsDirectory, place, Errno::ISDIR));
            }
            continue;
        }
        match rustix::fs::accessat(rustix::fs::CWD, candidate, Access::EXEC_OK, AtFlags::EACCESS) {
            Ok(()) => return Ok(index),
            Err(e) if !p.searched => return Err((Last::NotExecutable, place, e)),
            Err(e) => denied = Some((Last::NotExecutable, place, e)),
        }
    }
    Err(denied.unwrap_or((Last::NotFound, 0, Errno::NOENT)))
}

/// Behind the gate: descriptors, filter, hooks under it, exec. What failed, and which of its kind.
fn leave(p: &ProcessPlan, program: u16, channel: BorrowedFd<'_>) -> (Last, u16, Errno) {
    let Some(path) = p.candidates.get(usize::from(program)) else {
        return (Last::Exec, program, Errno::NOENT);
    };
    if let Err(e) = descriptors::close_on_exec_from(3 + p.preserve_fds) {
        return (Last::Descriptors, 0, e);
    }
    for number in 3..3 + p.preserve_fds {
        match descriptors::keep_on_exec(number as i32) {
            Ok(()) | Err(Errno::BADF) => {}
            Err(e) => return (Last::Descriptors, 0, e),
        }
    }
    if !p.listened_early
        && let Err(e) = load_filter(p, channel)
    {
        return (Last::Seccomp, 0, e);
    }
    for (index, hook) in p.start_hooks.iter().enumerate() {
        if let Err(failure) = inside::run(hook, None, &p.envp) {
            return (Last::StartHook, index as u16, Errno::from_raw_os_error(failure.encode()));
        }
    }
    (Last::Exec, program, execve(path, &p.argv, &p.envp))
}

/// Nothing, if there is no filter.
fn load_filter(p: &ProcessPlan, channel: BorrowedFd<'_>) -> Result<(), Errno> {
    let Some((filter, flags)) = &p.seccomp else { return Ok(()) };
    let (code, flags) = match filter {
        Filter::Compiled(code) => (&code[..], *flags),
        // It was there before the parent said to start.
        Filter::Coming(reader) => reader.get().ok_or(Errno::NODATA)?,
    };
    if code.is_empty() {
        return Ok(());
    }
    match seccomp::load(code, flags)? {
        Some(listener) => hand_over(&listener, channel),
        None => Ok(()),
    }
}

/// The filter is in force already: `write`, which it may not put before its listener, tells the
/// parent where the listener's descriptor is; whatever follows is the listener's to answer.
fn hand_over(listener: &OwnedFd, channel: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::io::write(channel, &Message::Listener(listener.as_raw_fd()).encode())?;
    let mut answer = [0_u8; crate::plan::MESSAGE_LENGTH];
    let length = rustix::io::read(channel, &mut answer)?;
    match answer.get(..length).and_then(Message::decode) {
        Some(Message::HooksDone) => Ok(()),
        _ => Err(Errno::PIPE),
    }
}

#[cfg(test)]
mod tests {
    use super::home_in;

    #[test]
    fn homes_are_found_by_number() {
        assert_eq!(home_in(b"root:x:0:0:root:/root:/bin/sh", 0), Some(&b"/root"[..]));
        assert_eq!(home_in(b"root:x:0:0:root:/root:/bin/sh", 1), None);
        assert_eq!(home_in(b"a:x:00:0", 0), None);
        assert_eq!(home_in(b"x:x:99999999999:0::/h:", 0), None);
        assert_eq!(home_in(b"x:x:5:0::relative:", 5), None);
    }
}
