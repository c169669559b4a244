//! Networks whose containers have interfaces of their own on the LAN: macvlan and ipvlan, below an interface of the host.
//!
//! Invariant: an interface that was not made here is used, never changed and never removed. What is made (an 802.1q
//! interface for a parent such as `eth0.50`, a parent without a LAN for a network that names none) carries our alias
//! and goes with the last network that uses it.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::bridge::check_interface_name;
use crate::device;
use crate::error::Error;
use crate::layout::Layout;
use crate::link;
use crate::socket::Socket;
use crate::wire::Messages;

/// How sub-interfaces of one parent reach each other (`enum macvlan_mode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MacvlanMode {
    /// Directly, within the host.
    #[default]
    Bridge,
    /// Not at all.
    Private,
    /// By a switch that sends frames back where they came from.
    Vepa,
    /// There is one only, and it has the parent to itself.
    Passthru,
}

/// Where packets of sub-interfaces are switched (`IPVLAN_MODE_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpvlanMode {
    #[default]
    L2,
    /// Routed by the host; no broadcast, and no gateway but the interface itself.
    L3,
    /// As `L3`, seen by the host's netfilter.
    L3s,
}

/// How sub-interfaces of one parent reach each other (`IPVLAN_F_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpvlanFlag {
    #[default]
    Bridge,
    Private,
    Vepa,
}

macro_rules! from_text {
    ($kind:ty { $($text:literal => $value:expr),* $(,)? }) => {
        impl FromStr for $kind {
            type Err = ();

            fn from_str(text: &str) -> Result<Self, ()> {
                match text {
                    $($text => Ok($value),)*
                    _ => Err(()),
                }
            }
        }
    };
}

from_text!(MacvlanMode {
    "bridge" => Self::Bridge,
    "private" => Self::Private,
    "vepa" => Self::Vepa,
    "passthru" => Self::Passthru,
});
from_text!(IpvlanMode { "l2" => Self::L2, "l3" => Self::L3, "l3s" => Self::L3s });
from_text!(IpvlanFlag { "bridge" => Self::Bridge, "private" => Self::Private, "vepa" => Self::Vepa });

/// What kind of interface containers get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SubinterfaceKind {
    Macvlan(MacvlanMode),
    Ipvlan(IpvlanMode, IpvlanFlag),
}

impl SubinterfaceKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Macvlan(_) => "macvlan",
            Self::Ipvlan(..) => "ipvlan",
        }
    }

    fn is_passthru(self) -> bool {
        self == Self::Macvlan(MacvlanMode::Passthru)
    }
}

/// A network of sub-interfaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubinterfaceSpec {
    /// What the network is called among the fabric's, and its parent if that has to be made; an interface's name.
    pub name: String,
    pub kind: SubinterfaceKind,
    /// An interface of the host, or `INTERFACE.ID` for an 802.1q interface that is made if it is not there. `None`: a
    /// parent that leads nowhere is made.
    pub parent: Option<String>,
    pub subnet: Option<Ipv4Net>,
    /// The LAN's router. The unspecified address stands for a route by the interface itself.
    pub gateway: Option<Ipv4Addr>,
    pub subnet6: Option<Ipv6Net>,
    pub gateway6: Option<Ipv6Addr>,
    /// The parent's if `None`.
    pub mtu: Option<u32>,
    /// No default route.
    pub internal: bool,
}

impl SubinterfaceSpec {
    pub fn layout(&self) -> Layout {
        Layout {
            subnet: self.subnet,
            gateway: self.gateway,
            subnet6: self.subnet6,
            gateway6: self.gateway6,
            internal: self.internal,
        }
    }

    /// The parent's name on the host.
    pub fn parent_name(&self) -> &str {
        self.parent.as_deref().unwrap_or(&self.name)
    }

    /// Checks what can be checked without looking at the host.
    pub fn validate(&self) -> Result<(), Error> {
        check_interface_name(&self.name)?;
        check_interface_name(self.parent_name())?;
        if self.parent.as_deref() == Some("lo") {
            return Err(self.invalid("the loopback interface cannot be a parent"));
        }
        let layout = self.layout();
        layout.check().and_then(|()| layout.check_mtu(self.mtu)).map_err(|reason| self.invalid(reason))
    }

    fn invalid(&self, reason: impl Into<String>) -> Error {
        Error::InvalidParent { parent: self.parent_name().to_owned(), reason: reason.into() }
    }
}

/// Marks parents that were made here.
const ALIAS: &str = "brigantine parent";

/// Refuses to share a parent that somebody has, or wants, to himself.
pub(crate) fn check_sharing<'a>(
    spec: &SubinterfaceSpec,
    others: impl Iterator<Item = &'a SubinterfaceSpec>,
) -> Result<(), Error> {
    for other in others.filter(|other| other.parent_name() == spec.parent_name()) {
        if other.kind.is_passthru() || spec.kind.is_passthru() {
            return Err(
                spec.invalid("another network uses it, and with macvlan_mode=passthru there can be one only")
            );
        }
        if other.kind.name() != spec.kind.name() {
            return Err(spec.invalid(format!(
                "a network of the driver {} uses it, and the kernel does not let {} beside that",
                other.kind.name(),
                spec.kind.name()
            )));
        }
    }
    Ok(())
}

/// Finds or makes the parent; its index, and whether it was made now.
pub(crate) fn ensure_parent(socket: &mut Socket, spec: &SubinterfaceSpec) -> Result<(u32, bool), Error> {
    let name = spec.parent_name();
    if let Some(link) = link::find(socket, name)? {
        return Ok((link.index, false));
    }
    match spec.parent.as_deref() {
        None => lonely(socket, name)?,
        Some(parent) => {
            let Some((base, id)) = parent.rsplit_once('.') else {
                return Err(spec.invalid("there is no such interface on this host"));
            };
            let id = id.parse().ok().filter(|id| (1..=4094).contains(id)).ok_or_else(|| {
                spec.invalid(format!(
                    "there is no such interface on this host, and {id:?} is not a VLAN's id (1 to 4094)"
                ))
            })?;
            let base = link::find(socket, base)?.ok_or_else(|| {
                spec.invalid(format!("there is no interface {base} on this host to make it on"))
            })?;
            let mut batch = Messages::new();
            device::add_vlan(&mut batch, parent, base.index, id, ALIAS);
            link::set_up_by_name(&mut batch, parent);
            socket
                .execute(batch)
                .map_err(|error| unsupported(error, "802.1q interfaces", "CONFIG_VLAN_8021Q"))?;
        }
    }
    let made = link::find(socket, name)?.ok_or_else(|| spec.invalid("it vanished at once"))?;
    Ok((made.index, true))
}

/// A parent that leads nowhere: a dummy interface, or one end of a pair where the kernel has no dummies.
fn lonely(socket: &mut Socket, name: &str) -> Result<(), Error> {
    let mut batch = Messages::new();
    device::add_dummy(&mut batch, name, ALIAS);
    match socket.execute(batch) {
        Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => {
            let mut batch = Messages::new();
            let peer = format!("{}p", &name[..name.len().min(14)].replacen("dm-", "dn", 1));
            device::add_lonely_pair(&mut batch, [name, &peer], ALIAS);
            link::set_up_by_name(&mut batch, &peer);
            socket.execute(batch)?;
        }
        result => result?,
    }
    let mut batch = Messages::new();
    link::set_up_by_name(&mut batch, name);
    socket.execute(batch)
}

/// Removes the parent if it was made here. That it is gone already is fine.
pub(crate) fn remove_parent(socket: &mut Socket, name: &str) -> Result<(), Error> {
    let Some(link) = link::find(socket, name)?.filter(|link| link.alias == ALIAS) else { return Ok(()) };
    let mut batch = Messages::new();
    link::delete(&mut batch, link.index, name);
    match socket.execute(batch) {
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
        result => result,
    }
}

/// Says what the kernel lacks, if that is why it refused.
pub(crate) fn unsupported(error: Error, what: &'static str, option: &'static str) -> Error {
    if error.errno() == Some(libc::EOPNOTSUPP) { Error::Unsupported { what, option } } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(parent: &str) -> SubinterfaceSpec {
        SubinterfaceSpec {
            name: "dm-0123456789ab".to_owned(),
            kind: SubinterfaceKind::Macvlan(MacvlanMode::Bridge),
            parent: Some(parent.to_owned()),
            subnet: Some("192.0.2.0/24".parse().unwrap()),
            gateway: Some([192, 0, 2, 1].into()),
            subnet6: None,
            gateway6: None,
            mtu: None,
            internal: false,
        }
    }

    #[test]
    fn what_is_no_parent_is_refused() {
        spec("eth0.50").validate().unwrap();
        for bad in ["lo", "", "a/b", "a-name-of-16-byte"] {
            assert!(spec(bad).validate().is_err(), "{bad:?}");
        }
        let elsewhere = SubinterfaceSpec { gateway: Some([198, 51, 100, 1].into()), ..spec("eth0") };
        assert!(elsewhere.validate().unwrap_err().to_string().contains("198.51.100.1"));
        let by_itself = SubinterfaceSpec { gateway: Some(Ipv4Addr::UNSPECIFIED), ..spec("eth0") };
        by_itself.validate().unwrap();
    }

    #[test]
    fn a_parent_is_shared_by_networks_of_one_driver_but_not_with_passthru() {
        let (bridge, other) = (spec("eth0"), spec("eth0"));
        check_sharing(&bridge, [&other].into_iter()).unwrap();
        let alone =
            SubinterfaceSpec { kind: SubinterfaceKind::Macvlan(MacvlanMode::Passthru), ..spec("eth0") };
        assert!(check_sharing(&alone, [&bridge].into_iter()).is_err());
        assert!(check_sharing(&bridge, [&alone].into_iter()).is_err());
        check_sharing(&alone, [&spec("eth1")].into_iter()).unwrap();
        let kind = SubinterfaceKind::Ipvlan(IpvlanMode::L2, IpvlanFlag::Bridge);
        let ipvlan = SubinterfaceSpec { kind, ..spec("eth0") };
        assert!(check_sharing(&ipvlan, [&bridge].into_iter()).unwrap_err().to_string().contains("macvlan"));
    }

    #[test]
    fn what_the_kernel_lacks_is_named() {
        let refused = |code| Error::Kernel {
            what: "x".to_owned(),
            detail: None,
            source: std::io::Error::from_raw_os_error(code),
        };
        let text = unsupported(refused(libc::EOPNOTSUPP), "ipvlan interfaces", "CONFIG_IPVLAN").to_string();
        assert!(text.contains("CONFIG_IPVLAN"), "{text}");
        assert!(matches!(unsupported(refused(libc::EBUSY), "x", "y"), Error::Kernel { .. }));
    }
}
