//! Networks of CNI plugins, those of Debian's package, as users of docker and `brig` meet them.

use brigantine_testkit::{Client, Engine, Outside, until, wait::PATIENCE};
use serde_json::json;

use crate::Host;

both![a_network_of_plugins_is_like_any_other, what_is_no_network_of_plugins_is_refused];

/// A LAN of its own for containers, with everything that a container can ask for.
fn sea(dir: &std::path::Path) -> String {
    json!({
        "cniVersion": "1.0.0",
        "name": "sea",
        "plugins": [
            { "type": "bridge", "bridge": "sea0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
              "ipam": { "type": "host-local", "dataDir": dir.join("ipam"),
                        "ranges": [[{ "subnet": "10.77.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
            { "type": "portmap", "snat": true, "capabilities": { "portMappings": true } },
            { "type": "firewall", "backend": "iptables" },
        ],
    })
    .to_string()
}

fn a_network_of_plugins_is_like_any_other(client: Client) {
    let mut host = Host { engine: Engine::builder().flag("--host-firewall=false").busybox().start(), client };
    if host.is_peer() {
        return;
    }
    let conf = host.dir().join("10-sea.conflist");
    std::fs::write(&conf, sea(host.dir())).unwrap();
    let outside = Outside::connect(&host.engine);
    host.cli(["network", "create", "-d", "cni", "-o", &format!("conf={}", conf.display()), "sea"]).ok();
    let document = host.get("/networks/sea");
    assert_eq!((&document["Driver"], &document["IPAM"]["Driver"]), (&json!("cni"), &json!("cni")));
    assert!(host.cli(["network", "ls", "--filter", "driver=cni"]).ok().contains("sea"));
    // It stays what it was made as.
    std::fs::remove_file(&conf).unwrap();

    let ship = host.background(
        &["--network", "sea", "--name", "ship", "-p", "8080:80", "-p", "81"],
        "while :; do echo served | nc -l -p 80; done",
    );
    let network = host.inspect(&ship)["NetworkSettings"]["Networks"]["sea"].clone();
    assert_eq!((&network["IPAddress"], &network["IPPrefixLen"]), (&json!("10.77.0.2"), &json!(24)));
    assert_eq!(network["Gateway"], "10.77.0.1");
    let address = host.cli(["exec", &ship, "cat", "/sys/class/net/eth0/address"]).ok();
    assert_eq!(network["MacAddress"], address);
    assert!(host.cli(["exec", &ship, "cat", "/etc/hosts"]).ok().contains("10.77.0.2\t"));
    let on = host.get("/networks/sea")["Containers"][&ship].clone();
    assert_eq!(on["IPv4Address"], "10.77.0.2/24");
    assert_eq!(host.cli(["port", &ship, "80"]).ok().lines().next(), Some("0.0.0.0:8080"));
    let heard = until(PATIENCE, || {
        use std::io::Read as _;
        let mut text = String::new();
        outside.tcp(8080).ok()?.read_to_string(&mut text).ok()?;
        (text == "served\n").then_some(())
    });
    assert!(heard.is_some(), "from the other machine");

    // Names, addresses asked for, and a second network beside it.
    let boat = host.background(&["--network", "sea", "--ip", "10.77.0.99", "--name", "boat"], "sleep 1000");
    assert_eq!(host.inspect(&boat)["NetworkSettings"]["Networks"]["sea"]["IPAddress"], "10.77.0.99");
    let text = host.cli(["exec", &boat, "ping", "-c", "1", "-W", "2", "ship"]).ok();
    assert!(text.contains("10.77.0.2") && text.contains(" 0% packet loss"), "{text}");
    host.cli(["network", "create", "land"]).ok();
    let car = host.background(&["--network", "land", "--name", "car"], "sleep 1000");
    host.cli(["network", "connect", "sea", &car]).ok();
    let text = host.cli(["exec", &car, "ping", "-c", "1", "-W", "2", "10.77.0.99"]).ok();
    assert!(text.contains(" 0% packet loss"), "{text}");
    host.cli(["network", "disconnect", "sea", &car]).ok();
    assert!(!host.cli(["exec", &car, "ls", "/sys/class/net"]).ok().contains("eth1"));
    host.cli(["network", "rm", "sea"]).exits(1).expect_stderr("has active endpoints");

    // A daemon that is killed finds everything again, and takes back what has ended meanwhile.
    host.engine.kill_daemon();
    host.engine.restart_daemon();
    assert_eq!(host.inspect(&ship)["NetworkSettings"]["Networks"]["sea"]["IPAddress"], "10.77.0.2");
    host.cli(["rm", "-f", &ship, &boat, &car]).ok();
    host.cli(["network", "rm", "sea", "land"]).ok();
    let kept = std::fs::read_dir(host.data_root().join("cni/results")).into_iter().flatten().count();
    assert_eq!(kept, 0, "results of containers that are gone");
    let addresses = std::fs::read_dir(host.dir().join("ipam/sea")).into_iter().flatten();
    let names = addresses.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.starts_with("10.")).count(), 0, "addresses that are given out");
    let rules = host.sandbox().command("iptables-save").output().unwrap();
    let rules = String::from_utf8(rules.stdout).unwrap();
    assert!(!rules.contains("10.77.0.2") && !rules.contains("8080"), "{rules}");
    drop(outside);
}

fn what_is_no_network_of_plugins_is_refused(client: Client) {
    let lan = json!({ "cniVersion": "1.0.0", "name": "lan", "plugins": [{ "type": "teleport" }] });
    let builder = Engine::builder().etc("cni/net.d/10-lan.conflist", lan.to_string()).busybox();
    let host = Host { engine: builder.start(), client };
    if host.is_peer() {
        return;
    }
    let create = |args: &[&str]| host.cli(["network", "create", "-d", "cni"].iter().chain(args));
    create(&["lan"]).exits(1).expect_stderr("CNI plugin teleport is not in /opt/cni/bin");
    create(&["sea"]).exits(1).expect_stderr("no configuration of a CNI network \"sea\" in /etc/cni/net.d");
    create(&["-o", "conf=/etc/passwd", "sea"]).exits(1).expect_stderr("/etc/passwd");
    create(&["--subnet", "10.0.0.0/24", "lan"]).exits(1).expect_stderr("stands in its configuration");
    host.assert_nothing_left();
}
