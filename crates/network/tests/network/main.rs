//! The network of containers as it behaves in a real kernel: every test builds its own topology of network
//! namespaces, so they run in parallel and leave the machine's own network alone. They need root.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

/// One test per backend of the firewall for each of these functions.
macro_rules! backends {
    ($($name:ident),* $(,)?) => {
        mod nftables {
            $(#[test]
            fn $name() {
                super::$name(brigantine_network::FirewallBackend::Nftables);
            })*
        }
        mod iptables {
            $(#[test]
            fn $name() {
                super::$name(brigantine_network::FirewallBackend::Iptables);
            })*
        }
    };
}

mod beside;
mod cni;
mod drivers;
mod iptables;
mod lab;
mod lifecycle;
mod matrix;
mod names;
mod packets;
