//! Connecting, and starting a daemon first when none listens on the default socket.
//!
//! Clients that race here each start a daemon; the daemon's own lock on its data root lets one live, and every client
//! then finds that one's socket.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::net::{TcpStream, UnixStream};

use super::endpoint::{Address, Endpoint, Unreachable};
use super::wire::Wire;
use crate::fault::{Fault, Outcome};

/// How long a daemon may take to open its socket.
const PATIENCE: Duration = Duration::from_secs(30);
const RUN_DIR: &str = "/run/brigantine";

/// Set in a daemon's environment by the client that starts it: the daemon then leaves the client's session.
pub const DETACH_MARK: &str = "BRIG_DETACHED_DAEMON";

pub async fn connect(endpoint: &Endpoint) -> Outcome<Wire> {
    match dial(endpoint).await {
        Ok(wire) => Ok(wire),
        Err(error) if endpoint.is_default && nobody_listens(&error) => start_and_connect(endpoint).await,
        Err(error) => Err(Unreachable::new(endpoint, &error).into()),
    }
}

async fn dial(endpoint: &Endpoint) -> io::Result<Wire> {
    match &endpoint.address {
        Address::Unix(path) => UnixStream::connect(path).await.map(Wire::Unix),
        Address::Tcp(authority) => {
            let stream = TcpStream::connect(authority.as_str()).await?;
            stream.set_nodelay(true)?;
            Ok(Wire::Tcp(stream))
        }
    }
}

fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

async fn start_and_connect(endpoint: &Endpoint) -> Outcome<Wire> {
    if !rustix::process::geteuid().is_root() {
        return Err(Fault::said(format!(
            "no daemon listens at {endpoint}, and starting one needs root: rootless containers are not built yet. Run this as root, or start `brig daemon` as root first."
        )));
    }
    let log_path = Path::new(RUN_DIR).join("daemon.log");
    let mut daemon = start(&log_path)?;
    let began = Instant::now();
    let mut pause = Duration::from_millis(1);
    let mut ended = None;
    loop {
        match dial(endpoint).await {
            Ok(wire) => return Ok(wire),
            Err(error) if nobody_listens(&error) => {}
            Err(error) => return Err(Unreachable::new(endpoint, &error).into()),
        }
        if ended.is_none() {
            ended = daemon
                .try_wait()
                .map_err(Fault::io("waiting for brig daemon"))?
                .map(|status| (status, Instant::now()));
        }
        // A daemon that lost the race for the lock ends at once; the one that won may need a little longer.
        if let Some((status, at)) = ended
            && (at.elapsed() > Duration::from_secs(5) || log_says_more_than_busy(&log_path))
        {
            return Err(Fault::said(format!(
                "no daemon listened at {endpoint}, and the one started ended with {status}:\n{}",
                last_lines(&log_path)
            )));
        }
        if began.elapsed() > PATIENCE {
            return Err(Fault::said(format!(
                "the daemon did not open {endpoint} within {} s; it writes to {}:\n{}",
                PATIENCE.as_secs(),
                log_path.display(),
                last_lines(&log_path)
            )));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn start(log_path: &Path) -> Outcome<Child> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(RUN_DIR)
        .map_err(Fault::io(format_args!("creating {RUN_DIR}")))?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log_path)
        .map_err(Fault::io(format_args!("opening {}", log_path.display())))?;
    let again = log.try_clone().map_err(Fault::io(format_args!("opening {}", log_path.display())))?;
    let exe: PathBuf = std::env::current_exe().map_err(Fault::io("finding the brig executable"))?;
    Command::new(&exe)
        .arg("daemon")
        .env(DETACH_MARK, "1")
        .env_remove("NOTIFY_SOCKET")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(again)
        .spawn()
        .map_err(Fault::io(format_args!("starting {} daemon", exe.display())))
}

/// Whether the daemon ended for a reason other than that another one runs already.
fn log_says_more_than_busy(log_path: &Path) -> bool {
    let text = last_lines(log_path);
    !["another daemon", "which is running", "another program listens"].iter().any(|sign| text.contains(sign))
}

fn last_lines(path: &Path) -> String {
    use io::{Read, Seek, SeekFrom};
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(4096)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}
