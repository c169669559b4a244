//! Who is connected, and whose each address is.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::error::Error;
use crate::sandbox::{Attachment, Interface};

#[derive(Debug, Default)]
pub(super) struct Endpoints {
    pub by_id: HashMap<String, Attachment>,
    /// Which container has an address of a network.
    by_address: HashMap<(String, IpAddr), String>,
    /// How many interfaces are on a bridge's leaf.
    on_leaf: HashMap<(String, u16), usize>,
}

impl Endpoints {
    pub fn insert(&mut self, attachment: Attachment) {
        for (interface, address) in addresses(&attachment) {
            self.by_address.insert((interface.bridge.clone(), address), attachment.id.clone());
        }
        for interface in &attachment.interfaces {
            *self.on_leaf.entry((interface.bridge.clone(), interface.leaf)).or_default() += 1;
        }
        if let Some(former) = self.by_id.insert(attachment.id.clone(), attachment) {
            self.uncount(&former);
        }
    }

    pub fn remove(&mut self, id: &str) -> Option<Attachment> {
        let attachment = self.by_id.remove(id)?;
        for (interface, address) in addresses(&attachment) {
            self.by_address.remove(&(interface.bridge.clone(), address));
        }
        self.uncount(&attachment);
        Some(attachment)
    }

    fn uncount(&mut self, attachment: &Attachment) {
        for interface in &attachment.interfaces {
            let key = (interface.bridge.clone(), interface.leaf);
            if let Some(count) = self.on_leaf.get_mut(&key) {
                *count = count.saturating_sub(1);
            }
        }
    }

    /// Those that have an interface on a network.
    pub fn on<'a>(&'a self, network: &'a str) -> impl Iterator<Item = &'a Attachment> {
        let is_on = move |attachment: &&Attachment| {
            attachment.interfaces.iter().any(|interface| interface.bridge == network)
        };
        self.by_id.values().filter(is_on)
    }

    pub fn count(&self, bridge: &str, leaf: u16) -> usize {
        self.on_leaf.get(&(bridge.to_owned(), leaf)).copied().unwrap_or_default()
    }

    /// Refuses an interface one of whose addresses another container has.
    pub fn refuse_taken(&self, interface: &Interface) -> Result<(), Error> {
        for net in &interface.addresses {
            let key = (interface.bridge.clone(), net.addr());
            if let Some(owner) = self.by_address.get(&key) {
                let owner = self.by_id.get(owner).map_or(owner, |owner| &owner.name).clone();
                return Err(Error::AddressInUse { bridge: key.0, address: key.1, owner });
            }
        }
        Ok(())
    }
}

fn addresses(attachment: &Attachment) -> impl Iterator<Item = (&Interface, IpAddr)> {
    let interfaces = attachment.interfaces.iter();
    interfaces.flat_map(|interface| interface.addresses.iter().map(move |net| (interface, net.addr())))
}
