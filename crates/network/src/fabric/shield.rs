//! Keeping the firewall loaded: from what is known, again whenever it is gone, with or without the gate.
//!
//! Invariant: whoever loads holds `changing`, and what is loaded follows from bridges and endpoints alone.

use std::time::Duration;

use super::{Fabric, lock};
use crate::error::Error;
use crate::firewall::{Contents, FirewallBackend};
use crate::gate::Gate;
use crate::ports::PublishedPort;
use crate::sandbox::Attachment;
use crate::watch::FirewallEvents;

/// What is known of the way round to published ports.
#[derive(Debug)]
pub(super) enum GateState {
    /// Not wanted, or the kernel cannot.
    Without,
    Wanted,
    Open(Gate),
}

impl Fabric {
    /// Reloads the firewall table if somebody removed it (`nft flush ruleset`, a firewall restart);
    /// whether that was necessary.
    pub fn verify(&self) -> Result<bool, Error> {
        if self.bridges().is_empty() || (self.firewall.is_loaded() && self.firewall.exists()?) {
            return Ok(false);
        }
        tracing::warn!("the firewall's table is not there; loading it");
        self.reload()?;
        Ok(true)
    }

    /// What [`Fabric::reassert`] is told by, in the calling thread's network namespace.
    pub fn firewall_events(&self) -> Result<FirewallEvents, Error> {
        if self.firewall.is_told() { FirewallEvents::open() } else { Ok(FirewallEvents::none()) }
    }

    /// Waits for somebody else to take something out of the firewall's tables, for at most `patience`, and loads them
    /// again if that happened; whether it did.
    pub fn reassert(&self, events: &mut FirewallEvents, patience: Duration) -> Result<bool, Error> {
        if self.firewall.backend() == FirewallBackend::Iptables {
            // What `ip_tables` has is looked at, without a program being executed as long as nothing changes.
            let is_told = events.wait_for_anything(&self.firewall.ports(), patience);
            return if is_told || self.firewall.may_have_changed() { self.verify() } else { Ok(false) };
        }
        let own = self.firewall.ports();
        if !events.wait(self.firewall.table(), &own, patience) || !self.firewall.is_loaded() {
            return Ok(false);
        }
        tracing::warn!(
            table = self.firewall.table(),
            "somebody changed the firewall's table; loading it again"
        );
        self.reload()?;
        Ok(true)
    }

    /// Chains of the host that drop incoming packets by default, and so decide about published ports as long as
    /// [`Fabric::has_gate`].
    pub fn input_policies(&self) -> Result<Vec<String>, Error> {
        self.firewall.input_policies()
    }

    /// Chains of the host that drop forwarded packets by default.
    pub fn forward_policies(&self) -> Result<Vec<String>, Error> {
        self.firewall.obstacles()
    }

    /// Whether the host's own rules for input decide about published ports.
    pub fn has_gate(&self) -> bool {
        matches!(*lock(&self.gate), GateState::Open(_))
    }

    /// What the firewall is made with.
    pub fn firewall_backend(&self) -> FirewallBackend {
        self.firewall.backend()
    }

    pub(super) fn reload(&self) -> Result<(), Error> {
        let _changing = lock(&self.changing);
        self.load()
    }

    /// Loads the firewall from what is known. The caller holds `changing`.
    pub(super) fn load(&self) -> Result<(), Error> {
        let ports: Vec<PublishedPort> = {
            let endpoints = lock(&self.endpoints);
            endpoints.by_id.values().flat_map(Attachment::own_ports).collect()
        };
        let bridges = self.specs();
        let mut state = lock(&self.gate);
        if let GateState::Wanted = *state
            && !bridges.is_empty()
        {
            *state = match self.with_socket(|socket| Gate::ensure(socket, self.firewall.table())) {
                Ok(gate) => GateState::Open(gate),
                Err(error) => {
                    without_gate(&error);
                    GateState::Without
                }
            };
        }
        let gate = match &*state {
            GateState::Open(gate) => Some(gate),
            GateState::Without | GateState::Wanted => None,
        };
        let contents = Contents { bridges: &bridges, ports: &ports, gate };
        match self.firewall.load(&contents) {
            Err(error @ Error::FirewallUnavailable { .. }) if gate.is_some() => {
                self.firewall.load(&Contents { gate: None, ..contents })?;
                without_gate(&error);
                *state = GateState::Without;
                self.with_socket(|socket| Gate::remove(socket, self.firewall.table()))
            }
            result => result,
        }
    }

    pub(super) fn close_gate(&self) -> Result<(), Error> {
        let mut state = lock(&self.gate);
        if let GateState::Open(_) = *state {
            *state = GateState::Wanted;
            self.with_socket(|socket| Gate::remove(socket, self.firewall.table()))?;
        }
        Ok(())
    }
}

fn without_gate(error: &Error) {
    tracing::warn!(
        error = error as &dyn std::error::Error,
        "published ports pass by the host's own rules for input: this kernel has no way round to offer"
    );
}
