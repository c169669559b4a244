//! Who reaches whom, and who is seen: the same table for IPv4 and IPv6, TCP and UDP.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use brigantine_network::{BridgeSpec, FirewallBackend, GatewayMode, Protocol, Sandbox};

use crate::lab::{
    CLIENT, CLIENT6, HOST, HOST6, Lab, ask_tcp, ask_udp, bridge, container, port, run, serve_tcp, serve_udp,
};

backends![
    a_network_with_translation_is_the_same_in_both_families,
    routed_networks_are_the_same_in_both_families,
    unprotected_networks_are_the_same_in_both_families,
    internal_networks_are_the_same_in_both_families,
    networks_without_traffic_among_containers_are_the_same_in_both_families,
];

/// One family of addresses, as the lab has them.
struct Family {
    host: &'static str,
    client: &'static str,
    is_ipv4: bool,
}

const FAMILIES: [Family; 2] = [
    Family { host: HOST, client: CLIENT, is_ipv4: true },
    Family { host: HOST6, client: CLIENT6, is_ipv4: false },
];

impl Family {
    fn of<'a>(&self, sandbox: &'a Sandbox) -> Vec<&'a ipnet::IpNet> {
        let all = &sandbox.attachment.interfaces[0].addresses;
        all.iter().filter(|net| net.addr().is_ipv4() == self.is_ipv4).collect()
    }

    fn address(&self, sandbox: &Sandbox) -> String {
        self.of(sandbox)[0].addr().to_string()
    }
}

fn dual(name: &str, net: u8) -> BridgeSpec {
    BridgeSpec {
        subnet6: Some(format!("fd00:{net}::/64").parse().unwrap()),
        gateway6: Some(format!("fd00:{net}::1").parse().unwrap()),
        ..bridge(name, net)
    }
}

fn ask(from: &OwnedFd, protocol: Protocol, address: &str, number: u16) -> io::Result<String> {
    let address: IpAddr = address.parse().unwrap();
    let to = std::net::SocketAddr::new(address, number).to_string();
    if protocol == Protocol::Tcp { ask_tcp(from, &to) } else { ask_udp(from, &to) }
}

/// A web server on `main` with ports 80 (published at 8080) and 81, a neighbour, one on another bridge, and the client;
/// each serves both protocols.
struct Fleet {
    lab: Lab,
    _fabric: brigantine_network::Fabric,
    web: Sandbox,
    neighbour: Sandbox,
    stranger: Sandbox,
}

fn fleet(backend: FirewallBackend, change: impl Fn(&mut BridgeSpec)) -> Fleet {
    let lab = Lab::on(backend);
    let fabric = lab.fabric();
    let (mut main, other) = (dual("main0", 30), dual("other0", 31));
    change(&mut main);
    lab.on_host(|| {
        fabric.ensure_bridge(&main).unwrap();
        fabric.ensure_bridge(&other).unwrap();
        fabric.reconcile(&[]).unwrap();
    });
    let mut spec = container("web", &main, 2);
    spec.ports = vec![port(Protocol::Tcp, 8080, 80), port(Protocol::Udp, 8080, 80)];
    let web = lab.connect(&fabric, &spec).unwrap();
    let neighbour = lab.connect(&fabric, &container("neighbour", &main, 3)).unwrap();
    let stranger = lab.connect(&fabric, &container("stranger", &other, 2)).unwrap();
    for number in [80, 81] {
        serve_tcp(&web.netns, number);
        serve_udp(&web.netns, number);
    }
    for netns in [&lab.client, &neighbour.netns] {
        serve_tcp(netns, 90);
        serve_udp(netns, 90);
    }
    // By the containers' own addresses nothing is hidden behind the lack of a route.
    run(&lab.client, &format!("ip route add 172.30.0.0/16 via {HOST}"));
    run(&lab.client, &format!("ip -6 route add fd00:30::/64 via {HOST6}"));
    Fleet { lab, _fabric: fabric, web, neighbour, stranger }
}

/// Who is asked from where, and whom the server sees; `None`: nobody is reached.
type Row<'a> = (&'a str, &'a OwnedFd, String, u16, Option<String>);

fn hold(rows: &[Row<'_>]) {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for (what, from, address, number, seen) in rows {
            let what = format!("{what}, {protocol} {address} port {number}");
            let Some(seen) = seen else {
                assert!(ask(from, protocol, address, *number).is_err(), "{what}: reached");
                continue;
            };
            // IPv6 addresses are ready once the kernel has joined their groups.
            let deadline = Instant::now() + Duration::from_secs(10);
            let answer = loop {
                match ask(from, protocol, address, *number) {
                    Err(_) if Instant::now() < deadline => {}
                    result => break result,
                }
            };
            let answer = answer.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(seen == "somebody" || answer == *seen, "{what}: seen as {answer}, not {seen}");
        }
    }
}

fn somebody() -> Option<String> {
    Some("somebody".to_owned())
}

fn a_network_with_translation_is_the_same_in_both_families(backend: FirewallBackend) {
    let fleet = fleet(backend, |_| {});
    let Fleet { lab, web, neighbour, stranger, .. } = &fleet;
    for family in &FAMILIES {
        let inner = family.address(web);
        let host = || family.host.to_owned();
        hold(&[
            ("from outside, published", &lab.client, host(), 8080, Some(family.client.to_owned())),
            ("from outside, not published", &lab.client, host(), 81, None),
            ("from outside, inside", &lab.client, inner.clone(), 80, None),
            ("from the host, published", &lab.host, host(), 8080, somebody()),
            ("from the host, inside", &lab.host, inner.clone(), 81, somebody()),
            ("hairpin", &web.netns, host(), 8080, somebody()),
            ("from a neighbour, published", &neighbour.netns, host(), 8080, somebody()),
            (
                "from a neighbour, inside",
                &neighbour.netns,
                inner.clone(),
                81,
                Some(family.address(neighbour)),
            ),
            ("from another bridge, published", &stranger.netns, host(), 8080, Some(family.address(stranger))),
            ("from another bridge, inside", &stranger.netns, inner.clone(), 80, None),
            ("to the outside", &web.netns, family.client.to_owned(), 90, Some(host())),
        ]);
    }
}

fn routed_networks_are_the_same_in_both_families(backend: FirewallBackend) {
    let fleet = fleet(backend, |main| (main.mode4, main.mode6) = (GatewayMode::Routed, GatewayMode::Routed));
    let Fleet { lab, web, stranger, .. } = &fleet;
    for family in &FAMILIES {
        let inner = family.address(web);
        hold(&[
            ("from outside, published", &lab.client, inner.clone(), 80, Some(family.client.to_owned())),
            ("from outside, not published", &lab.client, inner.clone(), 81, None),
            ("from outside, at the host", &lab.client, family.host.to_owned(), 8080, None),
            ("from another bridge, published", &stranger.netns, inner.clone(), 80, somebody()),
            ("to the outside", &web.netns, family.client.to_owned(), 90, Some(inner.clone())),
        ]);
    }
}

fn unprotected_networks_are_the_same_in_both_families(backend: FirewallBackend) {
    let unprotected = GatewayMode::NatUnprotected;
    let fleet = fleet(backend, |main| (main.mode4, main.mode6) = (unprotected, unprotected));
    let Fleet { lab, web, .. } = &fleet;
    for family in &FAMILIES {
        hold(&[
            (
                "from outside, published",
                &lab.client,
                family.host.to_owned(),
                8080,
                Some(family.client.to_owned()),
            ),
            ("from outside, any port", &lab.client, family.address(web), 81, Some(family.client.to_owned())),
            ("to the outside", &web.netns, family.client.to_owned(), 90, Some(family.host.to_owned())),
        ]);
    }
}

fn internal_networks_are_the_same_in_both_families(backend: FirewallBackend) {
    let fleet = fleet(backend, |main| main.internal = true);
    let Fleet { lab, web, neighbour, stranger, .. } = &fleet;
    run(&web.netns, "ip route add default via 172.30.0.1");
    run(&web.netns, "ip -6 route add default via fd00:30::1");
    for family in &FAMILIES {
        let inner = family.address(web);
        hold(&[
            ("from a neighbour", &neighbour.netns, inner.clone(), 81, Some(family.address(neighbour))),
            ("from the host", &lab.host, inner.clone(), 80, somebody()),
            ("from outside", &lab.client, inner.clone(), 80, None),
            ("from another bridge", &stranger.netns, inner.clone(), 80, None),
            ("to the outside, by a route of its own", &web.netns, family.client.to_owned(), 90, None),
        ]);
    }
}

fn networks_without_traffic_among_containers_are_the_same_in_both_families(backend: FirewallBackend) {
    let fleet = fleet(backend, |main| main.icc = false);
    let Fleet { lab, web, neighbour, .. } = &fleet;
    for family in &FAMILIES {
        hold(&[
            ("from the host", &lab.host, family.address(web), 81, somebody()),
            ("from outside, published", &lab.client, family.host.to_owned(), 8080, somebody()),
            ("to the outside", &web.netns, family.client.to_owned(), 90, Some(family.host.to_owned())),
            ("from a neighbour, inside", &neighbour.netns, family.address(web), 81, None),
        ]);
    }
}
