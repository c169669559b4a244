//! `brig ps`: the list of containers.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::chosen_format;
use crate::context::Context;
use crate::fault::Outcome;
use crate::listing::{self, Listing, Row, ellipsis, short_id};
use crate::units;
use crate::value::Value;

pub static COMMAND: Command = Command {
    name: "ps",
    usage: "[OPTIONS]",
    about: "List containers",
    flags: &[
        Flag::switch("all", "Show stopped containers too").short('a'),
        Flag::one("filter", "filter", "Show only what matches").short('f').as_list(),
        Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template"),
        Flag::one("last", "int", "Show the n containers created last, in any state").short('n').default("-1"),
        Flag::switch("latest", "Show the container created last, in any state").short('l'),
        Flag::switch("no-trunc", "Show everything in full"),
        Flag::switch("quiet", "Show IDs only").short('q'),
        Flag::switch("size", "Show sizes of files").short('s'),
    ],
    operands: Operands::None,
    run: runs!(run),
    ..Command::EMPTY
};

const TITLES: &[(&str, &str)] = &[
    ("ID", "CONTAINER ID"),
    ("Names", "NAMES"),
    ("Image", "IMAGE"),
    ("Command", "COMMAND"),
    ("CreatedAt", "CREATED AT"),
    ("RunningFor", "CREATED"),
    ("Ports", "PORTS"),
    ("State", "STATE"),
    ("Status", "STATUS"),
    ("Size", "SIZE"),
    ("Labels", "LABELS"),
    ("Mounts", "MOUNTS"),
    ("LocalVolumes", "LOCAL VOLUMES"),
    ("Networks", "NETWORKS"),
    ("Platform", "PLATFORM"),
];

async fn run(context: &Context, matches: Matches) -> Outcome {
    let last = if matches.is("latest") { Some(1) } else { matches.int("last")?.filter(|n| *n > 0) };
    let mut format = chosen_format(context, matches.text("format"), "psFormat")?;
    let quiet = matches.is("quiet");
    if quiet && !matches.given("format") {
        "{{.ID}}".clone_into(&mut format);
    }
    let sized = matches.is("size") || (matches.given("format") && format.contains(".Size"));
    let filters = listing::filters(&matches.list("filter"))?;
    let answer = context
        .client
        .get("/containers/json")
        .flag("all", matches.is("all"))
        .maybe("limit", last.map(|n| n.to_string()).as_deref())
        .flag("size", sized)
        .maybe("filters", filters.as_deref())
        .send()
        .await?
        .value()
        .await?;
    let full = matches.is("no-trunc");
    let table = if sized {
        "{{.ID}}\t{{.Image}}\t{{.Command}}\t{{.RunningFor}}\t{{.Status}}\t{{.Ports}}\t{{.Names}}\t{{.Size}}"
    } else {
        "{{.ID}}\t{{.Image}}\t{{.Command}}\t{{.RunningFor}}\t{{.Status}}\t{{.Ports}}\t{{.Names}}"
    };
    let listing = Listing { kind: "*formatter.ContainerContext", titles: TITLES, table };
    listing.print(&format, answer.list().iter().map(|container| row(container, full)).collect())
}

/// One container as every list of containers shows it.
pub fn row(container: &Value, full: bool) -> Row {
    let id = container.at("Id").text();
    let created = container.at("Created").int();
    let command = container.at("Command").text();
    let command = if full { command.to_owned() } else { ellipsis(command, 20) };
    let mounts = container.at("Mounts").list();
    let mount_names: Vec<String> = mounts
        .iter()
        .map(|mount| {
            let name = mount.at("Name").text();
            let shown = if name.is_empty() { mount.at("Source").text() } else { name };
            if full { shown.to_owned() } else { ellipsis(shown, 15) }
        })
        .collect();
    let volumes = mounts.iter().filter(|mount| mount.at("Driver").text() == "local").count();
    let networks: Vec<&str> = container
        .at("NetworkSettings")
        .at("Networks")
        .entries()
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    let mut networks: Vec<String> = networks.into_iter().map(str::to_owned).collect();
    networks.sort();
    let labels = container.at("Labels");
    Row::new()
        .with("ID", if full { id } else { short_id(id) })
        .with("Names", names(container, full))
        .with("Image", image(container, full))
        .with("Command", format!("{command:?}"))
        .with("CreatedAt", units::go_time(units::from_unix(created)))
        .with("RunningFor", units::ago(created))
        .with("Ports", ports(container.at("Ports").list()))
        .with("State", container.at("State").text())
        .with("Status", container.at("Status").text())
        .with("Size", size(container))
        .with("Labels", listing::labels(labels))
        .with("Mounts", mount_names.join(","))
        .with("LocalVolumes", volumes.to_string())
        .with("Networks", networks.join(","))
        .with("Platform", Value::Null)
        .hidden("Label", labels.clone())
}

fn names(container: &Value, full: bool) -> String {
    let all = container.at("Names").list().iter().map(|name| name.text().trim_start_matches('/'));
    // A name with a slash in it is a link's: the container's own name stands first in short form.
    all.filter(|name| full || !name.contains('/')).collect::<Vec<_>>().join(",")
}

fn image(container: &Value, full: bool) -> String {
    let image = container.at("Image").text();
    if image.is_empty() {
        return "<no image>".to_owned();
    }
    if full {
        return image.to_owned();
    }
    let id = container.at("ImageID").text();
    if image == id || short_id(image) == short_id(id) {
        return short_id(image).to_owned();
    }
    // A digest says more than a column has room for.
    image.split_once('@').map_or(image, |(name, _)| name).to_owned()
}

/// Sizes: what was written, and with the image under it.
pub fn size(container: &Value) -> String {
    let (written, root) = (container.at("SizeRw").float(), container.at("SizeRootFs").float());
    let text = units::human_size(written, 3);
    if root > 0.0 { format!("{text} (virtual {})", units::human_size(root, 3)) } else { text }
}

/// `0.0.0.0:8080->80/tcp`, ranges drawn together.
pub fn ports(list: &[Value]) -> String {
    #[derive(PartialEq, Clone)]
    struct Port<'a> {
        private: i64,
        public: i64,
        proto: &'a str,
        ip: &'a str,
    }
    let mut all: Vec<Port> = list
        .iter()
        .map(|port| Port {
            private: port.at("PrivatePort").int(),
            public: port.at("PublicPort").int(),
            proto: port.at("Type").text(),
            ip: port.at("IP").text(),
        })
        .collect();
    all.sort_by(|a, b| (a.private, a.ip, a.public, a.proto).cmp(&(b.private, b.ip, b.public, b.proto)));
    // Published ports whose two sides are alike, and unpublished ports, are drawn together into ranges.
    let mut ranges: Vec<(String, i64, i64)> = Vec::new();
    let mut single = Vec::new();
    for port in &all {
        let group = match (port.public, port.ip) {
            (0, _) => port.proto.to_owned(),
            (public, ip) if public == port.private => format!("{}/{}", host(ip), port.proto),
            (public, ip) => {
                single.push(format!("{}:{public}->{}/{}", host(ip), port.private, port.proto));
                continue;
            }
        };
        match ranges.iter_mut().rev().find(|(name, _, _)| *name == group) {
            Some((_, _, last)) if *last + 1 == port.private => *last = port.private,
            Some((_, _, last)) if *last == port.private => {}
            _ => ranges.push((group, port.private, port.private)),
        }
    }
    let mut shown: Vec<(i64, String)> = ranges
        .into_iter()
        .map(|(group, low, high)| {
            let span = if low == high { low.to_string() } else { format!("{low}-{high}") };
            let text = match group.rsplit_once('/') {
                Some((ip, proto)) => format!("{ip}:{span}->{span}/{proto}"),
                None => format!("{span}/{group}"),
            };
            (low, text)
        })
        .collect();
    shown.sort_by_key(|(low, _)| *low);
    let mut texts: Vec<String> = shown.into_iter().map(|(_, text)| text).collect();
    texts.extend(single);
    texts.join(", ")
}

fn host(ip: &str) -> String {
    if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_drawn_together_where_both_sides_are_alike() {
        let list = |text: &str| match Value::parse(text.as_bytes()).unwrap() {
            Value::List(items) => items,
            _ => panic!("a list"),
        };
        let same = list(
            r#"[{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":80,"Type":"tcp"},{"IP":"0.0.0.0","PrivatePort":81,"PublicPort":81,"Type":"tcp"},
                {"PrivatePort":90,"Type":"tcp"},{"PrivatePort":91,"Type":"tcp"}]"#,
        );
        assert_eq!(ports(&same), "0.0.0.0:80-81->80-81/tcp, 90-91/tcp");
        let other = list(
            r#"[{"IP":"::","PrivatePort":80,"PublicPort":8080,"Type":"tcp"},{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":8080,"Type":"tcp"}]"#,
        );
        assert_eq!(ports(&other), "0.0.0.0:8080->80/tcp, [::]:8080->80/tcp");
        assert_eq!(ports(&[]), "");
    }
}
