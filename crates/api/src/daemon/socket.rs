//! The daemon's listening sockets.
//!
//! Invariant: a unix socket is never open to more than its owner and group, not even for the moment between its
//! creation and its change of mode, and a socket somebody listens on is never taken away.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::options::Host;
use super::tls::{self, TlsError, TlsFiles};
use crate::http::server::Listener;

/// The group that may use the socket when none is named and it exists.
const DEFAULT_GROUP: &str = "docker";

/// Why the daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("{operation} {}", .path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{} exists and is not a socket: remove it or choose another -H", .path.display())]
    NotASocket { path: PathBuf },
    #[error("another program listens on {}", .path.display())]
    InUse { path: PathBuf },
    #[error("group {0} does not exist")]
    NoGroup(String),
    #[error("the service manager passed no socket for fd://{0}")]
    NoInherited(String),
    #[error("listen on tcp://{address}")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("set up TLS")]
    Tls(#[from] TlsError),
    #[error("tcp://{0} needs --tlsverify")]
    NoTls(SocketAddr),
    #[error("a socket of the service manager is no listening unix socket")]
    NotUnix(#[source] io::Error),
}

/// A socket to serve on; a path we made is removed at the end.
pub struct Socket {
    /// Taken by whoever serves it; the path is still removed with this value.
    pub listener: Option<Listener>,
    made: Option<PathBuf>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(path) = &self.made
            && let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "removing the socket");
        }
    }
}

/// Binds every host. `group` is the one named by `--group`; `private` is a 0700 directory that the group must be able
/// to pass when a socket lies in it.
pub fn listen(
    hosts: &[Host],
    group: Option<&str>,
    private: &Path,
    tls: Option<&TlsFiles>,
) -> Result<Vec<Socket>, ListenError> {
    let mut inherited: Vec<Option<OwnedFd>> =
        brigantine_sys::inherit::listen_fds().into_iter().map(Some).collect();
    let gid = socket_group(group)?;
    let mut sockets = Vec::new();
    for host in hosts {
        match host {
            Host::Unix(path) => {
                if path.parent() == Some(private)
                    && let Some(gid) = gid
                {
                    let io = |operation| {
                        move |source| ListenError::Io { operation, path: private.to_owned(), source }
                    };
                    std::os::unix::fs::chown(private, None, Some(gid)).map_err(io("change the group of"))?;
                    set_mode(private, 0o710).map_err(io("change the mode of"))?;
                }
                sockets.push(bind(path, Some(0), gid)?);
            }
            Host::Tcp(address) => {
                let files = tls.ok_or(ListenError::NoTls(*address))?;
                let config = tls::server_config(files)?;
                let io = |source| ListenError::Tcp { address: *address, source };
                let listener = std::net::TcpListener::bind(address).map_err(io)?;
                listener.set_nonblocking(true).map_err(io)?;
                let listener = tokio::net::TcpListener::from_std(listener).map_err(io)?;
                sockets.push(Socket { listener: Some(Listener::Tls(listener, config.into())), made: None });
            }
            Host::Inherited(which) => {
                let before = sockets.len();
                for (index, slot) in inherited.iter_mut().enumerate() {
                    // Named by position, or by descriptor number as dockerd does (the first is 3).
                    if which.is_none_or(|which| which == index || which == index + 3)
                        && let Some(fd) = slot.take()
                    {
                        sockets.push(adopt(fd)?);
                    }
                }
                if sockets.len() == before {
                    return Err(ListenError::NoInherited(which.map_or_else(String::new, |n| n.to_string())));
                }
            }
        }
    }
    Ok(sockets)
}

/// Who owns a project's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

impl Owner {
    /// `USER[:GROUP]`, names or numbers; without a group the user's own.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self { uid: 0, gid: 0 });
        }
        let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let unknown = |what: &str, name: &str| format!("{what} {name} does not exist");
        let (uid, own) = match user.parse::<u32>() {
            Ok(uid) => (uid, entry("/etc/passwd", |fields| fields.get(2) == Some(&user), 3)),
            Err(_name) => {
                let uid = entry("/etc/passwd", |fields| fields.first() == Some(&user), 2);
                let gid = entry("/etc/passwd", |fields| fields.first() == Some(&user), 3);
                (uid.ok_or_else(|| unknown("user", user))?, gid)
            }
        };
        let gid = match group {
            Some(group) => match group.parse::<u32>() {
                Ok(gid) => gid,
                Err(_name) => group_id(group).ok_or_else(|| unknown("group", group))?,
            },
            None => own.ok_or_else(|| format!("user {user} has no group of its own: say USER:GROUP"))?,
        };
        Ok(Self { uid, gid })
    }
}

/// The number in a field of the line of a table like `/etc/passwd` that is `wanted`.
fn entry(path: &str, wanted: impl Fn(&[&str]) -> bool, field: usize) -> Option<u32> {
    let table = std::fs::read_to_string(path).ok()?;
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        wanted(&fields).then(|| fields.get(field)?.parse().ok()).flatten()
    })
}

/// Binds a project's socket: open to its owner and group alone.
pub fn bind_for(path: &Path, owner: Owner) -> Result<Socket, ListenError> {
    bind(path, Some(owner.uid), Some(owner.gid))
}

/// Lets everybody pass through a directory, which shows them nothing of what is in it.
pub fn let_pass(dir: &Path) -> Result<(), ListenError> {
    let io = |source| ListenError::Io { operation: "change the mode of", path: dir.to_owned(), source };
    let mode = std::fs::metadata(dir).map_err(io)?.permissions().mode();
    if mode & 0o001 == 0 { set_mode(dir, (mode & 0o777) | 0o001).map_err(io) } else { Ok(()) }
}

fn bind(path: &Path, uid: Option<u32>, gid: Option<u32>) -> Result<Socket, ListenError> {
    let io = |operation| move |source| ListenError::Io { operation, path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("look at")(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NotASocket { path: path.to_owned() });
        }
        // A socket nobody listens on was left by a daemon that was killed.
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(io("remove the stale socket"))?;
            }
            _ => return Err(ListenError::InUse { path: path.to_owned() }),
        },
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io("create the directory of"))?;
    }
    let previous = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(previous);
    let listener = bound.map_err(io("listen on"))?;
    let prepared = (|| {
        if let Some(gid) = gid {
            std::os::unix::fs::chown(path, uid, Some(gid))
                .or_else(|error| if rustix::process::geteuid().is_root() { Err(error) } else { Ok(()) })
                .map_err(io("change the group of"))?;
        }
        set_mode(path, 0o660).map_err(io("change the mode of"))?;
        into_tokio(listener).map_err(io("listen on"))
    })();
    match prepared {
        Ok(listener) => Ok(Socket { listener: Some(listener), made: Some(path.to_owned()) }),
        Err(error) => {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "removing the socket");
            }
            Err(error)
        }
    }
}

fn adopt(fd: OwnedFd) -> Result<Socket, ListenError> {
    let listening = rustix::net::sockopt::socket_acceptconn(&fd).map_err(io::Error::from);
    let unix = rustix::net::sockopt::socket_domain(&fd).map_err(io::Error::from);
    match (listening, unix) {
        (Ok(true), Ok(rustix::net::AddressFamily::UNIX)) => {}
        (Err(error), _) | (_, Err(error)) => return Err(ListenError::NotUnix(error)),
        _ => return Err(ListenError::NotUnix(io::Error::from(io::ErrorKind::InvalidInput))),
    }
    let listener = into_tokio(UnixListener::from(fd)).map_err(ListenError::NotUnix)?;
    Ok(Socket { listener: Some(listener), made: None })
}

fn into_tokio(listener: UnixListener) -> io::Result<Listener> {
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener).map(Listener::Unix)
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

/// The group's number: the named one must exist, the default one need not.
fn socket_group(name: Option<&str>) -> Result<Option<u32>, ListenError> {
    match name {
        Some("") => Ok(None),
        Some(name) => match name.parse::<u32>() {
            Ok(gid) => Ok(Some(gid)),
            Err(_) => group_id(name).map(Some).ok_or_else(|| ListenError::NoGroup(name.to_owned())),
        },
        None => {
            let found = group_id(DEFAULT_GROUP);
            if found.is_none() {
                tracing::debug!("there is no group {DEFAULT_GROUP}: only root may use the socket");
            }
            Ok(found)
        }
    }
}

fn group_id(name: &str) -> Option<u32> {
    entry("/etc/group", |fields| fields.first() == Some(&name), 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let socket = bind(&path, None, None).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(bind(&path, None, None), Err(ListenError::InUse { .. })));
        drop(socket);
        assert!(!path.exists());
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(bind(&path, None, None), Err(ListenError::NotASocket { .. })));
    }

    #[test]
    fn owners_are_names_or_numbers() {
        assert_eq!(Owner::parse(""), Ok(Owner { uid: 0, gid: 0 }));
        assert_eq!(Owner::parse("root"), Ok(Owner { uid: 0, gid: 0 }));
        assert_eq!(Owner::parse("4711:4712"), Ok(Owner { uid: 4711, gid: 4712 }));
        assert!(Owner::parse("4711").is_err_and(|text| text.contains("USER:GROUP")));
        assert!(Owner::parse("no-such-user-here").is_err());
        assert!(Owner::parse("root:no-such-group-here").is_err());
    }

    #[test]
    fn a_named_group_must_exist() {
        assert!(matches!(socket_group(Some("no-such-group-here")), Err(ListenError::NoGroup(_))));
        assert_eq!(socket_group(Some("4711")).unwrap(), Some(4711));
        assert_eq!(socket_group(Some("")).unwrap(), None);
        assert_eq!(group_id("root"), Some(0));
    }
}
