//! The containers' name server as a real resolver's tool sees it: Debian's dig, in an image with its libraries.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, UdpSocket},
    time::{Duration, Instant},
};

use brigantine_testkit::{Client, Outside, fixtures};

use crate::{Host, names::set_resolv_conf};

/// An engine with a name server on its LAN, and a container with real programs on a network with names.
struct Port {
    host: Host,
    _outside: Outside,
    ship: String,
}

impl Port {
    fn new(resolv_conf: &str, flags: &[&str]) -> Self {
        let host = Host::new(Client::Brig);
        host.load(&fixtures::tools());
        let outside = Outside::connect(&host.engine);
        serve(&outside);
        set_resolv_conf(&host, resolv_conf);
        host.cli(["network", "create", "--subnet", "10.77.0.0/24", "--subnet", "fd00:77::/64", "shore"]).ok();
        let run = ["run", "-d", "--network", "shore", "--name", "ship"];
        let ship = host.cli(run.iter().chain(flags).chain(&["tools", "sleep", "1000"])).ok();
        Self { host, _outside: outside, ship }
    }

    fn dig(&self, arguments: &str) -> String {
        let words = ["exec", &self.ship, "dig", "+time=5", "+tries=1"];
        self.host.cli(words.into_iter().chain(arguments.split(' '))).ok()
    }
}

const UPSTREAM: &str = "nameserver 192.0.2.1\n";

/// Answers on the other machine, by UDP and TCP: `manyN.…` has N addresses, everything else one.
fn serve(outside: &Outside) {
    let (udp, tcp) = outside.within(|| {
        let at = (Outside::ADDRESS, 53);
        (UdpSocket::bind(at).unwrap(), TcpListener::bind(at).unwrap())
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            let Some((mut answer, size)) = answer(&buffer[..length]) else { continue };
            if answer.len() > size {
                // Nothing but the question, and that it is not all.
                answer.truncate(question_end(&answer));
                answer[2] |= 2;
                answer[6..8].copy_from_slice(&[0, 0]);
            }
            udp.send_to(&answer, from).ok();
        }
    });
    std::thread::spawn(move || {
        for mut stream in tcp.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut length = [0; 2];
                while stream.read_exact(&mut length).is_ok() {
                    let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
                    if stream.read_exact(&mut question).is_err() {
                        return;
                    }
                    let Some((answer, _)) = answer(&question) else { return };
                    let framed = [&u16::try_from(answer.len()).unwrap().to_be_bytes()[..], &answer].concat();
                    if stream.write_all(&framed).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// Where the question section ends.
fn question_end(message: &[u8]) -> usize {
    let mut at = 12;
    while message[at] != 0 {
        at += 1 + usize::from(message[at]);
    }
    at + 5
}

/// The answer, and what the asker takes in a datagram.
fn answer(question: &[u8]) -> Option<(Vec<u8>, usize)> {
    let end = question_end(question);
    let first = &question[13..13 + usize::from(*question.get(12)?)];
    let label = String::from_utf8_lossy(first).to_lowercase();
    let count: u16 = label.strip_prefix("many").map_or(1, |number| number.parse().unwrap());
    let is_a = question[end - 3] == 1;
    let count = if is_a { count } else { 0 };
    // An OPT record is all that questions have beside: root name, type 41, its class is the size.
    let size = match question.get(end..end + 5) {
        Some([0, 0, 41, high, low]) => usize::from(u16::from_be_bytes([*high, *low])).max(512),
        _ => 512,
    };
    let mut answer = question[..end].to_vec();
    answer[2..4].copy_from_slice(&[0x81, 0x80]);
    answer[6..8].copy_from_slice(&count.to_be_bytes());
    answer[8..12].copy_from_slice(&[0; 4]);
    for number in 0..count {
        let [high, low] = number.to_be_bytes();
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113 + high, low]);
    }
    Some((answer, size))
}

fn answers(text: &str) -> Option<u32> {
    text.split("ANSWER: ").nth(1)?.split(',').next()?.parse().ok()
}

#[test]
fn names_of_containers_are_answered_by_udp_and_tcp_with_and_without_edns() {
    let port = Port::new(UPSTREAM, &["--network-alias", "svc"]);
    let second = port.host.background(&["--network", "shore", "--network-alias", "svc"], "sleep 1000");
    for transport in ["+notcp", "+tcp"] {
        for edns in ["+edns=0", "+noedns", "+bufsize=512 +dnssec"] {
            let text = port.dig(&format!("{transport} {edns} ship A"));
            assert!(text.contains("10.77.0.2") && text.contains("status: NOERROR"), "{text}");
            assert_eq!(text.contains("EDNS: version: 0"), edns != "+noedns", "{text}");
        }
        assert!(port.dig(&format!("{transport} +short ship AAAA")).starts_with("fd00:77::2"));
        assert_eq!(port.dig(&format!("{transport} +short -x 10.77.0.2")), "ship.shore.");
        assert_eq!(port.dig(&format!("{transport} +short -x fd00:77::2")), "ship.shore.");
        let text = port.dig(&format!("{transport} ship MX"));
        assert!(text.contains("status: NOERROR") && answers(&text) == Some(0), "{text}");
    }
    // Each in turn is the first of a shared name.
    let firsts: std::collections::BTreeSet<String> =
        (0..6).filter_map(|_| port.dig("+short svc").lines().next().map(str::to_owned)).collect();
    assert_eq!(firsts.len(), 2, "{firsts:?}");
    port.host.cli(["rm", "-f", &second]).ok();
}

#[test]
fn answers_too_long_for_a_datagram_are_marked_and_come_by_tcp() {
    let port = Port::new(UPSTREAM, &[]);
    let text = port.dig("many100.example.org");
    assert!(text.contains("Truncated, retrying in TCP mode") && answers(&text) == Some(100), "{text}");
    let text = port.dig("+ignore +noedns many100.example.org");
    assert!(text.contains("flags: qr tc rd"), "{text}");
    let text = port.dig("+ignore +bufsize=4096 many100.example.org");
    assert!(!text.contains(" tc ") && answers(&text) == Some(100), "{text}");
    let text = port.dig("+tcp many3000.example.org");
    assert_eq!(answers(&text), Some(3000), "nearly all that a message takes");
    assert_eq!(answers(&port.dig("+tcp +keepopen one.example.org two.example.org")), Some(1));
}

#[test]
fn search_domains_and_ndots_are_the_containers() {
    let port = Port::new(
        &format!("search lan.example\n{UPSTREAM}"),
        &["--dns-search", "fleet.example", "--dns-option", "ndots:2"],
    );
    let text = port.dig("+search +noall +answer +question harbour");
    assert!(text.contains("harbour.fleet.example."), "{text}");
    let found = port.host.cli(["exec", &port.ship, "sh", "-c", "cat /etc/resolv.conf"]).ok();
    assert!(found.contains("search fleet.example") && found.contains("ndots:2"), "{found}");
    // A name of fewer dots than that is tried with the domain first, and the server there knows every name.
    let pinged = port.host.cli(["exec", &port.ship, "ping", "-c", "1", "-W", "1", "ship"]).run();
    assert!(pinged.stdout.contains("(203.0.113.0)"), "{pinged}");
}

/// Nobody is at the first address; the kernel says so after seconds only.
#[test]
fn a_server_that_is_not_there_costs_half_a_second_once() {
    let port = Port::new(&format!("nameserver 192.0.2.99\n{UPSTREAM}"), &[]);
    let took = |name: &str| {
        let start = Instant::now();
        assert_eq!(port.dig(&format!("+short {name}")), "203.0.113.0");
        start.elapsed()
    };
    let first = took("one.example.org");
    assert!(first < Duration::from_secs(3), "{first:?}");
    // By now it is known, and the other one is asked first.
    let next = (0..8).map(|number| took(&format!("n{number}.example.org"))).min().unwrap();
    assert!(next < Duration::from_millis(500), "{next:?}");
}
