//! The engine's firewall: isolation of bridges, a way out for containers, and published ports.
//!
//! Two backends keep the same promises. nf_tables is the one that is wanted: a table of the engine's own, changed over
//! netlink. Where the kernel has none, `iptables-restore` writes chains of the engine's own into the tables that everybody
//! shares.

mod iptables;
mod nftables;
mod rules;
mod sets;
mod xtables;

use std::str::FromStr;

use crate::bridge::BridgeSpec;
use crate::error::Error;
use crate::gate::Gate;
use crate::ports::PublishedPort;
use iptables::Iptables;
use nftables::Nftables;

/// What the rules are written with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FirewallBackend {
    /// nf_tables if the kernel has it, else iptables.
    #[default]
    Auto,
    Nftables,
    Iptables,
}

impl FromStr for FirewallBackend {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "auto" | "" => Ok(Self::Auto),
            "nftables" => Ok(Self::Nftables),
            "iptables" => Ok(Self::Iptables),
            _ => Err(()),
        }
    }
}

/// Everything the rules follow from.
#[derive(Debug)]
pub(crate) struct Contents<'a> {
    pub bridges: &'a [BridgeSpec],
    pub ports: &'a [PublishedPort],
    pub gate: Option<&'a Gate>,
}

/// Whether a change of single ports could be made on the rules as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Change {
    Done,
    /// The rules are not loaded, somebody took them or parts of them away, or they have to be written anew: load them
    /// whole.
    Reload,
}

/// Handle on the rules. Changes are serialised here as the kernel would do anyway.
#[derive(Debug)]
pub(crate) enum Firewall {
    Nftables(Nftables),
    Iptables(Iptables),
}

impl Firewall {
    /// `table` names the rules; nothing is changed yet.
    pub fn open(table: String, backend: FirewallBackend) -> Self {
        let nftables = Nftables::new(table.clone());
        match backend {
            FirewallBackend::Nftables => Self::Nftables(nftables),
            FirewallBackend::Iptables => Self::Iptables(Iptables::new(table)),
            FirewallBackend::Auto if nftables.answers() || !xtables::is_there() => Self::Nftables(nftables),
            FirewallBackend::Auto => {
                tracing::info!("this kernel has no nf_tables: the firewall is made with iptables");
                Self::Iptables(Iptables::new(table))
            }
        }
    }

    pub fn backend(&self) -> FirewallBackend {
        match self {
            Self::Nftables(_) => FirewallBackend::Nftables,
            Self::Iptables(_) => FirewallBackend::Iptables,
        }
    }

    pub fn table(&self) -> &str {
        match self {
            Self::Nftables(one) => one.table(),
            Self::Iptables(one) => one.table(),
        }
    }

    /// The netlink ports that changes of our own come from.
    pub fn ports(&self) -> Vec<u32> {
        match self {
            Self::Nftables(one) => one.port().into_iter().collect(),
            Self::Iptables(one) => one.ports(),
        }
    }

    /// Whether the kernel tells of changes of these rules.
    pub fn is_told(&self) -> bool {
        match self {
            Self::Nftables(_) => true,
            Self::Iptables(_) => Iptables::is_told(),
        }
    }

    pub fn is_loaded(&self) -> bool {
        match self {
            Self::Nftables(one) => one.is_loaded(),
            Self::Iptables(one) => one.is_loaded(),
        }
    }

    /// Replaces the rules, whatever they were.
    pub fn load(&self, contents: &Contents<'_>) -> Result<(), Error> {
        match self {
            Self::Nftables(one) => one.load(contents),
            Self::Iptables(one) => one.load(contents),
        }
    }

    pub fn add_bridge(&self, bridge: &BridgeSpec) -> Result<Change, Error> {
        match self {
            Self::Nftables(one) => one.add_bridge(bridge),
            // Bridges come and go seldom.
            Self::Iptables(_) => Ok(Change::Reload),
        }
    }

    pub fn remove_bridge(&self, bridge: &BridgeSpec) -> Result<Change, Error> {
        match self {
            Self::Nftables(one) => one.remove_bridge(bridge),
            Self::Iptables(_) => Ok(Change::Reload),
        }
    }

    pub fn publish(&self, ports: &[PublishedPort]) -> Result<Change, Error> {
        match self {
            Self::Nftables(one) => one.publish(ports),
            Self::Iptables(one) => one.publish(ports),
        }
    }

    pub fn withdraw(&self, ports: &[PublishedPort]) -> Result<Change, Error> {
        match self {
            Self::Nftables(one) => one.withdraw(ports),
            Self::Iptables(one) => one.withdraw(ports),
        }
    }

    /// Removes the rules.
    pub fn unload(&self) -> Result<(), Error> {
        match self {
            Self::Nftables(one) => one.unload(),
            Self::Iptables(one) => one.unload(),
        }
    }

    /// Whether it pays to ask that again; nf_tables tells by itself.
    pub fn may_have_changed(&self) -> bool {
        match self {
            Self::Nftables(_) => true,
            Self::Iptables(one) => one.may_have_changed(),
        }
    }

    /// Whether the rules are there.
    pub fn exists(&self) -> Result<bool, Error> {
        match self {
            Self::Nftables(one) => one.exists(),
            Self::Iptables(one) => one.exists(),
        }
    }

    /// Chains of others that drop forwarded packets whatever our rules say, such as docker's: `ip filter FORWARD`.
    pub fn obstacles(&self) -> Result<Vec<String>, Error> {
        match self {
            Self::Nftables(one) => one.obstacles(),
            Self::Iptables(one) => one.obstacles(),
        }
    }

    /// Chains of others that drop packets for the host itself by default.
    pub fn input_policies(&self) -> Result<Vec<String>, Error> {
        match self {
            Self::Nftables(one) => one.input_policies(),
            Self::Iptables(one) => one.input_policies(),
        }
    }
}
