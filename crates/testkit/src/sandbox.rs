//! The namespaces, directory and cgroup that one test owns, and their certain end.
//!
//! Invariant: when the process that made a sandbox ends in any way, the kernel closes the pipe its keeper reads; the
//! keeper then ends the PID namespace's init (which kills every process inside), removes the cgroups and the directory.
//!
//! What `nsenter` put into the PID namespace and then left is an orphan of the outer namespace, and the inner one ends
//! only when it is reaped. So this process takes such orphans (`PR_SET_CHILD_SUBREAPER`) and reaps them itself: the
//! machine's own PID 1 may look but once a second.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Write as _},
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// A network, mount and PID namespace with a directory and a cgroup name of its own.
#[derive(Debug)]
pub struct Sandbox {
    keeper: Child,
    /// PID of the namespaces' init as the host sees it.
    init: u32,
    dir: PathBuf,
    cgroup: String,
}

/// Runs outside the new namespaces: starts the init, cleans up when that is gone.
const KEEPER: &str = r#"
dir=$1 cgroup=$2
trap '' INT TERM HUP
unshare --net --mount --propagation private --pid --fork --mount-proc sh -c '
    ip link set lo up || exit 1
    echo ready
    # In the background, because only a shell in "wait" also reaps the orphans that end up here.
    cat <&3 >/dev/null & wait $!
' 3<&0
# The name itself, what is below it, and names that go on with - or . (not with a digit: that is somebody else's).
tries=0
while [ $tries -lt 100 ]; do
    left=$(find /sys/fs/cgroup -depth -type d \( -name "$cgroup" -o -path "*/$cgroup/*" \
        -o -path "*/$cgroup-*" -o -path "*/$cgroup.*" \) -print 2>/dev/null)
    [ -n "$left" ] || break
    # What ran with the host's processes and was not ended by who started it.
    for group in $left; do
        while read -r process; do kill -9 "$process"; done <"$group/cgroup.procs"
    done 2>/dev/null
    echo "$left" | xargs -r rmdir 2>/dev/null || sleep 0.1
    tries=$((tries + 1))
done
rm -rf --one-file-system -- "$dir"
"#;

/// Numbers the sandboxes of this process.
static SERIAL: AtomicU32 = AtomicU32::new(0);

impl Sandbox {
    /// Makes the namespaces and waits until they stand.
    pub fn new() -> Result<Self> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let base = std::env::var_os("BRIG_TEST_TMP").map_or_else(std::env::temp_dir, PathBuf::from);
        // Short, for socket paths have to stay below 108 bytes.
        let dir = tempfile::Builder::new().prefix("bt-").rand_bytes(6).tempdir_in(&base)?.keep();
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let cgroup = format!("brigantine-test-{}-{serial}", std::process::id());
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .arg(&dir)
            .arg(&cgroup)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("cannot run sh")?;
        let mut line = String::new();
        if let Some(out) = keeper.stdout.take() {
            BufReader::new(out).read_line(&mut line)?;
        }
        if line != "ready\n" {
            keeper.wait()?;
            bail!(
                "cannot make namespaces for a test: needs root, util-linux' unshare and iproute2 (see above)"
            );
        }
        // sh → unshare → the namespaces' init.
        let init = only_child(keeper.id()).and_then(only_child).context("the sandbox has no init")?;
        Ok(Self { keeper, init, dir, cgroup })
    }

    /// A directory that vanishes with the sandbox.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The name (no slash) under which this sandbox's cgroups are to be made.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// The host's PID of the namespaces' init.
    pub fn init_pid(&self) -> u32 {
        self.init
    }

    /// `/proc/PID` of a process whose PID is given as the sandbox sees it.
    pub fn proc(&self, pid: impl std::fmt::Display) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/proc/{pid}", self.init))
    }

    /// A command that will run inside the sandbox.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--mount", "--pid", "--target", &self.init.to_string(), "--"]).arg(program);
        command
    }

    /// A command that will run in the sandbox's network alone, with the host's processes and files.
    pub fn net_command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.init)).arg("--").arg(program);
        command
    }

    /// Runs `work` on a thread that is in the sandbox's network; sockets made there stay there.
    pub fn within_net<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(&self.netns(), work)
    }

    /// The network namespace.
    #[track_caller]
    pub fn netns(&self) -> OwnedFd {
        fs::File::open(format!("/proc/{}/ns/net", self.init)).expect("the sandbox's init is gone").into()
    }

    /// The mounts of the sandbox's mount namespace: mount point and type, one a line.
    pub fn mounts(&self) -> Vec<String> {
        let table = fs::read_to_string(format!("/proc/{}/mounts", self.init)).unwrap_or_default();
        table
            .lines()
            .filter_map(|l| l.split(' ').nth(1).zip(l.split(' ').nth(2)))
            .map(|(at, ty)| format!("{at} {ty}"))
            .collect()
    }

    /// The directories of this sandbox's cgroups below the given parent's own, in every hierarchy.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
        roots.extend(
            fs::read_dir("/sys/fs/cgroup")
                .into_iter()
                .flatten()
                .flatten()
                .map(|e| e.path())
                .filter(|p| p.is_dir()),
        );
        for parent in roots.into_iter().map(|r| r.join(&self.cgroup)).filter(|p| p.is_dir()) {
            walk(&parent, &mut found);
        }
        found
    }

    /// The processes in the sandbox, as (PID in the sandbox, command line); kernel-side zombies included.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mut all = Vec::new();
        for entry in fs::read_dir(self.proc("")).into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
            let raw = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let mut line = String::from_utf8_lossy(&raw).replace('\0', " ").trim_end().to_owned();
            if line.is_empty() {
                let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
                let Some(name) = status.lines().next() else { continue };
                line = format!("[{}]", name.trim_start_matches("Name:\t"));
            }
            all.push((pid, line));
        }
        all.sort_unstable();
        all
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // On version 1, who is frozen does not even die.
        for dir in self.cgroups() {
            let state = dir.join("freezer.state");
            if state.exists() && fs::write(&state, "THAWED").is_err() {}
        }
        drop(self.keeper.stdin.take());
        loop {
            reap_orphans();
            match self.keeper.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Ok(Some(_)) => break,
                Err(e) => {
                    let mut err = std::io::stderr();
                    writeln!(err, "testkit: the keeper of {} was lost: {e}", self.dir.display()).ok();
                    break;
                }
            }
        }
    }
}

/// Reaps the dead of inner PID namespaces that fell to this process; its own children are left to who started them.
fn reap_orphans() {
    for thread in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for pid in children.split_ascii_whitespace() {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let field =
                |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            let dead = field("State:").trim_start().starts_with('Z');
            if dead && field("NSpid:").split_ascii_whitespace().count() > 1 {
                let pid = pid.parse().ok().and_then(rustix::process::Pid::from_raw);
                // Another thread may have been quicker.
                rustix::process::waitpid(pid, rustix::process::WaitOptions::NOHANG).ok();
            }
        }
    }
}

/// Runs `work` on a thread that has moved to the network namespace `netns`.
pub fn within<T: Send>(netns: &OwnedFd, work: impl FnOnce() -> T + Send) -> T {
    use std::os::fd::AsFd as _;
    std::thread::scope(|scope| {
        let task = scope.spawn(|| {
            rustix::thread::move_into_link_name_space(
                netns.as_fd(),
                Some(rustix::thread::LinkNameSpaceType::Network),
            )
            .expect("setns to a test's network namespace");
            work()
        });
        match task.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The first child of a process.
pub(crate) fn only_child(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_ascii_whitespace().next()?.parse().ok()
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            walk(&entry.path(), found);
            found.push(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_in_a_sandbox_dies_with_it() {
        let sandbox = Sandbox::new().unwrap();
        let dir = sandbox.dir().to_owned();
        let mut sleeper = sandbox.command("sh").args(["-c", "sleep 1000 & sleep 1000"]).spawn().unwrap();
        crate::eventually("two sleepers", || {
            (sandbox.processes().iter().filter(|(_, line)| line == "sleep 1000").count() == 2).then_some(())
        });
        let init = sandbox.init_pid();
        drop(sandbox);
        assert!(!sleeper.wait().unwrap().success());
        assert!(!dir.exists());
        assert!(!Path::new(&format!("/proc/{init}")).exists());
    }

    #[test]
    fn what_runs_in_its_cgroups_ends_with_it() {
        let Some(root) =
            ["/sys/fs/cgroup/cpuacct", "/sys/fs/cgroup"].map(Path::new).into_iter().find(|p| p.exists())
        else {
            return;
        };
        let sandbox = Sandbox::new().unwrap();
        let group = root.join(format!("{}-meter", sandbox.cgroup()));
        // The next but eight of this process: no part of the first.
        let other = root.join(format!("{}0", sandbox.cgroup()));
        for dir in [&group, &other] {
            fs::create_dir(dir).unwrap();
        }
        let mut left = Command::new("sleep").arg("1000").spawn().unwrap();
        fs::write(group.join("cgroup.procs"), left.id().to_string()).unwrap();
        drop(sandbox);
        assert!(!left.wait().unwrap().success());
        assert!(!group.exists() && other.exists());
        fs::remove_dir(other).unwrap();
    }

    #[test]
    fn a_sandbox_has_its_own_network() {
        let sandbox = Sandbox::new().unwrap();
        let port = sandbox.within_net(|| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let addr = port.local_addr().unwrap();
        assert!(sandbox.within_net(|| std::net::TcpStream::connect(addr).is_ok()));
        let links = sandbox.command("ls").arg("/proc/self/net/dev_snmp6").output().unwrap();
        assert_eq!(String::from_utf8_lossy(&links.stdout), "lo\n");
    }
}
