//! `sd_notify(3)` for the container: its messages reach the service manager that started the runtime.
//!
//! The container gets a socket of its own in `/run/notify`; the manager's is never mounted.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};

use crate::error::Error;
use crate::spec::{Mount, Spec};

const INSIDE: &str = "/run/notify";

/// The manager's socket, if there is one.
fn host() -> Option<PathBuf> {
    std::env::var_os("NOTIFY_SOCKET").filter(|s| !s.is_empty()).map(PathBuf::from)
}

/// Whether a container's spec will not be what its file says.
pub(crate) fn is_wanted() -> bool {
    host().is_some()
}

/// Makes the directory `dir`, and has the spec mount it and name the socket in it.
pub(crate) fn prepare(dir: &Path, spec: &mut Spec) -> Result<(), Error> {
    if host().is_none() {
        return Ok(());
    }
    let failed = |e| Error::os(format!("creating {}", dir.display()), e);
    std::fs::create_dir(dir).map_err(failed)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).map_err(failed)?;
    let mut mount = Mount::default();
    let options = ["bind", "nosuid", "noexec", "nodev", "ro"].map(str::to_owned);
    mount
        .set_destination(INSIDE.into())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(dir.to_owned()))
        .set_options(Some(options.to_vec()));
    spec.mounts_mut().get_or_insert_default().push(mount);
    if let Some(process) = spec.process_mut() {
        let mut env = process.env().clone().unwrap_or_default();
        env.retain(|e| !e.starts_with("NOTIFY_SOCKET="));
        env.push(format!("NOTIFY_SOCKET={INSIDE}/notify.sock"));
        process.set_env(Some(env));
    }
    Ok(())
}

/// Passes a container's messages on.
#[derive(Debug)]
pub(crate) struct Proxy {
    socket: UnixDatagram,
    host: PathBuf,
}

impl Proxy {
    /// Binds the container's socket in `dir`; none without a manager, or where [`prepare`] was not called.
    pub fn bind(dir: &Path) -> Result<Option<Self>, Error> {
        let Some(host) = host().filter(|_| dir.is_dir()) else { return Ok(None) };
        let failed = |e| Error::os(format!("binding the notification socket in {}", dir.display()), e);
        // A socket's address is short; a path through the directory's descriptor always is.
        let fd = std::fs::File::open(dir).map_err(failed)?;
        let address = format!("/proc/self/fd/{}/notify.sock", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let socket = UnixDatagram::bind(&address).map_err(failed)?;
        // Whoever the container's program is may write to it.
        std::fs::set_permissions(&address, std::fs::Permissions::from_mode(0o777)).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        Ok(Some(Self { socket, host }))
    }

    /// Waits until the container is ready, or its process ends; then tells the manager which process to
    /// watch from now on.
    pub fn wait_ready(&self, pid: i32, process: BorrowedFd<'_>) -> Result<(), Error> {
        loop {
            let mut fds =
                [PollFd::new(&self.socket, PollFlags::IN), PollFd::from_borrowed_fd(process, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::os("waiting for the container to be ready", e)),
            }
            let ended = !fds[1].revents().is_empty();
            if self.pass_on()? {
                return self.tell(format!("MAINPID={pid}\n").as_bytes());
            }
            if ended {
                return Ok(());
            }
        }
    }

    /// Passes on what is there; true if the container is ready.
    pub fn pass_on(&self) -> Result<bool, Error> {
        let mut buffer = [0_u8; 4096];
        let mut ready = false;
        // What cannot be read is not there.
        while let Ok(length) = self.socket.recv(&mut buffer) {
            let text = &buffer[..length];
            ready |= text.split(|b| *b == b'\n').any(|line| line == b"READY=1");
            // A container must not speak for other processes of the host.
            let lines = text.split(|b| *b == b'\n').filter(|l| !l.is_empty() && !l.starts_with(b"MAINPID="));
            let mut message = lines.collect::<Vec<_>>().join(&b'\n');
            message.push(b'\n');
            self.tell(&message)?;
        }
        Ok(ready)
    }

    fn tell(&self, message: &[u8]) -> Result<(), Error> {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::net::SocketAddr;
        let failed = |e| Error::os(format!("notifying {}", self.host.display()), e);
        let socket = UnixDatagram::unbound().map_err(failed)?;
        let address = match self.host.as_os_str().as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(&self.host),
        };
        socket.send_to_addr(message, &address.map_err(failed)?).map(drop).map_err(failed)
    }
}

impl AsFd for Proxy {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
