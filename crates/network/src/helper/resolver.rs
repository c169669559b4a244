//! Questions of one container: answered from the table if they are about its networks, else asked outside.
//!
//! Invariant: a name of the container's networks is never asked outside, of whatever type the question is, and nothing
//! is if the container has no way out (CVE-2024-29018). Whatever a container sends, memory stays bounded.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::control::Shared;
use super::forward::{self, Transport};

/// Seconds that an answer about a container may be kept: they move.
const TTL: u32 = 5;
/// Questions of one container that may be on their way at once.
const MOST_QUESTIONS: usize = 256;
const MOST_CONNECTIONS: usize = 32;
/// A connection that says nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(10);
/// What a client takes that says nothing about it (RFC 1035).
const PLAIN_UDP: u16 = 512;

/// One container's name server.
#[derive(Debug)]
pub(super) struct Server {
    pub id: String,
    pub shared: Rc<Shared>,
    pub netns: Rc<OwnedFd>,
    questions: Semaphore,
    connections: Semaphore,
}

impl Server {
    pub fn new(id: String, shared: Rc<Shared>, netns: OwnedFd) -> Rc<Self> {
        Rc::new(Self {
            id,
            shared,
            netns: Rc::new(netns),
            questions: Semaphore::new(MOST_QUESTIONS),
            connections: Semaphore::new(MOST_CONNECTIONS),
        })
    }

    /// Answers datagrams until it is aborted.
    pub async fn serve_udp(self: Rc<Self>, socket: UdpSocket) {
        let socket = Rc::new(socket);
        let mut buffer = vec![0; 4096];
        loop {
            let (length, from) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => {
                    tracing::debug!(container = self.id, %error, "receive a question");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            };
            let question = buffer[..length].to_vec();
            // Most are answered at once, from the table.
            match self.answer_here(&question) {
                Here::Answer(message) => {
                    if let Err(error) = socket.send_to(&fit(message, &question), from).await {
                        tracing::debug!(container = self.id, %error, "answer");
                    }
                }
                Here::Nothing => {}
                Here::Outside => {
                    let (server, socket) = (Rc::clone(&self), Rc::clone(&socket));
                    tokio::task::spawn_local(async move {
                        let Ok(_permit) = server.questions.try_acquire() else { return };
                        let answer = server.ask(&question, Transport::Udp).await;
                        if let Err(error) = socket.send_to(&fit(answer, &question), from).await {
                            tracing::debug!(container = server.id, %error, "answer");
                        }
                    });
                }
            }
        }
    }

    /// Answers on connections until it is aborted.
    pub async fn serve_tcp(self: Rc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = Rc::clone(&self);
                    tokio::task::spawn_local(async move {
                        let Ok(_permit) = server.connections.try_acquire() else { return };
                        if let Err(error) = server.converse(stream).await {
                            tracing::trace!(container = server.id, %error, "a connection ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::debug!(container = self.id, %error, "accept a connection");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    async fn converse(&self, mut stream: TcpStream) -> std::io::Result<()> {
        loop {
            let length = tokio::time::timeout(IDLE, stream.read_u16()).await??;
            let mut question = vec![0; usize::from(length)];
            tokio::time::timeout(IDLE, stream.read_exact(&mut question)).await??;
            let answer = match self.answer_here(&question) {
                Here::Answer(message) => message,
                Here::Nothing => return Ok(()),
                Here::Outside => self.ask(&question, Transport::Tcp).await,
            };
            let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
            let framed = [&length.to_be_bytes()[..], &answer].concat();
            tokio::time::timeout(IDLE, stream.write_all(&framed)).await??;
        }
    }

    fn answer_here(&self, question: &[u8]) -> Here {
        let Ok(message) = Message::from_vec(question) else {
            // Not even a header to answer to, or garbage behind it.
            return match question {
                [high, low, ..] if question.len() >= 12 && question[2] & 0x80 == 0 => {
                    let mut refusal = [0; 12];
                    refusal[..2].copy_from_slice(&[*high, *low]);
                    refusal[2] = 0x80 | (question[2] & 0x79);
                    refusal[3] = 0x80 | 1;
                    Here::Answer(refusal.to_vec())
                }
                _ => Here::Nothing,
            };
        };
        if message.message_type() != MessageType::Query {
            return Here::Nothing;
        }
        if message.op_code() != OpCode::Query {
            return answer(&message, ResponseCode::NotImp, Vec::new());
        }
        let [query] = message.queries() else { return answer(&message, ResponseCode::FormErr, Vec::new()) };
        let table = self.shared.table.borrow();
        let (name, kind) = (query.name(), query.query_type());
        let text = name.to_ascii();
        if let Some(found) = table.look_up(&self.id, &text) {
            let mut records: Vec<RData> = match kind {
                RecordType::A => found.ipv4.into_iter().map(|ip| RData::A(A(ip))).collect(),
                RecordType::AAAA => found.ipv6.into_iter().map(|ip| RData::AAAA(AAAA(ip))).collect(),
                RecordType::ANY => {
                    let ipv4 = found.ipv4.into_iter().map(|ip| RData::A(A(ip)));
                    ipv4.chain(found.ipv6.into_iter().map(|ip| RData::AAAA(AAAA(ip)))).collect()
                }
                // The name exists and has nothing of the kind.
                _ => Vec::new(),
            };
            self.shared.turn(&mut records);
            let records =
                records.into_iter().map(|data| Record::from_rdata(name.clone(), TTL, data)).collect();
            return answer(&message, ResponseCode::NoError, records);
        }
        if kind == RecordType::PTR
            && let Some(address) = reversed(&text)
            && let Some(called) = table.look_up_address(&self.id, address)
            && let Ok(target) = Name::from_ascii(format!("{called}."))
        {
            let record = Record::from_rdata(name.clone(), TTL, RData::PTR(PTR(target)));
            return answer(&message, ResponseCode::NoError, vec![record]);
        }
        match table.get(&self.id) {
            Some(resident) if resident.forwards => Here::Outside,
            // No negative answer may be kept (RFC 2308: there is no SOA in it): the name may come any moment.
            _ => answer(&message, ResponseCode::NXDomain, Vec::new()),
        }
    }

    /// Asks the container's own servers, or the host's as they are now.
    async fn ask(&self, question: &[u8], transport: Transport) -> Vec<u8> {
        let own = self.shared.table.borrow().get(&self.id).map(|one| one.servers.clone()).unwrap_or_default();
        let answered = if own.is_empty() {
            let servers = self.shared.host_servers.borrow_mut().now();
            forward::ask(question, &servers, transport, None, &self.shared.silent).await
        } else {
            let servers: Vec<_> = own.into_iter().map(|ip| (ip, 53).into()).collect();
            forward::ask(question, &servers, transport, Some(&self.netns), &self.shared.silent).await
        };
        answered.unwrap_or_else(|| {
            let Ok(message) = Message::from_vec(question) else { return Vec::new() };
            match answer(&message, ResponseCode::ServFail, Vec::new()) {
                Here::Answer(bytes) => bytes,
                Here::Outside | Here::Nothing => Vec::new(),
            }
        })
    }
}

/// What can be said without asking anybody.
enum Here {
    Answer(Vec<u8>),
    /// It is no question.
    Nothing,
    Outside,
}

fn answer(question: &Message, code: ResponseCode, records: Vec<Record>) -> Here {
    let mut message = Message::new();
    message
        .set_id(question.id())
        .set_message_type(MessageType::Response)
        .set_op_code(question.op_code())
        .set_recursion_desired(question.recursion_desired())
        .set_recursion_available(true)
        .set_response_code(code);
    message.add_queries(question.queries().iter().cloned());
    message.add_answers(records);
    if let Some(edns) = question.extensions() {
        let mut own = edns.clone();
        own.options_mut().as_mut().clear();
        own.set_version(0);
        own.set_max_payload(1232);
        message.set_edns(own);
    }
    message.to_vec().map_or(Here::Nothing, Here::Answer)
}

/// An answer as the asker of a datagram can take it: cut to its question, and marked so, if it is too long.
fn fit(answer: Vec<u8>, question: &[u8]) -> Vec<u8> {
    let takes = Message::from_vec(question)
        .ok()
        .and_then(|message| message.extensions().as_ref().map(hickory_proto::op::Edns::max_payload))
        .map_or(PLAIN_UDP, |size| size.max(PLAIN_UDP));
    if answer.len() <= usize::from(takes) {
        return answer;
    }
    let Ok(whole) = Message::from_vec(&answer) else { return answer };
    let mut cut = whole.truncate();
    cut.set_truncated(true);
    cut.to_vec().unwrap_or(answer)
}

/// The address that `5.0.0.10.in-addr.arpa.` or its like of IPv6 asks for.
fn reversed(name: &str) -> Option<IpAddr> {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    if let Some(rest) = name.strip_suffix(".in-addr.arpa") {
        let mut octets = rest.rsplit('.').map(str::parse::<u8>);
        let mut next = || octets.next()?.ok();
        let address = Ipv4Addr::new(next()?, next()?, next()?, next()?);
        return octets.next().is_none().then_some(address.into());
    }
    let nibbles: Vec<&str> = name.strip_suffix(".ip6.arpa")?.rsplit('.').collect();
    if nibbles.len() != 32 || nibbles.iter().any(|nibble| nibble.len() != 1) {
        return None;
    }
    u128::from_str_radix(&nibbles.concat(), 16).ok().map(|bits| Ipv6Addr::from(bits).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reversed_names_are_read() {
        assert_eq!(reversed("5.0.0.10.in-addr.arpa."), Some([10, 0, 0, 5].into()));
        assert_eq!(
            reversed("1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa."),
            Some("fd00::1".parse().unwrap())
        );
        for text in [
            "5.0.10.in-addr.arpa",
            "1.5.0.0.10.in-addr.arpa",
            "x.ip6.arpa",
            "web.",
            "300.0.0.10.in-addr.arpa",
        ] {
            assert_eq!(reversed(text), None, "{text}");
        }
    }
}
