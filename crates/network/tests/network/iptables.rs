//! The firewall as chains of iptables, beside rules of the host in the same tables.

use brigantine_network::{BridgeSpec, Fabric, FirewallBackend, Protocol, Sandbox};

use crate::lab::{
    CLIENT, HOST, HOST6, Lab, ask_tcp, ask_udp, bridge, container, eventually, port, run, serve_tcp,
    serve_udp, tcp,
};

fn dual() -> BridgeSpec {
    BridgeSpec {
        subnet6: Some("fd00:30::/64".parse().unwrap()),
        gateway6: Some("fd00:30::1".parse().unwrap()),
        ..bridge("brig0", 30)
    }
}

/// A container with two ports published in both families.
fn serving(lab: &Lab) -> (Fabric, Sandbox) {
    let fabric = lab.fabric();
    lab.on_host(|| {
        fabric.ensure_bridge(&dual()).unwrap();
        fabric.reconcile(&[]).unwrap();
    });
    let mut spec = container("web", &dual(), 2);
    spec.ports = vec![tcp(8080, 80), port(Protocol::Udp, 5353, 53)];
    let web = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&web.netns, 80);
    serve_udp(&web.netns, 53);
    (fabric, web)
}

fn saved(lab: &Lab) -> String {
    let all = [run(&lab.host, "iptables-legacy-save"), run(&lab.host, "ip6tables-legacy-save")].concat();
    all.lines()
        .filter(|line| line.starts_with("-A ") || line.starts_with(":BRIG"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Run once more in the virtual machine, without nf_tables.
#[test]
fn auto_is_iptables_where_the_kernel_has_no_nf_tables() {
    let lab = Lab::on(FirewallBackend::Auto);
    let (fabric, _web) = serving(&lab);
    let has_nf_tables = lab
        .on_host(|| std::process::Command::new("nft").args(["list", "tables"]).output())
        .unwrap()
        .status
        .success();
    let expected = if has_nf_tables { FirewallBackend::Nftables } else { FirewallBackend::Iptables };
    assert_eq!(lab.on_host(|| fabric.firewall_backend()), expected);
    ask_tcp(&lab.client, &format!("{HOST}:8080")).expect("published, whatever does it");
}

#[test]
fn rules_of_the_host_stay_and_ours_go() {
    let lab = Lab::on(FirewallBackend::Iptables);
    run(&lab.host, "iptables-legacy -A FORWARD -s 203.0.113.0/24 -j DROP");
    run(&lab.host, "iptables-legacy -t nat -A PREROUTING -p tcp --dport 9999 -j ACCEPT");
    let before = saved(&lab);
    let (fabric, web) = serving(&lab);
    assert_eq!(lab.on_host(|| fabric.firewall_backend()), FirewallBackend::Iptables);
    ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
    assert!(!lab.ruleset().contains("brigantine"), "nothing of nf_tables");
    let loaded = saved(&lab);
    // Loading again changes nothing.
    lab.on_host(|| fabric.reconcile(&[])).unwrap();
    assert_eq!(saved(&lab), loaded);
    drop(web);
    lab.on_host(|| fabric.disconnect("web")).unwrap();
    assert!(!saved(&lab).contains("8080") && !saved(&lab).contains("172.30.0.2"), "{}", saved(&lab));
    lab.on_host(|| fabric.remove_bridge("brig0")).unwrap();
    assert_eq!(saved(&lab), before);
}

#[test]
fn the_hosts_own_input_rules_apply_to_published_ports() {
    let lab = Lab::on(FirewallBackend::Iptables);
    let (fabric, _web) = serving(&lab);
    assert!(fabric.has_gate());
    let (four, six, udp) = (format!("{HOST}:8080"), format!("[{HOST6}]:8080"), format!("{HOST}:5353"));
    eventually("IPv6 is ready", || ask_tcp(&lab.client, &six).is_ok());
    assert_eq!(ask_tcp(&lab.client, &four).unwrap(), CLIENT);
    assert_eq!(ask_udp(&lab.client, &udp).unwrap(), CLIENT);
    for program in ["iptables-legacy", "ip6tables-legacy"] {
        for rule in ["-m conntrack --ctstate ESTABLISHED -j ACCEPT", "-i lo -j ACCEPT"] {
            run(&lab.host, &format!("{program} -A INPUT {rule}"));
        }
    }
    run(&lab.host, "ip6tables-legacy -A INPUT -p ipv6-icmp -j ACCEPT");
    for program in ["iptables-legacy", "ip6tables-legacy"] {
        run(&lab.host, &format!("{program} -P INPUT DROP"));
    }
    let policies = lab.on_host(|| fabric.input_policies()).unwrap();
    assert_eq!(policies, ["ip filter INPUT", "ip6 filter INPUT"]);
    assert!(ask_tcp(&lab.client, &four).is_err(), "IPv4");
    assert!(ask_tcp(&lab.client, &six).is_err(), "IPv6");
    assert!(ask_udp(&lab.client, &udp).is_err(), "UDP");
    ask_tcp(&lab.host, "127.0.0.1:8080").expect("the host itself");
    ask_tcp(&lab.host, &four).expect("the host itself by its address");
    run(&lab.host, &format!("iptables-legacy -A INPUT -s {CLIENT} -p tcp --dport 8080 -j ACCEPT"));
    assert_eq!(ask_tcp(&lab.client, &four).unwrap(), CLIENT, "what the host allows is reached");
    assert!(ask_tcp(&lab.client, &six).is_err(), "and nothing else");
}

/// A host that drops forwarded packets unless it says otherwise does not cut containers off; one that forbids something
/// is heard; one that lets everything through does not open anything.
#[test]
fn the_hosts_own_forwarding_rules_decide_about_what_ours_let_through() {
    let lab = Lab::on(FirewallBackend::Iptables);
    run(&lab.host, "iptables-legacy -P FORWARD DROP");
    let (fabric, web) = serving(&lab);
    serve_tcp(&web.netns, 81);
    serve_tcp(&lab.client, 90);
    serve_tcp(&lab.client, 91);
    run(&lab.client, &format!("ip route add 172.30.0.0/16 via {HOST}"));
    let report = lab.on_host(|| fabric.reconcile(&[])).unwrap();
    assert!(report.obstacles.is_empty(), "{report:?}");
    ask_tcp(&lab.client, &format!("{HOST}:8080")).expect("published");
    ask_tcp(&web.netns, &format!("{CLIENT}:90")).expect("outwards");
    run(&lab.host, "iptables-legacy -I FORWARD -p tcp --dport 91 -j REJECT");
    lab.on_host(|| fabric.reconcile(&[])).unwrap();
    assert!(ask_tcp(&web.netns, &format!("{CLIENT}:91")).is_err(), "what the host forbids");
    run(&lab.host, "iptables-legacy -I FORWARD -j ACCEPT");
    assert!(lab.on_host(|| fabric.verify()).unwrap(), "ours is not first any more");
    assert!(ask_tcp(&lab.client, "172.30.0.2:81").is_err(), "what is not published");
}

#[test]
fn what_somebody_takes_away_is_put_back() {
    let lab = Lab::on(FirewallBackend::Iptables);
    let (fabric, _web) = serving(&lab);
    let whole = saved(&lab);
    assert!(!lab.on_host(|| fabric.verify()).unwrap(), "all is there");
    for change in [
        "iptables-legacy -F FORWARD",
        "iptables-legacy -F",
        "iptables-legacy -t nat -F",
        "iptables-legacy -t nat -D BRIG-test-ANY 1",
        "iptables-legacy -D BRIG-test-CLOSED -j DROP",
        "ip6tables-legacy -t nat -F POSTROUTING",
    ] {
        run(&lab.host, change);
        assert!(lab.on_host(|| fabric.verify()).unwrap(), "{change} is noticed");
        assert_eq!(saved(&lab), whole, "{change}");
        ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
    }
    // A start that finds them damaged puts them back, too, and a change does not hide what happened before.
    run(&lab.host, "iptables-legacy -F FORWARD");
    let mut spec = container("two", &dual(), 3);
    spec.ports = vec![tcp(8081, 80)];
    let two = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&two.netns, 80);
    ask_tcp(&lab.client, &format!("{HOST}:8081")).unwrap();
    run(&lab.host, "iptables-legacy -t nat -F BRIG-test-ANY");
    lab.on_host(|| fabric.disconnect("two")).unwrap();
    ask_tcp(&lab.client, &format!("{HOST}:8080")).expect("the others' ports are back");
}

/// Two engines on one host, each with chains of its own.
#[test]
fn two_engines_share_the_tables() {
    let lab = Lab::on(FirewallBackend::Iptables);
    let (_first, _web) = serving(&lab);
    let second = lab.fabric_with(|config| config.table = "brigantine-other".to_owned());
    let other = bridge("other0", 31);
    lab.on_host(|| {
        second.ensure_bridge(&other).unwrap();
        second.reconcile(&[]).unwrap();
    });
    let mut spec = container("two", &other, 2);
    spec.ports = vec![tcp(8081, 80)];
    let two = lab.connect(&second, &spec).unwrap();
    serve_tcp(&two.netns, 80);
    ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
    ask_tcp(&lab.client, &format!("{HOST}:8081")).unwrap();
    assert!(ask_tcp(&two.netns, "172.30.0.2:80").is_err(), "isolated from each other");
    assert!(!lab.on_host(|| second.verify()).unwrap(), "the first one's place is no damage");
    lab.on_host(|| {
        second.disconnect("two").unwrap();
        second.remove_bridge("other0").unwrap();
    });
    assert!(!saved(&lab).contains("other"), "{}", saved(&lab));
    ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
}
