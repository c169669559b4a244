//! `brig network`: create, ls, rm, connect, disconnect.

use bollard_stubs::models::{
    ConfigReference, EndpointIpamConfig, EndpointSettings, Ipam, IpamConfig, NetworkConnectRequest,
    NetworkCreateRequest, NetworkDisconnectRequest,
};
use jiff::Timestamp;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::commands::{chosen_format, for_each};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::listing::{self, Listing, Row, short_id};
use crate::parse::environment::pairs;
use crate::value::Value;
use crate::{output, units};

pub static CREATE: Command = Command {
    name: "create",
    usage: "[OPTIONS] NETWORK",
    about: "Create a network",
    flags: &[
        Flag::switch("attachable", "Let containers be attached by hand (Swarm)"),
        Flag::one(
            "aux-address",
            "map",
            "Address in a subnet that the network must not give out (name=address)",
        )
        .as_list(),
        Flag::text("config-from", "Take the configuration from this network"),
        Flag::switch("config-only", "Create a configuration only"),
        Flag::text("driver", "Driver of the network").short('d').default("bridge"),
        Flag::list("gateway", "Gateway of a subnet"),
        Flag::switch("ingress", "Create Swarm's routing mesh"),
        Flag::switch("internal", "No way out of the network"),
        Flag::list("ip-range", "Give addresses out of this part of a subnet"),
        Flag::text("ipam-driver", "Driver that manages addresses").default("default"),
        Flag::one("ipam-opt", "map", "Set an option of that driver").as_list(),
        Flag::switch("ipv4", "Give IPv4 addresses").default("true"),
        Flag::switch("ipv6", "Give IPv6 addresses"),
        Flag::list("label", "Set a label"),
        Flag::one("opt", "map", "Set an option of the network's driver").short('o').as_list(),
        Flag::text("scope", "Scope of the network"),
        Flag::list("subnet", "Subnet, as address/length"),
    ],
    operands: Operands::Exactly(1),
    run: runs!(create),
    ..Command::EMPTY
};

pub static LIST: Command = Command {
    name: "ls",
    usage: "[OPTIONS]",
    about: "List networks",
    flags: &[
        Flag::one("filter", "filter", "Show only what matches").short('f').as_list(),
        Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template"),
        Flag::switch("no-trunc", "Show everything in full"),
        Flag::switch("quiet", "Show IDs only").short('q'),
    ],
    operands: Operands::None,
    run: runs!(list),
    ..Command::EMPTY
};

pub static REMOVE: Command = Command {
    name: "rm",
    usage: "NETWORK [NETWORK...]",
    about: "Remove one or more networks",
    flags: &[Flag::switch("force", "Do not mind a network that is not there").short('f')],
    operands: Operands::AtLeast(1),
    run: runs!(remove),
    ..Command::EMPTY
};

pub static CONNECT: Command = Command {
    name: "connect",
    usage: "[OPTIONS] NETWORK CONTAINER",
    about: "Connect a container to a network",
    flags: &[
        Flag::list("alias", "Another name in the network"),
        Flag::list("driver-opt", "Set an option of the network's driver"),
        Flag::one("gw-priority", "int", "The network with the highest number has the default gateway"),
        Flag::text("ip", "IPv4 address"),
        Flag::text("ip6", "IPv6 address"),
        Flag::list("link", "Link to another container"),
        Flag::list("link-local-ip", "Link-local address"),
    ],
    operands: Operands::Exactly(2),
    run: runs!(connect),
    ..Command::EMPTY
};

pub static DISCONNECT: Command = Command {
    name: "disconnect",
    usage: "[OPTIONS] NETWORK CONTAINER",
    about: "Disconnect a container from a network",
    flags: &[Flag::switch("force", "Disconnect whatever stands against it").short('f')],
    operands: Operands::Exactly(2),
    run: runs!(disconnect),
    ..Command::EMPTY
};

async fn create(context: &Context, matches: Matches) -> Outcome {
    let some_map = |flag: &str| {
        let map = pairs(&matches.list(flag));
        (!map.is_empty()).then_some(map)
    };
    if matches.is("ingress") {
        return Err(Fault::said("--ingress is of Swarm, which there is not"));
    }
    let config_from = matches.optional("config-from");
    let body = NetworkCreateRequest {
        name: matches.operand(0).to_owned(),
        driver: Some(matches.text("driver").to_owned()),
        scope: matches.optional("scope").map(str::to_owned),
        internal: Some(matches.is("internal")),
        attachable: Some(matches.is("attachable")),
        enable_ipv4: matches.given("ipv4").then(|| matches.is("ipv4")),
        enable_ipv6: matches.given("ipv6").then(|| matches.is("ipv6")),
        ipam: Some(Ipam {
            driver: Some(matches.text("ipam-driver").to_owned()),
            options: some_map("ipam-opt"),
            config: Some(subnets(&matches)?),
        }),
        options: some_map("opt"),
        labels: some_map("label"),
        config_only: matches.is("config-only").then_some(true),
        config_from: config_from.map(|name| ConfigReference { network: Some(name.to_owned()) }),
        ..NetworkCreateRequest::default()
    };
    let answer = context.client.post("/networks/create").json(&body)?.send().await?.value().await?;
    let warning = answer.at("Warning").text();
    if !warning.is_empty() {
        output::error_line(&format!("WARNING: {warning}"));
    }
    output::line(answer.at("Id").text());
    Ok(())
}

/// Subnets with the ranges, gateways and reserved addresses that lie in them.
fn subnets(matches: &Matches) -> Outcome<Vec<IpamConfig>> {
    let given = matches.owned_list("subnet");
    let (ranges, gateways) = (matches.owned_list("ip-range"), matches.owned_list("gateway"));
    if given.len() < ranges.len() || given.len() < gateways.len() {
        return Err(Fault::said("every ip-range or gateway must have a corresponding subnet"));
    }
    let mut all = Vec::new();
    for subnet in given {
        let net =
            Net::parse(&subnet).ok_or_else(|| Fault::said(format!("invalid CIDR address: {subnet}")))?;
        let mut config = IpamConfig { subnet: Some(subnet), ..IpamConfig::default() };
        config.ip_range = ranges.iter().find(|range| net.holds(range)).cloned();
        config.gateway = gateways.iter().find(|gateway| net.holds(gateway)).cloned();
        let reserved: std::collections::HashMap<String, String> = pairs(&matches.list("aux-address"))
            .into_iter()
            .filter(|(_, address)| net.holds(address))
            .collect();
        config.auxiliary_addresses = (!reserved.is_empty()).then_some(reserved);
        all.push(config);
    }
    for (what, values) in [("range", &ranges), ("gateway", &gateways)] {
        if let Some(stray) = values.iter().find(|value| {
            !all.iter().any(|config| {
                config.ip_range.as_ref() == Some(*value) || config.gateway.as_ref() == Some(*value)
            })
        }) {
            return Err(Fault::said(format!("no matching subnet for {what} {stray}")));
        }
    }
    Ok(all)
}

struct Net {
    bits: u128,
    length: u32,
    v4: bool,
}

impl Net {
    fn parse(text: &str) -> Option<Self> {
        let (address, length) = text.split_once('/')?;
        let (bits, v4) = Self::address(address)?;
        let length: u32 = length.parse().ok()?;
        (length <= if v4 { 32 } else { 128 }).then_some(Self { bits, length, v4 })
    }

    fn address(text: &str) -> Option<(u128, bool)> {
        match text.parse::<std::net::IpAddr>().ok()? {
            std::net::IpAddr::V4(address) => Some((u128::from(address.to_bits()), true)),
            std::net::IpAddr::V6(address) => Some((address.to_bits(), false)),
        }
    }

    /// Whether an address, or the start of a range, lies in this net.
    fn holds(&self, text: &str) -> bool {
        let address = text.split_once('/').map_or(text, |(address, _)| address);
        let Some((bits, v4)) = Self::address(address) else { return false };
        let width = if v4 { 32 } else { 128 };
        let shift = width - self.length;
        v4 == self.v4 && (shift == 128 || (bits >> shift) == (self.bits >> shift))
    }
}

async fn list(context: &Context, matches: Matches) -> Outcome {
    let mut format = chosen_format(context, matches.text("format"), "networksFormat")?;
    if matches.is("quiet") && !matches.given("format") {
        "{{.ID}}".clone_into(&mut format);
    }
    let filters = listing::filters(&matches.list("filter"))?;
    let answer =
        context.client.get("/networks").maybe("filters", filters.as_deref()).send().await?.value().await?;
    let full = matches.is("no-trunc");
    let mut networks: Vec<&Value> = answer.list().iter().collect();
    networks.sort_by(|a, b| a.at("Name").text().cmp(b.at("Name").text()));
    let rows = networks
        .iter()
        .map(|network| {
            let id = network.at("Id").text();
            let created = network.at("Created").text().parse::<Timestamp>().unwrap_or(Timestamp::UNIX_EPOCH);
            let labels = network.at("Labels");
            Row::new()
                .with("ID", if full { id } else { short_id(id) })
                .with("Name", network.at("Name").text())
                .with("Driver", network.at("Driver").text())
                .with("Scope", network.at("Scope").text())
                .with("IPv4", network.at("EnableIPv4").bool().to_string())
                .with("IPv6", network.at("EnableIPv6").bool().to_string())
                .with("Internal", network.at("Internal").bool().to_string())
                .with("Labels", listing::labels(labels))
                .with("CreatedAt", units::go_time(created))
                .hidden("Label", labels.clone())
        })
        .collect();
    let listing = Listing {
        kind: "*network.networkContext",
        titles: &[
            ("ID", "NETWORK ID"),
            ("Name", "NAME"),
            ("Driver", "DRIVER"),
            ("Scope", "SCOPE"),
            ("IPv4", "IPV4"),
            ("IPv6", "IPV6"),
            ("Internal", "INTERNAL"),
            ("Labels", "LABELS"),
            ("CreatedAt", "CREATED AT"),
        ],
        table: "{{.ID}}\t{{.Name}}\t{{.Driver}}\t{{.Scope}}",
    };
    listing.print(&format, rows)
}

async fn remove(context: &Context, matches: Matches) -> Outcome {
    let force = matches.is("force");
    for_each(matches.operands(), async |name| {
        match context.client.delete(format!("/networks/{}", encode(name))).done().await {
            Err(fault) if force && fault.is_not_found() => Ok(()),
            other => other,
        }
    })
    .await
}

async fn connect(context: &Context, matches: Matches) -> Outcome {
    let owned = |flag: &str| matches.optional(flag).map(str::to_owned);
    let options = pairs(&matches.list("driver-opt"));
    let body = NetworkConnectRequest {
        container: matches.operand(1).to_owned(),
        endpoint_config: Some(EndpointSettings {
            aliases: matches.some_list("alias"),
            links: matches.some_list("link"),
            driver_opts: (!options.is_empty()).then_some(options),
            gw_priority: matches.int("gw-priority")?,
            ipam_config: Some(EndpointIpamConfig {
                ipv4_address: owned("ip"),
                ipv6_address: owned("ip6"),
                link_local_ips: matches.some_list("link-local-ip"),
            }),
            ..EndpointSettings::default()
        }),
    };
    context.client.post(format!("/networks/{}/connect", encode(matches.operand(0)))).json(&body)?.done().await
}

async fn disconnect(context: &Context, matches: Matches) -> Outcome {
    let body = NetworkDisconnectRequest {
        container: matches.operand(1).to_owned(),
        force: Some(matches.is("force")),
    };
    context
        .client
        .post(format!("/networks/{}/disconnect", encode(matches.operand(0))))
        .json(&body)?
        .done()
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nets_hold_their_addresses() {
        let net = Net::parse("10.1.0.0/16").unwrap();
        assert!(net.holds("10.1.2.3") && net.holds("10.1.4.0/24"));
        assert!(!net.holds("10.2.0.1") && !net.holds("fd00::1"));
        assert!(Net::parse("10.1.0.0").is_none() && Net::parse("10.1.0.0/33").is_none());
        assert!(Net::parse("::/0").unwrap().holds("fd00::1"));
    }
}
