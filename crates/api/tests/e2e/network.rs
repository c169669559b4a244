//! The default bridge, published ports, name files: from inside, from the engine's machine and from another one.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream, UdpSocket},
};

use brigantine_testkit::{Client, Engine, Outside, until, wait::PATIENCE};
use serde_json::json;

use crate::Host;

both![
    a_container_has_an_address_and_a_route,
    none_has_a_loopback_only_and_host_is_the_hosts,
    name_files_are_the_containers_own,
    containers_reach_each_other,
    a_published_tcp_port_is_reached_from_everywhere,
    a_published_udp_port_is_reached,
    a_port_in_use_is_refused_and_nothing_is_left,
    the_outside_is_reached_through_nat,
    a_running_container_is_connected_and_disconnected,
    networks_have_both_families,
    a_published_port_is_reached_by_ipv6_addresses_of_the_host,
];

fn a_container_has_an_address_and_a_route(client: Client) {
    let host = Host::new(client);
    let text = host.script(&[], "ip -4 -o addr show eth0; ip route; cat /sys/class/net/eth0/mtu");
    assert!(text.contains("inet 172.30.0.2/16"), "{text}");
    assert!(text.contains("default via 172.30.0.1 dev eth0"), "{text}");
    assert!(text.ends_with("1500"), "{text}");
    let id = host.background(&[], "sleep 1000");
    let info = host.inspect(&id);
    let network = &info["NetworkSettings"];
    assert_eq!(network["IPAddress"], network["Networks"]["bridge"]["IPAddress"]);
    assert!(network["IPAddress"].as_str().unwrap().starts_with("172.30.0."));
    assert_eq!(network["Networks"]["bridge"]["Gateway"], "172.30.0.1");
    assert_eq!(network["Networks"]["bridge"]["IPPrefixLen"], 16);
    assert!(network["MacAddress"].as_str().unwrap().contains(':'));
    host.cli(["rm", "-f", &id]).ok();
    host.assert_nothing_left();
}

fn none_has_a_loopback_only_and_host_is_the_hosts(client: Client) {
    let host = Host::new(client);
    assert_eq!(host.script(&["--network", "none"], "ls /sys/class/net; ip -o link | wc -l"), "lo\n1");
    assert_eq!(host.script(&["--network", "none"], "ip -o link show lo | grep -c 'LOOPBACK,UP'"), "1");
    let own = std::fs::read_link(format!("/proc/{}/ns/net", host.daemon_pid())).unwrap();
    assert_eq!(host.script(&["--network", "host"], "readlink /proc/self/ns/net"), own.to_str().unwrap());
    let id = host.background(&["--network", "none"], "sleep 1000");
    assert!(host.inspect(&id)["NetworkSettings"]["Networks"]["none"].is_object());
    host.cli(["run", "--rm", "--network", "nowhere", "busybox", "true"])
        .exits(125)
        .expect_stderr("network nowhere not found");
    host.cli(["rm", "-f", &id]).ok();
    host.assert_nothing_left();
}

fn name_files_are_the_containers_own(client: Client) {
    let host = Host::new(client);
    let hosts = host.script(&["--hostname", "ship", "--add-host", "pier:10.1.2.3"], "cat /etc/hosts");
    assert!(hosts.contains("127.0.0.1\tlocalhost"), "{hosts}");
    assert!(hosts.contains("10.1.2.3\tpier"), "{hosts}");
    assert!(hosts.lines().any(|l| l.starts_with("172.30.0.") && l.ends_with("\tship")), "{hosts}");
    let resolv = host.script(
        &["--dns", "192.0.2.53", "--dns-search", "example.org", "--dns-option", "ndots:3"],
        "cat /etc/resolv.conf",
    );
    assert!(
        resolv.contains("nameserver 192.0.2.53")
            && resolv.contains("search example.org")
            && resolv.contains("options ndots:3"),
        "{resolv}"
    );
    // They can be written to, and are the container's alone.
    let id = host.background(&[], "echo 10.9.9.9 mine >>/etc/hosts; exec sleep 1000");
    assert!(host.cli(["exec", &id, "cat", "/etc/hosts"]).ok().contains("mine"));
    assert!(!host.script(&[], "cat /etc/hosts").contains("mine"));
}

fn containers_reach_each_other(client: Client) {
    let host = Host::new(client);
    let id = host.background(&[], "while :; do echo served | nc -l -p 80; done");
    let at = host.inspect(&id)["NetworkSettings"]["IPAddress"].as_str().unwrap().to_owned();
    let answer = host.script(
        &[],
        &format!("for i in 1 2 3 4 5 6 7 8 9; do nc -w 2 {at} 80 </dev/null && break; sleep 0.2; done"),
    );
    assert_eq!(answer, "served");
    assert_eq!(host.script(&[], &format!("ping -c 1 -W 2 {at} >/dev/null && echo pong")), "pong");
}

/// Reads what a server that says something by itself says.
fn hears(connect: impl Fn() -> std::io::Result<TcpStream>) -> String {
    until(PATIENCE, || {
        let mut stream = connect().ok()?;
        stream.write_all(b"hello\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        (!text.is_empty()).then_some(text)
    })
    .unwrap_or_else(|| "(silence)".to_owned())
}

const SERVER: &str = "while :; do echo served | nc -l -p 80; done";

fn a_published_tcp_port_is_reached_from_everywhere(client: Client) {
    let host = Host::new(client);
    let outside = Outside::connect(&host.engine);
    let id = host.background(&["-p", "8080:80", "-p", "127.0.0.1::81"], SERVER);
    assert_eq!(hears(|| outside.tcp(8080)), "served\n");
    let local = |ip: Ipv4Addr, port: u16| host.sandbox().within_net(|| TcpStream::connect((ip, port)));
    assert_eq!(hears(|| local(Outside::ENGINE, 8080)), "served\n");
    assert_eq!(hears(|| local(Ipv4Addr::LOCALHOST, 8080)), "served\n");
    assert_eq!(hears(|| local(Ipv4Addr::new(172, 30, 0, 1), 8080)), "served\n");
    let ports = host.inspect(&id)["NetworkSettings"]["Ports"].clone();
    assert_eq!(ports["80/tcp"][0], json!({ "HostIp": "0.0.0.0", "HostPort": "8080" }));
    let second: u16 = ports["81/tcp"][0]["HostPort"].as_str().unwrap().parse().unwrap();
    assert!(second >= 1024);
    assert_eq!(ports["81/tcp"][0]["HostIp"], "127.0.0.1");
    assert!(outside.tcp(second).is_err(), "a port of the loopback is open to the LAN");
    assert!(host.cli(["ps"]).ok().contains("0.0.0.0:8080->80/tcp"));
    assert_eq!(host.cli(["port", &id, "81"]).ok(), format!("127.0.0.1:{second}"));
    host.cli(["rm", "-f", &id]).ok();
    drop(outside);
    host.cli(["run", "--rm", "-p", "8080:80", "busybox", "true"]).ok();
    host.assert_nothing_left();
}

fn a_published_udp_port_is_reached(client: Client) {
    let host = Host::new(client);
    let outside = Outside::connect(&host.engine);
    let id = host.background(&["-p", "5353:53/udp"], "sleep 1000");
    // The image has no program that serves UDP, so this thread does, in the container's network.
    let server = host.within_container(&id, || UdpSocket::bind("0.0.0.0:53").unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = server.recv_from(&mut buffer) {
            server.send_to(b"answer\n", from).ok();
        }
    });
    let heard = until(PATIENCE, || {
        let socket = outside.udp(5353).ok()?;
        socket.send(b"question\n").ok()?;
        let mut buffer = [0; 64];
        let n = socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..n]).into_owned())
    });
    assert_eq!(heard.as_deref(), Some("answer\n"));
    host.cli(["rm", "-f", &id]).ok();
}

fn a_port_in_use_is_refused_and_nothing_is_left(client: Client) {
    let host = Host::new(client);
    let id = host.background(&["-p", "8080:80"], "sleep 1000");
    let output = host.cli(["run", "--rm", "--name", "two", "-p", "8080:80", "busybox", "true"]).exits(125);
    assert!(output.stderr.contains("8080"), "{output}");
    // A program of the host's that has the port is respected, too.
    let taken = host.sandbox().within_net(|| std::net::TcpListener::bind("0.0.0.0:9090").unwrap());
    let output = host.cli(["run", "--rm", "-p", "9090:80", "busybox", "true"]).exits(125);
    assert!(output.stderr.contains("9090"), "{output}");
    drop(taken);
    host.cli(["rm", "-f", &id]).ok();
    assert_eq!(host.cli(["ps", "-aq"]).ok(), "");
    host.assert_nothing_left();
}

fn the_outside_is_reached_through_nat(client: Client) {
    let host = Host::new(client);
    let outside = Outside::connect(&host.engine);
    let listener = outside.listen();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut stream, from) = listener.accept().unwrap();
        stream.write_all(from.ip().to_string().as_bytes()).unwrap();
    });
    let seen = host.script(&[], &format!("nc -w 5 {} {port} </dev/null", Outside::ADDRESS));
    assert_eq!(seen, Outside::ENGINE.to_string());
    server.join().unwrap();
}

fn a_running_container_is_connected_and_disconnected(client: Client) {
    let host = Host::new(client);
    host.cli(["network", "create", "--subnet", "10.77.0.0/24", "--ipv6=false", "shore"]).ok();
    host.cli(["network", "create", "--subnet", "10.78.0.0/24", "--ipv6=false", "sea"]).ok();
    let server = host.background(&["--network", "shore", "--ip", "10.77.0.9"], SERVER);
    let ship = host.background(&["-p", "8080:80"], "sleep 1000");
    let ask = |at: &str| {
        let script = format!("for i in 1 2 3; do nc -w 1 {at} 80 </dev/null && break; done");
        host.cli(["exec", &ship, "sh", "-c", &script]).run().stdout.trim().to_owned()
    };
    assert_eq!(ask("10.77.0.9"), "", "networks are apart");
    host.cli(["network", "connect", "--ip", "10.77.0.5", "shore", &ship]).ok();
    assert_eq!(ask("10.77.0.9"), "served");
    let addresses = host.cli(["exec", &ship, "ip", "-4", "-o", "addr"]).ok();
    assert!(
        addresses.contains("eth0    inet 172.30.0") && addresses.contains("eth1    inet 10.77.0.5/24"),
        "{addresses}"
    );
    let document = host.inspect(&ship)["NetworkSettings"]["Networks"]["shore"].clone();
    assert_eq!((&document["IPAddress"], &document["Gateway"]), (&json!("10.77.0.5"), &json!("10.77.0.1")));
    let listed = host.get("/networks/shore");
    assert_eq!(listed["Containers"][&ship]["IPv4Address"], "10.77.0.5/24");
    assert!(host.cli(["exec", &ship, "cat", "/etc/hosts"]).ok().contains("10.77.0.5\t"));

    host.cli(["network", "connect", "shore", &ship])
        .exits(1)
        .expect_stderr("already exists in network shore");
    host.cli(["network", "connect", "--ip", "10.78.9.9", "sea", &ship])
        .exits(1)
        .expect_stderr("no configured subnet");
    host.cli(["network", "connect", "--ip", "10.77.0.9", "shore", "nobody"])
        .exits(1)
        .expect_stderr("No such container");
    host.cli(["network", "rm", "shore"]).exits(1).expect_stderr("has active endpoints");

    // Whoever has the highest priority has the default route.
    host.cli(["network", "connect", "sea", &ship]).ok();
    let route = || host.cli(["exec", &ship, "ip", "-4", "route", "show", "default"]).ok();
    assert!(route().contains("172.30.0.1"), "{}", route());
    host.cli(["network", "disconnect", "bridge", &ship]).ok();
    assert!(route().contains("10.78.0.1"), "{}", route());
    host.cli(["network", "disconnect", "sea", &ship]).ok();
    assert!(route().contains("10.77.0.1"), "{}", route());
    assert!(!host.cli(["exec", &ship, "cat", "/etc/hosts"]).ok().contains("10.78.0."));
    host.cli(["network", "disconnect", "shore", &ship]).ok();
    assert_eq!(host.cli(["exec", &ship, "ls", "/sys/class/net"]).ok(), "lo");
    host.cli(["network", "connect", "shore", &ship]).ok();
    assert_eq!(ask("10.77.0.9"), "served");

    // It is all the same after a restart of the container.
    host.cli(["restart", "-t", "0", &ship]).ok();
    assert_eq!(ask("10.77.0.9"), "served");
    host.cli(["rm", "-f", &server, &ship]).ok();
    host.cli(["network", "rm", "shore", "sea"]).ok();
    host.assert_nothing_left();
}

fn networks_have_both_families(client: Client) {
    let host = Host::new(client);
    host.cli(["network", "create", "dual"]).ok();
    host.cli(["network", "create", "--ipv6=false", "four"]).ok();
    host.cli(["network", "create", "--subnet", "fd00:77::/64", "--subnet", "10.77.0.0/16", "given"]).ok();
    let dual = host.get("/networks/dual");
    // What was asked for, as clients compare it; the addresses say what is.
    assert_eq!(dual["EnableIPv6"], false);
    assert_eq!(host.get("/networks/given")["EnableIPv6"], true);
    assert!(dual["IPAM"]["Config"][1]["Subnet"].as_str().unwrap().starts_with("fd"), "{dual}");
    assert_eq!(host.get("/networks/four")["EnableIPv6"], false);
    assert_eq!(host.script(&["--network", "four"], "ip -6 addr show eth0"), "");
    let look = "ip -6 -o addr show eth0 scope global; ip -6 route show default; cat /proc/sys/net/ipv6/conf/eth0/accept_ra";
    let text = host.script(&["--network", "given", "--ip6", "fd00:77::99"], look);
    assert!(
        text.contains("inet6 fd00:77::99/64") && text.contains("default via fd00:77::1 dev eth0"),
        "{text}"
    );
    assert!(!text.contains("tentative") && text.ends_with('0'), "{text}");
    let server = host.background(&["--network", "dual"], SERVER);
    let at = host.inspect(&server)["NetworkSettings"]["Networks"]["dual"]["GlobalIPv6Address"]
        .as_str()
        .unwrap()
        .to_owned();
    let ask = format!("for i in 1 2 3 4 5; do nc -w 1 {at} 80 </dev/null && break; done");
    assert_eq!(host.script(&["--network", "dual"], &ask), "served");
    let listed = host.get("/networks/dual");
    assert_eq!(listed["Containers"][&server]["IPv6Address"], format!("{at}/64"));
    host.cli(["rm", "-f", &server]).ok();
    host.cli(["network", "rm", "dual", "four", "given"]).ok();
    host.assert_nothing_left();
}

fn a_published_port_is_reached_by_ipv6_addresses_of_the_host(client: Client) {
    let host = Host::new(client);
    host.cli(["network", "create", "dual"]).ok();
    let local =
        |port: u16| host.sandbox().within_net(|| TcpStream::connect((std::net::Ipv6Addr::LOCALHOST, port)));
    let four = host.background(&["-p", "8080:80"], SERVER);
    let six = host.background(&["-p", "8081:80", "--network", "dual"], SERVER);
    assert_eq!(hears(|| local(8080)), "served\n", "a container without IPv6");
    assert_eq!(hears(|| local(8081)), "served\n", "::1 for a container with IPv6");
    let ports = host.cli(["port", &four]).ok();
    assert!(ports.contains("80/tcp -> 0.0.0.0:8080") && ports.contains("80/tcp -> [::]:8080"), "{ports}");
    host.cli(["rm", "-f", &four, &six]).ok();
    assert!(local(8080).is_err());
    host.cli(["network", "rm", "dual"]).ok();
    host.cli(["run", "--rm", "-p", "8080:80", "-p", "8081:81/udp", "busybox", "true"]).ok();
    host.assert_nothing_left();
}

#[test]
fn the_predefined_networks_are_listed() {
    let engine = Engine::start();
    let list = engine.get("/networks");
    let mut names: Vec<_> = list.as_array().unwrap().iter().filter_map(|n| n["Name"].as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["bridge", "host", "none"]);
    let bridge = engine.get("/networks/bridge");
    assert_eq!(bridge["IPAM"]["Config"][0]["Subnet"], "172.30.0.0/16");
}

/// Who reaches what, as far as the engine knows it.
#[test]
fn published_ports_are_audited() {
    let host = Host::new(Client::Brig);
    let _outside = Outside::connect(&host.engine);
    let id =
        host.background(&["--name", "web", "-p", "8080:80", "-p", "127.0.0.1:8081:81/udp"], "sleep 1000");
    let audit = || host.get("/ports");
    let entry = |text: &str| {
        let all = audit();
        let found = all.as_array().unwrap().iter().find(|one| one["HostIp"] == text).cloned();
        found.unwrap_or_else(|| panic!("{text} is not in {all}"))
    };
    let open = entry("0.0.0.0");
    assert_eq!((&open["Container"], &open["Id"]), (&json!("web"), &json!(id)));
    assert_eq!(
        (&open["HostPort"], &open["ContainerPort"], &open["Protocol"]),
        (&json!(8080), &json!(80), &json!("tcp"))
    );
    // 192.0.2.2 is no private address.
    assert_eq!((&open["Reach"], &open["DecidedBy"]), (&json!("anyone"), &json!([])));
    assert_eq!(entry("127.0.0.1")["Reach"], "host");
    let nft = |line: &str| {
        let output = host.sandbox().net_command("nft").arg(line).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    };
    nft("add table inet own");
    nft("add chain inet own input { type filter hook input priority 0; policy drop; }");
    assert_eq!(entry("0.0.0.0")["DecidedBy"], json!(["inet own input"]));
    let table = host.brig(["port", "audit"]).ok();
    assert!(table.contains("PUBLISHED AT") && table.contains("0.0.0.0:8080"), "{table}");
    assert!(table.contains("inet own input (the host's input rules are asked"), "{table}");
    let text = host.brig(["port", "audit", "--format", "json"]).ok();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), audit());
    host.cli(["rm", "-f", &id]).ok();
    assert_eq!(audit(), json!([]));
}

/// Datagrams by `::1`, which the kernel routes to no bridge: relayed, with an answer for each of several askers.
#[test]
fn a_published_udp_port_is_reached_by_the_ipv6_loopback() {
    let host = Host::new(Client::Brig);
    let id = host.background(&["-p", "5353:53/udp"], "sleep 1000");
    let server = host.within_container(&id, || UdpSocket::bind("0.0.0.0:53").unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            server.send_to(&buffer[..length], from).ok();
        }
    });
    let asker = || {
        host.sandbox().within_net(|| {
            let socket = UdpSocket::bind("[::1]:0").unwrap();
            socket.connect("[::1]:5353").unwrap();
            socket.set_read_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
            socket
        })
    };
    let askers = [asker(), asker()];
    for (number, socket) in askers.iter().enumerate() {
        let question = vec![u8::try_from(number).unwrap(); 1400];
        let mut buffer = [0; 2048];
        let heard = until(PATIENCE, || {
            socket.send(&question).ok()?;
            let length = socket.recv(&mut buffer).ok()?;
            Some(buffer[..length] == question)
        });
        assert_eq!(heard, Some(true), "asker {number} gets its own answer, whole");
    }
    host.cli(["rm", "-f", &id]).ok();
    host.assert_nothing_left();
}
