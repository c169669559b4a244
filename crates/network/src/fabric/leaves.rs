//! Bridges with more containers than the kernel lets one have ports (1,024, `BR_MAX_PORTS`): the others are on *leaves*.
//! A leaf is a pair of interfaces: one end is a port of the bridge, and below the other these containers have macvlan
//! interfaces. Not a second bridge: frames would pass the firewall (br_netfilter) on both, and its translation of
//! addresses would be undone on the wrong one.
//!
//! Invariant: addresses and the firewall know the bridge alone; a leaf is a wire. Where containers of a bridge must not
//! reach each other, those of a leaf do not (private), and its port is isolated as theirs would be.

use std::collections::BTreeSet;

use super::segments::Bridge;
use super::{Fabric, lock};
use crate::bridge::BridgeSpec;
use crate::device;
use crate::error::Error;
use crate::link::{self, PortMode};
use crate::naming::hashed;
use crate::socket::Socket;
use crate::subinterface::MacvlanMode;
use crate::sysctl;
use crate::wire::Messages;

/// Containers on a bridge itself, and on each leaf. What is missing to 1,023 is for leaves, tunnels, interfaces that the
/// kernel has not taken down yet, and ports of others.
const MOST: usize = 1000;
const MOST_LEAVES: u16 = 16;

/// Each container is a neighbour of the host, and the host one of each container.
const NEIGHBOURS: u32 = 32768;

/// The ends on the bridge and on the other side.
fn names(bridge: &str, leaf: u16) -> [String; 2] {
    ["leaf", "sub"].map(|prefix| hashed(prefix, bridge, &format!("{leaf:x}")))
}

fn alias(bridge: &str) -> String {
    format!("brigantine leaf of {bridge}")
}

/// The leaf with room, given how many containers are on each; 0 is the bridge itself.
pub(super) fn with_room(bridge: &str, used: impl Fn(u16) -> usize) -> Result<u16, Error> {
    (0..=MOST_LEAVES).find(|leaf| used(*leaf) < MOST).ok_or_else(|| Error::InvalidBridge {
        bridge: bridge.to_owned(),
        reason: format!("it has {} containers, and more do not fit", MOST * (usize::from(MOST_LEAVES) + 1)),
    })
}

/// The leaves of a bridge that are there.
pub(super) fn find(socket: &mut Socket, spec: &BridgeSpec) -> Result<BTreeSet<u16>, Error> {
    let (ours, links) = (alias(&spec.name), link::all(socket)?);
    let is_there = |leaf: &u16| {
        let [port, _] = names(&spec.name, *leaf);
        links.iter().any(|link| link.name == port && link.alias == ours)
    };
    Ok((1..=MOST_LEAVES).filter(is_there).collect())
}

/// Takes leaves away.
pub(super) fn remove(socket: &mut Socket, bridge: &str, leaves: &BTreeSet<u16>) -> Result<(), Error> {
    for leaf in leaves {
        let [port, _] = names(bridge, *leaf);
        let mut batch = Messages::new();
        link::delete_by_name(&mut batch, &port);
        match socket.execute(batch) {
            Err(error) if error.errno() == Some(libc::ENODEV) => {}
            result => result?,
        }
    }
    Ok(())
}

/// How containers of one leaf of a bridge reach each other.
pub(super) fn mode(spec: &BridgeSpec) -> MacvlanMode {
    if spec.icc { MacvlanMode::Bridge } else { MacvlanMode::Private }
}

/// A leaf on the host.
#[derive(Debug)]
pub(super) struct Leaf {
    /// The port of the bridge.
    pub port: u32,
    pub port_name: String,
    /// The parent of its containers' interfaces.
    pub parent: u32,
}

impl Fabric {
    /// Finds a leaf, or makes it.
    pub(super) fn leaf(&self, bridge: &Bridge, number: u16) -> Result<Leaf, Error> {
        let ends = names(&bridge.spec.name, number);
        let mut leaves = lock(&bridge.leaves);
        self.with_socket(|socket| {
            if let Some(leaf) = look_up(socket, &ends)? {
                return Ok(leaf);
            }
            leaves.insert(number);
            sysctl::make_room_for_neighbours(NEIGHBOURS);
            let made = make(socket, bridge, &ends).and_then(|()| look_up(socket, &ends));
            if made.is_err()
                && let Err(error) = remove(socket, &bridge.spec.name, &[number].into())
            {
                tracing::warn!(bridge = bridge.spec.name, %error, "left over from a failed creation");
            }
            let [port, _] = ends;
            made?.ok_or(Error::BridgeConflict { bridge: port, reason: "vanished at once".to_owned() })
        })
    }
}

fn look_up(socket: &mut Socket, ends: &[String; 2]) -> Result<Option<Leaf>, Error> {
    let (port, parent) = (link::find(socket, &ends[0])?, link::find(socket, &ends[1])?);
    Ok(port.zip(parent).map(|(port, parent)| Leaf {
        port: port.index,
        port_name: port.name,
        parent: parent.index,
    }))
}

fn make(socket: &mut Socket, bridge: &Bridge, ends: &[String; 2]) -> Result<(), Error> {
    let spec = &bridge.spec;
    let [port, parent] = ends;
    let mut batch = Messages::new();
    device::add_trunk(&mut batch, [port, parent], bridge.index, spec.mtu);
    link::dress_port(&mut batch, parent, &alias(&spec.name));
    // Packets to published ports turn around here as they would at a container's own port.
    link::set_port_mode(&mut batch, port, PortMode { isolated: !spec.icc, hairpin: true });
    link::set_up_by_name(&mut batch, parent);
    link::set_up_by_name(&mut batch, port);
    // Last: what carries the alias is whole.
    link::dress_port(&mut batch, port, &alias(&spec.name));
    socket.execute(batch)?;
    link::wait_until_ready(socket, port)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_are_taken_in_order_and_end() {
        assert_eq!(with_room("b", |_| 0).unwrap(), 0);
        assert_eq!(with_room("b", |leaf| if leaf < 2 { MOST } else { 5 }).unwrap(), 2);
        assert!(with_room("b", |_| MOST).unwrap_err().to_string().contains("17000"));
    }

    #[test]
    fn their_names_fit() {
        assert!(names("a-long-bridge-1", MOST_LEAVES).iter().all(|name| name.len() <= 15));
    }
}
