//! Published ports that packets cannot be led to: `::1` of the host, which the kernel routes to no bridge, and addresses
//! of IPv6 for containers that have none. Bytes and datagrams are passed on; the container sees the bridge's address.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::protocol::Relayed;
use crate::ports::Protocol;

/// Connections, or senders of datagrams, of one port at a time.
const MOST: usize = 1024;
/// A sender of datagrams that is silent for so long is forgotten.
const IDLE: Duration = Duration::from_mins(1);

/// Serves one bound socket until it is aborted.
pub(super) async fn serve(socket: OwnedFd, relayed: Relayed) {
    let outcome = match relayed.protocol {
        Protocol::Tcp => tcp(socket, relayed.to).await,
        Protocol::Udp => udp(socket, relayed.to).await,
        Protocol::Sctp => Ok(()),
    };
    if let Err(error) = outcome {
        tracing::warn!(to = %relayed.to, %error, "relay a published port");
    }
}

async fn tcp(socket: OwnedFd, to: SocketAddr) -> std::io::Result<()> {
    // What is left of its connections must not keep the next container from the port.
    rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::listen(&socket, 128)?;
    let listener = std::net::TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let places = Rc::new(Semaphore::new(MOST));
    loop {
        let (mut near, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%to, %error, "accept a connection");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let places = Rc::clone(&places);
        tokio::task::spawn_local(async move {
            let Ok(_place) = places.try_acquire() else { return };
            let outcome = async {
                let mut far = TcpStream::connect(to).await?;
                tokio::io::copy_bidirectional(&mut near, &mut far).await
            };
            if let Err(error) = outcome.await {
                tracing::trace!(%to, %error, "a relayed connection ended");
            }
        });
    }
}

/// One sender's way to the container and back.
struct Flow {
    far: Rc<UdpSocket>,
    back: tokio::task::JoinHandle<()>,
    last: Instant,
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.back.abort();
    }
}

async fn udp(socket: OwnedFd, to: SocketAddr) -> std::io::Result<()> {
    // It was made small for as long as nobody reads it.
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 212_992)?;
    let near = std::net::UdpSocket::from(socket);
    near.set_nonblocking(true)?;
    let near = Rc::new(UdpSocket::from_std(near)?);
    let mut flows: HashMap<SocketAddr, Flow> = HashMap::new();
    let mut buffer = vec![0; 65535];
    loop {
        let (length, from) = match near.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An earlier answer was refused by its receiver.
            Err(error) => {
                tracing::trace!(%to, %error, "receive a datagram");
                continue;
            }
        };
        if flows.len() >= MOST {
            flows.retain(|_, flow| flow.last.elapsed() < IDLE);
            if flows.len() >= MOST && !flows.contains_key(&from) {
                continue;
            }
        }
        let flow = match flows.entry(from) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let own: SocketAddr =
                    if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
                let far = UdpSocket::bind(own).await?;
                far.connect(to).await?;
                let far = Rc::new(far);
                let back = tokio::task::spawn_local(answers(Rc::clone(&far), Rc::clone(&near), from));
                place.insert(Flow { far, back, last: Instant::now() })
            }
        };
        flow.last = Instant::now();
        if let Err(error) = flow.far.send(&buffer[..length]).await {
            tracing::trace!(%to, %error, "pass a datagram on");
        }
    }
}

async fn answers(far: Rc<UdpSocket>, near: Rc<UdpSocket>, to: SocketAddr) {
    let mut buffer = vec![0; 65535];
    loop {
        match far.recv(&mut buffer).await {
            Ok(length) => {
                if let Err(error) = near.send_to(&buffer[..length], to).await {
                    tracing::trace!(%to, %error, "pass an answer on");
                }
            }
            Err(error) => {
                tracing::trace!(%to, %error, "receive an answer");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}
