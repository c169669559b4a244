//! What is made, what is left, what is refused: bridges, sandboxes, ports and the firewall over their lives.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Mutex;

use crate::lab::{
    HOST, Lab, TABLE, ask_tcp, bridge, container, eventually, port, run, serve_tcp, tcp, within,
};
use brigantine_network::{BridgeSpec, Error, HostPort, Ipam, Live, PortRequest, Protocol, SandboxSpec};
use ipnet::IpNet;

fn veths(lab: &Lab) -> usize {
    run(&lab.host, "ip -o link show master brig0").lines().count()
}

fn names(lab: &Lab) -> Vec<String> {
    let links = run(&lab.host, "ip -o link");
    links.lines().filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect()
}

#[test]
fn removal_leaves_nothing() {
    let lab = Lab::new();
    let (links, rules) = (names(&lab), lab.ruleset());
    let fabric = lab.with_bridge();
    let empty = lab.ruleset();
    let mut spec = container("web", &bridge("brig0", 30), 2);
    spec.ports = vec![tcp(8080, 80), port(Protocol::Udp, 5353, 53)];
    let web = lab.connect(&fabric, &spec).unwrap();
    assert_ne!(lab.ruleset(), empty);
    assert_eq!(veths(&lab), 1);
    lab.on_host(|| fabric.disconnect("web")).unwrap();
    assert_eq!(lab.ruleset(), empty);
    drop(web);
    eventually("the interface goes with the namespace", || veths(&lab) == 0);
    lab.on_host(|| {
        fabric.disconnect("web").unwrap();
        std::net::TcpListener::bind("0.0.0.0:8080").unwrap();
        std::net::UdpSocket::bind("0.0.0.0:5353").unwrap();
        fabric.remove_bridge("brig0").unwrap();
        assert!(matches!(fabric.remove_bridge("brig0"), Err(Error::NoSuchBridge(_))));
    });
    assert_eq!(names(&lab), links);
    assert_eq!(lab.ruleset(), rules);
}

#[test]
fn an_interface_is_removed_even_if_somebody_keeps_the_namespace() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let kept = lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
    lab.on_host(|| fabric.disconnect("one")).unwrap();
    eventually("the interface is removed after a while", || veths(&lab) == 0);
    drop(kept);
}

#[test]
fn a_failed_start_leaves_nothing() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let empty = lab.ruleset();
    let good = container("one", &bridge("brig0", 30), 2);
    let cases = [
        SandboxSpec { sysctls: vec![("net.ipv4.no_such_thing".into(), "1".into())], ..good.clone() },
        SandboxSpec { sysctls: vec![("net.ipv4.ip_forward".into(), "many".into())], ..good.clone() },
        SandboxSpec { sysctls: vec![("kernel.pid_max".into(), "1000".into())], ..good.clone() },
        SandboxSpec {
            ports: vec![tcp(8080, 80), PortRequest { host_ip: Some([192, 0, 2, 9].into()), ..tcp(8081, 81) }],
            ..good.clone()
        },
    ];
    for case in cases {
        let case = SandboxSpec { ports: [case.ports, vec![tcp(8070, 70)]].concat(), ..case };
        let error = lab.connect(&fabric, &case).unwrap_err();
        assert_eq!(veths(&lab), 0, "{error}");
        assert_eq!(lab.ruleset(), empty, "{error}");
    }
    let sandbox =
        lab.connect(&fabric, &SandboxSpec { ports: vec![tcp(8080, 80), tcp(8070, 70)], ..good }).unwrap();
    assert_eq!(sandbox.held.len(), 2);
}

#[test]
fn sysctls_are_those_of_the_container() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let mut spec = container("one", &bridge("brig0", 30), 2);
    spec.sysctls = vec![
        ("net.core.somaxconn".into(), "77".into()),
        ("net.ipv4.conf.eth0.forwarding".into(), "1".into()),
    ];
    let one = lab.connect(&fabric, &spec).unwrap();
    assert_eq!(run(&one.netns, "sysctl -n net.core.somaxconn").trim(), "77");
    assert_eq!(run(&one.netns, "sysctl -n net.ipv4.conf.eth0.forwarding").trim(), "1");
    assert_ne!(run(&lab.host, "sysctl -n net.core.somaxconn").trim(), "77");
}

#[test]
fn port_conflicts_name_the_owner() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let with_port = |id, last, request| {
        let mut spec = container(id, &bridge("brig0", 30), last);
        spec.ports = vec![request];
        spec
    };
    let _one = lab.connect(&fabric, &with_port("one", 2, tcp(8080, 80))).unwrap();
    let error = lab.connect(&fabric, &with_port("two", 3, tcp(8080, 80))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "driver failed programming external connectivity on endpoint name-two: Bind for 0.0.0.0:8080 failed: port is already allocated (by container name-one)"
    );
    assert!(error.is_conflict());
    lab.connect(&fabric, &with_port("three", 3, port(Protocol::Udp, 8080, 80))).unwrap();

    let listener = within(&lab.host, || std::net::TcpListener::bind("127.0.0.1:9090").unwrap());
    let error = lab.connect(&fabric, &with_port("four", 4, tcp(9090, 80))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "driver failed programming external connectivity on endpoint name-four: Bind for 0.0.0.0:9090 failed: port is already allocated"
    );
    drop(listener);
    let four = lab.connect(&fabric, &with_port("four", 4, tcp(9090, 80))).unwrap();
    assert!(within(&lab.host, || std::net::TcpListener::bind("127.0.0.1:9090")).is_err());
    drop(four);

    let range = PortRequest { host_port: HostPort::Range(9100, 9101), ..tcp(0, 80) };
    let mut sandboxes = Vec::new();
    for (id, last, expected) in [("five", 5, 9100), ("six", 6, 9101)] {
        let sandbox = lab.connect(&fabric, &with_port(id, last, range.clone())).unwrap();
        assert_eq!(sandbox.attachment.ports[0].host_port, expected);
        sandboxes.push(sandbox);
    }
    let error = lab.connect(&fabric, &with_port("seven", 7, range)).unwrap_err();
    assert!(error.to_string().contains("all ports are allocated in 9100-9101/tcp"), "{error}");
}

#[test]
fn a_restarted_container_waits_for_its_former_shim_to_let_go() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let mut spec = container("one", &bridge("brig0", 30), 2);
    spec.ports = vec![tcp(8080, 80)];
    let former = lab.connect(&fabric, &spec).unwrap();
    lab.on_host(|| fabric.disconnect("one")).unwrap();
    let ending = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        drop(former);
    });
    lab.connect(&fabric, &spec).unwrap();
    ending.join().unwrap();
}

#[test]
fn a_start_without_the_firewall_loads_it_or_fails() {
    let lab = Lab::new();
    let fabric = lab.fabric();
    lab.on_host(|| fabric.ensure_bridge(&bridge("brig0", 30))).unwrap();
    assert!(!lab.ruleset().contains(TABLE));
    lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
    assert!(lab.ruleset().contains(TABLE));
}

#[test]
fn ephemeral_ports_are_of_the_hosts_range_and_differ() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let mut spec = container("one", &bridge("brig0", 30), 2);
    spec.ports = (0..20)
        .map(|number| PortRequest { host_port: HostPort::Ephemeral, ..tcp(0, 1000 + number) })
        .collect();
    let one = lab.connect(&fabric, &spec).unwrap();
    let numbers: HashSet<u16> = one.attachment.ports.iter().map(|port| port.host_port).collect();
    assert_eq!(numbers.len(), 20);
    assert!(numbers.iter().all(|number| *number >= 32768));
}

#[test]
fn a_long_range_of_ports_is_published() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let mut spec = container("one", &bridge("brig0", 30), 2);
    spec.ports = PortRequest::from_publish("7000-7899:7000-7899").unwrap();
    let one = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&one.netns, 7899);
    ask_tcp(&lab.client, &format!("{HOST}:7899")).unwrap();
    lab.on_host(|| fabric.disconnect("one")).unwrap();
    assert!(!lab.ruleset().contains("172.30.0.2"));
}

#[test]
fn bad_descriptions_are_refused() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let refused = |spec: &BridgeSpec| lab.on_host(|| fabric.ensure_bridge(spec)).unwrap_err().to_string();
    let text =
        refused(&BridgeSpec::new("brig1", "172.30.128.0/24".parse().unwrap(), [172, 30, 128, 1].into()));
    assert!(text.contains("172.30.128.0/24") && text.contains("brig0"), "{text}");
    let text =
        refused(&BridgeSpec::new("brig1", "198.51.100.0/25".parse().unwrap(), [198, 51, 100, 99].into()));
    assert!(text.contains("198.51.100.0/24 on out") && text.contains("--bip"), "{text}");
    let text = refused(&BridgeSpec { name: "a-very-long-bridge-name".to_owned(), ..bridge("x", 31) });
    assert!(text.contains("a-very-long-bridge-name"), "{text}");
    let text = refused(&bridge("out", 31));
    assert!(text.contains("interface out exists") && text.contains("not a bridge but veth"), "{text}");
    run(&lab.host, "ip link add foreign type bridge");
    run(&lab.host, "ip addr add 10.9.0.1/24 dev foreign");
    let text = refused(&bridge("foreign", 31));
    assert!(text.contains("10.9.0.1/24") && text.contains("172.31.0.1/16"), "{text}");
    assert!(!run(&lab.host, "ip -o link").contains("brig1"));

    let good = container("one", &bridge("brig0", 30), 2);
    let with_interface = |change: &dyn Fn(&mut brigantine_network::InterfaceSpec)| {
        let mut spec = good.clone();
        change(&mut spec.interfaces[0]);
        lab.connect(&fabric, &spec).unwrap_err().to_string()
    };
    let text = with_interface(&|one| one.addresses = vec!["10.0.0.2/16".parse().unwrap()]);
    assert!(text.contains("10.0.0.2/16 is not in a subnet of brig0"), "{text}");
    let text = with_interface(&|one| one.addresses = vec!["172.30.0.2/24".parse().unwrap()]);
    assert!(text.contains("prefix length"), "{text}");
    let text = with_interface(&|one| one.addresses = vec!["172.30.0.1/16".parse().unwrap()]);
    assert!(text.contains("gateway"), "{text}");
    let text = with_interface(&|one| one.bridge = "nowhere".to_owned());
    assert_eq!(text, "bridge nowhere does not exist");
    let text = with_interface(&|one| one.name = "sixteen-bytes-xx".to_owned());
    assert!(text.contains("sixteen-bytes-xx"), "{text}");
    let text = with_interface(&|one| one.mac = Some("ff:ff:ff:ff:ff:ff".parse().unwrap()));
    assert!(text.contains("ff:ff:ff:ff:ff:ff"), "{text}");

    let _one = lab.connect(&fabric, &good).unwrap();
    let text = lab.connect(&fabric, &good).unwrap_err().to_string();
    assert_eq!(text, "container name-one is already connected");
    let text = lab.connect(&fabric, &container("two", &bridge("brig0", 30), 2)).unwrap_err().to_string();
    assert_eq!(text, "address 172.30.0.2 is already in use on bridge brig0 by container name-one");
    let text = lab.on_host(|| fabric.remove_bridge("brig0")).unwrap_err().to_string();
    assert_eq!(text, "bridge brig0 has active endpoints: name-one");
}

#[test]
fn an_existing_bridge_that_fits_is_taken() {
    let lab = Lab::new();
    run(&lab.host, "ip link add brig0 type bridge");
    run(&lab.host, "ip addr add 172.30.0.1/16 dev brig0");
    let fabric = lab.with_bridge();
    let again = lab.fabric();
    lab.on_host(|| again.ensure_bridge(&bridge("brig0", 30))).unwrap();
    lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
}

#[test]
fn a_bridge_of_ours_follows_a_changed_subnet_when_nobody_is_on_it() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let one = lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
    let again = lab.fabric();
    let error = lab.on_host(|| again.ensure_bridge(&bridge("brig0", 31))).unwrap_err();
    assert!(matches!(error, Error::BridgeConflict { .. }), "{error}");
    lab.on_host(|| fabric.disconnect("one")).unwrap();
    drop(one);
    eventually("the interface goes", || veths(&lab) == 0);
    lab.on_host(|| again.ensure_bridge(&bridge("brig0", 31))).unwrap();
    let text = run(&lab.host, "ip -o -4 addr show brig0");
    assert!(text.contains("172.31.0.1/16") && !text.contains("172.30."), "{text}");
}

#[test]
fn after_a_crash_live_containers_go_on_and_the_rest_is_removed() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let mut specs = Vec::new();
    for (id, last, number) in [("lives", 2, 8080), ("died", 3, 8081)] {
        let mut spec = container(id, &bridge("brig0", 30), last);
        spec.ports = vec![tcp(number, 80)];
        specs.push(spec);
    }
    let lives = lab.connect(&fabric, &specs[0]).unwrap();
    let died = lab.connect(&fabric, &specs[1]).unwrap();
    serve_tcp(&lives.netns, 80);
    serve_tcp(&died.netns, 80);
    let record = serde_json::to_string(&lives.attachment).unwrap();
    // The engine is gone without a word; only the kernel's state is left, and what it wrote down.
    drop(fabric);
    ask_tcp(&lab.client, &format!("{HOST}:8080")).expect("with no engine");

    let fabric = lab.fabric();
    let attachment = serde_json::from_str(&record).unwrap();
    let report = lab.on_host(|| {
        fabric.ensure_bridge(&bridge("brig0", 30)).unwrap();
        fabric.reconcile(&[Live { attachment }]).unwrap()
    });
    assert_eq!(report.removed_links.len(), 1, "{report:?}");
    assert!(report.missing_links.is_empty(), "{report:?}");
    ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
    let rules = lab.ruleset();
    assert!(rules.contains("172.30.0.2") && !rules.contains("172.30.0.3"), "{rules}");
    let error = lab.connect(&fabric, &SandboxSpec { id: "new".into(), ..specs[0].clone() }).unwrap_err();
    assert!(matches!(error, Error::AddressInUse { .. }), "{error}");
    let error = lab.connect(
        &fabric,
        &SandboxSpec { ports: vec![tcp(8080, 80)], ..container("new", &bridge("brig0", 30), 9) },
    );
    assert!(error.unwrap_err().to_string().contains("(by container name-lives)"));
    lab.on_host(|| fabric.disconnect("lives")).unwrap();
    assert!(!lab.ruleset().contains("172.30.0.2"));
}

#[test]
fn a_flushed_firewall_is_loaded_again() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let mut spec = container("one", &bridge("brig0", 30), 2);
    spec.ports = vec![tcp(8080, 80)];
    let one = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&one.netns, 80);
    assert!(!lab.on_host(|| fabric.verify()).unwrap());
    run(&lab.host, "nft flush ruleset");
    assert!(ask_tcp(&lab.client, &format!("{HOST}:8080")).is_err());
    assert!(lab.on_host(|| fabric.verify()).unwrap());
    ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
    // Also without a look in between, by the next change.
    run(&lab.host, "nft flush ruleset");
    let mut spec = container("two", &bridge("brig0", 30), 3);
    spec.ports = vec![tcp(8081, 80)];
    lab.connect(&fabric, &spec).unwrap();
    ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
    run(&lab.host, "nft flush ruleset");
    lab.connect(&fabric, &container("three", &bridge("brig0", 30), 4)).unwrap();
    assert!(lab.ruleset().contains("172.30.0.2"), "also by a container without ports");
    run(&lab.host, "nft flush ruleset");
    lab.on_host(|| fabric.disconnect("two")).unwrap();
    assert!(lab.ruleset().contains(TABLE));
}

#[test]
fn many_containers_at_once_get_an_address_each() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let net = bridge("brig0", 30);
    let ipam = Mutex::new(Ipam::new(net.layout().subnets()[0], None, net.layout().gateways()).unwrap());
    let connected = Mutex::new(Vec::new());
    lab.on_host(|| {
        std::thread::scope(|scope| {
            for worker in 0..8 {
                let (fabric, ipam, connected, net) = (&fabric, &ipam, &connected, &net);
                scope.spawn(move || {
                    for number in 0..25 {
                        let address = ipam.lock().unwrap().allocate().unwrap();
                        let mut spec = container(&format!("{worker}-{number}"), net, 0);
                        spec.interfaces[0].addresses = vec![IpNet::new(address, 16).unwrap()];
                        spec.ports = vec![PortRequest { host_port: HostPort::Ephemeral, ..tcp(0, 80) }];
                        let sandbox = fabric.connect(&spec).unwrap();
                        connected.lock().unwrap().push(sandbox);
                    }
                });
            }
        });
    });
    let all = connected.into_inner().unwrap();
    assert_eq!(all.len(), 200);
    let seen: HashSet<String> = all
        .iter()
        .map(|one| run(&one.netns, "ip -o -4 addr show eth0"))
        .map(|text| text.split_whitespace().nth(3).unwrap().to_owned())
        .collect();
    assert_eq!(seen.len(), 200);
    let ports: HashSet<u16> = all.iter().map(|one| one.attachment.ports[0].host_port).collect();
    assert_eq!(ports.len(), 200);
    assert_eq!(veths(&lab), 200);
    let one = &all[137];
    serve_tcp(&one.netns, 80);
    ask_tcp(&lab.client, &format!("{HOST}:{}", one.attachment.ports[0].host_port)).unwrap();
    lab.on_host(|| all.iter().for_each(|one| fabric.disconnect(&one.attachment.id).unwrap()));
    assert!(!lab.ruleset().contains("172.30."));
}

#[test]
fn counters_are_the_containers_own() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let one = lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
    serve_tcp(&lab.client, 80);
    let before = lab.on_host(|| fabric.counters("one", || None)).unwrap();
    for _ in 0..10 {
        ask_tcp(&one.netns, &format!("{}:80", crate::lab::CLIENT)).unwrap();
    }
    let after = lab.on_host(|| fabric.counters("one", || None)).unwrap();
    assert_eq!(after[0].0, "eth0");
    let (before, after) = (before[0].1, after[0].1);
    // Ten times SYN, ACK, FIN and more go out.
    assert!(after.tx_packets >= before.tx_packets + 30, "{before:?} {after:?}");
    assert!(after.rx_bytes > before.rx_bytes && after.tx_bytes > before.tx_bytes);
    let inside = run(&one.netns, "cat /proc/net/dev");
    let line = inside.lines().find(|line| line.contains("eth0:")).unwrap();
    let received: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    // The bridge itself may say something at any time.
    let later = lab.on_host(|| fabric.counters("one", || None)).unwrap()[0].1;
    assert!((after.rx_bytes..=later.rx_bytes).contains(&received), "{after:?} {received} {later:?}");
    assert!(lab.on_host(|| fabric.counters("unknown", || None)).unwrap().is_empty());
}

#[test]
fn a_container_on_two_bridges_has_both() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let second = bridge("brig1", 31);
    lab.on_host(|| fabric.ensure_bridge(&second)).unwrap();
    let mut spec = container("both", &bridge("brig0", 30), 2);
    let mut other = container("x", &second, 7).interfaces.remove(0);
    other.name = "eth1".to_owned();
    other.gateway = None;
    spec.interfaces.push(other);
    let both = lab.connect(&fabric, &spec).unwrap();
    let text = run(&both.netns, "ip -o -4 addr");
    assert!(text.contains("172.30.0.2/16") && text.contains("172.31.0.7/16"), "{text}");
}

#[test]
fn host_routes_tell_what_is_taken() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let routes = lab.on_host(|| fabric.host_routes()).unwrap();
    assert!(routes.contains(&"198.51.100.0/24".parse().unwrap()), "{routes:?}");
    assert!(routes.contains(&"172.30.0.0/16".parse().unwrap()), "{routes:?}");
    let free = brigantine_network::subnet::choose(&brigantine_network::subnet::DEFAULT_POOLS, &routes);
    assert_eq!(free, Some("172.16.0.0/16".parse().unwrap()));
}

#[test]
fn a_running_container_is_connected_and_disconnected() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let (first, second) = (bridge("brig0", 30), bridge("brig1", 31));
    lab.on_host(|| fabric.ensure_bridge(&second)).unwrap();
    let mut spec = container("web", &first, 2);
    spec.ports = vec![tcp(8080, 80)];
    let web = lab.connect(&fabric, &spec).unwrap();
    let other = lab.connect(&fabric, &container("other", &second, 3)).unwrap();
    serve_tcp(&web.netns, 80);
    serve_tcp(&other.netns, 80);
    assert!(ask_tcp(&web.netns, "172.31.0.3:80").is_err(), "bridges are apart");

    let mut wanted = container("web", &second, 2).interfaces.remove(0);
    wanted.name = "eth1".to_owned();
    wanted.gateway = None;
    wanted.sysctls = vec![("net.ipv4.conf.eth1.log_martians".to_owned(), "1".to_owned())];
    let taken = brigantine_network::InterfaceSpec {
        addresses: vec!["172.31.0.3/16".parse().unwrap()],
        ..wanted.clone()
    };
    let error = lab.on_host(|| fabric.attach("web", web.netns.as_fd(), &taken, &[])).unwrap_err();
    assert!(matches!(error, Error::AddressInUse { .. }), "{error}");
    let bad = brigantine_network::InterfaceSpec {
        sysctls: vec![("net.ipv4.conf.eth1.nothing".to_owned(), "1".to_owned())],
        ..wanted.clone()
    };
    let error = lab.on_host(|| fabric.attach("web", web.netns.as_fd(), &bad, &[])).unwrap_err();
    assert!(matches!(error, Error::ContainerSysctl { .. }), "{error}");
    assert_eq!(run(&web.netns, "ip -o link").lines().count(), 2, "a failure leaves nothing");

    let (attachment, _) = lab.on_host(|| fabric.attach("web", web.netns.as_fd(), &wanted, &[])).unwrap();
    assert_eq!(attachment.interfaces.len(), 2);
    assert_eq!(ask_tcp(&web.netns, "172.31.0.3:80").unwrap(), "172.31.0.2");
    assert_eq!(run(&web.netns, "cat /proc/sys/net/ipv4/conf/eth1/log_martians").trim(), "1");

    // The default route moves over, and the published port with it.
    let routes = brigantine_network::DefaultRoutes {
        ipv4: Some(("eth1".to_owned(), second.gateway.unwrap())),
        ipv6: None,
    };
    lab.on_host(|| {
        fabric.set_default_routes("web", web.netns.as_fd(), &routes).unwrap();
        let (moved, held) = fabric.republish("web", &spec.ports).unwrap();
        assert!(held.is_empty());
        assert_eq!(moved.ports[0].container_ip, "172.31.0.2".parse::<IpAddr>().unwrap());
        assert_eq!(moved.ports[0].host_port, 8080);
        fabric.detach("web", web.netns.as_fd(), "eth0").unwrap();
        fabric.detach("web", web.netns.as_fd(), "eth0").unwrap();
    });
    assert_eq!(run(&web.netns, "ip -4 route show default").trim(), "default via 172.31.0.1 dev eth1");
    assert!(!run(&web.netns, "ip -o link").contains("eth0"));
    ask_tcp(&lab.client, &format!("{HOST}:8080")).expect("by the published port");
    lab.on_host(|| {
        assert!(matches!(fabric.detach("nobody", web.netns.as_fd(), "eth0"), Err(Error::NotConnected(_))));
        fabric.disconnect("web").unwrap();
        fabric.disconnect("other").unwrap();
    });
}

/// A restart of the host's own firewall often begins by removing everything.
#[test]
fn a_flushed_ruleset_is_loaded_again_at_once() {
    let lab = Lab::new();
    let fabric = lab.with_bridge();
    let mut spec = container("web", &bridge("brig0", 30), 2);
    spec.ports = vec![tcp(8080, 80)];
    let web = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&web.netns, 80);
    let before = lab.ruleset();
    let mut events = lab.on_host(brigantine_network::FirewallEvents::open).unwrap();
    let patience = std::time::Duration::from_secs(10);
    lab.on_host(|| {
        assert!(
            !fabric.reassert(&mut events, std::time::Duration::from_millis(20)).unwrap(),
            "nothing happened"
        );
        fabric.ensure_bridge(&bridge("brig1", 31)).unwrap();
        fabric.remove_bridge("brig1").unwrap();
        let calm = fabric.reassert(&mut events, std::time::Duration::from_millis(200)).unwrap();
        assert!(!calm, "changes of our own are no reason");
    });
    for line in ["nft flush ruleset", &format!("nft flush chain inet {TABLE} prerouting")] {
        run(&lab.host, line);
        assert!(ask_tcp(&lab.client, &format!("{HOST}:8080")).is_err(), "{line} has no effect");
        let start = std::time::Instant::now();
        assert!(lab.on_host(|| fabric.reassert(&mut events, patience)).unwrap(), "{line}");
        assert!(start.elapsed() < patience / 2, "{:?}", start.elapsed());
        assert_eq!(lab.ruleset(), before);
        ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
    }
}
