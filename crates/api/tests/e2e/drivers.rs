//! Networks of other drivers than bridge, and of other forms than the usual: seen from containers, and from another
//! machine on the engine's LAN.

use brigantine_testkit::{Client, Outside, until, wait::PATIENCE};
use serde_json::json;

use crate::Host;

both![
    macvlan_puts_containers_on_the_lan,
    networks_are_made_from_a_configuration,
    a_network_without_ipv4,
    options_of_the_bridge_are_carried_out,
    networks_that_cannot_be_are_refused,
];

fn macvlan_puts_containers_on_the_lan(client: Client) {
    let host = Host::new(client);
    let outside = Outside::connect(&host.engine);
    let create = ["network", "create", "-d", "macvlan", "--subnet", "192.0.2.0/24", "--gateway", "192.0.2.1"];
    host.cli(create.iter().chain(&["-o", "parent=lan0", "lan"])).ok();
    let document = host.get("/networks/lan");
    assert_eq!(
        (&document["Driver"], &document["Options"]),
        (&json!("macvlan"), &json!({ "parent": "lan0" }))
    );
    assert_eq!(document["IPAM"]["Config"], json!([{ "Subnet": "192.0.2.0/24", "Gateway": "192.0.2.1" }]));
    let ship = host.background(&["--network", "lan", "--ip", "192.0.2.77", "--name", "ship"], "sleep 1000");
    let text = host.cli(["exec", &ship, "sh", "-c", "ip -4 -o addr show eth0; ip route"]).ok();
    assert!(text.contains("inet 192.0.2.77/24") && text.contains("default via 192.0.2.1 dev eth0"), "{text}");
    let ask = |from: &str, to: &str| {
        host.cli(["exec", from, "ping", "-c", "1", "-W", "2", to]).run().stdout.contains(" 0% packet loss")
    };
    assert!(ask(&ship, "192.0.2.1"), "the other machine");
    let second = host.background(&["--network", "lan"], "sleep 1000");
    assert!(ask(&second, "ship"), "another container, by its name");
    let reached = outside.within(|| {
        let mut ping = std::process::Command::new("busybox");
        ping.args(["ping", "-c", "1", "-W", "2", "192.0.2.77"]).output().unwrap().status.success()
    });
    assert!(reached, "from the other machine, by its own address");
    let stats = host.get("/containers/ship/stats?stream=false&one-shot=true");
    assert!(stats["networks"]["eth0"]["rx_packets"].as_u64().unwrap() > 0, "{}", stats["networks"]);

    // Off the LAN and on it again while it runs.
    host.cli(["network", "disconnect", "lan", &ship]).ok();
    assert_eq!(host.cli(["exec", &ship, "ls", "/sys/class/net"]).ok(), "lo");
    host.cli(["network", "connect", "--ip", "192.0.2.78", "lan", &ship]).ok();
    assert!(ask(&ship, "192.0.2.1"));
    host.cli(["network", "rm", "lan"]).exits(1).expect_stderr("has active endpoints");
    host.cli(["rm", "-f", &ship, &second]).ok();
    host.cli(["network", "rm", "lan"]).ok();
    drop(outside);
}

fn networks_are_made_from_a_configuration(client: Client) {
    let host = Host::new(client);
    host.cli([
        "network",
        "create",
        "--config-only",
        "--subnet",
        "10.77.0.0/24",
        "--label",
        "of=fleet",
        "plan",
    ])
    .ok();
    let plan = host.get("/networks/plan");
    assert_eq!((&plan["ConfigOnly"], &plan["Driver"]), (&json!(true), &json!("null")));
    assert_eq!(plan["IPAM"]["Config"][0]["Subnet"], "10.77.0.0/24");
    host.cli(["network", "create", "--config-from", "plan", "--subnet", "10.78.0.0/24", "shore"])
        .exits(1)
        .expect_stderr("user specified configurations are not supported");
    host.cli(["network", "create", "--config-from", "plan", "shore"]).ok();
    let shore = host.get("/networks/shore");
    assert_eq!((&shore["ConfigFrom"]["Network"], &shore["ConfigOnly"]), (&json!("plan"), &json!(false)));
    assert_eq!(shore["Labels"], json!({ "of": "fleet" }));
    assert!(host.script(&["--network", "shore"], "ip -4 -o addr show eth0").contains("10.77.0.2/24"));
    host.cli(["network", "rm", "plan"]).exits(1).expect_stderr("is in use");
    host.cli(["run", "--rm", "--network", "plan", "busybox", "true"]).exits(125);
    host.cli(["network", "rm", "shore"]).ok();
    host.cli(["network", "rm", "plan"]).ok();
    host.cli(["network", "create", "--config-only", "--internal", "plan"])
        .exits(1)
        .expect_stderr("can only contain network specific fields");
    host.assert_nothing_left();
}

fn a_network_without_ipv4(client: Client) {
    let host = Host::new(client);
    host.cli(["network", "create", "--ipv4=false", "--ipv6", "--subnet", "fd00:77::/64", "six"]).ok();
    let six = host.get("/networks/six");
    assert_eq!((&six["EnableIPv4"], &six["EnableIPv6"]), (&json!(false), &json!(true)));
    let text = host.script(&["--network", "six"], "ip -o addr show eth0; ip -6 route show default");
    assert!(text.contains("inet6 fd00:77::2/64") && text.contains("default via fd00:77::1"), "{text}");
    assert!(!text.contains("inet 1"), "{text}");
    let one = host.background(&["--network", "six", "--name", "one"], "sleep 1000");
    let text = host.script(&["--network", "six"], "ping -6 -c 1 -W 2 one");
    assert!(text.contains(" 0% packet loss"), "{text}");
    assert_eq!(host.inspect(&one)["NetworkSettings"]["Networks"]["six"]["IPAddress"], "");
    host.cli(["network", "create", "--ipv4=false", "--ipv6=false", "nothing"])
        .exits(1)
        .expect_stderr("IPv4 or IPv6 must be enabled");
    host.cli(["rm", "-f", &one]).ok();
    host.cli(["network", "rm", "six"]).ok();
    host.assert_nothing_left();
}

fn options_of_the_bridge_are_carried_out(client: Client) {
    let host = Host::new(client);
    let create = |options: &[&str], name: &str| {
        let options = options.iter().flat_map(|option| ["-o", option]);
        let subnet = ["network", "create", "--subnet", "10.77.0.0/24"].into_iter();
        host.cli(subnet.chain(options).chain([name])).ok();
    };
    create(
        &[
            "com.docker.network.bridge.name=deck0",
            "com.docker.network.container_iface_prefix=sail",
            "com.docker.network.driver.mtu=1400",
            "com.docker.network.bridge.inhibit_ipv4=true",
        ],
        "deck",
    );
    let text = host.script(&["--network", "deck"], "ip -o link; ip route");
    assert!(text.contains("sail0") && text.contains("mtu 1400"), "{text}");
    assert!(
        text.contains("default via 10.77.0.1 dev sail0"),
        "the gateway is somebody else's business: {text}"
    );
    let addresses =
        host.sandbox().command("ip").args(["-4", "-o", "addr", "show", "deck0"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&addresses.stdout), "");
    host.cli(["network", "rm", "deck"]).ok();

    let isolated = ["-o", "com.docker.network.bridge.gateway_mode_ipv4=isolated", "--internal"];
    host.cli(["network", "create", "--subnet", "10.77.0.0/24"].iter().chain(&isolated).chain(&["hold"])).ok();
    assert_eq!(host.get("/networks/hold")["IPAM"]["Config"], json!([{ "Subnet": "10.77.0.0/24" }]));
    let one = host.background(&["--network", "hold", "--name", "one"], "sleep 1000");
    assert!(host.script(&["--network", "hold"], "ping -c 1 -W 2 one").contains(" 0% packet loss"));
    assert!(!host.cli(["exec", &one, "ip", "route"]).ok().contains("default"));
    host.cli(["rm", "-f", &one]).ok();
    host.cli(["network", "rm", "hold"]).ok();
    host.assert_nothing_left();
}

fn networks_that_cannot_be_are_refused(client: Client) {
    let host = Host::new(client);
    for (flags, said) in [
        (&["-d", "macvlan", "-o", "parent=nowhere0"][..], "parent interface nowhere0"),
        (&["-d", "macvlan", "-o", "parent=lo"], "loopback"),
        (&["-d", "macvlan", "-o", "macvlan_mode=teleport"], "bridge, private, vepa or passthru"),
        (&["-d", "ipvlan", "-o", "ipvlan_mode=l9"], "l2, l3 or l3s"),
        (&["-d", "overlay"], "--ip-range"),
        (
            &["-d", "overlay", "--subnet", "10.9.0.0/16", "--ip-range", "10.9.1.0/24"],
            "brigantine.overlay.peers",
        ),
        (&["-d", "submarine"], "plugin \"submarine\" not found"),
        (&["-o", "com.docker.network.bridge.gateway_mode_ipv4=isolated"], "internal"),
        (&["--config-from", "nothing"], "network nothing not found"),
        (&["--config-from", "bridge"], "is not a configuration network"),
    ] {
        host.cli(["network", "create"].iter().chain(flags).chain(&["wrong"])).exits(1).expect_stderr(said);
    }
    host.assert_nothing_left();
}

/// Two engines, each on a machine of its own, with an overlay network of the same name.
#[test]
fn containers_of_two_engines_reach_each_other_through_an_overlay() {
    let machines = [Host::new(Client::Brig), Host::new(Client::Docker)];
    let there = machines[1].sandbox().init_pid().to_string();
    let ip = |host: &Host, line: &str| {
        let output = host.sandbox().net_command("ip").args(line.split(' ')).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    };
    ip(&machines[0], &format!("link add lan0 type veth peer name lan0 netns {there}"));
    for (host, number) in machines.iter().zip(1..) {
        ip(host, &format!("addr add 192.0.2.{number}/24 dev lan0"));
        ip(host, "link set lan0 up");
    }
    for (host, (own, peer)) in machines.iter().zip([(1, 2), (2, 1)]) {
        let range = format!("10.9.{own}.0/24");
        let peers = format!("brigantine.overlay.peers=192.0.2.{peer}");
        host.cli([
            "network",
            "create",
            "-d",
            "overlay",
            "--subnet",
            "10.9.0.0/16",
            "--ip-range",
            &range,
            "-o",
            &peers,
            "fleet",
        ])
        .ok();
        assert_eq!(host.get("/networks/fleet")["Driver"], "overlay");
    }
    let ids: Vec<String> =
        machines.iter().map(|host| host.background(&["--network", "fleet"], "sleep 1000")).collect();
    let addresses: Vec<String> = machines
        .iter()
        .zip(&ids)
        .map(|(host, id)| {
            let document = host.inspect(id);
            document["NetworkSettings"]["Networks"]["fleet"]["IPAddress"].as_str().unwrap().to_owned()
        })
        .collect();
    assert!(addresses[0].starts_with("10.9.1.") && addresses[1].starts_with("10.9.2."), "{addresses:?}");
    for (host, id) in machines.iter().zip(&ids) {
        let text = host.cli(["exec", id, "ip", "-o", "link", "show", "eth0"]).ok();
        assert!(text.contains("mtu 1450"), "{text}");
        for to in &addresses {
            let text = host.cli(["exec", id, "ping", "-c", "1", "-W", "3", to.as_str()]).ok();
            assert!(text.contains(" 0% packet loss"), "{to}: {text}");
        }
    }
    // Names of the other engine's containers, also such as come later, and until they are gone.
    let answered = |host: &Host, id: &str, name: &str| {
        let text = host.cli(["exec", id, "nslookup", "-type=a", name]).run().stdout;
        text.lines().filter(|line| line.contains("Address: 10.9.")).map(str::to_owned).collect::<Vec<_>>()
    };
    let late = machines[1]
        .background(&["--network", "fleet", "--network-alias", "svc", "--name", "late"], "sleep 1000");
    let other = machines[0]
        .background(&["--network", "fleet", "--network-alias", "svc", "--name", "other"], "sleep 1000");
    for (host, id) in machines.iter().zip(&ids) {
        let is_known = |name: &str, number: usize| {
            until(PATIENCE, || (answered(host, id, name).len() == number).then_some(())).is_some()
        };
        assert!(is_known("late", 1) && is_known("other.fleet", 1), "{}", host.daemon_log());
        assert!(is_known("svc", 2), "an alias on both hosts: {:?}", answered(host, id, "svc"));
    }
    let text = machines[0].cli(["exec", &ids[0], "ping", "-c", "1", "-W", "3", "late"]).ok();
    assert!(text.contains(" 0% packet loss"), "{text}");
    machines[1].cli(["rm", "-f", &late]).ok();
    assert!(until(PATIENCE, || answered(&machines[0], &ids[0], "late").is_empty().then_some(())).is_some());
    machines[0].cli(["rm", "-f", &other]).ok();
    for (host, id) in machines.iter().zip(&ids) {
        host.cli(["rm", "-f", id]).ok();
        host.cli(["network", "rm", "fleet"]).ok();
    }
    // The cable is the test's.
    ip(&machines[0], "link delete lan0");
    for host in &machines {
        host.assert_nothing_left();
    }
}
