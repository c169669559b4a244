//! A small topology for one test: a client, a host with a fabric, containers; each a network namespace of
//! its own, so that tests run in parallel and nothing of the machine's network is touched.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use brigantine_network::cni::Places;
use brigantine_network::{
    BridgeSpec, Config, Error, Fabric, FirewallBackend, HostPort, InterfaceSpec, PortRequest, Protocol,
    Sandbox, SandboxSpec,
};
use brigantine_sys::netns;
use ipnet::IpNet;

pub const TABLE: &str = "brigantine-test";
/// The host's address towards the client, and the client's.
pub const HOST: &str = "198.51.100.1";
pub const CLIENT: &str = "198.51.100.2";
pub const HOST6: &str = "2001:db8::1";
pub const CLIENT6: &str = "2001:db8::2";

pub struct Lab {
    pub host: OwnedFd,
    pub client: OwnedFd,
    backend: FirewallBackend,
}

pub fn within<T: Send>(netns: &OwnedFd, inside: impl FnOnce() -> T + Send) -> T {
    netns::within(netns.as_fd(), inside).unwrap()
}

/// Runs a program in a namespace and returns what it printed.
pub fn run(netns: &OwnedFd, line: &str) -> String {
    within(netns, || {
        let mut words = line.split_ascii_whitespace();
        let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    })
}

impl Lab {
    pub fn new() -> Self {
        Self::on(FirewallBackend::Nftables)
    }

    /// One whose fabrics make their firewall with that.
    pub fn on(backend: FirewallBackend) -> Self {
        let lab = Self { host: netns::create().unwrap(), client: netns::create().unwrap(), backend };
        let client = format!("/proc/{}/fd/{}", std::process::id(), lab.client.as_raw_fd());
        run(&lab.host, "ip link set lo up");
        run(&lab.client, "ip link set lo up");
        run(&lab.host, &format!("ip link add out type veth peer name eth0 netns {client}"));
        for (netns, name, v4, v6) in [(&lab.host, "out", HOST, HOST6), (&lab.client, "eth0", CLIENT, CLIENT6)]
        {
            run(netns, &format!("ip addr add {v4}/24 dev {name}"));
            run(netns, &format!("ip addr add {v6}/64 dev {name} nodad"));
            run(netns, &format!("ip link set {name} up"));
        }
        for (netns, name) in [(&lab.host, "out"), (&lab.client, "eth0")] {
            let show = format!("ip -o link show {name}");
            eventually("the link is up", || run(netns, &show).contains("state UP"));
        }
        lab
    }

    pub fn fabric(&self) -> Fabric {
        self.fabric_with(|_| {})
    }

    /// A fabric that is otherwise than usual.
    pub fn fabric_with(&self, change: impl FnOnce(&mut Config)) -> Fabric {
        let mut config = Config {
            table: TABLE.to_owned(),
            backend: self.backend,
            warm: 1,
            owner: None,
            host_firewall: true,
            relay: false,
            cni: Places::default(),
        };
        change(&mut config);
        self.on_host(|| Fabric::open(config)).unwrap()
    }

    /// A fabric with bridge `brig0` 172.30.0.0/16, loaded.
    pub fn with_bridge(&self) -> Fabric {
        let fabric = self.fabric();
        self.on_host(|| {
            fabric.ensure_bridge(&bridge("brig0", 30)).unwrap();
            fabric.reconcile(&[]).unwrap();
        });
        fabric
    }

    pub fn on_host<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        within(&self.host, inside)
    }

    pub fn connect(&self, fabric: &Fabric, spec: &SandboxSpec) -> Result<Sandbox, Error> {
        self.on_host(|| fabric.connect(spec))
    }

    pub fn ruleset(&self) -> String {
        run(&self.host, "nft list ruleset")
    }
}

/// `172.<net>.0.0/16`.
pub fn bridge(name: &str, net: u8) -> BridgeSpec {
    BridgeSpec::new(name, format!("172.{net}.0.0/16").parse().unwrap(), [172, net, 0, 1].into())
}

/// A container on `bridge` with the address `172.<net>.0.<last>`.
pub fn container(id: &str, bridge: &BridgeSpec, last: u8) -> SandboxSpec {
    let mut addresses = Vec::new();
    if let Some(subnet) = bridge.subnet {
        let mut octets = subnet.addr().octets();
        octets[3] = last;
        addresses.push(IpNet::new(octets.into(), subnet.prefix_len()).unwrap());
    }
    if let Some(subnet) = bridge.subnet6 {
        let mut octets = subnet.addr().octets();
        octets[15] = last;
        addresses.push(IpNet::new(octets.into(), subnet.prefix_len()).unwrap());
    }
    SandboxSpec {
        id: id.to_owned(),
        name: format!("name-{id}"),
        interfaces: vec![InterfaceSpec {
            bridge: bridge.name.clone(),
            name: "eth0".to_owned(),
            mac: None,
            addresses,
            link_local: Vec::new(),
            gateway: bridge.gateway.filter(|_| !bridge.internal),
            gateway6: bridge.gateway6.filter(|_| !bridge.internal),
            sysctls: Vec::new(),
        }],
        ..SandboxSpec::default()
    }
}

pub fn port(protocol: Protocol, host_port: u16, container_port: u16) -> PortRequest {
    PortRequest { protocol, host_ip: None, host_port: HostPort::Fixed(host_port), container_port }
}

pub fn tcp(host_port: u16, container_port: u16) -> PortRequest {
    port(Protocol::Tcp, host_port, container_port)
}

/// Tells every client who it is, as seen from `netns`.
pub fn serve_tcp(netns: &OwnedFd, port: u16) {
    let listeners = within(netns, || {
        let v4 = TcpListener::bind(("0.0.0.0", port)).unwrap();
        let v6 = netns_v6_listener(port);
        std::iter::once(v4).chain(v6).collect::<Vec<_>>()
    });
    for listener in listeners {
        std::thread::spawn(move || {
            while let Ok((mut stream, peer)) = listener.accept() {
                drop(stream.write_all(peer.ip().to_string().as_bytes()));
            }
        });
    }
}

fn netns_v6_listener(port: u16) -> Option<TcpListener> {
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::INET6, rustix::net::SocketType::STREAM, None).ok()?;
    rustix::net::sockopt::set_ipv6_v6only(&socket, true).ok()?;
    rustix::net::bind(&socket, &SocketAddr::new(IpAddr::from([0u16; 8]), port)).ok()?;
    rustix::net::listen(&socket, 16).ok()?;
    Some(socket.into())
}

pub fn serve_udp(netns: &OwnedFd, port: u16) {
    let sockets = within(netns, || {
        let v4 = UdpSocket::bind(("0.0.0.0", port)).unwrap();
        std::iter::once(v4).chain(netns_v6_socket(port)).collect::<Vec<_>>()
    });
    for socket in sockets {
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                drop(socket.send_to(peer.ip().to_string().as_bytes(), peer));
            }
        });
    }
}

fn netns_v6_socket(port: u16) -> Option<UdpSocket> {
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::INET6, rustix::net::SocketType::DGRAM, None).ok()?;
    rustix::net::sockopt::set_ipv6_v6only(&socket, true).ok()?;
    rustix::net::bind(&socket, &SocketAddr::new(IpAddr::from([0u16; 8]), port)).ok()?;
    Some(socket.into())
}

/// Connects from `netns` and returns what the server says.
pub fn ask_tcp(netns: &OwnedFd, to: &str) -> io::Result<String> {
    let to: SocketAddr = to.parse().unwrap();
    within(netns, || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
}

/// Sends from `netns` until there is an answer, as UDP asks for.
pub fn ask_udp(netns: &OwnedFd, to: &str) -> io::Result<String> {
    let to: SocketAddr = to.parse().unwrap();
    within(netns, || {
        let own: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        let socket = UdpSocket::bind((own, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        let mut buffer = [0; 64];
        let mut result = Err(io::ErrorKind::TimedOut.into());
        for _ in 0..4 {
            socket.send(b"who am I")?;
            result = socket
                .recv(&mut buffer)
                .map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned());
            if result.is_ok() {
                break;
            }
        }
        result
    })
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Says that a test ends early, and what for.
#[expect(clippy::print_stderr, reason = "whoever reads a test's output shall see it")]
pub fn skipped(what: &str, option: &str) {
    eprintln!("skipped: this kernel has no {what} ({option})");
}
