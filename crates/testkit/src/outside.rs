//! A second host: a network that an engine's network is connected to by a cable, as a machine is to its LAN.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    time::Duration,
};

use crate::{Engine, Sandbox};

/// Another machine on the engine's LAN (192.0.2.0/24; it is the engine's default router, too).
#[derive(Debug)]
pub struct Outside {
    sandbox: Sandbox,
}

impl Outside {
    /// This machine's address.
    pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    /// The engine's address on the LAN.
    pub const ENGINE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

    /// Lays the cable to an engine's machine.
    #[track_caller]
    pub fn connect(engine: &Engine) -> Self {
        Self::beside(engine.sandbox())
    }

    /// The same for any sandbox.
    #[track_caller]
    pub fn beside(inside: &Sandbox) -> Self {
        let sandbox = match Sandbox::new() {
            Ok(sandbox) => sandbox,
            Err(e) => panic!("{e:#}"),
        };
        let there = sandbox.init_pid().to_string();
        let run = |mut command: Command| {
            let output = command.output().expect("nsenter");
            assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        };
        let ip = |sandbox: &Sandbox, line: &str| {
            let mut command = sandbox.net_command("ip");
            command.args(line.split(' '));
            run(command);
        };
        ip(inside, &format!("link add lan0 type veth peer name lan0 netns {there}"));
        ip(&sandbox, "addr add 192.0.2.1/24 dev lan0");
        ip(&sandbox, "link set lan0 up");
        ip(inside, "addr add 192.0.2.2/24 dev lan0");
        ip(inside, "link set lan0 up");
        ip(inside, "route add default via 192.0.2.1");
        Self { sandbox }
    }

    /// A command that will run on that machine.
    pub fn command(&self, program: &str) -> Command {
        self.sandbox.net_command(program)
    }

    /// Runs `work` on that machine.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.sandbox.within_net(work)
    }

    /// Connects from that machine to a TCP port of the engine's machine.
    pub fn tcp(&self, port: u16) -> std::io::Result<TcpStream> {
        let to = SocketAddr::from((Self::ENGINE, port));
        let stream = self.within(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(stream)
    }

    /// A UDP socket on that machine, connected to a port of the engine's machine.
    pub fn udp(&self, port: u16) -> std::io::Result<UdpSocket> {
        let socket = self.within(|| UdpSocket::bind("0.0.0.0:0"))?;
        self.within(|| socket.connect((Self::ENGINE, port)))?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        Ok(socket)
    }

    /// A TCP server's socket on that machine.
    pub fn listen(&self) -> TcpListener {
        self.within(|| TcpListener::bind((Self::ADDRESS, 0)).expect("a free port"))
    }
}
