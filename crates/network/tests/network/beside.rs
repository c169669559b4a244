//! Beside the firewalls of others, with rules as they write them, loaded by their own programs.

use std::process::{Command, Stdio};

use brigantine_network::PortRequest;

use crate::lab::{CLIENT, HOST, Lab, ask_tcp, bridge, container, eventually, run, serve_tcp, tcp, within};

/// Gives `text` to a program in the host's namespace.
fn feed(lab: &Lab, program: &str, text: &str) {
    within(&lab.host, || {
        let mut words = program.split(' ');
        let mut command = Command::new(words.next().unwrap());
        let mut child = command.args(words).stdin(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), text.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{program}");
    });
}

/// A container with 8080 and 8081 published.
fn serving(lab: &Lab) -> (brigantine_network::Fabric, brigantine_network::Sandbox) {
    let fabric = lab.with_bridge();
    let mut spec = container("web", &bridge("brig0", 30), 2);
    spec.ports = vec![tcp(8080, 80), PortRequest { container_port: 80, ..tcp(8081, 80) }];
    let web = lab.connect(&fabric, &spec).unwrap();
    serve_tcp(&web.netns, 80);
    (fabric, web)
}

/// ufw itself, with its files in a place of the test's own. What it allows for the host is allowed at published ports.
#[test]
fn ufw_decides_about_published_ports() {
    let lab = Lab::new();
    let files = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").args(["-r", "/etc/ufw/."]).arg(files.path()).status().unwrap();
    assert!(copied.success());
    let ufw = |line: &str| {
        let script = "mount --make-rprivate / && mount --bind \"$1\" /etc/ufw && exec ufw $2";
        within(&lab.host, || {
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-ec", script, "sh"]).arg(files.path()).arg(line);
            let output = command.output().unwrap();
            assert!(output.status.success(), "ufw {line}: {}", String::from_utf8_lossy(&output.stderr));
        });
    };
    ufw("--force enable");
    let (fabric, web) = serving(&lab);
    // Its forward chain drops, too: the way that the documentation shows.
    assert!(lab.on_host(|| fabric.input_policies()).unwrap().contains(&"ip filter INPUT".to_owned()));
    ufw("route allow in on brig0");
    ufw("route allow out on brig0");
    assert!(ask_tcp(&lab.client, &format!("{HOST}:8080")).is_err(), "denied by default");
    ufw("allow 8080/tcp");
    eventually("what ufw allows", || ask_tcp(&lab.client, &format!("{HOST}:8080")).is_ok());
    assert_eq!(ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap(), CLIENT, "the client is seen");
    assert!(ask_tcp(&lab.client, &format!("{HOST}:8081")).is_err(), "and nothing else");
    // A reload loses nothing and opens nothing.
    ufw("reload");
    ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap();
    assert!(ask_tcp(&lab.client, &format!("{HOST}:8081")).is_err());
    serve_tcp(&lab.client, 90);
    ask_tcp(&web.netns, &format!("{CLIENT}:90")).expect("outwards");
}

/// What dockerd 20.10 leaves in iptables (nf_tables), and the way for others that its documentation names.
#[test]
fn docker_drops_forwarded_packets_but_for_its_users_chain() {
    let lab = Lab::new();
    feed(
        &lab,
        "iptables-nft-restore",
        "*filter\n:INPUT ACCEPT\n:FORWARD DROP\n:OUTPUT ACCEPT\n:DOCKER -\n:DOCKER-ISOLATION-STAGE-1 -\n:DOCKER-ISOLATION-STAGE-2 -\n:DOCKER-USER -\n\
         -A FORWARD -j DOCKER-USER\n-A FORWARD -j DOCKER-ISOLATION-STAGE-1\n-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         -A FORWARD -o docker0 -j DOCKER\n-A FORWARD -i docker0 ! -o docker0 -j ACCEPT\n-A FORWARD -i docker0 -o docker0 -j ACCEPT\n\
         -A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2\n-A DOCKER-ISOLATION-STAGE-1 -j RETURN\n\
         -A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP\n-A DOCKER-ISOLATION-STAGE-2 -j RETURN\n-A DOCKER-USER -j RETURN\nCOMMIT\n\
         *nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\n:DOCKER -\n\
         -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER\n\
         -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n-A DOCKER -i docker0 -j RETURN\nCOMMIT\n",
    );
    let theirs = run(&lab.host, "nft list table ip filter");
    let (fabric, web) = serving(&lab);
    serve_tcp(&lab.client, 90);
    assert!(ask_tcp(&lab.client, &format!("{HOST}:8080")).is_err(), "its policy is to drop");
    let report = lab.on_host(|| fabric.reconcile(&[])).unwrap();
    assert_eq!(report.obstacles, ["ip filter FORWARD"], "and it is named");
    run(&lab.host, "iptables-nft -I DOCKER-USER -i brig0 -j ACCEPT");
    run(&lab.host, "iptables-nft -I DOCKER-USER -o brig0 -j ACCEPT");
    assert_eq!(ask_tcp(&lab.client, &format!("{HOST}:8080")).unwrap(), CLIENT);
    ask_tcp(&web.netns, &format!("{CLIENT}:90")).expect("outwards");
    run(&lab.host, "iptables-nft -D DOCKER-USER -i brig0 -j ACCEPT");
    run(&lab.host, "iptables-nft -D DOCKER-USER -o brig0 -j ACCEPT");
    let counters = |text: &str| text.lines().filter(|line| !line.contains("counter")).count();
    assert_eq!(
        counters(&run(&lab.host, "nft list table ip filter")),
        counters(&theirs),
        "nothing of it changed"
    );
}

/// The form of firewalld's table: zones by interface, everything else rejected, on input and on forward.
#[test]
fn firewalld_decides_about_published_ports() {
    let lab = Lab::new();
    let zones = "table inet firewalld {\n\
        chain filter_INPUT { type filter hook input priority filter + 10; policy accept;\n\
          ct state { established, related } accept\n ct status dnat accept\n iifname \"lo\" accept\n\
          ct state invalid drop\n jump filter_INPUT_ZONES\n reject with icmpx admin-prohibited\n }\n\
        chain filter_INPUT_ZONES {\n iifname \"brig0\" goto filter_IN_trusted\n goto filter_IN_public\n }\n\
        chain filter_IN_trusted {\n accept\n }\n\
        chain filter_IN_public {\n jump filter_IN_public_allow\n meta l4proto { icmp, ipv6-icmp } accept\n }\n\
        chain filter_IN_public_allow {\n tcp dport 22 accept\n }\n\
        chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;\n\
          ct state { established, related } accept\n ct status dnat accept\n iifname \"brig0\" accept\n\
          reject with icmpx admin-prohibited\n }\n}\n";
    feed(&lab, "nft -f -", zones);
    let (_fabric, web) = serving(&lab);
    let (open, shut) = (format!("{HOST}:8080"), format!("{HOST}:8081"));
    assert!(ask_tcp(&lab.client, &open).is_err(), "no service of the zone");
    run(&lab.host, "nft add rule inet firewalld filter_IN_public_allow tcp dport 8080 accept");
    assert_eq!(ask_tcp(&lab.client, &open).unwrap(), CLIENT);
    assert!(ask_tcp(&lab.client, &shut).is_err());
    // A reload of its table, in one transaction as it does that.
    feed(&lab, "nft -f -", &format!("table inet firewalld\ndelete table inet firewalld\n{zones}"));
    assert!(ask_tcp(&lab.client, &open).is_err(), "what its new rules do not allow");
    serve_tcp(&lab.client, 90);
    ask_tcp(&web.netns, &format!("{CLIENT}:90")).expect("outwards");
}
