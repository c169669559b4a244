//! Networks of CNI plugins, with those of Debian's package `containernetworking-plugins`, and with one that writes down
//! how it is called.

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use brigantine_network::cni::{NetworkList, Places};
use brigantine_network::{
    BridgeSpec, DefaultRoutes, Fabric, InterfaceSpec, Live, PortRequest, Protocol, SandboxSpec,
};
use serde_json::{Value, json};

use crate::lab::{
    CLIENT, HOST, Lab, ask_tcp, ask_udp, bridge, container, eventually, port, run, serve_tcp, serve_udp, tcp,
};

const NET: &str = "cni-000000000001";

/// A place for everything that plugins and the fabric keep.
struct Desk {
    lab: Lab,
    dir: tempfile::TempDir,
}

impl Drop for Desk {
    /// What a test that fails has left mounted would keep the directory.
    fn drop(&mut self) {
        for file in self.files("netns") {
            rustix::mount::unmount(&file, rustix::mount::UnmountFlags::DETACH).ok();
        }
    }
}

impl Desk {
    fn new() -> Self {
        let desk = Self { lab: Lab::new(), dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir(desk.path("own")).unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn files(&self, dir: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path(dir)).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn fabric(&self) -> Fabric {
        self.lab.fabric_with(|config| {
            config.cni = Places {
                plugins: vec![self.path("own"), "/usr/lib/cni".into()],
                cache: self.path("cache"),
                namespaces: self.path("netns"),
            };
        })
    }

    fn host_local(&self, subnet: &str) -> Value {
        json!({ "type": "host-local", "dataDir": self.path("ipam"), "ranges": [[{ "subnet": subnet }]],
            "routes": [{ "dst": "0.0.0.0/0" }] })
    }

    /// A plugin that writes its calls down, and answers with what it is given or an address.
    fn recorder(&self) {
        let script = format!(
            "#!/bin/sh\nset -e\n{{ printf '{{\"command\":\"%s\",\"container\":\"%s\",\"netns\":\"%s\",\"interface\":\"%s\",\"args\":\"%s\",\"path\":\"%s\",\"input\":' \
             \"$CNI_COMMAND\" \"$CNI_CONTAINERID\" \"$CNI_NETNS\" \"$CNI_IFNAME\" \"$CNI_ARGS\" \"$CNI_PATH\"; cat | tr -d '\\n'; echo '}}'; }} >>{0}/calls\n\
             test \"$CNI_COMMAND\" != ADD || cat {0}/answer\n",
            self.dir.path().display()
        );
        let file = self.path("own/recorder");
        std::fs::write(&file, script).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn calls(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("calls")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn assert_nothing_left(&self) {
        for dir in ["cache/results", "netns"] {
            let left = self.files(dir);
            assert!(left.is_empty(), "{left:?}");
        }
        let given: Vec<PathBuf> = self.files("ipam/sea");
        let is_address = |file: &PathBuf| {
            file.file_name().unwrap().to_str().unwrap().starts_with(|c: char| c.is_ascii_digit())
        };
        assert!(!given.iter().any(is_address), "addresses: {given:?}");
    }
}

fn list(plugins: Value) -> NetworkList {
    list_of("1.0.0", plugins)
}

fn list_of(version: &str, plugins: Value) -> NetworkList {
    let value = json!({ "cniVersion": version, "name": "sea", "plugins": plugins });
    NetworkList::parse(&value.to_string(), "here").unwrap()
}

fn on_sea(id: &str) -> SandboxSpec {
    let interfaces =
        vec![InterfaceSpec { bridge: NET.to_owned(), name: "eth0".to_owned(), ..InterfaceSpec::default() }];
    SandboxSpec { id: id.to_owned(), name: format!("name-{id}"), interfaces, ..SandboxSpec::default() }
}

#[test]
fn plugins_connect_a_container_and_take_everything_back() {
    let desk = Desk::new();
    let (lab, fabric) = (&desk.lab, desk.fabric());
    let list = list(json!([
        { "type": "bridge", "bridge": "sea0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
          "capabilities": { "mac": true }, "ipam": desk.host_local("10.77.0.0/24") },
        { "type": "portmap", "snat": true, "capabilities": { "portMappings": true } },
        { "type": "firewall", "backend": "iptables" },
        { "type": "tuning", "sysctl": { "net.ipv4.conf.IFNAME.log_martians": "1" } },
    ]));
    lab.on_host(|| fabric.negotiate(list.clone()).and_then(|list| fabric.ensure_foreign(NET, &list)))
        .unwrap();
    let mut spec = on_sea("web");
    spec.ports = vec![
        tcp(8080, 80),
        port(Protocol::Udp, 5353, 53),
        PortRequest { host_ip: Some([127, 0, 0, 1].into()), ..tcp(8081, 80) },
    ];
    spec.interfaces[0].mac = Some("02:42:00:00:77:01".parse().unwrap());
    let web = lab.connect(&fabric, &spec).unwrap();
    let made = &web.attachment.interfaces[0];
    assert_eq!(made.addresses, ["10.77.0.2/24".parse().unwrap()]);
    assert_eq!(
        (made.gateway, made.mac.to_string().as_str()),
        (Some([10, 77, 0, 1].into()), "02:42:00:00:77:01")
    );
    assert!(web.attachment.ports.iter().all(|port| port.container_ip.to_string() == "10.77.0.2"));
    assert!(run(&web.netns, "ip route").contains("default via 10.77.0.1"));
    assert!(run(&web.netns, "sysctl net.ipv4.conf.eth0.log_martians").ends_with("= 1\n"));

    serve_tcp(&web.netns, 80);
    serve_udp(&web.netns, 53);
    serve_tcp(&lab.client, 90);
    assert_eq!(ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap(), CLIENT, "published");
    assert_eq!(ask_udp(&lab.client, &format!("{HOST}:5353")).unwrap(), CLIENT);
    ask_tcp(&lab.host, "127.0.0.1:8081").expect("published on the loopback");
    assert!(ask_tcp(&lab.client, &format!("{HOST}:8081")).is_err());
    assert_eq!(ask_tcp(&web.netns, &format!("{CLIENT}:90")).unwrap(), HOST, "outwards");
    let two = lab.connect(&fabric, &on_sea("two")).unwrap();
    assert_eq!(ask_tcp(&two.netns, "10.77.0.2:80").unwrap(), "10.77.0.3");
    assert!(!lab.ruleset().contains("brigantine-"), "the engine's own firewall has nothing to do with it");
    let error = lab.on_host(|| fabric.remove_foreign(NET)).unwrap_err().to_string();
    assert!(error.contains("name-web"), "{error}");
    // A port that is taken is refused with its owner's name, as on every network.
    let mut third = on_sea("third");
    third.ports = vec![tcp(8080, 80)];
    let error = lab.connect(&fabric, &third).unwrap_err().to_string();
    assert!(error.contains("8080") && error.contains("name-web"), "{error}");

    // The container's processes have ended, and with them all that holds its namespace but the file.
    drop((web, two));
    lab.on_host(|| {
        fabric.disconnect("web").unwrap();
        fabric.disconnect("two").unwrap();
        fabric.remove_foreign(NET).unwrap();
    });
    desk.assert_nothing_left();
    let rules = run(&lab.host, "iptables-nft-save");
    assert!(!rules.contains("10.77.0.2") && !rules.contains("10.77.0.3"), "{rules}");
    eventually("interfaces go", || !run(&lab.host, "ip -o link").contains("master sea0"));
}

#[test]
fn containers_come_and_go_while_they_run_beside_other_networks() {
    let desk = Desk::new();
    let (lab, fabric) = (&desk.lab, desk.fabric());
    let list = list(json!([{ "type": "ptp", "ipMasq": true, "ipam": {
        "type": "host-local", "dataDir": desk.path("ipam"),
        "ranges": [[{ "subnet": "10.77.0.0/24" }], [{ "subnet": "fd77::/64" }]],
        "routes": [{ "dst": "198.51.100.0/24" }, { "dst": "0.0.0.0/0" }] } }]));
    lab.on_host(|| {
        fabric.ensure_foreign(NET, &list).unwrap();
        fabric.ensure_bridge(&bridge("brig0", 30)).unwrap();
        fabric.reconcile(&[]).unwrap();
    });
    let one = lab.connect(&fabric, &container("one", &bridge("brig0", 30), 2)).unwrap();
    let mut wanted = on_sea("one").interfaces.remove(0);
    wanted.name = "sea0".to_owned();
    wanted.addresses = vec!["10.77.0.77/32".parse().unwrap()];
    let (attachment, _) = lab.on_host(|| fabric.attach("one", one.netns.as_fd(), &wanted, &[])).unwrap();
    let addresses: Vec<String> = attachment.interfaces[1].addresses.iter().map(ToString::to_string).collect();
    assert!(addresses[0].starts_with("10.77.0.77/") && addresses[1].starts_with("fd77::"), "{addresses:?}");
    let routes = run(&one.netns, "ip route");
    assert!(
        routes.contains("default via 172.30.0.1") && routes.contains("198.51.100.0/24 via 10.77.0.1"),
        "{routes}"
    );
    serve_tcp(&lab.client, 90);
    assert_eq!(ask_tcp(&one.netns, &format!("{CLIENT}:90")).unwrap(), HOST);
    // Their default route gives way to one of the engine's, and stays where there is none.
    let of_ours = DefaultRoutes { ipv4: Some(("eth0".to_owned(), [172, 30, 0, 1].into())), ipv6: None };
    for _ in 0..2 {
        lab.on_host(|| fabric.set_default_routes("one", one.netns.as_fd(), &of_ours)).unwrap();
        let routes = run(&one.netns, "ip route show default");
        assert_eq!(routes.trim(), "default via 172.30.0.1 dev eth0");
    }
    let same = lab.on_host(|| fabric.attach("one", one.netns.as_fd(), &wanted, &[])).unwrap_err().to_string();
    assert!(same.contains("sea0"), "{same}");

    let attachment = lab.on_host(|| fabric.detach("one", one.netns.as_fd(), "sea0")).unwrap();
    assert_eq!(attachment.interfaces.len(), 1);
    assert!(!run(&one.netns, "ip -o link").contains("sea0"));
    desk.assert_nothing_left();
    // The address is free again.
    lab.on_host(|| fabric.attach("one", one.netns.as_fd(), &wanted, &[])).unwrap();
    lab.on_host(|| fabric.disconnect("one")).unwrap();
    desk.assert_nothing_left();
}

#[test]
fn a_plugin_that_fails_is_told_in_one_line_and_leaves_nothing() {
    let desk = Desk::new();
    let (lab, fabric) = (&desk.lab, desk.fabric());
    // Room for a router and one container.
    let list = list(json!([
        { "type": "bridge", "bridge": "sea0", "isGateway": true, "ipam": desk.host_local("10.77.0.0/30") },
    ]));
    lab.on_host(|| fabric.ensure_foreign(NET, &list)).unwrap();
    let one = lab.connect(&fabric, &on_sea("one")).unwrap();
    let error = lab.connect(&fabric, &on_sea("two")).unwrap_err().to_string();
    assert!(error.starts_with("CNI plugin bridge (ADD, network sea): ") && !error.contains('\n'), "{error}");
    assert!(error.contains("10.77.0"), "{error}");
    assert_eq!(desk.files("netns").len(), 1, "that of the first");
    drop(one);
    lab.on_host(|| fabric.disconnect("one")).unwrap();
    desk.assert_nothing_left();
    lab.connect(&fabric, &on_sea("two")).expect("there is room now");
    lab.on_host(|| fabric.disconnect("two")).unwrap();

    let ports = SandboxSpec { ports: vec![tcp(8080, 80)], ..on_sea("three") };
    let error = lab.connect(&fabric, &ports).unwrap_err().to_string();
    assert!(error.contains("portMappings") && error.contains("sea"), "{error}");
    let missing = list_of("1.0.0", json!([{ "type": "teleport" }]));
    let error = lab.on_host(|| fabric.negotiate(missing)).unwrap_err();
    assert!(error.is_invalid_input() && error.to_string().contains("teleport is not in"), "{error}");
    let twice = lab.on_host(|| fabric.ensure_foreign("cni-2", &list)).unwrap_err().to_string();
    assert!(twice.contains("another network"), "{twice}");
}

/// What the specification says of the order, the environment, the input and the result.
#[test]
fn plugins_are_called_as_specified() {
    let desk = Desk::new();
    let (lab, fabric) = (&desk.lab, desk.fabric());
    desk.recorder();
    let answer = json!({ "cniVersion": "1.1.0", "interfaces": [{ "name": "eth0", "sandbox": "x" }],
        "ips": [{ "address": "10.77.0.9/24", "interface": 0 }] });
    std::fs::write(desk.path("answer"), answer.to_string()).unwrap();
    let list = list_of(
        "1.1.0",
        json!([
            { "type": "recorder", "place": 1, "capabilities": { "ips": true } },
            { "type": "recorder", "place": 2, "capabilities": { "portMappings": true, "ips": false } },
        ]),
    );
    lab.on_host(|| fabric.ensure_foreign(NET, &list)).unwrap();
    let mut spec = SandboxSpec { ports: vec![tcp(8080, 80)], ..on_sea("one") };
    spec.interfaces[0].addresses = vec!["10.77.0.9/32".parse().unwrap()];
    let one = lab.connect(&fabric, &spec).unwrap();
    assert_eq!(one.attachment.ports[0].container_ip.to_string(), "10.77.0.9");
    let netns = desk.path("netns/one").display().to_string();
    let calls = desk.calls();
    assert_eq!(calls.len(), 2);
    for call in &calls {
        assert_eq!((&call["command"], &call["container"]), (&json!("ADD"), &json!("one")));
        assert_eq!((&call["netns"], &call["interface"]), (&json!(netns), &json!("eth0")));
        assert_eq!(call["args"], "IgnoreUnknown=1");
        assert_eq!(call["path"], format!("{}:/usr/lib/cni", desk.path("own").display()));
        assert_eq!((&call["input"]["name"], &call["input"]["cniVersion"]), (&json!("sea"), &json!("1.1.0")));
        assert_eq!(call["input"]["capabilities"], Value::Null);
    }
    assert_eq!(calls[0]["input"]["runtimeConfig"], json!({ "ips": ["10.77.0.9"] }));
    assert_eq!(calls[0]["input"]["prevResult"], Value::Null);
    assert_eq!(
        calls[1]["input"]["runtimeConfig"],
        json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] })
    );
    assert_eq!(calls[1]["input"]["prevResult"], answer, "the one before");
    // Kept as libcni keeps it.
    let kept: Value =
        serde_json::from_slice(&std::fs::read(desk.path("cache/results/sea-one-eth0")).unwrap()).unwrap();
    assert_eq!(
        (&kept["kind"], &kept["containerId"], &kept["ifName"], &kept["networkName"], &kept["result"]),
        (&json!("cniCacheV1"), &json!("one"), &json!("eth0"), &json!("sea"), &answer)
    );

    // The next daemon takes it up: what is there is checked, and those of whom nothing is known are taken back.
    let second = desk.fabric();
    let live = Live { attachment: one.attachment.clone() };
    lab.on_host(|| {
        second.ensure_foreign(NET, &list).unwrap();
        second.reconcile(&[live]).unwrap();
    });
    let commands = |from: usize| -> Vec<(String, i64)> {
        let calls = desk.calls();
        let seen = calls.iter().skip(from);
        seen.map(|call| {
            (call["command"].as_str().unwrap().to_owned(), call["input"]["place"].as_i64().unwrap())
        })
        .collect()
    };
    let of = |command: &str, places: [i64; 2]| places.map(|place| (command.to_owned(), place));
    assert_eq!(commands(2), [of("STATUS", [1, 2]), of("GC", [1, 2]), of("CHECK", [1, 2])].concat());
    let calls = desk.calls();
    assert_eq!(
        calls[4]["input"]["cni.dev/valid-attachments"],
        json!([{ "containerID": "one", "ifname": "eth0" }])
    );
    assert_eq!(calls[6]["input"]["prevResult"], answer);

    drop(one);
    lab.on_host(|| second.disconnect("one")).unwrap();
    assert_eq!(commands(8), of("DEL", [2, 1]), "backwards");
    let calls = desk.calls();
    assert_eq!((&calls[8]["input"]["prevResult"], &calls[8]["netns"]), (&answer, &json!(netns)));
    assert_eq!(calls[9]["input"]["runtimeConfig"], json!({ "ips": ["10.77.0.9"] }), "as at ADD");
    desk.assert_nothing_left();
    lab.on_host(|| second.remove_foreign(NET)).unwrap();
    assert_eq!(commands(10), of("GC", [1, 2]));
}

/// Debian's plugins know versions up to 1.0.0.
#[test]
fn the_version_is_one_that_all_plugins_know() {
    let desk = Desk::new();
    let (lab, fabric) = (&desk.lab, desk.fabric());
    let plugins = json!([
        { "type": "bridge", "bridge": "sea0", "ipam": desk.host_local("10.77.0.0/24") },
        { "type": "portmap", "capabilities": { "portMappings": true } },
    ]);
    let both = json!({ "cniVersion": "0.4.0", "cniVersions": ["0.4.0", "1.0.0", "1.1.0"], "name": "sea",
        "plugins": plugins });
    let both = NetworkList::parse(&both.to_string(), "here").unwrap();
    let spoken = lab.on_host(|| fabric.negotiate(both)).unwrap();
    assert_eq!(Value::from(spoken.clone())["cniVersion"], "1.0.0");
    lab.on_host(|| fabric.ensure_foreign(NET, &spoken)).unwrap();
    lab.connect(&fabric, &on_sea("one")).expect("in that version it works");
    lab.on_host(|| fabric.disconnect("one")).unwrap();
    desk.assert_nothing_left();

    let error = lab.on_host(|| fabric.negotiate(list_of("1.1.0", plugins))).unwrap_err();
    assert!(error.is_invalid_input(), "{error}");
    let error = error.to_string();
    assert!(
        error.contains("plugin bridge does not know version 1.1.0") && error.contains("1.0.0"),
        "{error}"
    );
    // One that says nothing of it gets what the configuration has.
    desk.recorder();
    let silent = list_of("1.1.0", json!([{ "type": "recorder", "place": 1 }]));
    assert_eq!(lab.on_host(|| fabric.negotiate(silent.clone())).unwrap(), silent);
    assert_eq!(
        (&desk.calls()[0]["command"], &desk.calls()[0]["input"]),
        (&json!("VERSION"), &json!({ "cniVersion": "1.1.0" }))
    );
}

#[test]
fn plugins_say_whether_they_are_ready() {
    let desk = Desk::new();
    let (lab, fabric) = (&desk.lab, desk.fabric());
    desk.recorder();
    let of_version = |version| list_of(version, json!([{ "type": "recorder", "place": 1 }]));
    lab.on_host(|| fabric.status(&of_version("1.0.0"))).expect("nobody is asked before 1.1");
    assert!(desk.calls().is_empty());
    lab.on_host(|| fabric.status(&of_version("1.1.0"))).unwrap();
    let call = desk.calls().remove(0);
    assert_eq!((&call["command"], &call["input"]["name"]), (&json!("STATUS"), &json!("sea")));
    let unready = "#!/bin/sh\necho '{ \"code\": 50, \"msg\": \"no lease yet\" }'; exit 1\n";
    std::fs::write(desk.path("own/recorder"), unready).unwrap();
    let error = lab.on_host(|| fabric.status(&of_version("1.1.0"))).unwrap_err().to_string();
    assert_eq!(error, "CNI plugin recorder (STATUS, network sea): no lease yet");
}

#[test]
fn ports_that_lead_nowhere_are_mapped_when_plugins_connect_a_running_container() {
    let desk = Desk::new();
    let (lab, fabric) = (&desk.lab, desk.fabric());
    let sea = list(json!([
        { "type": "bridge", "bridge": "sea0", "isGateway": true, "ipMasq": true, "ipam": desk.host_local("10.77.0.0/24") },
        { "type": "portmap", "snat": true, "capabilities": { "portMappings": true } },
    ]));
    let inner = BridgeSpec { internal: true, ..bridge("brig0", 30) };
    lab.on_host(|| {
        fabric.ensure_foreign(NET, &sea).unwrap();
        fabric.ensure_bridge(&inner).unwrap();
        fabric.reconcile(&[]).unwrap();
    });
    let ports = [tcp(8080, 80)];
    let one =
        lab.connect(&fabric, &SandboxSpec { ports: ports.to_vec(), ..container("one", &inner, 2) }).unwrap();
    assert!(one.attachment.ports.is_empty() && one.held.is_empty(), "an internal network has no outside");
    serve_tcp(&one.netns, 80);
    let mut wanted = on_sea("one").interfaces.remove(0);
    wanted.name = "sea0".to_owned();
    let (attachment, held) =
        lab.on_host(|| fabric.attach("one", one.netns.as_fd(), &wanted, &ports)).unwrap();
    assert_eq!((attachment.ports.len(), held.len()), (1, 1));
    assert!(attachment.ports.iter().all(|port| port.container_ip.to_string() == "10.77.0.2"));
    assert_eq!(ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap(), CLIENT);
    let (again, more) = lab.on_host(|| fabric.republish("one", &ports)).unwrap();
    assert_eq!((again.ports, more.len()), (attachment.ports, 0), "they stay");
    // Nobody else gets them meanwhile.
    let two = SandboxSpec { ports: ports.to_vec(), ..on_sea("two") };
    let error = lab.connect(&fabric, &two).unwrap_err().to_string();
    assert!(error.contains("8080") && error.contains("one"), "{error}");

    let attachment = lab.on_host(|| fabric.detach("one", one.netns.as_fd(), "sea0")).unwrap();
    assert!(attachment.ports.is_empty());
    assert!(ask_tcp(&lab.client, &format!("{HOST}:8080")).is_err(), "taken back");
    drop(held);
    lab.connect(&fabric, &two).expect("the port is free again");
    lab.on_host(|| {
        fabric.disconnect("one").unwrap();
        fabric.disconnect("two").unwrap();
    });
    desk.assert_nothing_left();
}

#[test]
fn what_ended_without_the_engine_is_taken_back_by_the_next() {
    let desk = Desk::new();
    let (lab, first) = (&desk.lab, desk.fabric());
    let list = list(json!([
        { "type": "bridge", "bridge": "sea0", "isGateway": true, "ipMasq": true, "ipam": desk.host_local("10.77.0.0/24") },
        { "type": "portmap", "capabilities": { "portMappings": true } },
    ]));
    lab.on_host(|| first.ensure_foreign(NET, &list)).unwrap();
    let spec = SandboxSpec { ports: vec![tcp(8080, 80)], ..on_sea("one") };
    drop(lab.connect(&first, &spec).unwrap());
    drop(first);
    assert!(run(&lab.host, "iptables-nft-save").contains("10.77.0.2"));
    let second = desk.fabric();
    lab.on_host(|| {
        second.ensure_foreign(NET, &list).unwrap();
        second.reconcile(&[]).unwrap();
    });
    desk.assert_nothing_left();
    let rules = run(&lab.host, "iptables-nft-save");
    assert!(!rules.contains("10.77.0.2"), "{rules}");
}

#[test]
fn a_result_that_is_none_is_refused() {
    let desk = Desk::new();
    let (lab, fabric) = (&desk.lab, desk.fabric());
    desk.recorder();
    let list = list(json!([{ "type": "recorder", "place": 1 }]));
    lab.on_host(|| fabric.ensure_foreign(NET, &list)).unwrap();
    for (answer, reason) in [("no JSON", "no JSON"), (r#"{ "ips": [{ "address": "there" }] }"#, "there")] {
        std::fs::write(desk.path("answer"), answer).unwrap();
        let error = lab.connect(&fabric, &on_sea("one")).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains("sea"), "{error}");
        let last = desk.calls().pop().unwrap();
        assert_eq!(last["command"], "DEL", "what it may have made is taken back");
    }
    desk.assert_nothing_left();
    std::fs::write(desk.path("own/recorder"), "#!/bin/sh\nhead -c 2000000 /dev/zero\n").unwrap();
    let error = lab.connect(&fabric, &on_sea("one")).unwrap_err().to_string();
    assert!(error.contains("1 MiB"), "{error}");
}

/// podman 4.3, as Debian has it, makes its networks so.
#[test]
fn what_podman_makes_with_plugins_works_beside_bridges_of_ours() {
    let desk = Desk::new();
    let (lab, fabric) = (&desk.lab, desk.fabric());
    let list = list_of(
        "0.4.0",
        json!([
            { "type": "bridge", "bridge": "cni-podman0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
              "ipam": desk.host_local("10.88.0.0/16") },
            { "type": "portmap", "capabilities": { "portMappings": true } },
            { "type": "firewall" },
            { "type": "tuning" },
        ]),
    );
    lab.on_host(|| {
        fabric.ensure_foreign(NET, &list).unwrap();
        fabric.ensure_bridge(&bridge("brig0", 30)).unwrap();
        fabric.reconcile(&[]).unwrap();
    });
    let theirs =
        lab.connect(&fabric, &SandboxSpec { ports: vec![tcp(9090, 80)], ..on_sea("theirs") }).unwrap();
    let mut spec = container("ours", &bridge("brig0", 30), 2);
    spec.ports = vec![tcp(8080, 80)];
    let ours = lab.connect(&fabric, &spec).unwrap();
    for netns in [&theirs.netns, &ours.netns] {
        serve_tcp(netns, 80);
    }
    serve_tcp(&lab.client, 90);
    assert_eq!(ask_tcp(&lab.client, &format!("{HOST}:9090")).unwrap(), CLIENT, "theirs");
    assert_eq!(ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap(), CLIENT, "ours");
    for netns in [&theirs.netns, &ours.netns] {
        assert_eq!(ask_tcp(netns, &format!("{CLIENT}:90")).unwrap(), HOST, "outwards");
    }
    assert!(ask_tcp(&theirs.netns, "172.30.0.2:80").is_err(), "ours is isolated from theirs");
    ask_tcp(&theirs.netns, &format!("{HOST}:8080")).expect("but for what is published");
    let rules = run(&lab.host, "iptables-nft-save");
    lab.on_host(|| {
        fabric.disconnect("ours").unwrap();
        fabric.remove_bridge("brig0").unwrap();
    });
    let without_counters = |text: &str| text.lines().filter(|line| !line.starts_with([':', '#'])).count();
    assert_eq!(
        without_counters(&run(&lab.host, "iptables-nft-save")),
        without_counters(&rules),
        "theirs stay"
    );
    ask_tcp(&lab.client, &format!("{HOST}:9090")).expect("and work");
    lab.on_host(|| fabric.disconnect("theirs")).unwrap();
    desk.assert_nothing_left();
}
