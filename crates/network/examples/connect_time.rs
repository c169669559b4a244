//! What connecting and disconnecting a container costs, step by step, in network namespaces of its own:
//! `cargo run --release -p brigantine-network --example connect_time`. Needs root.

#![expect(clippy::print_stdout, reason = "prints its measurements")]

use std::error::Error;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use brigantine_network::{
    BridgeSpec, Config, Fabric, HostPort, InterfaceSpec, PortRequest, Protocol, SandboxSpec,
};
use brigantine_sys::netns;
use ipnet::IpNet;

const ROUNDS: u8 = 60;

fn main() -> Result<(), Box<dyn Error>> {
    println!("{:44} {:>10} {:>10} {:>10} {:>10}", "median (p90), µs", "connect", "", "disconnect", "");
    for (warm, pause) in [(0, 0), (4, 20)] {
        for (name, interface, ports, names) in [
            ("namespace only", false, 0, false),
            ("interface", true, 0, false),
            ("interface, names", true, 0, true),
            ("interface, 1 port", true, 1, false),
            ("interface, 10 ports", true, 10, false),
        ] {
            let host = netns::create()?;
            let measured = netns::within(host.as_fd(), || {
                measure(warm, Duration::from_millis(pause), interface, ports, names)
            })?;
            let (mut connects, mut disconnects) = measured.map_err(|error| error.to_string())?;
            let ((c50, c90), (d50, d90)) = (quantiles(&mut connects), quantiles(&mut disconnects));
            let kind = if warm == 0 { "made on demand" } else { "made ahead" };
            println!("{:44} {c50:>10} ({c90:>8}) {d50:>10} ({d90:>8})", format!("{name}, namespace {kind}"));
        }
    }
    let host = netns::create()?;
    let (mut times, all) =
        netns::within(host.as_fd(), || in_parallel(32))?.map_err(|error| error.to_string())?;
    let (median, p90) = quantiles(&mut times);
    println!("32 at once: all after {} ms, each {median} ({p90}) µs", all.as_millis());
    Ok(())
}

/// Each connect's time, and the time until the last was done.
fn in_parallel(count: u8) -> Result<(Vec<Duration>, Duration), brigantine_network::Error> {
    let (fabric, bridge) = open(4)?;
    let start = Instant::now();
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|number| {
                let spec = spec(number, &bridge, true, 1);
                let fabric = &fabric;
                scope.spawn(move || {
                    let start = Instant::now();
                    fabric.connect(&spec).map(|sandbox| (sandbox, start.elapsed()))
                })
            })
            .collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let all = start.elapsed();
    let times = results.into_iter().map(|result| result.map(|(_, time)| time)).collect::<Result<_, _>>()?;
    Ok((times, all))
}

fn open(warm: usize) -> Result<(Fabric, BridgeSpec), brigantine_network::Error> {
    let fabric = Fabric::open(Config {
        table: "brigantine-bench".to_owned(),
        warm,
        backend: brigantine_network::FirewallBackend::default(),
        owner: None,
        host_firewall: true,
        relay: false,
        cni: brigantine_network::cni::Places::default(),
    })?;
    let subnet = ipnet::Ipv4Net::new_assert([172, 30, 0, 0].into(), 16);
    let bridge = BridgeSpec::new("brig0", subnet, [172, 30, 0, 1].into());
    fabric.ensure_bridge(&bridge)?;
    fabric.reconcile(&[])?;
    Ok((fabric, bridge))
}

fn spec(number: u8, bridge: &BridgeSpec, with_interface: bool, ports: u16) -> SandboxSpec {
    let interfaces = with_interface.then(|| InterfaceSpec {
        bridge: bridge.name.clone(),
        name: "eth0".to_owned(),
        mac: None,
        addresses: vec![IpNet::new_assert([172, 30, 1, number].into(), 16)],
        link_local: Vec::new(),
        gateway: bridge.gateway,
        gateway6: None,
        sysctls: Vec::new(),
    });
    let ports = (0..ports).map(|number| PortRequest {
        protocol: Protocol::Tcp,
        host_ip: None,
        host_port: HostPort::Ephemeral,
        container_port: 80 + number,
    });
    SandboxSpec {
        owned: false,
        named: false,
        id: format!("container-{number}"),
        name: format!("container-{number}"),
        interfaces: interfaces.into_iter().collect(),
        ports: ports.collect(),
        sysctls: Vec::new(),
    }
}

fn quantiles(times: &mut [Duration]) -> (u128, u128) {
    times.sort_unstable();
    (times[times.len() / 2].as_micros(), times[times.len() * 9 / 10].as_micros())
}

type Times = (Vec<Duration>, Vec<Duration>);

fn measure(
    warm: usize,
    pause: Duration,
    with_interface: bool,
    ports: u16,
    names: bool,
) -> Result<Times, brigantine_network::Error> {
    let (fabric, bridge) = open(warm)?;
    let (mut connects, mut disconnects) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        std::thread::sleep(pause);
        let spec = SandboxSpec { named: names, ..spec(round, &bridge, with_interface, ports) };
        let start = Instant::now();
        let sandbox = fabric.connect(&spec)?;
        connects.push(start.elapsed());
        drop(sandbox);
        let start = Instant::now();
        fabric.disconnect(&spec.id)?;
        disconnects.push(start.elapsed());
    }
    Ok((connects, disconnects))
}
