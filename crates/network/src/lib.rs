//! Bridges, addresses, ports, firewall
