//! The firewall made with iptables, on a host that has other rules there, too.

use brigantine_testkit::{Client, Engine, Outside, until, wait::PATIENCE};

use crate::Host;

both![a_host_without_nf_tables_has_iptables];

/// Programs of iptables that keep their rules in nf_tables: the kernel tells of changes there.
#[test]
fn iptables_may_be_those_of_nf_tables() {
    let builder = Engine::builder().flag("--firewall-backend=iptables");
    if builder.is_peer() {
        return;
    }
    let mut host = Host { engine: builder.busybox().start(), client: Client::Docker };
    let run = |host: &Host, line: &str| {
        let mut words = line.split(' ');
        let output = host.sandbox().command(words.next().unwrap()).args(words).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    // As on a machine that has no others.
    host.engine.stop_daemon();
    for family in ["iptables", "ip6tables"] {
        for table in ["raw", "filter", "nat", "security"] {
            run(&host, &format!("{family}-legacy -t {table} -F"));
            run(&host, &format!("{family}-legacy -t {table} -X"));
        }
    }
    // All of their names lead there.
    run(&host, "mount --bind /dev/null /usr/sbin/xtables-legacy-multi");
    host.engine.restart_daemon();
    let outside = Outside::connect(&host.engine);
    let ship = host.background(&["-p", "8080:80"], "while :; do echo served | nc -l -p 80; done");
    let is_served = || {
        use std::io::Read as _;
        let mut text = String::new();
        outside.tcp(8080).ok()?.read_to_string(&mut text).ok()?;
        (text == "served\n").then_some(())
    };
    assert!(until(PATIENCE, is_served).is_some(), "from the other machine");
    let rules = || run(&host, "iptables-nft-save");
    let ours = |text: &str| text.lines().filter(|line| line.contains("BRIG-")).count();
    let whole = ours(&rules());
    assert!(whole > 0, "{}", rules());
    run(&host, "iptables-nft -t nat -F");
    assert!(ours(&rules()) < whole);
    // Far sooner than the half minute after which they would be looked at in any case.
    let back = until(std::time::Duration::from_secs(10), || (ours(&rules()) == whole).then_some(()));
    assert!(back.is_some(), "{}", rules());
    assert!(until(PATIENCE, is_served).is_some());
    host.cli(["rm", "-f", &ship]).ok();
    assert!(!rules().contains("8080"), "{}", rules());
    drop(outside);
}

fn a_host_without_nf_tables_has_iptables(client: Client) {
    let builder = Engine::builder().flag("--firewall-backend=iptables");
    if builder.is_peer() {
        return;
    }
    let host = Host { engine: builder.busybox().start(), client };
    let outside = Outside::connect(&host.engine);
    let rules = || {
        let output = host.sandbox().command("iptables-legacy-save").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(host.get("/info")["FirewallBackend"]["Driver"], "iptables");
    assert!(rules().contains("BRIG-brig0-ISO"), "{}", rules());
    let tables = host.sandbox().command("nft").args(["list", "tables"]).output().unwrap();
    assert!(!String::from_utf8(tables.stdout).unwrap().contains("brigantine-brig0"));
    let ship =
        host.background(&["-p", "8080:80", "--name", "ship"], "while :; do echo served | nc -l -p 80; done");
    let is_served = || {
        use std::io::Read as _;
        let mut text = String::new();
        outside.tcp(8080).ok()?.read_to_string(&mut text).ok()?;
        (text == "served\n").then_some(())
    };
    assert!(until(PATIENCE, is_served).is_some(), "from the other machine");
    // Names and the way out, as ever.
    host.cli(["network", "create", "sea"]).ok();
    let boat = host.background(&["--network", "sea", "--name", "boat"], "sleep 1000");
    let text = host.script(&["--network", "sea"], "ping -c 1 -W 2 boat && ping -c 1 -W 2 192.0.2.1");
    assert_eq!(text.matches(" 0% packet loss").count(), 2, "{text}");
    let text = host.script(&["--network", "sea"], "ping -c 1 -W 1 172.30.0.2 || true");
    assert!(text.contains("100% packet loss"), "{text}");
    // Whoever flushes the host's rules does not open or lose anything for long.
    let flushed = host.sandbox().command("iptables-legacy").arg("-F").status().unwrap();
    assert!(flushed.success());
    assert!(until(PATIENCE, || rules().contains("-A BRIG-brig0-CLOSED -j DROP").then_some(())).is_some());
    assert!(until(PATIENCE, is_served).is_some());
    host.cli(["rm", "-f", &ship, &boat]).ok();
    host.cli(["network", "rm", "sea"]).ok();
    assert!(!rules().contains("8080") && !rules().contains("br-"), "{}", rules());
    drop(outside);
}
