//! Forgetting tracked UDP flows. A flow that started before a port was published, or to a container that is
//! gone, would keep its old destination as long as its packets come; TCP needs none of this, as a new
//! connection starts with a new entry.

use crate::error::Error;
use crate::ports::{Protocol, PublishedPort};
use crate::socket::Socket;
use crate::wire::{Messages, attribute};

const SUBSYSTEM: u16 = 1;
const GET: u16 = SUBSYSTEM << 8 | 1;
const DELETE: u16 = SUBSYSTEM << 8 | 2;
const TUPLE_ORIGINAL: u16 = 1;
const NESTED: u16 = 0x8000;

struct Flow {
    original: Vec<u8>,
    destination_port: u16,
}

/// Forgets all flows to the host ports of the UDP ones among `ports`.
pub(crate) fn forget(ports: &[PublishedPort]) -> Result<(), Error> {
    let udp = |is_v4: bool| {
        ports
            .iter()
            .filter(move |port| port.protocol == Protocol::Udp && port.host_ip.is_ipv4() == is_v4)
            .map(|port| port.host_port)
            .collect::<Vec<u16>>()
    };
    for (family, wanted) in [(libc::AF_INET as u8, udp(true)), (libc::AF_INET6 as u8, udp(false))] {
        forget_udp(family, &wanted)?;
    }
    Ok(())
}

/// Forgets the flows of UDP to these ports, in the calling thread's network namespace.
fn forget_udp(family: u8, wanted: &[u16]) -> Result<(), Error> {
    if wanted.is_empty() {
        return Ok(());
    }
    let header = [family, 0, 0, 0];
    let mut socket = Socket::netfilter()?;
    let flows = socket.dump("list tracked connections", GET, &header, |payload| {
        let original = attribute(payload.get(4..)?, TUPLE_ORIGINAL)?;
        let protocol = attribute(original, 2)?;
        let number = attribute(protocol, 1)?.first()?;
        let port = attribute(protocol, 3)?;
        let destination_port = u16::from_be_bytes([*port.first()?, *port.get(1)?]);
        (*number == Protocol::Udp.number()).then(|| Flow { original: original.to_vec(), destination_port })
    })?;
    for flow in flows.into_iter().filter(|flow| wanted.contains(&flow.destination_port)) {
        let mut batch = Messages::new();
        batch.push("forget a tracked connection", DELETE, 0, &header, |body| {
            body.bytes(TUPLE_ORIGINAL | NESTED, &flow.original);
        });
        match socket.execute(batch) {
            // Gone by itself meanwhile.
            Err(error) if error.errno() == Some(libc::ENOENT) => {}
            result => result?,
        }
    }
    Ok(())
}
