//! How a container's questions for names come to the sockets made for them: by rules that track nothing.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use brigantine_network::{Fabric, NameSockets};
use brigantine_sys::netns;

use crate::lab::{run, within};

const SERVER: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 11), 53);

fn namespace() -> OwnedFd {
    let netns = netns::create().unwrap();
    run(&netns, "ip link set lo up");
    netns
}

/// The name server's ends.
fn sockets(netns: &OwnedFd, again: bool) -> (UdpSocket, TcpListener) {
    let NameSockets { udp, tcp } = Fabric::name_sockets(netns.as_fd(), again).unwrap();
    let udp = UdpSocket::from(udp);
    udp.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (udp, tcp.into())
}

/// A client that takes answers from where it asked only.
fn client(netns: &OwnedFd, from: &str) -> UdpSocket {
    within(netns, || {
        let socket = UdpSocket::bind(from).unwrap();
        socket.connect(SERVER).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    })
}

fn converse(client: &UdpSocket, server: &UdpSocket) {
    let mut buffer = [0; 16];
    client.send(b"question").unwrap();
    let (length, from) = server.recv_from(&mut buffer).expect("the question comes to the name server");
    assert_eq!(&buffer[..length], b"question");
    server.send_to(b"answer", from).unwrap();
    let length = client.recv(&mut buffer).expect("the answer comes from where it was asked");
    assert_eq!(&buffer[..length], b"answer");
}

fn converse_by_tcp(netns: &OwnedFd, server: &TcpListener) {
    let mut client = within(netns, || TcpStream::connect(SERVER).unwrap());
    assert_eq!(client.peer_addr().unwrap(), SERVER.into());
    let (mut stream, _) = server.accept().unwrap();
    // More than one packet, and more than goes into one.
    let long = vec![7; 200_000];
    let writing = std::thread::spawn(move || {
        client.write_all(&long).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        answer
    });
    let mut read = vec![0; 200_000];
    stream.read_exact(&mut read).unwrap();
    stream.write_all(&read).unwrap();
    drop(stream);
    assert_eq!(writing.join().unwrap(), read);
}

#[test]
fn questions_come_to_the_sockets_and_answers_from_port_53() {
    let netns = namespace();
    run(&netns, "ip link add eth0 type veth peer name other");
    run(&netns, "ip addr add 172.30.0.2/16 dev eth0");
    run(&netns, "ip link set eth0 up");
    let (udp, tcp) = sockets(&netns, false);
    for from in ["0.0.0.0:0", "127.0.0.1:0", "172.30.0.2:0"] {
        converse(&client(&netns, from), &udp);
    }
    converse_by_tcp(&netns, &tcp);
}

#[test]
fn port_53_is_left_to_the_containers_own_name_server() {
    let netns = namespace();
    let (udp, tcp) = sockets(&netns, false);
    let (own, listener) =
        within(&netns, || (UdpSocket::bind("0.0.0.0:53").unwrap(), TcpListener::bind("0.0.0.0:53").unwrap()));
    own.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    converse(&client(&netns, "127.0.0.1:0"), &udp);
    converse_by_tcp(&netns, &tcp);
    let asked = within(&netns, || {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"own", "127.0.0.1:53").unwrap();
        TcpStream::connect("127.0.0.1:53").unwrap();
        socket.local_addr().unwrap()
    });
    assert_eq!(own.recv_from(&mut [0; 16]).unwrap(), (3, asked));
    listener.accept().unwrap();
}

#[test]
fn nothing_is_tracked_for_questions() {
    let netns = namespace();
    let (udp, _tcp) = sockets(&netns, false);
    converse(&client(&netns, "127.0.0.1:0"), &udp);
    assert_eq!(tracked(&netns), 0);
    // That is how it would be seen.
    run(&netns, "nft add table ip own");
    run(&netns, "nft add chain ip own translate { type nat hook output priority -100; }");
    run(&netns, "nft add rule ip own translate ip daddr 127.0.0.12 dnat to 127.0.0.13");
    converse(&client(&netns, "127.0.0.1:0"), &udp);
    assert_eq!(tracked(&netns), 1);
}

/// How many connections are; none where the kernel has not got as far as loading what it is done with.
fn tracked(netns: &OwnedFd) -> usize {
    let path = "/proc/sys/net/netfilter/nf_conntrack_count";
    within(netns, || std::fs::read_to_string(path)).map_or(0, |text| text.trim().parse().unwrap())
}

#[test]
fn questions_pass_a_containers_own_tracking_firewall() {
    let netns = namespace();
    let (udp, tcp) = sockets(&netns, false);
    run(&netns, "nft add table ip own");
    for (chain, rule) in [("output", "th dport 53"), ("input", "th dport 53")] {
        run(
            &netns,
            &format!("nft add chain ip own {chain} {{ type filter hook {chain} priority 0; policy drop; }}"),
        );
        run(&netns, &format!("nft add rule ip own {chain} ct state established accept"));
        run(&netns, &format!("nft add rule ip own {chain} meta l4proto {{ tcp, udp }} {rule} accept"));
    }
    run(&netns, "nft add chain ip own nat { type nat hook output priority -100; }");
    converse(&client(&netns, "127.0.0.1:0"), &udp);
    converse_by_tcp(&netns, &tcp);
}

#[test]
fn a_new_name_server_takes_over_who_has_asked_the_former() {
    let netns = namespace();
    // As engines before this one had it.
    run(&netns, "nft add table inet brigantine-names");
    run(&netns, "nft add chain inet brigantine-names output { type nat hook output priority -100; }");
    run(
        &netns,
        "nft add rule inet brigantine-names output ip daddr 127.0.0.11 udp dport 53 dnat ip to 127.0.0.11:9",
    );
    let (former, _) = sockets(&netns, true);
    let client = client(&netns, "127.0.0.1:0");
    converse(&client, &former);
    drop(former);
    let (now, tcp) = sockets(&netns, true);
    converse(&client, &now);
    converse_by_tcp(&netns, &tcp);
    let rules = run(&netns, "nft list ruleset");
    assert!(!rules.contains("table inet"), "{rules}");
    assert_eq!(rules.matches("127.0.0.11").count(), 4, "{rules}");
}
