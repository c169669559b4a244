//! Who has which name and address on which network. Pure: no socket, no clock.
//!
//! Names are compared without regard to case (RFC 4343). A container finds what is on its own networks, nothing else.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::protocol::{Residence, Resident};

/// All containers of the engine that are on networks with names.
#[derive(Debug, Default)]
pub(super) struct Table {
    residents: HashMap<String, Resident>,
    /// Ids of the containers that have a name on a network.
    by_name: HashMap<(String, String), BTreeSet<String>>,
    by_address: HashMap<(String, IpAddr), String>,
}

/// The addresses behind a name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub ipv4: Vec<Ipv4Addr>,
    pub ipv6: Vec<Ipv6Addr>,
}

impl Table {
    /// Enters a container, or changes one.
    pub fn put(&mut self, mut resident: Resident) {
        self.remove(&resident.id);
        for residence in &mut resident.residences {
            for name in &mut residence.names {
                name.make_ascii_lowercase();
            }
            residence.network_name.make_ascii_lowercase();
            for name in &residence.names {
                let key = (residence.network.clone(), name.clone());
                self.by_name.entry(key).or_default().insert(resident.id.clone());
            }
            for address in addresses(residence) {
                self.by_address.insert((residence.network.clone(), address), resident.id.clone());
            }
        }
        resident.links =
            resident.links.into_iter().map(|(name, id)| (name.to_ascii_lowercase(), id)).collect();
        self.residents.insert(resident.id.clone(), resident);
    }

    pub fn remove(&mut self, id: &str) {
        let Some(resident) = self.residents.remove(id) else { return };
        for residence in resident.residences {
            for name in &residence.names {
                let key = (residence.network.clone(), name.clone());
                if let Some(ids) = self.by_name.get_mut(&key) {
                    ids.remove(id);
                    if ids.is_empty() {
                        self.by_name.remove(&key);
                    }
                }
            }
            for address in addresses(&residence) {
                let key = (residence.network.clone(), address);
                if self.by_address.get(&key).is_some_and(|owner| owner == id) {
                    self.by_address.remove(&key);
                }
            }
        }
    }

    /// Removes all whose ids begin so.
    pub fn remove_all(&mut self, prefix: &str) {
        let ids: Vec<String> = self.residents.keys().filter(|id| id.starts_with(prefix)).cloned().collect();
        for id in ids {
            self.remove(&id);
        }
    }

    /// The ids of those on a network, with their places there.
    pub fn on<'a>(&'a self, network: &'a str) -> impl Iterator<Item = (&'a str, &'a Residence)> {
        self.residents.values().filter_map(move |resident| {
            let place = resident.residences.iter().find(|place| place.network == network)?;
            Some((resident.id.as_str(), place))
        })
    }

    pub fn get(&self, id: &str) -> Option<&Resident> {
        self.residents.get(id)
    }

    /// What `name` means to container `client`; `None` if nothing.
    pub fn look_up(&self, client: &str, name: &str) -> Option<Found> {
        let resident = self.residents.get(client)?;
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if let Some(target) = resident.links.get(&name) {
            let networks: Vec<&str> = resident.residences.iter().map(|one| one.network.as_str()).collect();
            let target = self.residents.get(target)?;
            let mut places =
                target.residences.iter().filter(|place| networks.contains(&place.network.as_str()));
            return places.next().map(|place| self.found(&place.network, [&target.id].into_iter()));
        }
        for residence in &resident.residences {
            // `web`, and `web.network` with the network's name.
            let bare = name.strip_suffix(&residence.network_name).and_then(|rest| rest.strip_suffix('.'));
            for name in std::iter::once(name.as_str()).chain(bare) {
                if let Some(ids) = self.by_name.get(&(residence.network.clone(), name.to_owned())) {
                    return Some(self.found(&residence.network, ids.iter()));
                }
            }
        }
        None
    }

    /// What an address is called, seen from container `client`.
    pub fn look_up_address(&self, client: &str, address: IpAddr) -> Option<String> {
        let resident = self.residents.get(client)?;
        resident.residences.iter().find_map(|residence| {
            let owner = self.by_address.get(&(residence.network.clone(), address))?;
            let place =
                self.residents.get(owner)?.residences.iter().find(|one| one.network == residence.network)?;
            Some(format!("{}.{}", place.names.first()?, place.network_name))
        })
    }

    fn found<'a>(&self, network: &str, ids: impl Iterator<Item = &'a String>) -> Found {
        let mut found = Found::default();
        for id in ids {
            let places = self.residents.get(id).into_iter().flat_map(|resident| &resident.residences);
            for place in places.filter(|place| place.network == network) {
                found.ipv4.extend(place.ipv4);
                found.ipv6.extend(place.ipv6);
            }
        }
        found
    }
}

fn addresses(residence: &Residence) -> impl Iterator<Item = IpAddr> {
    residence.ipv4.map(IpAddr::V4).into_iter().chain(residence.ipv6.map(IpAddr::V6))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident(id: &str, places: &[(&str, u8, &[&str])]) -> Resident {
        Resident {
            id: id.to_owned(),
            residences: places
                .iter()
                .map(|(network, last, names)| Residence {
                    network: format!("id-{network}"),
                    network_name: (*network).to_owned(),
                    names: names.iter().map(|name| (*name).to_owned()).collect(),
                    ipv4: Some([10, 0, 0, *last].into()),
                    ipv6: None,
                })
                .collect(),
            forwards: true,
            ..Resident::default()
        }
    }

    #[test]
    fn names_are_known_on_the_same_network_only() {
        let mut table = Table::default();
        table.put(resident("a", &[("front", 2, &["Web", "www"])]));
        table.put(resident("b", &[("front", 3, &["proxy"]), ("back", 4, &["proxy"])]));
        table.put(resident("c", &[("back", 5, &["db"])]));
        let one = |client: &str, name: &str| table.look_up(client, name).map(|found| found.ipv4);
        assert_eq!(one("b", "web"), Some(vec![[10, 0, 0, 2].into()]));
        assert_eq!(one("b", "WWW.front."), Some(vec![[10, 0, 0, 2].into()]));
        assert_eq!(one("b", "db"), Some(vec![[10, 0, 0, 5].into()]));
        assert_eq!(one("a", "db"), None);
        assert_eq!(
            one("a", "proxy"),
            Some(vec![[10, 0, 0, 3].into()]),
            "not its address on the other network"
        );
        assert_eq!(one("a", "web.back"), None);
        assert_eq!(one("nobody", "web"), None);
        assert_eq!(table.look_up_address("b", [10, 0, 0, 2].into()).as_deref(), Some("web.front"));
        assert_eq!(table.look_up_address("a", [10, 0, 0, 5].into()), None);
    }

    #[test]
    fn a_shared_alias_has_all_addresses_until_its_containers_are_gone() {
        let mut table = Table::default();
        table.put(resident("a", &[("net", 2, &["one", "svc"])]));
        table.put(resident("b", &[("net", 3, &["two", "svc"])]));
        assert_eq!(table.look_up("a", "svc").unwrap().ipv4.len(), 2);
        table.put(resident("b", &[("net", 4, &["three"])]));
        assert_eq!(table.look_up("a", "svc").unwrap().ipv4, [Ipv4Addr::new(10, 0, 0, 2)]);
        assert_eq!(table.look_up("a", "two"), None);
        assert_eq!(table.look_up_address("a", [10, 0, 0, 3].into()), None);
        table.remove("b");
        table.remove("b");
        assert_eq!(table.look_up("a", "three"), None);
    }

    #[test]
    fn a_link_is_known_to_its_container_alone() {
        let mut table = Table::default();
        table.put(resident("a", &[("net", 2, &["one"])]));
        table.put(Resident {
            links: [("Store".to_owned(), "a".to_owned())].into(),
            ..resident("b", &[("net", 3, &["two"])])
        });
        assert_eq!(table.look_up("b", "store").unwrap().ipv4, [Ipv4Addr::new(10, 0, 0, 2)]);
        assert_eq!(table.look_up("a", "store"), None);
    }
}
