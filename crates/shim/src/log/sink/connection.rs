//! Connections to collectors: datagrams, streams, and streams inside TLS.
//!
//! Invariant: nothing here waits longer for the other side than it is told to.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::net::RecvFlags;
use rustls::{ClientConnection, StreamOwned};

use crate::config::{Endpoint, TlsEndpoint};
use crate::tls;

pub(super) enum Connection {
    Udp(UdpSocket),
    Tcp(TcpStream),
    Tls(Box<Tls>),
    Datagram(UnixDatagram),
    Stream(UnixStream),
}

impl Connection {
    /// `limit` is how long the connection, and each step of sending and receiving, may take.
    pub(super) fn open(endpoint: &Endpoint, limit: Duration) -> io::Result<Self> {
        Ok(match endpoint {
            Endpoint::Udp(address) => {
                let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any)?;
                socket.connect(address)?;
                Self::Udp(socket)
            }
            Endpoint::Tcp(address) => Self::Tcp(tcp(address, limit)?),
            Endpoint::Tls(endpoint) => Self::Tls(Box::new(Tls::open(endpoint, limit)?)),
            Endpoint::Datagram(path) => {
                let socket = UnixDatagram::unbound()?;
                match socket.connect(path) {
                    Ok(()) => {
                        socket.set_write_timeout(Some(limit))?;
                        Self::Datagram(socket)
                    }
                    // The socket is of the other kind.
                    Err(error) if error.raw_os_error() == Some(libc::EPROTOTYPE) => stream(path, limit)?,
                    Err(error) => return Err(error),
                }
            }
            Endpoint::Stream(path) => stream(path, limit)?,
        })
    }

    /// One message; a stream has nothing of it left to send afterwards.
    pub(super) fn send(&mut self, message: &[u8]) -> io::Result<()> {
        match self {
            // Nobody there, which UDP may tell later: it is not UDP's to repeat.
            Self::Udp(socket) => match socket.send(message) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
                other => other.map(drop),
            },
            Self::Tcp(stream) => is_open(&*stream).and_then(|_| stream.write_all(message)),
            Self::Tls(tls) => tls.send(message),
            Self::Datagram(socket) => socket.send(message).map(drop),
            Self::Stream(stream) => is_open(&*stream).and_then(|_| stream.write_all(message)),
        }
    }

    /// Reads as much as `answer` takes, from a stream.
    pub(super) fn receive(&mut self, answer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.read_exact(answer),
            Self::Tls(tls) => tls.0.read_exact(answer),
            Self::Stream(stream) => stream.read_exact(answer),
            Self::Udp(_) | Self::Datagram(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// Whether something has come. A collector that has closed would not have what is written to it now, and a write would
/// not tell.
fn is_open(stream: impl AsFd) -> io::Result<bool> {
    let mut byte = [0];
    match rustix::net::recv(stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => Err(io::ErrorKind::ConnectionReset.into()),
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::AGAIN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn tcp(address: &SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(address, limit)?;
    stream.set_write_timeout(Some(limit))?;
    stream.set_read_timeout(Some(limit))?;
    Ok(stream)
}

fn stream(path: &Path, limit: Duration) -> io::Result<Connection> {
    let stream = UnixStream::connect(path)?;
    stream.set_write_timeout(Some(limit))?;
    stream.set_read_timeout(Some(limit))?;
    Ok(Connection::Stream(stream))
}

/// A stream inside TLS; the other side is told of its end.
pub(super) struct Tls(StreamOwned<ClientConnection, TcpStream>);

impl Tls {
    fn open(endpoint: &TlsEndpoint, limit: Duration) -> io::Result<Self> {
        let config = tls::client_config(&endpoint.trust)?;
        let name = tls::server_name(&endpoint.name)?;
        let mut connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
        let mut stream = tcp(&endpoint.address, limit)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut stream)?;
        }
        Ok(Self(StreamOwned::new(connection, stream)))
    }

    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let StreamOwned { conn, sock } = &mut self.0;
        // Tickets for later sessions come unasked, and so does word that our certificate is not good enough.
        while is_open(&*sock)? {
            conn.read_tls(sock)?;
            let news = conn.process_new_packets().map_err(io::Error::other)?;
            if news.peer_has_closed() {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if news.plaintext_bytes_to_read() > 0 {
                break;
            }
        }
        self.0.write_all(message)?;
        self.0.flush()
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        self.0.conn.send_close_notify();
        // One that has gone misses nothing.
        self.0.conn.write_tls(&mut self.0.sock).ok();
    }
}
