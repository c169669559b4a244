//! Networks that are no plain bridges: sub-interfaces on the host's LAN, overlays, one family alone, and bridges with
//! more containers than the kernel lets one have ports.

use std::os::fd::{AsFd, OwnedFd};

use brigantine_network::{
    BridgeSpec, Error, Fabric, FirewallBackend, GatewayMode, IpvlanFlag, IpvlanMode, MacvlanMode, Sandbox,
    SandboxSpec, SubinterfaceKind, SubinterfaceSpec, Tunnel,
};
use brigantine_sys::netns;
use ipnet::IpNet;

use crate::lab::{
    CLIENT, HOST, HOST6, Lab, ask_tcp, bridge, container, eventually, run, serve_tcp, skipped, tcp, within,
};

/// A network on the LAN between host and client, 198.51.100.0/24.
fn macvlan(mode: MacvlanMode, parent: &str) -> SubinterfaceSpec {
    SubinterfaceSpec {
        name: "dm-00000000000a".to_owned(),
        kind: SubinterfaceKind::Macvlan(mode),
        parent: Some(parent.to_owned()),
        subnet: Some("198.51.100.0/24".parse().unwrap()),
        gateway: Some("198.51.100.2".parse().unwrap()),
        subnet6: Some("2001:db8::/64".parse().unwrap()),
        gateway6: Some("2001:db8::2".parse().unwrap()),
        mtu: None,
        internal: false,
    }
}

fn below(id: &str, network: &SubinterfaceSpec, last: u8) -> SandboxSpec {
    let mut spec = container(id, &bridge("unused", 30), last);
    let interface = &mut spec.interfaces[0];
    interface.bridge.clone_from(&network.name);
    interface.addresses = network
        .layout()
        .subnets()
        .into_iter()
        .map(|subnet| match subnet {
            IpNet::V4(net) => {
                let [a, b, c, _] = net.addr().octets();
                IpNet::new([a, b, c, last].into(), net.prefix_len()).unwrap()
            }
            IpNet::V6(net) => {
                let mut octets = net.addr().octets();
                octets[15] = last;
                IpNet::new(octets.into(), net.prefix_len()).unwrap()
            }
        })
        .collect();
    (interface.gateway, interface.gateway6) = network.layout().exits();
    spec
}

fn pings(from: &OwnedFd, to: &str) -> bool {
    within(from, || {
        let mut ping = std::process::Command::new("busybox");
        ping.args(["ping", "-c", "1", "-W", "2", to]).output().unwrap().status.success()
    })
}

#[test]
fn macvlan_containers_are_on_the_lan_with_addresses_of_their_own() {
    let lab = Lab::new();
    let fabric = lab.fabric();
    let network = macvlan(MacvlanMode::Bridge, "out");
    lab.on_host(|| fabric.ensure_parent(&network)).unwrap();
    let one = lab.connect(&fabric, &below("one", &network, 10)).unwrap();
    let two = lab.connect(&fabric, &below("two", &network, 11)).unwrap();
    serve_tcp(&one.netns, 80);
    serve_tcp(&lab.client, 80);
    eventually("IPv6 is ready", || ask_tcp(&lab.client, "[2001:db8::a]:80").is_ok());
    assert_eq!(ask_tcp(&lab.client, "198.51.100.10:80").unwrap(), CLIENT, "no translation on the way in");
    assert_eq!(ask_tcp(&one.netns, &format!("{CLIENT}:80")).unwrap(), "198.51.100.10", "nor out");
    assert_eq!(ask_tcp(&two.netns, "198.51.100.10:80").unwrap(), "198.51.100.11", "among themselves");
    assert!(run(&one.netns, "ip route").contains("default via 198.51.100.2 dev eth0"));
    assert!(run(&one.netns, "ip -6 route").contains("default via 2001:db8::2 dev eth0"));
    assert_eq!(lab.ruleset(), "", "the firewall has nothing to do with it");
    // Its traffic is counted though nothing of it is on the host.
    let netns = || one.netns.try_clone().ok();
    let counters = lab.on_host(|| fabric.counters("one", netns)).unwrap();
    assert!(counters[0].0 == "eth0" && counters[0].1.rx_packets > 0, "{counters:?}");
    // Live: away, and back again.
    let interface = below("two", &network, 12).interfaces.remove(0);
    lab.on_host(|| fabric.detach("two", two.netns.as_fd(), "eth0")).unwrap();
    assert!(!run(&two.netns, "ip -o link").contains("eth0"));
    lab.on_host(|| fabric.attach("two", two.netns.as_fd(), &interface, &[])).unwrap();
    assert_eq!(ask_tcp(&two.netns, "198.51.100.10:80").unwrap(), "198.51.100.12");
    let error = lab.on_host(|| fabric.remove_parent(&network.name)).unwrap_err();
    assert!(error.to_string().contains("name-one"), "{error}");
    lab.on_host(|| {
        fabric.disconnect("one").unwrap();
        fabric.disconnect("two").unwrap();
        fabric.remove_parent(&network.name).unwrap();
    });
    assert!(run(&lab.host, "ip -o link").contains("out"), "what was there stays");
}

/// What each mode is for.
#[test]
fn macvlan_modes_differ_in_who_is_reached() {
    for (mode, among_themselves) in
        [(MacvlanMode::Bridge, true), (MacvlanMode::Private, false), (MacvlanMode::Vepa, false)]
    {
        let lab = Lab::new();
        let fabric = lab.fabric();
        let network = macvlan(mode, "out");
        lab.on_host(|| fabric.ensure_parent(&network)).unwrap();
        let one = lab.connect(&fabric, &below("one", &network, 10)).unwrap();
        let two = lab.connect(&fabric, &below("two", &network, 11)).unwrap();
        assert!(pings(&one.netns, CLIENT), "{mode:?}");
        assert!(pings(&two.netns, CLIENT), "{mode:?}");
        assert_eq!(pings(&one.netns, "198.51.100.11"), among_themselves, "{mode:?}");
    }
}

#[test]
fn a_parent_for_itself_takes_one_container() {
    let lab = Lab::new();
    let fabric = lab.fabric();
    // The host keeps its address on another interface then.
    let network = macvlan(MacvlanMode::Passthru, "out");
    lab.on_host(|| fabric.ensure_parent(&network)).unwrap();
    let one = lab.connect(&fabric, &below("one", &network, 10)).unwrap();
    assert!(pings(&one.netns, CLIENT));
    let error = lab.connect(&fabric, &below("two", &network, 11)).unwrap_err().to_string();
    assert!(error.contains("name-two") && error.contains("one only"), "{error}");
    let second =
        SubinterfaceSpec { name: "dm-00000000000b".to_owned(), ..macvlan(MacvlanMode::Bridge, "out") };
    let error = lab.on_host(|| fabric.ensure_parent(&second)).unwrap_err().to_string();
    assert!(error.contains("passthru"), "{error}");
    drop(one);
}

/// Where the kernel has none (8021q) the error says so.
#[test]
fn an_802_1q_interface_is_made_and_removed_with_the_last_network_on_it() {
    let lab = Lab::new();
    let fabric = lab.fabric();
    let network = SubinterfaceSpec {
        subnet: Some("10.50.0.0/24".parse().unwrap()),
        gateway: Some("10.50.0.2".parse().unwrap()),
        subnet6: None,
        gateway6: None,
        ..macvlan(MacvlanMode::Bridge, "out.50")
    };
    let second = SubinterfaceSpec { name: "dm-00000000000b".to_owned(), ..network.clone() };
    if let Err(error) = lab.on_host(|| fabric.ensure_parent(&network)) {
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("CONFIG_VLAN_8021Q"), "{error}");
        skipped("802.1q interfaces", "CONFIG_VLAN_8021Q");
        assert!(!run(&lab.host, "ip -o link").contains("out.50"));
        return;
    }
    run(&lab.client, "ip link add link eth0 name eth0.50 type vlan id 50");
    run(&lab.client, "ip addr add 10.50.0.2/24 dev eth0.50");
    run(&lab.client, "ip link set eth0.50 up");
    lab.on_host(|| fabric.ensure_parent(&second)).unwrap();
    assert!(run(&lab.host, "ip -d -o link show out.50").contains("vlan protocol 802.1Q id 50"));
    let one = lab.connect(&fabric, &below("one", &network, 10)).unwrap();
    assert!(pings(&one.netns, "10.50.0.2"), "tagged frames arrive");
    lab.on_host(|| fabric.disconnect("one")).unwrap();
    lab.on_host(|| fabric.remove_parent(&network.name)).unwrap();
    assert!(run(&lab.host, "ip -o link").contains("out.50@"), "the second network is on it");
    lab.on_host(|| fabric.remove_parent(&second.name)).unwrap();
    assert!(!run(&lab.host, "ip -o link").contains("out.50@"));
    // One that was there is left alone.
    run(&lab.host, "ip link add link out name out.50 type vlan id 50");
    lab.on_host(|| fabric.ensure_parent(&network)).unwrap();
    lab.on_host(|| fabric.remove_parent(&network.name)).unwrap();
    assert!(run(&lab.host, "ip -o link").contains("out.50@"));
}

#[test]
fn without_a_parent_containers_have_each_other_only() {
    let lab = Lab::new();
    let fabric = lab.fabric();
    let network = SubinterfaceSpec { parent: None, internal: true, ..macvlan(MacvlanMode::Bridge, "x") };
    lab.on_host(|| fabric.ensure_parent(&network)).unwrap();
    let one = lab.connect(&fabric, &below("one", &network, 10)).unwrap();
    let two = lab.connect(&fabric, &below("two", &network, 11)).unwrap();
    assert!(pings(&one.netns, "198.51.100.11"));
    assert!(!run(&two.netns, "ip route").contains("default"));
    let links = || run(&lab.host, "ip -o link");
    assert!(links().contains("dm-00000000000a"));
    lab.on_host(|| {
        fabric.disconnect("one").unwrap();
        fabric.disconnect("two").unwrap();
        fabric.remove_parent(&network.name).unwrap();
    });
    assert!(!links().contains("dm-0") && !links().contains("dn0"), "{}", links());
}

#[test]
fn what_cannot_be_a_parent_is_refused_by_name() {
    let lab = Lab::new();
    let fabric = lab.fabric();
    for (parent, expected) in [
        ("nowhere", "parent interface nowhere: there is no such interface"),
        ("nowhere.7", "there is no interface nowhere"),
        ("out.4095", "1 to 4094"),
        ("out.x", "1 to 4094"),
        ("lo", "loopback"),
    ] {
        let error = lab.on_host(|| fabric.ensure_parent(&macvlan(MacvlanMode::Bridge, parent))).unwrap_err();
        assert!(error.to_string().contains(expected) && error.is_invalid_input(), "{error}");
    }
    lab.on_host(|| fabric.ensure_bridge(&bridge("brig0", 30))).unwrap();
    run(&lab.host, "ip link add spare type veth peer name other");
    run(&lab.host, "ip link set spare master brig0");
    let network = macvlan(MacvlanMode::Bridge, "spare");
    lab.on_host(|| fabric.ensure_parent(&network)).unwrap();
    let error = lab.connect(&fabric, &below("one", &network, 10)).unwrap_err().to_string();
    assert!(error.contains("spare") && error.contains("used otherwise"), "{error}");
}

/// Where the kernel has no ipvlan the error names what is missing; where it has, containers are reached in every mode.
#[test]
fn ipvlan_works_or_says_what_the_kernel_lacks() {
    for mode in [IpvlanMode::L2, IpvlanMode::L3, IpvlanMode::L3s] {
        let lab = Lab::new();
        let fabric = lab.fabric();
        let kind = SubinterfaceKind::Ipvlan(mode, IpvlanFlag::Bridge);
        let mut network = SubinterfaceSpec { kind, ..macvlan(MacvlanMode::Bridge, "out") };
        if mode != IpvlanMode::L2 {
            (network.gateway, network.gateway6) = (Some([0; 4].into()), Some([0_u16; 8].into()));
        }
        lab.on_host(|| fabric.ensure_parent(&network)).unwrap();
        let one = match lab.connect(&fabric, &below("one", &network, 10)) {
            Ok(one) => one,
            Err(error) => {
                assert!(matches!(error, Error::Unsupported { .. }), "{error}");
                assert!(error.to_string().contains("CONFIG_IPVLAN"), "{error}");
                skipped("ipvlan interfaces", "CONFIG_IPVLAN");
                return;
            }
        };
        let two = lab.connect(&fabric, &below("two", &network, 11)).unwrap();
        assert!(pings(&two.netns, "198.51.100.10"), "{mode:?}: each other");
        if mode != IpvlanMode::L2 {
            // Nobody asks the LAN who has their addresses: it has to be told the way.
            for own in ["198.51.100.10", "198.51.100.11"] {
                run(
                    &lab.client,
                    &format!("ip neigh replace {own} lladdr {} dev eth0", address_of(&lab, "out")),
                );
            }
        }
        assert!(pings(&one.netns, CLIENT), "{mode:?}: the LAN");
    }
}

fn address_of(lab: &Lab, interface: &str) -> String {
    let line = run(&lab.host, &format!("ip -o link show {interface}"));
    let (_, rest) = line.split_once("link/ether ").unwrap();
    rest.split(' ').next().unwrap().to_owned()
}

#[test]
fn a_bridge_of_ipv6_alone_has_no_ipv4() {
    let lab = Lab::new();
    let fabric = lab.fabric();
    let six = BridgeSpec {
        subnet: None,
        gateway: None,
        subnet6: Some("fd00:30::/64".parse().unwrap()),
        gateway6: Some("fd00:30::1".parse().unwrap()),
        ..bridge("brig0", 30)
    };
    lab.on_host(|| {
        fabric.ensure_bridge(&six).unwrap();
        fabric.reconcile(&[]).unwrap();
    });
    let mut spec = container("web", &six, 2);
    spec.ports = vec![tcp(8080, 80)];
    let web = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&web.netns, 80);
    eventually("it is reached", || ask_tcp(&lab.client, &format!("[{HOST6}]:8080")).is_ok());
    assert!(ask_tcp(&lab.client, &format!("{HOST}:8080")).is_err(), "there is no IPv4 to lead to");
    assert_eq!(run(&web.netns, "ip -4 -o addr show eth0"), "");
    assert_eq!(run(&lab.host, "ip -4 -o addr show brig0"), "");
}

#[test]
fn an_isolated_bridge_is_not_the_hosts_either() {
    let lab = Lab::new();
    let fabric = lab.fabric();
    let cave =
        BridgeSpec { gateway: None, internal: true, mode4: GatewayMode::Isolated, ..bridge("brig0", 30) };
    lab.on_host(|| {
        fabric.ensure_bridge(&cave).unwrap();
        fabric.reconcile(&[]).unwrap();
    });
    let one = lab.connect(&fabric, &container("one", &cave, 1)).unwrap();
    let two = lab.connect(&fabric, &container("two", &cave, 2)).unwrap();
    assert!(pings(&two.netns, "172.30.0.1"), "even the first address is a container's");
    assert_eq!(run(&lab.host, "ip -4 -o addr show brig0"), "");
    assert!(!pings(&lab.host, "172.30.0.1"));
    drop(one);
}

#[test]
fn published_ports_are_reached_directly_from_trusted_interfaces_only() {
    for trusted in [false, true] {
        let lab = Lab::new();
        let fabric = lab.fabric();
        let spec = BridgeSpec {
            trusted: if trusted { vec!["out".to_owned()] } else { Vec::new() },
            ..bridge("brig0", 30)
        };
        lab.on_host(|| {
            fabric.ensure_bridge(&spec).unwrap();
            fabric.reconcile(&[]).unwrap();
        });
        let mut wanted = container("web", &spec, 2);
        wanted.ports = vec![tcp(8080, 80)];
        let web = lab.connect(&fabric, &wanted).unwrap();
        serve_tcp(&web.netns, 80);
        serve_tcp(&web.netns, 81);
        run(&lab.client, &format!("ip route add 172.30.0.0/16 via {HOST}"));
        assert_eq!(ask_tcp(&lab.client, "172.30.0.2:80").is_ok(), trusted);
        assert!(ask_tcp(&lab.client, "172.30.0.2:81").is_err(), "what is not published");
        lab.on_host(|| {
            fabric.disconnect("web").unwrap();
            fabric.remove_bridge("brig0").unwrap();
        });
    }
}

/// One engine's machine of an overlay network. They share a LAN.
struct Machine {
    netns: OwnedFd,
    fabric: Fabric,
    bridge: BridgeSpec,
}

fn machine(lan: &OwnedFd, number: u8, others: &[u8], change: impl Fn(&mut BridgeSpec)) -> Machine {
    machine_on("192.0.2.", lan, number, others, change)
}

/// On a LAN whose addresses begin so.
fn machine_on(
    prefix: &str,
    lan: &OwnedFd,
    number: u8,
    others: &[u8],
    change: impl Fn(&mut BridgeSpec),
) -> Machine {
    use std::os::fd::AsRawFd;
    let netns = netns::create().unwrap();
    let there = format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd());
    run(&netns, "ip link set lo up");
    run(lan, &format!("ip link add port{number} type veth peer name lan0 netns {there}"));
    run(lan, &format!("ip link set port{number} master lan up"));
    let length = if prefix.contains(':') { "64 nodad" } else { "24" };
    run(&netns, &format!("ip addr add {prefix}{number}/{length} dev lan0"));
    run(&netns, "ip link set lan0 up");
    let peers = others.iter().map(|other| format!("{prefix}{other}").parse().unwrap()).collect();
    let mut bridge = BridgeSpec {
        gateway: Some([10, 9, number, 1].into()),
        tunnel: Some(Tunnel { vni: 77, port: 4789, local: None, peers }),
        ..BridgeSpec::new("over0", "10.9.0.0/16".parse().unwrap(), [10, 9, number, 1].into())
    };
    change(&mut bridge);
    let fabric = within(&netns, || {
        let fabric = Fabric::open(brigantine_network::Config {
            table: crate::lab::TABLE.to_owned(),
            backend: brigantine_network::FirewallBackend::default(),
            warm: 0,
            owner: None,
            host_firewall: true,
            relay: false,
            cni: brigantine_network::cni::Places::default(),
        })
        .unwrap();
        fabric.ensure_bridge(&bridge).unwrap();
        fabric.reconcile(&[]).unwrap();
        fabric
    });
    Machine { netns, fabric, bridge }
}

impl Machine {
    fn container(&self, id: &str, third: u8, last: u8) -> Sandbox {
        let mut spec = container(id, &self.bridge, last);
        spec.interfaces[0].addresses = vec![IpNet::new([10, 9, third, last].into(), 16).unwrap()];
        within(&self.netns, || self.fabric.connect(&spec)).unwrap()
    }
}

#[test]
fn containers_of_three_hosts_reach_each_other_through_an_overlay() {
    let lan = netns::create().unwrap();
    run(&lan, "ip link add lan type bridge");
    run(&lan, "ip link set lan up");
    let hosts: Vec<Machine> = [1, 2, 3]
        .iter()
        .map(|number| {
            let others: Vec<u8> = (1..=3).filter(|other| other != number).collect();
            machine(&lan, *number, &others, |_| {})
        })
        .collect();
    let containers: Vec<Sandbox> =
        hosts.iter().zip(1..).map(|(host, number)| host.container("one", number, 5)).collect();
    for one in &containers {
        serve_tcp(&one.netns, 80);
    }
    for (from, one) in (1..).zip(&containers) {
        for to in 1..=3_u8 {
            let heard = ask_tcp(&one.netns, &format!("10.9.{to}.5:80"));
            assert_eq!(heard.unwrap(), format!("10.9.{from}.5"), "{from} to {to}");
        }
        assert!(run(&one.netns, "ip -o link show eth0").contains("mtu 1450"), "room for the headers");
    }
    // The largest frames pass.
    assert!(within(&containers[0].netns, || {
        let mut ping = std::process::Command::new("busybox");
        ping.args(["ping", "-c", "1", "-W", "2", "-s", "1422", "10.9.2.5"]).output().unwrap().status.success()
    }));
    // A host that does not stand on the list is not heard of, nor let in by its number alone.
    let stranger = machine(&lan, 4, &[1], |bridge| {
        if let Some(tunnel) = &mut bridge.tunnel {
            tunnel.vni = 78;
        }
    });
    let outsider = stranger.container("out", 4, 5);
    assert!(!pings(&outsider.netns, "10.9.1.5"), "another network's id");
    // Again with another list: the tunnel follows.
    let first = &hosts[0];
    let shorter = BridgeSpec {
        tunnel: first
            .bridge
            .tunnel
            .clone()
            .map(|tunnel| Tunnel { peers: vec!["192.0.2.3".parse().unwrap()], ..tunnel }),
        ..first.bridge.clone()
    };
    within(&first.netns, || first.fabric.ensure_bridge(&shorter)).unwrap();
    assert!(run(&first.netns, "bridge fdb show").matches("dst 192.0.2.").count() >= 1);
    assert!(!run(&first.netns, "bridge fdb show").contains("dst 192.0.2.2"));
    within(&first.netns, || {
        first.fabric.disconnect("one").unwrap();
        first.fabric.remove_bridge("over0").unwrap();
    });
    assert!(!run(&first.netns, "ip -o link").contains("vx"));
}

/// The tunnel's outside is IPv6; its inside has both families.
#[test]
fn an_overlay_goes_by_ipv6_as_well() {
    let lan = netns::create().unwrap();
    run(&lan, "ip link add lan type bridge");
    run(&lan, "ip link set lan up");
    let change = |bridge: &mut BridgeSpec| {
        let last = bridge.gateway.unwrap().octets()[2];
        bridge.subnet6 = Some("fd09::/64".parse().unwrap());
        bridge.gateway6 = Some(format!("fd09::{last}:1").parse().unwrap());
    };
    let hosts: Vec<Machine> =
        [(1, 2), (2, 1)].map(|(own, peer)| machine_on("2001:db8:9::", &lan, own, &[peer], change)).into();
    let containers: Vec<Sandbox> = (1..)
        .zip(&hosts)
        .map(|(number, host): (u8, &Machine)| {
            let mut spec = container("one", &host.bridge, 5);
            let six: IpNet = format!("fd09::{number}:5/64").parse().unwrap();
            spec.interfaces[0].addresses = vec![IpNet::new([10, 9, number, 5].into(), 16).unwrap(), six];
            within(&host.netns, || host.fabric.connect(&spec)).unwrap()
        })
        .collect();
    serve_tcp(&containers[1].netns, 80);
    eventually("IPv4 within IPv6", || ask_tcp(&containers[0].netns, "10.9.2.5:80").is_ok());
    eventually("IPv6 within IPv6", || ask_tcp(&containers[0].netns, "[fd09::2:5]:80").is_ok());
    assert!(run(&containers[0].netns, "ip -o link show eth0").contains("mtu 1430"), "room for the headers");
    assert!(run(&hosts[0].netns, "bridge fdb show").contains("dst 2001:db8:9::2"));
}

/// A container could otherwise write frames of its own into any overlay network of the hosts.
#[test]
fn the_ends_of_tunnels_are_out_of_reach_for_containers() {
    for backend in [FirewallBackend::Nftables, FirewallBackend::Iptables] {
        let lab = Lab::on(backend);
        let fabric = lab.fabric();
        let tunnel = Tunnel { vni: 7, port: 4789, local: None, peers: vec![CLIENT.parse().unwrap()] };
        let overlay = BridgeSpec { tunnel: Some(tunnel), ..bridge("over0", 31) };
        lab.on_host(|| {
            fabric.ensure_bridge(&bridge("brig0", 30)).unwrap();
            fabric.reconcile(&[]).unwrap();
        });
        let one = lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
        for netns in [&lab.client, &lab.host] {
            serve_tcp(netns, 4789);
        }
        let ends = [format!("{CLIENT}:4789"), format!("{HOST}:4789")];
        for end in &ends {
            ask_tcp(&one.netns, end).expect("no tunnel yet");
        }
        lab.on_host(|| fabric.ensure_bridge(&overlay)).unwrap();
        let two = lab.connect(&fabric, &container("two", &overlay, 5)).unwrap();
        for (from, end) in [&one, &two].into_iter().flat_map(|from| ends.iter().map(move |end| (from, end))) {
            assert!(ask_tcp(&from.netns, end).is_err(), "{backend:?}: {end} by TCP");
        }
        assert!(ask_tcp(&lab.host, &ends[0]).is_ok(), "the host itself");
        let rules = match backend {
            FirewallBackend::Iptables => run(&lab.host, "iptables-legacy -t raw -S"),
            _ => run(&lab.host, "nft list set inet brigantine-test tunnels4"),
        };
        assert!(rules.contains("udp"), "{rules}");
    }
}

#[test]
fn an_overlay_that_cannot_be_is_refused() {
    let lab = Lab::new();
    let fabric = lab.fabric();
    let overlay = |change: &dyn Fn(&mut Tunnel)| {
        let mut tunnel = Tunnel { vni: 7, port: 4789, local: None, peers: vec![CLIENT.parse().unwrap()] };
        change(&mut tunnel);
        BridgeSpec { tunnel: Some(tunnel), ..bridge("brig0", 30) }
    };
    let refusal = |spec: BridgeSpec| lab.on_host(|| fabric.ensure_bridge(&spec)).unwrap_err().to_string();
    assert!(refusal(overlay(&|tunnel| tunnel.peers.clear())).contains("needs the addresses"));
    assert!(
        refusal(overlay(&|tunnel| tunnel.peers = vec!["203.0.113.1".parse().unwrap()]))
            .contains("203.0.113.1")
    );
    assert!(
        refusal(overlay(&|tunnel| tunnel.local = Some("198.51.100.99".parse().unwrap())))
            .contains("198.51.100.99")
    );
    assert!(refusal(BridgeSpec { mtu: Some(1500), ..overlay(&|_| {}) }).contains("1450"));
    lab.on_host(|| fabric.ensure_bridge(&overlay(&|_| {}))).unwrap();
    let second = BridgeSpec { name: "brig1".to_owned(), ..overlay(&|_| {}) };
    let second = BridgeSpec { subnet: bridge("x", 31).subnet, gateway: bridge("x", 31).gateway, ..second };
    assert!(refusal(second).contains("id 7"));
    assert!(!run(&lab.host, "ip -o link").contains("brig1"), "nothing is left");
}

/// The kernel lets a bridge have 1,023 ports.
#[test]
fn more_containers_than_a_bridge_has_ports_are_one_network() {
    const MANY: u16 = 1060;
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let address = |net: u8, number: u16| {
        let [high, low] = (number + 2).to_be_bytes();
        IpNet::new([172, net, high, low].into(), 16).unwrap()
    };
    let mut spec = container("first", &bridge("brig0", 30), 2);
    spec.interfaces[0].addresses = vec![address(30, MANY + 1)];
    let first = lab.connect(&fabric, &spec).unwrap();
    // All in one namespace but for a few: it is the bridge's ports that count.
    let crowd = lab.connect(&fabric, &container("crowd", &bridge("brig0", 30), 2)).unwrap();
    for number in 1..MANY {
        let mut wanted = container("crowd", &bridge("brig0", 30), 2).interfaces.remove(0);
        wanted.name = format!("e{number}");
        wanted.addresses = vec![address(30, number)];
        wanted.gateway = None;
        lab.on_host(|| fabric.attach("crowd", crowd.netns.as_fd(), &wanted, &[])).unwrap();
    }
    let mut spec = container("late", &bridge("brig0", 30), 2);
    spec.interfaces[0].addresses = vec![address(30, MANY)];
    spec.ports = vec![tcp(8080, 80)];
    let late = lab.connect(&fabric, &spec).unwrap();
    assert_eq!(late.attachment.interfaces[0].leaf, 1);
    serve_tcp(&late.netns, 80);
    ask_tcp(&lab.host, &format!("{}:80", address(30, MANY).addr())).expect("from the host");
    assert_eq!(ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap(), CLIENT, "published");
    ask_tcp(&late.netns, &format!("{HOST}:8080")).expect("hairpin");
    serve_tcp(&lab.client, 80);
    assert_eq!(ask_tcp(&late.netns, &format!("{CLIENT}:80")).unwrap(), HOST, "outwards");
    assert!(pings(&late.netns, &address(30, MANY + 1).addr().to_string()), "one on the bridge itself");
    assert!(pings(&first.netns, &address(30, MANY).addr().to_string()), "and from there");
    let links = run(&lab.host, "ip -o link");
    assert_eq!(links.lines().filter(|line| line.contains(": leaf")).count(), 1, "{links}");
    let counted = lab.on_host(|| fabric.counters("late", || late.netns.try_clone().ok())).unwrap();
    assert!(counted[0].1.rx_packets > 0, "{counted:?}");
    lab.on_host(|| {
        fabric.disconnect("late").unwrap();
        fabric.disconnect("crowd").unwrap();
        fabric.disconnect("first").unwrap();
        fabric.remove_bridge("brig0").unwrap();
    });
    let links = run(&lab.host, "ip -o link");
    assert!(!links.contains(": leaf") && !links.contains(": sub"), "leaves go with the bridge");
}
