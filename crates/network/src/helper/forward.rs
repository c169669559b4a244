//! Asking other name servers: the host's as its `resolv.conf` names them at this moment, or a container's own from within
//! its network. Messages pass through as they are, but for their id.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use brigantine_sys::netns;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};

use crate::names::{FALLBACK_NAMESERVERS, nameservers};

const FILE: &str = "/etc/resolv.conf";
/// How long one server may take, and how often all are asked.
const PATIENCE: Duration = Duration::from_secs(2);
const ROUNDS: usize = 2;
/// The largest datagram there is.
const LARGEST: usize = 65535;

/// How a question came, and so is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// The host's servers. As this process is on the host's network, those on its loopback count (systemd-resolved's stub
/// knows the servers of each link better than anybody).
#[derive(Debug, Default)]
pub(super) struct HostServers {
    servers: Vec<SocketAddr>,
    seen: Option<(SystemTime, u64)>,
    checked: Option<Instant>,
}

impl HostServers {
    /// The file is looked at again whenever it has changed.
    pub fn now(&mut self) -> Vec<SocketAddr> {
        if self.checked.is_none_or(|at| at.elapsed() > Duration::from_millis(250)) {
            self.checked = Some(Instant::now());
            let state =
                std::fs::metadata(FILE).ok().and_then(|file| Some((file.modified().ok()?, file.len())));
            if state.is_none() || state != self.seen {
                self.seen = state;
                self.servers = read();
            }
        }
        self.servers.clone()
    }
}

fn read() -> Vec<SocketAddr> {
    let text = std::fs::read_to_string(FILE).unwrap_or_default();
    let mut servers: Vec<SocketAddr> = nameservers(&text)
        .into_iter()
        .filter_map(|server| match server.split_once('%') {
            None => Some(SocketAddr::new(server.parse::<IpAddr>().ok()?, 53)),
            Some((address, link)) => {
                let index = rustix::net::netdevice::name_to_index(link_socket()?, link).ok()?;
                Some(std::net::SocketAddrV6::new(address.parse().ok()?, 53, 0, index).into())
            }
        })
        .collect();
    if servers.is_empty() {
        servers = FALLBACK_NAMESERVERS
            .iter()
            .filter_map(|ip| Some((ip.parse::<IpAddr>().ok()?, 53).into()))
            .collect();
    }
    servers
}

fn link_socket() -> Option<OwnedFd> {
    rustix::net::socket_with(AddressFamily::INET6, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()
}

/// The first usable answer of `servers`, in their order. `netns`: from within that namespace.
pub(super) async fn ask(
    question: &[u8],
    servers: &[SocketAddr],
    transport: Transport,
    netns: Option<&Rc<OwnedFd>>,
) -> Option<Vec<u8>> {
    let mut poor = None;
    for _ in 0..ROUNDS {
        for server in servers {
            let asked = async {
                match transport {
                    Transport::Udp => over_udp(question, *server, netns).await,
                    Transport::Tcp => over_tcp(question, *server, netns).await,
                }
            };
            match tokio::time::timeout(PATIENCE, asked).await {
                // SERVFAIL, NOTIMP, REFUSED: another may know better.
                Ok(Ok(answer)) if matches!(answer.get(3).map(|code| code & 0x0f), Some(2 | 4 | 5)) => {
                    poor.get_or_insert(answer);
                }
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::debug!(%server, %error, "ask a name server"),
                Err(_late) => tracing::debug!(%server, "a name server does not answer"),
            }
        }
        if poor.is_some() {
            break;
        }
    }
    poor
}

async fn over_udp(
    question: &[u8],
    server: SocketAddr,
    netns: Option<&Rc<OwnedFd>>,
) -> std::io::Result<Vec<u8>> {
    // A port of the kernel's choice and an id of our own: both have to be guessed to forge an answer.
    let socket = UdpSocket::from_std(socket(server, SocketType::DGRAM, netns)?.into())?;
    socket.connect(server).await?;
    let mut sent = question.to_vec();
    let id = renumber(&mut sent)?;
    socket.send(&sent).await?;
    let mut buffer = vec![0; LARGEST];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = &mut buffer[..length];
        if is_answer_to(answer, &sent) {
            answer[..2].copy_from_slice(&id);
            return Ok(answer.to_vec());
        }
    }
}

async fn over_tcp(
    question: &[u8],
    server: SocketAddr,
    netns: Option<&Rc<OwnedFd>>,
) -> std::io::Result<Vec<u8>> {
    let socket = TcpSocket::from_std_stream(socket(server, SocketType::STREAM, netns)?.into());
    let mut stream = socket.connect(server).await?;
    let mut sent = question.to_vec();
    let id = renumber(&mut sent)?;
    let length = u16::try_from(sent.len()).map_err(std::io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], &sent].concat()).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    if !is_answer_to(&answer, &sent) {
        return Err(std::io::Error::other("an answer to another question"));
    }
    answer[..2].copy_from_slice(&id);
    Ok(answer)
}

fn socket(to: SocketAddr, kind: SocketType, netns: Option<&Rc<OwnedFd>>) -> std::io::Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let open = || rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None);
    Ok(match netns {
        None => open()?,
        Some(netns) => netns::within(netns.as_fd(), open)??,
    })
}

/// Gives a message an id of ours; the one it had.
fn renumber(message: &mut [u8]) -> std::io::Result<[u8; 2]> {
    let Some(place) = message.get_mut(..2) else { return Err(std::io::ErrorKind::InvalidInput.into()) };
    let id = [place[0], place[1]];
    let mut fresh = [0; 2];
    rustix::rand::getrandom(&mut fresh, rustix::rand::GetRandomFlags::empty())?;
    place.copy_from_slice(&fresh);
    Ok(id)
}

/// Same id, an answer, and about the same name: the question section is compared without regard to case.
fn is_answer_to(answer: &[u8], question: &[u8]) -> bool {
    let Some(end) = question_end(question) else { return false };
    let (Some(asked), Some(told)) = (question.get(12..end), answer.get(12..end)) else { return false };
    answer[..2] == question[..2] && answer[2] & 0x80 != 0 && asked.eq_ignore_ascii_case(told)
}

/// Where the first entry of the question section ends.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = 12;
    loop {
        match *message.get(at)? {
            0 => return Some(at + 5),
            length if length < 64 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUESTION: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03web\0\0\x01\0\x01";

    #[test]
    fn only_answers_to_the_question_are_taken() {
        let answer = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut answer = QUESTION.to_vec();
            answer[2] |= 0x80;
            change(&mut answer);
            answer
        };
        assert!(is_answer_to(&answer(&|_| {}), QUESTION));
        assert!(is_answer_to(&answer(&|a| a[13] = b'W'), QUESTION));
        assert!(!is_answer_to(&answer(&|a| a[13] = b'x'), QUESTION), "another name");
        assert!(!is_answer_to(&answer(&|a| a[0] = 9), QUESTION), "another id");
        assert!(!is_answer_to(&answer(&|a| a[2] = 1), QUESTION), "a question");
        assert!(!is_answer_to(&answer(&|a| a.truncate(14)), QUESTION), "too short");
        assert!(!is_answer_to(&[], QUESTION));
    }
}
