//! Asking other name servers: the host's as its `resolv.conf` names them at this moment, or a container's own from within
//! its network. Messages pass through as they are, but for their id.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use brigantine_sys::netns;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::task::JoinSet;

use crate::names::{FALLBACK_NAMESERVERS, nameservers};

const FILE: &str = "/etc/resolv.conf";
/// How long all of them together may take: programs ask again, or another server, after five seconds (resolv.conf(5)).
const PATIENCE: Duration = Duration::from_secs(4);
/// How long one has before the next is asked as well.
const HEAD_START: Duration = Duration::from_millis(600);
/// How long a datagram is waited for before it is sent again.
const AGAIN: Duration = Duration::from_millis(1300);
/// How long one that did not answer is asked after the others.
const REMEMBERED: Duration = Duration::from_secs(20);
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

/// Which servers did not answer lately; they are asked after the others.
#[derive(Debug, Default)]
pub(super) struct Silent(HashMap<SocketAddr, Instant>);

impl Silent {
    fn order(&mut self, servers: &[SocketAddr]) -> Vec<SocketAddr> {
        self.0.retain(|_, since| since.elapsed() < REMEMBERED);
        let (silent, mut answering): (Vec<_>, Vec<_>) =
            servers.iter().copied().partition(|server| self.0.contains_key(server));
        answering.extend(silent);
        answering
    }

    fn note(&mut self, server: SocketAddr, answers: bool) {
        if answers {
            self.0.remove(&server);
        } else {
            self.0.insert(server, Instant::now());
        }
    }
}

/// The first usable answer of `servers`: they are asked in their order, each with a head start on the next, which an
/// error ends at once. `netns`: from within that namespace.
pub(super) async fn ask(
    question: &[u8],
    servers: &[SocketAddr],
    transport: Transport,
    netns: Option<&Rc<OwnedFd>>,
    silent: &RefCell<Silent>,
) -> Option<Vec<u8>> {
    let question: Rc<[u8]> = question.into();
    let deadline = Instant::now() + PATIENCE;
    let mut waiting = silent.borrow_mut().order(servers).into_iter();
    let (mut asked, mut poor) = (JoinSet::new(), None);
    let mut pending: Vec<SocketAddr> = Vec::new();
    loop {
        if let Some(server) = waiting.next() {
            pending.push(server);
            let (question, netns) = (Rc::clone(&question), netns.cloned());
            asked.spawn_local(async move {
                let answer = match transport {
                    Transport::Udp => over_udp(&question, server, netns.as_ref()).await,
                    Transport::Tcp => over_tcp(&question, server, netns.as_ref()).await,
                };
                (server, answer)
            });
        } else if asked.is_empty() {
            return poor;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let patience = if waiting.len() > 0 { HEAD_START.min(left) } else { left };
        let (server, answer) = match tokio::time::timeout(patience, asked.join_next()).await {
            Ok(Some(Ok(done))) => done,
            Ok(Some(Err(error))) => {
                tracing::debug!(%error, "ask a name server");
                continue;
            }
            Ok(None) => continue,
            Err(_late) => {
                if Instant::now() < deadline {
                    continue;
                }
                for server in &pending {
                    silent.borrow_mut().note(*server, false);
                }
                return poor;
            }
        };
        pending.retain(|other| *other != server);
        match answer {
            // SERVFAIL, NOTIMP, REFUSED: another may know better.
            Ok(answer) if matches!(answer.get(3).map(|code| code & 0x0f), Some(2 | 4 | 5)) => {
                poor.get_or_insert(answer);
            }
            Ok(answer) => {
                let mut silent = silent.borrow_mut();
                silent.note(server, true);
                // Those before it had a head start and did not use it.
                for server in &pending {
                    silent.note(*server, false);
                }
                return Some(answer);
            }
            Err(error) => {
                tracing::debug!(%server, %error, "ask a name server");
                silent.borrow_mut().note(server, false);
            }
        }
    }
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
    let mut buffer = vec![0; LARGEST];
    loop {
        socket.send(&sent).await?;
        // Datagrams get lost.
        let Ok(answered) = tokio::time::timeout(AGAIN, answer_to(&socket, &sent, &mut buffer)).await else {
            continue;
        };
        let mut answer = buffer[..answered?].to_vec();
        answer[..2].copy_from_slice(&id);
        return Ok(answer);
    }
}

/// Receives until it is the answer; its length.
async fn answer_to(socket: &UdpSocket, question: &[u8], buffer: &mut [u8]) -> std::io::Result<usize> {
    loop {
        let length = socket.recv(buffer).await?;
        if is_answer_to(&buffer[..length], question) {
            return Ok(length);
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
    use std::cell::Cell;

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

    /// A name server on loopback that answers each question with what `reply` makes of it, or not at all.
    async fn server(reply: impl Fn(&[u8]) -> Option<Vec<u8>> + 'static) -> (SocketAddr, Rc<Cell<usize>>) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (at, asked) = (socket.local_addr().unwrap(), Rc::new(Cell::new(0)));
        let count = Rc::clone(&asked);
        tokio::task::spawn_local(async move {
            let mut buffer = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                count.set(count.get() + 1);
                if let Some(answer) = reply(&buffer[..length]) {
                    socket.send_to(&answer, from).await.unwrap();
                }
            }
        });
        (at, asked)
    }

    fn with_code(question: &[u8], code: u8) -> Option<Vec<u8>> {
        let mut answer = question.to_vec();
        answer[2] |= 0x80;
        answer[3] = code;
        Some(answer)
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, test);
    }

    #[test]
    fn a_dead_server_costs_its_head_start_once() {
        run(async {
            let (dead, tried) = server(|_| None).await;
            let (good, _) = server(|question| with_code(question, 0)).await;
            let silent = RefCell::default();
            let servers = [dead, good];
            let ask = || ask(QUESTION, &servers, Transport::Udp, None, &silent);
            let start = Instant::now();
            let answer = ask().await.unwrap();
            assert_eq!(answer[..2], QUESTION[..2], "with the asker's own id");
            assert!(start.elapsed() >= HEAD_START && start.elapsed() < PATIENCE, "{:?}", start.elapsed());
            let asked = tried.get();
            ask().await.unwrap();
            assert_eq!(tried.get(), asked, "the next question goes to the one that answers");
        });
    }

    #[test]
    fn an_error_goes_on_to_the_next_at_once() {
        run(async {
            let closed = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let (refusing, _) = server(|question| with_code(question, 5)).await;
            let (good, _) = server(|question| with_code(question, 3)).await;
            let silent = RefCell::default();
            let start = Instant::now();
            let answer =
                ask(QUESTION, &[closed, refusing, good], Transport::Udp, None, &silent).await.unwrap();
            assert_eq!(answer[3], 3, "that there is no such name is an answer");
            assert!(start.elapsed() < HEAD_START, "{:?}", start.elapsed());
            let answer = ask(QUESTION, &[closed, refusing], Transport::Udp, None, &silent).await.unwrap();
            assert_eq!(answer[3], 5, "a poor answer is better than none");
        });
    }

    #[test]
    fn a_lost_datagram_is_sent_again() {
        run(async {
            let seen = Cell::new(0);
            let (lossy, _) = server(move |question| {
                seen.set(seen.get() + 1);
                (seen.get() > 1).then(|| with_code(question, 0)).flatten()
            })
            .await;
            let answer = ask(QUESTION, &[lossy], Transport::Udp, None, &RefCell::default()).await;
            assert!(answer.is_some());
        });
    }

    #[test]
    fn nobody_waits_longer_than_programs_do() {
        run(async {
            let (dead, _) = server(|_| None).await;
            let start = Instant::now();
            assert!(ask(QUESTION, &[dead], Transport::Udp, None, &RefCell::default()).await.is_none());
            assert!(start.elapsed() < Duration::from_secs(5));
        });
    }
}
