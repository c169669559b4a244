//! Network devices of the host moved into the container (`linux.netDevices`), with the addresses they
//! have. Rtnetlink by hand: four requests with a handful of attributes.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::error::Error;
use crate::spec::LinuxNetDevice;

/// One device and what it is called inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Move {
    name: String,
    inside: String,
}

/// `IFNAMSIZ` with its final zero.
const LONGEST: usize = 15;

pub(crate) fn compile(devices: Option<&HashMap<String, LinuxNetDevice>>) -> Result<Vec<Move>, Error> {
    let mut moves = Vec::new();
    for (name, device) in devices.into_iter().flatten() {
        let inside = device.name().as_deref().filter(|n| !n.is_empty()).unwrap_or(name);
        for text in [name.as_str(), inside] {
            let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0';
            if text.is_empty() || text.len() > LONGEST || text == "." || text == ".." || text.contains(bad) {
                return Err(Error::invalid(format!("netDevices: {text:?} is not an interface's name")));
            }
        }
        if moves.iter().any(|m: &Move| m.inside == inside) {
            return Err(Error::invalid(format!("netDevices: two devices are to be {inside:?} inside")));
        }
        moves.push(Move { name: name.clone(), inside: inside.to_owned() });
    }
    moves.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(moves)
}

/// Moves each device into `namespace`, gives it back its addresses and brings it up.
pub(crate) fn apply(moves: &[Move], namespace: BorrowedFd<'_>) -> Result<(), Error> {
    for device in moves {
        let what =
            || format!("moving network device {:?} into the container as {:?}", device.name, device.inside);
        let failed = |e: Errno| Error::os(what(), e);
        let host = Netlink::open().map_err(failed)?;
        let index = host.index(&device.name).map_err(failed)?;
        let addresses = host.addresses(index).map_err(failed)?;
        host.move_to(index, &device.inside, namespace).map_err(failed)?;
        let inside = brigantine_sys::netns::within(namespace, || {
            let own = Netlink::open()?;
            let index = own.index(&device.inside)?;
            for address in &addresses {
                own.add_address(index, address)?;
            }
            own.up(index)
        });
        inside.and_then(|done| done).map_err(failed)?;
    }
    Ok(())
}

const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const GET_ADDRESS: u16 = 22;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const REPLACE_OR_CREATE: u16 = 0x500;

const LINK_NAME: u16 = 3;
const LINK_NAMESPACE_FD: u16 = 28;
const UP: u32 = 1;

/// Permanent addresses only are worth keeping: the others come from the network again.
const ADDRESS_PERMANENT: u32 = 0x80;
/// Attributes of an address that it is added with again: address, local, label aside, broadcast, flags.
const ADDRESS_KEPT: [u16; 4] = [1, 2, 4, 8];
const ADDRESS_FLAGS: u16 = 8;

/// An address: the head of its message and its attributes.
struct Address {
    head: [u8; 8],
    attributes: Vec<(u16, Vec<u8>)>,
}

struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> Result<Self, Errno> {
        // No protocol is NETLINK_ROUTE.
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        let fd = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self(fd))
    }

    /// Sends one request and collects the answers until its end.
    fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> Result<Vec<(u16, Vec<u8>)>, Errno> {
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend((16 + body.len() as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((REQUEST | flags).to_ne_bytes());
        message.extend(1_u32.to_ne_bytes());
        message.extend(0_u32.to_ne_bytes());
        message.extend(body);
        rustix::net::send(&self.0, &message, SendFlags::empty())?;
        let mut answers = Vec::new();
        let mut buffer = vec![0_u8; 64 << 10];
        loop {
            let (length, _) = rustix::net::recv(&self.0, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while let Some((kind, body, after)) = split(rest) {
                rest = after;
                match kind {
                    ERROR => {
                        let code =
                            body.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
                        return if code == 0 { Ok(answers) } else { Err(Errno::from_raw_os_error(-code)) };
                    }
                    DONE => return Ok(answers),
                    _ => answers.push((kind, body.to_vec())),
                }
            }
        }
    }

    fn index(&self, name: &str) -> Result<i32, Errno> {
        let mut body = link_head(0, 0, 0);
        attribute(&mut body, LINK_NAME, &[name.as_bytes(), b"\0"].concat());
        let answers = self.ask(GET_LINK, ACK, &body)?;
        let index = answers.iter().find(|(kind, _)| *kind == NEW_LINK).and_then(|(_, body)| body.get(4..8));
        index.and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes).ok_or(Errno::NODEV)
    }

    fn addresses(&self, index: i32) -> Result<Vec<Address>, Errno> {
        let mut found = Vec::new();
        for (kind, body) in self.ask(GET_ADDRESS, DUMP, &[0; 8])? {
            let (Some(head), Some(rest)) = (body.first_chunk::<8>(), body.get(8..)) else { continue };
            let own = kind == NEW_ADDRESS && head[4..8] == index.to_ne_bytes();
            let attributes = attributes(rest);
            let flags = attributes.iter().find(|(kind, _)| *kind == ADDRESS_FLAGS);
            let flags = flags.and_then(|(_, v)| v.get(..4)?.try_into().ok()).map_or(0, u32::from_ne_bytes);
            // Scope 0 is the whole world; a link's own addresses come by themselves.
            if own && head[3] == 0 && flags & ADDRESS_PERMANENT != 0 {
                let attributes =
                    attributes.into_iter().filter(|(kind, _)| ADDRESS_KEPT.contains(kind)).collect();
                found.push(Address { head: *head, attributes });
            }
        }
        Ok(found)
    }

    fn move_to(&self, index: i32, name: &str, namespace: BorrowedFd<'_>) -> Result<(), Errno> {
        // Down first, as the kernel wants it for a new name.
        self.ask(NEW_LINK, ACK, &link_head(index, 0, UP))?;
        let mut body = link_head(index, 0, 0);
        attribute(&mut body, LINK_NAMESPACE_FD, &namespace.as_raw_fd().to_ne_bytes());
        attribute(&mut body, LINK_NAME, &[name.as_bytes(), b"\0"].concat());
        self.ask(NEW_LINK, ACK, &body).map(drop)
    }

    fn add_address(&self, index: i32, address: &Address) -> Result<(), Errno> {
        let mut body = address.head.to_vec();
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        for (kind, value) in &address.attributes {
            attribute(&mut body, *kind, value);
        }
        self.ask(NEW_ADDRESS, ACK | REPLACE_OR_CREATE, &body).map(drop)
    }

    fn up(&self, index: i32) -> Result<(), Errno> {
        self.ask(NEW_LINK, ACK, &link_head(index, UP, UP)).map(drop)
    }
}

/// `struct ifinfomsg`.
fn link_head(index: i32, flags: u32, change: u32) -> Vec<u8> {
    let mut head = vec![0_u8; 4];
    head.extend(index.to_ne_bytes());
    head.extend(flags.to_ne_bytes());
    head.extend(change.to_ne_bytes());
    head
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend((4 + value.len() as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn attributes(mut bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let mut all = Vec::new();
    while let [a, b, c, d, ..] = *bytes {
        let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        let Some(value) = bytes.get(4..length) else { break };
        all.push((kind & 0x3fff, value.to_vec()));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    all
}

/// The first message's type and body, and what is behind it.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk::<4>()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(16..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_go_there_and_back() {
        let mut body = Vec::new();
        attribute(&mut body, 3, b"eth0\0");
        attribute(&mut body, 28, &7_i32.to_ne_bytes());
        assert_eq!(body.len(), 20);
        assert_eq!(attributes(&body), [(3, b"eth0\0".to_vec()), (28, 7_i32.to_ne_bytes().to_vec())]);
        assert!(attributes(&[9, 0, 1]).is_empty());
        assert!(attributes(&[9, 0, 1, 0, 5]).is_empty());
        assert!(split(&[200, 0, 0, 0, 1, 0]).is_none());
    }

    #[test]
    fn names_are_checked() {
        let one = |json: serde_json::Value| compile(Some(&serde_json::from_value(json).unwrap()));
        assert_eq!(one(serde_json::json!({"a": {"name": "b"}})).unwrap()[0].inside, "b");
        for bad in [
            serde_json::json!({"": {}}),
            serde_json::json!({"a/b": {}}),
            serde_json::json!({"sixteen-letters-": {}}),
            serde_json::json!({"a": {"name": "x"}, "b": {"name": "x"}}),
        ] {
            assert!(one(bad).is_err());
        }
    }
}
