//! The networks that containers are connected to, made and taken away: bridges, and parents of sub-interfaces.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;

use super::{Fabric, leaves, lock};
use crate::bridge::{BridgeSpec, configure_forwarding, ensure_link};
use crate::cni::NetworkList;
use crate::error::Error;
use crate::firewall::Change;
use crate::layout::Layout;
use crate::link;
use crate::subinterface::{SubinterfaceKind, SubinterfaceSpec, check_sharing, ensure_parent, remove_parent};
use crate::subnet::overlap;
use crate::tunnel::{self, Tunnel};
use crate::wire::Messages;

/// A bridge of the engine, as it is on the host.
#[derive(Clone, Debug)]
pub(crate) struct Bridge {
    pub(super) spec: BridgeSpec,
    pub(super) index: u32,
    /// Numbers of the leaves that there are.
    pub(super) leaves: Arc<Mutex<BTreeSet<u16>>>,
}

/// A parent of sub-interfaces, as it is on the host.
#[derive(Clone, Debug)]
pub(crate) struct Parent {
    pub(super) spec: SubinterfaceSpec,
    pub(super) index: u32,
}

impl Parent {
    /// The far end of a leaf, as the parent of its containers' interfaces.
    pub(super) fn of_leaf(bridge: &BridgeSpec, index: u32) -> Self {
        let spec = SubinterfaceSpec {
            name: bridge.name.clone(),
            kind: SubinterfaceKind::Macvlan(leaves::mode(bridge)),
            parent: None,
            subnet: bridge.subnet,
            gateway: bridge.gateway,
            subnet6: bridge.subnet6,
            gateway6: bridge.gateway6,
            mtu: bridge.mtu,
            internal: bridge.internal,
        };
        Self { spec, index }
    }
}

/// What an interface is connected to.
#[derive(Clone, Debug)]
pub(super) enum Segment {
    Bridge(Bridge),
    Parent(Parent),
    /// What CNI plugins make.
    Foreign(NetworkList),
}

impl Segment {
    pub(super) fn layout(&self) -> Layout {
        match self {
            Self::Bridge(bridge) => bridge.spec.layout(),
            Self::Parent(parent) => parent.spec.layout(),
            Self::Foreign(_) => Layout::default(),
        }
    }
}

impl Fabric {
    /// Makes the bridge, or takes an existing one that fits, and brings it up.
    pub fn ensure_bridge(&self, spec: &BridgeSpec) -> Result<(), Error> {
        spec.validate()?;
        let spec = &self.with_socket(|socket| tunnel::complete(socket, spec))?;
        let _changing = lock(&self.changing);
        let mut known: Vec<BridgeSpec> = self.specs();
        known.retain(|other| other.name != spec.name);
        for other in &known {
            for (own, theirs) in pairs(&spec.subnets(), &other.subnets()) {
                if overlap(&own, &theirs) {
                    return Err(Error::SubnetInUse {
                        bridge: spec.name.clone(),
                        subnet: own,
                        other: theirs,
                        device: other.name.clone(),
                    });
                }
            }
        }
        let (index, is_made) = self.with_socket(|socket| ensure_link(socket, spec))?;
        let finished = configure_forwarding(spec)
            .and_then(|()| self.with_socket(|socket| tunnel::ensure(socket, spec, index)))
            .and_then(|()| self.with_socket(|socket| leaves::find(socket, spec)));
        let leaves = match finished {
            Ok(leaves) => leaves,
            Err(error) => {
                if is_made {
                    let mut batch = Messages::new();
                    link::delete(&mut batch, index, &spec.name);
                    let undone = self.with_socket(|socket| tunnel::remove(socket, &spec.name));
                    if let Err(error) = undone.and_then(|()| self.execute(batch)) {
                        tracing::warn!(bridge = spec.name, %error, "left over from a failed creation");
                    }
                }
                return Err(error);
            }
        };
        let former = {
            let mut bridges = self.bridges.write().unwrap_or_else(PoisonError::into_inner);
            let leaves = Arc::new(Mutex::new(leaves));
            bridges.insert(spec.name.clone(), Bridge { spec: spec.clone(), index, leaves })
        };
        if self.firewall.is_loaded() {
            let is_new = former.is_none_or(|former| former.spec == *spec);
            if !is_new || self.firewall.add_bridge(spec)? == Change::Reload {
                self.load()?;
            }
        }
        Ok(())
    }

    /// Removes a bridge that has no containers; with the last one the firewall's table goes, too.
    pub fn remove_bridge(&self, name: &str) -> Result<(), Error> {
        let _changing = lock(&self.changing);
        self.refuse_used(name)?;
        let (bridge, is_last) = {
            let mut bridges = self.bridges.write().unwrap_or_else(PoisonError::into_inner);
            let bridge = bridges.remove(name).ok_or_else(|| Error::NoSuchBridge(name.to_owned()))?;
            (bridge, bridges.is_empty())
        };
        if is_last {
            if self.firewall.is_loaded() {
                self.firewall.unload()?;
            }
            self.close_gate()?;
        } else if self.firewall.is_loaded() && self.firewall.remove_bridge(&bridge.spec)? == Change::Reload {
            self.load()?;
        }
        self.with_socket(|socket| {
            leaves::remove(socket, name, &lock(&bridge.leaves))?;
            if bridge.spec.tunnel.is_some() {
                tunnel::remove(socket, name)?;
            }
            Ok(())
        })?;
        let mut batch = Messages::new();
        link::delete(&mut batch, bridge.index, name);
        match self.execute(batch) {
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
            result => result,
        }
    }

    /// The tunnel of a bridge, if it has one, with what was decided when it was made.
    pub fn tunnel(&self, bridge: &str) -> Option<Tunnel> {
        self.bridges().get(bridge)?.spec.tunnel.clone()
    }

    /// Makes a network of sub-interfaces known, and its parent if there is none.
    pub fn ensure_parent(&self, spec: &SubinterfaceSpec) -> Result<(), Error> {
        spec.validate()?;
        let _changing = lock(&self.changing);
        let others = self.parents().clone();
        check_sharing(
            spec,
            others.values().map(|parent| &parent.spec).filter(|other| other.name != spec.name),
        )?;
        let (index, _) = self.with_socket(|socket| ensure_parent(socket, spec))?;
        let mut parents = self.parents.write().unwrap_or_else(PoisonError::into_inner);
        parents.insert(spec.name.clone(), Parent { spec: spec.clone(), index });
        Ok(())
    }

    /// Forgets a network of sub-interfaces that has no containers, and removes its parent if that was made for it.
    pub fn remove_parent(&self, name: &str) -> Result<(), Error> {
        let _changing = lock(&self.changing);
        self.refuse_used(name)?;
        let (parent, is_shared) = {
            let mut parents = self.parents.write().unwrap_or_else(PoisonError::into_inner);
            let parent = parents.remove(name).ok_or_else(|| Error::NoSuchBridge(name.to_owned()))?;
            let is_shared =
                parents.values().any(|other| other.spec.parent_name() == parent.spec.parent_name());
            (parent, is_shared)
        };
        if is_shared {
            return Ok(());
        }
        self.with_socket(|socket| remove_parent(socket, parent.spec.parent_name()))
    }

    pub(super) fn refuse_used(&self, name: &str) -> Result<(), Error> {
        let endpoints = lock(&self.endpoints);
        let in_use: Vec<String> = endpoints.on(name).map(|attachment| attachment.name.clone()).collect();
        if in_use.is_empty() {
            Ok(())
        } else {
            Err(Error::BridgeInUse { bridge: name.to_owned(), containers: in_use })
        }
    }

    /// The network of that name. A parent may have come back under the same name meanwhile, as another interface.
    pub(super) fn segment(&self, name: &str) -> Result<Segment, Error> {
        if let Some(bridge) = self.bridges().get(name) {
            return Ok(Segment::Bridge(bridge.clone()));
        }
        if let Some(list) = self.foreign().get(name) {
            return Ok(Segment::Foreign(list.clone()));
        }
        let known = self.parents().get(name).cloned();
        let mut parent = known.ok_or_else(|| Error::NoSuchBridge(name.to_owned()))?;
        (parent.index, _) = self.with_socket(|socket| ensure_parent(socket, &parent.spec))?;
        Ok(Segment::Parent(parent))
    }
}

fn pairs(one: &[IpNet], other: &[IpNet]) -> Vec<(IpNet, IpNet)> {
    one.iter().flat_map(|own| other.iter().map(|theirs| (*own, *theirs))).collect()
}
