//! Beside the firewalls of others, with rules as they write them, loaded by their own programs.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

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

/// firewalld itself with a bus of its own, in the host's namespace.
struct Firewalld<'a> {
    lab: &'a Lab,
    dir: tempfile::TempDir,
    /// It, and before it the bus.
    running: Vec<Child>,
}

impl Drop for Firewalld<'_> {
    fn drop(&mut self) {
        for child in self.running.iter_mut().rev() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

impl<'a> Firewalld<'a> {
    fn start(lab: &'a Lab) -> Self {
        let mut one = Self { lab, dir: tempfile::tempdir().unwrap(), running: Vec::new() };
        let bus = one.dir.path().join("bus");
        let conf = one.dir.path().join("bus.conf");
        let text = format!(
            "<busconfig><type>system</type><listen>unix:path={}</listen><auth>EXTERNAL</auth><policy context=\"default\">\
             <allow user=\"*\"/><allow own=\"*\"/><allow send_destination=\"*\"/><allow receive_sender=\"*\"/></policy></busconfig>",
            bus.display()
        );
        std::fs::write(&conf, text).unwrap();
        let mut daemon = Command::new("dbus-daemon");
        daemon.args(["--nofork", "--config-file"]).arg(&conf);
        one.spawn(daemon);
        eventually("the bus is there", || bus.exists());
        let etc = one.dir.path().join("etc");
        assert!(Command::new("cp").args(["-r", "/etc/firewalld"]).arg(&etc).status().unwrap().success());
        let mut firewalld = Command::new("firewalld");
        firewalld.args(["--nofork", "--nopid", "--system-config"]).arg(&etc);
        firewalld.arg("--log-file").arg(one.dir.path().join("log"));
        one.spawn(firewalld);
        eventually("firewalld runs", || one.command("--state").output().unwrap().status.success());
        one
    }

    fn spawn(&mut self, mut command: Command) {
        command.env("DBUS_SYSTEM_BUS_ADDRESS", self.address()).stdout(Stdio::null()).stderr(Stdio::null());
        self.running.push(within(&self.lab.host, || command.spawn().unwrap()));
    }

    fn address(&self) -> String {
        format!("unix:path={}", self.dir.path().join("bus").display())
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("firewall-cmd");
        command.env("DBUS_SYSTEM_BUS_ADDRESS", self.address()).args(line.split(' '));
        command
    }

    fn cmd(&self, line: &str) {
        let output = self.command(line).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// firewalld itself: what its zones allow for the host is allowed at published ports, and a reload of it neither loses nor
/// opens anything.
#[test]
fn firewalld_decides_about_published_ports() {
    let lab = Lab::new();
    let firewalld = Firewalld::start(&lab);
    let (fabric, web) = serving(&lab);
    let refusing = lab.on_host(|| (fabric.input_policies().unwrap(), fabric.forward_policies().unwrap()));
    let named = |name: &str| vec![format!("inet firewalld {name}")];
    assert_eq!(refusing, (named("filter_INPUT"), named("filter_FORWARD")));
    serve_tcp(&lab.client, 90);
    assert!(ask_tcp(&web.netns, &format!("{CLIENT}:90")).is_err(), "a bridge in no zone has no way out");
    // As the documentation says: also for networks of one's own, whose bridges are not there yet.
    firewalld.cmd("--permanent --zone=trusted --add-interface=brig0 --add-interface=br-+");
    firewalld.cmd("--reload");
    lab.on_host(|| fabric.ensure_bridge(&bridge("br-own", 31))).unwrap();
    let own = lab.connect(&fabric, &container("own", &bridge("br-own", 31), 2)).unwrap();
    ask_tcp(&own.netns, &format!("{CLIENT}:90")).expect("outwards from a bridge that came later");
    let (open, shut) = (format!("{HOST}:8080"), format!("{HOST}:8081"));
    assert!(ask_tcp(&lab.client, &open).is_err(), "no service of the zone");
    firewalld.cmd("--add-port=8080/tcp");
    assert_eq!(ask_tcp(&lab.client, &open).unwrap(), CLIENT);
    assert!(ask_tcp(&lab.client, &shut).is_err());
    ask_tcp(&web.netns, &format!("{CLIENT}:90")).expect("outwards");

    // What was added for the time being is gone with a reload; what is permanent is not.
    firewalld.cmd("--reload");
    assert!(ask_tcp(&lab.client, &open).is_err(), "what its new rules do not allow");
    firewalld.cmd("--permanent --add-port=8080/tcp");
    firewalld.cmd("--reload");
    ask_tcp(&lab.client, &open).unwrap();
    assert!(ask_tcp(&lab.client, &shut).is_err());
    ask_tcp(&web.netns, &format!("{CLIENT}:90")).expect("outwards");
    firewalld.cmd("--complete-reload");
    ask_tcp(&lab.client, &open).unwrap();
    assert!(!lab.on_host(|| fabric.verify()).unwrap(), "ours was left alone");
    // Panic mode drops everything, ours too.
    firewalld.cmd("--panic-on");
    assert!(ask_tcp(&lab.client, &open).is_err());
    firewalld.cmd("--panic-off");
    ask_tcp(&lab.client, &open).unwrap();
}

/// While firewalld and ufw load their rules anew nothing is let in that was not before.
#[test]
fn a_reload_opens_nothing_meanwhile() {
    let lab = Lab::new();
    let firewalld = Firewalld::start(&lab);
    let (_fabric, web) = serving(&lab);
    serve_tcp(&web.netns, 81);
    run(&lab.client, &format!("ip route add 172.30.0.0/16 via {HOST}"));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut reached = 0;
            while !done.load(Ordering::Relaxed) {
                for shut in ["172.30.0.2:80", "172.30.0.2:81"] {
                    reached += u32::from(ask_tcp(&lab.client, shut).is_ok());
                }
            }
            reached
        });
        for _ in 0..3 {
            firewalld.cmd("--reload");
        }
        firewalld.cmd("--complete-reload");
        done.store(true, Ordering::Relaxed);
        assert_eq!(asking.join().unwrap(), 0, "what is not published was reached");
    });
}
