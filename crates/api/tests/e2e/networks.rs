//! Networks as objects, and what a container can ask of them: lists and filters, priorities of default routes, all ports at
//! once, another container's network, address pools.

use crate::Host;
use brigantine_testkit::{Client, Engine};

both![
    networks_are_listed_by_filters_and_pruned,
    pruning_keeps_what_is_young_or_labelled,
    the_default_route_follows_the_priority,
    all_exposed_ports_are_published_at_once,
    a_container_joins_the_network_of_another,
];

fn networks_are_listed_by_filters_and_pruned(client: Client) {
    let host = Host::new(client);
    for (label, name) in [("of=fleet", "sea"), ("of=fleet", "lake"), ("of=army", "land")] {
        host.cli(["network", "create", "--label", label, name]).ok();
    }
    let listed = |filters: &[&str]| -> Vec<String> {
        let filters = filters.iter().flat_map(|filter| ["--filter", filter]);
        let command = ["network", "ls", "--format", "{{.Name}}"].into_iter().chain(filters);
        let mut names: Vec<String> = host.cli(command).ok().lines().map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(listed(&["label=of=fleet"]), ["lake", "sea"]);
    assert_eq!(listed(&["label=of", "name=la"]), ["lake", "land"]);
    assert_eq!(listed(&["type=builtin"]), ["bridge", "host", "none"]);
    assert_eq!(listed(&["driver=bridge", "type=custom"]), ["lake", "land", "sea"]);
    assert!(listed(&["driver=macvlan"]).is_empty());
    let ship = host.background(&["--network", "sea"], "sleep 1000");
    assert_eq!(listed(&["dangling=true"]), ["lake", "land"]);
    assert_eq!(listed(&["dangling=false", "type=custom"]), ["sea"]);
    host.cli(["network", "prune", "-f", "--filter", "label=of=army"]).ok();
    assert_eq!(listed(&["type=custom"]), ["lake", "sea"]);
    host.cli(["network", "prune", "-f"]).ok();
    assert_eq!(listed(&["type=custom"]), ["sea"], "it is used");
    host.cli(["rm", "-f", &ship]).ok();
    host.cli(["network", "rm", "sea"]).ok();
    host.assert_nothing_left();
}

fn pruning_keeps_what_is_young_or_labelled(client: Client) {
    let host = Host::new(client);
    for (label, name) in [("keep=yes", "kept"), ("keep=no", "lost"), ("of=fleet", "young")] {
        host.cli(["network", "create", "--label", label, name]).ok();
    }
    let prune = |filters: &[&str]| {
        let filters = filters.iter().flat_map(|filter| ["--filter", filter]);
        host.cli(["network", "prune", "-f"].into_iter().chain(filters))
    };
    let listed = || {
        let text = host.cli(["network", "ls", "--filter", "type=custom", "--format", "{{.Name}}"]).ok();
        let mut names: Vec<String> = text.lines().map(str::to_owned).collect();
        names.sort();
        names
    };
    prune(&["until=1h"]).ok();
    assert_eq!(listed(), ["kept", "lost", "young"], "they are younger");
    prune(&["label!=keep"]).ok();
    assert_eq!(listed(), ["kept", "lost"]);
    prune(&["label=keep", "label=of=fleet"]).ok();
    assert_eq!(listed(), ["kept", "lost"], "none has both");
    prune(&["until=yesterday"]).exits(1);
    prune(&["odd=x"]).exits(1);
    assert_eq!(listed(), ["kept", "lost"]);
    prune(&["label=keep=no", "until=2100-01-01T00:00:00Z"]).ok();
    assert_eq!(listed(), ["kept"]);
    host.cli(["network", "rm", "kept"]).ok();
    host.assert_nothing_left();
}

/// Settings of the kernel's for one interface, its name, its MAC address and its aliases.
#[test]
fn an_endpoint_has_settings_of_its_own() {
    let host = Host::new(Client::Brig);
    if host.is_peer() {
        // They came with 28.
        return;
    }
    for name in ["sea", "lake"] {
        host.cli(["network", "create", name]).ok();
    }
    // A list within a field is quoted as CSV has it.
    let endpoint = "name=sea,alias=ship,mac-address=02:42:00:00:00:77,\
                    driver-opt=com.docker.network.endpoint.ifname=deck7,\
                    \"driver-opt=com.docker.network.endpoint.sysctls=net.ipv4.conf.IFNAME.log_martians=1,\
                    net.ipv6.conf.IFNAME.hop_limit=33\"";
    let id = host.background(&["--network", "lake", "--network", endpoint], "sleep 1000");
    let read = |id: &str, path: &str| host.cli(["exec", id, "cat", path]).ok();
    let check = || {
        assert_eq!(read(&id, "/sys/class/net/deck7/address"), "02:42:00:00:00:77");
        assert_eq!(read(&id, "/proc/sys/net/ipv4/conf/deck7/log_martians"), "1");
        assert_eq!(read(&id, "/proc/sys/net/ipv6/conf/deck7/hop_limit"), "33");
        assert_eq!(read(&id, "/proc/sys/net/ipv4/conf/eth0/log_martians"), "0", "the other interface");
        assert_eq!(read(&id, "/proc/sys/net/ipv6/conf/eth0/hop_limit"), "64", "the other interface");
    };
    check();
    let address = host.inspect(&id)["NetworkSettings"]["Networks"]["sea"]["IPAddress"].clone();
    let answer = host.script(&["--network", "sea"], "nslookup ship");
    assert!(answer.contains(address.as_str().unwrap()), "{answer}");
    host.cli(["restart", "-t", "0", &id]).ok();
    check();
    // The docker command makes small letters of the word that stands for the name.
    let option = "com.docker.network.endpoint.sysctls=net.ipv4.conf.IFNAME.log_martians=1";
    let endpoint = format!("name=sea,driver-opt={option}");
    let path = "/proc/sys/net/ipv4/conf/eth0/log_martians";
    let words = ["run", "--rm", "--network", &endpoint, "busybox", "cat", path];
    assert_eq!(host.engine.docker(words).ok(), "1");
    // And of one that comes while it runs.
    host.cli(["network", "disconnect", "lake", &id]).ok();
    host.cli(["network", "connect", "--driver-opt", option, "lake", &id]).ok();
    assert_eq!(read(&id, "/proc/sys/net/ipv4/conf/eth0/log_martians"), "1");
    for wrong in
        ["net.ipv4.conf.eth0.log_martians=1", "kernel.IFNAME.x.y.z=1", "net.ipv4.conf.IFNAME.log_martians"]
    {
        let option = format!("com.docker.network.endpoint.sysctls={wrong}");
        host.cli(["run", "--rm", "--network", &format!("name=sea,driver-opt={option}"), "busybox", "true"])
            .exits(125)
            .expect_stderr("sysctl");
    }
    host.cli(["rm", "-f", &id]).ok();
    host.cli(["network", "rm", "sea", "lake"]).ok();
    host.assert_nothing_left();
}

fn the_default_route_follows_the_priority(client: Client) {
    let host = Host::new(client);
    if host.is_peer() {
        // Priorities came with 28.
        return;
    }
    for (name, subnet) in [("aft", "10.71.0.0/24"), ("bow", "10.72.0.0/24"), ("mid", "10.73.0.0/24")] {
        host.cli(["network", "create", "--subnet", subnet, name]).ok();
    }
    let route = |id: &str| host.cli(["exec", id, "ip", "route", "show", "default"]).ok();
    let ship = host.background(
        &["--network", "name=aft", "--network", "name=bow,gw-priority=5", "--ulimit", "nofile=64"],
        "sleep 1000",
    );
    assert!(route(&ship).contains("via 10.72.0.1"), "{}", route(&ship));
    host.cli(["network", "connect", "--gw-priority", "7", "mid", &ship]).ok();
    assert!(route(&ship).contains("via 10.73.0.1"), "{}", route(&ship));
    assert_eq!(host.inspect(&ship)["NetworkSettings"]["Networks"]["mid"]["GwPriority"], 7);
    host.cli(["network", "disconnect", "mid", &ship]).ok();
    assert!(route(&ship).contains("via 10.72.0.1"), "{}", route(&ship));
    host.cli(["network", "disconnect", "bow", &ship]).ok();
    assert!(route(&ship).contains("via 10.71.0.1"), "{}", route(&ship));
    host.cli(["rm", "-f", &ship]).ok();
    host.cli(["network", "rm", "aft", "bow", "mid"]).ok();
    host.assert_nothing_left();
}

fn all_exposed_ports_are_published_at_once(client: Client) {
    let host = Host::new(client);
    let ship =
        host.background(&["-P", "--expose", "80", "--expose", "90-91/udp", "-p", "8080:81"], "sleep 1000");
    let ports = host.inspect(&ship)["NetworkSettings"]["Ports"].clone();
    assert_eq!(ports["81/tcp"][0]["HostPort"], "8080");
    let mut seen = std::collections::BTreeSet::new();
    for port in ["80/tcp", "90/udp", "91/udp"] {
        let number: u16 = ports[port][0]["HostPort"].as_str().unwrap().parse().unwrap();
        assert!(number >= 1024 && seen.insert((port.ends_with("udp"), number)), "{ports}");
    }
    assert_eq!(host.cli(["port", &ship]).ok().lines().filter(|line| line.contains("0.0.0.0:")).count(), 4);
    host.cli(["rm", "-f", &ship]).ok();
    host.assert_nothing_left();
}

fn a_container_joins_the_network_of_another(client: Client) {
    let host = Host::new(client);
    let ship = host.background(&["--name", "ship", "-p", "8080:80"], "sleep 1000");
    let address = host.inspect(&ship)["NetworkSettings"]["Networks"]["bridge"]["IPAddress"].clone();
    let text = host.script(&["--network", "container:ship"], "ip -4 -o addr show eth0");
    assert!(text.contains(address.as_str().unwrap()), "{text}");
    let mate = host.background(&["--network", "container:ship"], "sleep 1000");
    let namespace = |id: &str| host.cli(["exec", id, "readlink", "/proc/self/ns/net"]).ok();
    assert_eq!(namespace(&mate), namespace(&ship));
    host.cli(["network", "create", "sea"]).ok();
    host.cli(["network", "connect", "sea", &mate]).exits(1).expect_stderr("sharing network namespace");
    host.cli(["run", "--rm", "--network", "container:ship", "-p", "81:81", "busybox", "true"])
        .exits(125)
        .expect_stderr("conflicting options");
    host.cli(["rm", "-f", &ship, &mate]).ok();
    host.cli(["network", "rm", "sea"]).ok();
    host.assert_nothing_left();
}

/// Pools of both families, and the host's own routes, which no network may cover.
#[test]
fn networks_take_their_subnets_from_the_configured_pools() {
    let builder = Engine::builder()
        .flag("--default-address-pool=base=10.44.0.0/22,size=24")
        .flag("--default-address-pool=base=fd44::/62,size=64");
    if builder.is_peer() {
        return;
    }
    let host = Host { engine: builder.busybox().start(), client: Client::Brig };
    let output =
        host.sandbox().net_command("ip").args(["route", "add", "10.44.2.0/24", "dev", "lo"]).status();
    assert!(output.unwrap().success());
    let subnets = |name: &str| -> Vec<String> {
        host.cli(["network", "create", name]).ok();
        let document = host.get(&format!("/networks/{name}"));
        let config = document["IPAM"]["Config"].as_array().unwrap().clone();
        config.iter().map(|one| one["Subnet"].as_str().unwrap().to_owned()).collect()
    };
    let (one, two, three) = (subnets("one"), subnets("two"), subnets("three"));
    assert_eq!([&one[0], &two[0]], ["10.44.0.0/24", "10.44.1.0/24"]);
    assert_eq!(three[0], "10.44.3.0/24", "not where the host has a route");
    assert!(one[1].starts_with("fd44:") && one[1] != two[1], "{one:?} {two:?}");
    host.cli(["network", "create", "four"]).exits(1).expect_stderr("fully subnetted");
}
