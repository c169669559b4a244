//! Packets really sent: what reaches whom through bridges, published ports and the firewall.

use crate::lab::{
    CLIENT, CLIENT6, HOST, HOST6, Lab, TABLE, ask_tcp, ask_udp, bridge, container, eventually, port, run,
    serve_tcp, serve_udp, skipped, tcp, within,
};
use brigantine_network::{BridgeSpec, FirewallBackend, HostPort, PortRequest, Protocol};

backends![
    outbound_traffic_has_the_hosts_address,
    a_container_looks_as_dockers_do,
    containers_of_a_bridge_reach_each_other_and_the_host_reaches_them,
    a_published_port_is_reached_from_everywhere,
    a_published_port_is_reached_with_and_without_bridge_filtering,
    a_port_published_on_loopback_is_for_the_host_alone,
    what_is_not_published_is_not_reached_from_outside,
    bridges_are_isolated_but_for_published_ports,
    an_internal_bridge_has_no_way_out_or_in,
    without_icc_containers_reach_the_outside_but_not_each_other,
    a_container_cannot_reach_the_hosts_loopback_by_crafted_packets,
    ipv6_works_as_ipv4_does,
    a_udp_flow_follows_its_port_to_the_next_container,
    a_published_sctp_port_is_reached,
];

fn outbound_traffic_has_the_hosts_address(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let one = lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
    serve_tcp(&lab.client, 80);
    serve_udp(&lab.client, 53);
    assert_eq!(ask_tcp(&one.netns, &format!("{CLIENT}:80")).unwrap(), HOST);
    assert_eq!(ask_udp(&one.netns, &format!("{CLIENT}:53")).unwrap(), HOST);
}

fn a_container_looks_as_dockers_do(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let one = lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
    let links = run(&one.netns, "ip -o addr");
    assert!(links.contains("inet 127.0.0.1/8"), "{links}");
    assert!(links.contains("inet 172.30.0.2/16 brd 172.30.255.255"), "{links}");
    assert!(!links.contains("fe80::"), "{links}");
    let link = run(&one.netns, "ip -o link show eth0");
    assert!(link.contains("02:42:ac:1e:00:02"), "{link}");
    assert_eq!(run(&one.netns, "ip -4 route show default").trim(), "default via 172.30.0.1 dev eth0");
    let none = lab.connect(&fabric, &lab_none("none")).unwrap();
    let links = run(&none.netns, "ip -o link");
    assert_eq!(links.lines().count(), 1, "{links}");
    assert!(links.contains("lo: <LOOPBACK,UP"), "{links}");
}

fn lab_none(id: &str) -> brigantine_network::SandboxSpec {
    brigantine_network::SandboxSpec { id: id.to_owned(), ..Default::default() }
}

fn containers_of_a_bridge_reach_each_other_and_the_host_reaches_them(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let one = lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
    let two = lab.connect(&fabric, &container("two", &bridge("brig0", 30), 3)).unwrap();
    serve_tcp(&two.netns, 80);
    assert_eq!(ask_tcp(&one.netns, "172.30.0.3:80").unwrap(), "172.30.0.2");
    assert_eq!(ask_tcp(&lab.host, "172.30.0.3:80").unwrap(), "172.30.0.1");
}

fn a_published_port_is_reached_from_everywhere(backend: FirewallBackend) {
    published_port_is_reached(&Lab::on(backend));
}

/// Frames on bridges pass the firewall where br_netfilter is loaded (by docker, say) and not elsewhere.
fn a_published_port_is_reached_with_and_without_bridge_filtering(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    if std::path::Path::new("/proc/sys/net/bridge").exists() {
        run(
            &lab.host,
            "sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0",
        );
    }
    published_port_is_reached(&lab);
}

fn published_port_is_reached(lab: &Lab) {
    let fabric = lab.with_bridge();
    let mut spec = container("web", &bridge("brig0", 30), 2);
    spec.ports = vec![tcp(8080, 80), port(Protocol::Udp, 5353, 53)];
    let web = lab.connect(&fabric, &spec).unwrap();
    let other = lab.connect(&fabric, &container("other", &bridge("brig0", 30), 3)).unwrap();
    serve_tcp(&web.netns, 80);
    serve_udp(&web.netns, 53);

    let outside = format!("{HOST}:8080");
    assert_eq!(ask_tcp(&lab.client, &outside).unwrap(), CLIENT, "the client's address is kept");
    assert_eq!(ask_udp(&lab.client, &format!("{HOST}:5353")).unwrap(), CLIENT);
    assert_eq!(ask_tcp(&lab.host, "127.0.0.1:8080").unwrap(), "172.30.0.1", "from the host's loopback");
    assert_eq!(ask_udp(&lab.host, "127.0.0.1:5353").unwrap(), "172.30.0.1");
    ask_tcp(&lab.host, &outside).expect("from the host by its own address");
    ask_tcp(&web.netns, &outside).expect("hairpin: from the container itself");
    ask_tcp(&other.netns, &outside).expect("from another container of the bridge");
    ask_udp(&other.netns, &format!("{HOST}:5353")).unwrap();
    ask_tcp(&other.netns, "172.30.0.1:8080").expect("by the gateway's address");
}

fn a_port_published_on_loopback_is_for_the_host_alone(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let mut spec = container("web", &bridge("brig0", 30), 2);
    spec.ports = vec![PortRequest { host_ip: Some([127, 0, 0, 1].into()), ..tcp(8080, 80) }];
    let web = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&web.netns, 80);
    ask_tcp(&lab.host, "127.0.0.1:8080").unwrap();
    assert!(ask_tcp(&lab.client, &format!("{HOST}:8080")).is_err());
    assert!(ask_tcp(&lab.host, &format!("{HOST}:8080")).is_err());
}

fn what_is_not_published_is_not_reached_from_outside(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let mut spec = container("web", &bridge("brig0", 30), 2);
    spec.ports = vec![tcp(8080, 80)];
    let web = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&web.netns, 80);
    serve_tcp(&web.netns, 81);
    run(&lab.client, &format!("ip route add 172.30.0.0/16 via {HOST}"));
    assert!(ask_tcp(&lab.client, "172.30.0.2:81").is_err(), "by a route to the bridge");
    assert!(ask_tcp(&lab.client, "172.30.0.2:80").is_err(), "not even a published port by its inner address");
    assert!(ask_tcp(&lab.client, &format!("{HOST}:81")).is_err());
    ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
}

fn bridges_are_isolated_but_for_published_ports(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let second = bridge("brig1", 31);
    lab.on_host(|| fabric.ensure_bridge(&second)).unwrap();
    let one = lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
    let mut spec = container("two", &second, 2);
    spec.ports = vec![tcp(8080, 80)];
    let two = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&one.netns, 80);
    serve_tcp(&two.netns, 80);
    assert!(ask_tcp(&one.netns, "172.31.0.2:80").is_err());
    assert!(ask_tcp(&two.netns, "172.30.0.2:80").is_err());
    assert_eq!(ask_tcp(&one.netns, &format!("{HOST}:8080")).unwrap(), "172.30.0.2");
    // The bridge's own address is the host.
    serve_tcp(&lab.host, 90);
    ask_tcp(&one.netns, "172.30.0.1:90").unwrap();
}

fn an_internal_bridge_has_no_way_out_or_in(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let internal = BridgeSpec { internal: true, ..bridge("brig1", 31) };
    lab.on_host(|| fabric.ensure_bridge(&internal)).unwrap();
    let mut spec = container("in", &internal, 2);
    spec.ports = vec![tcp(8080, 80)];
    let inside = lab.connect(&fabric, &spec).unwrap();
    assert!(inside.attachment.ports.is_empty(), "an internal network publishes nothing");
    let peer = lab.connect(&fabric, &container("peer", &internal, 3)).unwrap();
    let open = lab.connect(&fabric, &container("open", &bridge("brig0", 30), 2)).unwrap();
    for netns in [&lab.client, &inside.netns, &peer.netns, &open.netns] {
        serve_tcp(netns, 80);
    }
    ask_tcp(&inside.netns, "172.31.0.3:80").expect("among themselves");
    ask_tcp(&lab.host, "172.31.0.2:80").expect("the host itself");
    // Even a container that gives itself a route stays inside.
    run(&inside.netns, "ip route add default via 172.31.0.1");
    run(&lab.client, &format!("ip route add 172.31.0.0/16 via {HOST}"));
    assert!(ask_tcp(&inside.netns, &format!("{CLIENT}:80")).is_err());
    assert!(ask_udp(&inside.netns, &format!("{CLIENT}:53")).is_err());
    assert!(ask_tcp(&inside.netns, "172.30.0.2:80").is_err());
    assert!(ask_tcp(&open.netns, "172.31.0.2:80").is_err());
    assert!(ask_tcp(&lab.client, "172.31.0.2:80").is_err());
}

fn without_icc_containers_reach_the_outside_but_not_each_other(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let apart = BridgeSpec { icc: false, ..bridge("brig1", 31) };
    lab.on_host(|| fabric.ensure_bridge(&apart)).unwrap();
    let one = lab.connect(&fabric, &container("one", &apart, 2)).unwrap();
    let two = lab.connect(&fabric, &container("two", &apart, 3)).unwrap();
    serve_tcp(&two.netns, 80);
    serve_tcp(&lab.client, 80);
    assert!(ask_tcp(&one.netns, "172.31.0.3:80").is_err());
    ask_tcp(&one.netns, &format!("{CLIENT}:80")).unwrap();
    ask_tcp(&lab.host, "172.31.0.3:80").unwrap();
}

fn a_container_cannot_reach_the_hosts_loopback_by_crafted_packets(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let one = lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
    within(&lab.host, || {
        let listener = std::net::TcpListener::bind("127.0.0.1:90").unwrap();
        std::thread::spawn(move || while listener.accept().is_ok() {});
    });
    // The container routes 127.0.0.1 over its interface, as one with raw sockets could.
    run(&one.netns, "sysctl -qw net.ipv4.conf.eth0.route_localnet=1");
    run(&one.netns, "ip rule del pref 0");
    run(&one.netns, "ip route add 127.0.0.1/32 via 172.30.0.1 dev eth0 src 172.30.0.2");
    assert!(ask_tcp(&one.netns, "127.0.0.1:90").is_err());
    let rules = match backend {
        FirewallBackend::Iptables => run(&lab.host, "iptables-legacy -t raw -S BRIG-test-RAW"),
        _ => run(&lab.host, "nft list chain inet brigantine-test raw"),
    };
    assert_eq!(rules.to_lowercase().matches(" drop").count(), 2, "{rules}");
}

fn ipv6_works_as_ipv4_does(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.fabric();
    let dual = BridgeSpec {
        subnet6: Some("fd00:30::/64".parse().unwrap()),
        gateway6: Some("fd00:30::1".parse().unwrap()),
        ..bridge("brig0", 30)
    };
    lab.on_host(|| {
        fabric.ensure_bridge(&dual).unwrap();
        fabric.reconcile(&[]).unwrap();
    });
    let mut spec = container("web", &dual, 2);
    spec.ports = vec![PortRequest { host_port: HostPort::Ephemeral, ..tcp(0, 80) }];
    let web = lab.connect(&fabric, &spec).unwrap();
    let two = lab.connect(&fabric, &container("two", &dual, 3)).unwrap();
    let published = &web.attachment.ports;
    assert_eq!(published.len(), 2, "{published:?}");
    assert_eq!(published[0].host_port, published[1].host_port, "the same port in both families");
    let number = published[0].host_port;
    serve_tcp(&web.netns, 80);
    serve_tcp(&lab.client, 80);
    // The bridge's own IPv6 addresses are there as soon as the kernel has joined their groups.
    eventually("IPv6 is ready", || ask_tcp(&lab.client, &format!("[{HOST6}]:{number}")).is_ok());
    assert_eq!(ask_tcp(&lab.client, &format!("[{HOST6}]:{number}")).unwrap(), CLIENT6);
    assert_eq!(ask_tcp(&lab.client, &format!("{HOST}:{number}")).unwrap(), CLIENT);
    // Likewise those of containers.
    eventually("IPv6 within the bridge", || ask_tcp(&two.netns, "[fd00:30::2]:80").is_ok());
    assert_eq!(ask_tcp(&two.netns, "[fd00:30::2]:80").unwrap(), "fd00:30::3");
    ask_tcp(&two.netns, &format!("[{HOST6}]:{number}")).expect("same bridge by the host's address");
    assert_eq!(ask_tcp(&two.netns, &format!("[{CLIENT6}]:80")).unwrap(), HOST6, "outbound is masqueraded");
}

fn a_udp_flow_follows_its_port_to_the_next_container(backend: FirewallBackend) {
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let request = vec![port(Protocol::Udp, 5353, 53)];
    let client = within(&lab.client, || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect((HOST, 5353)).unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
        socket
    });
    let answered = || {
        let mut buffer = [0; 64];
        // An ICMP refusal of an earlier datagram may be reported first.
        drop(client.send(b"x"));
        client.recv(&mut buffer).is_ok()
    };
    assert!(!answered(), "before anything is published");
    for (id, last) in [("one", 2), ("two", 3)] {
        let mut spec = container(id, &bridge("brig0", 30), last);
        spec.ports.clone_from(&request);
        let sandbox = lab.connect(&fabric, &spec).unwrap();
        serve_udp(&sandbox.netns, 53);
        eventually(id, answered);
        lab.on_host(|| fabric.disconnect(id)).unwrap();
    }
}

fn sctp() -> rustix::io::Result<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketType, ipproto};
    rustix::net::socket(AddressFamily::INET, SocketType::STREAM, Some(ipproto::SCTP))
}

fn a_published_sctp_port_is_reached(backend: FirewallBackend) {
    use std::io::{Read, Write};
    let lab = Lab::on(backend);
    let fabric = lab.with_bridge();
    let mut spec = container("web", &bridge("brig0", 30), 2);
    spec.ports = vec![port(Protocol::Sctp, 8080, 80)];
    let connected = lab.connect(&fabric, &spec);
    if sctp().is_err() {
        skipped("SCTP", "CONFIG_IP_SCTP");
        let error = connected.unwrap_err().to_string();
        assert!(error.contains("8080/sctp"), "{error}");
        return;
    }
    let web = connected.unwrap();
    let listener = within(&web.netns, || {
        let socket = sctp().unwrap();
        rustix::net::bind(&socket, &std::net::SocketAddr::from(([0, 0, 0, 0], 80))).unwrap();
        rustix::net::listen(&socket, 8).unwrap();
        std::net::TcpListener::from(socket)
    });
    std::thread::spawn(move || {
        // Its calls are those of TCP.
        while let Ok((mut stream, peer)) = listener.accept() {
            drop(stream.write_all(peer.ip().to_string().as_bytes()));
        }
    });
    let ask = |from: &std::os::fd::OwnedFd, to: &str| -> std::io::Result<String> {
        within(from, || {
            let socket = sctp()?;
            rustix::net::connect(&socket, &to.parse::<std::net::SocketAddr>().unwrap())?;
            let mut text = String::new();
            std::net::TcpStream::from(socket).read_to_string(&mut text)?;
            Ok(text)
        })
    };
    assert_eq!(ask(&lab.client, &format!("{HOST}:8080")).unwrap(), CLIENT, "from outside");
    ask(&lab.host, &format!("{HOST}:8080")).expect("from the host");
    assert!(ask_tcp(&lab.client, &format!("{HOST}:8080")).is_err(), "by its protocol alone");
}

#[test]
fn it_works_beside_other_tables() {
    let lab = Lab::new();
    run(&lab.host, "nft add table inet filter");
    run(
        &lab.host,
        "nft add chain inet filter forward { type filter hook forward priority 0 ; policy accept ; }",
    );
    run(&lab.host, "nft add table ip nat");
    run(&lab.host, "nft add chain ip nat PREROUTING { type nat hook prerouting priority -100 ; }");
    run(&lab.host, "nft add chain ip nat POSTROUTING { type nat hook postrouting priority 100 ; }");
    run(&lab.host, "nft add rule ip nat PREROUTING tcp dport 9999 counter accept");
    let before = lab.ruleset();
    let fabric = lab.with_bridge();
    let mut spec = container("web", &bridge("brig0", 30), 2);
    spec.ports = vec![tcp(8080, 80)];
    let web = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&web.netns, 80);
    ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
    lab.on_host(|| {
        fabric.disconnect("web").unwrap();
        fabric.remove_bridge("brig0").unwrap();
    });
    assert_eq!(lab.ruleset(), before);
    assert!(!lab.ruleset().contains(TABLE));
}

/// What the administrator forbids for the host is forbidden at published ports (and what is allowed, allowed).
#[test]
fn the_hosts_own_input_rules_apply_to_published_ports() {
    let lab = Lab::new();
    let fabric = lab.fabric();
    let dual = BridgeSpec {
        subnet6: Some("fd00:30::/64".parse().unwrap()),
        gateway6: Some("fd00:30::1".parse().unwrap()),
        ..bridge("brig0", 30)
    };
    lab.on_host(|| {
        fabric.ensure_bridge(&dual).unwrap();
        fabric.reconcile(&[]).unwrap();
    });
    assert!(fabric.has_gate());
    let mut spec = container("web", &dual, 2);
    spec.ports = vec![tcp(8080, 80), port(Protocol::Udp, 5353, 53)];
    let web = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&web.netns, 80);
    serve_udp(&web.netns, 53);
    let (four, six, udp) = (format!("{HOST}:8080"), format!("[{HOST6}]:8080"), format!("{HOST}:5353"));
    eventually("IPv6 is ready", || ask_tcp(&lab.client, &six).is_ok());
    assert_eq!(ask_tcp(&lab.client, &four).unwrap(), CLIENT);
    assert_eq!(ask_udp(&lab.client, &udp).unwrap(), CLIENT);
    // A strict reverse path filter is what many distributions set.
    run(&lab.host, "sysctl -qw net.ipv4.conf.all.rp_filter=1");
    assert_eq!(ask_tcp(&lab.client, &four).unwrap(), CLIENT);

    run(&lab.host, "nft add table inet own");
    run(&lab.host, "nft add chain inet own input { type filter hook input priority 0 ; policy drop ; }");
    for rule in ["ct state established accept", "iif lo accept", "meta l4proto ipv6-icmp accept"] {
        run(&lab.host, &format!("nft add rule inet own input {rule}"));
    }
    assert_eq!(lab.on_host(|| fabric.input_policies()).unwrap(), ["inet own input"]);
    assert!(ask_tcp(&lab.client, &four).is_err(), "IPv4");
    assert!(ask_tcp(&lab.client, &six).is_err(), "IPv6");
    assert!(ask_udp(&lab.client, &udp).is_err(), "UDP");
    ask_tcp(&lab.host, "127.0.0.1:8080").expect("the host itself");
    ask_tcp(&lab.host, &four).expect("the host itself by its address");

    run(&lab.host, &format!("nft add rule inet own input ip saddr {CLIENT} tcp dport 8080 accept"));
    assert_eq!(ask_tcp(&lab.client, &four).unwrap(), CLIENT, "what the host allows is reached");
    assert!(ask_tcp(&lab.client, &six).is_err(), "and nothing else");
}

#[test]
fn a_firewall_that_drops_by_default_is_named() {
    let lab = Lab::new();
    run(&lab.host, "nft add table ip filter");
    run(&lab.host, "nft add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }");
    run(&lab.host, "nft add chain ip filter INPUT { type filter hook input priority 0 ; policy drop ; }");
    let fabric = lab.fabric();
    let report = lab.on_host(|| {
        fabric.ensure_bridge(&bridge("brig0", 30)).unwrap();
        fabric.reconcile(&[]).unwrap()
    });
    assert_eq!(report.obstacles, ["ip filter FORWARD"]);
}

/// A lost first packet would be sent again after a second only.
#[test]
fn a_container_is_reached_at_once() {
    reached_at_once(|round| 2 + round);
}

/// The bridge must not send to where the address was before.
#[test]
fn a_container_is_reached_at_once_by_the_address_of_a_former_one() {
    reached_at_once(|_| 2);
}

fn reached_at_once(address: impl Fn(u8) -> u8) {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    serve_tcp(&lab.client, 80);
    let mut slow = Vec::new();
    for last in (0..20).map(address) {
        let mut spec = container("one", &bridge("brig0", 30), last);
        spec.ports = vec![tcp(8080, 80)];
        let one = lab.connect(&fabric, &spec).unwrap();
        serve_tcp(&one.netns, 80);
        let start = std::time::Instant::now();
        ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
        ask_tcp(&one.netns, &format!("{CLIENT}:80")).unwrap();
        // A packet that was lost is sent again after a second.
        slow.extend(Some(start.elapsed()).filter(|took| took.as_millis() >= 900));
        lab.on_host(|| fabric.disconnect("one")).unwrap();
    }
    // A busy machine may hold up one or two.
    assert!(slow.len() <= 2, "{slow:?}");
}
